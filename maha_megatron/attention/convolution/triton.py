"""The convolution by kernels: one launch for q, k and v, one for all their gradients.

Floor: forward reads and writes q, k and v once, backward reads them and their gradients and writes one: with n + 2g =
48 heads of 128 channels in bf16, 24.6 and 36.9 kB a row. Kept for backward are the arguments alone, as by eager.py,
which serves what the kernels do not. Arithmetic is in fp32, every sum has a fixed order: results are bitwise
reproducible.
"""

import functools
import logging

import torch
import triton

import maha_megatron.attention.convolution.eager as eager
from maha_megatron.attention.convolution.triton_walk import Lines, Packed, convolution_gradient_kernel, convolve_kernel
from maha_megatron.attention.triton_launch import Launch, lined_up, unserved_heads

_log = logging.getLogger(__name__)
_NUMBERS_PER_STEP = 1024  # 8 a thread: 16 bytes of a 16-bit dtype
STEPS = 32  # of two rows: the rows of a segment that are read twice, 4 and 8 in backward, come from a cache


def convolve(q_tnd, k_tgd, v_tgd, document_start_t, weight, past_rows=None):
    """x + silu(conv(x)) on every channel of q, k and v; see convolution/naive.py for shapes."""
    missing = unserved_heads(q_tnd.shape[-1], q_tnd.dtype)
    if missing:
        _say_once(missing)
        return eager.convolve(q_tnd, k_tgd, v_tgd, document_start_t, weight, past_rows)
    return convolve_rows(q_tnd, k_tgd, v_tgd, past_rows, document_start_t, weight, STEPS)


@functools.cache
def _say_once(missing: str) -> None:
    _log.info("convolution: no kernel serves %s; eager does", missing)


class Call:
    """One call's tensors and numbers, as the kernels take them; `steps` of two rows make a segment."""

    def __init__(self, x, past, document_start, taps, steps: int):
        self.x, self.document_start, self.taps = [lined_up(rows) for rows in x], document_start.contiguous(), taps
        self.past = None if past is None else past.contiguous()
        (self.rows, self.n, self.d), self.g = x[0].shape, x[1].shape[1]
        self.steps, self.lanes = steps, _NUMBERS_PER_STEP // self.d
        self.blocks = triton.cdiv(self.rows, self.lanes * steps)

    def _launch(self, kernel: triton.JITFunction, **arguments) -> Launch:
        arguments |= {
            "x": lines_of(self.x),
            "past": self.past,
            "taps": self.taps.contiguous(),
            "packed": Packed(self.document_start, self.rows, self.n, self.g),
            "WIDTH": self.d,
            "LANES": self.lanes,
            "STEPS": self.steps,
        }
        # heads first: programs that run together read neighbouring channels of the same rows
        grid, device = (self.n + 2 * self.g, self.blocks), self.x[0].device
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options={"num_warps": 4}, device=device)

    def mixing(self, out) -> Launch:
        return self._launch(convolve_kernel, out=lines_of(out))

    def gradients(self, grad, grad_x, grad_past, parts) -> Launch:
        made = {"grad": lines_of(grad), "grad_x": lines_of(grad_x), "grad_past": grad_past, "parts": parts}
        return self._launch(convolution_gradient_kernel, **made)

    def empty(self) -> list[torch.Tensor]:
        return [torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) for rows in self.x]

    def forward(self) -> list[torch.Tensor]:
        out = self.empty()
        self.mixing(out).run()
        return out

    def backward(self, grad) -> list[torch.Tensor]:
        """Gradients of q, k, v, the taps and, where there is one, the past."""
        grad_x, past = self.empty(), self.past
        grad_past = None if past is None else torch.empty(past.shape, dtype=past.dtype, device=past.device)
        parts = torch.empty((self.blocks, *self.taps.shape), dtype=torch.float32, device=self.taps.device)
        self.gradients([lined_up(x) for x in grad], grad_x, grad_past, parts).run()
        made = [*grad_x, parts.sum(0).to(self.taps.dtype)]
        return made if past is None else [*made, grad_past]


def lines_of(tensors) -> Lines:
    """Of q, k and v, whose channels are next to each other."""
    return Lines(tuple(tensors), tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors))


@torch.library.custom_op("maha_megatron::convolve_rows", mutates_args=())
def convolve_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor | None,
    document_start: torch.Tensor,
    taps: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v after the convolution."""
    return tuple(Call((q, k, v), past, document_start, taps, steps).forward())


@convolve_rows.register_fake
def _(q, k, v, past, document_start, taps, steps):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@torch.library.custom_op("maha_megatron::convolve_rows_backward", mutates_args=())
def convolve_rows_backward(
    grad: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor | None,
    document_start: torch.Tensor,
    taps: torch.Tensor,
    steps: int,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, the taps and, where there is one, the past; `grad`: of q, k and v."""
    return Call((q, k, v), past, document_start, taps, steps).backward(grad)


@convolve_rows_backward.register_fake
def _(grad, q, k, v, past, document_start, taps, steps):
    return [x.new_empty(x.shape) for x in (q, k, v, taps, past) if x is not None]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.steps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, *grad) -> tuple:
    q, k, v, past, document_start, taps = ctx.saved_tensors
    made = convolve_rows_backward(list(grad), q, k, v, past, document_start, taps, ctx.steps)
    *of_rows, of_taps = made[:4]
    return *of_rows, made[4] if past is not None else None, None, of_taps, None


convolve_rows.register_autograd(_backward, setup_context=_keep)

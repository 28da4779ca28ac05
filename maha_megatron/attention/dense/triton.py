"""Dense attention whose queries and keys one kernel normalises and rotates, before torch's best attention kernel.

Without it, eager's separate operations take longer than attention itself at 4,096 tokens on a GPU. Kept for backward
are the raw queries and keys. Every sum has a fixed order: results are bitwise reproducible.
"""

import functools
import logging

import torch
import triton

import maha_megatron.attention.dense.eager as eager
from maha_megatron.attention.dense.triton_turn import Heads, Packed, turn_gradient_kernel, turn_kernel
from maha_megatron.attention.scale_attention.triton_geometry import frequency_table
from maha_megatron.attention.spec import AttentionParameters, DenseSpec
from maha_megatron.attention.triton_launch import Launch, compiled, lined_up, unserved_heads
from maha_megatron.attention.triton_sums import adding_up

_log = logging.getLogger(__name__)
_ROWS = 32  # of a program: 32 numbers a thread with heads of 128 channels


def attend_dense(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: DenseSpec,
    *documents,
) -> torch.Tensor:
    """As eager.attend_dense."""
    missing = unserved_heads(q_tnd.shape[-1], q_tnd.dtype)
    if missing:
        _say_once(missing)
        return eager.attend_dense(q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, *documents)
    gains = (parameters.query_gain, parameters.key_gain)
    q_tnd, k_tgd = _Turn.apply(q_tnd, k_tgd, *gains, document_start_t, spec.rope_base, spec.norm_epsilon)
    return eager.attend_prepared(q_tnd, k_tgd, v_tgd, *documents)


@functools.cache
def _say_once(missing: str) -> None:
    _log.info("normalisation and rotation of dense attention: no kernel serves %s; eager does", missing)


class Call:
    """One call's tensors and numbers, as the kernels take them."""

    def __init__(self, q, k, query_gain, key_gain, document_start, rope_base: float, epsilon: float):
        assert (query_gain is None) == (key_gain is None), "gains of queries or keys alone"
        self.x = (lined_up(q), lined_up(k))
        self.gains = None if query_gain is None else (query_gain.contiguous(), key_gain.contiguous())
        self.document_start, self.rope_base, self.epsilon = document_start.contiguous(), rope_base, epsilon
        (self.rows, self.n, self.d), self.g = q.shape, k.shape[1]
        self.heads = self.n + self.g
        self.tiles = triton.cdiv(self.rows, _ROWS)

    def _launch(self, kernel: triton.JITFunction, **tensors) -> Launch:
        device, dtype = self.x[0].device, self.x[0].dtype
        frequency = frequency_table(self.d, self.rope_base, 2, 1, device)
        arguments = tensors | {
            "x": heads_of(self.x),
            "gains": self.gains,
            "packed": Packed(self.document_start, frequency, self.rows, self.n, self.heads),
            "EPSILON": self.epsilon,
            "NORMALISED": self.gains is not None,
            "HALF": self.d // 2,
            "FAST": dtype.itemsize == 2 and compiled(),
            "ROWS": _ROWS,
        }
        grid = (self.tiles * self.heads,)  # of one axis: the others end at 65,535, which is two million rows
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options={"num_warps": 4}, device=device)

    def turning(self, turned) -> Launch:
        return self._launch(turn_kernel, turned=heads_of(turned))

    def gradients(self, grad, grad_x, parts) -> Launch:
        return self._launch(turn_gradient_kernel, grad=heads_of(grad), grad_x=heads_of(grad_x), parts=parts)

    def forward(self) -> tuple[torch.Tensor, ...]:
        turned = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.x)
        self.turning(turned).run()
        return turned

    def backward(self, grad) -> list[torch.Tensor]:
        """Gradients of q and k and, where there are gains, of theirs."""
        grad_x = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in self.x]
        wide = {"dtype": torch.float32, "device": self.x[0].device}
        parts = torch.empty((self.tiles, self.heads, self.d), **wide) if self.gains else None
        self.gradients([lined_up(x) for x in grad], grad_x, parts).run()
        if not self.gains:
            return grad_x
        sums = torch.empty((self.heads, self.d), **wide)
        adding_up([(parts, sums)]).run()
        of_gains = zip(sums.split((self.n, self.g)), self.gains, strict=True)
        return grad_x + [total.to(gain.dtype, copy=True) for total, gain in of_gains]


def heads_of(tensors) -> Heads:
    """Of queries and keys, whose channels are next to each other."""
    return Heads(tuple(tensors), tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors))


@torch.library.custom_op("maha_megatron::turn_heads", mutates_args=())
def turn_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    query_gain: torch.Tensor | None,
    key_gain: torch.Tensor | None,
    document_start: torch.Tensor,
    rope_base: float,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [t, n, d] and keys [t, g, d], normalised and times their gains where there are any, and rotated."""
    return Call(q, k, query_gain, key_gain, document_start, rope_base, epsilon).forward()


@turn_heads.register_fake
def _(q, k, query_gain, key_gain, document_start, rope_base, epsilon):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("maha_megatron::turn_heads_backward", mutates_args=())
def turn_heads_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    query_gain: torch.Tensor | None,
    key_gain: torch.Tensor | None,
    document_start: torch.Tensor,
    rope_base: float,
    epsilon: float,
) -> list[torch.Tensor]:
    """Gradients of q and k and, where there are gains, of theirs; `grad_q`, `grad_k`: of what `turn_heads` returns."""
    return Call(q, k, query_gain, key_gain, document_start, rope_base, epsilon).backward((grad_q, grad_k))


@turn_heads_backward.register_fake
def _(grad_q, grad_k, q, k, query_gain, key_gain, *others):
    return [x.new_empty(x.shape) for x in (q, k, query_gain, key_gain) if x is not None]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, query_gain, key_gain, document_start, *numbers):
        ctx.save_for_backward(q, k, query_gain, key_gain, document_start)
        ctx.numbers = numbers
        return turn_heads(q, k, query_gain, key_gain, document_start, *numbers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_q, grad_k):
        made = turn_heads_backward(grad_q, grad_k, *ctx.saved_tensors, *ctx.numbers)
        return *made, *(None,) * (7 - len(made))

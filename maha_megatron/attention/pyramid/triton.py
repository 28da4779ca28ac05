"""The pyramid by kernels: one launch a level, and one autograd function for all levels.

Kept for backward are the levels below the coarsest, which scale attention keeps anyway. In backward the gradients of
all levels arrive together: each level's is added to the finer one's where it is written, so no sum of two gradients of
a level's size is made by autograd. Arithmetic is in fp32, every sum has a fixed order: results are bitwise
reproducible. A key map and fp64 go to eager.py.
"""

import functools
import logging
from collections.abc import Sequence

import torch
import triton

import maha_megatron.attention.pyramid.eager as eager
from maha_megatron.attention.pyramid.triton_pool import Pair, Pieces, pool_gradient_kernel, pool_kernel
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.triton_launch import Launch
from maha_megatron.scales import slot_count, stride

_log = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEARNED = {"gated": ("gate_query", "gate_bias"), "conv": ("pool_kernel",), "mean": (), "max": ()}
_NUMBERS_PER_TILE = 4096  # 32 a thread
_GROUPS = 4  # of one program: they share the slot arithmetic
Level = tuple[torch.Tensor, torch.Tensor]


def build_pyramid(
    rows: Level,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past: Sequence[Level] | None = None,
) -> list[Level]:
    """Packed keys and values of every scale; see pyramid/naive.py for shapes."""
    missing = what_no_kernel_serves(rows[0], spec)
    if missing:
        _say_once(missing)
        return eager.build_pyramid(rows, document_start_t, parameters, spec, past)
    if past is not None:
        rows = tuple(torch.cat(parts) for parts in zip(past[0], rows, strict=True))
    if spec.scales == 1:
        return [rows]
    learned = [getattr(parameters, name) for name in _LEARNED[spec.downsampling]]
    older = [] if past is None else [tensor for level in past[1:] for tensor in level]
    return _pairs(_Pyramid.apply(spec, document_start_t, len(learned), *rows, *learned, *older))


def what_no_kernel_serves(keys: torch.Tensor, spec: MahaSpec) -> str | None:
    """What of a call keeps the kernels from serving it, in words; None where they do."""
    width = keys.shape[-1]
    if keys.dtype not in _DTYPES:
        return f"{keys.dtype}"
    if width not in (32, 64, 128):
        return f"heads of {width} channels"
    return "a key map" if spec.key_map else None


@functools.cache
def _say_once(missing: str) -> None:
    _log.info("pyramid: no kernel serves %s; eager does", missing)


class _Pyramid(torch.autograd.Function):
    """All levels, keys and values in turn, from those of scale 0; `tensors`: `count` learned ones, then what lies in
    front of slot 0 of every coarser scale, in turn too.
    """

    @staticmethod
    def forward(ctx, spec, document_start, count, keys, values, *tensors):
        learned, older = tensors[:count], _pairs(tensors[count:])
        rows = _lined_up((keys, values))
        past_slots = [0] * spec.scales
        if older:
            past_slots = [len(keys) - len(document_start), *(len(level[0]) for level in older)]
        coarser = Call(spec, document_start, learned, keys, past_slots).forward(rows, older)[1:]
        ctx.spec, ctx.past_slots, ctx.count, ctx.older = spec, past_slots, count, len(older)
        read = [tensor for level in (rows, *coarser[:-1]) for tensor in level]
        ctx.save_for_backward(document_start, *learned, *read)
        return keys, values, *(tensor for level in coarser for tensor in level)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        document_start, *tensors = ctx.saved_tensors
        learned, levels = tensors[: ctx.count], _pairs(tensors[ctx.count :])
        call = Call(ctx.spec, document_start, learned, grads[0], ctx.past_slots)
        totals, of_learned = call.backward(levels, [_lined_up(level) for level in _pairs(grads)])
        pasts = zip(ctx.past_slots[1 : 1 + ctx.older], totals[1:], strict=False)
        of_older = [grad[:past] for past, level in pasts for grad in level]
        return None, None, None, *totals[0], *of_learned, *of_older


class Call:
    """One call's tensors and numbers, as the kernels take them."""

    def __init__(
        self,
        spec: MahaSpec,
        document_start: torch.Tensor,
        learned: Sequence[torch.Tensor],
        like: torch.Tensor,
        past_slots: Sequence[int],
    ):
        self.spec, self.document_start, self.like = spec, document_start.contiguous(), like
        self.learned, self.past_slots = [x.contiguous() for x in learned], past_slots
        self.g, self.d = like.shape[1:]
        self.slots = [slot_count(len(document_start), stride(spec.ratio, scale)) for scale in range(spec.scales)]
        self.children = triton.next_power_of_2(spec.ratio)
        self.tile = max(1, _NUMBERS_PER_TILE // (self.children * self.d))

    def empty(self, scale: int) -> Level:
        """Room for one level."""
        shape, like = (self.past_slots[scale] + self.slots[scale], self.g, self.d), self.like
        return tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def _launch(self, kernel: triton.JITFunction, scale: int, slots: int, arguments: dict[str, object]) -> Launch:
        """Of a kernel that makes `scale` from the finer scale, or its gradient."""
        arguments |= {
            "learned": tuple(x[scale - 1] for x in self.learned),
            "pieces": Pieces(
                self.document_start,
                len(self.document_start),
                scale,
                self.past_slots[scale - 1],
                self.past_slots[scale],
            ),
            "g": self.g,
            "METHOD": self.spec.downsampling,
            "RATIO": self.spec.ratio,
            "CHILDREN": self.children,
            "WIDTH": self.d,
            "TILE": self.tile,
            "GROUPS": _GROUPS,
        }
        grid = (triton.cdiv(slots, self.tile), triton.cdiv(self.g, _GROUPS), 2)
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options={"num_warps": 4})

    def pooling(self, scale: int, finer: Level, pooled: Level) -> Launch:
        arguments = {"finer": _pair(finer), "pooled": _pair(pooled)}
        return self._launch(pool_kernel, scale, self.slots[scale], arguments)

    def gradient(self, scale: int, finer: Level, grad_pooled: Level, grad_finer: Level, grad_total: Level):
        """The launch that adds what `scale` asks of the finer level, and the learned tensors' gradients in parts."""
        before = triton.cdiv(self.past_slots[scale - 1], self.spec.ratio)
        slots = before + self.slots[scale]
        parts = [
            torch.empty((triton.cdiv(slots, self.tile), *x.shape[1:]), dtype=torch.float32, device=x.device)
            for x in self.learned
        ]
        arguments = {
            "finer": _pair(finer),
            "grad_pooled": _pair(grad_pooled),
            "grad_finer": _pair(grad_finer),
            "grad_total": _pair(grad_total),
            "parts": tuple(parts),
            "slots_in_front": before,
        }
        return self._launch(pool_gradient_kernel, scale, slots, arguments), parts

    def forward(self, rows: Level, older: Sequence[Level]) -> list[Level]:
        """All levels; `rows` and `older` are what the caller has of scale 0 and in front of the coarser ones."""
        levels = [rows]
        for scale in range(1, self.spec.scales):
            pooled = self.empty(scale)
            for to, entries in zip(pooled, older[scale - 1] if older else (), strict=False):
                to[: len(entries)] = entries
            self.pooling(scale, levels[-1], pooled).run()
            levels.append(pooled)
        return levels

    def backward(self, levels: Sequence[Level], grads: Sequence[Level]) -> tuple[list[Level], list[torch.Tensor]]:
        """Whole gradients of all levels, and those of the learned tensors; `grads`: what is given of each level."""
        totals, of_scales = [grads[-1]], []
        for scale in range(self.spec.scales - 1, 0, -1):
            total = self.empty(scale - 1)
            launch, parts = self.gradient(scale, levels[scale - 1], totals[0], grads[scale - 1], total)
            launch.run()
            totals.insert(0, total)
            of_scales.insert(0, [part.sum(0) for part in parts])
        learned = [
            torch.stack(of_one).to(tensor.dtype)
            for tensor, of_one in zip(self.learned, zip(*of_scales, strict=True), strict=True)
        ]
        return totals, learned


def _pairs(tensors: Sequence[torch.Tensor]) -> list[Level]:
    """Keys and values that come in turn, level by level."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _pair(level: Level) -> Pair:
    keys, values = level
    return Pair(level, (keys.stride(0), values.stride(0)), (keys.stride(1), values.stride(1)))


def _lined_up(level: Level) -> Level:
    """The level itself where channels are next to each other, else a copy in which they are."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in level)

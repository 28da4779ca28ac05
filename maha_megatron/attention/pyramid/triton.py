"""The pyramid by kernels: one launch a level, and one autograd function for all levels.

Kept for backward are the levels below the coarsest, which scale attention keeps anyway. In backward the gradients of
all levels arrive together: each level's is added to the finer one's where it is written, so no sum of two gradients of
a level's size is made by autograd. Arithmetic is in fp32, every sum has a fixed order: results are bitwise
reproducible. A key map, pooled queries and fp64 go to eager.py.
"""

import functools
import logging
from collections.abc import Sequence

import torch

import maha_megatron.attention.pyramid.eager as eager
from maha_megatron.attention.pyramid.triton_levels import Call, Level, pairs
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.triton_launch import lined_up, unserved_heads

_log = logging.getLogger(__name__)


def build_pyramid(
    rows: tuple[torch.Tensor, ...],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past: Sequence[Level] | None = None,
) -> list[Level]:
    """Packed keys and values of every scale; see pyramid/naive.py for shapes."""
    missing = what_no_kernel_serves(rows, spec)
    if missing:
        _say_once(missing)
        return eager.build_pyramid(rows, document_start_t, parameters, spec, past)
    if past is not None:
        rows = tuple(torch.cat(parts) for parts in zip(past[0], rows, strict=True))
    if spec.scales == 1:
        return [rows]
    learned = learned_of(parameters, spec)
    older = [] if past is None else [tensor for level in past[1:] for tensor in level]
    return pairs(_Pyramid.apply(spec, document_start_t, len(learned), *rows, *learned, *older))


def learned_of(parameters: AttentionParameters, spec: MahaSpec) -> list[torch.Tensor]:
    """The learned tensors of a downsampling; none where there is one scale."""
    return [] if spec.scales == 1 else [getattr(parameters, name) for name in eager.LEARNED[spec.downsampling]]


def what_no_kernel_serves(rows: tuple[torch.Tensor, ...], spec: MahaSpec) -> str | None:
    """What of a call keeps the kernels from serving it, in words; None where they do."""
    if len(rows) != 2:
        return "queries alone"
    return unserved_heads(rows[0].shape[-1], rows[0].dtype) or ("a key map" if spec.key_map else None)


@functools.cache
def _say_once(missing: str) -> None:
    _log.info("pyramid: no kernel serves %s; eager does", missing)


class _Pyramid(torch.autograd.Function):
    """All levels, keys and values in turn, from those of scale 0; `tensors`: `count` learned ones, then what lies in
    front of slot 0 of every coarser scale, in turn too.
    """

    @staticmethod
    def forward(ctx, spec, document_start, count, keys, values, *tensors):
        learned, older = list(tensors[:count]), list(tensors[count:])
        past_slots = [0] * spec.scales
        if older:
            past_slots = [len(keys) - len(document_start), *(len(level[0]) for level in pairs(older))]
        numbers = (spec.downsampling, spec.ratio, past_slots)
        rows = (lined_up(keys), lined_up(values))
        coarser = pool_levels(*rows, document_start, learned, older, *numbers)
        ctx.numbers, ctx.count, ctx.older = numbers, count, len(older) // 2
        ctx.save_for_backward(document_start, *learned, *rows, *coarser[:-2])
        return keys, values, *coarser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        document_start, *tensors = ctx.saved_tensors
        learned, levels, scales = tensors[: ctx.count], tensors[ctx.count :], len(grads) // 2
        made = pool_levels_backward(list(grads), document_start, learned, levels, *ctx.numbers)
        totals = pairs((*made[: 2 * scales - 2], *grads[-2:]))
        pasts = zip(ctx.numbers[-1][1 : 1 + ctx.older], totals[1:], strict=False)
        of_older = [grad[:past] for past, level in pasts for grad in level]
        return None, None, None, *totals[0], *made[2 * scales - 2 :], *of_older


@torch.library.custom_op("maha_megatron::pool_levels", mutates_args=())
def pool_levels(
    keys: torch.Tensor,
    values: torch.Tensor,
    document_start: torch.Tensor,
    learned: list[torch.Tensor],
    older: list[torch.Tensor],
    downsampling: str,
    ratio: int,
    past_slots: list[int],
) -> list[torch.Tensor]:
    """Keys and values of every coarser level, in turn."""
    call = Call(downsampling, ratio, document_start, learned, keys, past_slots)
    return [tensor for level in call.forward((keys, values), pairs(older))[1:] for tensor in level]


@pool_levels.register_fake
def _(keys, values, document_start, learned, older, downsampling, ratio, past_slots):
    call = Call(downsampling, ratio, document_start, learned, keys, past_slots)
    return [tensor for scale in range(1, len(past_slots)) for tensor in call.empty(scale)]


@torch.library.custom_op("maha_megatron::pool_levels_backward", mutates_args=())
def pool_levels_backward(
    grads: list[torch.Tensor],
    document_start: torch.Tensor,
    learned: list[torch.Tensor],
    levels: list[torch.Tensor],
    downsampling: str,
    ratio: int,
    past_slots: list[int],
) -> list[torch.Tensor]:
    """Whole gradients of all levels but the coarsest, in turn, and of the learned tensors; `grads`: of every level."""
    call = Call(downsampling, ratio, document_start, learned, levels[0], past_slots)
    totals, of_learned = call.backward(pairs(levels), pairs([lined_up(grad) for grad in grads]))
    return [*(tensor for level in totals[:-1] for tensor in level), *of_learned]


@pool_levels_backward.register_fake
def _(grads, document_start, learned, levels, downsampling, ratio, past_slots):
    return [x.new_empty(x.shape) for x in (*levels, *learned)]

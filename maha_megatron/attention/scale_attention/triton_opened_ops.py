"""A refined layer's attention by kernels as operators of torch, like those of triton_ops.py."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.scale_attention.triton_opened import Call
from maha_megatron.attention.scale_attention.triton_ops import (
    Numbers,
    Tensor,
    Tensors,
    call_of,
    capability_of,
    empty_outputs,
    in_turn,
    of_inputs,
    tensors_of,
)
from maha_megatron.attention.scale_attention.triton_tuning import Tuning, numbers_of, tuning_for
from maha_megatron.attention.spec import AttentionParameters, MahaSpec, Refinement


def attend_opening(
    q_tnd: torch.Tensor,
    levels: Sequence[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int],
    with_weights: bool,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `attend_jointly` of triton_ops.py, of a refined layer; the weights are [t, n, L + 1].

    In front of slot 0 levels may have more than a window: blocks of the past that may be opened.
    """
    tuning = tuning or tuning_for(q_tnd.dtype.itemsize, capability_of(q_tnd.device))
    refine = spec.refine
    out, _, weights, _ = refined_attention(
        *tensors_of(q_tnd, levels, document_start_t, parameters),
        spec.ratio,
        list(spec.windows),
        list(past_slots),
        [refine.from_scale, refine.to_scale, refine.blocks],
        spec.rope_base,
        spec.rope_unit,
        spec.norm_epsilon,
        with_weights,
        numbers_of(tuning),
    )
    return out, weights if with_weights else None


@torch.library.custom_op("maha_megatron::refined_attention", mutates_args=())
def refined_attention(
    q: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor,
    beta: Tensor,
    document_start: Tensor,
    keys: Tensors,
    values: Tensors,
    ratio: int,
    windows: Numbers,
    past_slots: Numbers,
    refine: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    with_weights: bool,
    tiles: Numbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [t, n, d], log-sum-exp [n, t] in units of log 2, scale weights [t, n, L + 1], empty if not asked for, and
    what was opened, int32 [g, t, blocks] (triton_arguments.Lists).

    `refine`: from_scale, to_scale and blocks.
    """
    tensors = (q, query_gain, key_gain, rho, beta, document_start, keys, values)
    call = _call(*tensors, ratio, windows, past_slots, refine, rope_base, rope_unit, norm_epsilon, tiles)
    found = call.forward_opened(with_weights)
    weights = found.lse.new_empty(0)
    if with_weights:
        parts = torch.cat((found.scale_lse, found.opened_lse.T[..., None]), -1)
        weights = torch.exp2(parts - found.lse.T[..., None])
    return found.out, found.lse, weights, found.chosen


@refined_attention.register_fake
def _(q, query_gain, key_gain, rho, beta, document_start, keys, values, ratio, windows, past_slots, refine, *others):
    chosen = q.new_empty(keys[0].shape[1], q.shape[0], refine[2], dtype=torch.int32)
    out, lse, _, weights = empty_outputs(q, len(windows) + 1, apart=False, with_weights=others[-2])
    return out, lse, weights, chosen


@torch.library.custom_op("maha_megatron::refined_attention_backward", mutates_args=())
def refined_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    q: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor,
    beta: Tensor,
    document_start: Tensor,
    keys: Tensors,
    values: Tensors,
    ratio: int,
    windows: Numbers,
    past_slots: Numbers,
    refine: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    tiles: Numbers,
) -> list[Tensor]:
    """Gradients of q, of every scale's keys, then values, of query gain and key gain, rho and beta."""
    tensors = (q, query_gain, key_gain, rho, beta, document_start, keys, values)
    call = _call(*tensors, ratio, windows, past_slots, refine, rope_base, rope_unit, norm_epsilon, tiles)
    return in_turn(*call.backward_opened(grad_out, out, lse, chosen))


@refined_attention_backward.register_fake
def _(grad_out, out, lse, chosen, q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers):
    return [x.new_empty(x.shape) for x in (q, *keys, *values, query_gain, key_gain, rho, beta)]


def _call(
    q, query_gain, key_gain, rho, beta, document_start, keys, values,
    ratio, windows, past_slots, refine, rope_base, rope_unit, norm_epsilon, tiles,
) -> Call:  # fmt: skip
    tensors = (q, query_gain, key_gain, rho, beta, document_start, keys, values)
    refinement = Refinement(**dict(zip(("from_scale", "to_scale", "blocks"), refine, strict=True)))
    numbers = (ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles)
    return call_of(Call, *tensors, *numbers, refine=refinement)


def _keep(ctx, inputs, output) -> None:
    *tensors, keys, values, ratio, windows, past_slots, refine, rope_base, rope_unit, norm_epsilon, _, tiles = inputs
    out, lse, weights, chosen = output
    ctx.mark_non_differentiable(lse, weights, chosen)
    ctx.save_for_backward(out, lse, chosen, *tensors, *keys, *values)
    ctx.numbers = ratio, windows, past_slots, refine, rope_base, rope_unit, norm_epsilon, tiles


def _backward(ctx, grad_out: Tensor, *_) -> tuple:
    out, lse, chosen, q, query_gain, key_gain, rho, beta, document_start, *levels = ctx.saved_tensors
    scales = len(levels) // 2
    given = (q, query_gain, key_gain, rho, beta, document_start, levels[:scales], levels[scales:])
    grads = refined_attention_backward(grad_out, out, lse, chosen, *given, *ctx.numbers)
    return *of_inputs(grads, scales), *(None,) * 9


refined_attention.register_autograd(_backward, setup_context=_keep)

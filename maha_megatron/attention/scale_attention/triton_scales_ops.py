"""Every scale's attention by kernels as operators of torch; see triton_ops.py, whose arguments these are."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.scale_attention.triton_ops import (
    Numbers,
    Tensor,
    Tensors,
    call_of,
    capability_of,
    in_turn,
    of_inputs,
    tensors_of,
)
from maha_megatron.attention.scale_attention.triton_scales import Call, Given
from maha_megatron.attention.scale_attention.triton_tuning import Tuning, numbers_of, tuning_for
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def attend_scales(
    q_tnd: torch.Tensor,
    levels: Sequence[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int],
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Outputs O [t, n, L, d] in q's dtype and log-sum-exps [t, n, L] in fp32: 0 and -inf where infeasible; and, where
    the parameters have them, learned utilities <rho_l, q> + beta_l [t, n, L] in fp32.

    As `attend_scales` of eager_scales.py. A gradient of an infeasible LSE goes nowhere, but it must be finite.
    """
    tuning = tuning or tuning_for(q_tnd.dtype.itemsize, capability_of(q_tnd.device))
    outs, lses, utilities = scales_attention(
        *tensors_of(q_tnd, levels, document_start_t, parameters),
        spec.ratio,
        list(spec.windows),
        list(past_slots),
        spec.rope_base,
        spec.rope_unit,
        spec.norm_epsilon,
        numbers_of(tuning),
    )
    return outs, lses, None if parameters.utility_query is None else utilities


@torch.library.custom_op("maha_megatron::scales_attention", mutates_args=())
def scales_attention(
    q: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor | None,
    beta: Tensor | None,
    document_start: Tensor,
    keys: Tensors,
    values: Tensors,
    ratio: int,
    windows: Numbers,
    past_slots: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    tiles: Numbers,
) -> tuple[Tensor, Tensor, Tensor]:
    """O [t, n, L, d], LSE [t, n, L] and utilities [t, n, L], empty without rho."""
    numbers = (ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles)
    call = call_of(Call, q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers)
    outs, lses, utilities = call.forward()
    return outs, lses, lses.new_empty(0) if utilities is None else utilities


@scales_attention.register_fake
def _(q, query_gain, key_gain, rho, beta, document_start, keys, values, ratio, windows, *others):
    rows, n, width = q.shape
    lses = q.new_empty(rows, n, len(windows), dtype=torch.float32)
    return q.new_empty(rows, n, len(windows), width), lses, lses.new_empty(0 if rho is None else lses.shape)


@torch.library.custom_op("maha_megatron::scales_attention_backward", mutates_args=())
def scales_attention_backward(
    grad_outs: Tensor,
    grad_lses: Tensor,
    grad_utilities: Tensor,
    outs: Tensor,
    lses: Tensor,
    q: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor | None,
    beta: Tensor | None,
    document_start: Tensor,
    keys: Tensors,
    values: Tensors,
    ratio: int,
    windows: Numbers,
    past_slots: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    tiles: Numbers,
) -> list[Tensor]:
    """Gradients of q, of every scale's keys, then values, of query gain and key gain, and of rho and beta if given."""
    numbers = (ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles)
    call = call_of(Call, q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers)
    utilities = None if rho is None else grad_utilities
    given = Given(outs, lses, grad_outs.contiguous(), grad_lses, utilities)
    return in_turn(*call.backward(given))


@scales_attention_backward.register_fake
def _(grad_outs, grad_lses, grad_utilities, outs, lses, *inputs):
    q, query_gain, key_gain, rho, beta, _, keys, values, *_ = inputs
    wanted = [q, *keys, *values, query_gain, key_gain, rho, beta]
    return [x.new_empty(x.shape) for x in wanted if x is not None]


def _keep(ctx, inputs, output) -> None:
    *tensors, keys, values, ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles = inputs
    ctx.save_for_backward(*output[:2], *tensors, *keys, *values)
    ctx.numbers = ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles


def _backward(ctx, *grads: Tensor) -> tuple:
    outs, lses, q, query_gain, key_gain, rho, beta, document_start, *levels = ctx.saved_tensors
    scales = len(levels) // 2
    given = (q, query_gain, key_gain, rho, beta, document_start, levels[:scales], levels[scales:])
    return *of_inputs(scales_attention_backward(*grads, outs, lses, *given, *ctx.numbers), scales), *(None,) * 7


scales_attention.register_autograd(_backward, setup_context=_keep)

"""Joint attention by kernels as operators of torch, so that torch.compile, recomputation and export see one call each.

Tensors and numbers only, as an operator's schema asks: `tiles` is a Tuning in one list (triton_tuning.py).
"""

from collections.abc import Sequence

import torch

from maha_megatron.attention.scale_attention.triton_joint import Call, WeighedCall
from maha_megatron.attention.scale_attention.triton_tuning import Tuning, numbers_of, tuning_for, tuning_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec

# an operator's schema is read off annotations: these names keep them short
Tensor = torch.Tensor
Tensors = list[torch.Tensor]
Numbers = list[int]


def attend_jointly(
    q_tnd: torch.Tensor,
    levels: Sequence[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int],
    with_weights: bool,
    tuning: Tuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output [t, n, d] in q's dtype and, where asked for, scale weights [t, n, L] in fp32, detached.

    As `attend_jointly` of eager_joint.py, of what `is_joint` says.
    """
    tuning = tuning or tuning_for(q_tnd.dtype.itemsize, capability_of(q_tnd.device))
    out, _, _, weights = joint_attention(
        *tensors_of(q_tnd, levels, document_start_t, parameters),
        spec.ratio,
        list(spec.windows),
        list(past_slots),
        spec.rope_base,
        spec.rope_unit,
        spec.norm_epsilon,
        not is_one_softmax(spec),
        with_weights,
        numbers_of(tuning),
    )
    return out, weights if with_weights else None


def tensors_of(
    q_tnd: torch.Tensor,
    levels: Sequence[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
) -> tuple:
    """What every operator over given levels takes first."""
    learned = (parameters.query_gain, parameters.key_gain, parameters.utility_query, parameters.utility_bias)
    return q_tnd, *learned, document_start_t, [keys for keys, _ in levels], [values for _, values in levels]


def is_one_softmax(spec: MahaSpec) -> bool:
    """Whether the operator is one softmax over the keys of all scales, and of nothing that it opens."""
    if spec.scales == 1:
        return True
    return spec.queries == "full" and spec.joint_softmax and spec.lse_utility and spec.refine is None


def is_joint(spec: MahaSpec) -> bool:
    """Whether one kernel fuses all scales: into one softmax, or by weights that need none of their outputs."""
    if spec.scales == 1:
        return True
    weighed = spec.joint_softmax or spec.aggregation == "mean"
    return spec.queries == "full" and weighed and spec.refine is None


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of the card; of an Ampere where there is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@torch.library.custom_op("maha_megatron::joint_attention", mutates_args=())
def joint_attention(
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
    apart: bool,
    with_weights: bool,
    tiles: Numbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [t, n, d]; log-sum-exps [n, t] and, empty unless scales are apart, [n, L, t], in units of log 2; and scale
    weights [t, n, L], empty if not asked for.
    """
    numbers = (ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles)
    call = call_of(kind_of(apart), q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers)
    return outputs_of(*call.forward(with_weights))


def kind_of(apart: bool) -> type[Call]:
    """Of scales that share one softmax; `apart`: that have a softmax each, and are weighed by utilities alone."""
    return WeighedCall if apart else Call


def outputs_of(out, lse, scale_lse, own_lse) -> tuple[torch.Tensor, ...]:
    """What an operator returns of what a call's forward does."""
    return out, lse, lse.new_empty(0) if own_lse is None else own_lse, weights_of(lse, scale_lse)


def weights_of(lse: torch.Tensor, scale_lse: torch.Tensor | None) -> torch.Tensor:
    """Scale weights [t, n, L] of log-sum-exps [n, t] and [t, n, L] in units of log 2; empty without the latter."""
    return lse.new_empty(0) if scale_lse is None else torch.exp2(scale_lse - lse.T[..., None])


@joint_attention.register_fake
def _(q, query_gain, key_gain, rho, beta, document_start, keys, values, ratio, windows, past_slots, *others):
    return empty_outputs(q, len(windows), apart=others[-3], with_weights=others[-2])


@torch.library.custom_op("maha_megatron::joint_attention_backward", mutates_args=())
def joint_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    own_lse: Tensor,
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
    apart: bool,
    tiles: Numbers,
) -> list[Tensor]:
    """Gradients of q, of every scale's keys, then values, of query gain and key gain, and of rho and beta if given."""
    numbers = (ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles)
    call = call_of(kind_of(apart), q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers)
    return in_turn(*call.backward(grad_out, out, lse, own_lse if apart else None))


@joint_attention_backward.register_fake
def _(grad_out, out, lse, own_lse, q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers):
    wanted = [q, *keys, *values, query_gain, key_gain, rho, beta]
    return [x.new_empty(x.shape) for x in wanted if x is not None]


def call_of(
    kind: type[Call], q, query_gain, key_gain, rho, beta, document_start, keys, values, *numbers, refine=None
) -> Call:
    """The call behind an operator's arguments."""
    ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, tiles = numbers
    given = {"rope_base": rope_base, "rope_unit": rope_unit, "norm_epsilon": norm_epsilon, "refine": refine}
    spec = MahaSpec(ratio=ratio, windows=tuple(windows), **given)
    levels = list(zip(keys, values, strict=True))
    tuning, past_slots = tuning_of(tiles), tuple(past_slots)
    return kind(q, query_gain, key_gain, rho, beta, document_start, spec, past_slots, tuning, levels)


def in_turn(grad_q, learned, grad_keys, grad_values) -> list[torch.Tensor]:
    """What a backward operator returns: of q, of every scale's keys, then values, and of what is learned, if given."""
    return [grad_q, *grad_keys, *grad_values, *(grad for grad in learned if grad is not None)]


def of_inputs(grads: Sequence[torch.Tensor], scales: int) -> tuple:
    """Of `in_turn`: q, query gain, key gain, rho and beta, document_start (none), keys and values."""
    grad_q, *others = grads
    learned = (*others[2 * scales :], None, None)[:4]
    return grad_q, *learned, None, others[:scales], others[scales : 2 * scales]


def empty_outputs(q: torch.Tensor, scales: int, *, apart: bool, with_weights: bool) -> tuple[torch.Tensor, ...]:
    """Output, log-sum-exps and scale weights as an operator returns them, without content."""
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    own_lse = lse.new_empty((q.shape[1], scales, q.shape[0]) if apart else (0,))
    return q.new_empty(q.shape), lse, own_lse, lse.new_empty((*q.shape[:2], scales) if with_weights else (0,))


def _keep(ctx, inputs, output) -> None:
    *tensors, keys, values, ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, apart, _, tiles = inputs
    *kept, weights = output
    ctx.mark_non_differentiable(*kept[1:], weights)
    ctx.save_for_backward(*kept, *tensors, *keys, *values)
    ctx.numbers = ratio, windows, past_slots, rope_base, rope_unit, norm_epsilon, apart, tiles


def _backward(ctx, grad_out: Tensor, *_) -> tuple:
    out, lse, own_lse, q, query_gain, key_gain, rho, beta, document_start, *levels = ctx.saved_tensors
    scales = len(levels) // 2
    given = (out, lse, own_lse, q, query_gain, key_gain, rho, beta, document_start, levels[:scales], levels[scales:])
    return *of_inputs(joint_attention_backward(grad_out, *given, *ctx.numbers), scales), *(None,) * 9


joint_attention.register_autograd(_backward, setup_context=_keep)

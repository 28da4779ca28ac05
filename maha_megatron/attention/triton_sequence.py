"""A whole sequence by kernels: the pyramid and the joint attention over it as one operator, which keeps no level.

Kept for backward are raw q, k and v, the output and one number per row and head, as by dense attention; where utilities
alone weigh the scales, one more for each. Backward pools the levels again, which costs a twentieth of it, and adds the
gradients of each level into those of the finer one, in place. A piece of a sequence, whose levels go into a state,
takes the operators of pyramid/ and scale_attention/.
"""

import torch

from maha_megatron.attention.pyramid import triton as pyramid
from maha_megatron.attention.pyramid import triton_levels
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.scale_attention.triton_ops import (
    Numbers,
    Tensor,
    Tensors,
    call_of,
    capability_of,
    empty_outputs,
    is_joint,
    is_one_softmax,
    kind_of,
    outputs_of,
)
from maha_megatron.attention.scale_attention.triton_tuning import Tuning, numbers_of, tuning_for
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.triton_launch import lined_up


def attend_sequence(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    with_weights: bool,
    tuning: Tuning | None = None,
) -> Attended | None:
    """`attend` over `build_pyramid` of a whole sequence; None where kernels do not serve both.

    `tuning`: other tiles than the table's.
    """
    if pyramid.what_no_kernel_serves((k_tgd, v_tgd), spec) or not is_joint(spec):
        return None
    tuning = tuning or tuning_for(q_tnd.dtype.itemsize, capability_of(q_tnd.device))
    out, _, _, weights = sequence_attention(
        q_tnd,
        k_tgd,
        v_tgd,
        document_start_t,
        pyramid.learned_of(parameters, spec),
        parameters.query_gain,
        parameters.key_gain,
        parameters.utility_query,
        parameters.utility_bias,
        spec.downsampling,
        spec.ratio,
        list(spec.windows),
        spec.rope_base,
        spec.rope_unit,
        spec.norm_epsilon,
        not is_one_softmax(spec),
        with_weights,
        numbers_of(tuning),
    )
    return Attended(out_tnd=out, weights_tnl=weights if with_weights else None, report=None)


@torch.library.custom_op("maha_megatron::sequence_attention", mutates_args=())
def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    learned: Tensors,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor | None,
    beta: Tensor | None,
    downsampling: str,
    ratio: int,
    windows: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    apart: bool,
    with_weights: bool,
    tiles: Numbers,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `joint_attention` of triton_ops.py. `learned`: the pyramid's tensors."""
    tensors = (q, k, v, document_start, learned, query_gain, key_gain, rho, beta)
    *_, call = _calls(*tensors, downsampling, ratio, windows, rope_base, rope_unit, norm_epsilon, apart, tiles)
    return outputs_of(*call.forward(with_weights))


@sequence_attention.register_fake
def _(q, k, v, document_start, learned, query_gain, key_gain, rho, beta, downsampling, ratio, windows, *others):
    return empty_outputs(q, len(windows), apart=others[-3], with_weights=others[-2])


@torch.library.custom_op("maha_megatron::sequence_attention_backward", mutates_args=())
def sequence_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    own_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_start: Tensor,
    learned: Tensors,
    query_gain: Tensor,
    key_gain: Tensor,
    rho: Tensor | None,
    beta: Tensor | None,
    downsampling: str,
    ratio: int,
    windows: Numbers,
    rope_base: float,
    rope_unit: str,
    norm_epsilon: float,
    apart: bool,
    tiles: Numbers,
) -> list[Tensor]:
    """Gradients of q, k and v, of the pyramid's learned tensors, of both gains, and of rho and beta if given."""
    tensors = (q, k, v, document_start, learned, query_gain, key_gain, rho, beta)
    pooling, levels, call = _calls(
        *tensors, downsampling, ratio, windows, rope_base, rope_unit, norm_epsilon, apart, tiles
    )
    grad_q, of_attention, grad_keys, grad_values = call.backward(grad_out, out, lse, own_lse if apart else None)
    grads = list(zip(grad_keys, grad_values, strict=True))
    of_pyramid = []
    if len(windows) > 1:
        _, of_pyramid = pooling.backward(levels, grads, in_place=True)
    return [grad_q, *grads[0], *of_pyramid, *(grad for grad in of_attention if grad is not None)]


@sequence_attention_backward.register_fake
def _(grad_out, out, lse, own_lse, q, k, v, document_start, learned, query_gain, key_gain, rho, beta, *numbers):
    wanted = [q, k, v, *learned, query_gain, key_gain, rho, beta]
    return [x.new_empty(x.shape) for x in wanted if x is not None]


def _calls(
    q, k, v, document_start, learned, query_gain, key_gain, rho, beta,
    downsampling, ratio, windows, rope_base, rope_unit, norm_epsilon, apart, tiles,
):  # fmt: skip
    """The pyramid's call, its levels, and the attention's call over them."""
    none_before = (0,) * len(windows)
    pooling = triton_levels.Call(downsampling, ratio, document_start, learned, k, none_before)
    levels = pooling.forward((lined_up(k), lined_up(v)), ())
    of_attention = (q, query_gain, key_gain, rho, beta, document_start, *zip(*levels, strict=True))
    call = call_of(
        kind_of(apart), *of_attention, ratio, windows, none_before, rope_base, rope_unit, norm_epsilon, tiles
    )
    return pooling, levels, call


def _keep(ctx, inputs, output) -> None:
    q, k, v, document_start, learned, query_gain, key_gain, rho, beta, *numbers, _, tiles = inputs
    *kept, weights = output
    ctx.mark_non_differentiable(*kept[1:], weights)
    ctx.save_for_backward(*kept, q, k, v, document_start, query_gain, key_gain, rho, beta, *learned)
    ctx.numbers = *numbers, tiles


def _backward(ctx, grad_out: Tensor, *_) -> tuple:
    out, lse, own_lse, q, k, v, document_start, query_gain, key_gain, rho, beta, *learned = ctx.saved_tensors
    given = (out, lse, own_lse, q, k, v, document_start, learned, query_gain, key_gain, rho, beta)
    grad_q, grad_k, grad_v, *others = sequence_attention_backward(grad_out, *given, *ctx.numbers)
    of_pyramid, of_attention = others[: len(learned)], (*others[len(learned) :], None, None)[:4]
    return grad_q, grad_k, grad_v, None, of_pyramid, *of_attention, *(None,) * 9


sequence_attention.register_autograd(_backward, setup_context=_keep)

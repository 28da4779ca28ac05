"""Attention of all scales and their aggregation as one softmax in plain torch, banded and chunked.

This is the path of every aggregation that needs no scale's own output: entropy without coupling, and the plain mean.
Rows are processed a chunk at a time, and each scale's logits exist for one chunk only: [g, rows, n/g, width of the
band], never s x s or s x (s / R). With u_l the log of scale l's weight and LSE_l its log-sum-exp,

    out = sum_l w_l O_l = sum_l sum_j exp(s_lj + a_l) v_lj        a_l = log w_l - LSE_l,

so the offsets a [t, n, L] are all that backward needs to rebuild the probabilities P = exp(s + a) of a chunk:

    dV_l = P' dO        dS_l = P (dO V' - delta)        dc_l = sum_j dS_lj
    delta = <dO, out> where utilities carry the LSE: all scales then share one softmax with offset c_l on scale l;
    delta_l = <dO, O_l> where they do not, and dc_l = w_l (<dO, O_l> - <dO, out>).

Kept for backward: q, the levels, out, a. Infeasible scales have P = 0 exactly, and every gradient carries P.
"""

import itertools

import torch

from maha_megatron.attention.aggregation.eager import scale_log_weights
from maha_megatron.attention.scale_attention.chunks import Call, Chunk, attend_scale, exp_
from maha_megatron.attention.scale_attention.gradients import Gradients
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def attend_jointly(
    q_tnd: torch.Tensor,
    levels: list[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: tuple[int, ...],
    opened: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [t, n, d] in q's dtype and scale weights [t, n, L], detached and at least fp32: softmax of the utilities.

    `levels` are the packed keys and values of every scale, each with `past_slots` in front of slot 0. Without
    `utility_query` the learned utilities are 0. `opened`: the keys and values that a refined layer may open, the last
    of its branches.
    """
    return _JointAttention.apply(
        q_tnd,
        parameters.query_gain,
        parameters.key_gain,
        parameters.utility_query,
        parameters.utility_bias,
        document_start_t,
        spec,
        past_slots,
        *itertools.chain(*levels, opened),
    )


class _JointAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, query_gain, key_gain, rho, beta, document_start_t, spec, past_slots, *levels):
        call = Call(q, query_gain, key_gain, rho, beta, document_start_t, spec, past_slots, levels)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        weights = torch.empty(*q.shape[:2], spec.branches, dtype=call.dtype, device=q.device)
        offsets = torch.empty_like(weights)
        for start, rows in call.plan.chunks():
            _attend_chunk(Chunk(call, start, rows), out, weights, offsets)
        first_child = None if call.opened is None else call.opened.first_child
        ctx.save_for_backward(q, query_gain, key_gain, rho, beta, document_start_t, first_child, out, offsets, *levels)
        ctx.spec, ctx.past_slots = spec, past_slots
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        *inputs, first_child, out, offsets = ctx.saved_tensors[:9]
        call = Call(*inputs, ctx.spec, ctx.past_slots, ctx.saved_tensors[9:], first_child)
        grads = Gradients(call)
        for start, rows in call.plan.chunks():
            _attend_chunk_backward(Chunk(call, start, rows), grad_out, out, offsets, grads)
        grads.finish()
        return grads.q, *grads.learned(), None, None, None, *itertools.chain(*grads.levels)


# a chunk and all that is made of it ends with its function: the next one finds the memory free


def _attend_chunk(chunk: Chunk, out: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> None:
    """Writes the chunk's rows of `out` [t, n, d], `weights` and `offsets` [t, n, L]."""
    spec = chunk.call.spec
    outputs, lses = zip(*(attend_scale(chunk, scale) for scale in range(spec.branches)), strict=True)
    lse = torch.stack(lses, dim=-1)
    log_weights = scale_log_weights(chunk.utility, lse, spec.lse_utility)
    weight = log_weights.exp()
    fused = outputs[0].mul_(weight[..., 0, None])
    for scale in range(1, spec.branches):
        fused.addcmul_(outputs[scale], weight[..., scale, None])
    chunk.write(out, fused)
    chunk.write(weights, weight)
    chunk.write(offsets, (log_weights - lse).masked_fill_(lse == -torch.inf, 0.0))


def _attend_chunk_backward(
    chunk: Chunk, grad_out: torch.Tensor, out: torch.Tensor, offsets: torch.Tensor, grads: Gradients
) -> None:
    grads.start_chunk(chunk)
    grad = chunk.read(grad_out)
    offset = chunk.read(offsets)
    delta = (grad * chunk.read(out)).sum(-1, keepdim=True)
    scales = range(chunk.call.spec.branches)
    shares = [_attend_scale_backward(chunk, scale, grad, offset, delta, grads) for scale in scales]
    grads.add_queries(chunk, *zip(*shares, strict=True))


def _attend_scale_backward(
    chunk: Chunk, scale: int, grad: torch.Tensor, offset: torch.Tensor, delta: torch.Tensor, grads: Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds what one scale gives to queries, keys and values; returns the gradient of its utility, and its weight.

    grad [g, rows, n/g, d], offset [g, rows, n/g, L], delta [g, rows, n/g, 1].
    """
    rotated = chunk.rotated(scale)
    p = exp_(chunk.logits(rotated, scale).add_(offset[..., scale, None]))
    weight = p.sum(-1, keepdim=True)
    grad_p = grads.through_values(chunk, scale, p, grad)
    if chunk.call.spec.lse_utility:
        grad_logits = grad_p.sub_(delta).mul_(p)
        grad_utility = grad_logits.sum(-1)
    else:
        share = (p * grad_p).sum(-1, keepdim=True)
        own_delta = share / weight.clamp(min=torch.finfo(p.dtype).tiny)
        grad_logits = grad_p.sub_(own_delta).mul_(p)
        grad_utility = (share - weight * delta).squeeze(-1)
    grads.through_logits(chunk, scale, rotated, grad_logits)
    return grad_utility, weight.squeeze(-1)

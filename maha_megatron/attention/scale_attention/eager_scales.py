"""Each scale's attention in plain torch, banded and chunked, for aggregations that need every scale's own output.

Rows are processed a chunk at a time, as in eager_joint.py. With dO_l and dLSE_l from what the outputs are made into,

    P = exp(S - LSE_l)        dV_l = P' dO_l        dS_l = P (dO_l V' - <dO_l, O_l> + dLSE_l)

Kept for backward: q, the levels, O [t, n, L, d], LSE [t, n, L]. The outputs are in at least fp32, so that aggregation
reads them as they are and keeps no second copy.
"""

import itertools

import torch

from maha_megatron.attention.scale_attention.chunks import Call, Chunk, attend_scale, exp_
from maha_megatron.attention.scale_attention.gradients import Gradients
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def attend_scales(
    q_tnd: torch.Tensor,
    levels: list[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: tuple[int, ...],
    opened: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs O [t, n, L, d] and log-sum-exps [t, n, L] of every scale, at least fp32: 0 and -inf where infeasible.

    `levels` are the packed keys and values of every scale, each with `past_slots` in front of slot 0;
    `document_start_t` is int64; `opened` are the keys and values that a refined layer may open, one more scale, the
    last. A gradient of an infeasible LSE goes nowhere, but it must be finite.
    """
    gains = (parameters.query_gain, parameters.key_gain)
    return _ScalesAttention.apply(q_tnd, *gains, document_start_t, spec, past_slots, *itertools.chain(*levels, opened))


class _ScalesAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, query_gain, key_gain, document_start_t, spec, past_slots, *levels):
        call = Call(q, query_gain, key_gain, None, None, document_start_t, spec, past_slots, levels)
        rows, heads, width = q.shape
        outputs = torch.empty(rows, heads, spec.branches, width, dtype=call.dtype, device=q.device)
        lses = torch.empty(rows, heads, spec.branches, dtype=call.dtype, device=q.device)
        for start, rows in call.plan.chunks():
            chunk = Chunk(call, start, rows)
            for scale in range(spec.branches):
                output, lse = attend_scale(chunk, scale)
                chunk.write(outputs[:, :, scale], output)
                chunk.write(lses[:, :, scale, None], lse[..., None])
        first_child = None if call.opened is None else call.opened.first_child
        ctx.save_for_backward(q, query_gain, key_gain, document_start_t, first_child, outputs, lses, *levels)
        ctx.spec, ctx.past_slots = spec, past_slots
        return outputs, lses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_outputs, grad_lses):
        q, query_gain, key_gain, document_start_t, first_child, outputs, lses, *levels = ctx.saved_tensors
        learned = (query_gain, key_gain, None, None)
        call = Call(q, *learned, document_start_t, ctx.spec, ctx.past_slots, levels, first_child)
        grads, scales = Gradients(call), range(ctx.spec.branches)
        for start, rows in call.plan.chunks():
            chunk = Chunk(call, start, rows)
            grads.start_chunk(chunk)
            lse = chunk.read(lses)
            offset = torch.where(lse == -torch.inf, 0.0, -lse)
            grad_lse = chunk.read(grad_lses)
            for scale in scales:
                rotated = chunk.rotated(scale)
                p = exp_(chunk.logits(rotated, scale).add_(offset[..., scale, None]))
                grad = chunk.read(grad_outputs[:, :, scale])
                delta = (grad * chunk.read(outputs[:, :, scale])).sum(-1, keepdim=True) - grad_lse[..., scale, None]
                grad_logits = grads.through_values(chunk, scale, p, grad).sub_(delta).mul_(p)
                grads.through_logits(chunk, scale, rotated, grad_logits)
            grads.add_queries(chunk)
        grads.finish()
        return grads.q, *grads.learned()[:2], None, None, None, *itertools.chain(*grads.levels)

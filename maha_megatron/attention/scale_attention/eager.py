"""Attention of all scales and their aggregation in plain torch, banded and chunked.

Rows are processed a chunk at a time, and each scale's logits exist for one chunk only: [g, rows, n/g, width of the
band], never s x s or s x (s / R). With u_l the log of scale l's weight and LSE_l its log-sum-exp,

    out = sum_l w_l O_l = sum_l sum_j exp(s_lj + a_l) v_lj        a_l = log w_l - LSE_l,

so the offsets a [t, n, L] are all that backward needs to rebuild the probabilities P = exp(s + a) of a chunk:

    dV_l = P' dO        dS_l = P (dO V' - delta)        dc_l = sum_j dS_lj
    delta = <dO, out> where utilities carry the LSE: all scales then share one softmax with offset c_l on scale l;
    delta_l = <dO, O_l> where they do not, and dc_l = w_l (<dO, O_l> - <dO, out>).

Kept for backward: q, the levels, out, a. Infeasible scales have P = 0 exactly, and every gradient carries P.
"""

from collections.abc import Sequence

import torch

from maha_megatron.attention.aggregation.eager import scale_log_weights
from maha_megatron.attention.normalise_rotate import normalise_backward, normalise_rotate_backward, quarter_turn
from maha_megatron.attention.scale_attention.bands import add_tiles
from maha_megatron.attention.scale_attention.chunks import Call, Chunk, product
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def attend(
    q_tnd: torch.Tensor,
    levels: list[torch.Tensor],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [t, n, d] and scale weights [t, n, L] (detached); `levels` are packed keys and values of every scale.

    `past_slots`: how many slots of each level lie in front of slot 0, at most its window; none where it is not given.
    """
    return _BandedAttention.apply(
        q_tnd,
        parameters.query_gain,
        parameters.key_gain,
        parameters.utility_query,
        parameters.utility_bias,
        document_start_t.long(),
        spec,
        tuple(past_slots or (0,) * spec.scales),
        *levels,
    )


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, query_gain, key_gain, rho, beta, document_start_t, spec, past_slots, *levels):
        call = Call(q, query_gain, key_gain, rho, beta, document_start_t, spec, past_slots, levels)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        weights = torch.empty(*q.shape[:2], spec.scales, dtype=call.dtype, device=q.device)
        offsets = torch.empty_like(weights)
        for start, rows in call.plan.chunks():
            chunk = Chunk(call, start, rows)
            outputs, lses = zip(*(_attend_scale(chunk, scale) for scale in range(spec.scales)), strict=True)
            lse = torch.stack(lses, dim=-1)
            log_weights = scale_log_weights(chunk.utility, lse, spec.lse_utility)
            weight = log_weights.exp()
            fused = outputs[0].mul_(weight[..., 0, None])
            for scale in range(1, spec.scales):
                fused.addcmul_(outputs[scale], weight[..., scale, None])
            chunk.write(out, fused)
            chunk.write(weights, weight)
            chunk.write(offsets, (log_weights - lse).masked_fill_(lse == -torch.inf, 0.0))
        ctx.save_for_backward(q, query_gain, key_gain, rho, beta, document_start_t, out, offsets, *levels)
        ctx.spec, ctx.past_slots = spec, past_slots
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        q, query_gain, key_gain, rho, beta, document_start_t, out, offsets, *levels = ctx.saved_tensors
        call = Call(q, query_gain, key_gain, rho, beta, document_start_t, ctx.spec, ctx.past_slots, levels)
        grads, scales = _Gradients(call), range(ctx.spec.scales)
        for start, rows in call.plan.chunks():
            chunk = Chunk(call, start, rows)
            grad = chunk.read(grad_out)
            offset = chunk.read(offsets)
            delta = (grad * chunk.read(out)).sum(-1, keepdim=True)
            shares = [_attend_scale_backward(chunk, scale, grad, offset, delta, grads) for scale in scales]
            grads.add_queries(chunk, *zip(*shares, strict=True))
        level_grads, key_gain_shares = zip(*(grads.level(scale) for scale in scales), strict=True)
        query_gain, grad_rho, grad_beta = grads.learned()
        return (
            grads.q,
            query_gain,
            sum(key_gain_shares).to(key_gain.dtype),
            grad_rho,
            grad_beta,
            None,
            None,
            None,
            *level_grads,
        )


def _attend_scale(chunk: Chunk, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [g, rows, n/g, d] and log-sum-exp [g, rows, n/g] of one scale; 0 and -inf where nothing is visible."""
    logits = chunk.logits(chunk.rotated(scale), scale)
    # a row that sees nothing has maximum -inf: any finite shift then gives exp(-inf) = 0
    top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    p = logits.sub_(top).exp_()
    mass = p.sum(-1, keepdim=True)
    output = chunk.from_tiles(product(chunk.to_tiles(p, scale), chunk.tiles(chunk.call.values, scale)))
    return output.div_(mass.clamp(min=torch.finfo(mass.dtype).tiny)), (top + mass.log()).squeeze(-1)


def _attend_scale_backward(
    chunk: Chunk, scale: int, grad: torch.Tensor, offset: torch.Tensor, delta: torch.Tensor, grads: "_Gradients"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds the gradients of one scale's keys and values; returns those of its rotated queries and of its utility.

    grad [g, rows, n/g, d], offset [g, rows, n/g, L], delta [g, rows, n/g, 1]. The third result is the scale's weight.
    """
    rotated = chunk.rotated(scale)
    p = chunk.logits(rotated, scale).add_(offset[..., scale, None]).exp_()
    weight = p.sum(-1, keepdim=True)
    grad_tiles, p_tiles = chunk.to_tiles(grad, scale), chunk.to_tiles(p, scale)
    grad_p = chunk.from_tiles(product(grad_tiles, chunk.tiles(chunk.call.values, scale).mT))
    grads.add_values(product(p_tiles.mT, grad_tiles), scale, chunk)
    if chunk.call.spec.lse_utility:
        grad_logits = grad_p.sub_(delta).mul_(p)
        grad_utility = grad_logits.sum(-1)
    else:
        share = (p * grad_p).sum(-1, keepdim=True)
        own_delta = share / weight.clamp(min=torch.finfo(p.dtype).tiny)
        grad_logits = grad_p.sub_(own_delta).mul_(p)
        grad_utility = (share - weight * delta).squeeze(-1)
    logit_tiles = chunk.to_tiles(grad_logits, scale)
    grads.add_keys(product(logit_tiles.mT, chunk.to_tiles(rotated, scale)), scale, chunk)
    grad_rotated = chunk.from_tiles(product(logit_tiles, chunk.tiles(chunk.call.keys, scale)))
    return grad_rotated, grad_utility, weight.squeeze(-1)


class _Gradients:
    """Gradients of one backward, accumulated chunk by chunk in the dtype of the arithmetic, in a fixed order."""

    def __init__(self, call: Call):
        self.call = call
        self.q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        self.query_gain, self.rho, self.beta = 0, 0, 0
        self.keys = [torch.zeros_like(keys, dtype=call.dtype) for keys in call.keys]
        self.values = [torch.zeros_like(values, dtype=call.dtype) for values in call.values]

    def add_keys(self, tiles: torch.Tensor, scale: int, chunk: Chunk) -> None:
        add_tiles(self.keys[scale], tiles, self.call.bands[scale], chunk.start, chunk.rows)

    def add_values(self, tiles: torch.Tensor, scale: int, chunk: Chunk) -> None:
        add_tiles(self.values[scale], tiles, self.call.bands[scale], chunk.start, chunk.rows)

    def add_queries(
        self,
        chunk: Chunk,
        rotated: tuple[torch.Tensor, ...],
        utility: tuple[torch.Tensor, ...],
        weight: tuple[torch.Tensor, ...],
    ) -> None:
        """From every scale: gradients of rotated queries [g, rows, n/g, d] and utilities, weights [g, rows, n/g]."""
        straight, turned = torch.zeros_like(chunk.normal), torch.zeros_like(chunk.normal)
        for scale, grad in enumerate(rotated):
            cos, sin = chunk.turns[scale]
            straight.addcmul_(grad, cos)
            turned.addcmul_(grad, sin)
        grad = straight.sub_(quarter_turn(turned))
        if self.call.rho is not None:
            grad_utility = torch.stack(utility, dim=-1)
            # a change of all utilities alike changes nothing: take out what rounding left in that direction
            grad_utility -= torch.stack(weight, dim=-1) * grad_utility.sum(-1, keepdim=True)
            grad += torch.einsum("grml,lgmd->grmd", grad_utility, chunk.rho)
            self.rho += torch.einsum("grml,grmd->lgmd", grad_utility, chunk.normal)
            self.beta += grad_utility.sum(1)
        grad, grad_gain = normalise_backward(grad, chunk.raw, chunk.gain, self.call.spec.norm_epsilon)
        self.query_gain += grad_gain.sum(1)
        chunk.write(self.q, grad)

    def learned(self) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query gain, rho and beta."""
        call = self.call
        query_gain = self.query_gain.flatten(0, 1).to(call.query_gain.dtype)
        if call.rho is None:
            return query_gain, None, None
        return (
            query_gain,
            self.rho.flatten(1, 2).to(call.rho.dtype),
            self.beta.flatten(0, 1).T.to(call.beta.dtype),
        )

    def level(self, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of a level [slots, 2, g, d], through the keys' rotation and normalisation, and of the key gain."""
        call, level = self.call, self.call.levels[scale]
        grad = torch.empty_like(level)
        grad_keys = call.slots_view(self.keys, scale)
        turn, epsilon = call.key_rotation(scale), call.spec.norm_epsilon
        grad_gain = normalise_rotate_backward(grad_keys, level[:, 0], call.key_gain, *turn, epsilon, grad[:, 0])
        grad[:, 1] = call.slots_view(self.values, scale)
        return grad, grad_gain

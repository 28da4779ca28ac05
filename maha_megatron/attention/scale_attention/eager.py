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

import torch
import torch.nn.functional as F

from maha_megatron.attention.aggregation.eager import scale_log_weights
from maha_megatron.attention.normalise_rotate import normalise, normalise_backward, quarter_turn, rotate, rotation
from maha_megatron.attention.scale_attention.bands import (
    add_tiles,
    gather_tiles,
    pad_slots,
    plan_bands,
    unpad_slots,
    visibility_bias,
)
from maha_megatron.attention.slots import slots_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec

# logits of one scale that exist at once: they stay in the cache of a CPU core, and fill a GPU
_LOGITS_PER_CHUNK = {"cpu": 2**19, "cuda": 2**26}


def attend(
    q_tnd: torch.Tensor,
    levels: list[torch.Tensor],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [t, n, d] and scale weights [t, n, L] (detached); `levels` are packed keys and values of every scale."""
    return _BandedAttention.apply(
        q_tnd,
        parameters.query_gain,
        parameters.key_gain,
        parameters.utility_query,
        parameters.utility_bias,
        document_start_t.long(),
        spec,
        *levels,
    )


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, query_gain, key_gain, rho, beta, document_start_t, spec, *levels):
        call = _Call(q, query_gain, key_gain, rho, beta, document_start_t, spec, levels)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        weights = torch.empty(*q.shape[:2], spec.scales, dtype=call.dtype, device=q.device)
        offsets = torch.empty_like(weights)
        for start in range(0, len(q), call.rows):
            chunk = _Chunk(call, start)
            outputs, lses = zip(*(_attend_scale(chunk, scale) for scale in range(spec.scales)), strict=True)
            lse = torch.stack(lses, dim=-1)
            log_weights = scale_log_weights(chunk.utility, lse, spec.lse_utility)
            weight = log_weights.exp()
            fused = outputs[0].mul_(weight[..., 0, None])
            for scale in range(1, spec.scales):
                fused.addcmul_(outputs[scale], weight[..., scale, None])
            call.write_rows(out, fused, start)
            call.write_rows(weights, weight, start)
            call.write_rows(offsets, (log_weights - lse).masked_fill_(lse == -torch.inf, 0.0), start)
        ctx.save_for_backward(q, query_gain, key_gain, rho, beta, document_start_t, out, offsets, *levels)
        ctx.spec = spec
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        q, query_gain, key_gain, rho, beta, document_start_t, out, offsets, *levels = ctx.saved_tensors
        call = _Call(q, query_gain, key_gain, rho, beta, document_start_t, ctx.spec, levels)
        grads, scales = _Gradients(call), range(ctx.spec.scales)
        for start in range(0, len(q), call.rows):
            chunk = _Chunk(call, start)
            grad = call.read_rows(grad_out, start)
            offset = call.read_rows(offsets, start)
            delta = (grad * call.read_rows(out, start)).sum(-1, keepdim=True)
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
            *level_grads,
        )


def _attend_scale(chunk: "_Chunk", scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [g, rows, n/g, d] and log-sum-exp [g, rows, n/g] of one scale; 0 and -inf where nothing is visible."""
    logits = chunk.logits(chunk.rotated(scale), scale)
    # a row that sees nothing has maximum -inf: any finite shift then gives exp(-inf) = 0
    top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    p = logits.sub_(top).exp_()
    mass = p.sum(-1, keepdim=True)
    output = chunk.from_tiles(_product(chunk.to_tiles(p, scale), chunk.tiles(chunk.call.values, scale)))
    return output.div_(mass.clamp(min=torch.finfo(mass.dtype).tiny)), (top + mass.log()).squeeze(-1)


def _attend_scale_backward(
    chunk: "_Chunk", scale: int, grad: torch.Tensor, offset: torch.Tensor, delta: torch.Tensor, grads: "_Gradients"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradients of one scale's keys and values; returns those of its rotated queries and of its utility.

    grad [g, rows, n/g, d], offset [g, rows, n/g, L], delta [g, rows, n/g, 1].
    """
    rotated = chunk.rotated(scale)
    p = chunk.logits(rotated, scale).add_(offset[..., scale, None]).exp_()
    grad_tiles, p_tiles = chunk.to_tiles(grad, scale), chunk.to_tiles(p, scale)
    grad_p = chunk.from_tiles(_product(grad_tiles, chunk.tiles(chunk.call.values, scale).mT))
    grads.add_values(_product(p_tiles.mT, grad_tiles), scale, chunk)
    if chunk.call.spec.lse_utility:
        grad_logits = grad_p.sub_(delta).mul_(p)
        grad_utility = grad_logits.sum(-1)
    else:
        weight, share = p.sum(-1, keepdim=True), (p * grad_p).sum(-1, keepdim=True)
        own_delta = share / weight.clamp(min=torch.finfo(p.dtype).tiny)
        grad_logits = grad_p.sub_(own_delta).mul_(p)
        grad_utility = (share - weight * delta).squeeze(-1)
    logit_tiles = chunk.to_tiles(grad_logits, scale)
    grads.add_keys(_product(logit_tiles.mT, chunk.to_tiles(rotated, scale)), scale, chunk)
    return chunk.from_tiles(_product(logit_tiles, chunk.tiles(chunk.call.keys, scale))), grad_utility


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched matrix product; low-precision operands (CUDA only) give an fp32 result."""
    return torch.bmm(a, b) if a.dtype.itemsize >= 4 else torch.bmm(a, b, out_dtype=torch.float32)


class _Call:
    """What one call holds for all its chunks: parameters in the dtype of the arithmetic, padded keys and values.

    Logits, softmax and accumulation are in at least fp32. Matrix products read operands in the inputs' dtype on CUDA,
    where tensor cores want them, and in the arithmetic's elsewhere.
    """

    def __init__(self, q, query_gain, key_gain, rho, beta, document_start_t, spec: MahaSpec, levels):
        rows, heads, width = q.shape
        self.q, self.levels, self.spec = q, levels, spec
        self.query_gain, self.key_gain, self.rho, self.beta = query_gain, key_gain, rho, beta
        self.groups, self.dtype = levels[0].shape[2], torch.promote_types(q.dtype, torch.float32)
        self.operand = q.dtype if q.device.type == "cuda" else self.dtype
        limit = _LOGITS_PER_CHUNK["cuda" if q.device.type == "cuda" else "cpu"] // (heads * 2 * max(spec.windows))
        plan = plan_bands(rows, spec.ratio, spec.windows, limit)
        self.rows, self.bands = plan.chunk_rows, plan.bands
        self.padded_rows = -(-rows // self.rows) * self.rows
        # a padding row is a document of its own: it sees nothing of the sequence, and nothing sees it
        self.document = F.pad(document_start_t, (0, self.padded_rows - rows), value=rows)
        self.slots = [slots_of(document_start_t, band.stride_rows) for band in self.bands]
        self.keys = [self._pad(self.rotated_keys(scale), scale) for scale in range(spec.scales)]
        self.values = [self._pad(level[:, 1], scale) for scale, level in enumerate(levels)]

    def _pad(self, x_sgd: torch.Tensor, scale: int) -> torch.Tensor:
        return pad_slots(x_sgd.to(self.operand).transpose(0, 1), self.bands[scale], self.padded_rows)

    def key_rotation(self, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Position b + (R - 1) / R of block b is that of its last row, over R."""
        slots = self.slots[scale]
        position = (slots.last_row - slots.document).double() / self.bands[scale].stride_rows
        return rotation(position[:, None], self.q.shape[-1], self.spec.rope_base, self.dtype)

    def rotated_keys(self, scale: int) -> torch.Tensor:
        keys = normalise(self.levels[scale][:, 0].to(self.dtype), self.key_gain.to(self.dtype), self.spec.norm_epsilon)
        return rotate(keys, *self.key_rotation(scale))

    def read_rows(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Rows of the chunk at `start`, by KV group: [t, n, ...] -> [g, rows, n/g, ...], zero beyond the sequence."""
        rows = x[start : start + self.rows].unflatten(1, (self.groups, -1)).transpose(0, 1).to(self.dtype)
        return F.pad(rows, (0, 0, 0, 0, 0, self.rows - rows.shape[1])).contiguous()

    def write_rows(self, x: torch.Tensor, rows: torch.Tensor, start: int) -> None:
        """The inverse of `read_rows`: into [t, n, ...], leaving out what lies beyond the sequence."""
        target = x[start : start + self.rows].unflatten(1, (self.groups, -1)).transpose(0, 1)
        target.copy_(rows[:, : target.shape[1]])


class _Chunk:
    """Queries of `rows` consecutive rows: raw and normalised [g, rows, n/g, d], utilities [g, rows, n/g, L]."""

    def __init__(self, call: _Call, start: int):
        self.call, self.start = call, start
        self.row = torch.arange(start, start + call.rows, device=call.q.device)
        self.document = call.document[start : start + call.rows]
        self.raw = call.read_rows(call.q, start)
        self.gain = call.query_gain.to(call.dtype).unflatten(0, (call.groups, 1, -1))
        self.normal = normalise(self.raw, self.gain, call.spec.norm_epsilon)
        self.turned = quarter_turn(self.normal)
        self.utility = self.normal.new_zeros(*self.normal.shape[:-1], 1)
        if call.rho is not None:
            self.rho = call.rho.to(call.dtype).unflatten(1, (call.groups, -1))
            self.utility = torch.einsum("grmd,lgmd->grml", self.normal, self.rho)
            self.utility += call.beta.to(call.dtype).unflatten(1, (call.groups, 1, -1)).movedim(0, -1)

    def rotation(self, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [rows, 1, d] of the queries' positions t / R, times the 1 / sqrt(d) of the logits."""
        width = self.raw.shape[-1]
        position = (self.row - self.document).double() / self.call.bands[scale].stride_rows
        cos, sin = rotation(position[:, None], width, self.call.spec.rope_base, self.call.dtype)
        return cos * width**-0.5, sin * width**-0.5

    def rotated(self, scale: int) -> torch.Tensor:
        cos, sin = self.rotation(scale)
        return (self.normal * cos).addcmul_(self.turned, sin)

    def logits(self, rotated: torch.Tensor, scale: int) -> torch.Tensor:
        """[g, rows, n/g, width of the band], -inf where a slot is not visible."""
        logits = self.from_tiles(_product(self.to_tiles(rotated, scale), self.tiles(self.call.keys, scale).mT))
        bias = visibility_bias(self.call.bands[scale], self.row, self.document, logits.dtype)
        return logits.add_(bias[:, None])

    def tiles(self, padded: list[torch.Tensor], scale: int) -> torch.Tensor:
        """Keys or values of the bands of this chunk: [g * tiles, width of the band, d]."""
        return gather_tiles(padded[scale], self.call.bands[scale], self.start, self.call.rows)

    def to_tiles(self, x: torch.Tensor, scale: int) -> torch.Tensor:
        """[g, rows, n/g, z] -> [g * tiles, tile rows * n/g, z], an operand of a matrix product."""
        count = self.call.rows // self.call.bands[scale].tile_rows
        return x.to(self.call.operand).reshape(x.shape[0] * count, -1, x.shape[-1])

    def from_tiles(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.call.groups, self.call.rows, -1, x.shape[-1])


class _Gradients:
    """Gradients of one backward, accumulated chunk by chunk in the dtype of the arithmetic, in a fixed order."""

    def __init__(self, call: _Call):
        self.call = call
        self.q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        self.query_gain, self.rho, self.beta = 0, 0, 0
        self.keys = [torch.zeros_like(keys, dtype=call.dtype) for keys in call.keys]
        self.values = [torch.zeros_like(values, dtype=call.dtype) for values in call.values]

    def add_keys(self, tiles: torch.Tensor, scale: int, chunk: _Chunk) -> None:
        add_tiles(self.keys[scale], tiles, self.call.bands[scale], chunk.start, self.call.rows)

    def add_values(self, tiles: torch.Tensor, scale: int, chunk: _Chunk) -> None:
        add_tiles(self.values[scale], tiles, self.call.bands[scale], chunk.start, self.call.rows)

    def add_queries(self, chunk: _Chunk, rotated: tuple[torch.Tensor, ...], utility: tuple[torch.Tensor, ...]) -> None:
        """From the gradients of every scale's rotated queries [g, rows, n/g, d] and utilities [g, rows, n/g]."""
        straight, turned = torch.zeros_like(chunk.normal), torch.zeros_like(chunk.normal)
        for scale, grad in enumerate(rotated):
            cos, sin = chunk.rotation(scale)
            straight.addcmul_(grad, cos)
            turned.addcmul_(grad, sin)
        grad = straight.sub_(quarter_turn(turned))
        if self.call.rho is not None:
            grad_utility = torch.stack(utility, dim=-1)
            grad += torch.einsum("grml,lgmd->grmd", grad_utility, chunk.rho)
            self.rho += torch.einsum("grml,grmd->lgmd", grad_utility, chunk.normal)
            self.beta += grad_utility.sum(1)
        grad, grad_gain = normalise_backward(grad, chunk.raw, chunk.gain, self.call.spec.norm_epsilon)
        self.query_gain += grad_gain.sum(1)
        self.call.write_rows(self.q, grad, chunk.start)

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
        call, band, level = self.call, self.call.bands[scale], self.call.levels[scale]
        cos, sin = call.key_rotation(scale)
        grad_keys = rotate(unpad_slots(self.keys[scale], band, len(level)).transpose(0, 1), cos, -sin)
        grad_keys, grad_gain = normalise_backward(
            grad_keys, level[:, 0].to(call.dtype), call.key_gain.to(call.dtype), call.spec.norm_epsilon
        )
        grad_values = unpad_slots(self.values[scale], band, len(level)).transpose(0, 1)
        return torch.stack((grad_keys, grad_values), dim=1).to(level.dtype), grad_gain.sum(0)

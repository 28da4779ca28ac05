"""Queries that are pooled with their scale (the paper's form, an ablation), in plain torch.

Query block b of scale l is the mean of its block's rows and stands where key block b stands. So within a scale it is
causal attention of slots to slots: position b, "document start" the document's first slot, a window of w_l slots; and
one-scale attention serves, with slots in place of rows. Row t then reads what the last complete block of its document
found,

    slots of scale l     .... b-1 ....][....... b .......][..
    rows                                    last row of b: t_b = R (b+1) - 1
    who reads block b                                   t_b ... t_b + R - 1

Every slot is read by R consecutive rows at most, so the gradient of that gather is a gather too.
"""

import dataclasses

import torch

from maha_megatron.attention.pyramid.eager import build_pyramid
from maha_megatron.attention.pyramid.queries import pool_queries
from maha_megatron.attention.scale_attention.eager_scales import attend_scales
from maha_megatron.attention.slots import first_slot_of, slots_of, visible_slots
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import stride


def attend_pooled(
    q_tnd: torch.Tensor,
    levels: list[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [t, n, L, d] and log-sum-exps [t, n, L] that rows read, as `attend_scales` returns them."""
    queries = pool_queries(build_pyramid, q_tnd, document_start_t, spec)
    outputs, lses = [], []
    for scale, (query, level) in enumerate(zip(queries, levels, strict=True)):
        stride_rows = stride(spec.ratio, scale)
        slots = slots_of(document_start_t, stride_rows)
        start = first_slot_of(slots.document, stride_rows)
        one_scale = dataclasses.replace(spec, windows=(spec.windows[scale],))
        output, lse = attend_scales(query, [level], start, parameters, one_scale, (0,))
        read = _readers(document_start_t, slots, stride_rows)
        outputs.append(_Read.apply(output.squeeze(2), 0.0, *read))
        lses.append(_Read.apply(lse.squeeze(2), -torch.inf, *read))
    return torch.stack(outputs, dim=2), torch.stack(lses, dim=2)


def _readers(document_start_t, slots, stride_rows) -> tuple[torch.Tensor, ...]:
    """Who reads whom: each row's slot [t], feasible bool [t]; each slot's rows [slots, R], reading bool [slots, R]."""
    row = torch.arange(len(document_start_t), device=document_start_t.device)
    first, end = visible_slots(row, document_start_t, stride_rows, 1)
    rows = slots.last_row[:, None] + torch.arange(stride_rows, device=row.device)
    known = rows.clamp(max=len(row) - 1)
    reading = (rows == known) & slots.complete[:, None] & (document_start_t[known] == slots.document[:, None])
    return (end - 1).clamp(min=0), first < end, known, reading


class _Read(torch.autograd.Function):
    """x [slots, ...] at each row's slot, `nothing` where that row has none yet."""

    @staticmethod
    def forward(ctx, x, nothing, slot, feasible, rows, reading):
        ctx.save_for_backward(rows, reading)
        shape = (-1, *(1,) * (x.ndim - 1))
        return x.index_select(0, slot).masked_fill_(~feasible.view(shape), nothing)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, reading = ctx.saved_tensors
        shares = grad.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        shares.masked_fill_(~reading.view(*rows.shape, *(1,) * (grad.ndim - 1)), 0.0)
        return shares.sum(1), None, None, None, None, None

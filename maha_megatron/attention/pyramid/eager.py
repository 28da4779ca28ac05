"""The pyramid in plain torch: every level is one gather of children and one gated mean.

Kept for backward is the finer level alone, which scale attention keeps anyway. Each child has one parent, so the
gradient of the gather is a gather too: nothing is scattered and the result is bitwise reproducible.
"""

from collections.abc import Sequence

import torch

from maha_megatron.attention.row_blocks import row_blocks
from maha_megatron.attention.slots import first_slot_of, slots_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import stride


def build_pyramid(
    kv: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Packed keys and values of every scale; see pyramid/naive.py for shapes."""
    document_start_t = document_start_t.long()
    levels = [kv if past is None else torch.cat((past[0], kv))]
    for scale in range(1, spec.scales):
        family = _family(document_start_t, spec.ratio, scale, 0 if past is None else len(past[scale - 1]))
        gated = spec.downsampling == "gated"
        query = parameters.gate_query[scale - 1] if gated else None
        bias = parameters.gate_bias[scale - 1] if gated else None
        pooled = _Pool.apply(levels[-1], query, bias, *family)
        levels.append(pooled if past is None else torch.cat((past[scale], pooled)))
    return levels


def _family(document_start_t: torch.Tensor, ratio: int, scale: int, past: int) -> tuple[torch.Tensor, ...]:
    """Who summarises whom between scale-1 and scale, with `past` finer slots in front of slot 0.

    Returns:
        children [slots, r]: the indices of the finer slots that a slot pools; complete [slots] bool; place [past +
        finer slots]: where a finer slot sits among all children (slot * r + child number), or slots * r if no complete
        block from slot 0 on holds it.
    """
    fine_stride, coarse_stride = stride(ratio, scale - 1), stride(ratio, scale)
    coarse, fine = slots_of(document_start_t, coarse_stride), slots_of(document_start_t, fine_stride, past)
    slot = torch.arange(coarse.document.numel(), device=document_start_t.device)
    block = slot - first_slot_of(coarse.document, coarse_stride)
    first_child = first_slot_of(coarse.document, fine_stride) + ratio * block
    children = past + first_child[:, None] + torch.arange(ratio, device=slot.device)

    fine_slot = torch.arange(-past, fine.document.numel() - past, device=slot.device)
    fine_block = fine_slot - first_slot_of(fine.document, fine_stride)
    parent = first_slot_of(fine.document, coarse_stride) + fine_block // ratio
    known = parent.clamp(0, slot.numel() - 1)
    belongs = (known == parent) & coarse.complete[known] & (coarse.document[known] == fine.document)
    place = torch.where(belongs, parent * ratio + fine_block % ratio, slot.numel() * ratio)
    return children.clamp(max=fine_slot.numel() - 1), coarse.complete, place


class _Pool(torch.autograd.Function):
    """Gated mean of the children [slots, r, 2, g, d]; without a gate query, their plain mean."""

    @staticmethod
    def forward(ctx, finer, query, bias, children, complete, place):
        ctx.save_for_backward(finer, query, bias, children, complete, place)
        pooled = torch.empty(len(children), *finer.shape[1:], dtype=finer.dtype, device=finer.device)
        for start, stop in _blocks(finer, children):
            members, gates = _gates(finer, query, bias, children[start:stop])
            pooled[start:stop] = members.mul_(gates[..., None]).sum(1)
        return pooled.mul_(complete[:, None, None, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        finer, query, bias, children, complete, place = ctx.saved_tensors
        grad_members = torch.empty(children.numel() + 1, *finer.shape[1:], dtype=finer.dtype, device=finer.device)
        grad_members[-1] = 0
        by_slot = grad_members[:-1].unflatten(0, children.shape)
        grad_query = grad_bias = 0
        for start, stop in _blocks(finer, children):
            members, gates = _gates(finer, query, bias, children[start:stop])
            grad_pooled = grad[start:stop, None] * complete[start:stop, None, None, None, None]
            share = gates[..., None] * grad_pooled
            if query is not None:
                grad_gates = (members * grad_pooled).sum(-1)
                grad_scores = gates * (grad_gates - (gates * grad_gates).sum(1, keepdim=True))
                share.addcmul_(grad_scores[..., None], query.to(members.dtype))
                grad_query += members.mul_(grad_scores[..., None]).sum((0, 1))
                grad_bias += grad_scores.sum(0).movedim(0, -1)
            by_slot[start:stop] = share
        grad_finer = grad_members.index_select(0, place)
        if query is None:
            return grad_finer, None, None, None, None, None
        return grad_finer, grad_query.to(query.dtype), grad_bias.to(bias.dtype), None, None, None


def _gates(finer, query, bias, children):
    """Children [slots, r, 2, g, d] in at least fp32, and their weights [slots, r, 2, g]."""
    dtype = torch.promote_types(finer.dtype, torch.float32)
    members = finer.index_select(0, children.flatten()).unflatten(0, children.shape).to(dtype)
    if query is None:
        return members, members.new_full(members.shape[:-1], 1 / children.shape[1])
    scores = (members * query.to(dtype)).sum(-1) + bias.to(dtype).movedim(-1, 0)
    return members, scores.softmax(1)


def _blocks(finer, children):
    return row_blocks(len(children), children.shape[1] * finer[0].numel(), finer.device)

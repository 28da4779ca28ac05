"""The pyramid in plain torch: every level is one gather of children and one gated mean.

Kept for backward is the finer level alone, which scale attention keeps anyway. Each child has one parent, so the
gradient of the gather is a gather too: nothing is scattered and the result is bitwise reproducible.
"""

import torch

from maha_megatron.attention.slots import first_slot_of, slots_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import stride


def build_pyramid(
    kv: torch.Tensor, document_start_t: torch.Tensor, parameters: AttentionParameters, spec: MahaSpec
) -> list[torch.Tensor]:
    """Packed keys and values of every scale; see pyramid/naive.py for shapes."""
    document_start_t = document_start_t.long()
    levels = [kv]
    for scale in range(1, spec.scales):
        family = _family(document_start_t, spec.ratio, scale)
        gated = spec.downsampling == "gated"
        query = parameters.gate_query[scale - 1] if gated else None
        bias = parameters.gate_bias[scale - 1] if gated else None
        levels.append(_Pool.apply(levels[-1], query, bias, *family))
    return levels


def _family(document_start_t: torch.Tensor, ratio: int, scale: int) -> tuple[torch.Tensor, ...]:
    """Who summarises whom between scale-1 and scale.

    Returns:
        children [slots, r]: finer slot of every child; complete [slots] bool; parent [finer slots]: r * slot + child
        number, where a finer slot sits in the gathered children; has_parent [finer slots] bool.
    """
    fine_stride, coarse_stride = stride(ratio, scale - 1), stride(ratio, scale)
    coarse, fine = slots_of(document_start_t, coarse_stride), slots_of(document_start_t, fine_stride)
    slot = torch.arange(coarse.document.numel(), device=document_start_t.device)
    block = slot - first_slot_of(coarse.document, coarse_stride)
    first_child = first_slot_of(coarse.document, fine_stride) + ratio * block
    children = first_child[:, None] + torch.arange(ratio, device=slot.device)

    fine_slot = torch.arange(fine.document.numel(), device=slot.device)
    fine_block = fine_slot - first_slot_of(fine.document, fine_stride)
    parent_slot = first_slot_of(fine.document, coarse_stride) + fine_block // ratio
    known = parent_slot.clamp(max=slot.numel() - 1)
    has_parent = (known == parent_slot) & coarse.complete[known] & (coarse.document[known] == fine.document)
    return (
        children.clamp(max=fine_slot.numel() - 1),
        coarse.complete,
        known * ratio + fine_block % ratio,
        has_parent,
    )


class _Pool(torch.autograd.Function):
    """Gated mean of the children [slots, r, 2, g, d]; without a gate query, their plain mean. fp32 arithmetic."""

    @staticmethod
    def forward(ctx, finer, query, bias, children, complete, parent, has_parent):
        ctx.save_for_backward(finer, query, bias, children, complete, parent, has_parent)
        members, gates = _gates(finer, query, bias, children)
        pooled = (members * gates[..., None]).sum(1)
        return (pooled * complete[:, None, None, None]).to(finer.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        finer, query, bias, children, complete, parent, has_parent = ctx.saved_tensors
        members, gates = _gates(finer, query, bias, children)
        grad = (grad.to(members.dtype) * complete[:, None, None, None])[:, None]
        grad_members = gates[..., None] * grad
        grad_query = grad_bias = None
        if query is not None:
            grad_gates = (members * grad).sum(-1)
            grad_scores = gates * (grad_gates - (gates * grad_gates).sum(1, keepdim=True))
            grad_members.addcmul_(grad_scores[..., None], query.to(members.dtype))
            grad_query = (grad_scores[..., None] * members).sum((0, 1)).to(query.dtype)
            grad_bias = grad_scores.sum(0).movedim(0, -1).to(bias.dtype)
        grad_finer = grad_members.flatten(0, 1)[parent] * has_parent[:, None, None, None]
        return grad_finer.to(finer.dtype), grad_query, grad_bias, None, None, None, None


def _gates(finer, query, bias, children):
    """Children [slots, r, 2, g, d] in at least fp32, and their weights [slots, r, 2, g]."""
    members = finer[children].to(torch.promote_types(finer.dtype, torch.float32))
    if query is None:
        return members, members.new_full(members.shape[:-1], 1 / children.shape[1])
    scores = (members * query.to(members.dtype)).sum(-1) + bias.to(members.dtype).movedim(-1, 0)
    return members, scores.softmax(1)

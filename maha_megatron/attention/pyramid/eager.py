"""The pyramid in plain torch: every level is one gather of children and one weighted sum of them.

Kept for backward is the finer level alone, which scale attention keeps anyway, and under a key map the pooled keys.
Each child has one parent, so the gradient of the gather is a gather too: nothing is scattered and the result is bitwise
reproducible. Arithmetic is in at least fp32, a block of slots at a time.

The children of slot j are r consecutive finer slots that begin at one of j r - r + 1 ... j r (j r + ceil(D / R) - r
ceil(D / (r R)), with R the finer stride). So once slots 0 ... j are done, no later one adds to finer slots up to j r.
"""

from collections.abc import Sequence

import torch

from maha_megatron.attention.row_blocks import row_blocks
from maha_megatron.attention.slots import first_slot_of, slots_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import stride

LEARNED = {"gated": ("gate_query", "gate_bias"), "conv": ("pool_kernel",), "mean": (), "max": ()}


def build_pyramid(
    rows: tuple[torch.Tensor, ...],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past: Sequence[tuple[torch.Tensor, ...]] | None = None,
) -> list[tuple[torch.Tensor, ...]]:
    """Packed keys and values of every scale; see pyramid/naive.py for shapes."""
    document_start_t = document_start_t.long()
    levels = [rows if past is None else _joined(past[0], rows)]
    for scale in range(1, spec.scales):
        past_slots = 0 if past is None else len(past[scale - 1][0])
        family = _family(document_start_t, spec.ratio, scale, past_slots)
        learned = [getattr(parameters, name)[scale - 1] for name in LEARNED[spec.downsampling]]
        pooled = _Pool.apply(spec.downsampling, past_slots, len(rows), *family, *levels[-1], *learned)
        if spec.key_map:
            keys, values = pooled
            pooled = _MapKeys.apply(keys, parameters.key_map[scale - 1]), values
        levels.append(pooled if past is None else _joined(past[scale], pooled))
    return levels


def _joined(older: Sequence[torch.Tensor], newer: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(older, newer, strict=True))


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
    """Blocks, `kinds` tensors [slots, g, d], from their children in `kinds` finer ones (keys and values, or queries
    alone); after those come the learned tensors of the scale that LEARNED names.

    The finer ones have `past` slots in front of slot 0.
    """

    @staticmethod
    def forward(ctx, downsampling, past, kinds, children, complete, place, *tensors):
        ctx.save_for_backward(children, complete, place, *tensors)
        ctx.downsampling, ctx.past, ctx.kinds = downsampling, past, kinds
        finer, learned = tensors[:kinds], tensors[kinds:]
        shape = (len(children), kinds, *finer[0].shape[1:])
        pooled = torch.empty(shape, dtype=finer[0].dtype, device=finer[0].device)
        for start, stop in _blocks(finer, children):
            members = _members(finer, children[start:stop])
            pooled[start:stop] = members.mul_(_shares(downsampling, members, learned)).sum(1)
        return pooled.mul_(complete[:, None, None, None]).unbind(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        children, complete, place, *tensors = ctx.saved_tensors
        finer, learned = tensors[: ctx.kinds], tensors[ctx.kinds :]
        (slots, ratio), count = children.shape, len(finer[0])
        grad_finer = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in finer]
        dtype = torch.promote_types(finer[0].dtype, torch.float32)
        nobody = torch.zeros(1, ctx.kinds, *finer[0].shape[1:], dtype=dtype, device=finer[0].device)
        before, done = nobody.expand(ratio, -1, -1, -1), 0  # gradients of the children of the slot before the block
        grad_learned = [0] * len(learned)
        for start, stop in _blocks(finer, children):
            members = _members(finer, children[start:stop])
            grad_pooled = torch.stack([grad[start:stop, None] for grad in grads], dim=2)
            grad_pooled *= complete[start:stop, None, None, None, None]
            shares = _shares(ctx.downsampling, members, learned)
            grad_children, of_learned = shares * grad_pooled, ()
            if ctx.downsampling == "gated":
                grad_scores = shares * _centred((members * grad_pooled).sum(-1, keepdim=True), shares)
                grad_children.addcmul_(grad_scores, learned[0].to(members.dtype))
                of_learned = members.mul_(grad_scores).sum((0, 1)), grad_scores.sum((0, -1)).movedim(0, -1)
            elif ctx.downsampling == "conv":
                of_learned = (members.mul_(grad_pooled).sum(0).movedim(0, -1),)
            grad_learned = [total + part for total, part in zip(grad_learned, of_learned, strict=True)]
            grad_children = grad_children.expand_as(members)  # a plain mean has one for all children
            known = torch.cat((before, grad_children.flatten(0, 1), nobody))
            first, done = done, count if stop == slots else ctx.past + (stop - 1) * ratio + 1
            from_known = (place[first:done] - (start - 1) * ratio).clamp_(max=len(known) - 1)
            for kind, grad in enumerate(grad_finer):
                grad[first:done] = known[:, kind].index_select(0, from_known)
            before = grad_children[-1]
        grad_learned = [total.to(tensor.dtype) for total, tensor in zip(grad_learned, learned, strict=True)]
        return None, None, None, None, None, None, *grad_finer, *grad_learned


def _members(finer: Sequence[torch.Tensor], children: torch.Tensor) -> torch.Tensor:
    """Children [slots, r, kinds, g, d] in at least fp32."""
    dtype, chosen = torch.promote_types(finer[0].dtype, torch.float32), children.flatten()
    members = torch.stack([x.index_select(0, chosen).to(dtype) for x in finer], dim=1)
    return members.unflatten(0, children.shape)


def _shares(downsampling: str, members: torch.Tensor, learned: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a block takes of each of its `members` [slots, r, kinds, g, d]; broadcasts against them."""
    ratio = members.shape[1]
    if downsampling == "mean":
        return members.new_full((), 1 / ratio)
    if downsampling == "max":  # all of the first child that has it, so that a tie has one gradient
        largest = members == members.amax(1, keepdim=True)
        taken = largest[:, 0].clone()
        for child in range(1, ratio):
            largest[:, child] &= ~taken
            taken |= largest[:, child]
        return largest.to(members.dtype)
    learned = [tensor.to(members.dtype) for tensor in learned]
    if downsampling == "conv":
        return learned[0].movedim(-1, 0)
    assert downsampling == "gated", downsampling
    query, bias = learned
    return ((members * query).sum(-1) + bias.movedim(-1, 0)).softmax(1)[..., None]


def _centred(grad_gates: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """What a softmax over the children lets through: the gradient less its mean under the gates."""
    return grad_gates - (gates * grad_gates).sum(1, keepdim=True)


def _blocks(finer, children):
    numbers = children.shape[1] * sum(x[0].numel() for x in finer)
    return row_blocks(len(children), numbers, finer[0].device)


class _MapKeys(torch.autograd.Function):
    """key_map [g, d, d] @ key of every key [slots, g, d]."""

    @staticmethod
    def forward(ctx, keys, key_map):
        ctx.save_for_backward(keys, key_map)
        return _by_group(keys, key_map.mT).to(keys.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        keys, key_map = ctx.saved_tensors
        dtype = torch.promote_types(keys.dtype, torch.float32)
        grad_map = grad.to(dtype).movedim(0, -1) @ keys.to(dtype).transpose(0, 1)
        return _by_group(grad, key_map).to(keys.dtype), grad_map.to(key_map.dtype)


def _by_group(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """rows [slots, g, d] times the matrices [g, d, d] of their group, in at least fp32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(dtype).transpose(0, 1) @ matrices.to(dtype)).transpose(0, 1)

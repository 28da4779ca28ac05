"""The pyramid by its definition: document by document, block by block."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.documents import document_ranges
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import complete_blocks, first_slot, slot_count, stride


def build_pyramid(
    rows: tuple[torch.Tensor, ...],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past: Sequence[tuple[torch.Tensor, ...]] | None = None,
) -> list[tuple[torch.Tensor, ...]]:
    """Packed keys and values of every scale.

    Args:
        rows: keys and values of scale 0, each [t, g, d], neither normalised nor rotated.
        document_start_t: [t] int; negative for rows of a document that began before these rows.
        past: for such rows, the newest complete blocks of every scale, newest last, L times keys and values,
            each [past_l, g, d], with past_l >= r - 1 below the last scale.

    Returns:
        L times keys and values, each [past_l + ceil(t / R_l), g, d], slot j at index past_l + j: what attention
        normalises and rotates and what the next scale pools, keys of coarse scales after their key map. Slots that hold
        no complete block are zero.
    """
    kv = torch.stack(rows, dim=1)
    past = [kv[:0]] * spec.scales if past is None else [torch.stack(older, dim=1) for older in past]
    levels = [torch.cat((past[0], kv))]
    for scale in range(1, spec.scales):
        step = stride(spec.ratio, scale)
        slots = [torch.zeros_like(kv[0])] * slot_count(len(kv), step)
        for start, rows in document_ranges(document_start_t):
            finer = len(past[scale - 1]) + first_slot(start, stride(spec.ratio, scale - 1))
            for block in range(complete_blocks(max(-start, 0), step), complete_blocks(rows, step)):
                children = levels[-1][finer + block * spec.ratio :][: spec.ratio]
                pooled = pool(children, parameters, spec, scale)
                mapped = map_key(pooled, parameters.key_map[scale - 1]) if spec.key_map else pooled
                slots[first_slot(start, step) + block] = mapped
        levels.append(torch.cat((past[scale], torch.stack(slots))))
    return [level.unbind(1) for level in levels]


def pool(children: torch.Tensor, parameters: AttentionParameters, spec: MahaSpec, scale: int) -> torch.Tensor:
    """One block [2, g, d] from its r children [r, 2, g, d].

    Their mean; their maximum by channel, which a tie leaves with the first child that has it; a sum weighted by a
    learned kernel, by channel; or a mean weighted by a learned softmax gate, by key and value.
    """
    if spec.downsampling == "mean":
        return children.mean(0)
    if spec.downsampling == "max":
        block = children[0]
        for child in children[1:]:
            block = torch.where(child > block, child, block)
        return block
    if spec.downsampling == "conv":
        return torch.einsum("ckgd,kgdc->kgd", children, parameters.pool_kernel[scale - 1])
    assert spec.downsampling == "gated", spec.downsampling
    scores = torch.einsum("ckgd,kgd->ckg", children, parameters.gate_query[scale - 1])
    gates = (scores + parameters.gate_bias[scale - 1].permute(2, 0, 1)).softmax(0)
    return (gates[..., None] * children).sum(0)


def map_key(block: torch.Tensor, key_map: torch.Tensor) -> torch.Tensor:
    """A block [2, g, d] with its key, not its value, taken through the matrices [g, d, d] of its scale."""
    key, value = block
    return torch.stack((torch.einsum("gij,gj->gi", key_map, key), value))

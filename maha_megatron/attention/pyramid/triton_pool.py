"""One level of the pyramid from the finer one, and the gradients back, as kernels.

A program has a tile of slots and some KV groups, of keys or of values: tensors [slots, children, channels]. Which
finer slots a slot pools, and whether it holds a complete block at all, it works out from two document starts a slot
(pyramid/eager.py has the arithmetic as tensors).

Backward goes from coarse to fine: a program has the whole gradient of its slots, reads the gradient that stands at
their children already, and writes the sum. A child has one parent, so it is written once; a finer slot without a parent
is written by the program whose slot j has it among j r ... j r + r - 1, where children would lie in a lone document.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from maha_megatron.attention.triton_slots import first_slot, pick, slot_count, stride_of


class Pair(NamedTuple):
    """Keys and values of one level, [entries, g, d] each, as kernels read them."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    entry_strides: tuple[int, int]
    group_strides: tuple[int, int]


class Pieces(NamedTuple):
    """Which level is pooled from which: document_start [rows], coarse scale, entries in front of slot 0 of both."""

    document_start: torch.Tensor
    rows: int
    scale: int
    past_fine: int
    past_coarse: int


@triton.jit
def document_at(pieces, row):
    return tl.load(pieces.document_start + tl.minimum(tl.maximum(row, 0), pieces.rows - 1)).to(tl.int32)


@triton.jit
def block_of(pieces, slot, RATIO: tl.constexpr):
    """Of slots of the coarse scale: their document's start, the finer slot of their first child, and whether they hold
    a complete block.
    """
    stride = stride_of(RATIO, pieces.scale)
    document = document_at(pieces, slot * stride)
    block = slot - first_slot(document, RATIO, pieces.scale)
    last_row = document + (block + 1) * stride - 1
    complete = (slot >= 0) & (slot < slot_count(pieces.rows, RATIO, pieces.scale)) & (block >= 0)
    complete &= (last_row < pieces.rows) & (document_at(pieces, last_row) == document)
    return document, first_slot(document, RATIO, pieces.scale - 1) + RATIO * block, complete


@triton.jit
def has_no_parent(pieces, fine, RATIO: tl.constexpr):
    """Whether no complete block from slot 0 on pools a finer slot."""
    document = document_at(pieces, fine * stride_of(RATIO, pieces.scale - 1))
    block = fine - first_slot(document, RATIO, pieces.scale - 1)
    parent = first_slot(document, RATIO, pieces.scale) + tl.maximum(block, 0) // RATIO
    of_parent, _, complete = block_of(pieces, parent, RATIO)
    return (block < 0) | (complete == 0) | (of_parent != document)


@triton.jit
def at_entries(pair, kind, entry, group, WIDTH: tl.constexpr):
    """Pointers [..., WIDTH] to the channels of entries [slots, children] of keys or values."""
    base = pick(pair.tensors, kind) + group * pick(pair.group_strides, kind)
    offset = entry.to(tl.int64) * pick(pair.entry_strides, kind)
    return base + offset[:, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def load_gate(learned, line, RATIO: tl.constexpr, CHILDREN: tl.constexpr, WIDTH: tl.constexpr):
    """Query [d] and bias [children] of gates, in fp32; `line`: of [2, g], or of [L-1, 2, g]."""
    child = tl.arange(0, CHILDREN)
    query = tl.load(learned[0] + line * WIDTH + tl.arange(0, WIDTH)).to(tl.float32)
    return query, tl.load(learned[1] + line * RATIO + child, mask=child < RATIO, other=float("-inf")).to(tl.float32)


@triton.jit
def gates_of(member, query, bias):
    """Softmax over the children [slots, children] of <query, child> + bias."""
    score = tl.sum(member * query[None, None, :], 2) + bias[None, :]
    gate = tl.exp(score - tl.max(score, 1)[:, None])
    return gate / tl.sum(gate, 1)[:, None]


@triton.jit
def shares_of(
    member, learned, line, METHOD: tl.constexpr, RATIO: tl.constexpr, CHILDREN: tl.constexpr, WIDTH: tl.constexpr
):
    """What a block takes of each of its children, for all methods but gates; broadcasts against `member`."""
    child = tl.arange(0, CHILDREN)
    if METHOD == "mean":
        share = tl.full([1, CHILDREN, WIDTH], 1 / RATIO, tl.float32)
    elif METHOD == "conv":
        at = (line * WIDTH + tl.arange(0, WIDTH))[None, :] * RATIO + child[:, None]
        share = tl.load(learned[0] + at, mask=(child < RATIO)[:, None], other=0.0).to(tl.float32)[None, :, :]
    else:
        tl.static_assert(METHOD == "max")
        real = tl.where((child < RATIO)[None, :, None], member, float("-inf"))
        has_it = real == tl.max(real, 1)[:, None, :]
        first = tl.min(tl.where(has_it, child[None, :, None], CHILDREN), 1)  # a tie is the first child's
        share = tl.where(child[None, :, None] == first[:, None, :], 1.0, 0.0)
    return share


@triton.jit
def pool_kernel(
    finer,
    pooled,
    learned,  # of this scale: query [2, g, d] and bias [2, g, r]; kernel [2, g, d, r]; nothing
    pieces,
    g,
    METHOD: tl.constexpr,
    RATIO: tl.constexpr,
    CHILDREN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    slot, child = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, CHILDREN)
    kind = tl.program_id(2)
    _document, first, complete = block_of(pieces, slot, RATIO)
    entry = pieces.past_fine + first[:, None] + child[None, :]
    real = (complete[:, None] & (child < RATIO)[None, :])[:, :, None]
    inside = (slot < slot_count(pieces.rows, RATIO, pieces.scale))[:, None, None]
    for group in tl.range(tl.program_id(1) * GROUPS, tl.minimum(tl.program_id(1) * GROUPS + GROUPS, g)):
        member = tl.load(at_entries(finer, kind, entry, group, WIDTH), mask=real, other=0.0).to(tl.float32)
        line = kind * g + group
        if METHOD == "gated":
            query, bias = load_gate(learned, line, RATIO, CHILDREN, WIDTH)
            gates = gates_of(member, query, bias)
            block = tl.sum(member * gates[:, :, None], 1)
        else:
            block = tl.sum(member * shares_of(member, learned, line, METHOD, RATIO, CHILDREN, WIDTH), 1)
        to = at_entries(pooled, kind, (pieces.past_coarse + slot)[:, None], group, WIDTH)
        tl.store(to, block[:, None, :].to(pooled.tensors[0].dtype.element_ty), mask=inside)


@triton.jit
def pool_gradient_kernel(
    finer,
    learned,
    grad_pooled,  # whole
    grad_finer,  # what scale attention gave
    grad_total,  # what is written, perhaps over grad_finer: with the share of grad_pooled
    parts,  # of the learned tensors: query [tiles, 2, g, d] and bias [tiles, 2, g, r]; kernel [tiles, 2, g, d, r]
    pieces,
    slots_in_front,  # slots before slot 0, for the entries of the past
    g,
    METHOD: tl.constexpr,
    RATIO: tl.constexpr,
    CHILDREN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE) - slots_in_front
    child, channel, kind = tl.arange(0, CHILDREN), tl.arange(0, WIDTH), tl.program_id(2)
    _document, first, complete = block_of(pieces, slot, RATIO)
    entry = pieces.past_fine + first[:, None] + child[None, :]
    real = (complete[:, None] & (child < RATIO)[None, :])[:, :, None]
    fine = slot[:, None] * RATIO + child[None, :]
    alone = has_no_parent(pieces, fine, RATIO) & (child < RATIO)[None, :]
    alone &= (fine >= -pieces.past_fine) & (fine < slot_count(pieces.rows, RATIO, pieces.scale - 1))
    alone = alone[:, :, None]
    written = grad_total.tensors[0].dtype.element_ty
    for group in tl.range(tl.program_id(1) * GROUPS, tl.minimum(tl.program_id(1) * GROUPS + GROUPS, g)):
        member = tl.load(at_entries(finer, kind, entry, group, WIDTH), mask=real, other=0.0).to(tl.float32)
        pooled_at = at_entries(grad_pooled, kind, (pieces.past_coarse + slot)[:, None], group, WIDTH)
        grad_block = tl.load(pooled_at, mask=complete[:, None, None], other=0.0).to(tl.float32)
        line, part = kind * g + group, (tl.program_id(0) * 2 + kind) * g + group
        if METHOD == "gated":
            query, bias = load_gate(learned, line, RATIO, CHILDREN, WIDTH)
            gates = gates_of(member, query, bias)
            grad_gates = tl.sum(member * grad_block, 2)
            grad_scores = gates * (grad_gates - tl.sum(gates * grad_gates, 1)[:, None])
            grad = gates[:, :, None] * grad_block + grad_scores[:, :, None] * query[None, None, :]
            grad_query = tl.sum(tl.sum(member * grad_scores[:, :, None], 1), 0)
            tl.store(parts[0] + part * WIDTH + channel, grad_query)
            tl.store(parts[1] + part * RATIO + child, tl.sum(grad_scores, 0), mask=child < RATIO)
        else:
            grad = shares_of(member, learned, line, METHOD, RATIO, CHILDREN, WIDTH) * grad_block
            if METHOD == "conv":
                at = (part * WIDTH + channel)[None, :] * RATIO + child[:, None]
                tl.store(parts[0] + at, tl.sum(member * grad_block, 0), mask=(child < RATIO)[:, None])
        own = tl.load(at_entries(grad_finer, kind, entry, group, WIDTH), mask=real, other=0.0).to(tl.float32)
        tl.store(at_entries(grad_total, kind, entry, group, WIDTH), (own + grad).to(written), mask=real)
        lone_entry = pieces.past_fine + fine
        own = tl.load(at_entries(grad_finer, kind, lone_entry, group, WIDTH), mask=alone, other=0.0)
        tl.store(at_entries(grad_total, kind, lone_entry, group, WIDTH), own, mask=alone)

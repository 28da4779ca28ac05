"""Levels of the pyramid from the finest one, and the gradients back, each in one kernel.

A program has keys or values of one KV group, and of the finest scale the entries of a few coarsest blocks, with all
that is pooled from them: from the row where the coarsest block begins that holds the program's first row, to where the
next program's begins. No block of any scale or document crosses such a border, and slots of every scale follow their
blocks' first rows: the slot of a block that begins at row x is ceil(x / R). So a program walks through the scales,
hands on each level through memory, of which only the finest has to come from afar, and waits for no other program.

Tensors are [slots, children, channels], of which Triton gives a thread all children of a slot. Which finer slots a slot
pools, and whether it holds a complete block at all, is worked out from two document starts a slot (pyramid/eager.py has
the arithmetic as tensors).

Backward goes from coarse to fine: a program has the whole gradient of its slots, reads the gradient that stands at
their children already, and writes the sum. A child has one parent, so it is written once. What stands at a finer slot
without a parent is its whole gradient.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_arguments import Scales
from maha_megatron.attention.scale_attention.triton_keys import prepare_entries
from maha_megatron.attention.triton_slots import first_slot, slot_count, stride_of


class Pair(NamedTuple):
    """Keys and values of every scale (`values` alone is a name that tuples in kernels have already)."""

    of_keys: Scales
    of_values: Scales


class Pieces(NamedTuple):
    """document_start [rows]; KV groups of the levels, and of the learned tensors, whose first ones these are."""

    document_start: torch.Tensor
    rows: int
    g: int
    learned_g: int


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Numbers that the kernels are compiled for.

    Args:
        method, ratio: as in the spec.
        width: channels of a head.
        past_slots: of every scale, entries in front of slot 0.
        finest, coarsest: scales of one launch, which makes all from `finest` + 1 on.
        entries: of the finest scale in a program; as many as whole coarsest blocks have.
        tiles: of every scale, slots that are pooled at once; of the finest, keys that are prepared at once.
        children: of a slot in a tile, the next power of 2 from the ratio.
    """

    method: str
    ratio: int
    width: int
    past_slots: tuple[int, ...]
    finest: int
    coarsest: int
    entries: int
    tiles: tuple[int, ...]
    children: int


@triton.jit
def document_at(pieces, row):
    return tl.load(pieces.document_start + tl.minimum(tl.maximum(row, 0), pieces.rows - 1)).to(tl.int32)


@triton.jit
def block_of(pieces, slot, scale, RATIO: tl.constexpr):
    """Of slots of a coarse scale: their document's start, the finer slot of their first child, and whether they hold
    a complete block.
    """
    stride = stride_of(RATIO, scale)
    document = document_at(pieces, slot * stride)
    block = slot - first_slot(document, RATIO, scale)
    last_row = document + (block + 1) * stride - 1
    complete = (slot >= 0) & (slot < slot_count(pieces.rows, RATIO, scale)) & (block >= 0)
    complete &= (last_row < pieces.rows) & (document_at(pieces, last_row) == document)
    return document, first_slot(document, RATIO, scale - 1) + RATIO * block, complete


@triton.jit
def has_no_parent(pieces, fine, scale, RATIO: tl.constexpr):
    """Whether no complete block of `scale` from slot 0 on pools a slot of the next finer scale."""
    document = document_at(pieces, fine * stride_of(RATIO, scale - 1))
    block = fine - first_slot(document, RATIO, scale - 1)
    parent = first_slot(document, RATIO, scale) + tl.maximum(block, 0) // RATIO
    of_parent, _, complete = block_of(pieces, parent, scale, RATIO)
    return (block < 0) | (complete == 0) | (of_parent != document)


@triton.jit
def border(pieces, number, WALK: tl.constexpr):
    """The row where a program's blocks begin, of either sign; of the number behind the last program, all rows."""
    row = tl.minimum(number * (WALK.entries * stride_of(WALK.ratio, WALK.finest)), pieces.rows)
    behind = (row - document_at(pieces, row)) % stride_of(WALK.ratio, WALK.coarsest)
    return tl.where(row < pieces.rows, row - behind, pieces.rows)


@triton.jit
def locate_program(pieces, WALK: tl.constexpr):
    """Number along the sequence, kind and group of a program, and between which rows its blocks begin."""
    lines = 2 * pieces.g
    number, line = tl.program_id(0) // lines, tl.program_id(0) % lines
    return number, line // pieces.g, line % pieces.g, border(pieces, number, WALK), border(pieces, number + 1, WALK)


@triton.jit
def at_entries(pair, kind, scale, entry, group, WIDTH: tl.constexpr):
    """Pointers [..., WIDTH] to the channels of entries [slots, children] of keys or values."""
    base = tl.where(kind == 0, pair.of_keys.tensors[scale], pair.of_values.tensors[scale])
    entry_stride = tl.where(kind == 0, pair.of_keys.entry_strides[scale], pair.of_values.entry_strides[scale])
    group_stride = tl.where(kind == 0, pair.of_keys.group_strides[scale], pair.of_values.group_strides[scale])
    offset = entry.to(tl.int64) * entry_stride
    return base + group * group_stride + offset[:, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def children_of(pieces, slot, inside, scale, WALK: tl.constexpr):
    """Entries [slots, children] of the children of slots, which of them a complete block has, and complete blocks."""
    PASTS: tl.constexpr = WALK.past_slots
    child = tl.arange(0, WALK.children)
    _document, first, complete = block_of(pieces, slot, scale, WALK.ratio)
    complete &= inside
    real = complete[:, None] & (child < WALK.ratio)[None, :]
    return PASTS[scale - 1] + first[:, None] + child[None, :], real[:, :, None], complete


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
def pool_scale(levels, learned, pieces, kind, group, begin, end, scale: tl.constexpr, WALK: tl.constexpr):
    """A program's slots of one scale from those of the next finer one."""
    TILES: tl.constexpr = WALK.tiles
    PASTS: tl.constexpr = WALK.past_slots
    width: tl.constexpr = WALK.width
    line = (2 * (scale - 1) + kind) * pieces.learned_g + group
    stop = first_slot(end, WALK.ratio, scale)
    for at in tl.range(tl.maximum(first_slot(begin, WALK.ratio, scale), 0), stop, TILES[scale]):
        slot = at + tl.arange(0, TILES[scale])
        inside = slot < stop
        entry, real, _complete = children_of(pieces, slot, inside, scale, WALK)
        member = tl.load(at_entries(levels, kind, scale - 1, entry, group, width), mask=real, other=0.0)
        member = member.to(tl.float32)
        if WALK.method == "gated":
            query, bias = load_gate(learned, line, WALK.ratio, WALK.children, width)
            share = gates_of(member, query, bias)[:, :, None]
        else:
            method: tl.constexpr = WALK.method
            share = shares_of(member, learned, line, method, WALK.ratio, WALK.children, width)
        block = tl.sum(member * share, 1)[:, None, :]
        to = at_entries(levels, kind, scale, (PASTS[scale] + slot)[:, None], group, width)
        tl.store(to, block.to(levels.of_keys.tensors[0].dtype.element_ty), mask=inside[:, None, None])


@triton.jit
def prepare_scale(levels, to, kind, group, begin, end, scale: tl.constexpr, WALK: tl.constexpr, SHAPE: tl.constexpr):
    """Prepared keys of a program's slots of one scale."""
    TILES: tl.constexpr = WALK.tiles
    stop = tl.where(kind == 0, first_slot(end, WALK.ratio, scale), 0)
    for at in tl.range(tl.maximum(first_slot(begin, WALK.ratio, scale), 0), stop, TILES[scale]):
        entry = at + tl.arange(0, TILES[scale])
        prepare_entries(levels.of_keys, to, entry, (entry < stop)[:, None], group, scale, SHAPE)


@triton.jit
def pool_kernel(
    levels,  # Pair; all scales from finest + 1 on are written
    learned,  # of all scales: query [L-1, 2, g, d] and bias [L-1, 2, g, r]; kernel [L-1, 2, g, d, r]; nothing
    pieces,
    to,  # Preparation of keys, which have no past; or None
    WALK: tl.constexpr,
    SHAPE: tl.constexpr,
):
    _number, kind, group, begin, end = locate_program(pieces, WALK)
    for scale in tl.static_range(WALK.finest + 1, WALK.coarsest + 1):
        pool_scale(levels, learned, pieces, kind, group, begin, end, scale, WALK)
        if SHAPE is not None and (scale > WALK.finest + 1 or WALK.finest == 0):  # else another launch's coarsest
            prepare_scale(levels, to, kind, group, begin, end, scale - 1, WALK, SHAPE)
        tl.debug_barrier()  # what one thread wrote, others read
    if SHAPE is not None:
        prepare_scale(levels, to, kind, group, begin, end, WALK.coarsest, WALK, SHAPE)


@triton.jit
def shared_gradient(member, grad_block, learned, line, WALK: tl.constexpr):
    """What the gradient of blocks is for their children, and for the learned tensors, summed over the slots.

    The latter of gates: query [d] and bias [children]; of a kernel: [children, d], and a number that is not used.
    """
    first, second = 0.0, 0.0
    if WALK.method == "gated":
        query, bias = load_gate(learned, line, WALK.ratio, WALK.children, WALK.width)
        gates = gates_of(member, query, bias)
        grad_gates = tl.sum(member * grad_block, 2)
        grad_scores = gates * (grad_gates - tl.sum(gates * grad_gates, 1)[:, None])
        grad = gates[:, :, None] * grad_block + grad_scores[:, :, None] * query[None, None, :]
        first, second = tl.sum(tl.sum(member * grad_scores[:, :, None], 1), 0), tl.sum(grad_scores, 0)
    else:
        method: tl.constexpr = WALK.method
        grad = shares_of(member, learned, line, method, WALK.ratio, WALK.children, WALK.width) * grad_block
        if WALK.method == "conv":
            first = tl.sum(member * grad_block, 0)
    return grad, first, second


@triton.jit
def store_parts(parts, line, first, second, WALK: tl.constexpr):
    """A program's parts of the learned tensors' gradients."""
    child, channel = tl.arange(0, WALK.children), tl.arange(0, WALK.width)
    if WALK.method == "gated":
        tl.store(parts[0] + line * WALK.width + channel, first)
        tl.store(parts[1] + line * WALK.ratio + child, second, mask=child < WALK.ratio)
    elif WALK.method == "conv":
        at = (line * WALK.width + channel)[None, :] * WALK.ratio + child[:, None]
        tl.store(parts[0] + at, first, mask=(child < WALK.ratio)[:, None])


@triton.jit
def add_to_children(
    levels, grads, totals, learned, parts, pieces, number, kind, group, begin, end,
    scale: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """The gradient of a program's slots of one scale, added to that of their children."""
    TILES: tl.constexpr = WALK.tiles
    PASTS: tl.constexpr = WALK.past_slots
    width: tl.constexpr = WALK.width
    children: tl.constexpr = WALK.children
    written = totals.of_keys.tensors[0].dtype.element_ty
    line = (2 * (scale - 1) + kind) * pieces.learned_g + group
    first_sum, second_sum = 0.0, 0.0
    if WALK.method == "gated":
        first_sum, second_sum = tl.zeros([width], tl.float32), tl.zeros([children], tl.float32)
    elif WALK.method == "conv":
        first_sum = tl.zeros([children, width], tl.float32)
    stop = first_slot(end, WALK.ratio, scale)
    for at in tl.range(tl.maximum(first_slot(begin, WALK.ratio, scale), 0), stop, TILES[scale]):
        slot = at + tl.arange(0, TILES[scale])
        entry, real, complete = children_of(pieces, slot, slot < stop, scale, WALK)
        # all loads at once, so that memory is waited for once
        member = tl.load(at_entries(levels, kind, scale - 1, entry, group, width), mask=real, other=0.0)
        own = tl.load(at_entries(grads, kind, scale - 1, entry, group, width), mask=real, other=0.0)
        block_at = at_entries(totals, kind, scale, (PASTS[scale] + slot)[:, None], group, width)
        grad_block = tl.load(block_at, mask=complete[:, None, None], other=0.0).to(tl.float32)
        grad, first, second = shared_gradient(member.to(tl.float32), grad_block, learned, line, WALK)
        first_sum += first
        second_sum += second
        to = at_entries(totals, kind, scale - 1, entry, group, width)
        tl.store(to, (own.to(tl.float32) + grad).to(written), mask=real)
    numbers = tl.num_programs(0) // (2 * pieces.g)
    store_parts(
        parts,
        (((scale - 1 - WALK.finest) * numbers + number) * 2 + kind) * pieces.g + group,
        first_sum,
        second_sum,
        WALK,
    )


@triton.jit
def copy_without_parent(grads, totals, pieces, number, kind, group, begin, end, scale, WALK: tl.constexpr):
    """The gradient of those of a program's slots, of the scale below, that no block pools; the first has the past."""
    TILES: tl.constexpr = WALK.tiles
    PASTS: tl.constexpr = WALK.past_slots
    tile: tl.constexpr = TILES[scale] * WALK.children
    past: tl.constexpr = PASTS[scale - 1]
    stop = first_slot(end, WALK.ratio, scale - 1)
    for at in tl.range(tl.where(number == 0, -past, first_slot(begin, WALK.ratio, scale - 1)), stop, tile):
        slot = at + tl.arange(0, tile)
        alone = (has_no_parent(pieces, slot, scale, WALK.ratio) & (slot < stop))[:, None, None]
        own_at = at_entries(grads, kind, scale - 1, (past + slot)[:, None], group, WALK.width)
        to = at_entries(totals, kind, scale - 1, (past + slot)[:, None], group, WALK.width)
        tl.store(to, tl.load(own_at, mask=alone, other=0.0), mask=alone)


@triton.jit
def pool_gradient_kernel(
    levels,
    grads,  # what scale attention gave
    totals,  # whole of the coarsest scale; written of all finer ones
    learned,
    parts,  # of the learned tensors: [scales of the launch, programs along the sequence, 2, g, ...]
    pieces,
    WALK: tl.constexpr,
    IN_PLACE: tl.constexpr,  # whether totals are written over grads
):
    number, kind, group, begin, end = locate_program(pieces, WALK)
    for i in tl.static_range(WALK.coarsest - WALK.finest):
        where = (pieces, number, kind, group, begin, end)
        add_to_children(levels, grads, totals, learned, parts, *where, WALK.coarsest - i, WALK)
        if not IN_PLACE:
            copy_without_parent(grads, totals, *where, WALK.coarsest - i, WALK)
        tl.debug_barrier()  # what one thread wrote, others read

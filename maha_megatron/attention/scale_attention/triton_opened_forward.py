"""Forward of opened keys: block by block, each for the rows that opened it; then row by row, all that a row opened.

Rows that opened one block follow one another in a sorted list of all choices of a KV group (Lists), so that its keys
and values, a tile, are read for many rows, and what is gathered are queries. A program takes a run of the list:

    blocks     [3 3 3 3 3|7 7|9 9 9 9 9 9 9|9 9 9 9 ...     sorted; | are ends of a block or of a run
    rows        4 5 8 9 9 1 8 2 3 4 4 5 6 7 7 8 9           each gets O and LSE of that block alone

`join_kernel` then fuses, for a tile of rows, those of its blocks with the softmax over the scales, in place.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    LOG2_E,
    at_lines,
    gained_queries,
    log_of_sum,
    query_norms,
    slots_of_scale,
    tile_rows,
    turned_queries,
    utility,
)
from maha_megatron.attention.scale_attention.triton_geometry import joined
from maha_megatron.attention.scale_attention.triton_key_gradient import load_rows
from maha_megatron.attention.triton_slots import first_slot, past_of, stride_of


@triton.jit
def listed_block(lists, group, at):
    """Of a place in a group's list: its key, and the block, by its place among the entries; -1 for none."""
    key = tl.load(lists.keys + group.to(tl.int64) * lists.length + at)
    return key, key % lists.stride - 1


@triton.jit
def listed_rows(lists, group, at, stop, key, LINES: tl.constexpr, SHAPE: tl.constexpr):
    """Of the places [at, stop) of a group's list, the first LINES that have that key: place among the group's choices,
    row, and whether it is one of them.
    """
    line = at + tl.arange(0, LINES)
    base = group.to(tl.int64) * lists.length
    own = tl.load(lists.keys + base + line, mask=line < stop, other=-1) == key
    place = (tl.load(lists.order + base + line, mask=own, other=0) % lists.length).to(tl.int32)
    return place, place // SHAPE.blocks, own


@triton.jit
def key_at(lists, group, at, stop):
    """The key of a place in a group's list; -1, which none is, from `stop` on."""
    return tl.load(lists.keys + group.to(tl.int64) * lists.length + at, mask=at < stop, other=-1)


@triton.jit
def first_opened(lists, group, at, stop, LINES: tl.constexpr):
    """The first of the places [at, stop) with a block, or stop: those without one come first."""
    passed = LINES
    while passed == LINES:
        line = at + tl.arange(0, LINES)
        key = tl.load(lists.keys + group.to(tl.int64) * lists.length + line, mask=line < stop, other=1)
        passed = tl.sum((key % lists.stride == 0).to(tl.int32))
        at += passed
    return at


@triton.jit
def first_child(block, places, SHAPE: tl.constexpr):
    """The slot of to_scale where the children of a block begin, which is given by its place among the entries."""
    slot = block - past_of(SHAPE.from_scale, SHAPE)
    anchor = tl.minimum(tl.maximum(slot * stride_of(SHAPE.ratio, SHAPE.from_scale), 0), places.rows - 1)
    document = tl.load(places.document_start + anchor).to(tl.int32)
    within_document = slot - first_slot(document, SHAPE.ratio, SHAPE.from_scale)
    children = stride_of(SHAPE.ratio, SHAPE.from_scale - SHAPE.to_scale)
    return first_slot(document, SHAPE.ratio, SHAPE.to_scale) + within_document * children


@triton.jit
def opened_tile(keys, group, block, places, SHAPE: tl.constexpr, CHILDREN: tl.constexpr):
    """Keys and values [children, d] of a block, and which of the tile's lines are children."""
    WIDTH: tl.constexpr = 2 * SHAPE.half
    child, channels = tl.arange(0, CHILDREN), tl.arange(0, WIDTH)
    real = child < stride_of(SHAPE.ratio, SHAPE.from_scale - SHAPE.to_scale)
    key_base, value_base, value_stride = slots_of_scale(keys, group, places, SHAPE.to_scale, SHAPE)
    slot = first_child(block, places, SHAPE) + child
    key_tile = tl.load(key_base + slot[:, None] * WIDTH + channels[None, :], mask=real[:, None], other=0.0)
    value_at = value_base + slot[:, None] * value_stride + channels[None, :]
    return key_tile, tl.load(value_at, mask=real[:, None], other=0.0), real


@triton.jit
def load_opening(opening, row, head, real, places, SHAPE: tl.constexpr):
    """Queries [lines, d] of any rows and one head, and what is added to their logits; 0 where a line is not real."""
    line = (head * places.rows).to(tl.int64) + row
    at = opening.turned + line[:, None] * (2 * SHAPE.half) + tl.arange(0, 2 * SHAPE.half)[None, :]
    return tl.load(at, mask=real[:, None], other=0.0), tl.load(opening.offsets + line, mask=real, other=0.0)


@triton.jit
def turn_opening_kernel(
    queries,
    places,
    rows_of,  # in backward: out, Rows; log-sum-exp [n, t]; dO, Rows
    made,  # OpeningQueries
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Queries as opened keys read them, once for all blocks that a row opens; in backward also delta."""
    HALF: tl.constexpr = SHAPE.half
    operand: tl.constexpr = made.turned.dtype.element_ty
    start, row, document, head, _group = tile_rows(queries, places, ROWS, 1)
    inside, line = row < places.rows, (head * places.rows).to(tl.int64) + row
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    first, second = gained_queries(queries, start, row, head, inside, HALF, 1)
    offset = utility(first, second, norm, queries, head, len(SHAPE.windows), HALF, 1)
    first, second = first * norm[:, None], second * norm[:, None]
    turned = turned_queries(first, second, row - document, places, SHAPE.to_scale, operand, SHAPE)
    at = made.turned + line[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(at, joined(turned[0], turned[1]), mask=inside[:, None])
    if rows_of is not None:
        out, lse, grad_out = rows_of
        channels = tl.arange(0, 2 * HALF)
        grad = tl.load(at_lines(grad_out, start, row, head, channels), mask=inside[:, None], other=0.0)
        found = tl.load(at_lines(out, start, row, head, channels), mask=inside[:, None], other=0.0)
        tl.store(made.delta + line, tl.sum(grad.to(tl.float32) * found.to(tl.float32), 1), mask=inside)
        offset -= tl.load(lse + line, mask=inside, other=0.0)
    tl.store(made.offsets + line, offset, mask=inside)


@triton.jit
def attend_opened_kernel(
    opening,  # OpeningQueries
    n_per_group,
    keys,
    places,
    lists,
    made,  # OpenedOutputs
    SHAPE: tl.constexpr,
    LINES: tl.constexpr,
    CHILDREN: tl.constexpr,  # a power of 2, at least 16
    RUN: tl.constexpr,
):
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    unit: tl.constexpr = LOG2_E / (2 * SHAPE.half) ** 0.5
    group, at = tl.program_id(1), tl.program_id(0) * RUN
    stop = tl.minimum(at + RUN, lists.length)
    at = first_opened(lists, group, at, stop, LINES)
    channels = tl.arange(0, 2 * SHAPE.half)
    while at < stop:
        key, block = listed_block(lists, group, at)
        key_tile, value_tile, child = opened_tile(keys, group, block, places, SHAPE, CHILDREN)
        next_key = key
        while next_key == key:
            place, row, real = listed_rows(lists, group, at, stop, key, LINES, SHAPE)
            for head in tl.range(group * n_per_group, (group + 1) * n_per_group):
                query, offset = load_opening(opening, row, head, real, places, SHAPE)
                logits = tl.dot(query, key_tile.T, input_precision=SHAPE.precision) * unit + offset[:, None]
                logits = tl.where(child[None, :] | ~real[:, None], logits, float("-inf"))
                top = tl.max(logits, 1)
                weight = tl.exp2(logits - top[:, None])
                mass = tl.sum(weight, 1)
                output = tl.dot(weight.to(operand), value_tile, input_precision=SHAPE.precision)
                line = (head * lists.length).to(tl.int64) + place
                out_at = made.outs + line[:, None] * (2 * SHAPE.half) + channels[None, :]
                output = (output * (1 / mass)[:, None]).to(made.outs.dtype.element_ty)
                tl.store(out_at, output, mask=real[:, None])
                tl.store(made.lses + line, top + tl.log2(mass), mask=real)
            at += tl.sum(real.to(tl.int32))
            next_key = key_at(lists, group, at, stop)


@triton.jit
def join_kernel(
    places,
    chosen,
    opened,  # OpenedOutputs
    out,  # Rows, of the scales; then of all
    lse,  # [n, t] likewise
    opened_lse,  # [n, t], of what is opened alone, written
    n_per_group,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1)
    row, channels = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 2 * SHAPE.half)
    inside = row < places.rows
    of_head = (head * places.rows).to(tl.int64) + row
    chosen_at = chosen + ((head // n_per_group * places.rows).to(tl.int64) + row) * SHAPE.blocks
    own = tl.load(lse + of_head, mask=inside, other=0.0)
    top = own
    for place in tl.range(0, SHAPE.blocks):
        here = tl.load(chosen_at + place, mask=inside, other=-1) >= 0
        top = tl.maximum(top, tl.load(opened.lses + of_head * SHAPE.blocks + place, mask=here, other=float("-inf")))
    own_weight, mass = tl.exp2(own - top), tl.zeros([ROWS], tl.float32)
    fused = load_rows(out, row, head, inside, channels).to(tl.float32) * own_weight[:, None]
    for place in tl.range(0, SHAPE.blocks):
        here, line = tl.load(chosen_at + place, mask=inside, other=-1) >= 0, of_head * SHAPE.blocks + place
        weight = tl.exp2(tl.load(opened.lses + line, mask=here, other=float("-inf")) - top)
        part_at = opened.outs + line[:, None] * (2 * SHAPE.half) + channels[None, :]
        fused += tl.load(part_at, mask=here[:, None], other=0.0).to(tl.float32) * weight[:, None]
        mass += weight
    fused = fused * (1 / (own_weight + mass))[:, None]
    tl.debug_barrier()  # every warp has read what one of them now writes over
    out_at = out.tensor + head * out.head_stride + row.to(tl.int64)[:, None] * out.row_stride + channels[None, :]
    tl.store(out_at, fused.to(out.tensor.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + of_head, top + tl.log2(own_weight + mass), mask=inside)
    tl.store(opened_lse + of_head, log_of_sum(top, mass), mask=inside)

"""The choice of a refined layer: which blocks of from_scale every row and KV group opens, by its heads' probabilities.

One program per tile of rows and KV group goes over the blocks that its rows may open, tile by tile, with the logits of
all heads of the group at once. A block's score is the sum over the heads of exp(s - LSE_from). LSE_from is found by a
pass of its own: what the forward has of a scale is nothing where another outweighs it by far. Score and block make one
number of 64 bits: above, the bits of the score, which as a whole number has the same order, since it is not negative;
below, what falls as blocks get later. So the highest number is the best block, at a tie the first; no two are equal.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    FARTHEST,
    LOG2_E,
    gained_queries,
    only_seen,
    query_norms,
    sight_of_tile,
    slots_of_scale,
    tile_ends,
    turned_queries,
)
from maha_megatron.attention.scale_attention.triton_geometry import joined
from maha_megatron.attention.triton_slots import divided, first_slot, past_of, visible, window_of, within

LATEST = tl.constexpr(0x7FFFFFFF)
HIDDEN = tl.constexpr(-1000)  # of blocks that may not be opened: below every place that is still free


@triton.jit
def openable(row, document, SHAPE: tl.constexpr):
    """The slots [first, end) of from_scale that rows may open; the end may lie before the first. See slots.py."""
    first, _ = visible(row, document, window_of(SHAPE.from_scale, SHAPE), SHAPE.ratio, SHAPE.from_scale)
    complete = divided(row - document + 1, SHAPE.ratio, SHAPE.to_scale)
    beyond = tl.maximum(complete - window_of(SHAPE.to_scale, SHAPE), 0)
    blocks = divided(beyond, SHAPE.ratio, SHAPE.from_scale - SHAPE.to_scale)
    return first, first_slot(document, SHAPE.ratio, SHAPE.from_scale) + blocks


@triton.jit
def group_lines(queries, places, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Of a program (tile, group): first row; row, its document, head and whether it is one, of its HEADS * ROWS lines,
    head after head. There may be more of them than the group has heads, as HEADS is a power of 2.
    """
    start = tl.program_id(0) * ROWS
    line = tl.arange(0, HEADS * ROWS)
    row = start + line % ROWS
    head, real = tl.program_id(1) * queries.n_per_group, row < places.rows
    if HEADS > 1:
        real = real & (line // ROWS < queries.n_per_group)
        head = head + tl.minimum(line // ROWS, queries.n_per_group - 1)
    document = tl.load(places.document_start + tl.minimum(row, places.rows - 1)).to(tl.int32)
    return start, row, document, head, real


@triton.jit
def queries_of_lines(queries, places, lines, SHAPE: tl.constexpr, operand: tl.constexpr, HEADS: tl.constexpr):
    """Queries turned for from_scale, and the factor that makes of products logits in units of log 2."""
    start, row, document, head, real = lines
    norm = query_norms(queries, start, row, head, real, SHAPE)
    first, second = gained_queries(queries, start, row, head, real, SHAPE.half, HEADS)
    turned = turned_queries(first, second, row - document, places, SHAPE.from_scale, operand, SHAPE)
    return joined(turned[0], turned[1]), norm * (LOG2_E / (2 * SHAPE.half) ** 0.5)


@triton.jit
def products(query, key_base, at, end, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """Of queries and the tile of keys from slot `at` on: [lines, keys]; 0 from slot `end` on."""
    WIDTH: tl.constexpr = 2 * SHAPE.half
    key, channels = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    key_at = key_base + at * WIDTH + key[:, None] * WIDTH + channels[None, :]
    key_tile = tl.load(key_at, mask=(key < end - at)[:, None], other=0.0)
    return tl.dot(query, key_tile.T, input_precision=SHAPE.precision)


@triton.jit
def log_sums(query, unit, sight, key_base, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """Every line's log-sum-exp over the keys that it sees, in units of log 2; 0 where it sees none."""
    key, top, mass = tl.arange(0, KEYS), tl.zeros_like(unit) + FARTHEST, tl.zeros_like(unit)
    end = sight[3]
    for at in tl.range(sight[2], end, KEYS):
        logits = only_seen(products(query, key_base, at, end, SHAPE, KEYS), key, at, sight, KEYS) * unit[:, None]
        higher = tl.maximum(top, tl.max(logits, 1))
        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        top = higher
    return tl.where(mass > 0, top + tl.log2(tl.where(mass > 0, mass, 1.0)), 0.0)


@triton.jit
def with_better(best, numbers, SHAPE: tl.constexpr):
    """The best of `best` [rows, places] and numbers [rows, keys], in any order."""
    for _ in tl.range(0, SHAPE.blocks):
        highest, worst = tl.max(numbers, 1), tl.min(best, 1)
        replaced = (best == worst[:, None]) & (highest > worst)[:, None]
        best = tl.where(replaced, highest[:, None], best)
        numbers = tl.where(numbers == highest[:, None], HIDDEN, numbers)
    return best


@triton.jit
def choose_kernel(
    queries,
    keys,
    places,
    chosen,  # int32 [g, t, blocks], by place among the entries of from_scale; -1 for none
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACES: tl.constexpr,  # a power of 2, SHAPE.blocks or more
):
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    group, past = tl.program_id(1), past_of(SHAPE.from_scale, SHAPE)
    lines = group_lines(queries, places, ROWS, HEADS)
    query, unit = queries_of_lines(queries, places, lines, SHAPE, operand, HEADS)
    start, real, ends = lines[0], lines[4], tile_ends(lines[0], places, ROWS)
    key_base, _, _ = slots_of_scale(keys, group, places, SHAPE.from_scale, SHAPE)
    sight = sight_of_tile(start, ends, lines[1], lines[2], SHAPE.from_scale, SHAPE)
    log_sum = log_sums(query, unit, sight, key_base, SHAPE, KEYS)
    begin, _ = openable(start, ends[1], SHAPE)
    _, end = openable(ends[0], ends[2], SHAPE)
    row = start + tl.arange(0, ROWS)
    document = tl.load(places.document_start + tl.minimum(row, places.rows - 1)).to(tl.int32)
    may_from, may_to = openable(row, document, SHAPE)
    count = tl.where(row < places.rows, tl.maximum(may_to - may_from, 0), 0)
    key, place = tl.arange(0, KEYS), tl.arange(0, PLACES)
    # places that are free are all different; what a row may not use is never the worst
    best = tl.zeros([ROWS, PLACES], tl.int64) + tl.where(place < SHAPE.blocks, -1 - place, LATEST).to(tl.int64)[None, :]
    best = tl.where((place < SHAPE.blocks)[None, :], best, best << 32)
    for at in tl.range(begin, end, KEYS):
        logits = products(query, key_base, at, end, SHAPE, KEYS) * unit[:, None]
        score = tl.exp2(logits - log_sum[:, None])
        if HEADS > 1:
            score = tl.sum(tl.reshape(tl.where(real[:, None], score, 0.0), [HEADS, ROWS, KEYS]), 0)
        number = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (-key - (past + at) + LATEST)[None, :]
        may = within(key[None, :], (may_from - at)[:, None], count[:, None])
        best = with_better(best, tl.where(may, number, HIDDEN), SHAPE)
    found = tl.where(best >= 0, -(best & LATEST).to(tl.int32) + LATEST, -1)
    line = (group.to(tl.int64) * places.rows + row) * SHAPE.blocks
    mask = (row < places.rows)[:, None] & (place < SHAPE.blocks)[None, :]
    tl.store(chosen + line[:, None] + place[None, :], found, mask=mask)

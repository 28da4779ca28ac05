"""The forward kernel of every scale on its own: O_l, LSE_l and utilities, for aggregations.

One program per tile of rows and query head, as in triton_forward.py, with the same keys, tiles and rotations. Each
scale has a softmax of its own, which begins and ends with it:

    scale 0    [k k k]    ->  O_0, LSE_0
    scale 1    [k k]      ->  O_1, LSE_1      a row that sees nothing of a scale: O_l = 0, LSE_l = -inf
    scale 2    [k k]      ->  ...
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    FARTHEST,
    LOG2_E,
    at_lines,
    gained_queries,
    query_norms,
    seen_by_whole_tile,
    slots_of_scale,
    tile_ends,
    tile_rows,
    turned_queries,
    utility,
    visible_to_tile,
)
from maha_megatron.attention.scale_attention.triton_geometry import joined
from maha_megatron.attention.triton_slots import visible, window_of, within

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def at_scales(numbers, row, head, n, scale, SCALES: tl.constexpr):
    """Pointers [lines] into [t, n, L]."""
    return numbers + (row.to(tl.int64) * n + head) * SCALES + scale


@triton.jit
def attend_scales_kernel(
    queries,
    keys,
    places,
    outs,  # Rows: a head and scale is a head of its own
    lses,  # [t, n, L], natural logarithms
    utilities,  # <rho_l, q> + beta_l [t, n, L], or None
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    HALF: tl.constexpr = SHAPE.half
    SCALES: tl.constexpr = len(SHAPE.windows)
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    start, row, document, head, group = tile_rows(queries, places, ROWS, HEADS)
    ends, inside = tile_ends(start, places, ROWS), row < places.rows
    key, channels = tl.arange(0, KEYS), tl.arange(0, 2 * HALF)
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    for scale in tl.range(0, SCALES):
        see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
        begin, end = visible_to_tile(start, ends, scale, SHAPE)
        seen_from, seen_to = seen_by_whole_tile(start, ends, scale, SHAPE)
        first, second = gained_queries(queries, start, row, head, inside & (begin <= end), HALF, HEADS)
        if SHAPE.utilities:
            learned = utility(first, second, norm, queries, head, scale, HALF, HEADS) * LN_2
            tl.store(at_scales(utilities, row, head, queries.n, scale, SCALES), learned, mask=inside)
        turned_first, turned_second = turned_queries(first, second, row - document, places, scale, operand, SHAPE)
        query = joined(turned_first, turned_second)
        key_base, value_base, value_stride = slots_of_scale(keys, group, places, scale, SHAPE)
        value_offset = key[:, None] * value_stride + channels[None, :]
        top = tl.full([HEADS * ROWS], FARTHEST, tl.float32)
        mass = tl.zeros([HEADS * ROWS], tl.float32)
        own = tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32)
        for at in tl.range(begin, end, KEYS):
            # keys behind the last are read, and not seen; values there might be no numbers, which 0 would not undo
            key_tile = tl.load(key_base + at * (2 * HALF) + key[:, None] * (2 * HALF) + channels[None, :])
            logits = tl.dot(query, key_tile.T, input_precision=SHAPE.precision)
            if (at < seen_from) | (at + KEYS > seen_to):  # some row does not see all of the tile
                seen = within(key[None, :], (see_from - at)[:, None], (see_to - see_from)[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1) * unit)
            weight = tl.exp2(logits * unit[:, None] - higher[:, None])
            shrink = tl.exp2(top - higher)
            mass = mass * shrink + tl.sum(weight, 1)
            value_at = value_base + at * value_stride + value_offset
            value_tile = tl.load(value_at, mask=(key < end - at)[:, None], other=0.0)
            own = tl.dot(weight.to(operand), value_tile, own * shrink[:, None], input_precision=SHAPE.precision)
            top = higher
        some = tl.where(mass > 0, mass, 1.0)
        lse = tl.where(mass > 0, (top + tl.log2(some)) * LN_2, float("-inf"))
        tl.store(at_scales(lses, row, head, queries.n, scale, SCALES), lse, mask=inside)
        to = at_lines(outs, start, row, head * SCALES + scale, channels)
        tl.store(to, (own * (1 / some)[:, None]).to(outs.tensor.dtype.element_ty), mask=inside[:, None])

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
    attend_scale,
    gained_queries,
    log_of_sum,
    query_norms,
    sight_of_tile,
    tile_ends,
    tile_rows,
    turned_queries,
    utility,
)
from maha_megatron.attention.scale_attention.triton_geometry import joined

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
    channels = tl.arange(0, 2 * HALF)
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    for scale in tl.range(0, SCALES):
        sight = sight_of_tile(start, ends, row, document, scale, SHAPE)
        first, second = gained_queries(queries, start, row, head, inside & (sight[2] <= sight[3]), HALF, HEADS)
        if SHAPE.utilities:
            learned = utility(first, second, norm, queries, head, scale, HALF, HEADS) * LN_2
            tl.store(at_scales(utilities, row, head, queries.n, scale, SCALES), learned, mask=inside)
        turned_first, turned_second = turned_queries(first, second, row - document, places, scale, operand, SHAPE)
        query = joined(turned_first, turned_second)
        none = tl.zeros([HEADS * ROWS], tl.float32)
        begun = (
            tl.full([HEADS * ROWS], FARTHEST, tl.float32),
            none,
            none,
            tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32),
        )
        of_scale = (query, none, unit, sight, keys, group, places, scale)
        top, mass, _part, own = attend_scale(*of_scale, *begun, SHAPE, KEYS, False)
        tl.store(at_scales(lses, row, head, queries.n, scale, SCALES), log_of_sum(top, mass) * LN_2, mask=inside)
        to = at_lines(outs, start, row, head * SCALES + scale, channels)
        own *= (1 / tl.where(mass > 0, mass, 1.0))[:, None]
        tl.store(to, own.to(outs.tensor.dtype.element_ty), mask=inside[:, None])

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
    LOG2_E,
    at_lines,
    attend_scale,
    begun,
    log_of_sum,
    queries_of_all,
    queries_of_scale,
    query_norms,
    sight_of_tile,
    tile_ends,
    tile_rows,
)

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
    SCALES: tl.constexpr = len(SHAPE.windows)
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    start, row, document, head, group = tile_rows(queries, places, ROWS, HEADS)
    ends, inside = tile_ends(start, places, ROWS), row < places.rows
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    unit = norm * (LOG2_E / (2 * SHAPE.half) ** 0.5)
    once = queries_of_all(queries, places, start, row, document, head, operand, SHAPE, HEADS)
    for scale in tl.range(0, SCALES):
        sight = sight_of_tile(start, ends, row, document, scale, SHAPE)
        lines = (once, queries, places, start, row, document, head, norm, sight, scale)
        query, learned = queries_of_scale(*lines, operand, SHAPE, HEADS)
        if SHAPE.utilities:
            tl.store(at_scales(utilities, row, head, queries.n, scale, SCALES), learned * LN_2, mask=inside)
        top, mass, own = begun(norm, 2 * SHAPE.half)
        of_scale = (query, tl.zeros_like(norm), unit, sight, keys, group, places, scale)
        top, mass, _part, own = attend_scale(*of_scale, top, mass, tl.zeros_like(norm), own, SHAPE, KEYS, False)
        tl.store(at_scales(lses, row, head, queries.n, scale, SCALES), log_of_sum(top, mass) * LN_2, mask=inside)
        to = at_lines(outs, start, row, head * SCALES + scale, tl.arange(0, 2 * SHAPE.half))
        own *= (1 / tl.where(mass > 0, mass, 1.0))[:, None]
        tl.store(to, own.to(outs.tensor.dtype.element_ty), mask=inside[:, None])

"""The first kernel of backward, of every scale on its own: queries and their gain; and what the second reads per row.

With dO_l and dLSE_l from what the outputs are made into, and P = exp(s - LSE_l),

    dS_l = P (dO_l V' - delta_l)        delta_l = <dO_l, O_l> - dLSE_l        dq'_l = dS_l K'_l

and one accumulator for the queries of all scales, as in triton_query_gradient.py. Turned queries are written for the
second kernel; gradients of utilities are given.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    LOG2_E,
    at_lines,
    gained_queries,
    query_norms,
    sight_of_tile,
    tile_ends,
    tile_rows,
)
from maha_megatron.attention.scale_attention.triton_geometry import joined
from maha_megatron.attention.scale_attention.triton_query_gradient import (
    add_query_gradient,
    store_query_gradients,
    store_turned,
    turned_on,
)
from maha_megatron.attention.scale_attention.triton_scales_forward import at_scales


@triton.jit
def load_scale(given, made, places, start, row, head, n, scale, inside, SHAPE: tl.constexpr):
    """Of every line at a scale: dO_l, delta_l and -LSE_l in units of log 2, or 0; both numbers are stored too."""
    SCALES: tl.constexpr = len(SHAPE.windows)
    channels = tl.arange(0, 2 * SHAPE.half)
    grad_at = at_lines(given.grad_outs, start, row, head * SCALES + scale, channels)
    grad = tl.load(grad_at, mask=inside[:, None], other=0.0)
    out_at = at_lines(given.outs, start, row, head * SCALES + scale, channels)
    out = tl.load(out_at, mask=inside[:, None], other=0.0)
    grad_lse = tl.load(at_scales(given.grad_lses, row, head, n, scale, SCALES), mask=inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1) - grad_lse
    lse = tl.load(at_scales(given.lses, row, head, n, scale, SCALES), mask=inside, other=0.0)
    offset = tl.where(lse > float("-inf"), -lse * LOG2_E, 0.0)
    at_number = (head * SCALES + scale).to(tl.int64) * places.rows + row
    tl.store(made.delta + at_number, delta, mask=inside)
    tl.store(made.offsets + at_number, offset, mask=inside)
    return grad, delta, offset


@triton.jit
def scales_query_gradient_kernel(
    queries,
    keys,
    places,
    given,
    made,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    HALF: tl.constexpr = SHAPE.half
    SCALES: tl.constexpr = len(SHAPE.windows)
    start, row, document, head, group = tile_rows(queries, places, ROWS, HEADS)
    ends, inside = tile_ends(start, places, ROWS), row < places.rows
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    tl.store(made.norms + head * places.rows + row, norm, mask=inside)
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    grad_query = tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32)
    if SHAPE.one_turn:
        first, second = gained_queries(queries, start, row, head, inside, HALF, HEADS)
        at = head.to(tl.int64) * places.rows + row
        query = joined(*store_turned(first, second, made, at, row - document, places, 0, inside, SHAPE))
    for scale in tl.range(0, SCALES):
        sight = sight_of_tile(start, ends, row, document, scale, SHAPE)
        grad, delta, offset = load_scale(given, made, places, start, row, head, queries.n, scale, inside, SHAPE)
        if not SHAPE.one_turn:
            first, second = gained_queries(queries, start, row, head, inside & (sight[2] <= sight[3]), HALF, HEADS)
            at = (head * SCALES + scale).to(tl.int64) * places.rows + row
            query = joined(*store_turned(first, second, made, at, row - document, places, scale, inside, SHAPE))
        of_scale = (query, grad, delta, offset, unit, sight, keys, group, places, scale)
        grad_query, _of_logits, _of_weights = add_query_gradient(grad_query, *of_scale, SHAPE, KEYS, False)
        if not SHAPE.one_turn or scale == SCALES - 1:
            grad_query = turned_on(grad_query, row - document, places, scale, SHAPE)
    lines = (queries, places, made, start, row, head)
    total = tl.zeros_like(norm)  # nothing is to be taken out of the utilities' gradients
    store_query_gradients(grad_query, norm, total, *lines, SHAPE, ROWS, HEADS)

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
    seen_by_whole_tile,
    slots_of_scale,
    tile_ends,
    tile_rows,
    turned_queries,
    visible_to_tile,
)
from maha_megatron.attention.scale_attention.triton_geometry import joined
from maha_megatron.attention.scale_attention.triton_query_gradient import store_query_gradients, turned_on
from maha_megatron.attention.scale_attention.triton_scales_forward import at_scales
from maha_megatron.attention.triton_slots import visible, window_of, within


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
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    start, row, document, head, group = tile_rows(queries, places, ROWS, HEADS)
    ends, inside = tile_ends(start, places, ROWS), row < places.rows
    key, channels = tl.arange(0, KEYS), tl.arange(0, 2 * HALF)
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    tl.store(made.norms + head * places.rows + row, norm, mask=inside)
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    grad_query = tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32)
    for scale in tl.range(0, SCALES):
        see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
        begin, end = visible_to_tile(start, ends, scale, SHAPE)
        seen_from, seen_to = seen_by_whole_tile(start, ends, scale, SHAPE)
        grad, delta, offset = load_scale(given, made, places, start, row, head, queries.n, scale, inside, SHAPE)
        first, second = gained_queries(queries, start, row, head, inside & (begin <= end), HALF, HEADS)
        turned_first, turned_second = turned_queries(first, second, row - document, places, scale, operand, SHAPE)
        at_scale = (head * SCALES + scale).to(tl.int64) * places.rows + row
        turned_at = made.turned + at_scale[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
        tl.store(turned_at, turned_first, mask=inside[:, None])
        tl.store(turned_at + HALF, turned_second, mask=inside[:, None])
        query = joined(turned_first, turned_second)
        grad_query = turned_on(grad_query, row - document, places, scale, SHAPE)
        key_base, value_base, value_stride = slots_of_scale(keys, group, places, scale, SHAPE)
        value_offset = key[:, None] * value_stride + channels[None, :]
        for at in tl.range(begin, end, KEYS):
            real = (key < end - at)[:, None]
            key_at = key_base + at * (2 * HALF) + key[:, None] * (2 * HALF) + channels[None, :]
            key_tile = tl.load(key_at, mask=real, other=0.0)
            value_tile = tl.load(value_base + at * value_stride + value_offset, mask=real, other=0.0)
            logits = tl.dot(query, key_tile.T, input_precision=SHAPE.precision)
            grad_weight = tl.dot(grad, value_tile.T, input_precision=SHAPE.precision)
            logits = logits * unit[:, None] + offset[:, None]
            if (at < seen_from) | (at + KEYS > seen_to):  # some row does not see all of the tile
                seen = within(key[None, :], (see_from - at)[:, None], (see_to - see_from)[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            weight = tl.exp2(logits)
            grad_logits = weight * (grad_weight - delta[:, None])
            grad_query = tl.dot(grad_logits.to(operand), key_tile, grad_query, input_precision=SHAPE.precision)
    total = tl.zeros([HEADS * ROWS], tl.float32)  # nothing is to be taken out of the utilities' gradients
    lines = (queries, places, made, start, row, head)
    store_query_gradients(grad_query, norm, total, document, *lines, SHAPE, ROWS, HEADS)

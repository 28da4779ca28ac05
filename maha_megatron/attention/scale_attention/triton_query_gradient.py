"""The first kernel of backward: queries, utilities and the queries' gain; and what the second one reads per row.

With P = exp(s + c_l - LSE) rebuilt from what forward kept, delta = <dO, out> and one softmax over all scales,

    dS_l = P (dO V' - delta)        dc_l = sum_j dS_lj        dq'_l = dS_l K'_l        dq = sum_l Rot_l' dq'_l

One accumulator serves all scales: before each scale it is turned from the last scale's angles to this one's. Turned
queries, which every tile of keys in sight needs again, are written for the second kernel.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    LOG2_E,
    at_lines,
    gained_queries,
    query_norms,
    slots_of_scale,
    tile_ends,
    tile_rows,
    turned_queries,
    utility,
    visible_to_tile,
)
from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    halves,
    joined,
    of_heads,
    rotated,
    turns,
    turns_on,
)
from maha_megatron.attention.triton_slots import visible, window_of, within


@triton.jit
def sum_lines(x, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Sum over the rows of each head: [HEADS * ROWS, channels] -> [HEADS, channels]."""
    return tl.sum(tl.reshape(x, [HEADS, ROWS, x.shape[1]]), 1)


@triton.jit
def store_part(parts, line, n, part, channel, HALF: tl.constexpr, HEADS: tl.constexpr):
    """Some channels of the heads of this program [HEADS, channels], into row `line` of [lines, n, d]."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    tl.store(parts + (line * n + head)[:, None] * (2 * HALF) + channel[None, :], part)


@triton.jit
def turned_on(accumulator, place, places, scale, SHAPE: tl.constexpr):
    """The accumulator, turned from the angles of the scale before to those of this one; at scale 0 from none."""
    turn = turns_on(place, places.frequency, scale, tl.arange(0, SHAPE.half), SHAPE.half, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    first, second = halves(accumulator)
    first, second = rotated(first, second, cosine, sine)
    return joined(first, second)


@triton.jit
def at_turned(turned, head, scale, places, row, channel, SHAPE: tl.constexpr):
    """Pointers [rows, channels] into [n, L, t, d]."""
    WIDTH: tl.constexpr = 2 * SHAPE.half
    line = (head * len(SHAPE.windows) + scale).to(tl.int64) * places.rows + row
    return turned + line[:, None] * WIDTH + channel[None, :]


@triton.jit
def utility_gradient(made, total, head, scale, places, row, SHAPE: tl.constexpr):
    """Gradient of a scale's utility of every line.

    A change of all utilities alike changes nothing: what rounding left in that direction is taken out.
    """
    at, inside = (head * len(SHAPE.windows) + scale) * places.rows + row, row < places.rows
    gradient = tl.load(made.utility_gradients + at, mask=inside, other=0.0)
    return gradient - tl.load(made.shares + at, mask=inside, other=0.0) * total


@triton.jit
def through_gain(
    grad,
    half,
    norm,
    total,
    queries,
    places,
    made,
    start,
    row,
    head,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One half of the gradient of q', utilities added and their parts and the gain's stored: it times the gain, and q
    normalised.
    """
    SCALES: tl.constexpr = len(SHAPE.windows)
    at = half * SHAPE.half + tl.arange(0, SHAPE.half)
    raw_at = at_lines(queries.raw, start, row, head, at)
    raw = tl.load(raw_at, mask=(row < places.rows)[:, None], other=0.0).to(tl.float32)
    normal, tile = raw * norm[:, None], tl.program_id(0)
    if SHAPE.utilities:
        for scale in tl.range(0, SCALES):
            grad_utility = utility_gradient(made, total, head, scale, places, row, SHAPE)[:, None]
            rho_at = queries.rho + scale * queries.n * 2 * SHAPE.half
            grad += grad_utility * of_heads(rho_at, head, at, 2 * SHAPE.half, HEADS)
            part = sum_lines(grad_utility * normal, ROWS, HEADS)
            store_part(made.rho_parts, tile * SCALES + scale, queries.n, part, at, SHAPE.half, HEADS)
    part = sum_lines(grad * normal, ROWS, HEADS)
    store_part(made.gain_parts, tile, queries.n, part, at, SHAPE.half, HEADS)
    return grad * of_heads(queries.gain, head, at, 2 * SHAPE.half, HEADS), normal


@triton.jit
def store_query_gradients(
    accumulator,
    norm,
    total,
    document,
    queries,
    places,
    made,
    start,
    row,
    head,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Back from the last scale's angles, through utilities, gain and normalisation; half by half, as registers want."""
    HALF: tl.constexpr = SHAPE.half
    channel, inside = tl.arange(0, HALF), (row < places.rows)[:, None]
    turn = turns(row - document, places.frequency, len(SHAPE.windows) - 1, channel, HALF, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    first, second = halves(accumulator)
    first, second = rotated(first, second, cosine, -sine)
    scaling: tl.constexpr = (2 * HALF) ** -0.5
    lines = (queries, places, made, start, row, head)
    first, normal_first = through_gain(first * scaling, 0, norm, total, *lines, SHAPE, ROWS, HEADS)
    second, normal_second = through_gain(second * scaling, 1, norm, total, *lines, SHAPE, ROWS, HEADS)
    along = (tl.sum(first * normal_first, 1) + tl.sum(second * normal_second, 1))[:, None] / (2 * HALF)
    to = at_lines(made.grad_q, start, row, head, channel)
    stored = made.grad_q.tensor.dtype.element_ty
    tl.store(to, ((first - normal_first * along) * norm[:, None]).to(stored), mask=inside)
    tl.store(to + HALF, ((second - normal_second * along) * norm[:, None]).to(stored), mask=inside)


@triton.jit
def load_outputs(out, lse, grad_out, queries, places, made, start, row, head, SHAPE: tl.constexpr):
    """Of every line: dO, delta, log-sum-exp and what normalises q; delta and the latter are stored too."""
    channels, inside = tl.arange(0, 2 * SHAPE.half), row < places.rows
    grad = tl.load(at_lines(grad_out, start, row, head, channels), mask=inside[:, None], other=0.0)
    out_at = at_lines(out, start, row, head, channels)
    product = grad.to(tl.float32) * tl.load(out_at, mask=inside[:, None], other=0.0).to(tl.float32)
    delta, norm = tl.sum(product, 1), query_norms(queries, start, row, head, inside, SHAPE)
    tl.store(made.delta + head * places.rows + row, delta, mask=inside)
    tl.store(made.norms + head * places.rows + row, norm, mask=inside)
    return grad, delta, tl.load(lse + head * places.rows + row, mask=inside, other=0.0), norm


@triton.jit
def query_gradient_kernel(
    queries,
    keys,
    places,
    out,  # Rows
    lse,
    grad_out,  # Rows
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
    key, channel, channels = tl.arange(0, KEYS), tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    lines = (queries, places, made, start, row, head)
    grad, delta, own_lse, norm = load_outputs(out, lse, grad_out, *lines, SHAPE)
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    total = tl.zeros([HEADS * ROWS], tl.float32)  # gradient of a change of all utilities alike
    grad_query = tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32)
    for scale in tl.range(0, SCALES):
        see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
        begin, end = visible_to_tile(start, ends, scale, SHAPE)
        first, second = gained_queries(queries, start, row, head, inside & (begin <= end), HALF, HEADS)
        offset = -own_lse
        if SHAPE.utilities:
            offset += utility(first, second, norm, queries, head, scale, HALF, HEADS)
        tl.store(made.offsets + (head * SCALES + scale) * places.rows + row, offset, mask=inside)
        turned_first, turned_second = turned_queries(first, second, row - document, places, scale, operand, SHAPE)
        turned_at = at_turned(made.turned, head, scale, places, row, channel, SHAPE)
        tl.store(turned_at, turned_first, mask=inside[:, None])
        tl.store(turned_at + HALF, turned_second, mask=inside[:, None])
        query = joined(turned_first, turned_second)
        grad_query = turned_on(grad_query, row - document, places, scale, SHAPE)
        key_base, value_base, value_stride = slots_of_scale(keys, group, places, scale, SHAPE)
        value_offset = key[:, None] * value_stride + channels[None, :]
        grad_utility, share = tl.zeros([HEADS * ROWS], tl.float32), tl.zeros([HEADS * ROWS], tl.float32)
        for at in tl.range(begin, end, KEYS):
            real = (key < end - at)[:, None]
            key_at = key_base + at * (2 * HALF) + key[:, None] * (2 * HALF) + channels[None, :]
            key_tile = tl.load(key_at, mask=real, other=0.0)
            value_tile = tl.load(value_base + at * value_stride + value_offset, mask=real, other=0.0)
            logits = tl.dot(query, key_tile.T, input_precision=SHAPE.precision)
            grad_weight = tl.dot(grad, value_tile.T, input_precision=SHAPE.precision)
            seen = within(key[None, :], (see_from - at)[:, None], (see_to - see_from)[:, None])
            weight = tl.exp2(tl.where(seen, logits * unit[:, None] + offset[:, None], float("-inf")))
            grad_logits = weight * (grad_weight - delta[:, None])
            if SHAPE.utilities:
                grad_utility += tl.sum(grad_logits, 1)
                share += tl.sum(weight, 1)
            grad_query = tl.dot(grad_logits.to(operand), key_tile, grad_query, input_precision=SHAPE.precision)
        if SHAPE.utilities:
            summed_at = (head * SCALES + scale) * places.rows + row
            tl.store(made.utility_gradients + summed_at, grad_utility, mask=inside)
            tl.store(made.shares + summed_at, share, mask=inside)
            total += grad_utility
    if SHAPE.utilities:
        tl.debug_barrier()  # what is read now was written above, perhaps by other threads
    store_query_gradients(grad_query, norm, total, document, *lines, SHAPE, ROWS, HEADS)

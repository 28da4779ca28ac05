"""The first kernel of backward: queries, utilities and the queries' gain; and what the second one reads per row.

With P = exp(s + c_l - LSE) rebuilt from what forward kept, delta = <dO, out> and one softmax over all scales,

    dS_l = P (dO V' - delta)        dc_l = sum_j dS_lj        dq'_l = dS_l K'_l        dq = sum_l Rot_l' dq'_l

Where every scale has a softmax of its own, which w_l weighs, P = w_l exp(s - LSE_l), every scale's delta_l = <dO, O_l>
is found by a pass of its own over the scale's keys, and dc_l = w_l (delta_l - <dO, out>).

One accumulator serves all scales: behind each it is turned from the scale's angles to the next one's, behind the last
back to none. Turned queries, which every tile of keys in sight needs again, are written for the second kernel. Where
queries turn alike for every scale, both happen once: queries are turned before the first scale, and the accumulator
back behind the last.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    LOG2_E,
    at_lines,
    load_queries,
    only_seen,
    sight_of_tile,
    slots_of_scale,
    tile_ends,
    tile_rows,
    turned_queries,
    utility,
)
from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    halves,
    inverse_norm,
    joined,
    of_heads,
    rotated,
    turns_on,
)


@triton.jit
def sum_lines(x, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Sum over the rows of each head: [HEADS * ROWS, channels] -> [HEADS, channels]."""
    return tl.sum(tl.reshape(x, [HEADS, ROWS, x.shape[1]]), 1)


@triton.jit
def at_parts(parts, n, head, which, SHAPE: tl.constexpr, HEADS: tl.constexpr):
    """Pointers to channel 0 of what this program's tile has of a head of its own: gain, rho of every scale, or beta."""
    KINDS: tl.constexpr = 2 + SHAPE.branches if SHAPE.utilities else 1
    line = tl.program_id(0) * n + tl.program_id(1) * HEADS + head
    return parts + (line.to(tl.int64) * KINDS + which) * (2 * SHAPE.half)


@triton.jit
def store_turned(first, second, made, line, place, places, scale, inside, SHAPE: tl.constexpr):
    """Turns queries, in halves and times their gain, for a scale, and writes them to lines of [n, L, t, d].

    With one turn they are the same at every scale: lines of [n, 1, t, d].
    """
    operand: tl.constexpr = made.turned.dtype.element_ty
    first, second = turned_queries(first, second, place, places, scale, operand, SHAPE)
    at = made.turned + line[:, None] * (2 * SHAPE.half) + tl.arange(0, SHAPE.half)[None, :]
    tl.store(at, first, mask=inside[:, None])
    tl.store(at + SHAPE.half, second, mask=inside[:, None])
    return first, second


@triton.jit
def load_turned(made, line, inside, SHAPE: tl.constexpr):
    """What `store_turned` wrote."""
    at = made.turned + line[:, None] * (2 * SHAPE.half) + tl.arange(0, 2 * SHAPE.half)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def turn_tile(lines, document, lse, own_lse, line, SHAPE: tl.constexpr, HEADS: tl.constexpr):
    """Writes queries turned for every scale, and utilities minus log-sum-exps; writes and returns 1 / their norms.

    `line`: of every line, where it lies in [n, L, t] for scale 0; a scale is t further.
    """
    queries, places, made, start, row, head = lines
    HALF: tl.constexpr = SHAPE.half
    channel, inside = tl.arange(0, HALF), row < places.rows
    first, second = load_queries(queries, start, row, head, inside, HALF)
    first, second = first.to(tl.float32), second.to(tl.float32)
    norm = inverse_norm(first, second, SHAPE.epsilon, HALF)
    tl.store(made.norms + head * places.rows + row, norm, mask=inside)
    of_all = tl.load(lse + head * places.rows + row, mask=inside, other=0.0)
    first = first * of_heads(queries.gain, head, channel, 2 * HALF, HEADS)
    second = second * of_heads(queries.gain, head, channel + HALF, 2 * HALF, HEADS)
    if SHAPE.one_turn:
        once = head.to(tl.int64) * places.rows + row
        store_turned(first, second, made, once, row - document, places, 0, inside, SHAPE)
    for scale in tl.range(0, len(SHAPE.windows)):
        offset = -of_all
        if SHAPE.utilities:
            offset += utility(first, second, norm, queries, head, scale, HALF, HEADS)
        if SHAPE.apart:
            offset -= tl.load(own_lse + line, mask=inside, other=0.0)
        tl.store(made.offsets + line, offset, mask=inside)
        if not SHAPE.one_turn:
            store_turned(first, second, made, line, row - document, places, scale, inside, SHAPE)
        line += places.rows
    return norm


@triton.jit
def turned_on(accumulator, place, places, scale, SHAPE: tl.constexpr):
    """The accumulator, turned from the angles of a scale to those of the next; of the last one, back to none."""
    SCALES: tl.constexpr = len(SHAPE.windows)
    turn, sign = turns_on(place, places.frequency, scale, tl.arange(0, SHAPE.half), SCALES, SHAPE.half, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    first, second = halves(accumulator)
    first, second = rotated(first, second, cosine, sine * sign)
    return joined(first, second)


@triton.jit
def of_columns(HEADS: tl.constexpr):
    """Scale and head of this program of every column of a table of utilities: 8 scales of each head, 16 at least."""
    column = tl.arange(0, 16 if HEADS <= 2 else 8 * HEADS)
    return column % 8, column // 8


@triton.jit
def utility_gradients(made, total, places, row, SHAPE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Gradient of every scale's utility [lines, columns]; in columns of other heads, 0.

    A change of all utilities alike changes nothing: what rounding left in that direction is taken out.
    """
    SCALES: tl.constexpr = SHAPE.branches
    scale, head = of_columns(HEADS)
    own = (tl.arange(0, HEADS * ROWS) // ROWS)[:, None] == head[None, :]
    own = own & (scale < SCALES)[None, :] & (row < places.rows)[:, None]
    first = (tl.program_id(1) * HEADS * SCALES).to(tl.int64) * places.rows
    at = first + (head * SCALES + scale)[None, :] * places.rows + row[:, None]
    gradient = tl.load(made.utility_gradients + at, mask=own, other=0.0)
    return gradient - tl.load(made.shares + at, mask=own, other=0.0) * total[:, None]


@triton.jit
def through_gain(
    grad,
    half,
    norm,
    grads_utility,
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
    SCALES: tl.constexpr = SHAPE.branches
    at, head_here = half * SHAPE.half + tl.arange(0, SHAPE.half), tl.arange(0, HEADS)
    raw_at = at_lines(queries.raw, start, row, head, at)
    raw = tl.load(raw_at, mask=(row < places.rows)[:, None], other=0.0).to(tl.float32)
    normal = raw * norm[:, None]
    if SHAPE.utilities:
        scale, head_of = of_columns(HEADS)
        real = ((scale < SCALES) & (head_of < HEADS))[:, None]
        of_head = scale * queries.n + tl.program_id(1) * HEADS + head_of
        of_head = of_head[:, None] * (2 * SHAPE.half) + at[None, :]
        rho = tl.load(queries.rho + of_head, mask=real, other=0.0).to(tl.float32)
        grad = tl.dot(grads_utility, rho, grad, input_precision=SHAPE.precision)
        part = tl.dot(grads_utility.T, normal, input_precision=SHAPE.precision)
        rho_at = at_parts(made.learned_parts, queries.n, head_of, 1 + scale, SHAPE, HEADS)
        tl.store(rho_at[:, None] + at[None, :], part, mask=real)
    gain_at = at_parts(made.learned_parts, queries.n, head_here, 0, SHAPE, HEADS)
    tl.store(gain_at[:, None] + at[None, :], sum_lines(grad * normal, ROWS, HEADS))
    return grad * of_heads(queries.gain, head, at, 2 * SHAPE.half, HEADS), normal


@triton.jit
def store_query_gradients(
    accumulator,
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
    """Back through utilities, gain and normalisation; half by half, as registers want."""
    HALF: tl.constexpr = SHAPE.half
    channel, inside = tl.arange(0, HALF), (row < places.rows)[:, None]
    first, second = halves(accumulator)
    scaling: tl.constexpr = (2 * HALF) ** -0.5
    grads_utility = total[:, None]
    if SHAPE.utilities:
        tl.debug_barrier()  # what is read now was written before, perhaps by other threads
        grads_utility = utility_gradients(made, total, places, row, SHAPE, ROWS, HEADS)
        scale, head_of = of_columns(HEADS)
        beta_at = at_parts(made.learned_parts, queries.n, head_of, 1 + SHAPE.branches, SHAPE, HEADS) + scale
        tl.store(beta_at, tl.sum(grads_utility, 0), mask=(scale < SHAPE.branches) & (head_of < HEADS))
    lines = (queries, places, made, start, row, head)
    first, normal_first = through_gain(first * scaling, 0, norm, grads_utility, *lines, SHAPE, ROWS, HEADS)
    second, normal_second = through_gain(second * scaling, 1, norm, grads_utility, *lines, SHAPE, ROWS, HEADS)
    along = (tl.sum(first * normal_first, 1) + tl.sum(second * normal_second, 1))[:, None] / (2 * HALF)
    to = at_lines(made.grad_q, start, row, head, channel)
    stored = made.grad_q.tensor.dtype.element_ty
    tl.store(to, ((first - normal_first * along) * norm[:, None]).to(stored), mask=inside)
    tl.store(to + HALF, ((second - normal_second * along) * norm[:, None]).to(stored), mask=inside)


@triton.jit
def load_outputs(out, grad_out, places, made, start, row, head, SHAPE: tl.constexpr):
    """Of every line: dO and delta, which is stored too where all scales share it."""
    channels, inside = tl.arange(0, 2 * SHAPE.half), row < places.rows
    grad = tl.load(at_lines(grad_out, start, row, head, channels), mask=inside[:, None], other=0.0)
    out_at = at_lines(out, start, row, head, channels)
    product = grad.to(tl.float32) * tl.load(out_at, mask=inside[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(product, 1)
    if not SHAPE.apart:
        tl.store(made.delta + head * places.rows + row, delta, mask=inside)
    return grad, delta


@triton.jit
def weights_of_tile(query, grad, offset, unit, sight, slots, at, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """P and dP [lines, keys] of the keys from slot `at` on, and those keys; `slots`: as slots_of_scale gives them."""
    WIDTH: tl.constexpr = 2 * SHAPE.half
    key, channels = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    key_base, value_base, value_stride = slots
    real = (key < sight[3] - at)[:, None]
    key_at = key_base + at * WIDTH + key[:, None] * WIDTH + channels[None, :]
    value_at = value_base + at * value_stride + (key[:, None] * value_stride + channels[None, :])
    key_tile, value_tile = tl.load(key_at, mask=real, other=0.0), tl.load(value_at, mask=real, other=0.0)
    logits = tl.dot(query, key_tile.T, input_precision=SHAPE.precision)
    grad_weight = tl.dot(grad, value_tile.T, input_precision=SHAPE.precision)
    weight = tl.exp2(only_seen(logits * unit[:, None] + offset[:, None], key, at, sight, KEYS))
    return weight, grad_weight, key_tile


@triton.jit
def own_delta(query, grad, offset, unit, sight, keys, group, places, scale, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """<dO, O_l> of every line, by the scale's own softmax; `offset`: -LSE_l in units of log 2."""
    slots = slots_of_scale(keys, group, places, scale, SHAPE)
    delta = tl.zeros_like(offset)
    for at in tl.range(sight[2], sight[3], KEYS):
        weight, grad_weight, _ = weights_of_tile(query, grad, offset, unit, sight, slots, at, SHAPE, KEYS)
        delta += tl.sum(weight * grad_weight, 1)
    return delta


@triton.jit
def add_query_gradient(
    grad_query,
    query,
    grad,
    delta,
    offset,
    unit,
    sight,
    keys,
    group,
    places,
    scale,
    SHAPE: tl.constexpr,
    KEYS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """What one scale's keys ask of turned queries; with SUMS, also the sums of dS and of P of every line."""
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    slots = slots_of_scale(keys, group, places, scale, SHAPE)
    of_logits, of_weights = tl.zeros_like(delta), tl.zeros_like(delta)
    for at in tl.range(sight[2], sight[3], KEYS):
        weight, grad_weight, key_tile = weights_of_tile(query, grad, offset, unit, sight, slots, at, SHAPE, KEYS)
        grad_logits = weight * (grad_weight - delta[:, None])
        if SUMS:
            of_logits += tl.sum(grad_logits, 1)
            of_weights += tl.sum(weight, 1)
        grad_query = tl.dot(grad_logits.to(operand), key_tile, grad_query, input_precision=SHAPE.precision)
    return grad_query, of_logits, of_weights


@triton.jit
def opened_utilities(made, head, group, row, inside, at_branch, places, SHAPE: tl.constexpr):
    """Of every line, the gradient of the opened keys' utility, which is stored, as is their part of the softmax."""
    opened = made.opened
    total, weight = tl.zeros([row.shape[0]], tl.float32), tl.zeros([row.shape[0]], tl.float32)
    of_group, of_head = (group * places.rows).to(tl.int64) + row, (head * places.rows).to(tl.int64) + row
    for place in tl.range(0, SHAPE.blocks):
        chosen = tl.load(opened.chosen + of_group * SHAPE.blocks + place, mask=inside, other=-1)
        at = of_head * SHAPE.blocks + place
        total += tl.load(opened.utility_gradients + at, mask=chosen >= 0, other=0.0)
        weight += tl.load(opened.shares + at, mask=chosen >= 0, other=0.0)
    tl.store(made.utility_gradients + at_branch, total, mask=inside)
    tl.store(made.shares + at_branch, weight, mask=inside)
    return total


@triton.jit
def add_opened(grad_query, opened, head, group, row, inside, places, SHAPE: tl.constexpr):
    """What opened blocks ask of queries turned for to_scale."""
    channels = tl.arange(0, 2 * SHAPE.half)
    of_group, of_head = (group * places.rows).to(tl.int64) + row, (head * places.rows).to(tl.int64) + row
    for place in tl.range(0, SHAPE.blocks):
        chosen = tl.load(opened.chosen + of_group * SHAPE.blocks + place, mask=inside, other=-1)
        at = opened.turned + ((of_head * SHAPE.blocks + place) * (2 * SHAPE.half))[:, None] + channels[None, :]
        grad_query += tl.load(at, mask=(chosen >= 0)[:, None], other=0.0).to(tl.float32)
    return grad_query


@triton.jit
def query_gradient_kernel(
    queries,
    keys,
    places,
    out,  # Rows
    lse,
    own_lse,  # as of attend_kernel
    grad_out,  # Rows
    made,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    SCALES: tl.constexpr = len(SHAPE.windows)
    start, row, document, head, group = tile_rows(queries, places, ROWS, HEADS)
    ends, inside = tile_ends(start, places, ROWS), row < places.rows
    lines = (queries, places, made, start, row, head)
    first_line = (head * SCALES).to(tl.int64) * places.rows + row
    first_branch = (head * SHAPE.branches).to(tl.int64) * places.rows + row
    norm = turn_tile(lines, document, lse, own_lse, first_line, SHAPE, HEADS)
    tl.debug_barrier()  # what one thread wrote, others read
    grad, delta = load_outputs(out, grad_out, places, made, start, row, head, SHAPE)
    unit = norm * (LOG2_E / (2 * SHAPE.half) ** 0.5)
    total = tl.zeros([HEADS * ROWS], tl.float32)  # gradient of a change of all utilities alike
    if SHAPE.blocks > 0:
        total = opened_utilities(made, head, group, row, inside, first_branch + SCALES * places.rows, places, SHAPE)
    grad_query = tl.zeros([HEADS * ROWS, 2 * SHAPE.half], tl.float32)
    if SHAPE.one_turn:
        query = load_turned(made, head.to(tl.int64) * places.rows + row, inside, SHAPE)
        if SHAPE.blocks > 0:
            grad_query = add_opened(grad_query, made.opened, head, group, row, inside, places, SHAPE)
    for scale in tl.range(0, SCALES):
        sight = sight_of_tile(start, ends, row, document, scale, SHAPE)
        at_scale = first_line + scale * places.rows
        offset = tl.load(made.offsets + at_scale, mask=inside, other=0.0)
        if not SHAPE.one_turn:
            query = load_turned(made, at_scale, inside, SHAPE)
            if SHAPE.blocks > 0 and scale == SHAPE.to_scale:
                grad_query = add_opened(grad_query, made.opened, head, group, row, inside, places, SHAPE)
        of_tiles, delta_here = (offset, unit, sight, keys, group, places, scale), delta
        if SHAPE.apart:
            own = tl.load(own_lse + at_scale, mask=inside, other=0.0)
            delta_here = own_delta(query, grad, -own, unit, sight, keys, group, places, scale, SHAPE, KEYS)
            tl.store(made.delta + at_scale, delta_here, mask=inside)
        with_sums: tl.constexpr = SHAPE.utilities and not SHAPE.apart
        of_rows = (grad_query, query, grad, delta_here)
        grad_query, grad_utility, share = add_query_gradient(*of_rows, *of_tiles, SHAPE, KEYS, with_sums)
        if not SHAPE.one_turn or scale == SCALES - 1:
            grad_query = turned_on(grad_query, row - document, places, scale, SHAPE)
        if SHAPE.apart:
            share = tl.where(sight[0] < sight[1], tl.exp2(offset + own), 0.0)
            grad_utility = share * (delta_here - delta)
        if SHAPE.utilities:
            at_branch = first_branch + scale * places.rows
            tl.store(made.utility_gradients + at_branch, grad_utility, mask=inside)
            tl.store(made.shares + at_branch, share, mask=inside)
            total += grad_utility
    store_query_gradients(grad_query, norm, total, *lines, SHAPE, ROWS, HEADS)

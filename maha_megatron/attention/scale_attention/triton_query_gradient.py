"""The first kernel of backward: queries, utilities and the queries' gain; and what the second one reads per row.

With P = exp(s + c_l - LSE) rebuilt from what forward kept, delta = <dO, out> and one softmax over all scales,

    dS_l = P (dO V' - delta)        dc_l = sum_j dS_lj        dq'_l = dS_l K'_l        dq = sum_l Rot_l' dq'_l

One accumulator serves all scales: before each scale it is turned from the last scale's angles to this one's.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    LOG2_E,
    at_lines,
    load_queries,
    tile_rows,
    utility,
)
from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    entries_before,
    halves,
    inverse_norm,
    joined,
    of_heads,
    pick,
    rotated,
    turns,
    visible,
    within,
)


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
def column(table, index, COLUMNS: tl.constexpr):
    """Column `index` of [lines, COLUMNS]."""
    return tl.sum(tl.where((tl.arange(0, COLUMNS) == index)[None, :], table, 0.0), 1)


@triton.jit
def query_gradient_kernel(
    q,
    q_strides,
    keys,
    values,
    value_strides,
    document_start,
    frequency,
    query_gain,
    rho,
    beta,
    out,
    lse,
    grad_out,
    grad_out_strides,
    grad_q,  # [t, n, d]
    delta,  # [n, t]
    norms,  # [n, t], 1 / root mean square of the raw queries
    offsets,  # [n, L, t], c_l - LSE in units of log 2
    gain_parts,  # [tiles, n, d]
    rho_parts,  # [tiles, L, n, d], before the gain
    beta_parts,  # [tiles, L, n]
    rows,
    total,
    n,
    n_per_group,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    PASTS: tl.constexpr,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
    FAST: tl.constexpr,
    UTILITIES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    SCALES: tl.constexpr = len(WINDOWS)
    start, row, head, group = tile_rows(n_per_group, ROWS, HEADS)
    channel, channels = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    operand = keys.dtype.element_ty
    key = tl.arange(0, KEYS)
    key_offset = key[:, None] * (2 * HALF) + channels[None, :]
    inside = row < rows
    document = tl.load(document_start + tl.minimum(row, rows - 1)).to(tl.int32)
    last_row = tl.minimum(start + ROWS, rows) - 1
    first_document = tl.load(document_start + start).to(tl.int32)
    last_document = tl.load(document_start + last_row).to(tl.int32)

    raw_first, raw_second = load_queries(q, start, row, head, inside[:, None], q_strides, channel, HALF)
    norm = inverse_norm(raw_first.to(tl.float32), raw_second.to(tl.float32), EPSILON, HALF)
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    grad_at = at_lines(grad_out, start, row, head, grad_out_strides[0], grad_out_strides[1], channels)
    grad = tl.load(grad_at, mask=inside[:, None], other=0.0)
    out_at = at_lines(out, start, row, head, n * 2 * HALF, 2 * HALF, channels)
    product = grad.to(tl.float32) * tl.load(out_at, mask=inside[:, None], other=0.0).to(tl.float32)
    own_delta = tl.sum(product, 1)
    own_lse = tl.load(lse + head * rows + row, mask=inside, other=0.0)
    tl.store(delta + head * rows + row, own_delta, mask=inside)
    tl.store(norms + head * rows + row, norm, mask=inside)

    columns = tl.arange(0, 8)
    utility_table = tl.zeros([HEADS * ROWS, 8], tl.float32)  # gradient of every scale's utility, and its weight
    weight_table = tl.zeros([HEADS * ROWS, 8], tl.float32)
    grad_query = tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32)

    for scale in tl.range(0, SCALES, flatten=FLATTEN):
        window = pick(WINDOWS, scale)
        see_from, see_to = visible(row, document, window, RATIO, scale)
        begin, _ = visible(start, first_document, window, RATIO, scale)
        _, end = visible(last_row, last_document, window, RATIO, scale)

        # read again, from a cache: they would not fit into the registers
        there = inside[:, None] & (begin <= end)
        raw_first, raw_second = load_queries(q, start, row, head, there, q_strides, channel, HALF)
        first = raw_first.to(tl.float32) * of_heads(query_gain, head, channel, 2 * HALF, HEADS)
        second = raw_second.to(tl.float32) * of_heads(query_gain, head, channel + HALF, 2 * HALF, HEADS)
        offset = -own_lse
        if UTILITIES:
            offset += utility(first, second, norm, rho, beta, head, scale, n, channel, HALF, HEADS) * LOG2_E
        tl.store(offsets + (head * SCALES + scale) * rows + row, offset, mask=inside)
        turn = turns(row - document, frequency, scale, channel, HALF, FAST)
        cosine, sine = cosine_sine(turn, FAST)
        first, second = rotated(first, second, cosine, sine)
        query = joined(first.to(operand), second.to(operand))
        before = turns(tl.where(scale > 0, row - document, 0), frequency, tl.maximum(scale - 1, 0), channel, HALF, FAST)
        cosine, sine = cosine_sine(turn - before, FAST)
        first, second = halves(grad_query)
        first, second = rotated(first, second, cosine, sine)
        grad_query = joined(first, second)

        past = pick(PASTS, scale)
        key_base = keys + (group.to(tl.int64) * total + entries_before(scale, rows, RATIO, PASTS) + past) * 2 * HALF
        value_stride = pick(value_strides[0], scale).to(tl.int64)
        value_base = pick(values, scale) + group * pick(value_strides[1], scale) + past * value_stride
        value_offset = key[:, None] * value_stride + channels[None, :]
        grad_utility = tl.zeros([HEADS * ROWS], tl.float32)
        share = tl.zeros([HEADS * ROWS], tl.float32)
        for at in tl.range(begin, end, KEYS):
            real = (key < end - at)[:, None]
            key_tile = tl.load(key_base + at * (2 * HALF) + key_offset, mask=real, other=0.0)
            value_tile = tl.load(value_base + at * value_stride + value_offset, mask=real, other=0.0)
            logits = tl.dot(query, key_tile.T, input_precision=PRECISION)
            grad_weight = tl.dot(grad, value_tile.T, input_precision=PRECISION)
            seen = within(key[None, :], (see_from - at)[:, None], (see_to - see_from)[:, None])
            weight = tl.exp2(tl.where(seen, logits * unit[:, None] + offset[:, None], float("-inf")))
            grad_logits = weight * (grad_weight - own_delta[:, None])
            if UTILITIES:
                grad_utility += tl.sum(grad_logits, 1)
                share += tl.sum(weight, 1)
            grad_query = tl.dot(grad_logits.to(operand), key_tile, grad_query, input_precision=PRECISION)
        if UTILITIES:
            utility_table = tl.where((columns == scale)[None, :], grad_utility[:, None], utility_table)
            weight_table = tl.where((columns == scale)[None, :], share[:, None], weight_table)

    cosine, sine = cosine_sine(turns(row - document, frequency, SCALES - 1, channel, HALF, FAST), FAST)
    grad_first, grad_second = halves(grad_query)
    grad_first, grad_second = rotated(grad_first, grad_second, cosine, -sine)
    grad_first *= (2 * HALF) ** -0.5
    grad_second *= (2 * HALF) ** -0.5

    if UTILITIES:
        # a change of all utilities alike changes nothing: take out what rounding left in that direction
        utility_table -= weight_table * tl.sum(utility_table, 1)[:, None]
        for scale in tl.range(0, SCALES):
            line = (tl.program_id(0) * SCALES + scale) * n + tl.program_id(1) * HEADS + tl.arange(0, HEADS)
            beta_part = tl.sum(tl.reshape(column(utility_table, scale, 8), [HEADS, ROWS]), 1)
            tl.store(beta_parts + line, beta_part)
    # half by half, as the registers want it
    for half in tl.static_range(2):
        at = half * HALF + channel
        raw = tl.load(
            at_lines(q, start, row, head, q_strides[0], q_strides[1], at), mask=inside[:, None], other=0.0
        ).to(tl.float32)
        unit_half = raw * norm[:, None]
        grad_half = grad_first if half == 0 else grad_second
        if UTILITIES:
            for scale in tl.range(0, SCALES):
                grad_utility = column(utility_table, scale, 8)[:, None]
                grad_half += grad_utility * of_heads(rho + scale * n * 2 * HALF, head, at, 2 * HALF, HEADS)
                part = sum_lines(grad_utility * unit_half, ROWS, HEADS)
                store_part(rho_parts, tl.program_id(0) * SCALES + scale, n, part, at, HALF, HEADS)
        store_part(gain_parts, tl.program_id(0), n, sum_lines(grad_half * unit_half, ROWS, HEADS), at, HALF, HEADS)
        grad_half *= of_heads(query_gain, head, at, 2 * HALF, HEADS)
        if half == 0:
            unit_first, grad_first = unit_half, grad_half
        else:
            unit_second, grad_second = unit_half, grad_half
    along = (tl.sum(grad_first * unit_first, 1) + tl.sum(grad_second * unit_second, 1))[:, None] / (2 * HALF)
    to = at_lines(grad_q, start, row, head, n * 2 * HALF, 2 * HALF, channel)
    grad_first = (grad_first - unit_first * along) * norm[:, None]
    grad_second = (grad_second - unit_second * along) * norm[:, None]
    tl.store(to, grad_first.to(grad_q.dtype.element_ty), mask=inside[:, None])
    tl.store(to + HALF, grad_second.to(grad_q.dtype.element_ty), mask=inside[:, None])

"""The forward kernel: one softmax over the visible keys of all scales, scale l's logits raised by its utility c_l.

One program per tile of rows and query head (or per tile of rows and several heads of one KV group, which then read a
tile of keys and values once). It goes over the scales and, in each, over the tiles of keys that its rows can see:

    scale 0    [k k k]         queries rotated for scale 0, logits + c_0
    scale 1    [k k]           queries rotated for scale 1, logits + c_1       one running maximum, one sum,
    scale 2    [k k]           ...                                             one accumulator [rows, d]
    scale 3    [k]

Logits and maxima are in units of log 2. Channels are read in halves, (i) and (i + d/2), so that pairs stay in place:
logits are the sum of two products.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    entries_before,
    inverse_norm,
    joined,
    of_heads,
    pick,
    rotated,
    turns,
    visible,
    within,
)

LOG2_E = tl.constexpr(1.4426950408889634)
FARTHEST = tl.constexpr(-1e30)  # below every logit, and finite: a row that has seen nothing yet has no NaN


@triton.jit
def tile_rows(n_per_group, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Of a program (tile, heads): first row, rows and heads of its lines, and its KV group.

    HEADS * ROWS lines, head after head; with one head, `head` is a number.
    """
    start = tl.program_id(0) * ROWS
    line = tl.arange(0, HEADS * ROWS)
    head = tl.program_id(1) * HEADS
    group = head // n_per_group
    if HEADS > 1:
        head = head + line // ROWS
    return start, start + line % ROWS, head, group


@triton.jit
def at_lines(pointer, start, row, head, stride_row, stride_head, channel):
    """Pointers [lines, channels] into [t, heads, channels]."""
    line = (row - start) * stride_row + head * stride_head
    return pointer + start.to(tl.int64) * stride_row + line[:, None] + channel[None, :]


@triton.jit
def load_queries(q, start, row, head, inside, strides, channel, HALF: tl.constexpr):
    """Raw queries in two halves, as stored."""
    at = at_lines(q, start, row, head, strides[0], strides[1], channel)
    return tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)


@triton.jit
def utility(first, second, norm, rho, beta, head, scale, n, channel, HALF: tl.constexpr, HEADS: tl.constexpr):
    """<rho_l, q> + beta_l of every line; halves of q times its gain, and what normalises it."""
    at = rho + scale * n * 2 * HALF
    learned = tl.sum(first * of_heads(at, head, channel, 2 * HALF, HEADS), 1)
    learned += tl.sum(second * of_heads(at, head, channel + HALF, 2 * HALF, HEADS), 1)
    return learned * norm + tl.load(beta + scale * n + head).to(tl.float32)


@triton.jit
def attend_kernel(
    q,
    q_strides,
    keys,  # prepared, [g, total, d]
    values,  # tuple of L tensors [entries, g, d]
    value_strides,  # tuple of their (entry, group) strides
    document_start,
    frequency,
    query_gain,
    rho,
    beta,
    out,  # [t, n, d]
    lse,  # [n, t], of the one softmax, in units of log 2
    scale_lse,  # [t, n, L], of every scale, utilities included
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
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
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
    # queries are rotated as they are, and logits normalised: a factor for each row, in units of log 2
    unit = norm * (LOG2_E / (2 * HALF) ** 0.5)
    top = tl.full([HEADS * ROWS], FARTHEST, tl.float32)
    mass = tl.zeros([HEADS * ROWS], tl.float32)
    fused = tl.zeros([HEADS * ROWS, 2 * HALF], tl.float32)

    for scale in tl.range(0, len(WINDOWS), flatten=FLATTEN):
        window = pick(WINDOWS, scale)
        see_from, see_to = visible(row, document, window, RATIO, scale)
        begin, _ = visible(start, first_document, window, RATIO, scale)
        _, end = visible(last_row, last_document, window, RATIO, scale)

        # read again, from a cache: held in registers, they would cost a program per multiprocessor
        there = inside[:, None] & (begin <= end)
        raw_first, raw_second = load_queries(q, start, row, head, there, q_strides, channel, HALF)
        first = raw_first.to(tl.float32) * of_heads(query_gain, head, channel, 2 * HALF, HEADS)
        second = raw_second.to(tl.float32) * of_heads(query_gain, head, channel + HALF, 2 * HALF, HEADS)
        raised = tl.zeros([HEADS * ROWS], tl.float32)
        if UTILITIES:
            raised = utility(first, second, norm, rho, beta, head, scale, n, channel, HALF, HEADS) * LOG2_E
        cosine, sine = cosine_sine(turns(row - document, frequency, scale, channel, HALF, FAST), FAST)
        first, second = rotated(first, second, cosine, sine)
        query = joined(first.to(operand), second.to(operand))

        past = pick(PASTS, scale)
        key_base = keys + (group.to(tl.int64) * total + entries_before(scale, rows, RATIO, PASTS) + past) * 2 * HALF
        value_stride = pick(value_strides[0], scale).to(tl.int64)
        value_base = pick(values, scale) + group * pick(value_strides[1], scale) + past * value_stride
        value_offset = key[:, None] * value_stride + channels[None, :]
        part = tl.zeros([HEADS * ROWS], tl.float32)
        for at in tl.range(begin, end, KEYS):
            real = (key < end - at)[:, None]
            key_tile = tl.load(key_base + at * (2 * HALF) + key_offset, mask=real, other=0.0)
            logits = tl.dot(query, key_tile.T, input_precision=PRECISION)
            seen = within(key[None, :], (see_from - at)[:, None], (see_to - see_from)[:, None])
            logits = tl.where(seen, logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1) * unit + raised)
            weight = tl.exp2(logits * unit[:, None] + (raised - higher)[:, None])
            shrink = tl.exp2(top - higher)
            added = tl.sum(weight, 1)
            mass = mass * shrink + added
            if PARTS:
                part = part * shrink + added
            value_tile = tl.load(value_base + at * value_stride + value_offset, mask=real, other=0.0)
            fused = tl.dot(weight.to(operand), value_tile, fused * shrink[:, None], input_precision=PRECISION)
            top = higher
        if PARTS:
            at_part = scale_lse + (row.to(tl.int64) * n + head) * len(WINDOWS) + scale
            tl.store(
                at_part, tl.where(part > 0, top + tl.log2(tl.where(part > 0, part, 1.0)), float("-inf")), mask=inside
            )

    mass = tl.where(inside, mass, 1.0)
    out_at = at_lines(out, start, row, head, n * 2 * HALF, 2 * HALF, channels)
    tl.store(out_at, (fused / mass[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * rows + row, top + tl.log2(mass), mask=inside)

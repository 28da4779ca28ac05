"""The second kernel of backward: keys and values of every scale, and the keys' gain, without atomics.

One program per tile of keys of one scale and KV group. It goes over the query heads of the group and the rows that can
see the tile, adds up dV = P' dO and dK' = dS' q', and takes the latter back through rotation, gain and normalisation.
By the two facts of slots.py, rows that see slots s0 ... s1-1 of a scale lie in

    s0 R ... (s1 + w) R - 2        and, as first slots never fall, before the first row whose first slot is past them

of which the second bound is read off a sample of rows, so that it is at most one step of the sample too late.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import LOG2_E
from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    entries_before,
    halves,
    inverse_norm,
    joined,
    pick,
    rotated,
    slot_count,
    stride_of,
    turns,
    visible,
    within,
)
from maha_megatron.attention.scale_attention.triton_keys import locate_tile, places_of

SAMPLE = tl.constexpr(256)


@triton.jit
def seeing_rows(slot, end, window, document_start, rows, RATIO: tl.constexpr, scale):
    """A range of rows that holds all that see slots `slot` ... end-1."""
    stride = stride_of(RATIO, scale)
    begin = tl.minimum(tl.maximum(slot, 0) * stride, rows)
    # no row sees more than all slots: a longer window must not overflow
    stop = tl.minimum((end + tl.minimum(window, rows // stride + 1)).to(tl.int64) * stride - 1, rows).to(tl.int32)
    step = tl.cdiv(tl.maximum(stop - begin, 1), SAMPLE)
    row = begin + tl.arange(0, SAMPLE) * step
    document = tl.load(document_start + tl.minimum(row, rows - 1)).to(tl.int32)
    first, _ = visible(row, document, window, RATIO, scale)
    count = tl.sum(((row < stop) & (first < end)).to(tl.int32))
    return begin, tl.minimum(begin + count * step, stop)


@triton.jit
def key_gradient_kernel(
    q,
    q_strides,
    keys,
    values,
    value_strides,
    raw_keys,
    raw_key_strides,
    document_start,
    frequency,
    query_gain,
    key_gain,
    grad_out,
    grad_out_strides,
    delta,
    norms,
    offsets,
    grad_keys,  # tuple of L tensors [entries, g, d]
    grad_values,
    grad_strides,  # tuple of the (entry, group) strides of both
    gain_parts,  # [tiles, g, d]
    rows,
    total,
    n_per_group,
    RATIO: tl.constexpr,
    WINDOWS: tl.constexpr,
    PASTS: tl.constexpr,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    SCALES: tl.constexpr = len(WINDOWS)
    scale, tile = locate_tile(tl.program_id(0), rows, KEYS, RATIO, PASTS)
    group = tl.program_id(1)
    channel, channels = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    operand = keys.dtype.element_ty
    unit: tl.constexpr = LOG2_E / (2 * HALF) ** 0.5
    past, window = pick(PASTS, scale), pick(WINDOWS, scale)
    entries = past + slot_count(rows, RATIO, scale)
    entry = tile * KEYS + tl.arange(0, KEYS)
    inside = (entry < entries)[:, None]
    slot = entry - past
    begin, stop = seeing_rows(
        tile * KEYS - past, tl.minimum(tile * KEYS + KEYS, entries) - past, window, document_start, rows, RATIO, scale
    )

    key_base = keys + (group.to(tl.int64) * total + entries_before(scale, rows, RATIO, PASTS)) * 2 * HALF
    key_tile = tl.load(key_base + entry[:, None] * (2 * HALF) + channels[None, :], mask=inside, other=0.0)
    value_stride = pick(value_strides[0], scale)
    value_at = pick(values, scale) + group * pick(value_strides[1], scale)
    value_at += entry.to(tl.int64)[:, None] * value_stride + channels[None, :]
    value_tile = tl.load(value_at, mask=inside, other=0.0)

    grad_value = tl.zeros([KEYS, 2 * HALF], tl.float32)
    grad_key = tl.zeros([KEYS, 2 * HALF], tl.float32)
    for head in tl.range(group * n_per_group, (group + 1) * n_per_group, flatten=FLATTEN):
        gain_first = tl.load(query_gain + head * 2 * HALF + channel)[None, :].to(tl.float32)
        gain_second = tl.load(query_gain + head * 2 * HALF + HALF + channel)[None, :].to(tl.float32)
        for at in tl.range(begin, stop, ROWS):
            row = at + tl.arange(0, ROWS)
            real = row < rows
            document = tl.load(document_start + row, mask=real, other=0).to(tl.int32)
            see_from, see_to = visible(row, document, window, RATIO, scale)
            see_to = tl.where(real, see_to, see_from)

            q_at = q + head * q_strides[1] + row.to(tl.int64)[:, None] * q_strides[0] + channel[None, :]
            first = tl.load(q_at, mask=real[:, None], other=0.0).to(tl.float32)
            second = tl.load(q_at + HALF, mask=real[:, None], other=0.0).to(tl.float32)
            norm = tl.load(norms + head * rows + row, mask=real, other=0.0)
            cosine, sine = cosine_sine(turns(row - document, frequency, scale, channel, HALF, FAST), FAST)
            first, second = rotated(first * gain_first, second * gain_second, cosine, sine)
            query = joined(first.to(operand), second.to(operand))

            logits = tl.dot(key_tile, query.T, input_precision=PRECISION)
            offset = tl.load(offsets + (head * SCALES + scale) * rows + row, mask=real, other=0.0)
            seen = within(slot[:, None], see_from[None, :], (see_to - see_from)[None, :])
            weight = tl.exp2(tl.where(seen, logits * (norm * unit)[None, :] + offset[None, :], float("-inf")))
            grad_at = grad_out + head * grad_out_strides[1] + channels[None, :]
            grad = tl.load(grad_at + row.to(tl.int64)[:, None] * grad_out_strides[0], mask=real[:, None], other=0.0)
            grad_value = tl.dot(weight.to(operand), grad, grad_value, input_precision=PRECISION)
            grad_weight = tl.dot(value_tile, grad.T, input_precision=PRECISION)
            own_delta = tl.load(delta + head * rows + row, mask=real, other=0.0)
            grad_logits = weight * (grad_weight - own_delta[None, :]) * norm[None, :]
            grad_key = tl.dot(grad_logits.to(operand), query, grad_key, input_precision=PRECISION)

    stored = grad_values[0].dtype.element_ty
    grad_stride, grad_group = pick(grad_strides[0], scale), pick(grad_strides[1], scale)
    to = group * grad_group + entry.to(tl.int64)[:, None] * grad_stride
    tl.store(pick(grad_values, scale) + to + channels[None, :], grad_value.to(stored), mask=inside)

    place = places_of(slot, document_start, rows, RATIO, scale)
    cosine, sine = cosine_sine(turns(place, frequency, scale, channel, HALF, FAST), FAST)
    grad_first, grad_second = halves(grad_key)
    grad_first, grad_second = rotated(grad_first, grad_second, cosine, -sine)
    grad_first *= (2 * HALF) ** -0.5
    grad_second *= (2 * HALF) ** -0.5
    raw_at = pick(raw_keys, scale) + group * pick(raw_key_strides[1], scale) + channel[None, :]
    raw_at += entry.to(tl.int64)[:, None] * pick(raw_key_strides[0], scale)
    unit_first = tl.load(raw_at, mask=inside, other=0.0).to(tl.float32)
    unit_second = tl.load(raw_at + HALF, mask=inside, other=0.0).to(tl.float32)
    norm = inverse_norm(unit_first, unit_second, EPSILON, HALF)[:, None]
    unit_first, unit_second = unit_first * norm, unit_second * norm
    part = gain_parts + (tl.program_id(0) * tl.num_programs(1) + group) * 2 * HALF + channel
    tl.store(part, tl.sum(grad_first * unit_first, 0))
    tl.store(part + HALF, tl.sum(grad_second * unit_second, 0))
    grad_first *= tl.load(key_gain + group * 2 * HALF + channel)[None, :].to(tl.float32)
    grad_second *= tl.load(key_gain + group * 2 * HALF + HALF + channel)[None, :].to(tl.float32)
    along = (tl.sum(grad_first * unit_first, 1) + tl.sum(grad_second * unit_second, 1))[:, None] / (2 * HALF)
    key_to = pick(grad_keys, scale) + to + channel[None, :]
    tl.store(key_to, ((grad_first - unit_first * along) * norm).to(stored), mask=inside)
    tl.store(key_to + HALF, ((grad_second - unit_second * along) * norm).to(stored), mask=inside)

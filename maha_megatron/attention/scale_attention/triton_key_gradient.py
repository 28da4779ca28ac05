"""The second kernel of backward: keys and values of every scale, and the keys' gain, without atomics.

One program per tile of keys of one scale and KV group. It goes over the query heads of the group and the rows that can
see the tile, adds up dV = P' dO and dK' = dS' q', and takes the latter back through rotation, gain and normalisation.
By the two facts of slots.py, rows that see slots s0 ... s1-1 of a scale lie in

    s0 R ... (s1 + w) R - 2        and, as first slots never fall, before the first row whose first slot is past them

of which the second bound is read off a sample of rows, so that it is at most one step of the sample too late.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import LOG2_E, turned_queries
from maha_megatron.attention.scale_attention.triton_geometry import halves, rotated
from maha_megatron.attention.scale_attention.triton_keys import (
    at_entries,
    key_angles,
    key_gains,
    locate_tile,
    normal_keys,
)
from maha_megatron.attention.triton_slots import (
    entries_before,
    past_of,
    slot_count,
    stride_of,
    visible,
    window_of,
    within,
)

SAMPLE = tl.constexpr(256)


@triton.jit
def seeing_rows(slot, end, places, scale, SHAPE: tl.constexpr):
    """A range of rows that holds all that see slots `slot` ... end-1."""
    stride, window, rows = stride_of(SHAPE.ratio, scale), window_of(scale, SHAPE), places.rows
    begin = tl.minimum(tl.maximum(slot, 0) * stride, rows)
    # in 64 bits, as a window may be longer than the sequence
    stop = tl.minimum((end.to(tl.int64) + window) * stride - 1, rows).to(tl.int32)
    step = tl.cdiv(tl.maximum(stop - begin, 1), SAMPLE)
    row = begin + tl.arange(0, SAMPLE) * step
    document = tl.load(places.document_start + tl.minimum(row, rows - 1)).to(tl.int32)
    first, _ = visible(row, document, window, SHAPE.ratio, scale)
    count = tl.sum(((row < stop) & (first < end)).to(tl.int32))
    return begin, tl.minimum(begin + count * step, stop)


@triton.jit
def rows_at(at, places, scale, SHAPE: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows from `at` on: row, whether it exists, place in its document, and the slots [first, end) it sees."""
    row = at + tl.arange(0, ROWS)
    real = row < places.rows
    document = tl.load(places.document_start + row, mask=real, other=0).to(tl.int32)
    see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
    return row, real, row - document, see_from, tl.where(real, see_to, see_from)


@triton.jit
def load_rows(rows, row, head, real, channel):
    at = rows.tensor + head * rows.head_stride + row.to(tl.int64)[:, None] * rows.row_stride + channel[None, :]
    return tl.load(at, mask=real[:, None], other=0.0)


@triton.jit
def load_key_tile(keys, entry, group, places, scale, inside, SHAPE: tl.constexpr):
    """Prepared keys and values [entries, d]."""
    channels = tl.arange(0, 2 * SHAPE.half)
    before = entries_before(scale, places.rows, SHAPE) + group.to(tl.int64) * keys.total
    key_at = keys.prepared + (before + entry)[:, None] * (2 * SHAPE.half) + channels[None, :]
    value_at = at_entries(keys.raw_values, entry, group, scale, channels)
    return tl.load(key_at, mask=inside, other=0.0), tl.load(value_at, mask=inside, other=0.0)


@triton.jit
def store_key_gradients(
    accumulator, raw_keys, gain, grad_keys, parts, places, entry, group, scale, inside, SHAPE: tl.constexpr
):
    """dK' back through rotation, gain and normalisation; and the tile's part of the gain's gradient."""
    HALF: tl.constexpr = SHAPE.half
    channel = tl.arange(0, HALF)
    cosine, sine = key_angles(entry - past_of(scale, SHAPE), places, scale, SHAPE)
    first, second = halves(accumulator)
    first, second = rotated(first, second, cosine, -sine)
    first, second = first * (2 * HALF) ** -0.5, second * (2 * HALF) ** -0.5
    normal_first, normal_second, norm = normal_keys(raw_keys, entry, group, scale, inside, SHAPE)
    part = parts + (tl.program_id(0) * tl.num_programs(1) + group) * 2 * HALF + channel
    tl.store(part, tl.sum(first * normal_first, 0))
    tl.store(part + HALF, tl.sum(second * normal_second, 0))
    gain_first, gain_second = key_gains(gain, group, HALF)
    first, second = first * gain_first, second * gain_second
    along = (tl.sum(first * normal_first, 1) + tl.sum(second * normal_second, 1))[:, None] / (2 * HALF)
    stored = grad_keys.tensors[0].dtype.element_ty
    to = at_entries(grad_keys, entry, group, scale, channel)
    tl.store(to, ((first - normal_first * along) * norm).to(stored), mask=inside)
    tl.store(to + HALF, ((second - normal_second * along) * norm).to(stored), mask=inside)


@triton.jit
def key_gradient_kernel(
    queries,
    keys,
    raw_keys,
    key_gain,
    places,
    grad_out,
    made,  # by query_gradient_kernel
    grad_keys,
    grad_values,
    gain_parts,  # [tiles, g, d]
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    HALF: tl.constexpr = SHAPE.half
    SCALES: tl.constexpr = len(SHAPE.windows)
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    unit: tl.constexpr = LOG2_E / (2 * HALF) ** 0.5
    scale, tile = locate_tile(tl.program_id(0), places.rows, KEYS, SHAPE)
    group, past = tl.program_id(1), past_of(scale, SHAPE)
    entries = past + slot_count(places.rows, SHAPE.ratio, scale)
    entry = tile * KEYS + tl.arange(0, KEYS)
    inside, slot = (entry < entries)[:, None], entry - past
    begin, stop = seeing_rows(tile * KEYS - past, tl.minimum(tile * KEYS + KEYS, entries) - past, places, scale, SHAPE)
    key_tile, value_tile = load_key_tile(keys, entry, group, places, scale, inside, SHAPE)
    channel, channels = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    grad_value = tl.zeros([KEYS, 2 * HALF], tl.float32)
    grad_key = tl.zeros([KEYS, 2 * HALF], tl.float32)
    for head in tl.range(group * queries.n_per_group, (group + 1) * queries.n_per_group):
        gain_first, gain_second = key_gains(queries.gain, head, HALF)
        for at in tl.range(begin, stop, ROWS):
            row, real, place, see_from, see_to = rows_at(at, places, scale, SHAPE, ROWS)
            first = load_rows(queries.raw, row, head, real, channel).to(tl.float32) * gain_first
            second = load_rows(queries.raw, row, head, real, channel + HALF).to(tl.float32) * gain_second
            norm = tl.load(made.norms + head * places.rows + row, mask=real, other=0.0)
            query = turned_queries(first, second, place, places, scale, operand, SHAPE)
            logits = tl.dot(key_tile, query.T, input_precision=SHAPE.precision)
            at_offset = made.offsets + (head * SCALES + scale) * places.rows + row
            offset = tl.load(at_offset, mask=real, other=0.0)
            seen = within(slot[:, None], see_from[None, :], (see_to - see_from)[None, :])
            weight = tl.exp2(tl.where(seen, logits * (norm * unit)[None, :] + offset[None, :], float("-inf")))
            grad = load_rows(grad_out, row, head, real, channels)
            grad_value = tl.dot(weight.to(operand), grad, grad_value, input_precision=SHAPE.precision)
            grad_weight = tl.dot(value_tile, grad.T, input_precision=SHAPE.precision)
            delta = tl.load(made.delta + head * places.rows + row, mask=real, other=0.0)
            grad_logits = weight * (grad_weight - delta[None, :]) * norm[None, :]
            grad_key = tl.dot(grad_logits.to(operand), query, grad_key, input_precision=SHAPE.precision)
    to = at_entries(grad_values, entry, group, scale, channels)
    tl.store(to, grad_value.to(grad_values.tensors[0].dtype.element_ty), mask=inside)
    where = (places, entry, group, scale, inside)
    store_key_gradients(grad_key, raw_keys, key_gain, grad_keys, gain_parts, *where, SHAPE)

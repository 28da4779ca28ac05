"""The second kernel of backward: keys and values of every scale, and the keys' gain, without atomics.

One program per tile of keys of one scale and KV group, and part of the rows that can see it. It goes over the query
heads of the group and its rows, and adds up dV = P' dO and dK' = dS' q'. By the two facts of slots.py, rows that see
slots s0 ... s1-1 of a scale lie in

    s0 R ... (s1 + w) R - 2        and, as first slots never fall, before the first row whose first slot is past them

of which the second bound is read off a sample of rows, so that it is at most one step of the sample too late. A tile of
a coarse scale is seen by many rows, R (tile + w); where that is more than one program's span, several programs share
them, and a third kernel adds up what each found, always in the same order. dK' then goes back through rotation, gain
and normalisation.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import LOG2_E
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
    pick,
    slot_count,
    stride_of,
    visible,
    window_of,
    within,
)

SAMPLE = tl.constexpr(256)


@triton.jit
def locate_part(number, rows, parts, TILE: tl.constexpr, SHAPE: tl.constexpr):
    """Of the number of a program: scale, tile, part, and the tile's number over all scales.

    `parts`: how many programs share a tile of each scale. The coarsest scale comes first: what takes longest should
    begin first.
    """
    PASTS: tl.constexpr = SHAPE.past_slots
    scale, tile, part, line, tiles_before = 0, 0, 0, 0, 0
    for i in tl.static_range(len(PASTS) - 1, -1, -1):
        tiles = tl.cdiv(PASTS[i] + slot_count(rows, SHAPE.ratio, i), TILE)
        count = tiles * parts[i]
        inside, at = (number >= 0) & (number < count), number // parts[i]
        scale, tile = tl.where(inside, i, scale), tl.where(inside, at, tile)
        part, line = tl.where(inside, number % parts[i], part), tl.where(inside, tiles_before + at, line)
        number -= count
        tiles_before += tiles
    return scale, tile, part, line


@triton.jit
def first_program(scale, tile, rows, parts, TILE: tl.constexpr, SHAPE: tl.constexpr):
    """What `locate_part` undoes: the number of the first program of a tile, and the tile's over all scales."""
    PASTS: tl.constexpr = SHAPE.past_slots
    first, line = tile * pick(parts, scale), tile
    for i in tl.static_range(len(PASTS)):
        before = tl.where(i > scale, tl.cdiv(PASTS[i] + slot_count(rows, SHAPE.ratio, i), TILE), 0)
        first += before * parts[i]
        line += before
    return first, line


@triton.jit
def seeing_rows(slot, end, sample, places, scale, SHAPE: tl.constexpr):
    """A range of rows that holds all that see slots `slot` ... end-1; `sample`: 0, 1, ..., as many as are looked at."""
    stride, window, rows = stride_of(SHAPE.ratio, scale), window_of(scale, SHAPE), places.rows
    begin = tl.minimum(tl.maximum(slot, 0) * stride, rows)
    # in 64 bits, as a window may be longer than the sequence
    stop = tl.minimum((end.to(tl.int64) + window) * stride - 1, rows).to(tl.int32)
    step = tl.cdiv(tl.maximum(stop - begin, 1), sample.shape[0])
    row = begin + sample * step
    document = tl.load(places.document_start + tl.minimum(row, rows - 1)).to(tl.int32)
    first, _ = visible(row, document, window, SHAPE.ratio, scale)
    count = tl.sum(((row < stop) & (first < end)).to(tl.int32))
    return begin, tl.minimum(begin + count * step, stop)


@triton.jit
def part_of_rows(rows, part, shared_by, ROWS: tl.constexpr):
    """What one of the programs that share a range of rows goes over: as many tiles as the others."""
    begin, stop = rows
    span = tl.cdiv(tl.cdiv(stop - begin, shared_by), ROWS) * ROWS
    return begin + part * span, tl.minimum(begin + part * span + span, stop)


@triton.jit
def rows_at(at, places, scale, SHAPE: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows from `at` on: row, whether it exists, and the slots [first, end) it sees."""
    row = at + tl.arange(0, ROWS)
    real = row < places.rows
    document = tl.load(places.document_start + row, mask=real, other=0).to(tl.int32)
    see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
    return row, real, see_from, tl.where(real, see_to, see_from)


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
    grad_key, grad_value, line, raw_keys, gain, made, places, entry, group, scale, inside, SHAPE: tl.constexpr
):
    """Gradients of a whole tile: dV, dK' back through rotation, gain and normalisation, and the gain's part."""
    HALF: tl.constexpr = SHAPE.half
    channel, channels = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    stored = made.grad_keys.tensors[0].dtype.element_ty
    tl.store(at_entries(made.grad_values, entry, group, scale, channels), grad_value.to(stored), mask=inside)
    cosine, sine = key_angles(entry - past_of(scale, SHAPE), places, scale, SHAPE)
    first, second = halves(grad_key)
    first, second = rotated(first, second, cosine, -sine)
    first, second = first * (2 * HALF) ** -0.5, second * (2 * HALF) ** -0.5
    normal_first, normal_second, norm = normal_keys(raw_keys, entry, group, scale, inside, SHAPE)
    part = made.gain_parts + (line * tl.num_programs(1) + group) * 2 * HALF + channel
    tl.store(part, tl.sum(first * normal_first, 0))
    tl.store(part + HALF, tl.sum(second * normal_second, 0))
    gain_first, gain_second = key_gains(gain, group, HALF)
    first, second = first * gain_first, second * gain_second
    along = (tl.sum(first * normal_first, 1) + tl.sum(second * normal_second, 1))[:, None] / (2 * HALF)
    to = at_entries(made.grad_keys, entry, group, scale, channel)
    tl.store(to, ((first - normal_first * along) * norm).to(stored), mask=inside)
    tl.store(to + HALF, ((second - normal_second * along) * norm).to(stored), mask=inside)


@triton.jit
def sums_at_first(made, entry, group, part, places, scale, inside, SHAPE: tl.constexpr):
    """dK' and dV [entries, d] before any row: 0, and in the first part what opened blocks found."""
    WIDTH: tl.constexpr = 2 * SHAPE.half
    grad_value = tl.zeros([entry.shape[0], WIDTH], tl.float32)
    grad_key = tl.zeros([entry.shape[0], WIDTH], tl.float32)
    if SHAPE.blocks > 0:
        entries = past_of(SHAPE.to_scale, SHAPE) + slot_count(places.rows, SHAPE.ratio, SHAPE.to_scale)
        line = (group * entries).to(tl.int64) + entry
        at = made.opened.grads + line[:, None] * (2 * WIDTH) + tl.arange(0, WIDTH)[None, :]
        added = inside & (scale == SHAPE.to_scale) & (part == 0)
        grad_key = tl.load(at, mask=added, other=0.0)
        grad_value = tl.load(at + WIDTH, mask=added, other=0.0)
    return grad_key, grad_value


@triton.jit
def at_sums(sums, program, group, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [keys, d] to dK' of a program in [programs, g, 2, keys, d]; dV lies KEYS * WIDTH behind."""
    before = (program * tl.num_programs(1) + group).to(tl.int64) * (2 * KEYS * WIDTH)
    return sums + before + tl.arange(0, KEYS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def key_gradient_kernel(
    queries,
    keys,
    raw_keys,
    key_gain,
    places,
    grad_out,  # Rows; with EACH, a head and scale is a head of its own
    found,  # by the first kernel
    made,
    parts,  # of every scale, how many programs share a tile
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EACH: tl.constexpr,  # whether every scale has a dO of its own
):
    HALF: tl.constexpr = SHAPE.half
    SCALES: tl.constexpr = len(SHAPE.windows)
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    unit: tl.constexpr = LOG2_E / (2 * HALF) ** 0.5
    scale, tile, part, line = locate_part(tl.program_id(0), places.rows, parts, KEYS, SHAPE)
    group, past = tl.program_id(1), past_of(scale, SHAPE)
    entries = past + slot_count(places.rows, SHAPE.ratio, scale)
    entry = tile * KEYS + tl.arange(0, KEYS)
    inside, slot = (entry < entries)[:, None], entry - past
    sample, end = tl.arange(0, SAMPLE), tl.minimum(tile * KEYS + KEYS, entries)
    seen_by = seeing_rows(tile * KEYS - past, end - past, sample, places, scale, SHAPE)
    shared_by = pick(parts, scale)
    begin, stop = part_of_rows(seen_by, part, shared_by, ROWS)
    key_tile, value_tile = load_key_tile(keys, entry, group, places, scale, inside, SHAPE)
    channels = tl.arange(0, 2 * HALF)
    grad_key, grad_value = sums_at_first(made, entry, group, part, places, scale, inside, SHAPE)
    for head in tl.range(group * queries.n_per_group, (group + 1) * queries.n_per_group):
        of_scale = (head * SCALES + scale).to(tl.int64) * places.rows
        turned = found.turned + (tl.cast(head, tl.int64) * places.rows if SHAPE.one_turn else of_scale) * (2 * HALF)
        of_output = head * SCALES + scale if EACH else head
        delta_at = found.delta + (of_scale if SHAPE.apart else head * places.rows)
        for at in tl.range(begin, stop, ROWS):
            row, real, see_from, see_to = rows_at(at, places, scale, SHAPE, ROWS)
            query_at = turned + row[:, None] * (2 * HALF) + channels[None, :]
            query = tl.load(query_at, mask=real[:, None], other=0.0)
            logits = tl.dot(key_tile, query.T, input_precision=SHAPE.precision)
            norm = tl.load(found.norms + head * places.rows + row, mask=real, other=0.0)
            offset = tl.load(found.offsets + of_scale + row, mask=real, other=0.0)
            seen = within(slot[:, None], see_from[None, :], (see_to - see_from)[None, :])
            weight = tl.exp2(tl.where(seen, logits * (norm * unit)[None, :] + offset[None, :], float("-inf")))
            grad = load_rows(grad_out, row, of_output, real, channels)
            grad_value = tl.dot(weight.to(operand), grad, grad_value, input_precision=SHAPE.precision)
            grad_weight = tl.dot(value_tile, grad.T, input_precision=SHAPE.precision)
            delta = tl.load(delta_at + row, mask=real, other=0.0)
            grad_logits = weight * (grad_weight - delta[None, :]) * norm[None, :]
            grad_key = tl.dot(grad_logits.to(operand), query, grad_key, input_precision=SHAPE.precision)
    if shared_by > 1:
        sums_at = at_sums(made.sums, tl.program_id(0), group, KEYS, 2 * HALF)
        tl.store(sums_at, grad_key)
        tl.store(sums_at + KEYS * 2 * HALF, grad_value)
    else:
        where = (places, entry, group, scale, inside)
        store_key_gradients(grad_key, grad_value, line, raw_keys, key_gain, made, *where, SHAPE)


@triton.jit
def add_parts_kernel(raw_keys, key_gain, places, made, parts, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """Gradients of the tiles that several programs shared."""
    scale, tile = locate_tile(tl.program_id(0), places.rows, KEYS, SHAPE)
    shared_by = pick(parts, scale)
    if shared_by > 1:
        group, past = tl.program_id(1), past_of(scale, SHAPE)
        entry = tile * KEYS + tl.arange(0, KEYS)
        inside = (entry < past + slot_count(places.rows, SHAPE.ratio, scale))[:, None]
        first, line = first_program(scale, tile, places.rows, parts, KEYS, SHAPE)
        grad_value = tl.zeros([KEYS, 2 * SHAPE.half], tl.float32)
        grad_key = tl.zeros([KEYS, 2 * SHAPE.half], tl.float32)
        for program in tl.range(first, first + shared_by):
            sums_at = at_sums(made.sums, program, group, KEYS, 2 * SHAPE.half)
            grad_key += tl.load(sums_at)
            grad_value += tl.load(sums_at + KEYS * 2 * SHAPE.half)
        where = (places, entry, group, scale, inside)
        store_key_gradients(grad_key, grad_value, line, raw_keys, key_gain, made, *where, SHAPE)

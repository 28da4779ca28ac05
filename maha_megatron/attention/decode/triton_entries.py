"""Attention of the new rows to the entries, split over the entries, and the entries of the next state.

A program of the first kernel has one tile of entries of one scale, one KV group and one stream. It normalises and
rotates the keys, attends with all rows and query heads of the group, and writes the raw entries where the next state
has them. The second kernel joins the tiles of every row and head.

    entries of a scale      e      0 1 2 3 ...       slot e - held          in the next state: entry e - end,
    end = slots that are complete with the last row: how far entries move    where 0 <= e - end < held
"""

import triton
import triton.language as tl

from maha_megatron.attention.decode.triton_step import at_held, at_slots, document_at
from maha_megatron.attention.scale_attention.triton_forward import FARTHEST, LOG2_E
from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, inverse_norm, joined, rotated, turns
from maha_megatron.attention.triton_slots import first_slot, pick, stride_of, visible, within


@triton.jit
def tile_of(number, STEP: tl.constexpr, KEYS: tl.constexpr):
    """Scale, and first entry within it, of one number for all tiles of all scales."""
    HELD: tl.constexpr = STEP.held
    SLOTS: tl.constexpr = STEP.slots
    scale, begin = 0, 0
    for i in tl.static_range(len(HELD)):
        count = tl.cdiv(HELD[i] + SLOTS[i], KEYS)
        here = (number >= 0) & (number < count)
        scale, begin = tl.where(here, i, scale), tl.where(here, number * KEYS, begin)
        number -= count
    return scale, begin


@triton.jit
def keep_entries(new, values, entry, slot, document, stream, scale, kind, group, g, FIRST: tl.constexpr, STEP):
    """Writes raw entries, `values` [entries, channels from FIRST on], where the next state has them."""
    HELD: tl.constexpr = STEP.held
    SLOTS: tl.constexpr = STEP.slots
    held, origin = pick(HELD, scale), first_slot(document, STEP.ratio, scale)
    place = entry - (origin + (STEP.rows - document) // stride_of(STEP.ratio, scale))
    there = (place >= 0) & (place < held) & (entry < held + pick(SLOTS, scale))
    at = at_held(new, stream, place, scale, kind, group, g, STEP)
    to = at[:, None] + FIRST + tl.arange(0, values.shape[1])[None, :]
    tl.store(to, tl.where((slot >= origin)[:, None], values, 0.0), mask=there[:, None])


@triton.jit
def prepared_keys(first, second, slot, starts, learned, group, scale, operand: tl.constexpr, STEP: tl.constexpr):
    """Keys [entries, d] from raw ones in two halves: normalised, times their gain, rotated at their last row."""
    channel = tl.arange(0, STEP.half)
    gain = learned.key_gain + group * (2 * STEP.half) + channel
    first, second = first.to(tl.float32), second.to(tl.float32)
    norm = inverse_norm(first, second, STEP.epsilon, STEP.half)[:, None]
    stride = stride_of(STEP.ratio, scale)
    document = document_at(starts, slot * stride, STEP)
    place = (slot - first_slot(document, STEP.ratio, scale) + 1) * stride - 1
    cosine, sine = cosine_sine(turns(place, learned.frequency, scale, channel, STEP.half, STEP.fast), STEP.fast)
    first = first * norm * tl.load(gain)[None, :].to(tl.float32)
    second = second * norm * tl.load(gain + STEP.half)[None, :].to(tl.float32)
    first, second = rotated(first, second, cosine, sine)
    return joined(first.to(operand), second.to(operand))


@triton.jit
def prepared_queries(queries, line, head, place, learned, n, scale, operand: tl.constexpr, STEP: tl.constexpr):
    """Queries [lines, d] times their gain, rotated for a scale; what their logits are multiplied by, and the utility,
    both in units of log 2.
    """
    channel = tl.arange(0, STEP.half)
    at = line[:, None] * (2 * STEP.half) + channel[None, :]
    of_head = head[:, None] * (2 * STEP.half) + channel[None, :]
    first, second = tl.load(queries + at).to(tl.float32), tl.load(queries + at + STEP.half).to(tl.float32)
    norm = inverse_norm(first, second, STEP.epsilon, STEP.half)
    first *= tl.load(learned.query_gain + of_head).to(tl.float32)
    second *= tl.load(learned.query_gain + of_head + STEP.half).to(tl.float32)
    raised = tl.zeros_like(norm)
    if learned.rho is not None:
        rho = learned.rho + scale * n * (2 * STEP.half) + of_head
        raised = tl.sum(first * tl.load(rho).to(tl.float32), 1)
        raised += tl.sum(second * tl.load(rho + STEP.half).to(tl.float32), 1)
        raised = (raised * norm + tl.load(learned.beta + scale * n + head).to(tl.float32)) * LOG2_E
    cosine, sine = cosine_sine(turns(place, learned.frequency, scale, channel, STEP.half, STEP.fast), STEP.fast)
    first, second = rotated(first, second, cosine, sine)
    return joined(first.to(operand), second.to(operand)), norm * (LOG2_E / (2 * STEP.half) ** 0.5), raised


@triton.jit
def attend_entries_kernel(
    queries,  # [B T, n, d]
    old,
    fresh,
    new,
    learned,
    document_start,
    parts,
    n,
    g,
    STEP: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
):
    operand: tl.constexpr = queries.dtype.element_ty
    number, group, stream = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    scale, begin = tile_of(number, STEP, KEYS)
    starts = document_start + stream * STEP.rows
    WINDOWS: tl.constexpr = STEP.windows
    HELD: tl.constexpr = STEP.held
    SLOTS: tl.constexpr = STEP.slots
    entry = begin + tl.arange(0, KEYS)
    slot, real = entry - pick(HELD, scale), (entry < pick(HELD, scale) + pick(SLOTS, scale))[:, None]
    half, channel = tl.arange(0, STEP.half), tl.arange(0, 2 * STEP.half)
    key_at = at_slots(old.entries, fresh, stream, slot, scale, 0, group, g, STEP)[:, None]
    value_at = at_slots(old.entries, fresh, stream, slot, scale, 1, group, g, STEP)[:, None]
    first = tl.load(key_at + half[None, :], mask=real, other=0.0)
    second = tl.load(key_at + STEP.half + half[None, :], mask=real, other=0.0)
    values = tl.load(value_at + channel[None, :], mask=real, other=0.0)
    last = document_at(starts, STEP.rows - 1, STEP)
    keep_entries(new.entries, first, entry, slot, last, stream, scale, 0, group, g, 0, STEP)
    keep_entries(new.entries, second, entry, slot, last, stream, scale, 0, group, g, STEP.half, STEP)
    keep_entries(new.entries, values, entry, slot, last, stream, scale, 1, group, g, 0, STEP)
    keys = prepared_keys(first, second, slot, starts, learned, group, scale, operand, STEP)

    heads = n // g
    number_of_line = tl.arange(0, LINES)
    inside = number_of_line < STEP.rows * heads
    row, head = tl.minimum(number_of_line // heads, STEP.rows - 1), group * heads + number_of_line % heads
    document = document_at(starts, row, STEP)
    line = (stream * STEP.rows + row) * n + head
    query, unit, raised = prepared_queries(queries, line, head, row - document, learned, n, scale, operand, STEP)
    see_from, see_to = visible(row, document, pick(WINDOWS, scale), STEP.ratio, scale)
    logits = tl.dot(query, keys.T, input_precision=STEP.precision) * unit[:, None] + raised[:, None]
    seen = within(slot[None, :], see_from[:, None], (see_to - see_from)[:, None])
    logits = tl.where(seen, logits, float("-inf"))
    top = tl.maximum(tl.max(logits, 1), FARTHEST)
    weight = tl.exp2(logits - top[:, None])
    summed = tl.dot(weight.to(operand), values, input_precision=STEP.precision)
    part = line.to(tl.int64) * tl.num_programs(0) + number
    tl.store(parts.tops + part, top, mask=inside)
    tl.store(parts.masses + part, tl.sum(weight, 1), mask=inside)
    tl.store(parts.sums + part[:, None] * (2 * STEP.half) + channel[None, :], summed, mask=inside[:, None])


@triton.jit
def join_kernel(
    parts,
    out,  # [B T, n, d]
    weights,  # [B T, n, L], of every scale; or None
    tiles,
    STEP: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
):
    line, number, channel = tl.program_id(0), tl.arange(0, TILES), tl.arange(0, 2 * STEP.half)
    inside, part = number < tiles, line.to(tl.int64) * tiles + number
    tops = tl.load(parts.tops + part, mask=inside, other=FARTHEST)
    share = tl.exp2(tops - tl.max(tops, 0))
    mass = share * tl.load(parts.masses + part, mask=inside, other=0.0)
    sums = tl.load(parts.sums + part[:, None] * (2 * STEP.half) + channel[None, :], mask=inside[:, None], other=0.0)
    whole = tl.sum(mass, 0)
    result = tl.sum(sums * share[:, None], 0) / whole
    tl.store(out + line.to(tl.int64) * (2 * STEP.half) + channel, result.to(out.dtype.element_ty))
    if weights is not None:
        scale_of_tile, _begin = tile_of(number, STEP, KEYS)
        for scale in tl.static_range(len(STEP.windows)):
            of_scale = tl.sum(tl.where(inside & (scale_of_tile == scale), mass, 0.0), 0)
            tl.store(weights + line.to(tl.int64) * len(STEP.windows) + scale, of_scale / whole)

"""Keys of every scale as the logits read them: normalised, times their gain, rotated at the place of their last row.

One launch writes all scales into one buffer [g, entries of scale 0, of scale 1, ..., d] in the dtype of the keys, so
that a tile of keys is an offset. It is made again for backward: kept are the raw keys, which the pyramid keeps anyway.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, inverse_norm, rotated, turns
from maha_megatron.attention.triton_slots import entries_before, first_slot, past_of, pick, slot_count, stride_of


@triton.jit
def locate_tile(tile, rows, TILE: tl.constexpr, SHAPE: tl.constexpr):
    """Scale, and tile within it, of one number for all tiles of all scales; the coarsest scale comes first.

    Its tiles are seen by the most rows, and what takes longest should begin first.
    """
    PASTS: tl.constexpr = SHAPE.past_slots
    scale, within = 0, tile
    for i in tl.static_range(len(PASTS) - 1, -1, -1):
        count = tl.cdiv(PASTS[i] + slot_count(rows, SHAPE.ratio, i), TILE)
        inside = (tile >= 0) & (tile < count)
        scale, within = tl.where(inside, i, scale), tl.where(inside, tile, within)
        tile -= count
    return scale, within


@triton.jit
def places_of(slot, places, RATIO: tl.constexpr, scale):
    """The place of every slot's last row in its document; of slots that hold no complete block, any number."""
    anchor = slot * stride_of(RATIO, scale)
    at = tl.minimum(tl.maximum(anchor, 0), places.rows - 1)
    document = tl.load(places.document_start + at).to(tl.int32)
    return (slot - first_slot(document, RATIO, scale) + 1) * stride_of(RATIO, scale) - 1


@triton.jit
def key_angles(slot, places, scale, SHAPE: tl.constexpr):
    """Cosine and sine of every slot's angles [slots, d/2]."""
    place = places_of(slot, places, SHAPE.ratio, scale)
    turn = turns(place, places.frequency, scale, tl.arange(0, SHAPE.half), SHAPE.half, SHAPE.fast)
    return cosine_sine(turn, SHAPE.fast)


@triton.jit
def at_entries(scales, entry, group, scale, channel):
    """Pointers [entries, channels] into a scale's [entries, g, d]."""
    base = pick(scales.tensors, scale) + group * pick(scales.group_strides, scale)
    return base + entry.to(tl.int64)[:, None] * pick(scales.entry_strides, scale) + channel[None, :]


@triton.jit
def normal_keys(keys, entry, group, scale, inside, SHAPE: tl.constexpr):
    """Raw keys normalised, in two halves, and what normalised them."""
    at = at_entries(keys, entry, group, scale, tl.arange(0, SHAPE.half))
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + SHAPE.half, mask=inside, other=0.0).to(tl.float32)
    norm = inverse_norm(first, second, SHAPE.epsilon, SHAPE.half)[:, None]
    return first * norm, second * norm, norm


@triton.jit
def key_gains(gain, group, HALF: tl.constexpr):
    """Gains of a group in two halves [1, d/2]."""
    at = gain + group * 2 * HALF + tl.arange(0, HALF)
    return tl.load(at)[None, :].to(tl.float32), tl.load(at + HALF)[None, :].to(tl.float32)


@triton.jit
def prepare_keys(keys, places, gain, prepared, total, SHAPE: tl.constexpr, TILE: tl.constexpr):
    scale, tile = locate_tile(tl.program_id(0), places.rows, TILE, SHAPE)
    group = tl.program_id(1)
    entry, channel = tile * TILE + tl.arange(0, TILE), tl.arange(0, SHAPE.half)
    past = past_of(scale, SHAPE)
    inside = (entry < past + slot_count(places.rows, SHAPE.ratio, scale))[:, None]
    first, second, _ = normal_keys(keys, entry, group, scale, inside, SHAPE)
    gain_first, gain_second = key_gains(gain, group, SHAPE.half)
    cosine, sine = key_angles(entry - past, places, scale, SHAPE)
    first, second = rotated(first * gain_first, second * gain_second, cosine, sine)
    begin = entries_before(scale, places.rows, SHAPE) + group.to(tl.int64) * total
    to = prepared + (begin + entry)[:, None] * 2 * SHAPE.half + channel[None, :]
    tl.store(to, first.to(prepared.dtype.element_ty), mask=inside)
    tl.store(to + SHAPE.half, second.to(prepared.dtype.element_ty), mask=inside)

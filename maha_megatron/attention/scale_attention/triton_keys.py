"""Keys of every scale as the logits read them: normalised, times their gain, rotated at the place of their last row.

One launch writes all scales into one buffer [g, entries of scale 0, of scale 1, ..., d] in the dtype of the keys, so
that a tile of keys is an offset. It is made again for backward: kept are the raw keys, which the pyramid keeps anyway.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    entries_before,
    first_slot,
    inverse_norm,
    pick,
    rotated,
    slot_count,
    stride_of,
    turns,
)


@triton.jit
def locate_tile(tile, rows, TILE: tl.constexpr, RATIO: tl.constexpr, PASTS: tl.constexpr):
    """Scale, and tile within it, of one number for all tiles of all scales; the coarsest scale comes first.

    Its tiles are seen by the most rows, and what takes longest should begin first.
    """
    scale, within = 0, tile
    for i in tl.static_range(len(PASTS) - 1, -1, -1):
        count = tl.cdiv(PASTS[i] + slot_count(rows, RATIO, i), TILE)
        inside = (tile >= 0) & (tile < count)
        scale, within = tl.where(inside, i, scale), tl.where(inside, tile, within)
        tile -= count
    return scale, within


@triton.jit
def places_of(slot, document_start, rows, RATIO: tl.constexpr, scale):
    """The place of every slot's last row in its document; of slots that hold no complete block, any number."""
    anchor = slot * stride_of(RATIO, scale)
    document = tl.load(document_start + tl.minimum(tl.maximum(anchor, 0), rows - 1)).to(tl.int32)
    return (slot - first_slot(document, RATIO, scale) + 1) * stride_of(RATIO, scale) - 1


@triton.jit
def prepare_keys(
    keys,  # tuple of L tensors [entries, g, d]
    strides,  # tuple of their (entry, group) strides
    document_start,
    frequency,
    gain,
    prepared,
    rows,
    total,
    RATIO: tl.constexpr,
    PASTS: tl.constexpr,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
    FAST: tl.constexpr,
    TILE: tl.constexpr,
):
    scale, tile = locate_tile(tl.program_id(0), rows, TILE, RATIO, PASTS)
    group = tl.program_id(1)
    entry, channel = tile * TILE + tl.arange(0, TILE), tl.arange(0, HALF)
    past = pick(PASTS, scale)
    inside = (entry < past + slot_count(rows, RATIO, scale))[:, None]
    stride_entry, stride_group = pick(strides[0], scale), pick(strides[1], scale)
    at = pick(keys, scale) + entry.to(tl.int64)[:, None] * stride_entry + group * stride_group + channel[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    norm = inverse_norm(first, second, EPSILON, HALF)[:, None]
    gain_at = gain + group * 2 * HALF + channel
    first *= norm * tl.load(gain_at)[None, :].to(tl.float32)
    second *= norm * tl.load(gain_at + HALF)[None, :].to(tl.float32)
    place = places_of(entry - past, document_start, rows, RATIO, scale)
    cosine, sine = cosine_sine(turns(place, frequency, scale, channel, HALF, FAST), FAST)
    first, second = rotated(first, second, cosine, sine)
    begin = entries_before(scale, rows, RATIO, PASTS) + group.to(tl.int64) * total
    to = prepared + (begin + entry)[:, None] * 2 * HALF + channel[None, :]
    tl.store(to, first.to(prepared.dtype.element_ty), mask=inside)
    tl.store(to + HALF, second.to(prepared.dtype.element_ty), mask=inside)

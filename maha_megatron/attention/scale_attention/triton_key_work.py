"""What the two warp groups of gluon_key_gradient.py go over; ordinary Triton, which an interpreter runs, too.

A work is a tile of 128 keys of one scale and KV group, of which each warp group has a half, and a part of the rows that
can see it, in tiles of 64.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_key_gradient import locate_part, part_of_rows, seeing_rows
from maha_megatron.attention.triton_slots import past_of, pick, slot_count

GROUP_KEYS = tl.constexpr(64)  # of a warp group
ROWS = tl.constexpr(64)  # of a tile


@triton.jit
def locate_work(work, groups, rows, parts, SHAPE: tl.constexpr):
    """Scale, tile of both warp groups, part and KV group of a work; the coarsest scale comes first."""
    scale, tile, part, _line = locate_part(work // groups, rows, parts, 2 * GROUP_KEYS, SHAPE)
    return scale, tile, part, work % groups


@triton.jit
def tiles_of_keys(seen_by, begin, count):
    """Of `count` tiles of rows from `begin` on: which [near, far) hold rows of a range."""
    near = tl.minimum(tl.maximum(seen_by[0] - begin, 0) // ROWS, count)
    far = tl.minimum(tl.cdiv(tl.maximum(seen_by[1] - begin, 0), ROWS), count)
    return near, tl.where(seen_by[0] < seen_by[1], tl.maximum(far, near), near), count


@triton.jit
def tiles_of_work(scale, tile, part, sample, places, parts, SHAPE: tl.constexpr):
    """The first row of a work, and each warp group's tiles of rows, as `tiles_of_keys` has them.

    A warp group whose keys lie behind the last gets none: rows that see those begin behind the last row.
    """
    slot, end = tile * (2 * GROUP_KEYS) - past_of(scale, SHAPE), slot_count(places.rows, SHAPE.ratio, scale)
    seen_by_0 = seeing_rows(slot, tl.minimum(slot + GROUP_KEYS, end), sample, places, scale, SHAPE)
    seen_by_1 = seeing_rows(slot + GROUP_KEYS, tl.minimum(slot + 2 * GROUP_KEYS, end), sample, places, scale, SHAPE)
    seen_by = (seen_by_0[0], tl.maximum(seen_by_0[1], seen_by_1[1]))
    begin, stop = part_of_rows(seen_by, part, pick(parts, scale), ROWS)
    count = tl.cdiv(tl.maximum(stop - begin, 0), ROWS)
    return begin, tiles_of_keys(seen_by_0, begin, count), tiles_of_keys(seen_by_1, begin, count)

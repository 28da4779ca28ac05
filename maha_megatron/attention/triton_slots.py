"""Slot arithmetic of slots.py as device functions, for every kernel. `SHAPE`: see scale_attention/triton_arguments.py.

With p = t - D, the row's place in its document, row t sees slots

    [c + max(m - w, 0), c + m)    with    c = ceil(D / R),  m = floor((p + 1) / R) complete blocks

of a scale, and both ends never fall from one row to the next, in whatever documents the rows lie: a tile of rows needs
the slots from the first row's first to the last row's last. Nothing here is negative but D and c.
"""

import triton
import triton.language as tl


@triton.jit
def pick(values, scale):
    """values[scale] of a tuple, for a scale known at run time only."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(scale == i, values[i], found)
    return found


@triton.jit
def stride_of(RATIO: tl.constexpr, scale):
    """ratio**scale."""
    if RATIO & (RATIO - 1) == 0:
        return 1 << (scale * (RATIO // 4 + 1))  # 2, 4 and 8 are 1, 2 and 3 bits
    stride = 1
    for i in tl.static_range(1, 8):
        stride = tl.where(scale >= i, stride * RATIO, stride)
    return stride


@triton.jit
def divided(x, RATIO: tl.constexpr, scale):
    """x // ratio**scale for x >= 0."""
    if RATIO & (RATIO - 1) == 0:
        return x >> (scale * (RATIO // 4 + 1))
    return x // stride_of(RATIO, scale)


@triton.jit
def first_slot(document, RATIO: tl.constexpr, scale):
    """ceil(D / R), D of either sign."""
    up = divided(tl.maximum(document, 0) + stride_of(RATIO, scale) - 1, RATIO, scale)
    return tl.where(document >= 0, up, -divided(tl.maximum(-document, 0), RATIO, scale))


@triton.jit
def visible(row, document, window, RATIO: tl.constexpr, scale):
    """The slots [first, end) that rows see."""
    origin = first_slot(document, RATIO, scale)
    blocks = divided(row - document + 1, RATIO, scale)
    return origin + tl.maximum(blocks - window, 0), origin + blocks


@triton.jit
def within(slot, first, count):
    """first <= slot < first + count: one comparison, as what lies before `first` wraps to a large number."""
    return (slot - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def slot_count(rows, RATIO: tl.constexpr, scale):
    """Slots from slot 0 on: ceil(t / R)."""
    return divided(rows + stride_of(RATIO, scale) - 1, RATIO, scale)


@triton.jit
def window_of(scale, SHAPE: tl.constexpr):
    WINDOWS: tl.constexpr = SHAPE.windows
    return pick(WINDOWS, scale)


@triton.jit
def past_of(scale, SHAPE: tl.constexpr):
    """Entries in front of a scale's slot 0."""
    PASTS: tl.constexpr = SHAPE.past_slots
    return pick(PASTS, scale)


@triton.jit
def entries_before(scale, rows, SHAPE: tl.constexpr):
    """Entries of all finer scales: where a scale begins in a buffer that holds them one after the other."""
    PASTS: tl.constexpr = SHAPE.past_slots
    total = 0
    for i in tl.static_range(len(PASTS) - 1):
        total = tl.where(scale > i, total + PASTS[i] + slot_count(rows, SHAPE.ratio, i), total)
    return total

"""The new rows of every stream: convolved, pooled into the blocks that they complete, and kept raw for the next piece.

A program has one head of q, k or v of one stream. A block's children are entries of the state, rows of the piece or
blocks that the program has just made, so scales follow one another; where none of a scale is completed, none of a
coarser one is. Of a single row all children but the last are entries of the state: those of all scales are asked for at
once, whatever the row completes, and no scale waits for memory. More rows hand their blocks on through memory.
"""

import triton
import triton.language as tl

from maha_megatron.attention.convolution.triton_walk import at_rows, line_of, load_taps, sigmoid
from maha_megatron.attention.decode.triton_step import at_fresh, at_held, at_slots, blocks_of, document_at
from maha_megatron.attention.pyramid.triton_pool import gates_of, load_gate, shares_of
from maha_megatron.attention.triton_slots import stride_of


@triton.jit
def raw_rows(x, kept, kind, head, line, stream, row, packed, STEP: tl.constexpr):
    """Raw rows of a piece [rows, d], of the state where they are negative."""
    width: tl.constexpr = 2 * STEP.half
    in_piece = ((row >= 0) & (row < STEP.rows))[:, None]
    found = tl.load(at_rows(x, kind, head, stream * STEP.rows + row, width), mask=in_piece, other=0.0)
    place = stream.to(tl.int64) * STEP.kept_rows + STEP.kept_rows + row
    at = kept + (place * (packed.n + 2 * packed.g) + line)[:, None] * width + tl.arange(0, width)[None, :]
    in_state = ((row < 0) & (row >= -STEP.kept_rows))[:, None]
    return tl.where(in_state, tl.load(at, mask=in_state, other=0.0), found)


@triton.jit
def keep_rows(x, old, new, kind, head, line, stream, document, packed, STEP: tl.constexpr):
    """Writes the newest raw rows of the piece and of the state before it; zero before the last row's document."""
    width: tl.constexpr = 2 * STEP.half
    for first in tl.range(0, STEP.kept_rows, 16):
        place = first + tl.arange(0, 16)
        row = place + (STEP.rows - STEP.kept_rows)
        rows = raw_rows(x, old, kind, head, line, stream, row, packed, STEP)
        line_at = (stream.to(tl.int64) * STEP.kept_rows + place) * (packed.n + 2 * packed.g) + line
        to = new + line_at[:, None] * width + tl.arange(0, width)[None, :]
        tl.store(to, tl.where((row >= document)[:, None], rows, 0.0), mask=(place < STEP.kept_rows)[:, None])


@triton.jit
def clear_blocks(fresh, stream, kind, group, g, STEP: tl.constexpr, LINES: tl.constexpr):
    """Zeros for the piece's slots of all coarse scales: what holds no complete block."""
    SLOTS_BEFORE: tl.constexpr = STEP.slots_before
    line, channel = tl.arange(0, LINES), tl.arange(0, 2 * STEP.half)
    to = at_fresh(fresh, stream, line, 1, kind, group, g, STEP)[:, None] + channel[None, :]
    coarse = line < SLOTS_BEFORE[len(STEP.windows)] - SLOTS_BEFORE[1]
    tl.store(to, tl.zeros([LINES, 2 * STEP.half], fresh.dtype.element_ty), mask=coarse[:, None])


@triton.jit
def pool_blocks(
    entries,
    fresh,
    learned,
    starts,
    stream,
    kind,
    group,
    g,
    scale: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    CHILDREN: tl.constexpr,
):
    """Writes the blocks of one coarse scale that the piece completes; returns how many."""
    width: tl.constexpr = 2 * STEP.half
    slot, child, channel = tl.arange(0, SLOTS), tl.arange(0, CHILDREN), tl.arange(0, width)
    first, complete = blocks_of(starts, slot, scale, STEP)
    at = at_slots(entries, fresh, stream, first[:, None] + child[None, :], scale - 1, kind, group, g, STEP)
    real = (complete[:, None] & (child < STEP.ratio)[None, :])[:, :, None]
    member = tl.load(at[:, :, None] + channel[None, None, :], mask=real, other=0.0).to(tl.float32)
    line = ((scale - 1) * 2 + kind) * g + group
    if STEP.method == "gated":
        query, bias = load_gate(learned, line, STEP.ratio, CHILDREN, width)
        block = tl.sum(member * gates_of(member, query, bias)[:, :, None], 1)
    else:
        METHOD: tl.constexpr = STEP.method  # a compiled kernel takes no name out of a field as an argument
        block = tl.sum(member * shares_of(member, learned, line, METHOD, STEP.ratio, CHILDREN, width), 1)
    to = at_fresh(fresh, stream, slot, scale, kind, group, g, STEP)[:, None] + channel[None, :]
    tl.store(to, block.to(fresh.dtype.element_ty), mask=complete[:, None])
    return tl.sum(complete.to(tl.int32), 0)


@triton.jit
def ask_for_children(entries, learned, stream, kind, group, g, STEP: tl.constexpr, CHILDREN: tl.constexpr):
    """Of every coarse scale the r - 1 newest entries of the finer one [1, children, d], and the gates' query and bias.

    `kind` is -1 in a program of q, which asks for no entries.
    """
    width: tl.constexpr = 2 * STEP.half
    child, channel = tl.arange(0, CHILDREN), tl.arange(0, width)
    HELD: tl.constexpr = STEP.held
    asked = ((child < STEP.ratio - 1) & (kind >= 0))[None, :, None]
    kind, group = tl.maximum(kind, 0), tl.minimum(group, g - 1)
    members, gates = (), ()
    for scale in tl.static_range(1, len(STEP.windows)):
        index = HELD[scale - 1] - (STEP.ratio - 1) + child
        at = at_held(entries, stream, index, scale - 1, kind, group, g, STEP)[None, :, None] + channel[None, None, :]
        members += (tl.load(at, mask=asked, other=0.0),)
        if STEP.method == "gated":
            line = ((scale - 1) * 2 + kind) * g + group
            gates += (load_gate(learned, line, STEP.ratio, CHILDREN, width),)
    return members, gates


@triton.jit
def pool_row(
    members, gates, fresh, learned, row, read, stream, kind, group, g, STEP: tl.constexpr, CHILDREN: tl.constexpr
):
    """Writes the piece's slot of every coarse scale where the piece is a `row` [1, d], the `read`th of its document."""
    width: tl.constexpr = 2 * STEP.half
    newest, last = row, (tl.arange(0, CHILDREN) == STEP.ratio - 1)[None, :, None]
    for scale in tl.static_range(1, len(STEP.windows)):
        block = tl.zeros([1, width], fresh.dtype.element_ty)
        if read % stride_of(STEP.ratio, scale) == 0:
            member = tl.where(last, newest[:, None, :], members[scale - 1]).to(tl.float32)
            if STEP.method == "gated":
                query, bias = gates[scale - 1]
                share = gates_of(member, query, bias)[:, :, None]
            else:
                line = ((scale - 1) * 2 + kind) * g + group
                METHOD: tl.constexpr = STEP.method
                share = shares_of(member, learned, line, METHOD, STEP.ratio, CHILDREN, width)
            block = tl.sum(member * share, 1).to(fresh.dtype.element_ty)
        to = at_fresh(fresh, stream, 0, scale, kind, group, g, STEP) + tl.arange(0, width)[None, :]
        tl.store(to, block)
        newest = block


@triton.jit
def advance_rows_kernel(
    x,
    old,
    new,
    taps,  # [(n + 2g) d, 3]; or None
    learned,  # of the pyramid, as in pyramid/triton_pool.py, of all scales
    fresh,  # [B, slots of all scales, 2, g, d]
    queries,  # [B T, n, d], convolved
    packed,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COARSE: tl.constexpr,
    CHILDREN: tl.constexpr,
):
    width: tl.constexpr = 2 * STEP.half
    line, stream = tl.program_id(0), tl.program_id(1)
    kind, head, line_of_taps = line_of(line, packed)
    row, channel = tl.arange(0, ROWS), tl.arange(0, width)
    if STEP.rows == 1:
        members, gates = ask_for_children(old.entries, learned, stream, kind - 1, head, packed.g, STEP, CHILDREN)
    inside, starts = (row < STEP.rows)[:, None], packed.document_start + stream * STEP.rows
    document = document_at(starts, STEP.rows - 1, STEP)
    mixed = tl.load(at_rows(x, kind, head, stream * STEP.rows + row, width), mask=inside, other=0.0)
    if taps is not None:
        own, before = mixed.to(tl.float32), (row - document_at(starts, row, STEP))[:, None]
        oldest_tap, second_tap, own_tap = load_taps(taps, line_of_taps, width)
        oldest = raw_rows(x, old.rows, kind, head, line, stream, row - 4, packed, STEP).to(tl.float32)
        second = raw_rows(x, old.rows, kind, head, line, stream, row - 2, packed, STEP).to(tl.float32)
        oldest, second = tl.where(before >= 4, oldest, 0.0), tl.where(before >= 2, second, 0.0)
        sum_of_taps = oldest_tap * oldest + second_tap * second + own_tap * own
        mixed = (own + sum_of_taps * sigmoid(sum_of_taps)).to(queries.dtype.element_ty)
        keep_rows(x, old.rows, new.rows, kind, head, line, stream, document, packed, STEP)
    read = STEP.rows - document
    if line == 0:
        back = tl.where(document < 0, tl.load(old.rewindable + stream).to(tl.int32) + STEP.rows, read)
        tl.store(new.offset + stream, read.to(tl.int64))
        tl.store(new.rewindable + stream, tl.minimum(back, STEP.rewind_rows).to(tl.int64))
    if kind == 0:
        to = queries + ((stream * STEP.rows + row) * packed.n + head)[:, None] * width + channel[None, :]
        tl.store(to, mixed, mask=inside)
    else:
        to = at_fresh(fresh, stream, row, 0, kind - 1, head, packed.g, STEP)[:, None] + channel[None, :]
        tl.store(to, mixed, mask=inside)
        if STEP.rows == 1:
            numbers = (read, stream, kind - 1, head, packed.g)
            pool_row(members, gates, fresh, learned, mixed, *numbers, STEP, CHILDREN)
        elif len(STEP.windows) > 1:
            clear_blocks(fresh, stream, kind - 1, head, packed.g, STEP, COARSE)
            completed = STEP.rows
            for scale in tl.static_range(1, len(STEP.windows)):
                if completed > 0:
                    tl.debug_barrier()
                    numbers = (kind - 1, head, packed.g)
                    completed = pool_blocks(
                        old.entries, fresh, learned, starts, stream, *numbers, scale, STEP, SLOTS[scale], CHILDREN
                    )

"""The second kernel of backward for Hopper: what triton_key_gradient.py computes, by warp groups that share rows.

A program has two warp groups of consumers, with 64 keys each of a tile of 128, and a warp that loads for both. Keys and
values stay in shared memory; the rows that see them come in tiles of 64, turned queries and dO, through a ring of
stages, and with them numbers of each row: its norm, offset and delta, and the slots that it sees.

    loader       k v, k v | q dO, q dO, ... of a head | ... of the next head          waits until a stage is empty
    consumers    S' = K q', dP' = V dO'; dV += P' dO, dK' += dS' q                     wait until it is full

S' and dP' [keys, rows] lie in registers as the left operands of the two products that follow want them. A program does
one work after another, a tile of keys and a part of the rows that can see it; the loader fetches of the next one what
there is room for, and a warp group passes over tiles of rows that see none of its keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from maha_megatron.attention.scale_attention.gluon_forward import accumulator, written_rows
from maha_megatron.attention.scale_attention.gluon_loading import barrier_pairs, ends_of, let_go, skip, wait_for
from maha_megatron.attention.scale_attention.triton_forward import LOG2_E, seen_by_whole_tile
from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, halves, inverse_norm, rotated, turns
from maha_megatron.attention.scale_attention.triton_key_gradient import first_program
from maha_megatron.attention.scale_attention.triton_key_work import GROUP_KEYS, ROWS, locate_work, tiles_of_work
from maha_megatron.attention.scale_attention.triton_keys import at_entries, places_of
from maha_megatron.attention.triton_slots import (
    entries_before,
    past_of,
    pick,
    slot_count,
    visible,
    window_of,
    within,
)

NUMBERS = gl.constexpr(4)  # of a row: norm in units of logits, offset, norm, delta times norm
SIGHTS = gl.constexpr(2)  # of a row: the first slot that it sees, and how many
NOTES = gl.constexpr(4)  # of a warp group: near, far, count of `tiles_of_keys`, and its number; behind them the rows
OF_ROWS = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # how the loader holds a tile's, or a sample


@gluon.jit
def put(number, buffer, WARPS: gl.constexpr):
    """A whole number into shared memory."""
    buffer.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def taken(buffer, WARPS: gl.constexpr):
    """The number that was put there."""
    return gl.max(buffer.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def load_keys(turn, at, scale, tiles, described, shared, SHAPE: gl.constexpr, GROUP: gl.constexpr):
    """A warp group's keys and values; and what `tiles_of_keys` says of the tiles of rows of a head.

    `at`: row of the prepared keys, and of the values, and these' first number.
    """
    key_buffers, value_buffers, notes, barriers = shared
    full = barriers[0].index(GROUP)
    mbarrier.wait(barriers[1].index(GROUP), (turn & 1) ^ 1)
    for i in gl.static_range(3):
        put(tiles[i], notes.index(NOTES * GROUP + i), 1)
    gl.thread_barrier()
    mbarrier.expect(full, 2 * GROUP_KEYS * 2 * SHAPE.half * 2)
    tma.async_copy_global_to_shared(described[0], [at[0], 0], full, key_buffers.index(GROUP))
    for i in gl.static_range(len(SHAPE.windows)):
        if scale == i:
            tma.async_copy_global_to_shared(described[1][i], [at[1], at[2]], full, value_buffers.index(GROUP))


@gluon.jit
def load_rows(tile, start, head, scale, given, described, ring, SHAPE: gl.constexpr, EACH: gl.constexpr):
    """A tile of rows of a head: turned queries, dO and numbers."""
    UNIT: gl.constexpr = LOG2_E / (2 * SHAPE.half) ** 0.5
    _queries, places, grad_out, found = given
    query_buffers, grad_buffers, numbers, sights, seen, barriers = ring
    STAGES: gl.constexpr = query_buffers.shape[0]
    of_scale = head * len(SHAPE.windows) + scale
    of_output, of_softmax, of_turn = head, head, of_scale
    if SHAPE.one_turn:
        of_turn = head
    if EACH:
        of_output = of_scale
    if SHAPE.apart:
        of_softmax = of_scale
    row = start + gl.arange(0, ROWS, layout=OF_ROWS)
    real = row < places.rows
    document = gl.load(places.document_start + row, mask=real, other=0).to(gl.int32)
    norm = gl.load(found.norms + head * places.rows + row, mask=real, other=0.0)
    at_scale = of_scale.to(gl.int64) * places.rows
    offset = gl.load(found.offsets + at_scale + row, mask=real, other=float("-inf"))
    delta = gl.load(found.delta + of_softmax.to(gl.int64) * places.rows + row, mask=real, other=0.0)
    see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
    first, ends = ends_of(start, places, ROWS)
    seen_from, seen_to = seen_by_whole_tile(first, ends, scale, SHAPE)
    stage = tile % STAGES
    mbarrier.wait(barriers[1].index(stage), ((tile // STAGES) & 1) ^ 1)
    numbers.index(NUMBERS * stage).store(norm * UNIT)
    numbers.index(NUMBERS * stage + 1).store(offset)
    numbers.index(NUMBERS * stage + 2).store(norm)
    numbers.index(NUMBERS * stage + 3).store(delta * norm)
    sights.index(SIGHTS * stage).store(see_from)
    sights.index(SIGHTS * stage + 1).store(gl.where(real, see_to - see_from, 0))
    put(seen_from, seen.index(2 * stage), 1)
    put(seen_to, seen.index(2 * stage + 1), 1)
    gl.thread_barrier()
    full = barriers[0].index(stage)
    mbarrier.expect(full, 2 * ROWS * 2 * SHAPE.half * 2)
    turned_at = of_turn * places.rows + start
    tma.async_copy_global_to_shared(described[2], [turned_at, 0], full, query_buffers.index(stage))
    channel = of_output * grad_out.head_stride
    tma.async_copy_global_to_shared(described[3], [start, channel], full, grad_buffers.index(stage))


@gluon.jit
def load(given, keys, parts, works, described, shared, SHAPE: gl.constexpr, EACH: gl.constexpr):
    """The loader: for all work of a program its keys, and the rows that see them."""
    queries, places, _grad_out, _found = given
    of_keys, ring = shared
    tile, turn = gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        rows = taken(of_keys[2].index(2 * NOTES), 1)
        scale, at, part, group = locate_work(work, queries.n // queries.n_per_group, rows, parts, SHAPE)
        sample, entry = gl.arange(0, ROWS, layout=OF_ROWS), at * (2 * GROUP_KEYS)
        begin, tiles_0, tiles_1 = tiles_of_work(scale, at, part, sample, places, parts, SHAPE)
        key_at = group * keys.total + entries_before(scale, rows, SHAPE) + entry
        channel = group * pick(keys.raw_values.group_strides, scale)
        load_keys(turn, (key_at, entry, channel), scale, tiles_0, described, of_keys, SHAPE, 0)
        second = (key_at + GROUP_KEYS, entry + GROUP_KEYS, channel)
        load_keys(turn, second, scale, tiles_1, described, of_keys, SHAPE, 1)
        turn += 1
        for head in range(group * queries.n_per_group, (group + 1) * queries.n_per_group):
            for i in range(tiles_0[2]):
                load_rows(tile, begin + i * ROWS, head, scale, given, described, ring, SHAPE, EACH)
                tile += 1


@gluon.jit
def add_tile(tile, slot, sums, of_tile, ring, GROUP: gl.constexpr):
    """What a tile of rows asks of a warp group's keys and values; sums are dK' and dV [keys, d]."""
    grad_key, grad_value = sums
    query_buffers, grad_buffers, numbers, sights, seen, barriers = ring
    LOGITS: gl.constexpr = accumulator(ROWS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, grad_key.type.layout, 2)
    OF_COLUMNS: gl.constexpr = gl.SliceLayout(0, LOGITS)
    none = gl.zeros([GROUP_KEYS, ROWS], gl.float32, LOGITS)
    stage = tile % query_buffers.shape[0]
    query, grad = query_buffers.index(stage), grad_buffers.index(stage)
    # which is GROUP, but descriptors of what lies at a constant place are held in registers that are not there
    own = taken(of_tile[2].index(NOTES * GROUP + NOTES - 1), 4)
    key, value = of_tile[0].index(own), of_tile[1].index(own)
    wait_for(barriers, tile)
    logits = warpgroup_mma(key, query.permute((1, 0)), none, use_acc=False, is_async=True)
    grad_weight = warpgroup_mma(value, grad.permute((1, 0)), none, use_acc=False, is_async=True)
    whole_from, whole_to = taken(seen.index(2 * stage), 4), taken(seen.index(2 * stage + 1), 4)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    unit = numbers.index(NUMBERS * stage).load(OF_COLUMNS)
    offset = numbers.index(NUMBERS * stage + 1).load(OF_COLUMNS)
    logits = logits * unit[None, :] + offset[None, :]
    if (slot < whole_from) | (slot + GROUP_KEYS > whole_to):  # some row does not see all of the keys
        see_from = sights.index(SIGHTS * stage).load(OF_COLUMNS)
        count = sights.index(SIGHTS * stage + 1).load(OF_COLUMNS)
        key_slot = slot + gl.arange(0, GROUP_KEYS, layout=gl.SliceLayout(1, LOGITS))
        logits = gl.where(within(key_slot[:, None], see_from[None, :], count[None, :]), logits, float("-inf"))
    weight = gl.exp2(logits)
    left = gl.convert_layout(weight.to(query_buffers.dtype), OPERAND)
    grad_value = warpgroup_mma(left, grad, grad_value, is_async=True)
    grad_weight = warpgroup_mma_wait(1, deps=(grad_weight,))
    norm = numbers.index(NUMBERS * stage + 2).load(OF_COLUMNS)
    delta = numbers.index(NUMBERS * stage + 3).load(OF_COLUMNS)
    grad_logits = weight * (grad_weight * norm[None, :] - delta[None, :])
    of_logits = gl.convert_layout(grad_logits.to(query_buffers.dtype), OPERAND)
    grad_key = warpgroup_mma(of_logits, query, grad_key, is_async=True)
    grad_key, grad_value, _left, _of_logits = warpgroup_mma_wait(0, deps=(grad_key, grad_value, left, of_logits))
    let_go(barriers, tile)
    return grad_key, grad_value


@gluon.jit
def written_halves(x, LAYOUT: gl.constexpr):
    """Channels of [keys, d] in two halves, as they are written."""
    first, second = halves(x)
    return gl.convert_layout(first, LAYOUT), gl.convert_layout(second, LAYOUT)


@gluon.jit
def store_halves(to, first, second, mask, HALF: gl.constexpr):
    gl.store(to, first.to(to.dtype.element_ty), mask=mask)
    gl.store(to + HALF, second.to(to.dtype.element_ty), mask=mask)


@gluon.jit
def store_sums(sums, before, made, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a part: dK' and dV as they are, for add_parts_kernel."""
    key = gl.arange(0, GROUP_KEYS, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    at = made.sums + before.to(gl.int64) * (4 * GROUP_KEYS * HALF) + key[:, None] * (2 * HALF) + channel[None, :]
    for i in gl.static_range(2):
        first, second = written_halves(sums[i], LAYOUT)
        store_halves(at + i * 2 * GROUP_KEYS * HALF, first, second, None, HALF)


@gluon.jit
def through_gain(grad, normal, gain, part, channel):
    """Half of the channels of what keys turned back get: writes what it gives the gain; returns it times the gain."""
    gl.store(part + channel, gl.sum(grad * normal, 0))
    return grad * gl.load(gain + channel).to(gl.float32)[None, :]


@gluon.jit
def store_gradients(sums, where, line, groups, of_keys, places, made, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """As `store_key_gradients` of triton_key_gradient.py. `where`: first entry, entries, KV group, scale."""
    HALF: gl.constexpr = SHAPE.half
    raw_keys, key_gain = of_keys
    entry, entries, group, scale = where
    own = entry + gl.arange(0, GROUP_KEYS, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    inside = (own < entries)[:, None]
    first, second = written_halves(sums[1], LAYOUT)
    store_halves(at_entries(made.grad_values, own, group, scale, channel), first, second, inside, HALF)
    first, second = written_halves(sums[0], LAYOUT)
    place = places_of(own - past_of(scale, SHAPE), places, SHAPE.ratio, scale)
    cosine, sine = cosine_sine(turns(place, places.frequency, scale, channel, HALF, SHAPE.fast), SHAPE.fast)
    first, second = rotated(first, second, cosine, -sine)
    first, second = first * (2 * HALF) ** -0.5, second * (2 * HALF) ** -0.5
    at = at_entries(raw_keys, own, group, scale, channel)
    normal_first = gl.load(at, mask=inside, other=0.0).to(gl.float32)
    normal_second = gl.load(at + HALF, mask=inside, other=0.0).to(gl.float32)
    norm = inverse_norm(normal_first, normal_second, SHAPE.epsilon, HALF)[:, None]
    normal_first, normal_second = normal_first * norm, normal_second * norm
    gain, part = key_gain + group * 2 * HALF, made.gain_parts + (line * groups + group) * 2 * HALF
    first = through_gain(first, normal_first, gain, part, channel)
    second = through_gain(second, normal_second, gain + HALF, part + HALF, channel)
    along = (gl.sum(first * normal_first, 1) + gl.sum(second * normal_second, 1))[:, None] / (2 * HALF)
    first, second = (first - normal_first * along) * norm, (second - normal_second * along) * norm
    store_halves(at_entries(made.grad_keys, own, group, scale, channel), first, second, inside, HALF)


@gluon.jit
def finish(
    sums,
    work,
    of_keys,
    rows,
    queries,
    places,
    parts,
    made,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Writes a warp group's gradients, or its part of them."""
    LAYOUT: gl.constexpr = written_rows(SHAPE.half)
    groups = queries.n // queries.n_per_group
    scale, tile, part, group = locate_work(work, groups, rows, parts, SHAPE)
    tile = 2 * tile + GROUP
    entries = past_of(scale, SHAPE) + slot_count(rows, SHAPE.ratio, scale)
    first, line = first_program(scale, tile, rows, parts, GROUP_KEYS, SHAPE)
    there, alone = tile * GROUP_KEYS < entries, True
    if SIZES.shared:
        alone = pick(parts, scale) == 1
        if there & (alone == 0):
            store_sums(sums, (first + part) * groups + group, made, SHAPE.half, LAYOUT)
    if there & alone:
        where = (tile * GROUP_KEYS, entries, group, scale)
        store_gradients(sums, where, line, groups, of_keys, places, made, SHAPE, LAYOUT)


@gluon.jit
def add_up(given, of_keys, parts, works, made, shared, SHAPE: gl.constexpr, SIZES: gl.constexpr, GROUP: gl.constexpr):
    """A consumer: its part of all work of a program."""
    queries, places, _grad_out, _found = given
    of_tile, ring = shared
    _key_buffers, _value_buffers, notes, key_barriers = of_tile
    WIDTH: gl.constexpr = 2 * SHAPE.half
    tile, turn = gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        rows = taken(notes.index(2 * NOTES), 4)
        scale, at, _part, _group = locate_work(work, queries.n // queries.n_per_group, rows, parts, SHAPE)
        slot = (2 * at + GROUP) * GROUP_KEYS - past_of(scale, SHAPE)
        grad_key = gl.zeros([GROUP_KEYS, WIDTH], gl.float32, accumulator(WIDTH))
        grad_value = gl.zeros([GROUP_KEYS, WIDTH], gl.float32, accumulator(WIDTH))
        mbarrier.wait(key_barriers[0].index(GROUP), turn & 1)
        near, far = taken(notes.index(NOTES * GROUP), 4), taken(notes.index(NOTES * GROUP + 1), 4)
        count = taken(notes.index(NOTES * GROUP + 2), 4)
        for _head in range(queries.n_per_group):
            # `tile` is added inside of these loops, not to their bounds: Triton (3.6) drops a number that a loop
            # carries along if only bounds of inner loops use it; every head and work would begin with the same tile
            skip(tile, 0, near, ring[5])
            for i in range(near, far):
                grad_key, grad_value = add_tile(tile + i, slot, (grad_key, grad_value), of_tile, ring, GROUP)
            skip(tile, far, count, ring[5])
            tile += count
        gl.thread_barrier()
        mbarrier.arrive(key_barriers[1].index(GROUP), count=1)
        turn += 1
        rows = taken(notes.index(2 * NOTES), 4)  # once more, or what follows from it lies in registers until here
        sums = (grad_key, grad_value)
        finish(sums, work, of_keys, rows, queries, places, parts, made, SHAPE, SIZES, GROUP)


@gluon.jit
def key_gradient_by_groups_kernel(
    turned_rows,  # descriptor of [n L t, d]; with one turn of [n t, d]
    grad_rows,  # of dO [t, n d]; with EACH, a head and scale is a head of its own
    key_entries,  # of [g entries, d]
    value_0,  # of every scale's [entries, g d]
    value_1,
    value_2,
    value_3,
    value_4,
    value_5,
    value_6,
    value_7,
    queries,
    keys,
    raw_keys,
    key_gain,
    places,
    grad_out,
    found,
    made,
    parts,  # as of key_gradient_kernel
    works,  # tiles of 128 keys of every scale, times its parts, times KV groups
    SHAPE: gl.constexpr,
    EACH: gl.constexpr,
    SIZES: gl.constexpr,
):
    STAGES: gl.constexpr = SIZES.stages
    operand: gl.constexpr = keys.prepared.dtype.element_ty
    WIDTH: gl.constexpr = 2 * SHAPE.half
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    key_buffers = gl.allocate_shared_memory(operand, [2, GROUP_KEYS, WIDTH], key_entries.layout)
    value_buffers = gl.allocate_shared_memory(operand, [2, GROUP_KEYS, WIDTH], value_0.layout)
    query_buffers = gl.allocate_shared_memory(operand, [STAGES, ROWS, WIDTH], turned_rows.layout)
    grad_buffers = gl.allocate_shared_memory(operand, [STAGES, ROWS, WIDTH], grad_rows.layout)
    numbers = gl.allocate_shared_memory(gl.float32, [NUMBERS * STAGES, ROWS], PLAIN)
    sights = gl.allocate_shared_memory(gl.int32, [SIGHTS * STAGES, ROWS], PLAIN)
    seen = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], PLAIN)
    notes = gl.allocate_shared_memory(gl.int32, [2 * NOTES + 1, 1], PLAIN)
    put(0, notes.index(NOTES - 1), 4)
    put(1, notes.index(2 * NOTES - 1), 4)
    put(places.rows, notes.index(2 * NOTES), 4)
    ring = (query_buffers, grad_buffers, numbers, sights, seen, barrier_pairs(STAGES, 2))
    shared = ((key_buffers, value_buffers, notes, barrier_pairs(2, 1)), ring)
    fence_async_shared()
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    described = (key_entries, values, turned_rows, grad_rows)
    given = (queries, places, grad_out, found)
    gl.warp_specialize(
        [
            (add_up, (given, (raw_keys, key_gain), parts, works, made, shared, SHAPE, SIZES, 0)),
            (add_up, (given, (raw_keys, key_gain), parts, works, made, shared, SHAPE, SIZES, 1)),
            (load, (given, keys, parts, works, described, shared, SHAPE, EACH)),
        ],
        [4, 1],
        [240, 24],
    )

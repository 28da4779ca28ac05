"""The middle of backward's first kernel for Hopper: what asks keys, of triton_query_gradient.py, by warp groups.

What comes before it, turned queries and numbers of each row, and after it, the way back through rotation, utilities,
gain and norm, are kernels of their own (triton_query_ends.py): they move memory, and this one multiplies.

Programs, work and tiles of keys and values are those of gluon_forward.py. A warp group's turned queries and dO come
through two buffers each, so that those of the next work are there before this one ends:

    loader       q dO, q dO | kv kv kv ... of scale 0 | q, q | kv kv ... of scale 1 | ...
    consumers    S = q K', dP = dO V', dq' += dS K'

Where utilities alone weigh the scales, a scale's tiles come twice, as delta_l = <dO, O_l> has to be known first. Where
every scale has an output of its own, it has a dO of its own.

Halves of channels have accumulators of their own: behind each scale they are turned from its angles to the next one's,
within a thread. Where queries turn alike for every scale, nothing is turned, and they come once a work.
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

from maha_megatron.attention.scale_attention.gluon_forward import accumulator, tiles_of_group
from maha_megatron.attention.scale_attention.gluon_loading import (
    GROUP_ROWS,
    KEYS,
    barrier_pairs,
    ends_of,
    let_go,
    load_scale,
    rows_and_head,
    skip,
    wait_for,
    work_count,
)
from maha_megatron.attention.scale_attention.triton_forward import LOG2_E, only_seen, seen_by_whole_tile
from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, rotated, turns_on
from maha_megatron.attention.triton_slots import visible, window_of

SLOTS = gl.constexpr(2)  # of a warp group: buffers of queries, and of dO


@gluon.jit
def load_queries(turn, work, scale, queries, places, described, rows, SHAPE: gl.constexpr, SIZES: gl.constexpr):
    """Both warp groups' turned queries, in halves."""
    buffers, barriers = rows
    TURNS: gl.constexpr = 1 if SHAPE.one_turn else len(SHAPE.windows)
    BYTES: gl.constexpr = 2 * GROUP_ROWS * SHAPE.half * 2
    for group in gl.static_range(2):
        _start, row, head = rows_and_head(work, places, SIZES, group)
        slot = SLOTS * group + turn % SLOTS
        full, at = barriers[0].index(slot), (head * TURNS + scale) * places.rows + row
        mbarrier.wait(barriers[1].index(slot), ((turn // SLOTS) & 1) ^ 1)
        mbarrier.expect(full, BYTES)
        tma.async_copy_global_to_shared(described, [at, 0], full, buffers.index(2 * slot))
        tma.async_copy_global_to_shared(described, [at, SHAPE.half], full, buffers.index(2 * slot + 1))


@gluon.jit
def load_grads(turn, work, scale, given, described, rows, SHAPE: gl.constexpr, SIZES: gl.constexpr):
    """Both warp groups' dO, or with SIZES.each a scale's; rows behind the last are zeros."""
    _queries, _keys, places, grad_out, _found = given
    buffers, barriers = rows
    for group in gl.static_range(2):
        _start, row, head = rows_and_head(work, places, SIZES, group)
        if SIZES.each:
            head = head * len(SHAPE.windows) + scale
        slot = SLOTS * group + turn % SLOTS
        full = barriers[0].index(slot)
        mbarrier.wait(barriers[1].index(slot), ((turn // SLOTS) & 1) ^ 1)
        mbarrier.expect(full, GROUP_ROWS * 2 * SHAPE.half * 2)
        tma.async_copy_global_to_shared(described, [row, head * grad_out.head_stride], full, buffers.index(slot))


@gluon.jit
def load(given, described, shared, SHAPE: gl.constexpr, SIZES: gl.constexpr):
    """The loader: for all work of a program queries and dO, and the tiles of every scale that some row sees."""
    queries, keys, places, _grad_out, _found = given
    of_queries, of_grads, ring = shared
    turned_rows, grad_rows, key_entries, values = described
    PASSES: gl.constexpr = 2 if SHAPE.apart and not SIZES.each else 1
    tile, query_turn, grad_turn = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), work_count(queries, places, SIZES), gl.num_programs(0)):
        start, _row, head = rows_and_head(work, places, SIZES, 0)
        group = head // queries.n_per_group
        start, ends = ends_of(start, places, SIZES.rows)
        for scale in gl.static_range(len(SHAPE.windows)):
            if scale == 0 or not SHAPE.one_turn:
                load_queries(query_turn, work, scale, queries, places, turned_rows, of_queries, SHAPE, SIZES)
                query_turn += 1
            if scale == 0 or SIZES.each:
                load_grads(grad_turn, work, scale, given, grad_rows, of_grads, SHAPE, SIZES)
                grad_turn += 1
            for _pass in gl.static_range(PASSES):
                tile = load_scale(tile, start, ends, scale, group, keys, places, (key_entries, values), ring, SHAPE)


@gluon.jit
def weights_of_tile(tile, at, of_rows, ring):
    """P and dP [rows, keys] of the keys from slot `at` on."""
    query_first, query_second, grad, unit, offset, sight = of_rows
    key_buffers, value_buffers, barriers = ring
    LOGITS: gl.constexpr = accumulator(KEYS)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LOGITS))
    none = gl.zeros([GROUP_ROWS, KEYS], gl.float32, LOGITS)
    stage = tile % value_buffers.shape[0]
    first_half, second_half = key_buffers.index(2 * stage), key_buffers.index(2 * stage + 1)
    wait_for(barriers, tile)
    logits = warpgroup_mma(query_first, first_half.permute((1, 0)), none, use_acc=False, is_async=True)
    logits = warpgroup_mma(query_second, second_half.permute((1, 0)), logits, is_async=True)
    values = value_buffers.index(stage).permute((1, 0))
    grad_weight = warpgroup_mma(grad, values, none, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    weight = gl.exp2(only_seen(logits * unit[:, None] + offset[:, None], key, at, sight, KEYS))
    return weight, warpgroup_mma_wait(0, deps=(grad_weight,))


@gluon.jit
def own_delta(tile, of_tiles, of_rows, ring):
    """<dO, O_l> of every row, by the scale's own softmax: offsets are minus its log-sum-exp."""
    end, count, near, far = of_tiles
    delta = gl.zeros_like(of_rows[4])
    skip(tile, 0, near, ring[2])
    for i in range(near, far):
        weight, grad_weight = weights_of_tile(tile + i, end - (i + 1) * KEYS, of_rows, ring)
        let_go(ring[2], tile + i)
        delta += gl.sum(weight * grad_weight, 1)
    skip(tile, far, count, ring[2])
    return delta


@gluon.jit
def weigh_scale(tile, of_tiles, of_rows, ring, own_lse, found, at_scale, at_branch, inside, SHAPE: gl.constexpr):
    """A scale's delta, where utilities alone weigh the scales; it is stored, as is what the utility gets of it."""
    query_first, query_second, grad, unit, offset, sight = of_rows
    own_sum = gl.load(own_lse + at_scale, mask=inside, other=0.0)
    delta = own_delta(tile, of_tiles, (query_first, query_second, grad, unit, -own_sum, sight), ring)
    gl.store(found.delta + at_scale, delta, mask=inside)
    if SHAPE.utilities:
        share = gl.where(sight[0] < sight[1], gl.exp2(offset + own_sum), 0.0)
        gl.store(found.utility_gradients + at_branch, share * delta, mask=inside)
        gl.store(found.shares + at_branch, share, mask=inside)
    return delta


@gluon.jit
def add_tile(tile, at, sums, delta, of_rows, ring, SUMS: gl.constexpr):
    """What a tile of keys from slot `at` on asks of a warp group's queries; with SUMS, also sums of dS and of P."""
    first, second, of_logits, of_weights = sums
    key_buffers, value_buffers, barriers = ring
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, first.type.layout, 2)
    weight, grad_weight = weights_of_tile(tile, at, of_rows, ring)
    grad_logits = weight * (grad_weight - delta[:, None])
    if SUMS:
        of_logits += gl.sum(grad_logits, 1)
        of_weights += gl.sum(weight, 1)
    stage = tile % value_buffers.shape[0]
    left = gl.convert_layout(grad_logits.to(key_buffers.dtype), OPERAND)
    first = warpgroup_mma(left, key_buffers.index(2 * stage), first, is_async=True)
    second = warpgroup_mma(left, key_buffers.index(2 * stage + 1), second, is_async=True)
    first, second, _left = warpgroup_mma_wait(0, deps=(first, second, left))
    let_go(barriers, tile)
    return first, second, of_logits, of_weights


@gluon.jit
def add_scale(tile, of_tiles, halves, delta, of_rows, ring, SUMS: gl.constexpr):
    """What a scale's keys ask of a warp group's queries, in halves; sums of dS and of P, or 0."""
    end, count, near, far = of_tiles
    first, second = halves
    of_logits, of_weights = gl.zeros_like(delta), gl.zeros_like(delta)
    skip(tile, 0, near, ring[2])
    for i in range(near, far):
        sums = (first, second, of_logits, of_weights)
        at = end - (i + 1) * KEYS
        first, second, of_logits, of_weights = add_tile(tile + i, at, sums, delta, of_rows, ring, SUMS)
    skip(tile, far, count, ring[2])
    return first, second, of_logits, of_weights


@gluon.jit
def turned_on(first, second, place, places, scale, SHAPE: gl.constexpr):
    """Halves of dq', turned from the angles of a scale to those of the next."""
    LAYOUT: gl.constexpr = first.type.layout
    SCALES: gl.constexpr = len(SHAPE.windows)
    channel = gl.arange(0, SHAPE.half, layout=gl.SliceLayout(0, LAYOUT))
    place = gl.convert_layout(place, gl.SliceLayout(1, LAYOUT))
    turn, _sign = turns_on(place, places.frequency, scale, channel, SCALES, SHAPE.half, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    return rotated(first, second, cosine, sine)


@gluon.jit
def store_halves(first, second, to, head, start, rows, HALF: gl.constexpr):
    """dq' of a warp group's rows to [n, t, d]."""
    row = gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, first.type.layout))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, first.type.layout))
    at = to + (head * rows + start).to(gl.int64) * (2 * HALF) + row[:, None] * (2 * HALF) + channel[None, :]
    inside = (start + row < rows)[:, None]
    gl.store(at, first, mask=inside)
    gl.store(at + HALF, second, mask=inside)


@gluon.jit
def slot_of(turn, GROUP: gl.constexpr):
    return SLOTS * GROUP + turn % SLOTS


@gluon.jit
def take(turn, barriers, GROUP: gl.constexpr):
    """Waits until a warp group's rows are there."""
    mbarrier.wait(barriers[0].index(slot_of(turn, GROUP)), (turn // SLOTS) & 1)


@gluon.jit
def give_back(turn, barriers, GROUP: gl.constexpr):
    """A warp group no longer reads its rows."""
    gl.thread_barrier()
    mbarrier.arrive(barriers[1].index(slot_of(turn, GROUP)), count=1)


@gluon.jit
def ask_work(work, turns, tile, given, own_lse, shared, SHAPE: gl.constexpr, SIZES: gl.constexpr, GROUP: gl.constexpr):
    """One warp group's part of a program's work; the numbers of the next queries and dO, and of the next tile."""
    LINES: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS))
    SCALES: gl.constexpr = len(SHAPE.windows)
    HALF: gl.constexpr = SHAPE.half
    WEIGHED: gl.constexpr = SHAPE.apart and not SIZES.each
    SUMS: gl.constexpr = SHAPE.utilities and not SHAPE.apart
    _queries, _keys, places, _grad_out, found = given
    of_queries, of_grads, ring = shared
    query_turn, grad_turn = turns
    start, own, head = rows_and_head(work, places, SIZES, GROUP)
    start, ends = ends_of(start, places, SIZES.rows)
    first_row, own_ends = ends_of(own, places, GROUP_ROWS)
    row = own + gl.arange(0, GROUP_ROWS, layout=LINES)
    inside, at_head = row < places.rows, head * places.rows
    document = gl.load(places.document_start + gl.minimum(row, places.rows - 1)).to(gl.int32)
    unit = gl.load(found.norms + at_head + row, mask=inside, other=0.0) * (LOG2_E / (2 * HALF) ** 0.5)
    delta = gl.zeros_like(unit)
    if not SHAPE.apart:
        delta = gl.load(found.delta + at_head + row, mask=inside, other=0.0)
    first = gl.zeros([GROUP_ROWS, HALF], gl.float32, accumulator(HALF))
    second = gl.zeros([GROUP_ROWS, HALF], gl.float32, accumulator(HALF))
    for scale in range(SCALES):
        of_tiles = tiles_of_group(start, ends, first_row, own_ends, scale, SHAPE)
        see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
        seen_from, seen_to = seen_by_whole_tile(first_row, own_ends, scale, SHAPE)
        sight = (see_from, see_to, 0, 0, seen_from, seen_to)
        at_scale = (head * SCALES + scale).to(gl.int64) * places.rows + row
        at_branch = (at_head.to(gl.int64) + row) * SHAPE.branches + scale
        offset = gl.load(found.offsets + at_scale, mask=inside, other=float("-inf"))
        if scale == 0 or not SHAPE.one_turn:
            take(query_turn, of_queries[1], GROUP)
        if scale == 0 or SIZES.each:
            take(grad_turn, of_grads[1], GROUP)
        slot, grad = slot_of(query_turn, GROUP), of_grads[0].index(slot_of(grad_turn, GROUP))
        query_first, query_second = of_queries[0].index(2 * slot), of_queries[0].index(2 * slot + 1)
        if SIZES.each:
            delta = gl.load(found.delta + at_scale, mask=inside, other=0.0)
        of_rows = (query_first, query_second, grad, unit, offset, sight)
        if WEIGHED:
            delta = weigh_scale(tile, of_tiles, of_rows, ring, own_lse, found, at_scale, at_branch, inside, SHAPE)
            tile += of_tiles[1]
        sums = add_scale(tile, of_tiles, (first, second), delta, of_rows, ring, SUMS)
        first, second, of_logits, of_weights = sums
        tile += of_tiles[1]
        if SUMS:
            gl.store(found.utility_gradients + at_branch, of_logits, mask=inside)
            gl.store(found.shares + at_branch, of_weights, mask=inside)
        if not SHAPE.one_turn or scale == SCALES - 1:
            give_back(query_turn, of_queries[1], GROUP)
            query_turn += 1
        if SIZES.each or scale == SCALES - 1:
            give_back(grad_turn, of_grads[1], GROUP)
            grad_turn += 1
        if not SHAPE.one_turn and scale < SCALES - 1:
            first, second = turned_on(first, second, row - document, places, scale, SHAPE)
    store_halves(first, second, found.turned_grads, head, own, places.rows, HALF)
    return query_turn, grad_turn, tile


@gluon.jit
def ask(given, own_lse, shared, SHAPE: gl.constexpr, SIZES: gl.constexpr, GROUP: gl.constexpr):
    """A consumer: its part of all work of a program."""
    tile, query_turn, grad_turn = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), work_count(given[0], given[2], SIZES), gl.num_programs(0)):
        turns = (query_turn, grad_turn)
        query_turn, grad_turn, tile = ask_work(work, turns, tile, given, own_lse, shared, SHAPE, SIZES, GROUP)


@gluon.jit
def query_gradient_by_groups_kernel(
    turned_rows,  # descriptor of [n L t, d]; with one turn of [n t, d]
    grad_rows,  # of dO [t, n d]; with SIZES.each, a head and scale is a head of its own
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
    places,
    grad_out,  # Rows
    own_lse,  # as of attend_kernel
    found,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
):
    operand: gl.constexpr = keys.prepared.dtype.element_ty
    STAGES: gl.constexpr = SIZES.stages
    query_buffers = gl.allocate_shared_memory(operand, [4 * SLOTS, GROUP_ROWS, SHAPE.half], turned_rows.layout)
    grad_buffers = gl.allocate_shared_memory(operand, [2 * SLOTS, GROUP_ROWS, 2 * SHAPE.half], grad_rows.layout)
    key_buffers = gl.allocate_shared_memory(operand, [2 * STAGES, KEYS, SHAPE.half], key_entries.layout)
    value_buffers = gl.allocate_shared_memory(operand, [STAGES, KEYS, 2 * SHAPE.half], value_0.layout)
    of_queries = (query_buffers, barrier_pairs(2 * SLOTS, 1))
    of_grads = (grad_buffers, barrier_pairs(2 * SLOTS, 1))
    shared = (of_queries, of_grads, (key_buffers, value_buffers, barrier_pairs(STAGES, 2)))
    fence_async_shared()
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    given = (queries, keys, places, grad_out, found)
    gl.warp_specialize(
        [
            (ask, (given, own_lse, shared, SHAPE, SIZES, 0)),
            (ask, (given, own_lse, shared, SHAPE, SIZES, 1)),
            (load, (given, (turned_rows, grad_rows, key_entries, values), shared, SHAPE, SIZES)),
        ],
        [4, 1],
        [240, 24],
    )

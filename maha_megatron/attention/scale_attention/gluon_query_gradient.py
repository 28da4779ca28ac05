"""The first kernel of backward for Hopper: what triton_query_gradient.py computes, by warp groups that share keys.

Programs, work, loader and ring are those of gluon_forward.py; the loader also fetches dO, which stays in shared memory
as an operand. Every tile of keys takes part in two products, logits and dq', in halves of channels; the halves of dq'
are accumulators of their own, so that turning them on from scale to scale stays within a thread.
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

from maha_megatron.attention.scale_attention.gluon_forward import (
    GROUP_ROWS,
    KEYS,
    accumulator,
    barrier_pairs,
    ends_of,
    group_barrier,
    let_go,
    load_queries,
    load_tile,
    of_head,
    operand_of,
    query_norms,
    rows_and_head,
    skip,
    tiles_of_group,
    turned_queries,
    wait_for,
    work_count,
    written_rows,
)
from maha_megatron.attention.scale_attention.triton_forward import (
    LOG2_E,
    at_lines,
    only_seen,
    seen_by_whole_tile,
    visible_to_tile,
)
from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, rotated, turns, turns_on
from maha_megatron.attention.triton_slots import entries_before, past_of, visible, window_of


@gluon.jit
def load_output_gradients(work, turn, grad_out, grad_rows, places, buffers, barriers, SIZES: gl.constexpr):
    """Both warp groups' dO; rows behind the last are zeros."""
    for group in gl.static_range(2):
        _start, row, head = rows_and_head(work, places, SIZES, group)
        full = barriers[0].index(group)
        mbarrier.wait(barriers[1].index(group), (turn & 1) ^ 1)
        mbarrier.expect(full, grad_rows.block_type.nbytes)
        at = [row, head * grad_out.head_stride]
        tma.async_copy_global_to_shared(grad_rows, at, full, buffers.index(group))


@gluon.jit
def load(
    given,
    described,  # rows of queries and of dO, entries of keys, and of every scale entries of values
    shared,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
):
    """The loader, as that of forward."""
    queries, keys, places, grad_out = given
    buffers, barriers = shared
    query_rows, grad_rows, key_entries, values = described
    tile, turn = gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), work_count(queries, places, SIZES), gl.num_programs(0)):
        load_queries(work, turn, queries, query_rows, places, buffers[0], barriers[0], SHAPE, SIZES)
        load_output_gradients(work, turn, grad_out, grad_rows, places, buffers[3], barriers[2], SIZES)
        turn += 1
        start, _row, head = rows_and_head(work, places, SIZES, 0)
        group = head // queries.n_per_group
        start, ends = ends_of(start, places, SIZES.rows)
        for scale in gl.static_range(len(SHAPE.windows)):
            begin, end = visible_to_tile(start, ends, scale, SHAPE)
            past = past_of(scale, SHAPE)
            key_row = group * keys.total + entries_before(scale, places.rows, SHAPE) + past
            channel = group * keys.raw_values.group_strides[scale]
            of_scale, ring = (key_entries, values[scale]), ((buffers[1], buffers[2]), barriers[1])
            for i in range(gl.cdiv(end - begin, KEYS)):
                at = end - (i + 1) * KEYS
                load_tile(tile, of_scale, key_row + at, (past + at, channel), *ring, SHAPE.half)
                tile += 1


@gluon.jit
def deltas(out, grad, start, head, places, LINES: gl.constexpr):
    """<dO, out> of every row, dO from shared memory."""
    WRITTEN: gl.constexpr = written_rows(grad.shape[1])
    line = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, WRITTEN))
    channel = gl.arange(0, grad.shape[1], layout=gl.SliceLayout(0, WRITTEN))
    there = (line < places.rows)[:, None]
    outputs = gl.load(at_lines(out, start, line, head, channel), mask=there, other=0.0).to(gl.float32)
    return gl.convert_layout(gl.sum(grad.load(WRITTEN).to(gl.float32) * outputs, 1), LINES)


@gluon.jit
def store_turned(query, turned, lines, start, rows, HALF: gl.constexpr):
    """A warp group's turned queries, from shared memory to lines of [n, L, t, d], of which `lines` is row 0's."""
    WRITTEN: gl.constexpr = written_rows(HALF)
    row = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, WRITTEN))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, WRITTEN))
    at = turned + lines * (2 * HALF) + row[:, None] * (2 * HALF) + channel[None, :]
    gl.store(at, query[0].load(WRITTEN), mask=(row < rows)[:, None])
    gl.store(at + HALF, query[1].load(WRITTEN), mask=(row < rows)[:, None])


@gluon.jit
def turned_on(first, second, place, places, scale, SHAPE: gl.constexpr):
    """dq' in halves, turned from the angles of the scale before to those of this one; at scale 0 from none."""
    LAYOUT: gl.constexpr = first.type.layout
    channel = gl.arange(0, SHAPE.half, layout=gl.SliceLayout(0, LAYOUT))
    place = gl.convert_layout(place, gl.SliceLayout(1, LAYOUT))
    cosine, sine = cosine_sine(turns_on(place, places.frequency, scale, channel, SHAPE.half, SHAPE.fast), SHAPE.fast)
    return rotated(first, second, cosine, sine)


@gluon.jit
def add_scale(
    grad_query,  # in halves
    of_rows,  # turned queries in halves, what scales and what is added to logits, delta, what rows see, and dO
    of_tiles,
    ring,
):
    """What one scale's keys ask of turned queries, and the sums of dS and of P of every row."""
    query, unit, offset, delta, sight, grad = of_rows
    grad_first, grad_second = grad_query
    key_buffers, value_buffers, barriers = ring
    LOGITS: gl.constexpr = accumulator(KEYS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, grad_first.type.layout, 2)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LOGITS))
    none = gl.zeros([GROUP_ROWS, KEYS], gl.float32, LOGITS)
    of_logits, of_weights = gl.zeros_like(delta), gl.zeros_like(delta)
    first, last, zero, end = of_tiles
    for tile in range(first, last):
        at, stage = end - (tile - zero + 1) * KEYS, tile % value_buffers.shape[0]
        first_half, second_half = key_buffers.index(2 * stage), key_buffers.index(2 * stage + 1)
        wait_for(barriers, tile)
        logits = warpgroup_mma(query[0], first_half.permute((1, 0)), none, use_acc=False, is_async=True)
        logits = warpgroup_mma(query[1], second_half.permute((1, 0)), logits, is_async=True)
        values = value_buffers.index(stage).permute((1, 0))
        grad_weight = warpgroup_mma(grad, values, none, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=(logits,))
        logits = logits * unit[:, None] + offset[:, None]
        weight = gl.exp2(only_seen(logits, key, at, sight, KEYS))
        grad_weight = warpgroup_mma_wait(0, deps=(grad_weight,))
        grad_logits = weight * (grad_weight - delta[:, None])
        of_logits += gl.sum(grad_logits, 1)
        of_weights += gl.sum(weight, 1)
        grad_logits = gl.convert_layout(grad_logits.to(value_buffers.dtype), OPERAND)
        grad_first = warpgroup_mma(grad_logits, first_half, grad_first, is_async=True)
        grad_second = warpgroup_mma(grad_logits, second_half, grad_second, is_async=True)
        grad_first, grad_second, grad_logits = warpgroup_mma_wait(0, deps=(grad_first, grad_second, grad_logits))
        let_go(barriers, tile)
    return grad_first, grad_second, of_logits, of_weights


@gluon.jit
def at_part(made, queries, start, head, which, SHAPE: gl.constexpr):
    """Pointer to channel 0 of what 64 rows have of a head: gain, rho of every scale, or beta."""
    KINDS: gl.constexpr = 2 + len(SHAPE.windows) if SHAPE.utilities else 1
    line = (start // GROUP_ROWS * queries.n + head).to(gl.int64) * KINDS + which
    return made.learned_parts + line * (2 * SHAPE.half)


@gluon.jit
def through_utilities(halves, normal, total, row, start, head, queries, places, made, SHAPE: gl.constexpr):
    """Halves of the gradient of q', what utilities ask of it added; their parts are stored."""
    first, second = halves
    HALF: gl.constexpr = SHAPE.half
    SCALES: gl.constexpr = len(SHAPE.windows)
    LAYOUT: gl.constexpr = first.type.layout
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    inside, mine = row < places.rows, start < places.rows
    for scale in range(SCALES):
        at = (head * SCALES + scale).to(gl.int64) * places.rows + row
        grad = gl.load(made.utility_gradients + at, mask=inside, other=0.0)
        # a change of all utilities alike changes nothing: what rounding left in that direction is taken out
        grad -= gl.load(made.shares + at, mask=inside, other=0.0) * total
        gl.store(at_part(made, queries, start, head, 1 + SCALES, SHAPE) + scale, gl.sum(grad, 0), mask=mine)
        part = at_part(made, queries, start, head, 1 + scale, SHAPE) + channel
        gl.store(part, gl.sum(grad[:, None] * normal[0], 0), mask=(channel < HALF) & mine)
        gl.store(part + HALF, gl.sum(grad[:, None] * normal[1], 0), mask=(channel < HALF) & mine)
        rho = queries.rho + scale * queries.n * 2 * HALF
        first += grad[:, None] * of_head(rho, head, channel, 2 * HALF)
        second += grad[:, None] * of_head(rho, head, channel + HALF, 2 * HALF)
    return first, second


@gluon.jit
def store_gradients(halves, normal, norm, total, place, row, start, head, queries, places, made, SHAPE: gl.constexpr):
    """Back from the last scale's angles, through utilities, gain and normalisation."""
    first, second = halves
    HALF: gl.constexpr = SHAPE.half
    LAYOUT: gl.constexpr = first.type.layout
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    turn = turns(place, places.frequency, len(SHAPE.windows) - 1, channel, HALF, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    first, second = rotated(first, second, cosine, -sine)
    first, second = first * (2 * HALF) ** -0.5, second * (2 * HALF) ** -0.5
    if SHAPE.utilities:
        group_barrier()  # what is read now was written before, perhaps by other threads
        of_rows = (total, row, start, head, queries, places, made)
        first, second = through_utilities((first, second), normal, *of_rows, SHAPE)
    part, mine = at_part(made, queries, start, head, 0, SHAPE) + channel, (channel < HALF) & (start < places.rows)
    gl.store(part, gl.sum(first * normal[0], 0), mask=mine)
    gl.store(part + HALF, gl.sum(second * normal[1], 0), mask=mine)
    first *= of_head(queries.gain, head, channel, 2 * HALF)
    second *= of_head(queries.gain, head, channel + HALF, 2 * HALF)
    along = ((gl.sum(first * normal[0], 1) + gl.sum(second * normal[1], 1)) / (2 * HALF))[:, None]
    to, there = at_lines(made.grad_q, start, row, head, channel), (row < places.rows)[:, None]
    stored = made.grad_q.tensor.dtype.element_ty
    gl.store(to, ((first - normal[0] * along) * norm[:, None]).to(stored), mask=there)
    gl.store(to + HALF, ((second - normal[1] * along) * norm[:, None]).to(stored), mask=there)


@gluon.jit
def finish(
    halves, raw, norm, total, of_rows, queries, places, made, barriers, SHAPE: gl.constexpr, GROUP: gl.constexpr
):
    """Lets go of a work's rows, after the last reads of them, and stores what was found."""
    HALVES: gl.constexpr = halves[0].type.layout
    ACROSS: gl.constexpr = gl.SliceLayout(1, HALVES)
    place, row, start, head = of_rows
    place, row = gl.convert_layout(place, ACROSS), gl.convert_layout(row, ACROSS)
    norm, total = gl.convert_layout(norm, ACROSS), gl.convert_layout(total, ACROSS)
    normal = (raw[0].load(HALVES).to(gl.float32) * norm[:, None], raw[1].load(HALVES).to(gl.float32) * norm[:, None])
    fence_async_shared()
    group_barrier()
    mbarrier.arrive(barriers[0][1].index(GROUP), count=1)
    mbarrier.arrive(barriers[2][1].index(GROUP), count=1)
    store_gradients(halves, normal, norm, total, place, row, start, head, queries, places, made, SHAPE)


@gluon.jit
def begin_scale(halves, of_queries, query, own_lse, made, start, row, SHAPE: gl.constexpr):
    """Turns queries and dq' to a scale's angles; stores queries and offsets, and returns row 0's line of them too."""
    _raw, _queries, head, place, _norm, places, scale = of_queries
    line = (head * len(SHAPE.windows) + scale).to(gl.int64) * places.rows
    first, second, raised = turned_queries(*of_queries, query[0].dtype, SHAPE, operand_of(KEYS))
    query[0].store(first)
    query[1].store(second)
    fence_async_shared()
    group_barrier()
    store_turned(query, made.turned, line, start, places.rows, SHAPE.half)
    offset = raised - own_lse
    gl.store(made.offsets + line + row, offset, mask=row < places.rows)
    return turned_on(halves[0], halves[1], place, places, scale, SHAPE), offset, line


@gluon.jit
def work_of_group(
    work,
    turn,
    tile,
    given,
    outputs,
    shared,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One warp group's part of a program's work; the number of the next tile."""
    HALF: gl.constexpr = SHAPE.half
    LINES: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS))
    queries, _keys, places, _grad_out = given
    out, lse, made = outputs
    buffers, barriers = shared
    ring = (buffers[1], buffers[2], barriers[1])
    raw = (buffers[0].index(2 * GROUP), buffers[0].index(2 * GROUP + 1))
    query = (buffers[4].index(2 * GROUP), buffers[4].index(2 * GROUP + 1))
    start, own, head = rows_and_head(work, places, SIZES, GROUP)
    start, ends = ends_of(start, places, SIZES.rows)
    first, own_ends = ends_of(own, places, GROUP_ROWS)
    row = own + gl.arange(0, GROUP_ROWS, layout=LINES)
    inside, of_head_row = row < places.rows, head * places.rows + row
    place = row - gl.load(places.document_start + gl.minimum(row, places.rows - 1)).to(gl.int32)
    own_lse = gl.load(lse + of_head_row, mask=inside, other=0.0)
    mbarrier.wait(barriers[0][0].index(GROUP), turn & 1)
    mbarrier.wait(barriers[2][0].index(GROUP), turn & 1)
    delta = deltas(out, buffers[3].index(GROUP), own, head, places, LINES)
    gl.store(made.delta + of_head_row, delta, mask=inside)
    norm = query_norms(raw, SHAPE, operand_of(KEYS), LINES)
    gl.store(made.norms + of_head_row, norm, mask=inside)
    unit, total = norm * (LOG2_E / (2 * HALF) ** 0.5), gl.zeros_like(norm)
    grad_first = gl.zeros([GROUP_ROWS, HALF], gl.float32, accumulator(HALF))
    grad_second = grad_first
    for scale in range(len(SHAPE.windows)):
        tiles = tiles_of_group(start, ends, first, own_ends, scale, SHAPE)
        see_from, see_to = visible(row, row - place, window_of(scale, SHAPE), SHAPE.ratio, scale)
        seen_from, seen_to = seen_by_whole_tile(first, own_ends, scale, SHAPE)
        of_queries, halves = (raw, queries, head, place, norm, places, scale), (grad_first, grad_second)
        halves, offset, line = begin_scale(halves, of_queries, query, own_lse, made, own, row, SHAPE)
        skip(tile, tile + tiles[2], ring)
        of_rows = (query, unit, offset, delta, (see_from, see_to, 0, 0, seen_from, seen_to), buffers[3].index(GROUP))
        added = add_scale(halves, of_rows, (tile + tiles[2], tile + tiles[3], tile, tiles[0]), ring)
        grad_first, grad_second = added[0], added[1]
        skip(tile + tiles[3], tile + tiles[1], ring)
        tile += tiles[1]
        if SHAPE.utilities:
            gl.store(made.utility_gradients + line + row, added[2], mask=inside)
            gl.store(made.shares + line + row, added[3], mask=inside)
            total += added[2]
    of_rows = (place, row, own, head)
    finish((grad_first, grad_second), raw, norm, total, of_rows, queries, places, made, barriers, SHAPE, GROUP)
    return tile


@gluon.jit
def make(given, outputs, shared, SHAPE: gl.constexpr, SIZES: gl.constexpr, GROUP: gl.constexpr):
    """A consumer: its part of all work of a program."""
    tile, turn = gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), work_count(given[0], given[2], SIZES), gl.num_programs(0)):
        tile = work_of_group(work, turn, tile, given, outputs, shared, SHAPE, SIZES, GROUP)
        turn += 1


@gluon.jit
def query_gradient_by_groups_kernel(
    query_rows,  # descriptor of [t, n d]
    grad_rows,  # of dO
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
    out,  # Rows
    lse,
    grad_out,  # Rows
    made,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
):
    operand: gl.constexpr = keys.prepared.dtype.element_ty
    STAGES: gl.constexpr = SIZES.stages
    query_buffers = gl.allocate_shared_memory(operand, [4, GROUP_ROWS, SHAPE.half], query_rows.layout)
    key_buffers = gl.allocate_shared_memory(operand, [2 * STAGES, KEYS, SHAPE.half], key_entries.layout)
    value_buffers = gl.allocate_shared_memory(operand, [STAGES, KEYS, 2 * SHAPE.half], value_0.layout)
    grad_buffers = gl.allocate_shared_memory(operand, [2, GROUP_ROWS, 2 * SHAPE.half], grad_rows.layout)
    turned = gl.allocate_shared_memory(operand, [4, GROUP_ROWS, SHAPE.half], query_rows.layout)
    buffers = (query_buffers, key_buffers, value_buffers, grad_buffers, turned)
    barriers = (barrier_pairs(2, 1), barrier_pairs(STAGES, 2), barrier_pairs(2, 1))
    fence_async_shared()
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    given, shared = (queries, keys, places, grad_out), (buffers, barriers)
    gl.warp_specialize(
        [
            (make, (given, (out, lse, made), shared, SHAPE, SIZES, 0)),
            (make, (given, (out, lse, made), shared, SHAPE, SIZES, 1)),
            (load, (given, (query_rows, grad_rows, key_entries, values), shared, SHAPE, SIZES)),
        ],
        [4, 1],
        [240, 24],
    )

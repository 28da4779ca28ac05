"""The forward kernel for Hopper: what triton_forward.py and triton_scales_forward.py compute, by warp groups that share
keys.

A program has two warp groups of consumers, with 64 rows each, and a warp that loads for both. Keys and values come in
tiles of 64 slots through a ring of stages in shared memory, of which each has both of a tile: two barriers a tile. A
consumer passes over tiles that none of its rows sees. Rows are 128 of one head, or 64 of two heads of one KV group.

    loader       q q | scale 0: kv kv kv kv | scale 1: kv kv kv | ...            waits until a stage is empty
    consumers    turn q for scale 0, attend to its tiles; turn q for scale 1 ... wait until it is full

Where queries turn alike for every scale, they are turned once, before scale 0, and utilities of all scales are found
with them, so that raw queries are read no more.

Tiles are counted back from the last slot that a row of the program sees, so that no slot behind it is read: its values
might be no numbers, which a weight of 0 would not undo. Of up to 63 slots in front of the first that some row sees,
which the portable kernel does not read, values are read and get that weight: they have to be numbers.

Channels of queries and keys are read in halves. A program does one work after another, and the loader fetches of the
next one what there is room for: its queries as soon as this one's are turned for the last time.

Turned queries are operands in shared memory. In registers ptxas (12.8 to 13.0) may give them and weights the same ones,
and a scale's second tile then meets weights in place of queries; it did with 64 channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from maha_megatron.attention.scale_attention.gluon_loading import (
    GROUP_ROWS,
    KEYS,
    barrier_pairs,
    ends_of,
    let_go,
    load,
    rows_and_head,
    skip,
    wait_for,
    work_count,
)
from maha_megatron.attention.scale_attention.triton_forward import (
    FARTHEST,
    LOG2_E,
    at_lines,
    log_of_sum,
    only_seen,
    seen_by_whole_tile,
    visible_to_tile,
    weighed,
)
from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    inverse_norm,
    rotated,
    turns,
)
from maha_megatron.attention.triton_slots import visible, window_of
from maha_megatron.scales import MAX_SCALES

LN_2 = gl.constexpr(0.6931471805599453)
OF_SCALES = gl.constexpr(MAX_SCALES)


@gluon.constexpr_function
def accumulator(columns):
    """How a warp group holds [64, columns] of fp32."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand_of(columns):
    """How a warp group holds the left operand, of 16-bit numbers, of a product [64, columns]."""
    parent = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])
    return gl.DotOperandLayout(operand_index=0, parent=parent, k_width=2)


@gluon.constexpr_function
def written_rows(width):
    """How a warp group writes [64, width] to memory: 16 bytes a thread, side by side."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def query_norms(raw, SHAPE: gl.constexpr, LAYOUT: gl.constexpr, LINES: gl.constexpr):
    """1 / the root mean square of raw queries."""
    first, second = raw[0].load(LAYOUT).to(gl.float32), raw[1].load(LAYOUT).to(gl.float32)
    return gl.convert_layout(inverse_norm(first, second, SHAPE.epsilon, SHAPE.half), LINES)


@gluon.jit
def of_head(pointer, head, channel, WIDTH: gl.constexpr):
    """A head's vector [1, channels]."""
    return gl.load(pointer + head * WIDTH + channel).to(gl.float32)[None, :]


@gluon.jit
def gained_queries(raw, queries, head, SHAPE: gl.constexpr):
    """Raw queries times their gain, in halves."""
    HALF: gl.constexpr = SHAPE.half
    LAYOUT: gl.constexpr = operand_of(KEYS)
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    first = raw[0].load(LAYOUT).to(gl.float32) * of_head(queries.gain, head, channel, 2 * HALF)
    return first, raw[1].load(LAYOUT).to(gl.float32) * of_head(queries.gain, head, channel + HALF, 2 * HALF)


@gluon.jit
def utility(gained, queries, head, norm, scale, SHAPE: gl.constexpr):
    """<rho_l, q> + beta_l in units of log 2; of queries times their gain, in halves."""
    HALF: gl.constexpr = SHAPE.half
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, operand_of(KEYS)))
    rho = queries.rho + scale * queries.n * 2 * HALF
    learned = gl.sum(gained[0] * of_head(rho, head, channel, 2 * HALF), 1)
    learned += gl.sum(gained[1] * of_head(rho, head, channel + HALF, 2 * HALF), 1)
    learned = gl.convert_layout(learned, norm.type.layout) * norm
    return (learned + gl.load(queries.beta + scale * queries.n + head).to(gl.float32)) * LOG2_E


@gluon.jit
def write_turned(gained, turned, place, places, scale, SHAPE: gl.constexpr):
    """Writes queries times their gain, rotated for a scale, in halves."""
    HALF: gl.constexpr = SHAPE.half
    LAYOUT: gl.constexpr = operand_of(KEYS)
    operand: gl.constexpr = turned[0].dtype
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    place = gl.convert_layout(place, gl.SliceLayout(1, LAYOUT))
    turn = turns(place, places.frequency, scale, channel, HALF, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    first, second = rotated(gained[0], gained[1], cosine, sine)
    turned[0].store(first.to(operand))
    turned[1].store(second.to(operand))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def is_scale(scale):
    """Which column of [rows, scales] is a scale's: [1, scales]."""
    return gl.arange(0, OF_SCALES, layout=gl.SliceLayout(0, accumulator(OF_SCALES)))[None, :] == scale


@gluon.jit
def turn_for_all(raw, turned, of_lines, places, SHAPE: gl.constexpr):
    """Turned queries, which are the same for every scale, into shared memory; utilities [rows, scales], 0 without any.

    Those cost a thread four registers and no barrier, whichever scale is read of them. `raw`: the halves, and the
    barrier at which to arrive when they are read for the last time, so that the next work's may come.
    """
    queries, head, row, document, norm = of_lines
    gained = gained_queries(raw, queries, head, SHAPE)
    utilities = gl.zeros([GROUP_ROWS, OF_SCALES], gl.float32, accumulator(OF_SCALES))
    if SHAPE.utilities:
        for scale in range(len(SHAPE.windows)):
            raised = utility(gained, queries, head, norm, scale, SHAPE)
            raised = gl.convert_layout(raised, gl.SliceLayout(1, utilities.type.layout))[:, None]
            utilities = gl.where(is_scale(scale), raised, utilities)
    write_turned(gained, turned, row - document, places, 0, SHAPE)
    mbarrier.arrive(raw[2], count=1)
    return utilities


@gluon.jit
def turn_for_scale(raw, turned, utilities, of_lines, places, scale, SHAPE: gl.constexpr):
    """A scale's turned queries into shared memory, unless `turn_for_all` did that for all; the scale's utilities.

    `raw`: as there.
    """
    queries, head, row, document, norm = of_lines
    raised = gl.zeros_like(norm)
    if SHAPE.one_turn:
        if SHAPE.utilities:
            raised = gl.sum(gl.where(is_scale(scale), utilities, 0.0), 1)
            raised = gl.convert_layout(raised, norm.type.layout)
    else:
        gained = gained_queries(raw, queries, head, SHAPE)
        if SHAPE.utilities:
            raised = utility(gained, queries, head, norm, scale, SHAPE)
        write_turned(gained, turned, row - document, places, scale, SHAPE)
        if scale == len(SHAPE.windows) - 1:
            mbarrier.arrive(raw[2], count=1)
    return raised


@gluon.jit
def tiles_of_group(start, ends, own, own_ends, scale, SHAPE: gl.constexpr):
    """Of a scale's tiles, counted back from slot `end`: their number, and [near, far) that a warp group's rows see."""
    begin, end = visible_to_tile(start, ends, scale, SHAPE)
    own_begin, own_end = visible_to_tile(own, own_ends, scale, SHAPE)
    near = (end - own_end) // KEYS
    far = gl.where(own_begin < own_end, gl.cdiv(end - own_begin, KEYS), near)
    return end, gl.cdiv(end - begin, KEYS), near, far


@gluon.jit
def weights_of(logits, of_rows, key, at, top, mass, part, PART: gl.constexpr):
    """A tile into the running maximum and sums: its weights, and by how much what came before shrinks."""
    _queries, raised, unit, sight = of_rows
    logits = only_seen(logits, key, at, sight, KEYS)
    higher = gl.maximum(top, gl.max(logits, 1) * unit + raised)
    weight = gl.exp2(logits * unit[:, None] + (raised - higher)[:, None])
    shrink = gl.exp2(top - higher)
    added = gl.sum(weight, 1)
    if PART:
        part = part * shrink + added
    return weight, shrink, higher, mass * shrink + added, part


@gluon.jit
def attend_scale(
    of_rows,  # turned queries in halves, what raises and what scales logits, and what rows see
    of_tiles,  # those seen, [first, last); tile number `zero` lies right before slot `end`
    softmax,
    part,
    ring,
    PART: gl.constexpr,
):
    """One scale's keys into a running softmax; as `attend_scale` of triton_forward.py."""
    top, mass, fused = softmax
    key_buffers, value_buffers, barriers = ring
    LOGITS: gl.constexpr = accumulator(KEYS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, fused.type.layout, 2)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, LOGITS))
    none = gl.zeros([GROUP_ROWS, KEYS], gl.float32, LOGITS)
    first, last, zero, end = of_tiles
    for tile in range(first, last):
        at, stage = end - (tile - zero + 1) * KEYS, tile % value_buffers.shape[0]
        wait_for(barriers, tile)
        first_half, second_half = key_buffers.index(2 * stage), key_buffers.index(2 * stage + 1)
        logits = warpgroup_mma(of_rows[0][0], first_half.permute((1, 0)), none, use_acc=False, is_async=True)
        logits = warpgroup_mma(of_rows[0][1], second_half.permute((1, 0)), logits, is_async=True)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        weight, shrink, top, mass, part = weights_of(logits, of_rows, key, at, top, mass, part, PART)
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, fused.type.layout))[:, None]
        weight = gl.convert_layout(weight.to(value_buffers.dtype), OPERAND)
        fused = warpgroup_mma(weight, value_buffers.index(stage), fused * shrink)
        let_go(barriers, tile)
    return (top, mass, fused), part


@gluon.jit
def write(fused, mass, out, head, start, places, SHAPE: gl.constexpr):
    """A warp group's outputs: sums of values over their mass, 0 where there is none."""
    WRITTEN: gl.constexpr = written_rows(2 * SHAPE.half)
    fused *= gl.convert_layout(1 / gl.where(mass > 0, mass, 1.0), gl.SliceLayout(1, fused.type.layout))[:, None]
    fused = gl.convert_layout(fused.to(out.tensor.dtype.element_ty), WRITTEN)
    line = start + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, WRITTEN))
    channel = gl.arange(0, 2 * SHAPE.half, layout=gl.SliceLayout(0, WRITTEN))
    gl.store(at_lines(out, start, line, head, channel), fused, mask=(line < places.rows)[:, None])


@gluon.jit
def write_scale(softmax, raised, outputs, n, head, start, row, places, scale, SHAPE: gl.constexpr):
    """A scale's outputs, log-sum-exps and utilities: what attend_scales_kernel writes."""
    top, mass, fused = softmax
    SCALES: gl.constexpr = len(SHAPE.windows)
    at = (row.to(gl.int64) * n + head) * SCALES + scale
    gl.store(outputs[1] + at, log_of_sum(top, mass) * LN_2, mask=row < places.rows)
    if SHAPE.utilities:
        gl.store(outputs[2] + at, raised * LN_2, mask=row < places.rows)
    write(fused, mass, outputs[0], head * SCALES + scale, start, places, SHAPE)


@gluon.jit
def add_scale(total, softmax, raised, outputs, head, row, places, scale, SHAPE: gl.constexpr):
    """A scale's own softmax into the sum of all scales' outputs; its log-sum-exp is written."""
    top, mass, fused = total
    own_top, own_mass, own = softmax
    COLUMNS: gl.constexpr = gl.SliceLayout(1, fused.type.layout)
    top, mass, shrink, factor = weighed(top, mass, own_mass, raised)
    fused = fused * gl.convert_layout(shrink, COLUMNS)[:, None] + own * gl.convert_layout(factor, COLUMNS)[:, None]
    at = (head * len(SHAPE.windows) + scale).to(gl.int64) * places.rows + row
    gl.store(outputs[3] + at, gl.where(own_mass != 0, log_of_sum(own_top, own_mass), 0.0), mask=row < places.rows)
    return top, mass, fused


@gluon.jit
def begun(WIDTH: gl.constexpr, LINES: gl.constexpr):
    """A softmax of nothing: its maximum, its sum, and its sum of values."""
    none = gl.zeros([GROUP_ROWS], gl.float32, LINES)
    return none + FARTHEST, none, gl.zeros([GROUP_ROWS, WIDTH], gl.float32, accumulator(WIDTH))


@gluon.jit
def attend_work(
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
    LINES: gl.constexpr = gl.SliceLayout(1, accumulator(KEYS))
    SCALES: gl.constexpr = len(SHAPE.windows)
    PART: gl.constexpr = outputs[2] is not None and not SIZES.each
    queries, _keys, places = given
    buffers, barriers = shared
    ring = (buffers[1], buffers[2], barriers[1])
    raw = (buffers[0].index(2 * GROUP), buffers[0].index(2 * GROUP + 1), barriers[0][1].index(GROUP))
    query = (buffers[3].index(2 * GROUP), buffers[3].index(2 * GROUP + 1))
    start, own, head = rows_and_head(work, places, SIZES, GROUP)
    start, ends = ends_of(start, places, SIZES.rows)
    first, own_ends = ends_of(own, places, GROUP_ROWS)
    row = own + gl.arange(0, GROUP_ROWS, layout=LINES)
    document = gl.load(places.document_start + gl.minimum(row, places.rows - 1)).to(gl.int32)
    mbarrier.wait(barriers[0][0].index(GROUP), turn & 1)
    norm = query_norms(raw, SHAPE, operand_of(KEYS), LINES)
    unit, none = norm * (LOG2_E / (2 * SHAPE.half) ** 0.5), gl.zeros_like(norm)
    total = begun(2 * SHAPE.half, LINES)
    of_lines = (queries, head, row, document, norm)
    utilities = turn_for_all(raw, query, of_lines, places, SHAPE) if SHAPE.one_turn else none
    for scale in range(SCALES):
        end, count, near, far = tiles_of_group(start, ends, first, own_ends, scale, SHAPE)
        see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
        seen_from, seen_to = seen_by_whole_tile(first, own_ends, scale, SHAPE)
        raised = turn_for_scale(raw, query, utilities, of_lines, places, scale, SHAPE)
        skip(0, tile, tile + near, ring[2])
        of_rows = (query, none if SHAPE.apart else raised, unit, (see_from, see_to, 0, 0, seen_from, seen_to))
        softmax = begun(2 * SHAPE.half, LINES) if SHAPE.apart else total
        of_tiles = (tile + near, tile + far, tile, end)
        softmax, part = attend_scale(of_rows, of_tiles, softmax, none, ring, PART and not SHAPE.apart)
        skip(0, tile + far, tile + count, ring[2])
        tile += count
        if SIZES.each:
            write_scale(softmax, raised, outputs, queries.n, head, own, row, places, scale, SHAPE)
        elif SHAPE.apart:
            total = add_scale(total, softmax, raised, outputs, head, row, places, scale, SHAPE)
        else:
            total = softmax
        if PART:
            part = gl.where(softmax[1] != 0, raised, float("-inf")) if SHAPE.apart else log_of_sum(softmax[0], part)
            at_part = (row.to(gl.int64) * queries.n + head) * SCALES + scale
            gl.store(outputs[2] + at_part, part, mask=row < places.rows)
    if not SIZES.each:
        gl.store(outputs[1] + head * places.rows + row, total[0] + gl.log2(total[1]), mask=row < places.rows)
        write(total[2], total[1], outputs[0], head, own, places, SHAPE)
    return tile


@gluon.jit
def attend(given, outputs, shared, SHAPE: gl.constexpr, SIZES: gl.constexpr, GROUP: gl.constexpr):
    """A consumer: its part of all work of a program."""
    tile, turn = gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), work_count(given[0], given[2], SIZES), gl.num_programs(0)):
        tile = attend_work(work, turn, tile, given, outputs, shared, SHAPE, SIZES, GROUP)
        turn += 1


@gluon.jit
def attend_by_groups_kernel(
    query_rows,  # descriptor of [t, n d]
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
    out,  # as of attend_kernel; of attend_scales_kernel where outputs of every scale are asked for: Rows of heads and
    lse,  # scales, log-sum-exps
    scale_lse,  # and utilities
    own_lse,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
):
    operand: gl.constexpr = keys.prepared.dtype.element_ty
    STAGES: gl.constexpr = SIZES.stages
    query_buffers = gl.allocate_shared_memory(operand, [4, GROUP_ROWS, SHAPE.half], query_rows.layout)
    key_buffers = gl.allocate_shared_memory(operand, [2 * STAGES, KEYS, SHAPE.half], key_entries.layout)
    value_buffers = gl.allocate_shared_memory(operand, [STAGES, KEYS, 2 * SHAPE.half], value_0.layout)
    turned = gl.allocate_shared_memory(operand, [4, GROUP_ROWS, SHAPE.half], query_rows.layout)
    buffers = (query_buffers, key_buffers, value_buffers, turned)
    barriers = (barrier_pairs(2, 1), barrier_pairs(STAGES, 2))
    fence_async_shared()
    values = (value_0, value_1, value_2, value_3, value_4, value_5, value_6, value_7)
    given, shared, made = (queries, keys, places), (buffers, barriers), (out, lse, scale_lse, own_lse)
    gl.warp_specialize(
        [
            (attend, (given, made, shared, SHAPE, SIZES, 0)),
            (attend, (given, made, shared, SHAPE, SIZES, 1)),
            (load, (given, (query_rows, key_entries, values), shared, SHAPE, SIZES)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread: of a consumer, the other has as many, and of the loader
    )

"""The loading warp of gluon_forward.py, and what it and the consumers agree on: work, stages and barriers.

gluon_key_gradient.py has a loader of its own, and shares stages and barriers.

Queries, keys and values come by TMA, as descriptors say how they lie in memory; a barrier says that a stage is full,
another that no consumer reads it any longer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from maha_megatron.attention.scale_attention.triton_forward import visible_to_tile
from maha_megatron.attention.triton_slots import entries_before, past_of

GROUP_ROWS = gl.constexpr(64)  # of one warp group: what one matrix instruction takes
KEYS = gl.constexpr(64)  # of a tile


@gluon.jit
def work_count(queries, places, SIZES: gl.constexpr):
    return gl.cdiv(places.rows, SIZES.rows) * (queries.n // SIZES.heads)


@gluon.jit
def rows_and_head(work, places, SIZES: gl.constexpr, GROUP: gl.constexpr):
    """Of a program's work: its first row, and the first row and the head of one of its warp groups."""
    tiles = gl.cdiv(places.rows, SIZES.rows)
    start = work % tiles * SIZES.rows
    head = work // tiles * SIZES.heads + GROUP % SIZES.heads
    return start, start + GROUP // SIZES.heads * GROUP_ROWS, head


@gluon.jit
def ends_of(start, places, ROWS: gl.constexpr):
    """Of ROWS rows, of which some or all may lie behind the last that there is: first; last and both documents."""
    first = gl.minimum(start, places.rows - 1)
    last = gl.minimum(start + ROWS, places.rows) - 1
    first_document = gl.load(places.document_start + first).to(gl.int32)
    return first, (last, first_document, gl.load(places.document_start + last).to(gl.int32))


@gluon.jit
def wait_for(barriers, tile):
    """Until a tile's stage is full."""
    STAGES: gl.constexpr = barriers[0].shape[0]
    mbarrier.wait(barriers[0].index(tile % STAGES), (tile // STAGES) & 1)


@gluon.jit
def let_go(barriers, tile):
    """A warp group no longer reads a tile: one thread says so for all."""
    STAGES: gl.constexpr = barriers[0].shape[0]
    gl.thread_barrier()
    mbarrier.arrive(barriers[1].index(tile % STAGES), count=1)


@gluon.jit
def skip(tile, first, last, barriers):
    """Lets go of tiles that a warp group has no use for, counted from `tile` on; not before they are there, or phases
    would be mixed up.
    """
    for i in range(first, last):
        wait_for(barriers, tile + i)
        let_go(barriers, tile + i)


@gluon.jit
def barrier_pairs(COUNT: gl.constexpr, USERS: gl.constexpr):
    """Of COUNT buffers: full, which the loader's copies complete, and empty, at which every user arrives."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=USERS)
    return full, empty


@gluon.jit
def load_queries(
    work,
    turn,
    queries,
    query_rows,
    places,
    buffers,
    barriers,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
):
    """Both warp groups' raw queries, in halves; rows behind the last are zeros."""
    BYTES: gl.constexpr = 2 * GROUP_ROWS * SHAPE.half * 2
    for group in gl.static_range(2):
        _start, row, head = rows_and_head(work, places, SIZES, group)
        full, channel = barriers[0].index(group), head * queries.raw.head_stride
        mbarrier.wait(barriers[1].index(group), (turn & 1) ^ 1)
        mbarrier.expect(full, BYTES)
        tma.async_copy_global_to_shared(query_rows, [row, channel], full, buffers.index(2 * group))
        tma.async_copy_global_to_shared(query_rows, [row, channel + SHAPE.half], full, buffers.index(2 * group + 1))


@gluon.jit
def load_tile(
    tile,
    described,
    key_at,  # row of the keys
    value_at,  # row and first number of the values
    buffers,
    barriers,
    HALF: gl.constexpr,
):
    """A tile of keys, in halves, and its values, as soon as its stage is empty."""
    key_buffers, value_buffers = buffers
    BYTES: gl.constexpr = 2 * KEYS * 2 * HALF * 2
    STAGES: gl.constexpr = value_buffers.shape[0]
    stage = tile % STAGES
    full = barriers[0].index(stage)
    mbarrier.wait(barriers[1].index(stage), ((tile // STAGES) & 1) ^ 1)
    mbarrier.expect(full, BYTES)
    tma.async_copy_global_to_shared(described[0], [key_at, 0], full, key_buffers.index(2 * stage))
    tma.async_copy_global_to_shared(described[0], [key_at, HALF], full, key_buffers.index(2 * stage + 1))
    tma.async_copy_global_to_shared(described[1], [value_at[0], value_at[1]], full, value_buffers.index(stage))


@gluon.jit
def load(
    given,
    described,  # rows of queries, entries of keys, and of every scale entries of values
    shared,
    SHAPE: gl.constexpr,
    SIZES: gl.constexpr,
):
    """The loader: for all work of a program the queries, and the tiles of every scale that some row sees."""
    queries, keys, places = given
    buffers, barriers = shared
    query_rows, key_entries, values = described
    tile, turn = gl.to_tensor(0), gl.to_tensor(0)
    for work in range(gl.program_id(0), work_count(queries, places, SIZES), gl.num_programs(0)):
        load_queries(work, turn, queries, query_rows, places, buffers[0], barriers[0], SHAPE, SIZES)
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

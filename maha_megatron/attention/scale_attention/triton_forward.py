"""The forward kernel: one softmax over the visible keys of all scales, scale l's logits raised by its utility c_l.

Or, where utilities alone weigh the scales, a softmax for each scale, and the sum of their outputs by softmax(c).

One program per tile of rows and query head (or per tile of rows and several heads of one KV group, which then read a
tile of keys and values once). It goes over the scales and, in each, over the tiles of keys that its rows can see:

    scale 0    [k k k]         queries rotated for scale 0, logits + c_0
    scale 1    [k k]           queries rotated for scale 1, logits + c_1       one running maximum, one sum,
    scale 2    [k k]           ...                                             one accumulator [rows, d]
    scale 3    [k]

Where queries turn alike for every scale, they are rotated once, before scale 0.

Where scales are apart, each has a maximum, a sum and an accumulator of its own, and joins those of all when it ends:
what weighs it is known by then, as positions alone say what is feasible.

Logits and maxima are in units of log 2. Channels are read in halves, (i) and (i + d/2), so that pairs stay in place.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_geometry import (
    cosine_sine,
    inverse_norm,
    joined,
    of_heads,
    rotated,
    turns,
)
from maha_megatron.attention.triton_slots import entries_before, past_of, pick, visible, window_of, within

LOG2_E = tl.constexpr(1.4426950408889634)
FARTHEST = tl.constexpr(-1e30)  # below every logit, and finite: a row that has seen nothing yet has no NaN


@triton.jit
def tile_rows(queries, places, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Of a program (tile, heads): first row; row, its document and head of its lines; and its KV group.

    HEADS * ROWS lines, head after head; with one head, `head` is a number.
    """
    start = tl.program_id(0) * ROWS
    line = tl.arange(0, HEADS * ROWS)
    head = tl.program_id(1) * HEADS
    group = head // queries.n_per_group
    if HEADS > 1:
        head = head + line // ROWS
    row = start + line % ROWS
    document = tl.load(places.document_start + tl.minimum(row, places.rows - 1)).to(tl.int32)
    return start, row, document, head, group


@triton.jit
def tile_ends(start, places, ROWS: tl.constexpr):
    """Of a tile of rows: the last, and the documents of the first and the last."""
    last = tl.minimum(start + ROWS, places.rows) - 1
    first_document = tl.load(places.document_start + start).to(tl.int32)
    return last, first_document, tl.load(places.document_start + last).to(tl.int32)


@triton.jit
def visible_to_tile(start, ends, scale, SHAPE: tl.constexpr):
    """The slots [first, end) of which every row of a tile sees some: from the first row's first to the last's last."""
    window = window_of(scale, SHAPE)
    begin, _ = visible(start, ends[1], window, SHAPE.ratio, scale)
    _, end = visible(ends[0], ends[2], window, SHAPE.ratio, scale)
    return begin, end


@triton.jit
def seen_by_whole_tile(start, ends, scale, SHAPE: tl.constexpr):
    """The slots [first, end) that every row of a tile sees; none where rows lie in several documents."""
    last, first_document, last_document = ends
    first, _ = visible(last, last_document, window_of(scale, SHAPE), SHAPE.ratio, scale)
    _, end = visible(start, first_document, window_of(scale, SHAPE), SHAPE.ratio, scale)
    return first, tl.where(first_document == last_document, end, first)


@triton.jit
def sight_of_tile(start, ends, row, document, scale, SHAPE: tl.constexpr):
    """Slots [first, end) of a scale: what each line sees, what some line of the tile sees, what every line sees."""
    see_from, see_to = visible(row, document, window_of(scale, SHAPE), SHAPE.ratio, scale)
    begin, end = visible_to_tile(start, ends, scale, SHAPE)
    seen_from, seen_to = seen_by_whole_tile(start, ends, scale, SHAPE)
    return see_from, see_to, begin, end, seen_from, seen_to


@triton.jit
def log_of_sum(top, part):
    """log 2 of part * 2**top; -inf where part is 0."""
    return tl.where(part > 0, top + tl.log2(tl.where(part > 0, part, 1.0)), float("-inf"))


@triton.jit
def only_seen(logits, key, at, sight, KEYS: tl.constexpr):
    """Logits [lines, keys] of the tile of keys from slot `at` on; -inf where a line does not see the slot."""
    see_from, see_to, _begin, _end, seen_from, seen_to = sight
    if (at < seen_from) | (at + KEYS > seen_to):  # some line does not see all of the tile
        seen = within(key[None, :], (see_from - at)[:, None], (see_to - see_from)[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    return logits


@triton.jit
def at_lines(rows, start, row, head, channel):
    """Pointers [lines, channels] into [t, heads, channels]."""
    line = (row - start) * rows.row_stride + head * rows.head_stride
    return rows.tensor + start.to(tl.int64) * rows.row_stride + line[:, None] + channel[None, :]


@triton.jit
def load_queries(queries, start, row, head, there, HALF: tl.constexpr):
    """Raw queries in two halves, as stored."""
    at = at_lines(queries.raw, start, row, head, tl.arange(0, HALF))
    return tl.load(at, mask=there[:, None], other=0.0), tl.load(at + HALF, mask=there[:, None], other=0.0)


@triton.jit
def query_norms(queries, start, row, head, inside, SHAPE: tl.constexpr):
    """1 / the root mean square of raw queries."""
    first, second = load_queries(queries, start, row, head, inside, SHAPE.half)
    return inverse_norm(first.to(tl.float32), second.to(tl.float32), SHAPE.epsilon, SHAPE.half)


@triton.jit
def gained_queries(queries, start, row, head, there, HALF: tl.constexpr, HEADS: tl.constexpr):
    """Raw queries times their gain, in two halves.

    Read again at every scale that turns them or has a utility, from a cache: held in registers, they would cost a
    program per multiprocessor. In a loop over scales, `there` has to depend on the scale, or the compiler holds them.
    """
    channel = tl.arange(0, HALF)
    first, second = load_queries(queries, start, row, head, there, HALF)
    first = first.to(tl.float32) * of_heads(queries.gain, head, channel, 2 * HALF, HEADS)
    return first, second.to(tl.float32) * of_heads(queries.gain, head, channel + HALF, 2 * HALF, HEADS)


@triton.jit
def turned_queries(first, second, place, places, scale, operand: tl.constexpr, SHAPE: tl.constexpr):
    """Queries rotated for a scale, in two halves of the dtype of products."""
    turn = turns(place, places.frequency, scale, tl.arange(0, SHAPE.half), SHAPE.half, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    first, second = rotated(first, second, cosine, sine)
    return first.to(operand), second.to(operand)


@triton.jit
def utility(first, second, norm, queries, head, scale, HALF: tl.constexpr, HEADS: tl.constexpr):
    """<rho_l, q> + beta_l of every line in units of log 2; halves of q times its gain, and what normalises it."""
    channel = tl.arange(0, HALF)
    at = queries.rho + scale * queries.n * 2 * HALF
    learned = tl.sum(first * of_heads(at, head, channel, 2 * HALF, HEADS), 1)
    learned += tl.sum(second * of_heads(at, head, channel + HALF, 2 * HALF, HEADS), 1)
    return (learned * norm + tl.load(queries.beta + scale * queries.n + head).to(tl.float32)) * LOG2_E


@triton.jit
def slots_of_scale(keys, group, places, scale, SHAPE: tl.constexpr):
    """Pointers to slot 0 of a scale's prepared keys and values, and the values' stride."""
    past = past_of(scale, SHAPE)
    before = entries_before(scale, places.rows, SHAPE) + past
    value_stride = pick(keys.raw_values.entry_strides, scale).to(tl.int64)
    value_base = pick(keys.raw_values.tensors, scale) + group * pick(keys.raw_values.group_strides, scale)
    key_base = keys.prepared + (group.to(tl.int64) * keys.total + before) * 2 * SHAPE.half
    return key_base, value_base + past * value_stride, value_stride


@triton.jit
def attend_scale(
    query,
    raised,
    unit,
    sight,
    keys,
    group,
    places,
    scale,
    top,
    mass,
    part,
    fused,
    SHAPE: tl.constexpr,
    KEYS: tl.constexpr,
    PART: tl.constexpr,
):
    """One scale's keys into a running softmax: its maximum, sum, and sum of values; with PART, the scale's own sum.

    Logits are products of queries and keys, times `unit`, plus `raised`, in units of log 2.
    """
    WIDTH: tl.constexpr = 2 * SHAPE.half
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    key, channels = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    key_base, value_base, value_stride = slots_of_scale(keys, group, places, scale, SHAPE)
    value_offset = key[:, None] * value_stride + channels[None, :]
    end = sight[3]
    for at in tl.range(sight[2], end, KEYS):
        # keys behind the last are read, and not seen; values there might be no numbers, which 0 would not undo
        key_tile = tl.load(key_base + at * WIDTH + key[:, None] * WIDTH + channels[None, :])
        logits = only_seen(tl.dot(query, key_tile.T, input_precision=SHAPE.precision), key, at, sight, KEYS)
        higher = tl.maximum(top, tl.max(logits, 1) * unit + raised)
        weight = tl.exp2(logits * unit[:, None] + (raised - higher)[:, None])
        shrink = tl.exp2(top - higher)
        added = tl.sum(weight, 1)
        mass = mass * shrink + added
        if PART:
            part = part * shrink + added
        real = (key < end - at)[:, None]
        value_tile = tl.load(value_base + at * value_stride + value_offset, mask=real, other=0.0)
        fused = tl.dot(weight.to(operand), value_tile, fused * shrink[:, None], input_precision=SHAPE.precision)
        top = higher
    return top, mass, part, fused


@triton.jit
def queries_of_all(queries, places, start, row, document, head, operand: tl.constexpr, SHAPE, HEADS: tl.constexpr):
    """Queries turned for every scale, where they turn alike; otherwise 0."""
    query = tl.zeros([row.shape[0], 2 * SHAPE.half], operand)
    if SHAPE.one_turn:
        first, second = gained_queries(queries, start, row, head, row < places.rows, SHAPE.half, HEADS)
        first, second = turned_queries(first, second, row - document, places, 0, operand, SHAPE)
        query = joined(first, second)
    return query


@triton.jit
def queries_of_scale(
    query, queries, places, start, row, document, head, norm, sight, scale, operand: tl.constexpr, SHAPE, HEADS
):
    """Queries turned for a scale, in the dtype of products, and every line's utility in units of log 2.

    query: what `queries_of_all` has; these, where queries turn alike for every scale.
    """
    HALF: tl.constexpr = SHAPE.half
    there = (row < places.rows) & (sight[2] <= sight[3])
    raised = tl.zeros_like(norm)
    if SHAPE.utilities or not SHAPE.one_turn:
        first, second = gained_queries(queries, start, row, head, there, HALF, HEADS)
        if SHAPE.utilities:
            raised = utility(first, second, norm, queries, head, scale, HALF, HEADS)
        if not SHAPE.one_turn:
            first, second = turned_queries(first, second, row - document, places, scale, operand, SHAPE)
            query = joined(first, second)
    return query, raised


@triton.jit
def begun(norm, WIDTH: tl.constexpr):
    """A softmax of nothing: its maximum, its sum, and its sum of values."""
    none = tl.zeros_like(norm)
    return none + FARTHEST, none, tl.zeros([norm.shape[0], WIDTH], tl.float32)


@triton.jit
def weighed(top, mass, own_mass, raised):
    """A scale's own softmax into the sum of all scales' outputs by weights 2**raised; an infeasible one has no mass.

    The running maximum and sum of weights; by how much what came before shrinks; and the factor of the scale's values.
    """
    feasible = own_mass != 0
    higher = tl.where(feasible, tl.maximum(top, raised), top)
    weight = tl.where(feasible, tl.exp2(raised - higher), 0.0)
    shrink = tl.exp2(top - higher)
    return higher, mass * shrink + weight, shrink, weight / tl.where(feasible, own_mass, 1.0)


@triton.jit
def attend_kernel(
    queries,
    keys,
    places,
    out,  # Rows
    lse,  # [n, t] in units of log 2: of the one softmax; where scales are apart, of the utilities of feasible scales
    scale_lse,  # [t, n, L]: of every scale, utilities included; where scales are apart, of its utility; or None
    own_lse,  # [n, L, t]: of every scale's own softmax, 0 where infeasible; None where scales are not apart
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    SCALES: tl.constexpr = len(SHAPE.windows)
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    start, row, document, head, group = tile_rows(queries, places, ROWS, HEADS)
    ends, inside = tile_ends(start, places, ROWS), row < places.rows
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    # queries are rotated as they are, and logits normalised: a factor for each row, in units of log 2
    unit = norm * (LOG2_E / (2 * SHAPE.half) ** 0.5)
    none = tl.zeros_like(norm)
    top, mass, fused = begun(norm, 2 * SHAPE.half)
    once = queries_of_all(queries, places, start, row, document, head, operand, SHAPE, HEADS)
    for scale in tl.range(0, SCALES):
        sight = sight_of_tile(start, ends, row, document, scale, SHAPE)
        lines = (once, queries, places, start, row, document, head, norm, sight, scale)
        query, raised = queries_of_scale(*lines, operand, SHAPE, HEADS)
        of_tiles = (unit, sight, keys, group, places, scale)
        at_part = (row.to(tl.int64) * queries.n + head) * SCALES + scale
        with_part: tl.constexpr = scale_lse is not None
        if SHAPE.apart:
            own_top, own_mass, own = begun(norm, 2 * SHAPE.half)
            softmax = (own_top, own_mass, none, own)
            own_top, own_mass, part, own = attend_scale(query, none, *of_tiles, *softmax, SHAPE, KEYS, False)
            feasible = own_mass != 0  # no number counts as feasible, and shows in the output
            top, mass, shrink, factor = weighed(top, mass, own_mass, raised)
            fused = fused * shrink[:, None] + own * factor[:, None]
            own_top = tl.where(feasible, log_of_sum(own_top, own_mass), 0.0)
            tl.store(own_lse + (head * SCALES + scale).to(tl.int64) * places.rows + row, own_top, mask=inside)
            part = tl.where(feasible, raised, float("-inf"))
        else:
            softmax = (top, mass, none, fused)
            top, mass, part, fused = attend_scale(query, raised, *of_tiles, *softmax, SHAPE, KEYS, with_part)
            part = log_of_sum(top, part)
        if with_part:
            tl.store(scale_lse + at_part, part, mask=inside)
    mass = tl.where(inside, mass, 1.0)
    fused = (fused * (1 / mass)[:, None]).to(out.tensor.dtype.element_ty)
    to = at_lines(out, start, row, head, tl.arange(0, 2 * SHAPE.half))
    tl.store(to, fused, mask=inside[:, None])
    tl.store(lse + head * places.rows + row, top + tl.log2(mass), mask=inside)

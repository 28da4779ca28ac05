"""What comes before and after gluon_query_gradient.py, where queries' gradients are found by warp groups.

    begin_kernel           turned queries, and of every row its norm, offsets and delta
    begin_scales_kernel    where every scale has an output of its own
    end_kernel             dq' back through rotation, utilities, gain and normalisation, opened blocks included

They compute what triton_query_gradient.py and triton_scales_query_gradient.py do at the ends of one kernel, in which
all of it happens where there are no warp groups, and are bound by memory. So the last goes over its rows a few at a
time: sums over rows, of which there are two for each scale, grow in registers and meet those of other threads once.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import (
    at_lines,
    gained_queries,
    load_queries,
    query_norms,
    tile_rows,
)
from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, of_heads, rotated, turns
from maha_megatron.attention.scale_attention.triton_query_gradient import (
    at_parts,
    load_outputs,
    opened_utilities,
    store_turned,
    turn_tile,
)
from maha_megatron.attention.scale_attention.triton_scales_query_gradient import load_scale


@triton.jit
def begin_kernel(
    queries,
    places,
    out,  # Rows
    lse,
    own_lse,  # as of attend_kernel
    grad_out,  # Rows
    made,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    start, row, document, head, _group = tile_rows(queries, places, ROWS, HEADS)
    first_line = (head * len(SHAPE.windows)).to(tl.int64) * places.rows + row
    lines = (queries, places, made, start, row, head)
    turn_tile(lines, document, lse, own_lse, first_line, SHAPE, HEADS)
    if not SHAPE.apart:
        load_outputs(out, grad_out, places, made, start, row, head, SHAPE)


@triton.jit
def begin_scales_kernel(
    queries,
    places,
    given,
    made,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    SCALES: tl.constexpr = len(SHAPE.windows)
    start, row, document, head, _group = tile_rows(queries, places, ROWS, HEADS)
    inside, place = row < places.rows, row - document
    norm = query_norms(queries, start, row, head, inside, SHAPE)
    tl.store(made.norms + head * places.rows + row, norm, mask=inside)
    first, second = gained_queries(queries, start, row, head, inside, SHAPE.half, HEADS)
    if SHAPE.one_turn:
        store_turned(first, second, made, head.to(tl.int64) * places.rows + row, place, places, 0, inside, SHAPE)
    for scale in tl.range(0, SCALES):
        load_scale(given, made, places, start, row, head, queries.n, scale, inside, SHAPE)
        if not SHAPE.one_turn:
            at = (head * SCALES + scale).to(tl.int64) * places.rows + row
            store_turned(first, second, made, at, place, places, scale, inside, SHAPE)


@triton.jit
def turned_back(first, second, place, places, scale, SHAPE: tl.constexpr):
    """Gradients of queries that were turned for a scale, in halves, before they were."""
    turn = turns(place, places.frequency, scale, tl.arange(0, SHAPE.half), SHAPE.half, SHAPE.fast)
    cosine, sine = cosine_sine(turn, SHAPE.fast)
    return rotated(first, second, cosine, -sine)


@triton.jit
def load_halves(at, channel, inside, HALF: tl.constexpr):
    """[rows, d/2] twice in fp32; `at`: of every row, where its first number lies."""
    at = at[:, None] + channel[None, :]
    first, second = tl.load(at, mask=inside[:, None], other=0.0), tl.load(at + HALF, mask=inside[:, None], other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def opened_halves(opened, head, group, row, inside, places, SHAPE: tl.constexpr):
    """What opened blocks ask of queries turned for to_scale, in halves."""
    HALF: tl.constexpr = SHAPE.half
    channel, first = tl.arange(0, HALF), tl.zeros([row.shape[0], HALF], tl.float32)
    second = first
    of_group, of_head = (group * places.rows).to(tl.int64) + row, (head * places.rows).to(tl.int64) + row
    for place in tl.range(0, SHAPE.blocks):
        chosen = tl.load(opened.chosen + of_group * SHAPE.blocks + place, mask=inside, other=-1)
        at = opened.turned + (of_head * SHAPE.blocks + place) * (2 * HALF)
        more_first, more_second = load_halves(at, channel, chosen >= 0, HALF)
        first, second = first + more_first, second + more_second
    return first, second


@triton.jit
def load_step(queries, places, made, start, head, there, SHAPE: tl.constexpr, STEP: tl.constexpr):
    """Of STEP rows: raw queries, and dq', in halves; document; norm; utility's gradient and share of every scale."""
    HALF: tl.constexpr = SHAPE.half
    SCALES: tl.constexpr = len(SHAPE.windows) if SHAPE.utilities else 0
    row = start + tl.arange(0, STEP)
    inside, line = (row < places.rows) & there, head.to(tl.int64) * places.rows + row
    raw = load_queries(queries, start, row, head, inside, HALF)
    grads = load_halves(made.turned_grads + line * (2 * HALF), tl.arange(0, HALF), inside, HALF)
    document = tl.load(places.document_start + row, mask=inside, other=0).to(tl.int32)
    norm = tl.load(made.norms + line, mask=inside, other=0.0)
    gradients, shares = (), ()
    for scale in tl.static_range(SCALES):
        gradients += (tl.load(made.utility_gradients + line * SHAPE.branches + scale, mask=inside, other=0.0),)
        shares += (tl.load(made.shares + line * SHAPE.branches + scale, mask=inside, other=0.0),)
    return raw, grads, document, norm, gradients, shares


@triton.jit
def gradients_of_queries(grads, made, places, head, group, row, place, inside, SHAPE: tl.constexpr):
    """Of q normalised, times its gain, without utilities: in halves."""
    scaling: tl.constexpr = (2 * SHAPE.half) ** -0.5
    first, second = turned_back(grads[0], grads[1], place, places, len(SHAPE.windows) - 1, SHAPE)
    if SHAPE.blocks > 0:
        opened = opened_halves(made.opened, head, group, row, inside, places, SHAPE)
        more_first, more_second = turned_back(opened[0], opened[1], place, places, SHAPE.to_scale, SHAPE)
        first, second = first + more_first, second + more_second
    return first * scaling, second * scaling


@triton.jit
def utility_gradients(gradients, shares, SHAPE: tl.constexpr, GIVEN: tl.constexpr):
    """Gradient of every branch's utility, of every row: a tuple.

    Where one output is made of all scales, a change of all utilities alike changes nothing: what rounding left in that
    direction is taken out, and where scales are apart <dO, out>, which are found as w_l delta_l.
    """
    BRANCHES: tl.constexpr = SHAPE.branches
    total, found = tl.zeros_like(gradients[0]), ()
    for branch in tl.static_range(BRANCHES):
        total += gradients[branch]
    for branch in tl.static_range(BRANCHES):
        found += (gradients[branch] if GIVEN else gradients[branch] - shares[branch] * total,)
    return found


@triton.jit
def add_learned(of_rho, of_beta, gradients, normal, SHAPE: tl.constexpr):
    """What these rows add to the gradients of every branch's rho, in halves, and beta."""
    BRANCHES: tl.constexpr = SHAPE.branches
    more_rho, more_beta = (), ()
    for branch in tl.static_range(BRANCHES):
        gradient = gradients[branch][:, None]
        more_rho += ((of_rho[branch][0] + gradient * normal[0], of_rho[branch][1] + gradient * normal[1]),)
        more_beta += (of_beta[branch] + gradients[branch],)
    return more_rho, more_beta


@triton.jit
def through_utilities(first, second, gradients, queries, head, SHAPE: tl.constexpr):
    """Adds what utilities ask of q normalised, times its gain."""
    HALF: tl.constexpr = SHAPE.half
    BRANCHES: tl.constexpr = SHAPE.branches
    channel = tl.arange(0, HALF)
    for branch in tl.static_range(BRANCHES):
        gradient, rho = gradients[branch][:, None], queries.rho + branch * queries.n * 2 * HALF
        first += gradient * of_heads(rho, head, channel, 2 * HALF, 1)
        second += gradient * of_heads(rho, head, channel + HALF, 2 * HALF, 1)
    return first, second


@triton.jit
def store_queries(to, first, second, start, row, head, inside, HALF: tl.constexpr):
    at = at_lines(to, start, row, head, tl.arange(0, HALF))
    stored = to.tensor.dtype.element_ty
    tl.store(at, first.to(stored), mask=inside[:, None])
    tl.store(at + HALF, second.to(stored), mask=inside[:, None])


@triton.jit
def store_sums(made, queries, sums, which: tl.constexpr, SHAPE: tl.constexpr):
    """Halves [rows, d/2] of what is learned, summed over rows: the gain, or rho of a scale."""
    to = at_parts(made.learned_parts, queries.n, 0, which, SHAPE, 1) + tl.arange(0, SHAPE.half)
    tl.store(to, tl.sum(sums[0], 0))
    tl.store(to + SHAPE.half, tl.sum(sums[1], 0))


@triton.jit
def end_kernel(
    queries,
    places,
    made,
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,  # rows at a time
    GIVEN: tl.constexpr,  # whether the utilities' gradients were given
):
    HALF: tl.constexpr = SHAPE.half
    BRANCHES: tl.constexpr = SHAPE.branches if SHAPE.utilities else 0
    head, channel = tl.program_id(1), tl.arange(0, HALF)
    group, none = head // queries.n_per_group, tl.zeros([STEP, HALF], tl.float32)
    gain = of_heads(queries.gain, head, channel, 2 * HALF, 1), of_heads(queries.gain, head, channel + HALF, 2 * HALF, 1)
    of_gain, of_rho = (none, none), ((none, none),) * BRANCHES
    of_beta = (tl.zeros([STEP], tl.float32),) * BRANCHES
    first_row = tl.program_id(0) * ROWS
    following = load_step(queries, places, made, first_row, head, True, SHAPE, STEP)
    for step in tl.range(0, ROWS, STEP):
        start = first_row + step
        row = start + tl.arange(0, STEP)
        inside = row < places.rows
        raw, grads, document, norm, of_utilities, shares = following
        following = load_step(queries, places, made, start + STEP, head, step + STEP < ROWS, SHAPE, STEP)
        norm = norm[:, None]
        normal = raw[0].to(tl.float32) * norm, raw[1].to(tl.float32) * norm
        first, second = gradients_of_queries(grads, made, places, head, group, row, row - document, inside, SHAPE)
        if SHAPE.utilities:
            if SHAPE.blocks > 0:
                of_opened, share = opened_utilities(made.opened, head, group, row, inside, places, SHAPE)
                of_utilities += (of_opened,)
                shares += (share,)
            gradients = utility_gradients(of_utilities, shares, SHAPE, GIVEN)
            of_rho, of_beta = add_learned(of_rho, of_beta, gradients, normal, SHAPE)
            first, second = through_utilities(first, second, gradients, queries, head, SHAPE)
        of_gain = of_gain[0] + first * normal[0], of_gain[1] + second * normal[1]
        first, second = first * gain[0], second * gain[1]
        along = (tl.sum(first * normal[0], 1) + tl.sum(second * normal[1], 1))[:, None] / (2 * HALF)
        first, second = (first - normal[0] * along) * norm, (second - normal[1] * along) * norm
        store_queries(made.grad_q, first, second, start, row, head, inside, HALF)
    store_sums(made, queries, of_gain, 0, SHAPE)
    for branch in tl.static_range(BRANCHES):
        store_sums(made, queries, of_rho[branch], 1 + branch, SHAPE)
        beta_at = at_parts(made.learned_parts, queries.n, 0, 1 + BRANCHES, SHAPE, 1) + branch
        tl.store(beta_at, tl.sum(of_beta[branch], 0))

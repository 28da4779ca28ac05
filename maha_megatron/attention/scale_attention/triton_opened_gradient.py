"""Backward of opened keys: block by block, each for the rows that opened it, without atomics.

With P = exp(s + c - LSE) and delta = <dO, out> of the one softmax over scales and opened keys, a program adds up

    dV = P' dO        dS = P (dO V' - delta)        dK' = dS' q'

over the rows of its run that opened a block (triton_opened_forward.py), and writes dq' = dS K' and the sums of dS and P
for each, which the kernel of queries reads. What a block asks of its keys is written where the kernel of keys adds it.
A block that lies in several runs leaves a sum in each; a second kernel adds them up, run after run.

A tile of 64 children or more, or of as many rows, takes one head after the other, without fetching the next one's rows
ahead. On Hopper some of its products then go by warp groups, which read those rows where they lie in shared memory, and
others do not; where the two share a tile, Triton 3.6 has one buffer for it and writes the next head's rows, or zeros
behind the last head, over what unfinished products still read: with 64 children, dK' and dV could come out wrong.
"""

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_forward import LOG2_E
from maha_megatron.attention.scale_attention.triton_key_gradient import load_rows
from maha_megatron.attention.scale_attention.triton_opened_forward import (
    first_child,
    first_opened,
    key_at,
    listed_block,
    listed_rows,
    load_opening,
    opened_tile,
)
from maha_megatron.attention.triton_slots import past_of, slot_count, stride_of


@triton.jit
def at_children(opened, group, block, places, SHAPE: tl.constexpr):
    """Pointer to dK' of a block's first child."""
    past = past_of(SHAPE.to_scale, SHAPE)
    entries = past + slot_count(places.rows, SHAPE.ratio, SHAPE.to_scale)
    line = (group * entries).to(tl.int64) + past + first_child(block, places, SHAPE)
    return opened.grads + line * (4 * SHAPE.half)


@triton.jit
def at_run(opened, group, run, which, SHAPE: tl.constexpr, CHILDREN: tl.constexpr):
    """Pointer to a run's sums of the block that it shares with runs before it (0), or with those behind (1)."""
    line = ((group * tl.num_programs(0) + run) * 2 + which).to(tl.int64)
    return opened.sums + line * (CHILDREN * 4 * SHAPE.half)


@triton.jit
def continues(lists, group, at):
    """Whether the block at a place of the list is also the one before it."""
    before = key_at(lists, group, tl.maximum(at - 1, 0), lists.length)
    return (at > 0) & (before == key_at(lists, group, at, lists.length))


@triton.jit
def line_gradients(query, offset, delta, grad, key_tile, value_tile, child, real, SHAPE: tl.constexpr):
    """P and dS of a tile of rows of one head."""
    unit: tl.constexpr = LOG2_E / (2 * SHAPE.half) ** 0.5
    logits = tl.dot(query, key_tile.T, input_precision=SHAPE.precision) * unit + offset[:, None]
    weight = tl.exp2(tl.where(child[None, :] & real[:, None], logits, float("-inf")))
    grad_weight = tl.dot(grad, value_tile.T, input_precision=SHAPE.precision)
    return weight, weight * (grad_weight - delta[:, None])


@triton.jit
def opened_gradient_kernel(
    opening,  # OpeningQueries
    n_per_group,
    keys,
    places,
    lists,
    grad_out,  # Rows
    made,  # OpenedQueries
    opened,  # OpenedKeys
    SHAPE: tl.constexpr,
    LINES: tl.constexpr,
    CHILDREN: tl.constexpr,
    RUN: tl.constexpr,
):
    operand: tl.constexpr = keys.prepared.dtype.element_ty
    WIDTH: tl.constexpr = 2 * SHAPE.half
    STAGES: tl.constexpr = 1 if CHILDREN >= 64 or LINES >= 64 else None  # see above
    group, run = tl.program_id(1), tl.program_id(0)
    stop = tl.minimum(run * RUN + RUN, lists.length)
    at = first_opened(lists, group, run * RUN, stop, LINES)
    channels, child_line = tl.arange(0, WIDTH), tl.arange(0, CHILDREN)
    while at < stop:
        begin = at
        key, block = listed_block(lists, group, at)
        key_tile, value_tile, child = opened_tile(keys, group, block, places, SHAPE, CHILDREN)
        grad_key = tl.zeros([CHILDREN, WIDTH], tl.float32)
        grad_value = tl.zeros([CHILDREN, WIDTH], tl.float32)
        next_key = key
        while next_key == key:
            place, row, real = listed_rows(lists, group, at, stop, key, LINES, SHAPE)
            for head in tl.range(group * n_per_group, (group + 1) * n_per_group, num_stages=STAGES):
                query, offset = load_opening(opening, row, head, real, places, SHAPE)
                delta = tl.load(opening.delta + (head * places.rows).to(tl.int64) + row, mask=real, other=0.0)
                grad = load_rows(grad_out, row, head, real, channels)
                of_lines = (query, offset, delta, grad, key_tile, value_tile, child, real)
                weight, grad_logits = line_gradients(*of_lines, SHAPE)
                line = (head * lists.length).to(tl.int64) + place
                tl.store(made.utility_gradients + line, tl.sum(grad_logits, 1), mask=real)
                tl.store(made.shares + line, tl.sum(weight, 1), mask=real)
                grad_logits = grad_logits.to(operand)
                turned = tl.dot(grad_logits, key_tile, input_precision=SHAPE.precision)
                turned_at = made.turned + line[:, None] * WIDTH + channels[None, :]
                tl.store(turned_at, turned.to(made.turned.dtype.element_ty), mask=real[:, None])
                grad_value = tl.dot(weight.to(operand).T, grad, grad_value, input_precision=SHAPE.precision)
                grad_key = tl.dot(grad_logits.T, query, grad_key, input_precision=SHAPE.precision)
            at += tl.sum(real.to(tl.int32))
            next_key = key_at(lists, group, at, stop)
        before, behind = continues(lists, group, begin), (at < lists.length) & continues(lists, group, at)
        shared = at_run(opened, group, run, tl.where(before, 0, 1), SHAPE, CHILDREN)
        to = tl.where(before | behind, shared, at_children(opened, group, block, places, SHAPE))
        to = to + child_line[:, None] * (2 * WIDTH) + channels[None, :]
        tl.store(to, grad_key, mask=child[:, None])
        tl.store(to + WIDTH, grad_value, mask=child[:, None])


@triton.jit
def add_runs_kernel(places, lists, opened, SHAPE: tl.constexpr, CHILDREN: tl.constexpr, RUN: tl.constexpr):
    """Gradients of the block that begins in this run and goes on in others."""
    group, run = tl.program_id(1), tl.program_id(0)
    begin, end = run * RUN, run * RUN + RUN
    if (end < lists.length) & continues(lists, group, end):
        key, block = listed_block(lists, group, end)
        began_before = continues(lists, group, begin) & (key_at(lists, group, begin, lists.length) == key)
        if (block >= 0) & (not began_before):
            child, channels = tl.arange(0, CHILDREN), tl.arange(0, 4 * SHAPE.half)
            real = (child < stride_of(SHAPE.ratio, SHAPE.from_scale - SHAPE.to_scale))[:, None]
            at = child[:, None] * (4 * SHAPE.half) + channels[None, :]
            total = tl.load(at_run(opened, group, run, 1, SHAPE, CHILDREN) + at, mask=real, other=0.0)
            while key_at(lists, group, end, lists.length) == key:
                run += 1
                total += tl.load(at_run(opened, group, run, 0, SHAPE, CHILDREN) + at, mask=real, other=0.0)
                end += RUN
            tl.store(at_children(opened, group, block, places, SHAPE) + at, total, mask=real)

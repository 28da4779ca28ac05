"""The convolution of q, k and v as one kernel, and its gradients as one more: every row is read once and written once.

A program has one head of q, k or v. Its lanes walk down the rows, two lanes (even and odd rows) for each segment of
2 STEPS rows: two rows back, which is what a tap reaches, is then one step back, and stays in registers.

    lane      0 1 | 2 3 | ...                  forward    reads row t, holds rows t-2 and t-4
    step 0    0 1 | S S+1                      backward   reads x and the gradient at row t; holds both at t-2 and t-4:
    step 1    2 3 | S+2 S+3                               what row t-4 is owed is complete at t, two steps past the end
    ...                                                   of a segment for its last rows

Sums over rows stay in registers and leave in parts, one for each program, that are added in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from maha_megatron.attention.triton_slots import pick


class Lines(NamedTuple):
    """Of q [t, n, d], k and v [t, g, d]: tensors as they lie, channels next to each other."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    row_strides: tuple[int, int, int]
    head_strides: tuple[int, int, int]


class Packed(NamedTuple):
    """document_start [rows], rows, query heads, KV groups."""

    document_start: torch.Tensor
    rows: int
    n: int
    g: int


@triton.jit
def line_of(line, packed):
    """Of heads counted through q, k and v: which of the three, head in it, and head in the taps' order, where every KV
    group has its query heads, key and value together.
    """
    n, g = packed.n, packed.g
    kind = tl.where(line < n, 0, tl.where(line < n + g, 1, 2))
    head = line - tl.where(kind == 0, 0, tl.where(kind == 1, n, n + g))
    of_group = n // g
    group = tl.where(kind == 0, head // of_group, head)
    place = tl.where(kind == 0, head % of_group, of_group + kind - 1)
    return kind, head, group * (of_group + 2) + place


@triton.jit
def load_taps(taps, line, WIDTH: tl.constexpr):
    """Taps of a head, [1, d] each: those of rows t-4, t-2 and t."""
    at = taps + (line * WIDTH + tl.arange(0, WIDTH)[None, :]) * 3
    return tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32), tl.load(at + 2).to(tl.float32)


@triton.jit
def at_rows(lines, kind, head, row, WIDTH: tl.constexpr):
    """Pointers [lanes, d]."""
    base = pick(lines.tensors, kind) + head * pick(lines.head_strides, kind)
    return base + row.to(tl.int64)[:, None] * pick(lines.row_strides, kind) + tl.arange(0, WIDTH)[None, :]


@triton.jit
def at_past(past, line, row, packed, WIDTH: tl.constexpr):
    """Pointers [lanes, d] to rows -4 ... -1 of [4, n + 2g, d]."""
    return past + ((row + 4) * (packed.n + 2 * packed.g) + line)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_behind(x, past, kind, head, line, row, packed, WIDTH: tl.constexpr):
    """Rows where lanes begin, less 2 or 4: of the past where they are negative."""
    behind = (row < 0)[:, None]
    there = (row < packed.rows)[:, None] & (behind == 0)
    found = tl.load(at_rows(x, kind, head, row, WIDTH), mask=there, other=0.0)
    if past is not None:
        earlier = tl.load(at_past(past, line, row, packed, WIDTH), mask=behind, other=0.0)
        found = tl.where(behind, earlier, found)
    return found


@triton.jit
def begin_walk(x, past, packed, WIDTH: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr):
    """Of a program its line and what line_of says of it; of every lane its first row, and rows 4 and 2 before it."""
    line, lane = tl.program_id(0), tl.arange(0, LANES)
    kind, head, line_of_taps = line_of(line, packed)
    row = (tl.program_id(1) * (LANES // 2) + lane // 2) * (2 * STEPS) + lane % 2
    older = load_behind(x, past, kind, head, line, row - 4, packed, WIDTH)
    old = load_behind(x, past, kind, head, line, row - 2, packed, WIDTH)
    return (line, kind, head, line_of_taps), row, older, old


@triton.jit
def within_document(older, old, row, packed):
    """Rows t-4 and t-2 in fp32, zero where they are not of row t's document; and how many rows of it lie before t."""
    document = tl.load(packed.document_start + tl.minimum(row, packed.rows - 1)).to(tl.int32)
    before = (row - document)[:, None]
    older = tl.where(before >= 4, older.to(tl.float32), 0.0)
    return older, tl.where(before >= 2, old.to(tl.float32), 0.0), before


@triton.jit
def sigmoid(x):
    """In fewer instructions than a division: 1 / y is the square of 1 / sqrt(y), and y >= 1."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def convolve_kernel(
    x,
    past,  # [4, n + 2g, d], rows -4 ... -1; or None
    out,
    taps,  # [(n + 2g) d, 3]
    packed,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    of_line, row, older, old = begin_walk(x, past, packed, WIDTH, LANES, STEPS)
    _line, kind, head, line_of_taps = of_line
    oldest_tap, second_tap, own_tap = load_taps(taps, line_of_taps, WIDTH)
    at, to = at_rows(x, kind, head, row, WIDTH), at_rows(out, kind, head, row, WIDTH)
    x_step, out_step = 2 * pick(x.row_strides, kind), 2 * pick(out.row_strides, kind)
    for _step in tl.range(STEPS):
        inside = (row < packed.rows)[:, None]
        here = tl.load(at, mask=inside, other=0.0)
        own = here.to(tl.float32)
        oldest, second, _before = within_document(older, old, row, packed)
        mixed = oldest_tap * oldest + second_tap * second + own_tap * own
        result = own + mixed * sigmoid(mixed)
        tl.store(to, result.to(out.tensors[0].dtype.element_ty), mask=inside)
        older, old = old, here
        row += 2
        at += x_step
        to += out_step


@triton.jit
def convolution_gradient_kernel(
    x,
    past,
    grad,
    taps,
    grad_x,
    grad_past,
    parts,  # [row blocks, (n + 2g) d, 3], of the taps' gradients
    packed,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    of_line, row, older, old = begin_walk(x, past, packed, WIDTH, LANES, STEPS)
    line, kind, head, line_of_taps = of_line
    oldest_tap, second_tap, own_tap = load_taps(taps, line_of_taps, WIDTH)
    at, of_out = at_rows(x, kind, head, row, WIDTH), at_rows(grad, kind, head, row, WIDTH)
    to = at_rows(grad_x, kind, head, row - 4, WIDTH)
    x_step, grad_step = 2 * pick(x.row_strides, kind), 2 * pick(grad.row_strides, kind)
    written_step = 2 * pick(grad_x.row_strides, kind)
    # what rows t-4 and t-2 are owed so far
    owed_older = tl.zeros([LANES, WIDTH], tl.float32)
    owed_old = tl.zeros([LANES, WIDTH], tl.float32)
    of_oldest_tap = tl.zeros([LANES, WIDTH], tl.float32)
    of_second_tap = tl.zeros([LANES, WIDTH], tl.float32)
    of_own_tap = tl.zeros([LANES, WIDTH], tl.float32)
    for step in tl.range(STEPS + 2):
        inside = (row < packed.rows)[:, None]
        here = tl.load(at, mask=inside, other=0.0)
        own, grad_own = here.to(tl.float32), tl.load(of_out, mask=inside, other=0.0).to(tl.float32)
        oldest, second, before = within_document(older, old, row, packed)
        mixed = oldest_tap * oldest + second_tap * second + own_tap * own
        gate = sigmoid(mixed)
        grad_mixed = grad_own * (gate + mixed * gate * (1.0 - gate))
        counted = tl.where(step < STEPS, grad_mixed, 0.0)
        of_oldest_tap += counted * oldest
        of_second_tap += counted * second
        of_own_tap += counted * own
        result = owed_older + tl.where(before >= 4, oldest_tap * grad_mixed, 0.0)
        result = result.to(grad_x.tensors[0].dtype.element_ty)
        owed_older = owed_old + tl.where(before >= 2, second_tap * grad_mixed, 0.0)
        owed_old = grad_own + own_tap * grad_mixed
        tl.store(to, result, mask=((step >= 2) & (row - 4 < packed.rows))[:, None])
        if grad_past is not None:
            to_past = at_past(grad_past, line, row - 4, packed, WIDTH)
            tl.store(to_past, result, mask=(row < 4)[:, None])
        older, old = old, here
        row += 2
        at += x_step
        of_out += grad_step
        to += written_step
    part = parts + (tl.program_id(1) * (packed.n + 2 * packed.g) + line_of_taps) * WIDTH * 3 + tl.arange(0, WIDTH) * 3
    tl.store(part, tl.sum(of_oldest_tap, 0))
    tl.store(part + 1, tl.sum(of_second_tap, 0))
    tl.store(part + 2, tl.sum(of_own_tap, 0))

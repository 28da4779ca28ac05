"""Queries and keys of dense attention, normalised, times their gain and rotated, by one kernel; and its gradient.

A program takes a tile of rows of one head; heads of queries come first, then those of keys. Bytes bind: forward reads
and writes q and k once, backward reads them and their gradients and writes one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_geometry import cosine_sine, inverse_norm, rotated, turns


class Heads(NamedTuple):
    """Queries [t, n, d] and keys [t, g, d], with the strides of rows and heads."""

    tensors: tuple[torch.Tensor, torch.Tensor]
    row_strides: tuple[int, int]
    head_strides: tuple[int, int]


class Packed(NamedTuple):
    """document_start [t], F of every channel pair (triton_geometry.py), and how many rows, query heads and heads."""

    document_start: torch.Tensor
    frequency: torch.Tensor
    rows: int
    n: int
    heads: int


@triton.jit
def place(packed, ROWS: tl.constexpr):
    """A program's tile, its head, its rows and which of them there are; programs of the same rows run together."""
    tile, head = tl.program_id(0) // packed.heads, tl.program_id(0) % packed.heads
    row = tile * ROWS + tl.arange(0, ROWS)
    return tile, head, row, row < packed.rows


@triton.jit
def head_lines(of, head, n, row, HALF: tl.constexpr):
    """Pointers [rows, channels of the first half] to a head of queries, or of keys from n on."""
    is_key = head >= n
    base = tl.where(is_key, of.tensors[1], of.tensors[0])
    row_stride = tl.where(is_key, of.row_strides[1], of.row_strides[0]).to(tl.int64)
    head_stride = tl.where(is_key, of.head_strides[1], of.head_strides[0]).to(tl.int64)
    at = base + tl.where(is_key, head - n, head) * head_stride
    return at + row.to(tl.int64)[:, None] * row_stride + tl.arange(0, HALF)[None, :]


@triton.jit
def load_halves(at, inside, HALF: tl.constexpr):
    first = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    return first, tl.load(at + HALF, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_halves(at, first, second, inside, HALF: tl.constexpr):
    tl.store(at, first.to(at.dtype.element_ty), mask=inside[:, None])
    tl.store(at + HALF, second.to(at.dtype.element_ty), mask=inside[:, None])


@triton.jit
def gain_of(gains, head, n, HALF: tl.constexpr):
    """Of a head, in two halves [1, channels]."""
    at = tl.where(head >= n, gains[1], gains[0]) + tl.where(head >= n, head - n, head) * 2 * HALF + tl.arange(0, HALF)
    return tl.load(at)[None, :].to(tl.float32), tl.load(at + HALF)[None, :].to(tl.float32)


@triton.jit
def angles(packed, row, HALF: tl.constexpr, FAST: tl.constexpr):
    document = tl.load(packed.document_start + tl.minimum(row, packed.rows - 1)).to(tl.int32)
    return cosine_sine(turns(row - document, packed.frequency, 0, tl.arange(0, HALF), HALF, FAST), FAST)


@triton.jit
def turn_kernel(
    x,
    turned,
    gains,
    packed,
    EPSILON: tl.constexpr,
    NORMALISED: tl.constexpr,
    HALF: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
):
    _, head, row, inside = place(packed, ROWS)
    first, second = load_halves(head_lines(x, head, packed.n, row, HALF), inside, HALF)
    if NORMALISED:
        norm = inverse_norm(first, second, EPSILON, HALF)[:, None]
        gain_first, gain_second = gain_of(gains, head, packed.n, HALF)
        first, second = first * norm * gain_first, second * norm * gain_second
    first, second = rotated(first, second, *angles(packed, row, HALF, FAST))
    store_halves(head_lines(turned, head, packed.n, row, HALF), first, second, inside, HALF)


@triton.jit
def turn_gradient_kernel(
    x,
    grad,
    grad_x,
    gains,
    parts,  # [tiles of rows, heads, d], of the gains, summed over a tile
    packed,
    EPSILON: tl.constexpr,
    NORMALISED: tl.constexpr,
    HALF: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile, head, row, inside = place(packed, ROWS)
    grad_first, grad_second = load_halves(head_lines(grad, head, packed.n, row, HALF), inside, HALF)
    cosine, sine = angles(packed, row, HALF, FAST)
    grad_first, grad_second = rotated(grad_first, grad_second, cosine, -sine)
    if NORMALISED:
        first, second = load_halves(head_lines(x, head, packed.n, row, HALF), inside, HALF)
        norm = inverse_norm(first, second, EPSILON, HALF)[:, None]
        first, second = first * norm, second * norm
        at = parts + (tile.to(tl.int64) * packed.heads + head) * 2 * HALF + tl.arange(0, HALF)
        tl.store(at, tl.sum(grad_first * first, 0))
        tl.store(at + HALF, tl.sum(grad_second * second, 0))
        gain_first, gain_second = gain_of(gains, head, packed.n, HALF)
        grad_first, grad_second = grad_first * gain_first, grad_second * gain_second
        along = (tl.sum(grad_first * first, 1) + tl.sum(grad_second * second, 1))[:, None] / (2 * HALF)
        grad_first, grad_second = (grad_first - first * along) * norm, (grad_second - second * along) * norm
    store_halves(head_lines(grad_x, head, packed.n, row, HALF), grad_first, grad_second, inside, HALF)

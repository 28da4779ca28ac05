"""What every kernel of joint attention shares: rotary angles, normalisation and halves of channels.

Rotary angles of scale l are whole multiples of one angle per channel: queries stand at p / R, a block at the place of
its last row over R, so both are rows / R; R is 1 where positions count tokens. The fraction of a turn is kept in 32
bits,

    turn = rows * F mod 2^32        F = base^(-2i/d) / (2 pi R) turns a row, 64 bits behind the point

which integer multiplication gives exactly for every row, however far from the document's start, and without tables of
the sequence's length. Only its cosine and sine are rounded.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


@functools.cache
def frequency_table(width: int, base: float, ratio: int, scales: int, device: torch.device) -> torch.Tensor:
    """F of every scale and channel pair, int32 [L, 4, d/2]; kept for good, as CUDA graphs read it where it lies.

    The upper and the lower 32 bits, the upper rounded, and by how much that is more than the next finer scale's.
    """
    words, before = [], [0] * (width // 2)
    for scale in range(scales):
        turns_a_row = [base ** (-2 * i / width) / (2 * math.pi * ratio**scale) for i in range(width // 2)]
        fractions = [int(math.ldexp(turn, 64)) for turn in turns_a_row]
        words += [[value >> 32 for value in fractions], [value & 0xFFFFFFFF for value in fractions]]
        rounded = [(value + (1 << 31)) >> 32 for value in fractions]
        words += [rounded, [(new - old) & 0xFFFFFFFF for new, old in zip(rounded, before, strict=True)]]
        before = rounded
    signed = [[word - (word >> 31 << 32) for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32, device=device).view(scales, 4, width // 2)


@triton.jit
def turns(place, frequency, scale, channel, HALF: tl.constexpr, FAST: tl.constexpr):
    """The fraction of a turn at `place` rows of the document, in units of 2^-32: uint32 [places, d/2].

    FAST: with the upper 32 bits of F alone, rounded. Queries and keys then turn by the same slightly other angle a row,
    and what a query and a key n rows apart see of that is n 2^-33 turns.
    """
    upper = tl.load(frequency + 4 * scale * HALF + channel).to(tl.uint32, bitcast=True)
    place = place.to(tl.uint32, bitcast=True)[:, None]
    if FAST:
        return place * tl.load(frequency + (4 * scale + 2) * HALF + channel).to(tl.uint32, bitcast=True)[None, :]
    lower = tl.load(frequency + (4 * scale + 1) * HALF + channel).to(tl.uint32, bitcast=True)
    return place * upper[None, :] + tl.umulhi(place, lower[None, :])


@triton.jit
def turns_on(place, frequency, scale, channel, SCALES: tl.constexpr, HALF: tl.constexpr, FAST: tl.constexpr):
    """By how much the turn of the next scale is more than this one's, and 1; of the last scale its turn, and -1."""
    last = scale == SCALES - 1
    if FAST:
        more = tl.load(frequency + tl.where(last, 4 * scale + 2, 4 * scale + 7) * HALF + channel)
        turn = place.to(tl.uint32, bitcast=True)[:, None] * more.to(tl.uint32, bitcast=True)[None, :]
    else:
        before = turns(tl.where(last, 0, place), frequency, scale, channel, HALF, FAST)
        turn = turns(place, frequency, tl.minimum(scale + 1, SCALES - 1), channel, HALF, FAST) - before
    return turn, tl.where(last, -1.0, 1.0)


@triton.jit
def cosine_sine(turn, FAST: tl.constexpr):
    """Of turns in units of 2^-32. FAST: by the device's own functions, good to 2^-20, enough for 16-bit operands."""
    if FAST:
        # the upper 23 bits as the mantissa of a number in [1, 2), a turn too many: a conversion would be slower
        angle = ((turn >> 9) + 0x3F800000).to(tl.float32, bitcast=True) * 6.283185307179586
        return libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    angle = turn.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def rotated(first, second, cosine, sine):
    """Both halves of the channels, every pair (i, i + d/2) turned."""
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def joined(first, second):
    """Two halves [lines, d/2] side by side: [lines, d]."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [first.shape[0], 2 * first.shape[1]])


@triton.jit
def halves(x):
    """The inverse of `joined`."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def inverse_norm(first, second, EPSILON: tl.constexpr, HALF: tl.constexpr):
    """1 / sqrt(mean of squares + epsilon) of rows in two halves."""
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + EPSILON)


@triton.jit
def of_heads(pointer, head, channel, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    """A vector per head: [1, channels] of one head, [tile rows, channels] where rows of several heads share a tile."""
    if HEADS == 1:
        return tl.load(pointer + head * WIDTH + channel)[None, :].to(tl.float32)
    return tl.load(pointer + head[:, None] * WIDTH + channel[None, :]).to(tl.float32)

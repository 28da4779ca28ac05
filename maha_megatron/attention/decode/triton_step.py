"""What the kernels of a decoding step are given, and where entries lie.

Scale l of a stream has its entries in the state, slots -1, -2, ... of the piece, and those of the piece itself, slots
0, 1, ..., which a buffer holds for all scales one after the other:

    slots of scale l    -held_l ... -2 -1 | 0 1 ...              rows of the piece: T, slots: ceil(T / R_l)
                        state.entries[l]  | fresh

Everything is contiguous, and streams differ in nothing but their document starts: one launch serves them all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from maha_megatron.attention.triton_slots import first_slot, pick, stride_of


class Streams(NamedTuple):
    """A state's tensors: entries of every scale [B, held, 2, g, d], raw rows [B, 4 + k, n + 2g, d] or None, and the
    counts [B].
    """

    entries: tuple[torch.Tensor, ...]
    rows: torch.Tensor | None
    offset: torch.Tensor
    rewindable: torch.Tensor


class Learned(NamedTuple):
    """Gains [n, d] and [g, d], rho [L, n, d] and beta [L, n] or None, and F of every scale and channel pair."""

    query_gain: torch.Tensor
    key_gain: torch.Tensor
    rho: torch.Tensor | None
    beta: torch.Tensor | None
    frequency: torch.Tensor


class Parts(NamedTuple):
    """Of every tile of entries: the largest logit and the sum of weights [B T, n, tiles], in units of log 2, and the
    weighted sum of values [B T, n, tiles, d], in fp32.
    """

    tops: torch.Tensor
    masses: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """Numbers that the kernels are compiled for.

    Args:
        rows: T, of every stream's piece.
        kept_rows: raw rows that the state holds, 4 + k.
        rewind_rows: k.
        method, ratio, windows, epsilon: as in the spec.
        held: entries that the state holds, of every scale.
        slots: of the piece, of every scale.
        slots_before: of the piece, of all finer scales; and of all scales.
        half: half the channels of a head.
        fast, precision: as in scale_attention/triton_arguments.py.
    """

    rows: int
    kept_rows: int
    rewind_rows: int
    method: str
    ratio: int
    windows: tuple[int, ...]
    held: tuple[int, ...]
    slots: tuple[int, ...]
    slots_before: tuple[int, ...]
    half: int
    epsilon: float
    fast: bool
    precision: str


@triton.jit
def document_at(starts, row, STEP: tl.constexpr):
    """Where the document of a row of the piece starts; `starts`: of the stream."""
    return tl.load(starts + tl.minimum(tl.maximum(row, 0), STEP.rows - 1)).to(tl.int32)


@triton.jit
def blocks_of(starts, slot, scale, STEP: tl.constexpr):
    """Of slots from 0 on: the finer slot of their first child, and whether they hold a complete block."""
    stride = stride_of(STEP.ratio, scale)
    document = document_at(starts, slot * stride, STEP)
    block = slot - first_slot(document, STEP.ratio, scale)
    last_row = document + (block + 1) * stride - 1
    complete = (block >= 0) & (last_row < STEP.rows) & (document_at(starts, last_row, STEP) == document)
    return first_slot(document, STEP.ratio, scale - 1) + STEP.ratio * block, complete


@triton.jit
def at_fresh(fresh, stream, slot, scale, kind, group, g, STEP: tl.constexpr):
    """Pointers to the first channel of keys (kind 0) or values of slots from 0 on."""
    SLOTS_BEFORE: tl.constexpr = STEP.slots_before
    line = stream.to(tl.int64) * SLOTS_BEFORE[len(STEP.windows)] + pick(SLOTS_BEFORE, scale) + slot
    return fresh + ((line * 2 + kind) * g + group) * (2 * STEP.half)


@triton.jit
def at_held(entries, stream, index, scale, kind, group, g, STEP: tl.constexpr):
    """The same of entries of a state, oldest first."""
    HELD: tl.constexpr = STEP.held
    line = stream.to(tl.int64) * pick(HELD, scale) + index
    return pick(entries, scale) + ((line * 2 + kind) * g + group) * (2 * STEP.half)


@triton.jit
def at_slots(entries, fresh, stream, slot, scale, kind, group, g, STEP: tl.constexpr):
    """The same of any slots."""
    HELD: tl.constexpr = STEP.held
    held = at_held(entries, stream, slot + pick(HELD, scale), scale, kind, group, g, STEP)
    return tl.where(slot < 0, held, at_fresh(fresh, stream, slot, scale, kind, group, g, STEP))

"""What the kernels of joint attention are given, grouped: tensors with their strides, and what is compiled in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Places(NamedTuple):
    """document_start [rows], and F of every scale and channel pair (triton_geometry.py)."""

    document_start: torch.Tensor
    frequency: torch.Tensor
    rows: int


class Rows(NamedTuple):
    """A tensor [rows, n, d]."""

    tensor: torch.Tensor
    row_stride: int
    head_stride: int


class Queries(NamedTuple):
    """Raw queries, their gain [n, d], and rho [L, n, d] and beta [L, n] where the spec has them."""

    raw: Rows
    gain: torch.Tensor
    rho: torch.Tensor | None
    beta: torch.Tensor | None
    n: int
    n_per_group: int


class Scales(NamedTuple):
    """A tensor [entries, g, d] of every scale."""

    tensors: tuple[torch.Tensor, ...]
    entry_strides: tuple[int, ...]
    group_strides: tuple[int, ...]


def of_scales(tensors: Sequence[torch.Tensor]) -> Scales:
    return Scales(tuple(tensors), tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors))


class Keys(NamedTuple):
    """Prepared keys [g, entries of all scales, d], and values."""

    prepared: torch.Tensor
    total: int
    raw_values: Scales


class Preparation(NamedTuple):
    """What prepared keys are made with, beside raw ones: Places, and gain [g, d]; `prepared` [g, `total` entries, d] is
    written. Flat, as Triton loses a number of rows that is 1 in a tuple of a tuple.
    """

    document_start: torch.Tensor
    frequency: torch.Tensor
    rows: int
    gain: torch.Tensor
    prepared: torch.Tensor
    total: int


class QueryGradients(NamedTuple):
    """What the first kernel of backward writes, for the heads that it was given.

    grad_q [t, n, d]; delta and norms (1 / root mean square of the raw queries) [n, t]; offsets [n, L, t], c_l - LSE in
    units of log 2; turned [n, L, t, d], queries times their gain, rotated for every scale, not normalised;
    utility_gradients and shares (the scale's part of the softmax) [n, L, t]. learned_parts [tiles, n, 1 + L + 1, d],
    sums over each tile of rows: of the gain; with utilities of rho too, before the gain, and of beta in the first ones.
    """

    grad_q: Rows
    delta: torch.Tensor
    norms: torch.Tensor
    offsets: torch.Tensor
    turned: torch.Tensor
    utility_gradients: torch.Tensor
    shares: torch.Tensor
    learned_parts: torch.Tensor


class KeyGradients(NamedTuple):
    """What the second and third kernel of backward write.

    gain_parts [tiles of keys of all scales, g, d]; sums [programs, g, 2, keys of a tile, d], of programs that share
    their tile of keys with others.
    """

    grad_keys: Scales
    grad_values: Scales
    gain_parts: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Numbers that kernels are compiled for.

    Args:
        ratio, windows, epsilon: as in the spec.
        past_slots: of every scale, entries in front of slot 0.
        half: half the channels of a head.
        fast: angles with 32 bits, and sine and cosine by the device's own functions.
        utilities: whether there are rho and beta.
        precision: of products of fp32, as Triton's input_precision.
    """

    ratio: int
    windows: tuple[int, ...]
    past_slots: tuple[int, ...]
    half: int
    epsilon: float
    fast: bool
    utilities: bool
    precision: str


@dataclass(frozen=True, kw_only=True)
class GroupSizes:
    """More numbers that the kernel of warp groups is compiled for.

    Args:
        heads: query heads of a program, 1 or 2.
        stages: tiles of keys and values in shared memory.
    """

    heads: int
    stages: int

    @property
    def rows(self) -> int:
        """Of a program."""
        return 128 // self.heads

"""What the kernels of joint attention are given, grouped: tensors with their strides, and what is compiled in."""

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


class Keys(NamedTuple):
    """Prepared keys [g, entries of all scales, d], and values."""

    prepared: torch.Tensor
    total: int
    raw_values: Scales


class Lists(NamedTuple):
    """Which rows opened each block, by KV group (triton_opened.py).

    chosen int32 [g, t, blocks], the block of from_scale by its place among the entries of that scale, -1 for none. Of
    the same numbers, one after another as t * blocks places: order int64 [g, t * blocks], the places sorted by block,
    -1 first, and keys int32 [g, t * blocks], `1 + block + group * stride` of each; of places all groups are counted.
    """

    chosen: torch.Tensor
    keys: torch.Tensor
    order: torch.Tensor
    length: int  # t * blocks
    stride: int


class OpeningQueries(NamedTuple):
    """Queries as opened keys read them: normalised and turned for to_scale [n, t, d] in q's dtype, and what is added to
    their logits [n, t], in units of log 2: the utility, in backward minus log-sum-exp. delta [n, t] in backward alone.
    """

    turned: torch.Tensor
    offsets: torch.Tensor
    delta: torch.Tensor | None


class OpenedOutputs(NamedTuple):
    """What each block that a row opened gives it: O [n, t, blocks, d] in q's dtype, LSE [n, t, blocks], utilities
    included, in units of log 2. Nothing is written where nothing was opened.
    """

    outs: torch.Tensor
    lses: torch.Tensor


class OpenedQueries(NamedTuple):
    """What each block that a row opened asks of its query: dq' [n, t, blocks, d] in q's dtype, turned for to_scale; the
    gradient of the utility, and the block's part of the softmax [n, t, blocks]. `chosen` as in Lists.
    """

    chosen: torch.Tensor
    turned: torch.Tensor
    utility_gradients: torch.Tensor
    shares: torch.Tensor


class OpenedKeys(NamedTuple):
    """What opened blocks ask of keys and values: dK' and dV [g, entries of to_scale, 2, d], 0 where none was opened.

    sums [g, runs, 2, 2, children of a tile, d]: dK' and dV of the blocks that a run shares with the ones before it, and
    with those behind.
    """

    grads: torch.Tensor
    sums: torch.Tensor


class QueryGradients(NamedTuple):
    """What the first kernel of backward writes, for the heads that it was given.

    grad_q [t, n, d]; delta [n, t], where scales are apart [n, L, t]; norms [n, t], 1 / root mean square of the raw
    queries; offsets [n, L, t], what is added to logits to make weights of them, in units of log 2; turned [n, L, t, d],
    queries times their gain, rotated for every scale, not normalised, with one turn [n, 1, t, d]; utility_gradients and
    shares (the scale's part of the softmax) [n, L, t]. learned_parts [tiles, n, 1 + L + 1, d], sums over each tile of
    rows: of the gain; with utilities of rho too, before the gain, and of beta in the first ones. The last three count
    opened keys as one more scale. opened: of a refined layer, what was found before.
    """

    grad_q: Rows
    delta: torch.Tensor
    norms: torch.Tensor
    offsets: torch.Tensor
    turned: torch.Tensor
    utility_gradients: torch.Tensor
    shares: torch.Tensor
    learned_parts: torch.Tensor
    opened: OpenedQueries | None = None


class KeyGradients(NamedTuple):
    """What the second and third kernel of backward write.

    gain_parts [tiles of keys of all scales, g, d]; sums [programs, g, 2, keys of a tile, d], of programs that share
    their tile of keys with others. opened: of a refined layer, what is to be added.
    """

    grad_keys: Scales
    grad_values: Scales
    gain_parts: torch.Tensor
    sums: torch.Tensor
    opened: OpenedKeys | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Numbers that kernels are compiled for.

    Args:
        ratio, windows, epsilon: as in the spec.
        past_slots: of every scale, entries in front of slot 0.
        half: half the channels of a head.
        fast: angles with 32 bits, and sine and cosine by the device's own functions.
        utilities: whether there are rho and beta.
        apart: whether every scale has a softmax of its own, rather than one over the keys of all.
        one_turn: whether queries turn alike for every scale, since there is one or all count tokens.
        precision: of products of fp32, as Triton's input_precision.
        blocks: that a row opens; 0 where the layer opens none.
        from_scale, to_scale: where they lie, and what is read of them.
    """

    ratio: int
    windows: tuple[int, ...]
    past_slots: tuple[int, ...]
    half: int
    epsilon: float
    fast: bool
    utilities: bool
    apart: bool
    one_turn: bool
    precision: str
    blocks: int = 0
    from_scale: int = 0
    to_scale: int = 0

    def __post_init__(self) -> None:
        assert not (self.apart and self.blocks), "opened keys are a part of one softmax"

    @property
    def branches(self) -> int:
        """The scales and, last, opened keys where there are any."""
        return len(self.windows) + (self.blocks > 0)


@dataclass(frozen=True, kw_only=True)
class GroupSizes:
    """More numbers that the forward by warp groups is compiled for.

    Args:
        heads: query heads of a program, 1 or 2.
        stages: tiles of keys and values in shared memory.
        each: whether outputs of every scale are written, rather than of all.
    """

    heads: int
    stages: int
    each: bool

    @property
    def rows(self) -> int:
        """Of a program."""
        return 128 // self.heads


@dataclass(frozen=True, kw_only=True)
class KeyGroupSizes:
    """More numbers that the keys' gradients by warp groups are compiled for.

    Args:
        stages: tiles of turned queries and dO in shared memory.
        shared: whether several programs share the rows that see some tile of keys.
    """

    stages: int
    shared: bool

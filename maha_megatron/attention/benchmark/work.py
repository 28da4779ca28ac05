"""What a pass has to do: keys that a row sees and keys that kernels load, bytes, products, and the least time for them.

Letters: t rows of a call, n query heads, g KV groups, d head width, R_l stride of scale l.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maha_megatron.attention.benchmark.subjects import Setting
from maha_megatron.attention.scale_attention.triton_tuning import tuning_for
from maha_megatron.attention.slots import visible_slots
from maha_megatron.scales import slot_count, stride, visible_pairs

PRODUCTS_FORWARD = 2  # Q K', P V
PRODUCTS_BACKWARD = 5  # Q K' again, dO V', P' dO, dS K, dS' Q
_PLAIN_TILES = (64, 64)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a device does in a second, measured: bytes that a copy reads and writes, operations of 16-bit products."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one call of the operator.

    visible_keys, loaded_keys: of a row, mean; loaded ones with the masked lanes of their tiles. Of forward and of
    backward: flops (products of visible pairs), bytes (every tensor that must be read or written, once) and floor_s.
    """

    visible_keys: float
    loaded_keys: float
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    forward_floor_s: float
    backward_floor_s: float


def forward_tiles(setting: Setting, itemsize_bytes: int) -> tuple[int, int]:
    """Rows and keys of a tile of the forward kernel on this device; 64 and 64 where no kernel of ours runs."""
    if setting.backend != "triton" or not torch.cuda.is_available():
        return _PLAIN_TILES
    tiles = tuning_for(itemsize_bytes, torch.cuda.get_device_capability()).forward
    return tiles.rows, tiles.keys


def loaded_keys(
    document_lengths: Sequence[int], ratio: int, windows: Sequence[int], tile_rows: int, tile_keys: int
) -> float:
    """Keys that kernels load for a row, mean over the rows, masked lanes included.

    The geometry is the kernels': a tile of rows loads whole tiles of keys at every scale, from the oldest key that its
    first row sees to the newest that its last row sees, across documents.
    """
    lengths = torch.tensor(list(document_lengths))
    starts, rows = (lengths.cumsum(0) - lengths).repeat_interleave(lengths), int(lengths.sum())
    first = torch.arange(0, rows, tile_rows)
    last = (first + tile_rows - 1).clamp(max=rows - 1)
    tiles = 0
    for scale, window in enumerate(windows):
        begin, _ = visible_slots(first, starts[first], stride(ratio, scale), window)
        _, end = visible_slots(last, starts[last], stride(ratio, scale), window)
        tiles += int(-(-(end - begin) // tile_keys).sum())
    return tiles * tile_keys * tile_rows / rows


def visible_keys(document_lengths: Sequence[int], ratio: int, windows: Sequence[int]) -> float:
    """Keys that a row sees, mean over the rows."""
    counts = {length: sum(visible_pairs(length, ratio, windows)) for length in set(document_lengths)}
    return sum(counts[length] for length in document_lengths) / sum(document_lengths)


def bytes_of(setting: Setting, rows: int, windows: Sequence[int], itemsize_bytes: int) -> tuple[float, float]:
    """Bytes that forward and backward cannot avoid where the pyramid and prepared keys go through memory once.

    With c = sum over l > 0 of ceil(t / R_l) / t, the entries of coarser scales for each row (1/3 at ratio 4):

        forward     q, out           2 n          k, v               2 g
                    prepared keys    2 g (1 + c)  coarser values     2 g c       written once, read once
        backward    q, out, dO, dq   4 n          k, v, dk, dv       4 g
                    prepared keys and coarser values as in forward, since they are made again
                    gradients of coarser keys and values             4 g c       written once, read once

    times t d and the bytes of an element. Numbers per row and head (log-sum-exp, delta) are left out: below 2 %.
    """
    coarser = sum(slot_count(rows, stride(setting.operator.ratio, scale)) for scale in range(1, len(windows))) / rows
    n, g = setting.heads, setting.groups
    prepared = 2 * g * (1 + coarser) + 2 * g * coarser
    element = rows * setting.width * itemsize_bytes
    return (2 * n + 2 * g + prepared) * element, (4 * n + 4 * g + prepared + 4 * g * coarser) * element


def floor_s(own_bytes: float, made_bytes: float, flops: float, card: Card) -> float:
    """The least seconds of a pass: made / bandwidth + max(own / bandwidth, flops / product rate).

    What is prepared (`made_bytes`) goes to memory and back before attention starts; attention's own bytes and its
    products then overlap at best, each at the rate that the card was measured to reach. `flops` are those of loaded
    pairs, since masked lanes are multiplied too. Exponentials, norms and rotations count nothing.
    """
    return made_bytes / card.bytes_per_s + max(own_bytes / card.bytes_per_s, flops / card.flops_per_s)


def work_of(setting: Setting, length: int, itemsize_bytes: int, card: Card) -> Work:
    """The work of one call with documents of (up to) `length` rows."""
    lengths, spec = setting.documents_at(length), setting.spec_at(length)
    rows, ratio, windows = sum(lengths), spec.ratio, spec.windows
    seen = visible_keys(lengths, ratio, windows)
    loaded = loaded_keys(lengths, ratio, windows, *forward_tiles(setting, itemsize_bytes))
    per_key = 2 * setting.width * setting.heads * rows  # operations of one product, for each key of a row
    all_bytes = bytes_of(setting, rows, windows, itemsize_bytes)
    element = rows * setting.width * itemsize_bytes
    n, g = setting.heads, setting.groups
    own_bytes = (2 * n + 2 * g) * element, (4 * n + 4 * g) * element
    floors = [
        floor_s(own, total - own, products * per_key * loaded, card)
        for own, total, products in zip(own_bytes, all_bytes, (PRODUCTS_FORWARD, PRODUCTS_BACKWARD), strict=True)
    ]
    return Work(
        visible_keys=seen,
        loaded_keys=loaded,
        forward_flops=PRODUCTS_FORWARD * per_key * seen,
        backward_flops=PRODUCTS_BACKWARD * per_key * seen,
        forward_bytes=all_bytes[0],
        backward_bytes=all_bytes[1],
        forward_floor_s=floors[0],
        backward_floor_s=floors[1],
    )

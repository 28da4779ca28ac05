"""Which slots a tile of rows can see, as numbers on the host: the static geometry of banded scale attention.

    rows of one tile                      slots of one scale, cut into segments of `step` = tile_rows / R slots
    i*C ........ (i+1)*C - 1     see      segment i - P, ..., i - 1, i         P = ceil(w / step) segments back

    proof: row t sees slots below floor((t + 1 + e) / R) <= ceil((t + 1) / R) <= (i + 1) * step (slots.py), and not
    below floor((t + 1) / R) - w >= i * step - w.

Tiles of a coarse scale are longer, so that its segments hold enough slots to be worth a matrix product. Where R
exceeds the rows processed at once, these are one tile and its band is w slots and the two that rounding can add.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from maha_megatron.attention.slots import visible_slots
from maha_megatron.scales import slot_count, stride

_TILE_ROWS, _SEGMENT_SLOTS = 64, 16


@dataclass(frozen=True)
class Band:
    """One scale: tiles of `tile_rows` rows see `width` slots that begin at slot floor(first row / R) - lookback."""

    stride_rows: int
    window: int
    tile_rows: int
    lookback: int
    width: int
    step: int

    def first_slot(self, row: int) -> int:
        """First slot of the band of the tile that starts at `row`; slots below 0 are padding."""
        return row // self.stride_rows - self.lookback


@dataclass(frozen=True)
class Plan:
    """Rows are processed `chunk_rows` at once; one band for every scale."""

    chunk_rows: int
    bands: tuple[Band, ...]


def plan_bands(rows: int, ratio: int, windows: tuple[int, ...], chunk_limit_rows: int) -> Plan:
    """The bands of a packed sequence of `rows` rows, in chunks of at most about `chunk_limit_rows` rows.

    Tiles and chunks are tile * ratio**i rows with tile = c * ratio**j, c <= ratio: every stride up to the chunk
    divides it.
    """
    power = 1
    while power * ratio <= _TILE_ROWS:
        power *= ratio
    tile = power * -(-_TILE_ROWS // power)
    chunk = tile
    while chunk * ratio <= chunk_limit_rows and chunk < rows:
        chunk *= ratio
    bands = []
    for scale, window in enumerate(windows):
        stride_rows = stride(ratio, scale)
        window = min(window, slot_count(rows, stride_rows))
        if stride_rows > chunk:
            bands.append(Band(stride_rows, window, chunk, lookback=window, width=window + 2, step=0))
            continue
        tile_rows = tile
        while tile_rows < chunk and tile_rows < stride_rows * _SEGMENT_SLOTS:
            tile_rows *= ratio
        step = tile_rows // stride_rows
        lookback = -(-window // step) * step
        bands.append(Band(stride_rows, window, tile_rows, lookback, lookback + step, step))
    return Plan(chunk, tuple(bands))


def visibility_bias(band: Band, row: torch.Tensor, document: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the logits of `row` (consecutive, a multiple of tile_rows): 0 or -inf, [rows, width]."""
    first, end = visible_slots(row, document, band.stride_rows, band.window)
    tile_start = row // band.tile_rows * band.tile_rows
    base = tile_start // band.stride_rows - band.lookback
    # slots first..end-1 lie less than half their count from their middle; this form has vectorised kernels on a CPU
    half = ((end - first) / 2).to(dtype)[:, None]
    middle = ((first + end - 1 - 2 * base) / 2).to(dtype)[:, None]
    inside = half - (torch.arange(band.width, device=row.device, dtype=dtype) - middle).abs_()
    return F.threshold_(inside, 0.0, -torch.inf).clamp_(max=0.0)


def padded_shape(groups: int, width: int, band: Band, rows: int) -> tuple[int, int, int]:
    """Shape of keys or values by slot with `lookback` slots in front and enough behind for `rows` rows of tiles."""
    return groups, (rows - band.tile_rows) // band.stride_rows + band.width, width


def gather_tiles(padded: torch.Tensor, band: Band, start: int, rows: int) -> torch.Tensor:
    """The bands of the tiles of rows start..start+rows: [g * tiles, width, d]."""
    span = _span(padded, band, start, rows)
    if rows == band.tile_rows:
        return span
    return span.unfold(1, band.width, band.step).transpose(2, 3).flatten(0, 1)


def add_tiles(padded: torch.Tensor, tiles: torch.Tensor, band: Band, start: int, rows: int) -> None:
    """The transpose of `gather_tiles`: adds each tile's band to its slots, segment by segment, without a scatter."""
    span = _span(padded, band, start, rows)
    if rows == band.tile_rows:
        span += tiles
        return
    count = rows // band.tile_rows
    span = span.unflatten(1, (-1, band.step))
    tiles = tiles.unflatten(0, (-1, count)).unflatten(2, (-1, band.step))
    for segment in range(tiles.shape[2]):
        span[:, segment : segment + count] += tiles[:, :, segment]


def _span(padded: torch.Tensor, band: Band, start: int, rows: int) -> torch.Tensor:
    first = start // band.stride_rows
    return padded[:, first : first + (rows // band.tile_rows - 1) * band.step + band.width]

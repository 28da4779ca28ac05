"""Which slots a tile of rows can see, as numbers on the host: the static geometry of banded scale attention.

    rows of one tile                      slots of one scale, cut into segments of `step` = tile_rows / R slots
    i*C ........ (i+1)*C - 1     see      segment i - P, ..., i - 1, i         P = ceil(w / step) segments back

    proof: row t sees slots below floor((t + 1 + e) / R) <= ceil((t + 1) / R) <= (i + 1) * step (slots.py), and not
    below floor((t + 1) / R) - w >= i * step - w.

Tiles of a coarse scale are longer, so that its segments hold enough slots to be worth a matrix product. A scale whose
stride exceeds that has one tile for every chunk of rows, and its band is w slots and those that begin in the chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from maha_megatron.attention.slots import visible_slots
from maha_megatron.scales import slot_count, stride

_TILE_ROWS, _SEGMENT_SLOTS = 64, 16


@dataclass(frozen=True)
class Band:
    """One scale: a tile sees `width` slots that begin at slot floor(first row / R) - lookback.

    Below slot 0 lie the slots of the past, and padding in front of them. Tiles hold `tile_rows` rows and begin `step`
    slots apart; without a step there is one tile in every chunk.
    """

    stride_rows: int
    window: int
    lookback: int
    width: int
    tile_rows: int = 0
    step: int = 0

    def tiles(self, rows: int) -> int:
        """Tiles in a chunk of `rows` rows."""
        return rows // self.tile_rows if self.step else 1

    def first_slot(self, row: torch.Tensor, start: int) -> torch.Tensor:
        """The slot at which the band of each row begins, in a chunk whose rows `row` begin at `start`."""
        tile = row // self.tile_rows * self.step if self.step else torch.full_like(row, start // self.stride_rows)
        return tile - self.lookback

    def span(self, start: int, rows: int) -> range:
        """Slots that a chunk of rows start..start+rows reads: those of all its bands together."""
        first = start // self.stride_rows - self.lookback
        return range(first, first + (self.tiles(rows) - 1) * self.step + self.width)


@dataclass(frozen=True)
class Plan:
    """Chunks of up to `chunk_rows` rows, each a multiple of `unit_rows`; one band for every scale."""

    unit_rows: int
    chunk_rows: int
    padded_rows: int
    bands: tuple[Band, ...]

    def chunks(self) -> list[tuple[int, int]]:
        """(first row, rows) of every chunk; the last may reach beyond the sequence, by less than a unit."""
        starts = range(0, self.padded_rows, self.chunk_rows)
        return [(start, min(self.chunk_rows, self.padded_rows - start)) for start in starts]


def plan_bands(
    rows: int, ratio: int, windows: tuple[int, ...], chunk_limit_rows: int, past_slots: tuple[int, ...]
) -> Plan:
    """The bands of a packed sequence of `rows` rows, in chunks of at most about `chunk_limit_rows` rows.

    `past_slots` slots of each scale, at most its window, lie in front of slot 0: there, where the band of the first
    tile would otherwise read padding. Few rows have one small tile; a single row's bands are its windows and one slot.

    Tiles and units are tile * ratio**i rows with tile = c * ratio**j, c <= ratio, so that every stride up to the unit
    divides it; a unit is at most a quarter of the rows, so that little is padded.
    """
    assert all(past <= window for past, window in zip(past_slots, windows, strict=True)), (past_slots, windows)
    power, least = 1, min(_TILE_ROWS, rows)
    while power * ratio <= least:
        power *= ratio
    tile = unit = power * -(-least // power)
    while unit * ratio <= min(chunk_limit_rows, rows // 4):
        unit *= ratio
    units = -(-rows // unit)
    chunk = unit * min(max(chunk_limit_rows // unit, 1), units)
    strides = [stride(ratio, scale) for scale in range(len(windows))]
    bands = [
        _band(step, min(window, past_slots[scale] + slot_count(rows, step)), ratio, tile, unit, chunk)
        for scale, (window, step) in enumerate(zip(windows, strides, strict=True))
    ]
    return Plan(unit, chunk, units * unit, tuple(bands))


def _band(stride_rows: int, window: int, ratio: int, tile: int, unit: int, chunk: int) -> Band:
    if stride_rows > unit:
        return Band(stride_rows, window, lookback=window, width=window + 1 - (1 - chunk) // stride_rows)
    tile_rows = tile
    while tile_rows < unit and tile_rows < stride_rows * _SEGMENT_SLOTS:
        tile_rows *= ratio
    step = tile_rows // stride_rows
    lookback = -(-window // step) * step
    return Band(stride_rows, window, lookback, lookback + step, tile_rows, step)


def visibility_bias(
    band: Band, row: torch.Tensor, start: int, document: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What to add to the logits of a chunk, whose rows `row` begin at `start`: 0 or -inf, [rows, width]."""
    first, end = visible_slots(row, document, band.stride_rows, band.window)
    base = band.first_slot(row, start)
    # slots first..end-1 lie less than half their count from their middle; this form has vectorised kernels on a CPU
    half = ((end - first) / 2).to(dtype)[:, None]
    middle = ((first + end - 1 - 2 * base) / 2).to(dtype)[:, None]
    inside = half - (torch.arange(band.width, device=row.device, dtype=dtype) - middle).abs_()
    return F.threshold_(inside, 0.0, -torch.inf).clamp_(max=0.0)


def gather_tiles(span: torch.Tensor, band: Band, rows: int) -> torch.Tensor:
    """The bands of the tiles of a chunk of `rows` rows from its span [g, slots, d]: [g * tiles, width, d]."""
    if band.tiles(rows) == 1:
        return span
    return span.unfold(1, band.width, band.step).transpose(2, 3).flatten(0, 1)


def add_tiles(span: torch.Tensor, tiles: torch.Tensor, band: Band, rows: int) -> None:
    """The transpose of `gather_tiles`: adds each tile's band to its slots, segment by segment, without a scatter."""
    count = band.tiles(rows)
    if count == 1:
        span += tiles
        return
    span = span.unflatten(1, (-1, band.step))
    tiles = tiles.unflatten(0, (-1, count)).unflatten(2, (-1, band.step))
    for segment in range(tiles.shape[2]):
        span[:, segment : segment + count] += tiles[:, :, segment]

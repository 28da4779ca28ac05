"""Slot arithmetic and bands, against the definition in scales.py by brute force."""

import itertools
import random

import pytest
import torch

from maha_megatron.attention.documents import document_ranges
from maha_megatron.attention.scale_attention.bands import (
    add_tiles,
    gather_tiles,
    padded_shape,
    plan_bands,
    visibility_bias,
)
from maha_megatron.attention.slots import slots_of, visible_slots
from maha_megatron.scales import complete_blocks, first_slot, slot_count, stride, visible_blocks
from tests.support.attention import start_rows

RATIOS = range(2, 9)


def random_lengths(rows: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    cuts = sorted(generator.sample(range(1, rows), generator.randint(0, 12)))
    return [end - start for start, end in itertools.pairwise([0, *cuts, rows])]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", range(3))
def test_slots_hold_the_blocks_of_the_definition(ratio, seed):
    lengths = random_lengths(300, seed)
    document_start = start_rows(lengths)
    for scale in range(4):
        step = stride(ratio, scale)
        expected = {}
        for start, rows in document_ranges(document_start):
            for block in range(complete_blocks(rows, step)):
                expected[first_slot(start, step) + block] = (start, start + (block + 1) * step - 1)
        slots = slots_of(document_start, step)
        assert len(slots.complete) == slot_count(300, step)
        found = {
            slot: (slots.document[slot].item(), slots.last_row[slot].item())
            for slot in slots.complete.nonzero().flatten().tolist()
        }
        assert found == expected


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("chunk_limit", [1, 200, 10**6])
def test_every_visible_slot_lies_in_its_band_and_nothing_else_is_seen(ratio, chunk_limit):
    rows = 300
    windows = (20, 7, 5, 2)
    document_start = start_rows(random_lengths(rows, seed=ratio))
    plan = plan_bands(rows, ratio, windows, chunk_limit)
    document = torch.nn.functional.pad(document_start, (0, plan.padded_rows - rows), value=rows)
    for (scale, band), (start, count) in itertools.product(enumerate(plan.bands), plan.chunks()):
        row = torch.arange(start, start + count)
        assert not band.step or count % band.tile_rows == 0
        bias = visibility_bias(band, row, start, document[row], torch.float64)
        assert set(bias.unique().tolist()) <= {0.0, float("-inf")}
        for t in range(start, min(start + count, rows)):
            tile_start = t // band.tile_rows * band.tile_rows if band.step else start
            base = tile_start // band.stride_rows - band.lookback
            seen = {base + slot for slot in (bias[t - start] == 0).nonzero().flatten().tolist()}
            first_row = document_start[t].item()
            blocks = visible_blocks(t - first_row, band.stride_rows, windows[scale])
            assert seen == {first_slot(first_row, band.stride_rows) + block for block in blocks}


@pytest.mark.parametrize("rows", [1, 63, 512, 1100, 4096])
def test_chunks_cover_the_rows_with_little_padding(rows):
    plan = plan_bands(rows, 4, (128, 112, 64), 1024)
    assert [start for start, _ in plan.chunks()] == list(range(0, plan.padded_rows, plan.chunk_rows))
    assert sum(count for _, count in plan.chunks()) == plan.padded_rows
    assert rows <= plan.padded_rows < rows + max(64, rows // 4)


def test_visible_slots_end_between_floor_and_ceil():
    """The proof in slots.py, over every document start and row of a few blocks."""
    for ratio, scale in itertools.product(RATIOS, range(3)):
        step = stride(ratio, scale)
        row = torch.arange(3 * step + 2)
        for start in range(min(len(row), 70)):
            _, end = visible_slots(row[start:], torch.full_like(row[start:], start), step, 5)
            assert (end >= (row[start:] + 1) // step).all()
            assert (end <= -(-(row[start:] + 1) // step)).all()


@pytest.mark.parametrize("ratio", [2, 4, 5])
def test_adding_tiles_is_the_transpose_of_gathering_them(ratio):
    plan = plan_bands(500, ratio, (20, 7, 5), 400)
    for band, (start, rows) in itertools.product(plan.bands, plan.chunks()):
        x = torch.randn(padded_shape(2, 3, band, plan.padded_rows), dtype=torch.float64, requires_grad=True)
        tiles = gather_tiles(x, band, start, rows)
        y = torch.randn_like(tiles)
        (expected,) = torch.autograd.grad(tiles, x, y)
        found = torch.zeros_like(x)
        add_tiles(found, y, band, start, rows)
        torch.testing.assert_close(found, expected)

"""Slot arithmetic and bands, against the definition in scales.py by brute force."""

import itertools
import random

import pytest
import torch

from maha_megatron.attention.documents import document_ranges
from maha_megatron.attention.pyramid.eager import _family
from maha_megatron.attention.scale_attention.bands import (
    add_tiles,
    gather_tiles,
    plan_bands,
    visibility_bias,
)
from maha_megatron.attention.slots import slots_of, visible_slots
from maha_megatron.attention.state import piece_document_start
from maha_megatron.scales import complete_blocks, first_slot, slot_count, stride, visible_blocks
from tests.support.attention import start_rows

RATIOS = range(2, 9)
NO_PAST = (0, 0, 0, 0)


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
    plan = plan_bands(rows, ratio, windows, chunk_limit, NO_PAST)
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


def pieces(seed: int) -> list[tuple[torch.Tensor, list[tuple[int, int]]]]:
    """document_start_t of pieces of random sequences, and the (first row, rows) of their documents by brute force."""
    generator, found = random.Random(seed), []
    for rows in (1, 2, 7, 20, 75, 130, *[300] * 15):
        lengths = random_lengths(rows, generator.randrange(10**6)) if rows > 20 else [rows]
        first, stop = sorted(generator.sample(range(rows + 1), 2))
        starts = [0, *itertools.accumulate(lengths)][:-1]
        documents = [
            (start - first, min(length, stop - start))
            for start, length in zip(starts, lengths, strict=True)
            if start < stop and start + length > first
        ]
        found.append((piece_document_start(start_rows(lengths), first, stop), documents))
    return found


@pytest.mark.parametrize("ratio", RATIOS)
def test_slots_of_a_piece_hold_the_blocks_of_the_definition(ratio):
    """Complete blocks of the past sit in slots -1, -2, ..., a block that straddles the border in slot 0."""
    for (starts, documents), scale in itertools.product(pieces(ratio), range(4)):
        step, past, expected = stride(ratio, scale), 9, {}
        for start, rows in documents:
            ended = complete_blocks(max(-start, 0), step)
            for block in range(max(0, ended - past), complete_blocks(rows, step)):
                slot = block - ended if start < 0 else -(-start // step) + block
                assert slot not in expected
                expected[slot] = (start, start + (block + 1) * step - 1)
        slots = slots_of(starts, step, past)
        assert len(slots.complete) == past + slot_count(len(starts), step)
        found = {
            index - past: (slots.document[index].item(), slots.last_row[index].item())
            for index in slots.complete.nonzero().flatten().tolist()
        }
        assert found == expected


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("chunk_limit", [1, 200, 10**6])
def test_every_visible_slot_of_a_piece_lies_in_its_band(ratio, chunk_limit):
    windows = (20, 7, 5, 2)
    for starts, _ in pieces(ratio):
        rows = len(starts)
        plan = plan_bands(rows, ratio, windows, chunk_limit, windows)
        document = torch.nn.functional.pad(starts, (0, plan.padded_rows - rows), value=rows)
        for (scale, band), (start, count) in itertools.product(enumerate(plan.bands), plan.chunks()):
            assert band.lookback >= windows[scale], "the whole past lies in front of slot 0"
            row = torch.arange(start, start + count)
            bias = visibility_bias(band, row, start, document[row], torch.float64)
            for t in range(start, min(start + count, rows)):
                tile_start = t // band.tile_rows * band.tile_rows if band.step else start
                base = tile_start // band.stride_rows - band.lookback
                seen = {base + slot for slot in (bias[t - start] == 0).nonzero().flatten().tolist()}
                first = starts[t].item()
                blocks = visible_blocks(t - first, band.stride_rows, windows[scale])
                ended = complete_blocks(max(-first, 0), band.stride_rows)
                slot_of_block_0 = -ended if first < 0 else -(-first // band.stride_rows)
                assert seen == {slot_of_block_0 + block for block in blocks}


@pytest.mark.parametrize("ratio", RATIOS)
def test_parents_and_children_of_a_piece_are_those_of_the_definition(ratio):
    for (starts, _), scale in itertools.product(pieces(ratio), range(1, 4)):
        past = ratio - 1
        children, complete, place = _family(starts, ratio, scale, past)
        fine, coarse = slots_of(starts, stride(ratio, scale - 1), past), slots_of(starts, stride(ratio, scale))
        assert len(place) == len(fine.complete)
        expected = torch.full_like(place, len(complete) * ratio)
        for slot in complete.nonzero().flatten().tolist():
            for child, index in enumerate(children[slot].tolist()):
                behind = (ratio - 1 - child) * stride(ratio, scale - 1)
                assert fine.complete[index]
                assert fine.document[index] == coarse.document[slot]
                assert fine.last_row[index] == coarse.last_row[slot] - behind
                expected[index] = slot * ratio + child
        assert torch.equal(place, expected)


def test_the_bands_of_a_single_row_are_its_windows_and_one_slot():
    plan = plan_bands(1, 4, (128, 112, 124, 64), 10**6, (128, 112, 124, 64))
    assert [band.width for band in plan.bands] == [129, 113, 125, 65]
    assert plan.padded_rows == 1


@pytest.mark.parametrize("rows", [1, 63, 512, 1100, 4096])
def test_chunks_cover_the_rows_with_little_padding(rows):
    plan = plan_bands(rows, 4, (128, 112, 64), 1024, NO_PAST[:3])
    assert [start for start, _ in plan.chunks()] == list(range(0, plan.padded_rows, plan.chunk_rows))
    assert sum(count for _, count in plan.chunks()) == plan.padded_rows
    assert rows <= plan.padded_rows < rows + max(min(rows, 64), rows // 4)


def test_visible_slots_end_between_floor_and_ceil():
    """The proof in slots.py, over every document start and row of a few blocks."""
    for ratio, scale in itertools.product(RATIOS, range(3)):
        step = stride(ratio, scale)
        row = torch.arange(3 * step + 2)
        for start in range(-70, min(len(row), 70)):
            later = row[max(start, 0) :]
            _, end = visible_slots(later, torch.full_like(later, start), step, 5)
            assert (end >= (later + 1) // step).all()
            assert (end <= -(-(later + 1) // step)).all()


@pytest.mark.parametrize("ratio", [2, 4, 5])
def test_adding_tiles_is_the_transpose_of_gathering_them(ratio):
    plan = plan_bands(500, ratio, (20, 7, 5), 400, NO_PAST[:3])
    for band, (start, rows) in itertools.product(plan.bands, plan.chunks()):
        x = torch.randn(2, len(band.span(start, rows)), 3, dtype=torch.float64, requires_grad=True)
        tiles = gather_tiles(x, band, rows)
        y = torch.randn_like(tiles)
        (expected,) = torch.autograd.grad(tiles, x, y)
        found = torch.zeros_like(x)
        add_tiles(found, y, band, rows)
        torch.testing.assert_close(found, expected)

"""Every closed form of scales.py against a count that follows the definition row by row."""

import itertools
import random

import pytest

from maha_megatron import scales
from maha_megatron.scales import (
    complete_blocks,
    default_windows,
    first_slot,
    first_unreached_row,
    loaded_pairs,
    slot_count,
    stride,
    visible_blocks,
    visible_pairs,
)

HIERARCHIES = [(2, (4, 2)), (2, (1, 1, 1)), (3, (5, 2, 4)), (4, (128, 112, 3)), (4, (7,)), (5, (4, 9)), (8, (7, 7, 1))]
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 130, 400)


def seen(row, step, window):
    """Blocks that a row sees: of those whose last row is not after it, the last `window`."""
    complete = [block for block in range(row + 1) if step * (block + 1) - 1 <= row]
    return complete[-window:]


def random_hierarchies(count=60):
    """Also with holes between scales, and with a coarse scale that reaches less far than a finer one."""
    draw = random.Random(0)
    for _ in range(count):
        ratio = draw.choice((2, 3, 4))
        yield ratio, tuple(draw.randint(1, ratio + 3) for _ in range(draw.randint(1, 3)))


@pytest.mark.parametrize(("rows", "step", "blocks", "slots"), [(0, 4, 0, 0), (3, 4, 0, 1), (4, 4, 1, 1), (9, 4, 2, 3)])
def test_blocks_and_slots(rows, step, blocks, slots):
    assert (complete_blocks(rows, step), slot_count(rows, step)) == (blocks, slots)


def test_stride():
    assert [stride(4, scale) for scale in range(4)] == [1, 4, 16, 64]


@pytest.mark.parametrize(("ratio", "windows"), HIERARCHIES)
def test_visible_blocks(ratio, windows):
    for scale, window in enumerate(windows):
        for row in range(200):
            assert list(visible_blocks(row, ratio**scale, window)) == seen(row, ratio**scale, window)


@pytest.mark.parametrize(("ratio", "windows"), HIERARCHIES)
@pytest.mark.parametrize("rows", LENGTHS)
def test_visible_pairs(rows, ratio, windows):
    assert visible_pairs(rows, ratio, windows) == [
        sum(len(seen(row, ratio**scale, window)) for row in range(rows)) for scale, window in enumerate(windows)
    ]


@pytest.mark.parametrize(("ratio", "windows"), HIERARCHIES)
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("tile", [4, 64])
def test_loaded_pairs(rows, ratio, windows, tile):
    """A tile of queries loads, tile by tile from the oldest key on, whatever one of its rows sees."""
    expected = []
    for scale, window in enumerate(windows):
        pairs = 0
        for start in range(0, rows, tile):
            keys = set().union(*(seen(row, ratio**scale, window) for row in range(start, min(start + tile, rows))))
            tiles = {(key - min(keys)) // tile for key in keys}
            pairs += len(tiles) * tile * tile
        expected.append(pairs)
    assert loaded_pairs(rows, ratio, windows, tile) == expected
    assert all(loaded >= visible for loaded, visible in zip(expected, visible_pairs(rows, ratio, windows), strict=True))


@pytest.mark.parametrize(
    ("sequence_tokens", "windows"),
    [
        (1, (1,)),
        (128, (128,)),
        (129, (128, 32)),
        (2048, (128, 112, 128)),
        (4096, (128, 112, 124, 64)),
        (8192, (128, 112, 124, 128)),
        (16384, (128, 112, 124, 127, 64)),
        (65536, (128, 112, 124, 127, 127, 64)),
        (1_048_576, (128, 112, 124, 127, 127, 127, 127, 64)),
    ],
)
def test_default_windows(sequence_tokens, windows):
    assert default_windows(sequence_tokens) == windows
    assert len(windows) <= scales.MAX_SCALES
    assert first_unreached_row(sequence_tokens, 4, windows) is None


@pytest.mark.parametrize("ratio", scales.RATIOS)
def test_default_windows_reach_the_whole_sequence_in_few_scales(ratio):
    for sequence_tokens in (*range(1, 700, 37), 1000, 3000):
        windows = default_windows(sequence_tokens, ratio)
        assert first_unreached_row(sequence_tokens, ratio, windows) is None
        assert windows[-1] <= 128
        assert len(windows) == 1 or complete_blocks(sequence_tokens, ratio ** (len(windows) - 2)) > 128


@pytest.mark.parametrize(("ratio", "windows"), [*HIERARCHIES, *random_hierarchies()])
def test_first_unreached_row(ratio, windows):
    sees_row_0 = [
        any(0 in seen(row, ratio**scale, window) for scale, window in enumerate(windows)) for row in range(500)
    ]
    for sequence_tokens in (1, 5, 20, 63, 300, 500):
        expected = next((row for row in range(sequence_tokens) if not sees_row_0[row]), None)
        assert first_unreached_row(sequence_tokens, ratio, windows) == expected


@pytest.mark.parametrize("seed", range(20))
def test_slots_of_packed_documents_are_unique_and_ordered(seed):
    """And the block in slot j holds row j R, by which attention/slots.py finds the slot's document."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, draw.choice((3, 20, 100))) for _ in range(draw.randint(1, 30))]
    for step in (1, 2, 3, 4, 16, 64):
        slots, start = [], 0
        for length in lengths:
            for block in range(complete_blocks(length, step)):
                slots.append(first_slot(start, step) + block)
                assert slots[-1] * step in range(start + block * step, start + (block + 1) * step)
            start += length
        assert all(earlier < later for earlier, later in itertools.pairwise(slots))
        assert all(0 <= slot < slot_count(start, step) for slot in slots)

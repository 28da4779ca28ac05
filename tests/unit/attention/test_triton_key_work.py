"""What the two warp groups of the keys' gradients go over, by Triton's interpreter, beside what rows see."""

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_arguments import Places, Shape
from maha_megatron.attention.scale_attention.triton_key_gradient import first_program
from maha_megatron.attention.scale_attention.triton_key_work import GROUP_KEYS, ROWS, locate_work, tiles_of_work
from maha_megatron.attention.slots import visible_slots
from maha_megatron.scales import slot_count, stride

TILE, GROUPS = ROWS.value, 2
CASES = {
    "one program a tile": (4, (100, 512, 512), (0, 0, 0), (1, 1, 1), (301, 1, 700)),
    "several, of short windows": (4, (70, 10, 3), (0, 0, 0), (2, 3, 5), (301, 1, 700)),
    "a tile of rows more for the last that sees": (4, (66, 65, 49), (0, 0, 0), (1, 1, 1), (1500,)),
    "after a past": (3, (100, 90, 150), (100, 90, 150), (1, 2, 5), (301, 1, 400)),
    "after a past in tiles of its own": (2, (8, 300), (200, 300), (3, 1), (130,)),
    "one row": (2, (64, 64), (0, 0), (1, 1), (1,)),
    "one scale": (4, (200,), (0,), (3,), (63, 64, 65, 500)),
}


@triton.jit
def work_kernel(places, parts, found, SHAPE: tl.constexpr, GROUPS: tl.constexpr):
    scale, tile, part, group = locate_work(tl.program_id(0), GROUPS, places.rows, parts, SHAPE)
    begin, tiles_0, tiles_1 = tiles_of_work(scale, tile, part, tl.arange(0, ROWS), places, parts, SHAPE)
    for half in tl.static_range(2):
        near, far, count = tiles_0 if half == 0 else tiles_1
        program, line = first_program(scale, 2 * tile + half, places.rows, parts, GROUP_KEYS, SHAPE)
        to = found + (tl.program_id(0) * 2 + half) * 9
        tl.store(to, scale)
        tl.store(to + 1, 2 * tile + half)
        tl.store(to + 2, part)
        tl.store(to + 3, group)
        tl.store(to + 4, program + part)
        tl.store(to + 5, line)
        tl.store(to + 6, begin + near * ROWS)
        tl.store(to + 7, begin + far * ROWS)
        tl.store(to + 8, count)


def works_of(ratio, windows, pasts, parts, start: torch.Tensor) -> list[list[int]]:
    """What the kernel finds of every work's two halves whose keys exist, as it stores them."""
    shape = Shape(
        ratio=ratio, windows=windows, past_slots=pasts, half=32, epsilon=1e-6, fast=False, utilities=True, apart=False,
        one_turn=False, precision="tf32",
    )  # fmt: skip
    rows = len(start)
    entries = [past + slot_count(rows, stride(ratio, scale)) for scale, past in enumerate(pasts)]
    works = GROUPS * sum(-(-count // (2 * GROUP_KEYS.value)) * part for count, part in zip(entries, parts, strict=True))
    found = torch.full((2 * works, 9), -1, dtype=torch.int32, device=DEVICE)
    places = Places(start.to(DEVICE), torch.zeros(1, device=DEVICE), rows)
    work_kernel[(works,)](places, parts, found, SHAPE=shape, GROUPS=GROUPS)
    halves = found.tolist()
    assert [half[8] for half in halves[::2]] == [half[8] for half in halves[1::2]]  # what the loader brings to both
    behind = [half for half in halves if half[1] * GROUP_KEYS.value >= entries[half[0]]]
    assert all(begin == end for *_, begin, end, _count in behind)
    return [half for half in halves if half not in behind]


def sequence(lengths: tuple[int, ...], offset: int) -> torch.Tensor:
    first = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    first[0] -= offset
    return first.repeat_interleave(torch.tensor(lengths))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_that_sees_some_of_a_warp_groups_keys_is_in_one_tile_of_one_part(case):
    ratio, windows, pasts, parts, lengths = case
    start = sequence(lengths, 777 if any(pasts) else 0)
    works = works_of(ratio, windows, pasts, parts, start)
    row = torch.arange(len(start))
    for scale, window in enumerate(windows):
        first, end = visible_slots(row, start, stride(ratio, scale), window)
        of_scale = [half for half in works if half[0] == scale and half[3] == 1]
        for tile in {half[1] for half in of_scale}:
            slot = tile * GROUP_KEYS.value - pasts[scale]
            spans = [(begin, end) for _, at, *_, begin, end, _count in of_scale if at == tile]
            assert len(spans) == parts[scale]
            times = sum(((row >= begin) & (row < end)).int() for begin, end in spans)
            sees = (first < slot + GROUP_KEYS.value) & (end > slot) & (first < end)
            assert times.max() <= 1
            assert (times >= sees.int()).all(), (scale, tile)
            # by a sample, so at most some more: rows beside those that see are of the last tile, and a step of it
            around = sees.nonzero()
            most = int(around.max() - around.min()) + 1 if len(around) else 0
            assert times.sum() <= most + len(start) // TILE + 2 * TILE, (scale, tile)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sums_of_parts_and_of_gains_lie_where_the_other_kernels_read_them(case):
    """By tiles of 64 keys: the coarsest scale first, in it tile after tile, in these part after part."""
    ratio, windows, pasts, parts, lengths = case
    works = works_of(ratio, windows, pasts, parts, sequence(lengths, 0))
    expected, line = [], 0
    for scale in reversed(range(len(windows))):
        entries = pasts[scale] + slot_count(sum(lengths), stride(ratio, scale))
        for tile in range(-(-entries // GROUP_KEYS.value)):
            expected += [(scale, tile, part, line) for part in range(parts[scale])]
            line += 1
    for group in range(GROUPS):
        of_group = sorted((half for half in works if half[3] == group), key=lambda half: half[4])
        assert [half[4] for half in of_group] == list(range(len(expected)))
        assert [(scale, tile, part, at) for scale, tile, part, _group, _program, at, *_ in of_group] == expected

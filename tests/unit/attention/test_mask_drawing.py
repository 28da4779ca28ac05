"""Drawn masks show what the definition says, row by row, block by block."""

import pytest

from maha_megatron.attention.mask_drawing import draw_matrix, draw_row, telling_rows
from maha_megatron.scales import complete_blocks, stride

HIERARCHIES = [(2, (4, 2, 2)), (3, (5, 2)), (4, (7,))]


def seen(row, step, window):
    """The definition: the last `window` of the blocks whose last row is not after `row`."""
    return [block for block in range(row + 1) if step * (block + 1) - 1 <= row][-window:]


def test_the_drawing_of_the_readme():
    assert draw_row(9, [10], 2, (4, 2, 2)).splitlines()[1:] == [
        "scale 0   . . . . . . x x x x   blocks 6-9, rows 6-9",
        "scale 1  [. .|. .|. .|x x|x x]  blocks 3-4, rows 6-9",
        "scale 2  [x x x x|x x x x]      blocks 0-1, rows 0-7",
    ]
    assert draw_row(8, [10], 2, (4, 2, 2)).splitlines()[2].startswith("scale 1  [. .|. .|x x|x x]    ")


def test_a_scale_without_a_block_says_so():
    assert draw_row(2, [10], 2, (4, 2, 2)).splitlines()[3].endswith("nothing yet")


@pytest.mark.parametrize(("ratio", "windows"), HIERARCHIES)
@pytest.mark.parametrize("lengths", [(24,), (5, 12, 7)])
def test_every_mark_of_every_row(ratio, windows, lengths):
    total = sum(lengths)
    for row in range(total):
        start = max(sum(lengths[:index]) for index in range(len(lengths)) if sum(lengths[:index]) <= row)
        end = min(sum(lengths[: index + 1]) for index in range(len(lengths)) if sum(lengths[: index + 1]) > row)
        for scale, line in enumerate(draw_row(row, lengths, ratio, windows, 200).splitlines()[1:]):
            marks = line[len("scale 0  ") + 1 :: 2][:total]
            step = ratio**scale
            visible = seen(row - start, step, windows[scale])
            for other in range(total):
                block = (other - start) // step
                if not start <= other < end:
                    expected = "-"
                elif block >= complete_blocks(row - start + 1, step):
                    expected = " "
                else:
                    expected = "x" if block in visible else "."
                assert marks[other] == expected, (row, other, line)


@pytest.mark.parametrize(("ratio", "windows"), HIERARCHIES)
def test_a_scaled_line_counts_rows(ratio, windows):
    lengths, width = (100, 300, 50), 60
    for row in (100, 220, 399):
        heading, *lines = draw_row(row, lengths, ratio, windows, width).splitlines()
        each = int(heading.split("one character is ")[1].split()[0])
        for scale, line in enumerate(lines):
            step = stride(ratio, scale)
            rows = {100 + block * step + i for block in seen(row - 100, step, windows[scale]) for i in range(step)}
            for index, left in enumerate(range(0, 450, each)):
                here = range(left, min(left + each, 450))
                count = sum(other in rows for other in here)
                past = any(100 <= other <= row for other in here)
                inside = any(100 <= other < 400 for other in here)
                expected = ("x" if count == len(here) else "+" if count else ".") if past else " " if inside else "-"
                assert line[len("scale 0  ") + index] == expected, (row, scale, index)


@pytest.mark.parametrize(("ratio", "windows"), HIERARCHIES)
def test_every_cell_of_the_matrix(ratio, windows):
    lengths = (9, 14)
    lines = iter(draw_matrix(lengths, ratio, windows).splitlines())
    for start, length in ((0, 9), (9, 14)):
        heading = next(lines)
        places = [heading.index(f"scale {scale}") for scale in range(len(windows))]
        for row in range(length):
            line = next(lines).ljust(len(heading) + length)
            assert int(line[:4]) == start + row
            for scale, place in enumerate(places):
                step = ratio**scale
                blocks = complete_blocks(row + 1, step)
                visible = seen(row, step, windows[scale])
                expected = "".join("x" if block in visible else "." for block in range(blocks))
                assert line[place : place + blocks + 1].rstrip() == expected


def test_telling_rows_are_rows():
    assert telling_rows(4096, 4, (128, 112, 124, 64)) == [63, 2048, 4094, 4095]
    assert telling_rows(1, 4, (128, 112)) == [0]

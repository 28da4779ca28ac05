"""Masks as text: what a row sees at every scale, and who sees what in a short sequence. Standard library only.

    row 9 of a sequence of 10 rows, ratio 2, windows 4, 2, 2
    scale 0   . . . . . . x x x x   blocks 6-9, rows 6-9
    scale 1  [. .|. .|. .|x x|x x]  blocks 3-4, rows 6-9
    scale 2  [x x x x|x x x x]      blocks 0-1, rows 0-7

`scales.visible_blocks` decides what is visible; nothing here repeats its rule.
"""

import itertools
from collections.abc import Sequence

from maha_megatron.scales import complete_blocks, stride, visible_blocks

LEGEND = "x visible   . complete, but out of the window   blank: not complete, or after the row   - another document"
SCALED_LEGEND = "x every row of the character visible   + some   . none   blank: after the row   - another document"
LONGEST_MATRIX_ROWS = 64
_NARROWEST = 16


def telling_rows(rows: int, ratio: int, windows: Sequence[int]) -> list[int]:
    """Rows of a document worth drawing: where the coarsest scale opens, the middle, and the last two."""
    opening = stride(ratio, len(windows) - 1) - 1
    return sorted({min(opening, rows - 1), rows // 2, max(rows - 2, 0), rows - 1})


def draw_row(row: int, lengths: Sequence[int], ratio: int, windows: Sequence[int], width: int = 100) -> str:
    """What one row of a packed sequence sees: a line that says which row it is, and a line for every scale.

    Args:
        row: row of the packed sequence.
        lengths: rows of each packed document, in order.
        ratio: rows of scale l-1 in a block of scale l.
        windows: visible blocks of each scale.
        width: characters of a line. A sequence that does not fit at two characters a row is scaled down.
    """
    start, length = _document_of(row, lengths)
    total, place = sum(lengths), f"row {row} of a sequence of {sum(lengths)} rows"
    if len(lengths) > 1:
        place += f" (row {row - start} of the document in rows {start}-{start + length - 1})"
    strides = [stride(ratio, scale) for scale in range(len(windows))]
    seen = [visible_blocks(row - start, step, window) for step, window in zip(strides, windows, strict=True)]
    notes = [_note(blocks, step, start) for blocks, step in zip(seen, strides, strict=True)]
    longest_note = len(_note(range(total - 1, total), 1, 0))  # of any row, so that all rows are drawn to one scale
    room = max(width - len("scale 0  ") - len("  ") - longest_note, _NARROWEST)
    heading = f"{place}, ratio {ratio}, windows {', '.join(map(str, windows))}"
    if 2 * total + 1 <= room:
        drawings = [_exact(row, start, length, total, *scale) for scale in zip(strides, seen, strict=True)]
    else:
        rows_each = -(-total // room)
        heading += f"; one character is {rows_each} row{'s' if rows_each > 1 else ''}"
        drawings = [_scaled(row, start, length, total, *scale, rows_each) for scale in zip(strides, seen, strict=True)]
    lines = [f"scale {scale}  {drawing}  {notes[scale]}" for scale, drawing in enumerate(drawings)]
    return "\n".join([heading, *lines])


def draw_matrix(lengths: Sequence[int], ratio: int, windows: Sequence[int]) -> str:
    """Row by block, all scales side by side: a line for every row, a column for every block of the row's document."""
    lines = []
    for start, length in _documents(lengths):
        counts = [complete_blocks(length, stride(ratio, scale)) for scale in range(len(windows))]
        columns = [max(count, len("scale 0")) for count in counts]
        titles = [f"scale {scale}".ljust(column) for scale, column in enumerate(columns)]
        lines.append("  ".join([" row", *titles]).rstrip())
        for row in range(length):
            cells = [
                _cells(row, stride(ratio, scale), windows[scale]).ljust(column) for scale, column in enumerate(columns)
            ]
            lines.append("  ".join([f"{start + row:4}", *cells]).rstrip())
    return "\n".join(lines)


def _cells(row: int, stride_rows: int, window: int) -> str:
    visible = visible_blocks(row, stride_rows, window)
    return "".join("x" if block in visible else "." for block in range(complete_blocks(row + 1, stride_rows)))


def _documents(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(first row, rows) of every document."""
    return list(zip(itertools.accumulate(lengths, initial=0), lengths, strict=False))


def _document_of(row: int, lengths: Sequence[int]) -> tuple[int, int]:
    found = [(start, length) for start, length in _documents(lengths) if start <= row < start + length]
    assert found, f"row {row} is not in a sequence of {sum(lengths)} rows"
    return found[0]


def _note(blocks: range, stride_rows: int, start: int) -> str:
    if not blocks:
        return "nothing yet"
    rows = f"rows {start + blocks.start * stride_rows}-{start + blocks.stop * stride_rows - 1}"
    return f"blocks {blocks.start}-{blocks.stop - 1}, {rows}"


def _exact(row: int, start: int, length: int, total: int, stride_rows: int, visible: range) -> str:
    """Two characters a row: its mark, and before it a space or the bracket of its block."""
    line = [" "] * (2 * total + 1)
    line[1::2] = ["-"] * total
    line[2 * start + 1 : 2 * (start + length) + 1 : 2] = [" "] * length
    if stride_rows == 1:
        for block in range(row - start + 1):
            line[2 * (start + block) + 1] = "x" if block in visible else "."
        return "".join(line)
    complete = complete_blocks(row - start + 1, stride_rows)
    for block in range(complete):
        first, end = (2 * (start + edge * stride_rows) for edge in (block, block + 1))
        line[first + 1 : end : 2] = ["x" if block in visible else "."] * stride_rows
        line[first], line[end] = "|" if block else "[", "]"
    return "".join(line)


def _scaled(row: int, start: int, length: int, total: int, stride_rows: int, visible: range, rows_each: int) -> str:
    """One character for `rows_each` rows; a row counts as visible if it lies in a visible block."""
    first, end = start + visible.start * stride_rows, start + visible.stop * stride_rows
    marks = []
    for left in range(0, total, rows_each):
        right = min(left + rows_each, total)
        seen = _overlap(first, end, left, right)
        if _overlap(start, row + 1, left, right):
            marks.append("x" if seen == right - left else "+" if seen else ".")
        else:
            marks.append(" " if _overlap(start, start + length, left, right) else "-")
    return "".join(marks)


def _overlap(first: int, end: int, left: int, right: int) -> int:
    return max(min(end, right) - max(first, left), 0)

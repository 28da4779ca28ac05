"""Integer arithmetic of the scale hierarchy: the one place that knows block counts, slots and visibility.

Scale l summarises blocks of R_l = ratio**l rows. Rows and blocks of a document count from the document's start D.
Standard library only, so that config (torch-free), attention and the exported model can all lean on it.

    row t of a document sees block b of scale l  iff  the block is complete, R_l * (b + 1) - 1 <= t,
                                                 and  b is among the last w_l complete blocks

    ratio 2, windows (4, 2), rows 0-9; row 8 sees:   scale 0   . . . . . x x x x      rows 5-8
                                                     scale 1   [.][.][x][x]           blocks 2 and 3 (rows 4-7)
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

MAX_SCALES = 8
RATIOS = range(2, 9)
_FIRST_WINDOW, _TILE = 128, 64


def stride(ratio: int, scale: int) -> int:
    """Rows that one block of `scale` summarises: R_l = ratio**scale."""
    return ratio**scale


def complete_blocks(rows: int, stride_rows: int) -> int:
    """Blocks of `stride_rows` rows that are complete once `rows` rows of a document have been read."""
    return rows // stride_rows


def slot_count(rows: int, stride_rows: int) -> int:
    """Slots of a packed sequence of `rows` rows at a scale: ceil(rows / R_l), whatever documents it holds."""
    return -(-rows // stride_rows)


def first_slot(document_start: int, stride_rows: int) -> int:
    """Slot of block 0 of the document that starts at row `document_start`; block b sits b slots further.

    ceil(D / R_l) + b is unique and ordered over all documents of the packed sequence, and known without its lengths.
    """
    return -(-document_start // stride_rows)


def visible_blocks(row: int, stride_rows: int, window: int) -> range:
    """Blocks of one scale that row `row` of a document sees (rows and blocks count from the document's start)."""
    end = complete_blocks(row + 1, stride_rows)
    return range(max(0, end - window), end)


def default_windows(sequence_tokens: int, ratio: int = 4) -> tuple[int, ...]:
    """Windows that reach a whole sequence and fill 64-wide key tiles: (128, 112, 124, 64) at 4,096 tokens and ratio 4.

    The number of scales is the smallest whose coarsest scale has at most 128 blocks; a middle scale keeps
    floor(128 - 64 / R_l) blocks, so that a tile of 64 queries loads two tiles of 64 keys.
    """
    scales = 1
    while complete_blocks(sequence_tokens, stride(ratio, scales - 1)) > _FIRST_WINDOW:
        scales += 1
    middle = [int(_FIRST_WINDOW - _TILE / stride(ratio, scale)) for scale in range(1, scales - 1)]
    last = max(1, complete_blocks(sequence_tokens, stride(ratio, scales - 1)))
    return (*([_FIRST_WINDOW] if scales > 1 else []), *middle, last)


def openable_blocks(row: int, ratio: int, windows: Sequence[int], from_scale: int, to_scale: int) -> range:
    """Blocks of `from_scale` that row `row` of a document may open: what it sees there, less what `to_scale` shows.

    A block is among them only if all its blocks of `to_scale` lie beyond the window of that scale, so that none of them
    is read twice.

        ratio 2, windows (4, 4), row 10     scale 0   . . . . . . . x x x x   rows 7-10
                                            scale 1  [. .|o o|o o|x x|x x]    blocks 1-4; 1 and 2 may be opened (o)
    """
    seen = visible_blocks(row, stride(ratio, from_scale), windows[from_scale])
    shown = visible_blocks(row, stride(ratio, to_scale), windows[to_scale])
    return range(seen.start, shown.start // stride(ratio, from_scale - to_scale))


def openable_spans(
    sequence_tokens: int, ratio: int, windows: Sequence[int], from_scale: int, to_scale: int
) -> Iterator[tuple[int, int]]:
    """(rows, blocks that each of them may open) for consecutive spans of a document of `sequence_tokens` rows."""
    step, shown_rows = stride(ratio, from_scale), windows[to_scale] * stride(ratio, to_scale)
    ends = range(step, sequence_tokens + 1, step)  # once so many rows are read, a block is complete
    edges = sorted({1, sequence_tokens + 1, *ends, *range(shown_rows + step, sequence_tokens + 1, step)})
    for first, stop in pairwise(edges):
        yield stop - first, len(openable_blocks(first - 1, ratio, windows, from_scale, to_scale))


def first_unreached_row(sequence_tokens: int, ratio: int, windows: Sequence[int]) -> int | None:
    """The earliest row of a document from which row 0 is no longer visible at any scale; None if there is none."""
    reach_rows = 0
    for scale, window in enumerate(windows):  # scale l shows block 0 to rows R_l - 1 ... R_l (w_l + 1) - 2
        if stride(ratio, scale) - 1 <= reach_rows:
            reach_rows = max(reach_rows, stride(ratio, scale) * (window + 1) - 1)
    return None if sequence_tokens <= reach_rows else reach_rows


def visible_pairs(sequence_tokens: int, ratio: int, windows: Sequence[int]) -> list[int]:
    """Visible (row, key) pairs of each scale for one document of `sequence_tokens` rows."""
    return [_capped_sum(sequence_tokens, stride(ratio, scale), window) for scale, window in enumerate(windows)]


def _capped_sum(rows: int, stride_rows: int, window: int) -> int:
    """Sum over t < rows of min(window, floor((t + 1) / R)), in closed form."""
    full = complete_blocks(rows, stride_rows)
    grown = min(full, window)
    # a count of c < `grown` complete blocks holds for R rows each; `grown` itself holds for the rest of the rows
    rows_at_most_grown = rows - (grown * stride_rows - 1) if grown else 0
    return stride_rows * (grown - 1) * grown // 2 + grown * rows_at_most_grown if grown else 0


def loaded_pairs(sequence_tokens: int, ratio: int, windows: Sequence[int], tile: int = _TILE) -> list[int]:
    """(row, key) pairs that a tiled kernel executes at each scale, masked lanes included.

    Query tiles of `tile` rows load whole key tiles of `tile` slots, the first of which starts at their oldest key.
    """
    loaded = []
    for scale, window in enumerate(windows):
        step = stride(ratio, scale)
        pairs = 0
        for start in range(0, sequence_tokens, tile):
            last_row = min(start + tile, sequence_tokens) - 1
            first = visible_blocks(start, step, window).start
            end = complete_blocks(last_row + 1, step)
            pairs += -(-(end - first) // tile) * tile * tile
        loaded.append(pairs)
    return loaded

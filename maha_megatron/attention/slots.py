"""Slot arithmetic of packed sequences as tensors, with static shapes and without reading a value back to the host.

Block b of scale l of the document that starts at row D sits in slot ceil(D/R) + b of ceil(t/R). Write
e = (-D) mod R, the rows by which the document's blocks start before a multiple of R:

    rows         0 1 2 3 4 5 6 7 8 9 ...      D = 3, R = 4: e = 1, slot 1 holds rows 3-6, slot 2 rows 7-10
    slot j       starts at row jR - e, holds row jR, and ends at row jR - e + R - 1
    row t sees   slots [max(ceil(D/R), end - w), end)   with   end = floor((t + 1 + e) / R)

Two facts carry the fast backends. A complete block of slot j contains row jR, so document_start[jR] is its document.
And 0 <= e < R, so `end` lies between floor((t+1)/R) and ceil((t+1)/R) whatever the documents are: the slots that a
tile of rows can see lie in a range that is known without them.

Where the rows are a piece of a longer sequence, they count from the piece's first row, and a document that began o rows
before it starts at row D = -o. Nothing changes: `//` rounds down and `%` is not negative. The complete blocks of the
past then sit in slots -1, -2, ... and the block that straddles the border in slot 0:

    rows        -7 ... 0 1 2 3 4 5 6 7 ...    D = -7, R = 4: e = 3, slot -1 holds rows -7..-4, slot 0 rows -3..0
"""

from dataclasses import dataclass

import torch

from maha_megatron.scales import stride


@dataclass(frozen=True)
class Slots:
    """The slots of one scale, each tensor [past + ceil(t / R)] int64 (complete: bool); slot j is at index past + j.

    Args:
        document: row where the slot's document starts.
        last_row: last row of the slot's block.
        complete: whether the slot holds a block whose rows all lie in its document and, from slot 0 on, in the piece.
    """

    document: torch.Tensor
    last_row: torch.Tensor
    complete: torch.Tensor


def slots_of(document_start_t: torch.Tensor, stride_rows: int, past: int = 0) -> Slots:
    """What every slot of the scale with `stride_rows` holds, the `past` slots in front of slot 0 included.

    `document_start_t` is int64. The slots in front belong to the document of row 0.
    """
    rows = document_start_t.numel()
    document = torch.cat((document_start_t[:1].expand(past), document_start_t[::stride_rows]))
    anchor = torch.arange(-past * stride_rows, rows, stride_rows, device=document.device)
    last_row = anchor - (-document) % stride_rows + stride_rows - 1
    inside = (last_row < rows) & (last_row - document >= stride_rows - 1)
    complete = inside & (document_start_t[last_row.clamp(0, rows - 1)] == document)
    return Slots(document, last_row, complete)


def first_slot_of(document: torch.Tensor, stride_rows: int) -> torch.Tensor:
    """ceil(D / R) for every D."""
    return (document + stride_rows - 1) // stride_rows


def visible_slots(
    row: torch.Tensor, document: torch.Tensor, stride_rows: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-open range of the slots that each row sees, given its document's start."""
    end = (row + 1 + (-document) % stride_rows) // stride_rows
    return torch.maximum(first_slot_of(document, stride_rows), end - window), end


def openable_slots(
    row: torch.Tensor, document: torch.Tensor, ratio: int, windows: tuple[int, ...], from_scale: int, to_scale: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-open range of the slots of `from_scale` that each row may open (`scales.openable_blocks`); it may be empty,
    its end then not after its start."""
    coarse, fine = stride(ratio, from_scale), stride(ratio, to_scale)
    first, _ = visible_slots(row, document, coarse, windows[from_scale])
    shown, _ = visible_slots(row, document, fine, windows[to_scale])
    blocks = (shown - first_slot_of(document, fine)) // stride(ratio, from_scale - to_scale)
    return first, first_slot_of(document, coarse) + blocks

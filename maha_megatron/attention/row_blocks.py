"""Cutting elementwise work into blocks of rows, so that its temporaries stay in a CPU core's cache."""

from collections.abc import Iterator

import torch

_BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}


def row_blocks(rows: int, row_elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive blocks of rows with `row_elements` elements each."""
    block = max(_BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // row_elements, 1)
    return ((start, min(start + block, rows)) for start in range(0, rows, block))

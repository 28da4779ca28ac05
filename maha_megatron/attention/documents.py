"""Host-side view of packed documents, for the readable reference; the fast backends never read a tensor's values."""

import torch


def document_ranges(document_start_t: torch.Tensor) -> list[tuple[int, int]]:
    """The packed documents in order.

    Args:
        document_start_t: [t] int, the row where each row's document starts.

    Returns:
        (first row, number of rows) of every document; in a piece of a longer sequence the first row of the first one
        may be negative, and its rows count from there.
    """
    starts = sorted(set(document_start_t.tolist()))
    ends = [*starts[1:], document_start_t.numel()]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]

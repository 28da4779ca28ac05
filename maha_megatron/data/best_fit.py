"""Best-fit-decreasing packing of many lengths into equal rooms, by groups of equal length and equal room.

Longest first, each length goes into the fullest sample that still has room for it. Only documents longer than a sample
are cut then, and the share of padding is small (Ding et al., "Fewer Truncations Improve Language Modeling", 2024).
"""

from collections import defaultdict

import numpy as np


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """Pack.

    Args:
        lengths: int [items], each in 1 .. room. Which of several equal items goes where follows their order.
        room: What a sample holds.

    Returns:
        int64 [items], the sample of each; and the number of samples.
    """
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= room)
    sample = np.empty(lengths.size, dtype=np.int64)
    by_length = np.argsort(lengths, kind="stable")
    present, begins = np.unique(lengths[by_length], return_index=True)
    ends = np.append(begins, lengths.size)[1:]
    is_open = np.zeros(room + 1, dtype=bool)  # whether samples with that much room left exist
    samples_with: dict[int, list[np.ndarray]] = defaultdict(list)
    samples = 0
    for length, begin, end in zip(present[::-1].tolist(), begins[::-1].tolist(), ends[::-1].tolist(), strict=True):
        items = by_length[begin:end]
        for left in (np.flatnonzero(is_open[length:]) + length).tolist():
            if not items.size:
                break
            held = np.concatenate(samples_with.pop(left))
            items, unused = _fill(items, held, length, left, sample, samples_with, is_open)
            is_open[left] = unused.size > 0
            if unused.size:
                samples_with[left].append(unused)
        if items.size:
            fresh = np.arange(samples, samples - (-items.size // (room // length)))
            samples += fresh.size
            _fill(items, fresh, length, room, sample, samples_with, is_open)
    return sample, samples


def _fill(
    items: np.ndarray,
    held: np.ndarray,
    length: int,
    left: int,
    sample: np.ndarray,
    samples_with: dict[int, list[np.ndarray]],
    is_open: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Put items of one length into samples that all have `left` room, one sample after another.

    Returns:
        The items and the samples that remain.
    """
    each = left // length
    used = held[: -(-items.size // each)]
    taken = min(items.size, used.size * each)
    sample[items[:taken]] = np.repeat(used, each)[:taken]
    in_last = taken - (used.size - 1) * each
    for filled, count in ((used[:-1], each), (used[-1:], in_last)):
        remaining = left - count * length
        if filled.size and remaining:
            samples_with[remaining].append(filled)
            is_open[remaining] = True
    return items[taken:], held[used.size :]

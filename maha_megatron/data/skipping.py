"""Samples of the data order that a run leaves out (data.skip). Torch-free.

The order itself does not change: a run's position p, the samples it consumed so far, stands for the p-th sample number
that is not skipped. So ranges that lie ahead may be added at any time, and a resumed run is what it was up to them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from maha_megatron.config.schema import SkipRange


class SampleNumbers:
    """From positions of a run to sample numbers of the order.

    Args:
        ranges: In ascending order, without overlap; the rules of the configuration vouch for it.
    """

    def __init__(self, ranges: Sequence[SkipRange]):
        sizes = [skip.last - skip.first + 1 for skip in ranges]
        self._skipped = [0, *accumulate(sizes)]
        self._jumps = jump_positions([[skip.first, skip.last] for skip in ranges])

    def __getitem__(self, position: int) -> int:
        return position + self._skipped[bisect_right(self._jumps, position)]


def jump_positions(ranges: Sequence[Sequence[int]]) -> list[int]:
    """The position of a run that comes after each skipped range of [first, last]."""
    before = [0, *accumulate(last - first + 1 for first, last in ranges)]
    return [first - skipped for (first, _), skipped in zip(ranges, before, strict=False)]


def jumped(ranges: Sequence[Sequence[int]], consumed_samples: int) -> list[list[int]]:
    """The ranges that a run which consumed so many samples has jumped over."""
    positions = jump_positions(ranges)
    return [list(skip) for skip, position in zip(ranges, positions, strict=True) if position < consumed_samples]

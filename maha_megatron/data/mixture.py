"""Weighted mixtures: which source, and which of its samples, the global sample i is.

A pure function of (weights, seed, i): nothing is drawn, nothing is stored, and no planned length enters. The golden
ratio's low-discrepancy sequence u_i = frac(i/phi + offset) picks the source whose slice of [0, 1) holds u_i, so every
stretch of n samples holds each source's share to within a few samples (random draws would be off by sqrt(n)).

u is kept as an integer below MODULUS; how many of the first n values fall below a threshold is then a sum of
floors, known in O(log MODULUS): that count is the index of the sample in its source.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from maha_megatron.errors import DataError

MODULUS = 1 << 40
STEP = 679_535_556_991
"""MODULUS / golden ratio, rounded to an odd number: u visits every value once in MODULUS samples."""


LEAST_SHARE = 1 / MODULUS


def check_weights(names: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse weights of sources that cannot be drawn.

    Args:
        names: What the user knows the sources by.
        weights: One number per source, in any unit.

    Raises:
        DataError: One is negative, infinite or no number, or too small beside the others, or they sum to 0 or infinity.
    """
    for name, weight in zip(names, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(
                f"data source {name} asks for {weight} of the samples: give it a number that is not negative"
            )
    total = sum(weights)
    if total == 0 or math.isinf(total):
        raise DataError(f"the weights of data sources {', '.join(names)} sum to {total}: give numbers around 1")
    for name, weight in zip(names, weights, strict=True):
        if weight > 0 and weight / total < LEAST_SHARE:
            raise DataError(
                f"data source {name} has a share of {weight / total:.1e}, less than {LEAST_SHARE:.1e}, the least that"
                " can be drawn: raise its weight or epochs, or remove it"
            )


class Mixture:
    """The order in which weighted sources take their turns."""

    def __init__(self, weights: Sequence[float], seed: int):
        """
        Args:
            weights: One number per source, in any unit, that check_weights lets pass.
            seed: Where in the low-discrepancy sequence the run starts.
        """
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self._bounds = [0, *(round(MODULUS * part / total) for part in accumulate(weights))]
        self._offset = (seed * 0x9E3779B97F4A7C15) % MODULUS

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a global sample, and how many of that source's samples came before it."""
        if len(self._bounds) == 2:
            return 0, sample
        position = (sample * STEP + self._offset) % MODULUS
        source = bisect_right(self._bounds, position) - 1
        return source, self._count_below(self._bounds[source + 1], sample) - self._count_below(
            self._bounds[source], sample
        )

    def taken(self, samples: int) -> list[int]:
        """How many of the first so many global samples come from each source."""
        if len(self._bounds) == 2:
            return [samples]
        below = [self._count_below(bound, samples) for bound in self._bounds]
        return [high - low for low, high in pairwise(below)]

    def _count_below(self, threshold: int, samples: int) -> int:
        """How many of the first `samples` positions lie below the threshold.

        [x mod M < T] = floor(x/M) - floor((x-T)/M), summed over x = i*STEP + offset.
        """
        return floor_sum(samples, MODULUS, STEP, self._offset) - floor_sum(
            samples, MODULUS, STEP, self._offset - threshold
        )


def floor_sum(terms: int, modulus: int, factor: int, offset: int) -> int:
    """sum over i = 0 .. terms-1 of floor((factor*i + offset) / modulus), exactly, in O(log modulus).

    Euclid's algorithm on (factor, modulus): what is left after the whole parts is the same sum with the axes swapped.
    """
    total = 0
    while terms > 0:
        whole, factor = divmod(factor, modulus)
        total += whole * (terms * (terms - 1) // 2)
        whole, offset = divmod(offset, modulus)
        total += whole * terms
        top = factor * terms + offset
        if top < modulus:
            break
        terms, offset = divmod(top, modulus)
        modulus, factor = factor, modulus
    return total

"""What a difference between peers is worth: means over seeds, and the noise that seeds alone make.

Peers of one seed read the same data in the same order, so a peer is set against the reference seed by seed. How much
such a difference varies from seed to seed is estimated from all peers together, since two or three seeds of one say
little:

    noise of peer p = s / sqrt(seeds of p),   s^2 = sum over p and its seeds of (d_ps - mean d_p)^2 / sum of (seeds - 1)

A peer with one seed has none: nothing of its own says that it varies as the others do. The reference's own scatter is
in every difference, so that more peers make s no surer than the reference's few seeds do: "twice the noise" is a rule
of thumb, not a test at 5 %.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One quantity of one peer.

    Attributes:
        mean: over its seeds.
        spread: standard deviation over its seeds; None for one.
        difference: mean over the seeds that it shares with the reference, of its own less the reference's; None for the
            reference, and without such a seed.
        noise: standard error of the difference; None where it is of fewer than two seeds.
    """

    mean: float
    spread: float | None
    difference: float | None
    noise: float | None


def compared(values: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Compared]:
    """Every peer against the reference.

    Args:
        values: peer -> seed -> what was measured; no peer without seeds.
        reference: a peer, which may be missing.
    """
    against = values.get(reference, {})
    differences = {
        peer: [value - against[seed] for seed, value in of_seed.items() if seed in against]
        for peer, of_seed in values.items()
        if peer != reference
    }
    freedom = sum(len(some) - 1 for some in differences.values() if some)
    scatter = sum((x - statistics.fmean(some)) ** 2 for some in differences.values() for x in some)
    found = {}
    for peer, of_seed in values.items():
        some = differences.get(peer)
        found[peer] = Compared(
            mean=statistics.fmean(of_seed.values()),
            spread=statistics.stdev(of_seed.values()) if len(of_seed) > 1 else None,
            difference=statistics.fmean(some) if some else None,
            noise=math.sqrt(scatter / freedom / len(some)) if some and len(some) > 1 else None,
        )
    return found

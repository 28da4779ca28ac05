"""From measured rows to the figures that are judged: speed-ups, memory ratios, growth per doubling, and the goals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from maha_megatron.attention.benchmark.subjects import DENSE, OURS, Setting
from maha_megatron.attention.spec import MahaSpec


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured at one length and dtype; subjects that did not run are missing.

    median_s: seconds of forward and backward by subject; peak_bytes: peak memory above the inputs, where it is known.
    """

    dtype: str
    rows: int
    median_s: dict[str, float]
    peak_bytes: dict[str, int]

    def speedup(self) -> float | None:
        """How many times faster than dense attention."""
        return self.median_s[DENSE] / self.median_s[OURS] if DENSE in self.median_s else None

    def memory_ratio(self) -> float | None:
        """Our peak memory over that of dense attention."""
        known = DENSE in self.peak_bytes and OURS in self.peak_bytes
        return self.peak_bytes[OURS] / max(self.peak_bytes[DENSE], 1) if known else None


def growth(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    """(dtype, length, time at this length over that at half of it) wherever both were measured."""
    times = {(row.dtype, row.rows): row.median_s[OURS] for row in rows}
    return [
        (dtype, length, seconds / times[dtype, length // 2])
        for (dtype, length), seconds in times.items()
        if length % 2 == 0 and (dtype, length // 2) in times
    ]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure and the bound it should keep."""

    text: str
    found: float
    met: bool


GOAL_SETTING = Setting(operator=MahaSpec(ratio=4, windows=(), convolution=False), heads=8, groups=8, width=64)
GOAL_SETTING_NAME = "8 heads x 64, the default operator without convolution, on a CPU"
LEAST_SPEEDUP = {4096: 1.0, 8192: 2.5, 16384: 5.0}
MOST_MEMORY = {16384: 2.0}
MOST_GROWTH, GROWTH_FROM = 2.3, 4096


def goals(setting: Setting, rows: Sequence[Row]) -> list[Goal]:
    """The goals that these rows can answer, all of their lengths measured; none in another setting than GOAL_SETTING.

    The number of threads is free: it is the same on both sides.
    """
    if replace(setting, threads=GOAL_SETTING.threads) != GOAL_SETTING:
        return []
    found = []
    for row in rows:
        speedup, memory, place = row.speedup(), row.memory_ratio(), f"{row.dtype}, {row.rows} tokens"
        # from 4 k up faster, and where a length has no bound of its own, the one of the next shorter length
        bound = max((least for length, least in LEAST_SPEEDUP.items() if length <= row.rows), default=None)
        if speedup is not None and bound is not None:
            found.append(Goal(text=f"{place}: speed-up >= {bound}", found=speedup, met=speedup >= bound))
        if memory is not None and row.rows in MOST_MEMORY:
            most = MOST_MEMORY[row.rows]
            found.append(Goal(text=f"{place}: memory <= {most} x dense", found=memory, met=memory <= most))
    found += [
        Goal(
            text=f"{dtype}, {length} tokens: time <= {MOST_GROWTH} x half of them",
            found=ratio,
            met=ratio <= MOST_GROWTH,
        )
        for dtype, length, ratio in growth(rows)
        if length > GROWTH_FROM
    ]
    return found

"""From what was timed on a GPU to the figures that are judged: against the best dense kernel, and the goals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from maha_megatron.attention.benchmark.cases import DEFAULT, GENERAL, GPU_SETTING
from maha_megatron.attention.benchmark.figures import Goal
from maha_megatron.attention.benchmark.peers import EVERY_DENSE
from maha_megatron.attention.benchmark.subjects import OURS, Setting
from maha_megatron.attention.benchmark.turns import Memory, Times
from maha_megatron.attention.benchmark.work import Work

FORWARD, BACKWARD, BOTH = PARTS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """What was measured of a case at one length and dtype.

    median_s: by subject and part (PARTS), each the median of its own times. unavailable: subjects that did not run, and
    why. work: of the operator of the case's setting.
    """

    case: str
    setting: Setting
    dtype: str
    length: int
    median_s: dict[str, dict[str, float]]
    memory: dict[str, Memory]
    unavailable: dict[str, str]
    work: Work | None = None

    def best_dense(self, part: str) -> str | None:
        """The dense kernel that is fastest at a part; None where none ran."""
        ran = [name for name in EVERY_DENSE if name in self.median_s]
        return min(ran, key=lambda name: self.median_s[name][part], default=None)

    def speedup(self, part: str) -> float | None:
        """How many times faster than the best dense kernel."""
        best = self.best_dense(part)
        return None if best is None or OURS not in self.median_s else self.against(OURS, best, part)

    def against(self, subject: str, reference: str, part: str) -> float:
        """Time of the reference over the subject's."""
        return self.median_s[reference][part] / self.median_s[subject][part]

    def memory_ratio(self, field: str) -> float | None:
        """Our kept_bytes or peak_bytes over those of the dense kernel that is fastest at both passes."""
        best = self.best_dense(BOTH)
        if best not in self.memory or OURS not in self.memory:
            return None
        return getattr(self.memory[OURS], field) / max(getattr(self.memory[best], field), 1)


def medians(times: dict[str, list[Times]]) -> dict[str, dict[str, float]]:
    """Medians of each subject and part."""
    fields = dict(zip(PARTS, ("forward_s", "backward_s", "both_s"), strict=True))
    return {
        name: {part: median(getattr(one, field) for one in taken) for part, field in fields.items()}
        for name, taken in times.items()
    }


GOAL_SETTING, GOAL_DTYPE = GPU_SETTING, "bf16"
GOAL_SETTING_NAME = (
    "16 heads x 128, a KV group for each, the default operator without convolution, bf16, 32 k rows a call"
)
LEAST_SPEEDUP = {
    FORWARD: {2048: 1.0, 4096: 2.0, 8192: 5.0, 32768: 15.0, 131072: 40.0},
    BOTH: {2048: 1.0, 4096: 2.0, 8192: 4.0, 32768: 12.0, 131072: 35.0},
}
MOST_MEMORY = {"kept_bytes": 1.1, "peak_bytes": 1.25}
MOST_GENERAL = {"no LSE": 1.25, "gram": 1.8, "nash": 1.8, "nash, gram": 1.8}
_IN_WORDS = {"kept_bytes": "kept for backward", "peak_bytes": "peak memory of forward+backward"}


def goals(rows: Sequence[KernelRow]) -> list[Goal]:
    """The goals that these rows can answer: none but in GOAL_SETTING and GOAL_DTYPE.

    From 2 k up never slower; where a length has no bound of its own, the one of the next shorter length.
    """
    found = []
    for row in rows:
        if (row.setting, row.dtype) == (GOAL_SETTING, GOAL_DTYPE):
            found += _of_general(row) if row.case == GENERAL else _of_dense(row)
    return found


def _of_dense(row: KernelRow) -> list[Goal]:
    found = []
    for part, bounds in LEAST_SPEEDUP.items():
        least = max((bound for length, bound in bounds.items() if length <= row.length), default=None)
        speedup = row.speedup(part)
        if least is not None and speedup is not None:
            text = f"{row.length} tokens: {part} >= {least} x the best dense"
            found.append(Goal(text=text, found=speedup, met=speedup >= least))
    for field, most in MOST_MEMORY.items():
        ratio = row.memory_ratio(field)
        if ratio is not None:
            text = f"{row.length} tokens: {_IN_WORDS[field]} <= {most} x dense"
            found.append(Goal(text=text, found=ratio, met=ratio <= most))
    return found


def _of_general(row: KernelRow) -> list[Goal]:
    found = []
    for name, most in MOST_GENERAL.items():
        for part in (FORWARD, BOTH):
            # what did not run has missed its goal
            ratio = 1 / row.against(name, DEFAULT, part) if name in row.median_s else float("inf")
            text = f"{row.length} tokens: {name}, {part} <= {most} x {DEFAULT}"
            found.append(Goal(text=text, found=ratio, met=ratio <= most))
    return found

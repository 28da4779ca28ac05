"""What every run of a comparison has to show: its loss falls, its numbers are numbers, its gradients are not wild."""

import math
import statistics
from collections.abc import Sequence

from maha_megatron.train.trials import column

VERDICTS = ("loss falls", "no NaN", "norm within 3 x")
LARGEST_NORM_RATIO = 3.0


def verdicts(rows: Sequence[dict[str, float]], first: Sequence[dict[str, float]]) -> dict[str, bool]:
    """Judge the metrics of one run.

    Args:
        rows: its metrics.jsonl, logged at every step.
        first: that of the run whose gradient norms it is set against; its own if it is that run.

    Returns:
        Whether each of VERDICTS is met. "loss falls": the median of the last tenth of the steps is below that of the
        first tenth; of fewer than 20 steps the last is below the first. "no NaN": every metric is finite. "norm within
        3 x": the median gradient norm is at most 3 times the other's and at least a third of it.
    """
    by_step = column(rows, "loss_nats")
    losses = [by_step[step] for step in sorted(by_step)]
    tenth = max(1, len(losses) // 10)
    norm, norm_of_first = (statistics.median(column(some, "gradient_norm").values()) for some in (rows, first))
    met = (  # each is written so that a NaN is a miss
        statistics.median(losses[-tenth:]) < statistics.median(losses[:tenth]),
        all(math.isfinite(value) for row in rows for value in row.values()),
        norm_of_first / LARGEST_NORM_RATIO <= norm <= norm_of_first * LARGEST_NORM_RATIO,
    )
    return dict(zip(VERDICTS, met, strict=True))

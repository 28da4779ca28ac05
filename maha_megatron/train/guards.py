"""What keeps a run from going wrong silently: signals, numbers that are not numbers, nondeterminism."""

import math
import os
import signal
from dataclasses import dataclass
from types import FrameType

import torch

from maha_megatron.errors import TrainingError

EXIT_DONE = 0
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: what was trained is saved, start the same command again to go on


class StopSignal:
    """Turns SIGTERM, and the first SIGINT, into a request to stop after the step at hand.

    A second SIGINT ends the process at once, unsaved, as Ctrl-C usually does.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take over both signals; main thread only."""
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def make_deterministic() -> None:
    """Let torch use bitwise reproducible kernels only. Call before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@dataclass(frozen=True, kw_only=True)
class StepPlace:
    """Which optimizer step, counted from 1, and which samples of the data order make up its batch."""

    step: int
    first_sample: int
    samples: int

    def __str__(self) -> str:
        return f"samples {self.first_sample} to {self.first_sample + self.samples - 1} of the data order"


def check_finite(value: float, what: str, place: StepPlace) -> None:
    """Stop before the weights change if the loss or the gradient norm of a step is not a finite number.

    Raises:
        TrainingError: names the step and its samples.
    """
    if not math.isfinite(value):
        raise not_finite(value, what, place)


def not_finite(value: float, what: str, place: StepPlace, where: str = "") -> TrainingError:
    """The error for a loss or gradient norm that is not a finite number.

    Args:
        value: what it is instead.
        what: its name.
        place: the step and its samples.
        where: what more is known of the place, in parentheses.
    """
    return TrainingError(
        f"the {what} of step {place.step} is {value}: the run stops before the weights change. The batch is "
        f"{place}{where}. Look at that text, lower schedule.peak or optimizer.clip_norm, and continue from the "
        "last checkpoint"
    )

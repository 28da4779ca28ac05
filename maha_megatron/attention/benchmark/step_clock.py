"""Timing one short step: called from Python, token after token, and replayed as a CUDA graph."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from maha_megatron.attention.benchmark.turns import CudaClock

_WARMUPS = 3
_REASON = 160
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of a token: called one after the other; and as a replayed graph, the cache flushed before each.

    replayed_s: None where there are no graphs, or the step cannot be one (`not_replayed` says why).
    """

    called_s: float
    replayed_s: float | None = None
    not_replayed: str = ""

    @property
    def best_s(self) -> float:
        """Of the graph where there is one: what a serving loop would do."""
        return self.called_s if self.replayed_s is None else self.replayed_s

    def over(self, other: "StepTimes") -> float:
        """This time over another one, both of graphs or both of calls."""
        if self.replayed_s is None or other.replayed_s is None:
            return self.called_s / other.called_s
        return self.replayed_s / other.replayed_s


class StepClock(Protocol):
    """What times a step on one device."""

    def step(self, run: Step, repeats: int) -> StepTimes:
        """Medians, or means over `repeats` calls in a row; RuntimeError where the step does not run."""


class HostStepClock:
    """On a CPU."""

    def step(self, run: Step, repeats: int) -> StepTimes:
        return StepTimes(called_s=called_s(run, repeats, lambda: None))


class CudaStepClock:
    """On the current CUDA device.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self) -> None:
        self._clock = CudaClock()

    def step(self, run: Step, repeats: int) -> StepTimes:
        called = called_s(run, repeats, torch.cuda.synchronize)
        try:
            replay = _captured(run)
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:_REASON]}"
            return StepTimes(called_s=called, not_replayed=reason)
        return StepTimes(called_s=called, replayed_s=self._clock.alone_s(replay, repeats))


def called_s(run: Step, repeats: int, wait: Callable[[], None]) -> float:
    """Seconds of one call, mean of `repeats` in a row after warm-ups: the median of three such rows."""
    for _ in range(_WARMUPS):
        run()
    rows = []
    for _ in range(3):
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        rows.append((time.perf_counter() - begin) / repeats)
    return median(rows)


def _captured(run: Step) -> Callable[[], None]:
    """The step as a graph; what it made lives in the graph's own memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay

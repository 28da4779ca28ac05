"""Passes of several subjects in turns, in one process: how the kernels of a GPU are timed.

Each turn times every subject once, so that a clock that drops, drops for all. Before a pass the cache is flushed, often
enough that the device is still busy when the host has put the whole pass into its queue: what is timed is the device's
work, as in a training step, where the host runs ahead.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

import torch

from maha_megatron.attention.benchmark.subjects import Inputs, Pass, Setting, Subject
from maha_megatron.attention.benchmark.work import Card
from maha_megatron.errors import ConfigError, MahaError

_LEAST_TURNS = 3
_REASON = 160  # characters of each thing that torch says
_FLUSH_BYTES = 256 * 2**20  # several times the second-level cache of any card
_MOST_FLUSHES = 400
_HOST_MARGIN = 1.5
_PRODUCT_WIDTH, _COPY_BYTES, _RATE_REPEATS = 8192, 2**30, 10


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of forward and of the backward behind it; host_s: until the host had queued both."""

    forward_s: float
    backward_s: float
    host_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes above what was there before: held after forward (its output included), and the most held by both passes."""

    kept_bytes: int
    peak_bytes: int


class Clock(Protocol):
    """What times a pass and weighs its memory on one device."""

    def timed(self, run: Pass, host_s: float) -> Times:
        """Of one pass; `host_s`, what the host needed for an earlier one (0: not known)."""

    def memory(self, run: Pass) -> Memory | None:
        """Of one pass; None where the device does not tell."""


class HostClock:
    """Wall-clock seconds on a CPU, where nothing is queued."""

    def timed(self, run: Pass, host_s: float) -> Times:
        begin = time.perf_counter()
        out = run.forward()
        between = time.perf_counter()
        run.backward(out)
        end = time.perf_counter()
        return Times(forward_s=between - begin, backward_s=end - between, host_s=end - begin)

    def memory(self, run: Pass) -> Memory | None:
        return None


class CudaClock:
    """Events on the current stream of the current CUDA device, and the bytes of torch's allocator.

    Raises:
        ConfigError: there is no such device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device: measure on the CPU (--device cpu)")
        self._swept = torch.randn(_FLUSH_BYTES // 4, device="cuda")
        self._sweep_s = self._seconds(self._sweep, _RATE_REPEATS)

    def timed(self, run: Pass, host_s: float) -> Times:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        for _ in range(min(1 + int(_HOST_MARGIN * host_s / self._sweep_s), _MOST_FLUSHES)):
            self._sweep()
        begin = time.perf_counter()
        marks[0].record()
        out = run.forward()
        marks[1].record()
        run.backward(out)
        marks[2].record()
        host_s = time.perf_counter() - begin
        torch.cuda.synchronize()
        forward_s, backward_s = (1e-3 * a.elapsed_time(b) for a, b in pairwise(marks))
        return Times(forward_s=forward_s, backward_s=backward_s, host_s=host_s)

    def memory(self, run: Pass) -> Memory | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run.forward()
        kept = torch.cuda.memory_allocated() - before
        run.backward(out)
        return Memory(kept_bytes=kept, peak_bytes=torch.cuda.max_memory_allocated() - before)

    def alone_s(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of a short piece of work, the cache flushed before each: the median of `repeats` after a warm-up."""

        def swept() -> None:
            torch.cuda.synchronize()
            self._sweep()

        return self._seconds(run, repeats, swept)

    def card(self) -> Card:
        """This card's own rates: a product of two square matrices in bf16, a copy of 1 GiB."""
        a, b = (torch.randn(_PRODUCT_WIDTH, _PRODUCT_WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        source = torch.randn(_COPY_BYTES // 4, device="cuda")
        target = torch.empty_like(source)
        product_s = self._seconds(lambda: torch.mm(a, b), _RATE_REPEATS)
        copy_s = self._seconds(lambda: target.copy_(source), _RATE_REPEATS)
        return Card(bytes_per_s=2 * _COPY_BYTES / copy_s, flops_per_s=2 * _PRODUCT_WIDTH**3 / product_s)

    def _sweep(self) -> None:
        self._swept.add_(1)

    @staticmethod
    def _seconds(run: Callable[[], object], repeats: int, before: Callable[[], None] = lambda: None) -> float:
        """The median of event-timed repeats, after one that is not timed."""
        taken = []
        for _ in range(repeats + 1):
            before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            taken.append(1e-3 * begin.elapsed_time(end))
        return median(taken[1:])


def start(
    subjects: Mapping[str, Subject], setting: Setting, inputs: Inputs, clock: Clock, required: str
) -> tuple[dict[str, Pass], dict[str, str]]:
    """Run every subject once, which compiles what has to be compiled.

    Returns:
        Those that ran; and of each that did not, why, in a line.

    Raises:
        MahaError: `required` did not run.
    """
    ready, unavailable = {}, {}
    for name, subject in subjects.items():
        try:
            with warnings.catch_warnings(record=True) as warned:  # torch says there why a kernel is not possible
                run = subject(setting, inputs)
                clock.timed(run, 0.0)
        except (RuntimeError, ConfigError) as error:  # no such kernel for these inputs; too little memory
            said = [str(error), *(str(warning.message) for warning in warned)]
            reason = f"{type(error).__name__}: " + "; ".join(text.splitlines()[0][:_REASON] for text in said if text)
            if name == required:
                raise MahaError(f"{name} does not run on {len(inputs.q_tnd)} rows: {reason}") from error
            unavailable[name] = reason
        else:
            ready[name] = run
        for leaf in inputs.leaves().values():
            leaf.grad = None
    return ready, unavailable


def take_turns(passes: Mapping[str, Pass], clock: Clock, *, turns: int, limit_s: float) -> dict[str, list[Times]]:
    """Times of each subject, `turns` times after a warm-up; fewer (at least 3) once `limit_s` seconds have gone by."""
    host_s = {name: clock.timed(run, 0.0).host_s for name, run in passes.items()}
    taken: dict[str, list[Times]] = {name: [] for name in passes}
    begin = time.monotonic()
    for turn in range(turns):
        if turn >= _LEAST_TURNS and time.monotonic() - begin > limit_s:
            break
        for name, run in passes.items():
            taken[name].append(clock.timed(run, host_s[name]))
    return taken

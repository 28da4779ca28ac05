"""Taking times and peak memory. Every measurement runs in a process of its own, so that none inherits another's heap.

Times of one length and dtype come from one process in which the subjects take turns, so that a machine that slows down
slows all of them. Memory is taken at the first pass of a process that has run a tiny one before: libraries are loaded,
and no heap of an earlier pass is reused.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from maha_megatron.attention.benchmark.subjects import DTYPES, SUBJECTS, Setting, draw_inputs
from maha_megatron.errors import MahaError

_TINY_ROWS = 64
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CpuMeter:
    """Wall-clock seconds, and resident memory of this process as Linux counts it."""

    def seconds(self, run: Callable[[], None]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def peak_bytes(self, run: Callable[[], None]) -> int | None:
        """Growth of the resident set above what it is now; None where the system does not tell."""
        try:
            _CLEAR.write_text("5")  # forget the peak so far
            before = _resident("VmRSS")
        except OSError:
            return None
        run()
        return max(_resident("VmHWM") - before, 0)


METERS = {"cpu": CpuMeter}


def times_s(
    setting: Setting, subjects: Sequence[str], rows: int, dtype: str, *, repeats: int, limit_s: float
) -> dict[str, list[float]]:
    """Seconds of forward and backward of each subject, `repeats` times after one warm-up; fewer (at least 3) once
    `limit_s` seconds have gone by.

    Raises:
        MahaError: the process died, as it does where memory runs out.
    """
    return _in_a_process(_times, setting, subjects, rows, dtype, repeats, limit_s)


def peak_bytes(setting: Setting, subject: str, rows: int, dtype: str) -> int | None:
    """Peak memory above the inputs of one forward and backward.

    Raises:
        MahaError: as `times_s`.
    """
    return _in_a_process(_peak, setting, subject, rows, dtype)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each subject."""
    return {name: statistics.median(taken) for name, taken in times.items()}


def _times(setting: Setting, subjects: Sequence[str], rows: int, dtype: str, repeats: int, limit_s: float):
    meter = _prepare(setting)
    inputs = draw_inputs(setting, rows, DTYPES[dtype])
    ready = {name: SUBJECTS[name](setting, inputs) for name in subjects}
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    begin = time.monotonic()
    for turn in range(repeats + 1):
        if turn > 3 and time.monotonic() - begin > limit_s:
            break
        for name, run in ready.items():
            taken[name].append(meter.seconds(run))
    return {name: seconds[1:] for name, seconds in taken.items()}


def _peak(setting: Setting, subject: str, rows: int, dtype: str) -> int | None:
    meter = _prepare(setting)
    SUBJECTS[subject](setting, draw_inputs(setting, _TINY_ROWS, DTYPES[dtype]))()
    return meter.peak_bytes(SUBJECTS[subject](setting, draw_inputs(setting, rows, DTYPES[dtype])))


def _prepare(setting: Setting) -> CpuMeter:
    if setting.threads:
        torch.set_num_threads(setting.threads)
    return METERS[setting.device]()


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MahaError(f"a measuring process died, perhaps out of memory: {arguments[1:]}") from error


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024

"""Before anything is timed, in processes of their own: the gate of every operator, and compiling every kernel once.

What these processes compile lies in Triton's cache on disk, where the timing process finds it. All of them use the same
device.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from maha_megatron.attention.benchmark import gate
from maha_megatron.attention.benchmark.cases import Case
from maha_megatron.attention.benchmark.peers import window
from maha_megatron.attention.benchmark.subjects import DTYPES, WINDOW, Setting, draw_inputs, maha
from maha_megatron.errors import MahaError

_MEMORY_FRAC = 0.9  # of the device, for all processes together


def check_and_compile(cases: Sequence[Case], dtypes: Sequence[str], processes: int) -> dict[str, gate.Verdict]:
    """The gate's verdict on every operator of the cases in every dtype, by words that say which; and all compiled.

    Settings that differ in their documents alone are checked once. With no processes, here, and nothing is compiled
    ahead.

    Raises:
        MahaError: a process died.
    """
    checks = dict(_checks(cases, dtypes))
    if not processes:
        return {words: gate.check(*arguments) for words, arguments in checks.items()}
    options = {"mp_context": get_context("spawn"), "initializer": _take_a_share, "initargs": (processes,)}
    with ProcessPoolExecutor(processes, **options) as pool:
        verdicts = {words: pool.submit(gate.check, *arguments) for words, arguments in checks.items()}
        compiled = [pool.submit(_compile, *arguments) for arguments in _compilations(cases, dtypes)]
        try:
            found = {words: verdict.result() for words, verdict in verdicts.items()}
            if all(verdict.green for verdict in found.values()):
                for done in compiled:
                    done.result()
        except BrokenProcessPool as error:
            raise MahaError("a process that checks or compiles kernels died, perhaps out of memory") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _checks(cases: Sequence[Case], dtypes: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Words and the gate's arguments."""
    seen = set()
    for case in cases:
        for name, setting in case.ours.items():
            operator = replace(setting, mixed=False, call_rows=0)
            for dtype in dtypes:
                if (operator, case.lengths, dtype) not in seen:
                    seen.add((operator, case.lengths, dtype))
                    yield f"{case.name}, {name}, {dtype}", (operator, DTYPES[dtype], case.lengths)


def _compilations(cases: Sequence[Case], dtypes: Sequence[str]) -> Iterator[tuple[Setting, int, str, bool]]:
    """Every operator and length, and whether its window is measured too; the most scales first: they take longest."""
    wanted = {
        (replace(setting, mixed=False), length, dtype): WINDOW in case.subjects
        for case in sorted(cases, key=lambda case: WINDOW in case.subjects)
        for setting in case.ours.values() for length in case.lengths for dtype in dtypes
    }  # fmt: skip
    return iter(sorted(((*task, window) for task, window in wanted.items()), key=lambda task: (-task[1], repr(task))))


def _compile(setting: Setting, length: int, dtype: str, with_window: bool) -> None:
    """Run the operator, and its window, once, forward and backward.

    Kernels do not depend on where documents end, so that the rows of a short call do for every length.
    """
    inputs = draw_inputs(setting, length, DTYPES[dtype], (setting.call_rows or length,))
    for subject in (maha, window) if with_window else (maha,):
        with contextlib.suppress(RuntimeError):  # what cannot run here is named where it is measured
            subject(setting, inputs)()
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _take_a_share(processes: int) -> None:
    """Of the cores and of the device's memory: too large a pass fails alone, and is then not compiled ahead."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(_MEMORY_FRAC / processes)

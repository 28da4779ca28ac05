"""Whole training runs as measurements: started like a user starts them, read back from what they wrote.

A trial is a process of its own (launch/pretrain.py, under torchrun when it has several ranks), so that nothing of one
leaks into the next and the measured program is the one that users run.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from maha_megatron.errors import TrainingError
from maha_megatron.train.child_process import ChildProcess
from maha_megatron.train.metrics import METRICS, read_rows
from maha_megatron.train.record import RECORD

CONSOLE_LOG = "console.log"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run to make.

    Args:
        name: names its folder and its row in a table.
        config: what `--config` gets.
        settings: `a.b=c` overrides, applied after `run.folder` and `run.name`.
        processes: ranks to start on this machine.
        allow_program: what `--allow-program` gets, for a configuration that states a program.
    """

    name: str
    config: Path
    settings: tuple[str, ...] = ()
    processes: int = 1
    allow_program: str | None = None


def run_trial(
    trial: Trial, folder: Path, script: Path, *, timeout_s: float, device: int | None = None
) -> list[dict[str, float]]:
    """Run one trial to its end.

    Args:
        trial: what to run.
        folder: receives one folder a trial, with the run and its console log; that of an earlier trial of the same
            name is removed.
        script: path of launch/pretrain.py.
        timeout_s: the run is ended, with every process it started, after so many seconds.
        device: the one GPU that it may see; None for all.

    Returns:
        The rows of its metrics.jsonl.

    Raises:
        TrainingError: the run failed or took too long (the message holds the end of its log), or its folder holds
            something else than a run.
    """
    run_folder = folder / trial.name
    _empty_folder(run_folder)
    settings = (f"run.folder={run_folder}", f"run.name={trial.name}", "checkpoint.resume=false", *trial.settings)
    words = [str(script), "--config", str(trial.config)]
    words += [part for setting in settings for part in ("--set", setting)]
    words += ["--allow-program", trial.allow_program] if trial.allow_program else []
    if trial.processes > 1:
        # standalone: torchrun finds a free port itself, so that trials may run side by side
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(trial.processes))
        words = [*launcher, *words]
    child = ChildProcess(words, run_folder / CONSOLE_LOG, device=None if device is None else str(device))
    try:
        code = child.wait(timeout_s)
    finally:
        child.end()
    if code != 0:
        how = f"no end after {timeout_s:.0f} s" if code is None else code
        raise TrainingError(f"trial {trial.name} failed ({how}); the end of {child.log}:\n{child.last_lines()}")
    return read_rows(run_folder / METRICS)


def run_side_by_side(
    trials: Sequence[Trial],
    folder: Path,
    script: Path,
    *,
    at_once: int,
    timeout_s: float,
    device_each: bool = False,
) -> Iterator[list[dict[str, float]]]:
    """Run trials, up to `at_once` at a time; yields the rows of each in the order of `trials`.

    Args and Raises: as for `run_trial`; `device_each` gives every running trial a GPU of its own. The first failure is
    raised once the trials under way have ended.
    """
    devices: SimpleQueue[int | None] = SimpleQueue()
    for number in range(at_once):
        devices.put(number if device_each else None)

    def run(trial: Trial) -> list[dict[str, float]]:
        device = devices.get()
        try:
            return run_trial(trial, folder, script, timeout_s=timeout_s, device=device)
        finally:
            devices.put(device)

    with ThreadPoolExecutor(at_once) as pool:
        started = [pool.submit(run, trial) for trial in trials]
        try:
            for running in started:
                yield running.result()
        finally:
            pool.shutdown(cancel_futures=True)


def column(rows: Sequence[dict[str, float]], name: str) -> dict[int, float]:
    """One metric by step."""
    return {int(row["step"]): row[name] for row in rows if name in row}


def warmup_settings(configured_steps: int, steps: int, given: Sequence[str]) -> tuple[str, ...]:
    """The override that keeps the warm-up of a short run within its first fifth; none if it is given already.

    Args:
        configured_steps: schedule.warmup_steps of the configuration.
        steps: steps of the run.
        given: overrides that win.
    """
    key = "schedule.warmup_steps"
    if any(word.partition("=")[0].strip() == key for word in given):
        return ()
    return (f"{key}={min(configured_steps, steps // 5)}",)


def _empty_folder(folder: Path) -> None:
    """Make the folder of a trial, new; what is removed must be an earlier trial's."""
    if folder.exists():
        of_a_trial = folder.is_dir() and any((folder / name).is_file() for name in (RECORD, CONSOLE_LOG))
        if not of_a_trial and not (folder.is_dir() and not any(folder.iterdir())):
            raise TrainingError(
                f"{folder} exists and is no folder of an earlier trial: move it, or choose another --folder"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)

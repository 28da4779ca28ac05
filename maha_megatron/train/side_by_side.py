"""The runs of a study, several at a time on each device: trained, evaluated, resumed, and stopped when time is up."""

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maha_megatron.errors import TrainingError
from maha_megatron.train.child_process import ChildProcess
from maha_megatron.train.guards import EXIT_INTERRUPTED
from maha_megatron.train.study_runs import Session, Stage, StudyRun
from maha_megatron.units import format_count, format_duration

POLL_S = 0.2
PROGRESS_S = 15.0
GRACE_S = 60.0
"""So long may it take, once time is up, to save a run after the step at hand, and to end an evaluation."""
STOPPED = (EXIT_INTERRUPTED, -signal.SIGTERM)


@dataclass(kw_only=True)
class _Active:
    """A process that works for a run."""

    run: StudyRun
    stage: Stage
    device: str | None
    child: ChildProcess
    began_s: float = field(default_factory=time.monotonic)
    beside_s: float = 0.0
    """Seconds, counted once for every other process on the device."""


class SideBySide:
    """Makes runs in their order; after `go`, `failures` has a text for every run that failed.

    A run that is trained is evaluated next, in the place that it trained in.

    Args:
        runs: prepared.
        places: the device of each place for a process; None: all devices, or a CPU.
        pretrain, evaluate: paths of launch/pretrain.py and tools/evaluate.py.
        say: gets every line of progress.
        progress_s: seconds between reports of what runs.
    """

    def __init__(
        self,
        runs: Sequence[StudyRun],
        places: Sequence[str | None],
        *,
        pretrain: Path,
        evaluate: Path,
        say: Callable[[str], None],
        progress_s: float = PROGRESS_S,
    ) -> None:
        self.failures: dict[str, str] = {}
        self._waiting = deque(run for run in runs if run.stage is not Stage.DONE)
        self._places, self._active = deque(places), []
        self._scripts, self._say, self._progress_s = (pretrain, evaluate), say, progress_s
        self._kill_at_s: float | None = None  # set once everything was asked to stop

    def go(self, until_s: float | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        """Make the runs, until all are done or failed.

        Args:
            until_s: after so many seconds nothing new starts, runs are asked to save and stop, and evaluations may end.
            stopped: the same, as soon as it says true.
        """
        began_s = told_s = counted_s = time.monotonic()
        try:
            while self._active or (self._waiting and self._kill_at_s is None):
                now_s = time.monotonic()
                self._count(now_s - counted_s)
                counted_s = now_s
                if self._kill_at_s is None and (stopped() or (until_s is not None and now_s - began_s >= until_s)):
                    self._ask_to_stop()
                if self._kill_at_s is None:
                    self._start()
                elif now_s > self._kill_at_s:
                    self._end()
                self._collect()
                if now_s - told_s >= self._progress_s and self._active:
                    told_s = now_s
                    self._report()
                time.sleep(POLL_S)
        finally:  # by an error or a second Ctrl-C perhaps
            self._kill_at_s = self._kill_at_s or time.monotonic()
            self._end()
            self._collect()

    def _start(self) -> None:
        while self._waiting and self._places:
            run, device = self._waiting.popleft(), self._places.popleft()
            stage = run.stage
            try:
                child = ChildProcess(run.words(stage, *self._scripts), run.log_of(stage), device=device)
            except TrainingError as error:
                self._places.append(device)
                self._fail(run, str(error))
                continue
            self._active.append(_Active(run=run, stage=stage, device=device, child=child))
            self._say(f"{run.title}: {stage.value}{'' if device is None else f' on GPU {device}'}")

    def _ask_to_stop(self) -> None:
        training = [active for active in self._active if active.stage is Stage.TRAIN]
        evaluating, waiting = len(self._active) - len(training), len(self._waiting)
        self._say(f"time to stop; training: {len(training)}, evaluating: {evaluating}, waiting: {waiting}")
        self._kill_at_s = time.monotonic() + GRACE_S
        for active in training:
            active.child.ask_to_stop()

    def _end(self) -> None:
        for active in self._active:
            active.child.end()

    def _count(self, seconds: float) -> None:
        for active in self._active:
            others = sum(other.device == active.device for other in self._active) - 1
            active.beside_s += others * seconds

    def _collect(self) -> None:
        """Of processes that have ended: note what they did, and what their runs lack next."""
        for active in [active for active in self._active if active.child.exit_code() is not None]:
            self._active.remove(active)
            self._places.appendleft(active.device)
            run, code, seconds = active.run, active.child.exit_code(), time.monotonic() - active.began_s
            if active.stage is Stage.TRAIN:
                run.add_session(Session(seconds=seconds, beside=active.beside_s / max(seconds, POLL_S), code=code))
            lacks = run.stage
            if code == 0 and lacks is not active.stage:
                self._say(f"{run.title}: {active.stage.value} took {format_duration(seconds)}")
                if lacks is not Stage.DONE:
                    self._waiting.appendleft(run)
            elif code in STOPPED or (code == -signal.SIGKILL and self._kill_at_s is not None):
                self._say(f"{run.title}: stopped while {active.stage.value}")
            else:
                how = f"{active.stage.value} ended {f'with {code}' if code else 'without a result'}"
                self._fail(run, f"{how}, see {active.child.log}", active.child.last_lines())

    def _fail(self, run: StudyRun, why: str, log: str = "") -> None:
        self._say(f"{run.title}: FAILED; {why}")
        self.failures[run.title] = f"{run.title}: {why}\n{log}".rstrip()

    def _report(self) -> None:
        """A line for every process, and one for all that is left."""
        left_tokens, tokens_per_s = 0.0, 0.0
        for run in self._waiting:
            left_tokens += (run.config.train.steps - run.steps_done()) * run.step_tokens
        for active in self._active:
            run, steps = active.run, active.run.config.train.steps
            rows = [row for row in run.rows() if "tokens_per_s" in row] if active.stage is Stage.TRAIN else []
            if not rows:
                self._say(f"  {run.title}: {active.stage.value}")
                continue
            last, left = rows[-1], (steps - rows[-1]["step"]) * run.step_tokens
            left_tokens, tokens_per_s = left_tokens + left, tokens_per_s + last["tokens_per_s"]
            self._say(
                f"  {run.title}: step {last['step']}/{steps}  loss {last['loss_nats']:.4f} nats  "
                f"{format_count(last['tokens_per_s'])} tokens/s  "
                f"{format_duration(left / last['tokens_per_s'])} left"
            )
        if tokens_per_s:
            left = format_duration(left_tokens / tokens_per_s)
            self._say(f"  {len(self._active)} processes, {len(self._waiting)} runs wait, about {left} of training left")

"""Everything a run writes and prints between its checkpoints. On ranks other than 0 it does nothing."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from maha_megatron.config.accounting import total_parameters, training_flops_per_token
from maha_megatron.config.derive import layer_attention, maha_windows
from maha_megatron.config.schema import Config
from maha_megatron.data.loader import SourceShare
from maha_megatron.errors import TrainingError
from maha_megatron.model.solve_totals import SolveCounts
from maha_megatron.train.engine import Engine, Evaluation, StepResult
from maha_megatron.train.metrics import METRICS, MetricsLog, Throughput, peak_memory_bytes, peak_tflops, read_rows
from maha_megatron.train.record import write_record
from maha_megatron.train.report import Console, summarise
from maha_megatron.train.state import RunState
from maha_megatron.train.validation_text import bits_per_byte, described_sources, weighted_mean
from maha_megatron.units import format_count, format_duration


class RunOutput:
    """Console, metrics and final report of a run.

    Args:
        config: the run's configuration.
        state: where the run starts or continues; metrics written after it are cut.
        made_with: versions, for run.json.
        rank: this process's rank.
        devices: ranks of the run.
    """

    def __init__(
        self, config: Config, state: RunState, made_with: Mapping[str, str], *, rank: int, devices: int
    ) -> None:
        self._config, self._devices, self._first, self._start = config, devices, rank == 0, state
        self._folder = Path(config.run.folder)
        self._console = Console(config.train.steps, sys.stdout if self._first else None)
        self._data = described_sources(config) if self._first else []
        peak = peak_tflops(config.train.peak_tflops, config.train.precision)
        self._throughput = Throughput(training_flops_per_token(config), devices, peak)
        self._log = None
        if self._first:
            self._log = _writing(lambda: MetricsLog(self._folder, state.step))
            _writing(lambda: write_record(config, devices, made_with))

    def started(
        self, engine: Engine, state: RunState, tokens_per_epoch: int, shares: Sequence[SourceShare] = ()
    ) -> None:
        """Say what is about to run; `shares` are what the whole run will have taken from each source."""
        steps, tokens = self._config.train.steps - state.step, self._step_tokens
        self._console.say(
            f"{self._config.run.name}: {format_count(total_parameters(self._config))} parameters on {self._devices} "
            f"rank(s), {engine.optimizer_class}; {f'continuing after step {state.step}' if state.step else 'new run'}"
        )
        if steps <= 0:
            self._console.say(
                f"nothing left to train: train.steps = {self._config.train.steps}, and {state.step} are done"
            )
            return
        self._console.say(
            f"{steps} steps of {format_count(tokens)} tokens; an epoch of the data has {format_count(tokens_per_epoch)}"
        )
        for share in shares if len(shares) > 1 else ():
            self._console.say(
                f"source {share.name}: {100 * share.asked_frac:.4g} % asked, {100 * share.drawn_frac:.4g} % drawn by"
                f" the end, {share.epochs:.3g} epochs"
            )

    def stepped(
        self,
        step: int,
        result: StepResult,
        step_s: float,
        *,
        logged: bool,
        validation: Evaluation | None,
        solves: SolveCounts | None = None,
        data_wait_s: float = 0.0,
    ) -> None:
        """After a step: progress, and a row of metrics if it is a logged or a validated one.

        `solves` are the programs solved since they were last given; `data_wait_s` of the step were spent waiting for
        its batches.
        """
        if not self._first:
            return
        self._throughput.add(step_s, self._step_tokens, data_wait_s)
        self._console.progress(step, result.loss_nats, step_s)
        row: dict[str, float] = self._measured(result) if logged else {}
        if validation is not None:
            row["validation_loss_nats"] = validation.loss_nats
            if self._data:
                row["validation_bits_per_byte"] = bits_per_byte(self._data, validation.loss_nats)
            if len(validation.by_source_nats) > 1:
                row |= {f"validation_loss_nats/{name}": loss for name, loss in validation.by_source_nats.items()}
        if solves is not None:
            row |= _solve_metrics(solves)
        if row:
            _writing(lambda: self._log.write(step, row))
            self._console.row(step, row)
        if solves is not None and solves.missed:
            self._console.say(
                f"warning: {solves.missed} of {format_count(solves.programs)} programs for the scales' weights missed "
                f"the solver's tolerance (largest relative residual {solves.residual_max:.1e}): their weights are off"
            )

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is complete."""
        self._console.say(f"saved {checkpoint}")

    def interrupted(self, state: RunState) -> None:
        """A signal ended the run early; a checkpoint was saved if it made any step."""
        if state.step > self._start.step:
            where = f"after step {state.step}, saved; the same command continues from there"
        elif state.step:
            where = f"before step {state.step + 1}, nothing new to save; the same command continues after {state.step}"
        else:
            where = "before the first step, nothing to save; the same command starts anew"
        self._console.say(f"stopped by a signal {where}")

    def finished(self, state: RunState, elapsed_s: float, shares: Sequence[SourceShare] = ()) -> None:
        """Plot, summary.json and the last lines; `shares` are what was taken from each source."""
        if not self._first:
            return
        facts: dict[str, Any] = {
            "steps": state.step,
            "tokens": state.consumed_samples * self._config.data.sequence_tokens,
        }
        for row in read_rows(self._folder / METRICS):  # the last value of each
            facts |= {name: row[name] for name in row if name.partition("/")[0] in _IN_SUMMARY}
        facts["sources"] = [asdict(share) for share in shares]
        if self._data:
            facts["unigram_entropy_nats"] = weighted_mean(self._data, "unigram_entropy_nats")
        if self._data and "validation_loss_nats" in facts:
            facts["nats_below_unigram_entropy"] = facts["unigram_entropy_nats"] - facts["validation_loss_nats"]
        _writing(lambda: summarise(self._folder, self._config.run.name, self._console, facts))
        self._console.say(f"this process ran  {format_duration(elapsed_s)}")

    @property
    def _step_tokens(self) -> int:
        return self._config.train.global_batch_samples * self._config.data.sequence_tokens

    def _measured(self, result: StepResult) -> dict[str, float]:
        row = {
            "loss_nats": result.loss_nats,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            **self._throughput.take(),
            "memory_bytes": peak_memory_bytes(),
        }
        kinds = layer_attention(self._config)
        for layer, weights in result.scale_weights.items():
            names = [f"scale_{scale}" for scale in range(len(maha_windows(self._config, kinds[layer])))]
            names += ["opened"] if kinds[layer] == "refined" else []
            row |= {f"scale_weight/layer_{layer:02d}/{name}": x for name, x in zip(names, weights, strict=True)}
        return row

    def __enter__(self) -> "RunOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()


_IN_SUMMARY = (
    "loss_nats",
    "validation_loss_nats",
    "validation_bits_per_byte",
    "tokens_per_s",
    "data_wait_s",
    "memory_bytes",
)


def _writing(action: Any) -> Any:
    """Run something that writes into the run's folder; a full disk becomes an error for people."""
    try:
        return action()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TrainingError(f"the run's folder cannot be written ({error.filename or METRICS}): {reason}") from error


def _solve_metrics(solves: SolveCounts) -> dict[str, float]:
    row: dict[str, float] = {"missed_solves": solves.missed, "solver_residual_max": solves.residual_max}
    if solves.steps_mean is not None:
        row["solver_steps_mean"] = solves.steps_mean
    return row

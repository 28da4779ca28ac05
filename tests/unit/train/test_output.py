"""What a run says at its start, at a stop and at its end."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from maha_megatron.config.schema import Config
from maha_megatron.model.solve_totals import SolveCounts
from maha_megatron.train import output as output_module
from maha_megatron.train.engine import StepResult
from maha_megatron.train.metrics import METRICS, read_rows
from maha_megatron.train.output import RunOutput
from maha_megatron.train.report import SUMMARY
from maha_megatron.train.state import RunState
from tests.support.model import tiny_config

ENGINE = SimpleNamespace(optimizer_class="AdamW")


def config(tmp_path: Path, **changes: object) -> Config:
    return tiny_config(run__folder=str(tmp_path), **changes)


def opened(config: Config, state: RunState) -> RunOutput:
    return RunOutput(config, state, {}, rank=0, devices=1)


@pytest.mark.parametrize(
    ("start", "stop", "said"),
    [
        (0, 0, "before the first step, nothing to save"),
        (7, 7, "before step 8, nothing new to save; the same command continues after 7"),
        (7, 9, "after step 9, saved"),
        (0, 1, "after step 1, saved"),
    ],
)
def test_a_stop_says_saved_only_where_it_was(
    start: int, stop: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(config(tmp_path), RunState(step=start, consumed_samples=8 * start)) as output:
        output.interrupted(RunState(step=stop, consumed_samples=8 * stop))
    line = capsys.readouterr().out
    assert said in line
    assert (", saved" in line) == (stop > start)


@pytest.mark.parametrize("done", [10, 12])
def test_nothing_left_to_train(done: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState(step=done, consumed_samples=8 * done)
    with opened(config(tmp_path, train__steps=10), state) as output:
        output.started(ENGINE, state, 1000)
    text = capsys.readouterr().out
    assert "nothing left to train: train.steps = 10" in text
    assert "0 steps of" not in text
    assert "-2 steps" not in text


def test_tokens_are_those_that_were_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch size may have changed on the way; the unigram entropy is compared with the last validation."""
    described = dataclasses.make_dataclass("Described", ["unigram_entropy_nats", "bytes_per_token"])(6.0, 4.0)
    monkeypatch.setattr(output_module, "described_sources", lambda _: [(1.0, described)])
    settings = config(tmp_path)
    with opened(settings, RunState()) as output:
        (tmp_path / "metrics.jsonl").write_text('{"step": 4, "validation_loss_nats": 4.5}\n')
        output.finished(RunState(step=4, consumed_samples=48), 1.0)
    summary: Mapping[str, float] = json.loads((tmp_path / SUMMARY).read_text())
    assert summary["tokens"] == 48 * settings.data.sequence_tokens
    assert summary["nats_below_unigram_entropy"] == 1.5


def stepped(settings: Config, solves: SolveCounts | None, capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    """The row and the console of a logged step."""
    with opened(settings, RunState()) as output:
        result = StepResult(loss_nats=2.0, gradient_norm=0.5, learning_rate=1e-3)
        output.stepped(1, result, 0.1, logged=True, validation=None, solves=solves)
    (row,) = read_rows(Path(settings.run.folder) / METRICS)
    return row, capsys.readouterr().out


def test_missed_solves_are_shown_and_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = SolveCounts(programs=4096, missed=3, steps_mean=4.5, residual_max=2e-4)
    row, text = stepped(config(tmp_path), counts, capsys)
    assert row["missed_solves"] == 3
    assert row["solver_steps_mean"] == 4.5
    assert row["solver_residual_max"] == 2e-4
    (line,) = [line for line in text.splitlines() if "warning" in line]
    assert line.startswith("warning: 3 of 4.096 k programs for the scales' weights missed the solver's tolerance")
    assert "2.0e-04" in line


def test_solves_without_a_miss_are_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = SolveCounts(programs=4096, missed=0, steps_mean=None, residual_max=2e-8)
    row, text = stepped(config(tmp_path), counts, capsys)
    assert row["missed_solves"] == 0
    assert "solver_steps_mean" not in row
    assert "warning" not in text


def test_without_a_solver_no_row_speaks_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, _ = stepped(config(tmp_path), None, capsys)
    assert "loss_nats" in row
    assert not [name for name in row if "solve" in name]

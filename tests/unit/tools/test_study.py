"""tools/study.py: from the command line to tables, stopping in time, and what it refuses."""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maha_megatron.train import side_by_side
from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.fake_study import scripts, study  # noqa: F401 (fixtures)
from tests.support.runs import ROOT, corpus, tool, wait_for_step  # noqa: F401 (corpus: a fixture)

SCRIPT = "tools/study.py"

Program = Callable[..., int]


@pytest.fixture
def program(study, scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:  # noqa: F811
    """The program on the small study with stand-ins for what it starts: its exit code."""
    spec = importlib.util.spec_from_file_location("study_tool", ROOT / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PRETRAIN", scripts["pretrain"])
    monkeypatch.setattr(module, "EVALUATE", scripts["evaluate"])
    monkeypatch.setattr(side_by_side, "POLL_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    where = ("--study", tmp_path / "small.yaml", "--folder", tmp_path / "runs", "--results", tmp_path / "results")
    data = ("--data", "d", "--tokenizer", "t")
    yield lambda *words: module.main([str(word) for word in (*where, *data, *words)])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def results(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "results").glob("study_small_*.json"), key=lambda path: path.stat().st_mtime_ns)


def test_a_study_is_made_and_told(program: Program, tmp_path: Path, capsys) -> None:
    assert program("--only", "window", "dense", "--seeds", 1, "--at-once", 2) == 0
    (path,) = results(tmp_path)
    record = json.loads(path.read_text())
    assert (record["study"], record["reference"], list(record["runs"])) == (
        "small",
        "dense",
        ["dense seed 1", "window seed 1"],
    )
    text = path.with_suffix(".md").read_text()
    assert "| window | 1 | 2.1100 | - | +0.1000 | - |" in text
    assert text.startswith("# study_small\n\n- date: ")
    assert "window seed 1: evaluating took" in capsys.readouterr().out
    assert program("--until", 0, "--reference", "window") == 75, "seed 2 is not there"
    record = json.loads(results(tmp_path)[1].read_text())
    assert record["reference"] == "window"
    assert "| dense | 1 | 2.0100 | - | -0.1000 | - |" in results(tmp_path)[1].with_suffix(".md").read_text()
    assert "Not trained to the end: dense seed 2 (0 of 4 steps)" in results(tmp_path)[1].with_suffix(".md").read_text()


def test_nothing_trained_is_no_table(program: Program, tmp_path: Path, capsys) -> None:
    assert program("--until", 0) == 75
    assert not results(tmp_path)
    assert "Not trained to the end: dense seed 1 (0 of 4 steps)" in capsys.readouterr().out


def test_a_second_interrupt_is_no_traceback(program: Program, monkeypatch, capsys) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side.SideBySide, "go", interrupted)
    assert program() == 130
    assert "ended at once, unsaved; the same command continues" in capsys.readouterr().err


def test_a_failed_run_is_an_error_after_the_others(program: Program, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FAKE_FAILS", "window")
    assert program("--seeds", 2) == 2
    assert "error: window seed 2: training ended with 2" in capsys.readouterr().err
    assert len(results(tmp_path)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "maha"), "--only maha: the study has dense window"),
        (("--seeds", 3), "--seeds 3: the study has 1 2"),
        (("--reference", "maha"), "--reference maha: the study has dense window"),
        (("--gpus", 0), "--gpus 0: torch finds no GPU; leave it out"),
        (("--set", "run.seed=3"), "--set: run.seed: has no effect in a study"),
        (("--set", "train.stps=3"), "peer dense: --set: train.stps: unknown key"),
        (("--study", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(program: Program, tmp_path, capsys, words, message) -> None:
    assert program(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"), [(("--at-once", 0), "needs at least 1"), (("--until", -1), "needs at least 0")]
)
def test_numbers_have_bounds(program: Program, capsys, words, message) -> None:
    with pytest.raises(SystemExit):
        program(*words)
    assert message in capsys.readouterr().err


def test_gpus_are_taken_in_turns(program: Program, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake")
    assert program("--at-once", 2) == 0
    began = capsys.readouterr().out.splitlines()[:4]
    assert [line[-17:] for line in began] == ["training on GPU 0", "training on GPU 1"] * 2, "four at once"
    logs = [
        tmp_path / "runs" / "small" / peer / f"seed_{seed}" / "console.log"
        for seed in (1, 2)
        for peer in ("dense", "window")
    ]
    assert [log.read_text() for log in logs] == ["began on 0\n", "began on 1\n"] * 2
    assert program("--gpus", 0, 0) == 2
    assert "--gpus 0 0: one is named twice" in capsys.readouterr().err


REAL = """
model: {layers: 2, hidden: 32, heads: 4, kv_groups: 2, head_width: 8, ffn_hidden: 64, vocabulary: 512}
maha: {backend: eager}
data: {sequence_tokens: 64, validation_frac: 0.1}
schedule: {kind: constant, peak: 1.0e-2, warmup_steps: 2}
train: {steps: 400, global_batch_samples: 4, micro_batch_samples: 2, precision: fp32, validation_samples: 5,
        log_interval_steps: 1}
peers:
  - {name: dense, model: {attention: [dense]}}
  - {name: maha, maha: {ratio: 2, windows: [8, 6, 16]}}
reference: dense
seeds: [1]
evaluation: {samples: 3, needles: 2, queries: 4}
"""


@pytest.mark.full
def test_real_runs_are_stopped_resumed_and_evaluated(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """SIGTERM once a run has steps; then the same command ends it."""
    (tmp_path / "real.yaml").write_text(REAL)
    places = ("--folder", tmp_path / "runs", "--results", tmp_path / "results")
    data = ("--data", corpus / "text_text_document", "--tokenizer", corpus / "tokenizer.model")
    words = (SCRIPT, "--study", tmp_path / "real.yaml", *places, *data, "--at-once", 2)
    run = tmp_path / "runs" / "real" / "dense" / "seed_1"
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        wait_for_step(process, run, 1)
        process.terminate()
        assert "dense seed 1: stopped while training" in process.communicate()[0]
    assert process.returncode == 75
    done = read_rows(run / METRICS)[-1]["step"]
    tool(*words)
    assert f"continuing after step {done}" in (run / "console.log").read_text()
    (path,) = (tmp_path / "results").glob("study_real_*.json")
    record = json.loads(path.read_text())
    for name in ("dense", "maha"):
        found = record["runs"][f"{name} seed 1"]
        assert found["trained"]
        assert [row["step"] for row in found["rows"] if "loss_nats" in row] == list(range(1, 401))
        assert found["evaluation"]["needle"]
        assert len(found["sessions"]) == 2
    assert "## Associative recall" in path.with_suffix(".md").read_text()

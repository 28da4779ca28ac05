"""tools/benchmark_training.py: every model is judged, and a missed verdict is the exit code."""

import json
import runpy
import sys

import pytest

from maha_megatron.train import trials
from tests.support.runs import ROOT, tool

SCRIPT = "tools/benchmark_training.py"
SMALL = ("--size", "10m", "--cluster", "cpu", "--steps", "5")


def metrics(losses, norm=1.0):
    steady = {"tokens_per_s": 100.0, "step_s": 1.0, "tflops_per_device": 1.0, "memory_bytes": 2.0**30}
    rows = [
        {"step": step, "loss_nats": loss, "gradient_norm": norm} | steady for step, loss in enumerate(losses, start=1)
    ]
    return [*rows, {"step": len(losses), "validation_loss_nats": 3.0}]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Run the program on models whose rows are given: its exit code and its table by model."""

    def run(**rows_of_model):
        monkeypatch.setattr(trials, "run_side_by_side", lambda *_, **__: iter(rows_of_model.values()))
        places = ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", [SCRIPT, "--models", *rows_of_model, *SMALL, *places])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
        (data,) = (tmp_path / "results").glob("*.json")
        assert list(json.loads(data.read_text())["runs"]) == list(rows_of_model)
        lines = data.with_suffix(".md").read_text().splitlines()
        header, _, *table = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|")
        return ended.value.code, {row[0]: dict(zip(header, row, strict=True)) for row in table}

    return run


def test_models_that_do_well(benchmark):
    code, table = benchmark(maha=metrics([5, 6, 6, 6, 4]), dense=metrics([5, 4], norm=2.5))
    assert code == 0
    for row in table.values():
        assert [row[name] for name in ("loss falls", "no NaN", "norm within 3 x")] == ["met"] * 3
    assert table["dense"]["against the first"] == "2.5"


@pytest.mark.parametrize(
    ("second", "verdicts"),
    [
        (metrics([5, 4, 4, 4, 5.5]), ["MISSED", "met", "met"]),
        (metrics([5, 4], norm=3.5), ["met", "met", "MISSED"]),
        (metrics([5, 4], norm=float("inf")), ["met", "MISSED", "MISSED"]),
    ],
)
def test_one_that_does_not_is_named_and_ends_with_1(benchmark, second, verdicts):
    code, table = benchmark(maha=metrics([5, 4]), dense=second)
    assert code == 1
    assert "MISSED" not in table["maha"].values()
    assert list(table["dense"].values())[-3:] == verdicts


def test_what_cannot_run_is_one_line_and_ends_with_2(tmp_path):
    output = tool(SCRIPT, "--models", "nosuch", *SMALL, "--folder", tmp_path, "--results", tmp_path, expected=2)
    assert "there is no fragment 'model/nosuch'" in output
    assert "Traceback" not in output


def test_the_help_says_what_is_judged():
    printed = tool(SCRIPT, "--help")
    assert "MISSED" in printed
    assert "exit codes:" in printed

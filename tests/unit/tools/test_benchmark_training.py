"""tools/benchmark_training.py: every model is judged, and a missed verdict is the exit code."""

import json
import runpy
import sys

import pytest

from maha_megatron.train import apart, llama_peer, step_profile, trials
from maha_megatron.train.step_profile import StepProfile
from tests.support.runs import ROOT, forked

SCRIPT = "tools/benchmark_training.py"
SMALL = ("--size", "10m", "--cluster", "cpu", "--steps", "5")


def metrics(losses, norm=1.0):
    steady = {"tokens_per_s": 100.0, "step_s": 1.0, "tflops_per_device": 1.0, "memory_bytes": 2.0**30}
    rows = [
        {"step": step, "loss_nats": loss, "gradient_norm": norm} | steady for step, loss in enumerate(losses, start=1)
    ]
    return [*rows, {"step": len(losses), "validation_loss_nats": 3.0}]


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Run the program on rows that are given, trial by trial: its exit code, and the lines of its Markdown."""

    def run(rows, *arguments):
        planned = []

        def side_by_side(trials, *_, **__):
            planned.extend(trials)
            return iter(rows)

        monkeypatch.setattr(trials, "run_side_by_side", side_by_side)
        monkeypatch.setattr(apart, "in_a_process", lambda function, *given: function(*given))
        places = ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments), *SMALL, *places])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
        (data,) = (tmp_path / "results").glob("*.json")
        record = json.loads(data.read_text())
        assert list(record["runs"]) == [trial.name for trial in planned]
        return ended.value.code, data.with_suffix(".md").read_text(), record, planned

    return run


@pytest.fixture
def benchmark(program):
    """The exit code and the table by model, of models whose rows are given."""

    def run(**rows_of_model):
        code, text, record, _ = program(rows_of_model.values(), "--models", *rows_of_model)
        assert list(record["runs"]) == list(rows_of_model)
        return code, table_of(text)

    return run


def table_of(text):
    header, _, *table = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"
    )
    return {row[0]: dict(zip(header, row, strict=True)) for row in table}


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
    output = forked(SCRIPT, "--models", "nosuch", *SMALL, "--folder", tmp_path, "--results", tmp_path, expected=2)
    assert "there is no fragment 'model/nosuch'" in output
    assert "Traceback" not in output


def test_the_help_says_what_is_judged():
    printed = forked(SCRIPT, "--help")
    assert "MISSED" in printed
    assert "exit codes:" in printed


LENGTHS = ("--models", "dense", "maha", "window_hybrid", "--lengths", 512, 1024, "--call-tokens", 1024)
COMPARABLE = ("--set", "data.document_bounds=false", "--set", "train.recompute=none")
GOOD = metrics([5, 4])


def test_every_model_runs_at_every_length(program):
    code, text, _, planned = program([GOOD] * 6, *LENGTHS, "--set", "train.validation_samples=7")
    assert code == 0
    assert [trial.name for trial in planned] == [
        f"{model}_{length}" for length in (512, 1024) for model in ("dense", "maha", "window_hybrid")
    ]
    settings = {trial.name: set(trial.settings) for trial in planned}
    short = {"data.sequence_tokens=512", "train.micro_batch_samples=2", "train.global_batch_samples=2"}
    assert short <= settings["maha_512"]
    assert "maha.windows=[256]" in settings["window_hybrid_512"], "as many keys as (128, 128) of the default"
    assert not any(word.startswith("maha.windows") for word in settings["maha_512"])
    assert "train.validation_samples=7" in settings["maha_512"]
    assert "train.validation_samples=2" not in settings["maha_512"]
    assert "| maha data.sequence_tokens=1024 | 100 |" in text
    assert "| maha | 1024 | 100 | - | - | - |" in text


@pytest.mark.parametrize(("llama_s", "code", "ratio"), [(9.3, 0, "1.00"), (9.1, 1, "withheld")])
def test_ratios_need_a_calibration(program, monkeypatch, llama_s, code, ratio):
    """Ours makes 100 tokens/s; Llama 1024 in the median of the steps behind the first fifth."""
    monkeypatch.setattr(llama_peer, "llama_step_s", lambda config, steps: [99.0, *[llama_s] * (steps - 1)])
    found, text, record, _ = program([GOOD] * 6, *LENGTHS, *COMPARABLE, "--calibrate")
    assert found == code
    assert f"| maha | 512 | 100 | {ratio} | - | - |" in text
    assert record["llama_tokens_per_s"]["1024"] == pytest.approx(1024 / llama_s)
    assert ("no ratio against dense is shown there" in text) == bool(code)


def test_a_profile_is_of_every_run(program, monkeypatch):
    seen = []

    def profiled(config):
        seen.append((config.data.sequence_tokens, config.model.attention))
        return StepProfile(step_s=0.25, device_s=0.1, attention_frac=0.25, kernels=[("gemm", 2.0, 0.05)])

    monkeypatch.setattr(step_profile, "profile_step", profiled)
    _, text, record, _ = program([GOOD] * 2, "--models", "dense", "maha", "--lengths", 512, "--profile")
    assert seen == [(512, ("dense",)), (512, ("maha",))]
    assert "| maha | 512 | 100 | - | - | 25 % |" in text
    assert "| `gemm` | 2 | 50.00 | 50.0 |" in text
    assert record["profiles"]["dense 512"]["attention_frac"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate", "llama"), "--calibrate llama: --models has no such model; add it"),
        (("--call-tokens", "1024"), "--call-tokens has no effect without --lengths"),
        (("--lengths", "512", "--set", "data.sequence_tokens=512"), "--lengths says data.sequence_tokens"),
        (("--calibrate",), "a calibration against Llama needs data.document_bounds=false"),
        (("--profile", "--processes", "2"), "--profile is for one process"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr(trials, "run_side_by_side", None)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--models", "dense", *SMALL, "--folder", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err

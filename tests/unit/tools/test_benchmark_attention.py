"""tools/benchmark_attention.py: the table of a small run, and no figure where the gate is red."""

import dataclasses
import itertools
import json
import runpy
import sys

import pytest
import torch

from maha_megatron.attention import dispatch
from maha_megatron.attention.aggregation import quadratic
from maha_megatron.attention.benchmark import decode, gate, measure
from maha_megatron.attention.benchmark.subjects import Setting
from maha_megatron.attention.spec import MahaSpec
from tests.support.everyday import everyday
from tests.support.runs import ROOT, forked, tool

SCRIPT = "tools/benchmark_attention.py"
SMALL = ("--heads", "2", "--width", "8", "--lengths", "64", "128", "--dense-limit", "64", "--repeats", "3")


@pytest.mark.full
def test_a_small_run_prints_and_keeps_everything(tmp_path):
    output = tool(SCRIPT, *SMALL, "--dtype", "fp32", "--kv-groups", "1", "--threads", "1", "--results", tmp_path)
    (path,) = tmp_path.glob("benchmark_attention_*.json")
    record = json.loads(path.read_text())
    assert [row["rows"] for row in record["rows"]] == [64, 128]
    for row in record["rows"]:
        subjects = {"maha", "window"} | ({"sdpa"} if row["rows"] <= 64 else set())
        assert set(row["median_s"]) == set(row["times_s"]) == subjects
        assert all(len(times) == 3 and min(times) > 0 for times in row["times_s"].values())
        assert sorted(row["times_s"]["maha"])[1] == row["median_s"]["maha"]
        assert set(row["peak_bytes"]) in (subjects, set())
    assert record["rows"][0]["windows"] == [64]
    assert all(verdict["errors"] for verdict in record["gate"].values())
    assert "benchmark_attention.py" in record["command"]
    text = path.with_suffix(".md").read_text()
    assert "dense / maha" in text
    assert text in output or "| fp32 | 128 |" in output
    ratio = record["rows"][0]["median_s"]["sdpa"] / record["rows"][0]["median_s"]["maha"]
    assert f"{ratio:.2f} x" in text
    assert "time over that of half the length" in text


@pytest.fixture
def main():
    return runpy.run_path(str(ROOT / SCRIPT))["main"]


def broken(attend):
    """Scale attention whose gradient of q is 1 % too large."""

    def wrong(q_tnd, *rest):
        return attend(1.01 * q_tnd - 0.01 * q_tnd.detach(), *rest)

    return wrong


@pytest.fixture
def broken_eager(monkeypatch):
    eager = dispatch._BACKENDS["eager"]
    monkeypatch.setitem(dispatch._BACKENDS, "eager", dataclasses.replace(eager, attend=broken(eager.attend)))
    dispatch.backend.cache_clear()
    yield
    dispatch.backend.cache_clear()


def test_a_red_gate_prints_no_figure(broken_eager, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *SMALL, "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "eager is wrong in fp32, so no speed is shown: gradient of q" in printed.err
    assert list(tmp_path.iterdir()) == []


OPERATORS = {
    "default": {},
    "nash": {"aggregation": "nash", "coupling": "gram"},
    "pooled": {"queries": "pooled", "convolution": True, "key_map": True},
    "sparse": {"regularizer": "quadratic", "downsampling": "conv", "lse_utility": False},
}


def verdict_at(rows, dtype=torch.float32, ratio=4, **options):
    operator = MahaSpec(**({"ratio": ratio, "windows": (), "convolution": False} | options))
    return gate.check(Setting(operator=operator, heads=4, groups=2, width=16), dtype, [64, rows])


@pytest.mark.parametrize(
    ("name", "dtype"),
    everyday(
        itertools.product(OPERATORS, (torch.float32, torch.bfloat16)),
        lambda name, dtype: (name, dtype) == ("default", torch.float32),
    ),
)
def test_the_gate_is_green_for_every_kind_of_operator(name, dtype):
    """At six scales, as at 64 k, and so beside them at three of the operator's own ratio."""
    verdict = verdict_at(65536, dtype, **OPERATORS[name])
    assert verdict.green, str(verdict)
    assert {"out", "out, 6 scales"} <= verdict.bounds.keys()


@pytest.mark.parametrize(("ratio", "rows", "names"), [(4, 64, {"out"}), (8, 8192, {"out"}), (2, 1024, {"out", "4"})])
def test_the_gate_has_as_many_scales_as_what_is_measured(ratio, rows, names):
    verdict = verdict_at(rows, ratio=ratio)
    assert verdict.green, str(verdict)
    assert {name.removeprefix("out, ").removesuffix(" scales") for name in verdict.bounds if name[:3] == "out"} == names


@pytest.mark.full
def test_a_solver_that_is_wrong_for_many_scales_only_is_red(monkeypatch):
    """The path that is followed beyond four scales stops at one scale, and says that it is at the end."""
    honest = quadratic.follow_path

    def hasty(programs, target, steps):
        solution = honest(programs, target, steps)
        first = solution.weight_lp.argmax(0)
        weight_lp = torch.nn.functional.one_hot(first, len(solution.weight_lp)).T.to(solution.weight_lp.dtype)
        return dataclasses.replace(solution, weight_lp=weight_lp, scaling_lp=weight_lp)

    options = {"aggregation": "nash", "coupling": "gram", "regularizer": "quadratic"}
    assert verdict_at(65536, **options).green
    monkeypatch.setattr(quadratic, "follow_path", hasty)
    assert verdict_at(4096, ratio=8, **options).green, "three scales try every support"
    verdict = verdict_at(65536, **options)
    assert not verdict.green
    assert str(verdict).startswith("out, 6 scales ")


def test_a_nan_is_red():
    assert not gate.Verdict(errors={"out": float("nan")}, bounds={"out": 1.0}).green


def test_too_few_repeats_are_refused():
    assert "needs --repeats >= 3" in forked(SCRIPT, "--repeats", 1, expected=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heads 3 --kv-groups 2", "1024 tokens: --kv-groups = 2 does not divide --heads = 3"),
        ("--kv-groups 0", "1024 tokens: --kv-groups: must be at least 1"),
        ("--width 7", "1024 tokens: --width = 7 is odd"),
        ("--lengths 4096 0", "0 tokens: --lengths: must be at least 1"),
        ("--ratio 2 --lengths 65536", "65536 tokens: --windows has 10 scales, at most 8 are possible; raise --ratio"),
        ("--ratio 2 --lengths 65536 --coupling gram", "65536 tokens: --windows has 10 scales"),
        ("--windows 0 5", "--windows[0] = 0: scale 0 leaves holes below 3 = --ratio - 1; use at least 3"),
        ("--windows 4 4 4 --lengths 15", "15 tokens: --windows: a block of scale 2 has 16 rows"),
        (
            "--aggregation mean --coupling gram --regularizer quadratic --no-lse",
            "--regularizer, --coupling, --no-lse: no effect with --aggregation: mean",
        ),
        ("--aggregation nash --lengths 64 4096", "64 tokens: --aggregation: no effect with"),
        ("--windows 9 --downsampling max --key-map", "--downsampling, --key-map: no effect with"),
        ("--queries pooled --rope-unit token", "--rope-unit: token does not go with --queries: pooled"),
    ],
)
def test_what_a_configuration_would_refuse_is_one_line(main, arguments, message, capsys):
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "maha." not in line


@pytest.fixture
def measured(monkeypatch):
    """Times and memory that nobody took, by subject; the gate is not looked at."""
    seconds = {"maha": 1.0, "window": 1.0, "sdpa": 1.0}
    monkeypatch.setattr(gate, "check", lambda *_: gate.Verdict(errors={"out": 0.0}, bounds={"out": 1.0}))
    monkeypatch.setattr(measure, "times_s", lambda *_, **__: {name: [taken] for name, taken in seconds.items()})
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: 1)
    return seconds


def test_a_bounded_sight_may_be_measured(main, measured, tmp_path):
    """A rule of every configuration that has maha.full_reach, but none here."""
    arguments = ["--windows", "5", "4", "--lengths", "128", "--dtype", "fp32", "--results", str(tmp_path)]
    assert main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["goals"] == []


@pytest.mark.parametrize(("seconds", "code", "word"), [(0.5, 0, "met"), (3.0, 1, "MISSED")])
def test_goals_decide_the_exit_code_in_their_setting(main, measured, seconds, code, word, capsys, tmp_path):
    """Against dense attention of one second."""
    measured["maha"] = seconds
    arguments = ["--lengths", "4096", "--dtype", "fp32", "--results", str(tmp_path)]
    assert main(arguments) == code
    printed = capsys.readouterr().out
    assert "| goal (8 heads x 64, the default operator without convolution, on a CPU) |" in printed
    assert f"| fp32, 4096 tokens: speed-up >= 1.0 | {1 / seconds:.2f} | {word} |" in printed
    (path,) = tmp_path.glob("*.json")
    assert [goal["met"] for goal in json.loads(path.read_text())["goals"]] == [not code]
    for other in (["--convolution"], ["--heads", "4"], ["--lengths", "2048"]):
        assert main([*arguments, *other]) == 0
        assert "| goal" not in capsys.readouterr().out


def test_a_token_is_measured_and_kept(main, tmp_path, capsys):
    small = ["--heads", "4", "--kv-groups", "2", "--width", "16", "--dtype", "fp32", "--repeats", "3"]
    arguments = ["--decode", *small, "--streams", "1", "2", "--lengths", "64", "1024", "--dense-limit", "64"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("benchmark_attention_decode_*.json")
    record = json.loads(path.read_text())
    assert [(row["streams"], row["context"]) for row in record["rows"]] == [(1, 64), (1, 1024), (2, 64), (2, 1024)]
    for row in record["rows"]:
        cached = set(row["times"]) | set(row["unavailable"])
        assert cached == ({"maha", "cudnn", "flash", "efficient"} if row["context"] == 64 else {"maha"})
    assert record["goals"] == []
    printed = capsys.readouterr()
    assert "eager against naive, a token, fp32: equal" in printed.err
    assert "| fp32 | 1024 | 2 | " in printed.out
    assert "not measured: cudnn: RuntimeError" in printed.out


def test_a_wrong_token_is_red(main, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(decode, "check_step", lambda *_: gate.Verdict(errors={"out": 2.0}, bounds={"out": 1.0}))
    assert main(["--decode", "--dtype", "fp32", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: eager is wrong in fp32, so no speed is shown: out 2 > 1" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--streams 2", "--streams has no effect without --decode"),
        ("--decode --seconds 3", "--seconds has no effect with --decode"),
        ("--device cuda --decode --preset", "--preset has no effect with --decode"),
    ],
)
def test_options_of_the_other_measurement_are_refused(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_pooled_queries_cannot_decode(main, capsys):
    assert main(["--decode", "--queries", "pooled", "--dtype", "fp32", "--lengths", "1024"]) == 2
    assert "pooled queries cannot run in pieces" in capsys.readouterr().err

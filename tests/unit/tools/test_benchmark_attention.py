"""tools/benchmark_attention.py: the table of a small run, and no figure where the gate is red."""

import dataclasses
import json
import runpy
import sys

import pytest
import torch

from maha_megatron.attention import dispatch
from maha_megatron.attention.benchmark import gate
from maha_megatron.attention.benchmark.subjects import Setting
from maha_megatron.attention.spec import MahaSpec
from tests.support.runs import ROOT, tool

SCRIPT = "tools/benchmark_attention.py"
SMALL = ("--heads", "2", "--width", "8", "--lengths", "64", "128", "256", "--dense-limit", "128", "--repeats", "3")


def test_a_small_run_prints_and_keeps_everything(tmp_path):
    output = tool(SCRIPT, *SMALL, "--dtype", "fp32", "--kv-groups", "1", "--threads", "1", "--results", tmp_path)
    (path,) = tmp_path.glob("benchmark_attention_*.json")
    record = json.loads(path.read_text())
    assert [row["rows"] for row in record["rows"]] == [64, 128, 256]
    for row in record["rows"]:
        subjects = {"maha", "window"} | ({"sdpa"} if row["rows"] <= 128 else set())
        assert set(row["median_s"]) == set(row["times_s"]) == subjects
        assert all(len(times) == 3 and min(times) > 0 for times in row["times_s"].values())
        assert sorted(row["times_s"]["maha"])[1] == row["median_s"]["maha"]
        assert set(row["peak_bytes"]) in (subjects, set())
    assert record["rows"][0]["windows"] == [64]
    assert all(verdict["errors"] for verdict in record["gate"].values())
    assert "benchmark_attention.py" in record["command"]
    text = path.with_suffix(".md").read_text()
    assert "dense / maha" in text
    assert text in output or "| fp32 | 256 |" in output
    ratio = record["rows"][1]["median_s"]["sdpa"] / record["rows"][1]["median_s"]["maha"]
    assert f"{ratio:.2f} x" in text
    assert "time over that of half the length" in text


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_gate_is_green_for_every_kind_of_operator(name, dtype):
    operator = MahaSpec(**({"ratio": 4, "windows": (), "convolution": False} | OPERATORS[name]))
    verdict = gate.check(Setting(operator=operator, heads=4, groups=2, width=16), dtype)
    assert verdict.green, str(verdict)


def test_a_nan_is_red():
    assert not gate.Verdict(errors={"out": float("nan")}, bounds={"out": 1.0}).green


def test_options_that_do_not_fit_are_one_line():
    for arguments in (("--heads", 3, "--kv-groups", 2), ("--width", 7), ("--repeats", 1)):
        output = tool(SCRIPT, *arguments, expected=2)
        assert "Traceback" not in output

"""tools/benchmark_attention.py --device cuda, its device and its presets replaced by what a CPU has."""

import dataclasses
import json
import runpy

import pytest

from maha_megatron.attention.benchmark import cases, gate, kernel_figures
from maha_megatron.attention.benchmark.subjects import Setting
from maha_megatron.attention.benchmark.turns import HostClock, Memory
from maha_megatron.attention.benchmark.work import Card
from maha_megatron.attention.spec import MahaSpec
from tests.support.runs import ROOT

SCRIPT = "tools/benchmark_attention.py"
SMALL = Setting(
    operator=MahaSpec(ratio=4, windows=(), convolution=False),
    heads=2,
    groups=2,
    width=16,
    windows=(8, 6),
    call_rows=128,
)
GPU = ("--device", "cuda", "--backend", "eager", "--processes", "0", "--repeats", "3")
GREEN, RED = (gate.Verdict(errors={"out": error}, bounds={"out": 1.0}) for error in (0.5, 2.0))


class WeighingClock(HostClock):
    def card(self):
        return Card(bytes_per_s=3e12, flops_per_s=7e14)

    def memory(self, run):
        return Memory(kept_bytes=2**20, peak_bytes=3 * 2**20)


@pytest.fixture
def main(monkeypatch):
    settings = {"kv16": SMALL, "packed": dataclasses.replace(SMALL, mixed=True)}
    monkeypatch.setattr(cases, "SETTINGS", settings)
    monkeypatch.setattr(cases, "GPU_SETTING", SMALL)
    main = runpy.run_path(str(ROOT / SCRIPT))["main"]
    monkeypatch.setitem(main.__globals__, "CudaClock", WeighingClock)
    return main


def test_a_small_run_prints_and_keeps_everything(main, tmp_path, capsys):
    arguments = [*GPU, "--dtype", "fp32", "--preset", "kv16", "packed", "general", "--lengths", "64", "32"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    (data,), (text,), (plot,) = (list(tmp_path.glob(f"*.{ending}")) for ending in ("json", "md", "png"))
    record = json.loads(data.read_text())
    assert [(row["case"], row["length"]) for row in record["rows"]] == [
        (case, length) for case in ("kv16", "packed", "general") for length in (32, 64)
    ]
    for row in record["rows"]:
        wanted = set(cases.VARIANTS) if row["case"] == "general" else {"maha", "window"}
        assert wanted <= set(row["median_s"]) == set(row["times"])
        assert all(len(times) == 3 for times in row["times"].values())
        assert set(row["memory"]) == set(row["median_s"])
    assert record["goals"] == []
    assert set(record["gate"]) >= {"kv16, maha, fp32", "general, nash, fp32"}
    assert record["card"] == {"bytes_per_s": 3e12, "flops_per_s": 7e14}
    shown = text.read_text()
    assert all(line in printed.out for line in shown.splitlines() if line[:1] == "|")
    assert f"![benchmark_attention]({plot.name})" in shown
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "3.00 TB/s" in shown
    assert "- not measured: varlen at 32 fp32, 64 fp32: " in shown
    assert "| fp32 | 64 | nash, gram |" in shown
    assert "eager against naive, kv16, maha, fp32: equal" in printed.err


def test_the_tables_say_what_was_found(main):
    report = main.__globals__["kernel_report"].report
    memory = {
        "maha": Memory(kept_bytes=2**20, peak_bytes=3 * 2**20),
        "cudnn": Memory(kept_bytes=2**20, peak_bytes=2**20),
    }
    seconds = {"maha": (1e-3, 2e-3), "cudnn": (3e-3, 10e-3), "flash": (4e-3, 9e-3)}
    row = kernel_figures.KernelRow(
        case="kv16",
        setting=SMALL,
        dtype="bf16",
        length=4096,
        median_s={
            name: dict(zip(kernel_figures.PARTS, (forward, both - forward, both), strict=True))
            for name, (forward, both) in seconds.items()
        },
        memory=memory,
        unavailable={"flex": "RuntimeError: no compiler"},
        work=kernel_figures.Work(
            visible_keys=100.0, loaded_keys=150.0, forward_flops=2e11, backward_flops=5e11, forward_bytes=1e9,
            backward_bytes=3e9, forward_floor_s=5e-4, backward_floor_s=2.5e-4,
        ),
    )  # fmt: skip
    text = report([row], [], None)
    assert "| bf16 | 4096 | 1.000 / 1.000 / 2.000 | 3.000 / 7.000 / 10.000 | 4.000 / 5.000 / 9.000 |" in text
    assert "| 3.00 (cudnn) | 4.50 (flash) | 1.00 MiB | - | 3.00 MiB | - |" in text
    assert "| bf16 | 4096 | 100 | 150 | 200 (300) | 1000 | 500 (750) | 3000 | 0.500 / 0.250 | 0.50 / 0.25 |" in text
    assert "- not measured: flex at 4096 bf16: RuntimeError: no compiler" in text


def test_a_red_gate_prints_no_figure(main, monkeypatch, capsys, tmp_path):
    verdicts = {"kv16, maha, bf16": GREEN, "kv8, maha, bf16": RED}
    monkeypatch.setitem(main.__globals__, "check_and_compile", lambda *_: verdicts)
    assert main([*GPU, "--preset", "kv16", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: eager is wrong, so no speed is shown: kv8, maha, bf16: out 2 > 1" in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dense_s", "code", "word"), [(1e9, 0, "met"), (1e-9, 1, "MISSED")])
def test_goals_decide_the_exit_code(main, monkeypatch, dense_s, code, word, capsys, tmp_path):
    """Of a dense side whose times nobody took."""
    monkeypatch.setattr(kernel_figures, "GOAL_SETTING", SMALL)
    monkeypatch.setattr(kernel_figures, "GOAL_DTYPE", "fp32")
    monkeypatch.setitem(main.__globals__, "check_and_compile", lambda *_: {"kv16": GREEN})
    honest = main.__globals__["measured_kernels"]

    def with_dense(*arguments, **options):
        row, times = honest(*arguments, **options)
        row.median_s["cudnn"] = dict.fromkeys(kernel_figures.PARTS, dense_s)
        row.memory["cudnn"] = row.memory["maha"]
        row.median_s.pop("flash", None)
        return dataclasses.replace(row, length=4096), times

    monkeypatch.setitem(main.__globals__, "measured_kernels", with_dense)
    arguments = [*GPU, "--dtype", "fp32", "--preset", "kv16", "--lengths", "64", "--results", str(tmp_path)]
    assert main(arguments) == code
    printed = capsys.readouterr().out
    assert f"| goal ({kernel_figures.GOAL_SETTING_NAME}) |" in printed
    assert "| 4096 tokens: forward >= 2.0 x the best dense |" in printed
    line = next(line for line in printed.splitlines() if "forward+backward >= 2.0" in line)
    assert line.endswith(f"| {word} |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--preset kv16", "--preset has no effect with --device cpu"),
        ("--device cuda --threads 2", "--threads has no effect with --device cuda"),
        ("--device cuda --preset --width 64", "--preset says --width itself"),
        ("--flex", "--flex has no effect with --device cpu"),
        ("--device cuda --preset kv17", "invalid choice: 'kv17'"),
        ("--device cuda --repeats 2", "needs --repeats >= 3"),
    ],
)
def test_options_without_effect_are_refused(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_options_say_a_case_of_their_own(main):
    options = main.__globals__["parse_arguments"](["--device", "cuda", "--lengths", "4096", "--kv-groups", "8"])
    (case,) = main.__globals__["cases_of"](options)
    assert (case.lengths, case.setting.groups, case.setting.call_rows) == ((4096,), 8, cases.CALL_ROWS)
    assert (case.setting.heads, case.setting.width, case.setting.backend) == (16, 128, "triton")


def test_the_goals_setting_is_what_the_options_say_by_default(monkeypatch):
    main = runpy.run_path(str(ROOT / SCRIPT))["main"]
    options = main.__globals__["parse_arguments"](["--device", "cuda"])
    (case,) = main.__globals__["cases_of"](options)
    assert case.setting == kernel_figures.GOAL_SETTING
    assert tuple(options.dtype) == (kernel_figures.GOAL_DTYPE,)
    assert case.lengths == cases.LENGTHS


def test_without_a_gpu_it_is_one_line(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    main = runpy.run_path(str(ROOT / SCRIPT))["main"]
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: torch finds no CUDA device")

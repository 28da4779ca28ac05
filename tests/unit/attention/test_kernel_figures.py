"""The GPU benchmark's loop and what is judged, on a CPU: turns, subjects that do not run, ratios and goals."""

import dataclasses

import pytest
import torch

from maha_megatron.attention.benchmark import ahead, cases, kernel_figures
from maha_megatron.attention.benchmark.cases import GENERAL, SETTINGS, case_of, general_case
from maha_megatron.attention.benchmark.kernel_figures import BACKWARD, BOTH, FORWARD, KernelRow, goals, medians
from maha_megatron.attention.benchmark.measure_kernels import measured
from maha_megatron.attention.benchmark.peers import subjects_of
from maha_megatron.attention.benchmark.subjects import Setting, draw_inputs, maha, sdpa
from maha_megatron.attention.benchmark.turns import CudaClock, HostClock, Memory, Times, start, take_turns
from maha_megatron.attention.spec import MahaSpec
from maha_megatron.errors import ConfigError, MahaError

SMALL = Setting(
    operator=MahaSpec(ratio=4, windows=(), convolution=False),
    heads=2,
    groups=2,
    width=16,
    windows=(8, 6),
    call_rows=128,
)


def one_that_fails(*_):
    raise RuntimeError("no kernel for this\nand a second line")


def test_a_subject_that_does_not_run_is_named_and_the_others_go_on():
    inputs = draw_inputs(SMALL, 64, torch.float32)
    subjects = {"maha": maha, "sdpa": sdpa, "absent": one_that_fails}
    ready, unavailable = start(subjects, SMALL, inputs, HostClock(), "maha")
    assert set(ready) == {"maha", "sdpa"}
    assert unavailable == {"absent": "RuntimeError: no kernel for this"}
    with pytest.raises(MahaError, match="absent does not run on 128 rows: RuntimeError: no kernel for this"):
        start(subjects, SMALL, inputs, HostClock(), "absent")


class CountingClock:
    """Times of 1, 2, 3 ... seconds in the order of the passes, which really run."""

    def __init__(self):
        self.order, self.hosts = [], []

    def timed(self, run, host_s):
        run()
        self.order.append(run)
        self.hosts.append(host_s)
        number = float(len(self.order))
        return Times(forward_s=number, backward_s=2 * number, host_s=10 * number)

    def memory(self, run):
        return Memory(kept_bytes=5, peak_bytes=7)


def test_subjects_take_turns_and_each_has_its_own_host_time():
    inputs, clock = draw_inputs(SMALL, 64, torch.float32), CountingClock()
    passes = {"maha": maha(SMALL, inputs), "sdpa": sdpa(SMALL, inputs)}
    times = take_turns(passes, clock, turns=4, limit_s=60)
    assert [list(passes.values()).index(run) for run in clock.order] == [0, 1] * 5
    assert clock.hosts[2:] == [10.0, 20.0] * 4
    assert [one.forward_s for one in times["maha"]] == [3.0, 5.0, 7.0, 9.0]
    assert medians(times)["sdpa"] == {FORWARD: 7.0, BACKWARD: 14.0, BOTH: 21.0}
    assert len(take_turns(passes, clock, turns=50, limit_s=0.0)["maha"]) == 3


def test_a_case_is_measured_with_what_this_machine_has():
    """No CUDA here: dense kernels are forced, and either run on the CPU too or are named."""
    case = dataclasses.replace(
        case_of(SMALL, "small", [64]), subjects={"maha": maha, "sdpa": sdpa, "x": one_that_fails}
    )
    row, times = measured(case, 64, "fp32", HostClock(), None, turns=3, limit_s=60)
    assert set(row.median_s) == set(times) == {"maha", "sdpa"}
    assert set(row.unavailable) == {"x"}
    assert len(times["maha"]) == 3
    assert (row.memory, row.work) == ({}, None)
    sums = sorted(one["forward_s"] + one["backward_s"] for one in times["maha"])
    assert row.median_s["maha"][BOTH] == sums[1]


def test_general_operators_run_on_the_same_inputs():
    case = general_case(SMALL, [64])
    row, _ = measured(case, 64, "fp32", HostClock(), None, turns=3, limit_s=60)
    assert set(row.median_s) == set(cases.VARIANTS)
    assert row.unavailable == {}


@pytest.mark.parametrize("mixed", [False, True])
def test_every_subject_computes_dense_attention_or_is_named(mixed):
    """Forced kernels that a CPU has (flash) give what torch's own choice gives."""
    setting = dataclasses.replace(SMALL, mixed=mixed)
    inputs = draw_inputs(setting, 64, torch.float32)
    wanted = {"maha", "window", "flash_window"} | ({"varlen"} if mixed else {"cudnn", "flash"})
    assert set(subjects_of(setting)) == wanted
    ready, unavailable = start(subjects_of(setting), setting, inputs, HostClock(), "maha")
    assert set(ready) | set(unavailable) == wanted
    assert {"maha", "window"} <= set(ready)
    if "flash" in ready:
        expected = sdpa(setting, inputs).results()
        for name, result in ready["flash"].results().items():
            torch.testing.assert_close(result, expected[name])


def test_the_gate_is_asked_once_for_each_operator(monkeypatch):
    asked = []
    monkeypatch.setattr(ahead.gate, "check", lambda *arguments: asked.append(arguments) or "verdict")
    every = [cases.preset_case(name) for name in cases.CASES]
    verdicts = ahead.check_and_compile(every, ["bf16"], 0)
    assert len(asked) == len(verdicts) == len({(setting, lengths) for setting, _, lengths in asked})
    assert {"kv16, maha, bf16", "kv8, maha, bf16", "d64, maha, bf16", "general, nash, bf16"} <= set(verdicts)
    assert not any(words.startswith("packed") for words in verdicts)
    compiled = list(ahead._compilations(every, ["bf16"]))
    # mixed documents need no kernels of their own, nor does the general case's default operator
    assert len(set(compiled)) == len(compiled) == 3 * len(cases.LENGTHS) + 5 * len(cases.GENERAL_LENGTHS)
    assert sum(with_window for *_, with_window in compiled) == 3 * len(cases.LENGTHS)


def test_other_processes_check_and_compile(monkeypatch):
    """What a process compiles, it runs: on rows of one call, whatever the length."""
    case = case_of(SMALL, "small", [64, 256])
    verdicts = ahead.check_and_compile([case], ["fp32"], 1)
    assert list(verdicts) == ["small, maha, fp32"]
    assert all(verdict.green for verdict in verdicts.values())
    ran = []
    monkeypatch.setattr(ahead, "maha", lambda setting, inputs: lambda: ran.append(("maha", len(inputs.q_tnd))))
    monkeypatch.setattr(ahead, "window", lambda setting, inputs: lambda: ran.append(("window", inputs.length)))
    for task in ahead._compilations([case], ["fp32"]):
        ahead._compile(*task)
    assert ran == [("maha", 128), ("window", 256), ("maha", 128), ("window", 64)]


def test_without_a_gpu_the_cuda_clock_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="no CUDA device"):
        CudaClock()


def kernel_row(length, ours, case="kv16", memory=None, setting=None, dtype="bf16", **others):
    """Seconds of forward and of both by subject."""
    seconds = {"maha": ours} | others
    return KernelRow(
        case=case,
        setting=setting or SETTINGS["kv16"],
        dtype=dtype,
        length=length,
        median_s={
            name: {FORWARD: forward, BACKWARD: both - forward, BOTH: both} for name, (forward, both) in seconds.items()
        },
        memory=memory or {},
        unavailable={},
    )


def test_the_dense_side_is_the_best_kernel_of_each_part():
    row = kernel_row(4096, (1.0, 4.0), cudnn=(2.0, 12.0), flash=(3.0, 8.0))
    assert (row.best_dense(FORWARD), row.best_dense(BOTH)) == ("cudnn", "flash")
    assert (row.speedup(FORWARD), row.speedup(BOTH)) == (2.0, 2.0)
    assert kernel_row(4096, (1.0, 4.0), flash_window=(0.1, 0.1)).speedup(FORWARD) is None


def test_goals_of_speed_are_met_or_missed():
    found = {}
    for length, dense in ((1024, 0.5), (2048, 1.0), (4096, 1.9), (8192, 4.5), (16384, 5.0), (65536, 14.9)):
        row = kernel_row(length, (1.0, 1.0), cudnn=(dense, dense), flash=(99.0, 99.0))
        found |= {goal.text: goal.met for goal in goals([row])}
    assert found == {
        "2048 tokens: forward >= 1.0 x the best dense": True,
        "2048 tokens: forward+backward >= 1.0 x the best dense": True,
        "4096 tokens: forward >= 2.0 x the best dense": False,
        "4096 tokens: forward+backward >= 2.0 x the best dense": False,
        "8192 tokens: forward >= 5.0 x the best dense": False,
        "8192 tokens: forward+backward >= 4.0 x the best dense": True,
        "16384 tokens: forward >= 5.0 x the best dense": True,
        "16384 tokens: forward+backward >= 4.0 x the best dense": True,
        "65536 tokens: forward >= 15.0 x the best dense": False,
        "65536 tokens: forward+backward >= 12.0 x the best dense": True,
    }


def test_goals_of_memory_are_against_the_dense_kernel_that_is_fastest():
    memory = {
        "maha": Memory(kept_bytes=110, peak_bytes=251),
        "cudnn": Memory(kept_bytes=100, peak_bytes=200),
        "flash": Memory(kept_bytes=1, peak_bytes=1),
    }
    row = kernel_row(1024, (1.0, 1.0), cudnn=(1.0, 1.0), flash=(2.0, 2.0), memory=memory)
    assert {goal.text: (goal.found, goal.met) for goal in goals([row])} == {
        "1024 tokens: kept for backward <= 1.1 x dense": (1.1, True),
        "1024 tokens: peak memory of forward+backward <= 1.25 x dense": (1.255, False),
    }


def test_memory_that_nobody_weighed_has_no_ratio():
    memory = {"maha": Memory(kept_bytes=1, peak_bytes=1), "flash": Memory(kept_bytes=1, peak_bytes=1)}
    row = kernel_row(1024, (1.0, 1.0), cudnn=(1.0, 1.0), flash=(2.0, 2.0), memory=memory)
    assert row.memory_ratio("kept_bytes") is None, "that of cudnn, which is the fastest, is not known"
    assert goals([row]) == []


def test_documents_of_several_lengths_are_no_batch():
    setting = dataclasses.replace(SMALL, mixed=True)
    with pytest.raises(AssertionError, match="no batch"):
        sdpa(setting, draw_inputs(setting, 64, torch.float32))()


def test_goals_of_general_operators_are_ratios_and_what_did_not_run_missed():
    seconds = {"no LSE": (1.25, 1.3), "gram": (1.0, 1.8), "nash": (1.0, 1.0)}
    row = kernel_row(4096, (1.0, 1.0), case=GENERAL, default=(1.0, 1.0), **seconds)
    found = {goal.text.split(": ")[1].split(" <=")[0]: goal.met for goal in goals([row])}
    assert found == {
        "no LSE, forward": True,
        "no LSE, forward+backward": False,
        "gram, forward": True,
        "gram, forward+backward": True,
        "nash, forward": True,
        "nash, forward+backward": True,
        "nash, gram, forward": False,
        "nash, gram, forward+backward": False,
    }


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "fp16"},
        *({"setting": setting} for name, setting in SETTINGS.items() if name != "kv16"),
        {"setting": dataclasses.replace(SETTINGS["kv16"], backend="eager")},
        {"setting": dataclasses.replace(SETTINGS["kv16"], windows=(512,))},
        {
            "setting": dataclasses.replace(
                SETTINGS["kv16"], operator=dataclasses.replace(SETTINGS["kv16"].operator, convolution=True)
            )
        },
    ],
)
def test_another_setting_has_no_goals(other):
    assert goals([kernel_row(4096, (1.0, 1.0), cudnn=(1.0, 1.0))])
    assert goals([kernel_row(4096, (1.0, 1.0), cudnn=(1.0, 1.0), **other)]) == []


def test_the_bounds_are_those_of_the_project_s_goals():
    assert kernel_figures.LEAST_SPEEDUP[FORWARD] == {2048: 1, 4096: 2, 8192: 5, 32768: 15, 131072: 40}
    assert kernel_figures.LEAST_SPEEDUP[BOTH] == {2048: 1, 4096: 2, 8192: 4, 32768: 12, 131072: 35}

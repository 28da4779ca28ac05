"""What is judged follows from what was measured."""

import dataclasses

import pytest
import torch

from maha_megatron.attention.benchmark.figures import GOAL_SETTING, Row, goals, growth
from maha_megatron.attention.benchmark.measure import peak_bytes, times_s
from maha_megatron.attention.benchmark.subjects import SUBJECTS, Setting, draw_inputs
from maha_megatron.attention.spec import MahaSpec

SETTING = Setting(operator=MahaSpec(ratio=4, windows=(), convolution=False), heads=2, groups=2, width=16, threads=1)


def row(rows, maha, sdpa=None, dtype="fp32", peaks=()):
    times = {"maha": maha} | ({} if sdpa is None else {"sdpa": sdpa})
    return Row(dtype=dtype, rows=rows, median_s=times, peak_bytes=dict(peaks))


def test_growth_is_per_doubling_and_dtype():
    rows = [row(4096, 1.0), row(8192, 2.2), row(8192, 9.0, dtype="bf16"), row(32768, 1.0)]
    assert growth(rows) == [("fp32", 8192, pytest.approx(2.2))]


def test_goals_are_met_or_missed():
    rows = [
        row(2048, 1.0, 0.5),
        row(4096, 1.0, 1.1),
        row(8192, 2.2, 5.0),
        row(16384, 5.2, 30.0, peaks={"maha": 30, "sdpa": 10}),
        row(32768, 10.0),
    ]
    found = {goal.text: goal.met for goal in goals(GOAL_SETTING, rows)}
    assert found == {
        "fp32, 4096 tokens: speed-up >= 1.0": True,
        "fp32, 8192 tokens: speed-up >= 2.5": False,
        "fp32, 16384 tokens: speed-up >= 5.0": True,
        "fp32, 16384 tokens: memory <= 2.0 x dense": False,
        "fp32, 8192 tokens: time <= 2.3 x half of them": True,
        "fp32, 16384 tokens: time <= 2.3 x half of them": False,
        "fp32, 32768 tokens: time <= 2.3 x half of them": True,
    }


def test_another_setting_has_no_goals():
    rows, operator = [row(4096, 1.0, 0.5)], GOAL_SETTING.operator
    assert not any(goal.met for goal in goals(GOAL_SETTING, rows))
    assert len(goals(dataclasses.replace(GOAL_SETTING, threads=1), rows)) == 1
    others = [
        {"heads": 16},
        {"groups": 1},
        {"width": 128},
        {"windows": (128, 112, 124, 64)},
        {"backend": "naive"},
        {"device": "cuda"},
        {"operator": dataclasses.replace(operator, convolution=True)},
        {"operator": dataclasses.replace(operator, regularizer="quadratic")},
        {"operator": dataclasses.replace(operator, ratio=2)},
    ]
    for other in others:
        assert goals(dataclasses.replace(GOAL_SETTING, **other), rows) == [], other


@pytest.mark.full
def test_subjects_take_turns_and_memory_is_that_of_the_pass():
    times = times_s(SETTING, tuple(SUBJECTS), 96, "fp32", repeats=3, limit_s=60)
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys(SUBJECTS, 3)
    found = [peak_bytes(SETTING, "sdpa", rows, "fp32") for rows in (4096, 65536 // 2)]
    tensor_bytes = 32768 * 2 * 16 * 4
    assert found[1] > 4 * tensor_bytes, "output and three gradients are held"
    assert found[1] > found[0] > 0


def test_every_subject_reads_the_same_inputs_and_reaches_every_leaf():
    shapes = {}
    for name, subject in SUBJECTS.items():
        inputs = draw_inputs(SETTING, 80, torch.float32)
        results = subject(SETTING, inputs).results()
        shapes[name] = results["out"].shape
        assert all(results[f"gradient of {leaf}"].abs().max() > 0 for leaf in "qkv")
    assert len(set(shapes.values())) == 1

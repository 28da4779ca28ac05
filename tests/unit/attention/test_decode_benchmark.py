"""Decoding is measured on a state that a real one could be, and what is judged follows from the times."""

import dataclasses

import pytest
import torch

from maha_megatron.attention import dispatch
from maha_megatron.attention.benchmark import decode
from maha_megatron.attention.benchmark.decode import CACHED, DecodeRow, check_step, goals, maha_step, measured
from maha_megatron.attention.benchmark.step_clock import HostStepClock, StepTimes, called_s
from maha_megatron.attention.benchmark.subjects import Setting
from maha_megatron.attention.spec import MahaSpec

SMALL = Setting(operator=MahaSpec(ratio=4, windows=(), convolution=True), heads=4, groups=2, width=16)
ON_GPU = dataclasses.replace(SMALL, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_right_step_is_green(dtype, convolution):
    operator = dataclasses.replace(SMALL.operator, convolution=convolution)
    verdict = check_step(dataclasses.replace(SMALL, operator=operator), dtype, 1024)
    assert verdict.green, str(verdict)
    assert {"out", "entries.0", "entries.2"} <= verdict.bounds.keys()
    assert ("rows" in verdict.bounds) == convolution


@pytest.fixture
def chosen_anew():
    dispatch.backend.cache_clear()
    yield
    dispatch.backend.cache_clear()


@pytest.mark.parametrize("part", ["attend", "build_pyramid"])
def test_a_wrong_output_and_a_wrong_state_are_red(chosen_anew, monkeypatch, part):
    eager = dispatch._BACKENDS["eager"]
    honest = getattr(eager, part)

    def attend(*arguments):
        attended = honest(*arguments)
        return dataclasses.replace(attended, out_tnd=1.01 * attended.out_tnd)

    def build_pyramid(kv, *rest):
        return [(keys, 1.01 * values) for keys, values in honest(kv, *rest)]

    wrong = {"attend": attend, "build_pyramid": build_pyramid}[part]
    monkeypatch.setitem(dispatch._BACKENDS, "eager", dataclasses.replace(eager, **{part: wrong}))
    verdict = check_step(SMALL, torch.float32, 1024)
    assert not verdict.green
    assert verdict.errors["out"] > verdict.bounds["out"] or part == "build_pyramid"
    assert (verdict.errors["entries.0"] > verdict.bounds["entries.0"]) == (part == "build_pyramid")


def test_the_last_token_completes_a_block_of_every_scale():
    """What is timed has to include pooling: no step does more."""
    token = decode.token_of(SMALL, 1024, 2, torch.float32)
    state = decode.state_of(SMALL, 1024, 2, torch.float32)
    after = maha_step(token, state, SMALL, 1024)().state
    assert after.offset.tolist() == [1024, 1024]
    for before, entries in zip(state.entries, after.entries, strict=True):
        assert torch.equal(entries[:, :-1], before[:, 1:]), "everything moved up by one"
        assert not torch.equal(entries[:, -1], before[:, -1])


def test_a_row_says_sizes_and_names_what_did_not_run():
    row = measured(SMALL, 1024, 3, "fp32", HostStepClock(), repeats=2)
    windows = SMALL.spec_at(1024).windows
    assert row.entries == sum(windows)
    rows_bytes = 3 * 4 * (4 + 2 * 2) * 16 * 4
    assert row.state_bytes == 3 * sum(windows) * 2 * 2 * 16 * 4 + rows_bytes
    assert row.cache_bytes == 2 * 3 * 2 * 1024 * 16 * 4
    assert "maha" in row.times
    assert set(row.times) | set(row.unavailable) == {"maha", *CACHED}
    assert row.best_cached() in (None, *CACHED)
    assert set(measured(SMALL, 64, 1, "fp32", HostStepClock(), repeats=2, cache=False).times) == {"maha"}


def test_calls_are_counted_one_after_the_other():
    calls, waits = [], []
    assert called_s(lambda: calls.append(1), 5, lambda: waits.append(len(calls))) > 0
    assert waits == [3, 8, 8, 13, 13, 18]


def test_times_are_compared_like_with_like():
    graph, call = StepTimes(called_s=9.0, replayed_s=2.0), StepTimes(called_s=3.0)
    assert (graph.best_s, call.best_s) == (2.0, 3.0)
    assert graph.over(call) == 3.0
    assert graph.over(StepTimes(called_s=1.0, replayed_s=4.0)) == 0.5


def row(context, streams, seconds, entries):
    return DecodeRow(
        dtype="bf16",
        context=context,
        streams=streams,
        entries=entries,
        state_bytes=1,
        cache_bytes=1,
        times={"maha": StepTimes(called_s=1.0, replayed_s=seconds)},
        unavailable={},
    )


def test_goals_are_met_or_missed():
    rows = [row(4096, 1, 1.0, 400), row(65536, 1, 9.0, 700), row(524288, 1, 1.2, 900)]
    rows += [row(4096, 32, 10.0, 400), row(65536, 32, 21.1, 700), row(524288, 32, 26.9, 900)]
    found = {goal.text: goal.met for goal in goals(ON_GPU, rows)}
    assert found == {
        "bf16, 1 streams: 524288 tokens <= 1.20 x the time at 4096": True,
        "bf16, 32 streams: 65536 tokens <= 2.10 x the time at 4096": False,
        "bf16, 32 streams: 524288 tokens <= 2.70 x the time at 4096": True,
    }
    assert not goals(ON_GPU, [row(4096, 1, 1.0, 400), row(524288, 1, 1.21, 900)])[0].met
    assert goals(ON_GPU, rows[1:3]) == [], "without 4 k there is nothing to compare with"
    assert goals(SMALL, rows) == []

"""What times and weighs passes on a GPU, and the kernels that it forces."""

import dataclasses

import pytest
import torch

from maha_megatron.attention.benchmark.cases import GPU_SETTING
from maha_megatron.attention.benchmark.decode import CACHED, cached_step, token_of
from maha_megatron.attention.benchmark.peers import flex, subjects_of
from maha_megatron.attention.benchmark.step_clock import CudaStepClock
from maha_megatron.attention.benchmark.subjects import draw_inputs, maha, sdpa
from maha_megatron.attention.benchmark.turns import CudaClock, start, take_turns

pytestmark = pytest.mark.gpu
SMALL = dataclasses.replace(GPU_SETTING, heads=4, groups=4, width=64, call_rows=2048)


@pytest.fixture(scope="module")
def clock():
    return CudaClock()


@pytest.mark.parametrize("mixed", [False, True])
def test_dense_kernels_agree(clock, mixed):
    """cuDNN with FlashAttention 2; and that for several lengths with FlexAttention."""
    setting = dataclasses.replace(SMALL, mixed=mixed)
    inputs = draw_inputs(setting, 1024, torch.bfloat16)
    subjects = subjects_of(setting) | {"flex": flex}
    ready, unavailable = start(subjects, setting, inputs, clock, "maha")
    assert unavailable == {}, "on the machine where results are made, everything runs"
    pair = ("varlen", "flex") if mixed else ("cudnn", "flash")
    first, second = (ready[name].results() for name in pair)
    for name, result in first.items():
        torch.testing.assert_close(result, second[name], rtol=0.02, atol=0.02)


def test_times_are_those_of_the_device(clock):
    """A pass of twice the rows takes longer; the parts are parts."""
    times = {}
    for rows in (2048, 32768):
        setting = dataclasses.replace(SMALL, call_rows=rows)
        inputs = draw_inputs(setting, 2048, torch.bfloat16)
        taken = take_turns({"sdpa": sdpa(setting, inputs)}, clock, turns=5, limit_s=10)["sdpa"]
        times[rows] = sorted(one.both_s for one in taken)[2]
        assert all(one.forward_s < one.backward_s for one in taken)
    assert times[32768] > 4 * times[2048]


def test_memory_is_that_of_output_and_gradients(clock):
    inputs = draw_inputs(SMALL, 2048, torch.bfloat16)
    tensor_bytes = inputs.q_tnd.nbytes
    run = sdpa(SMALL, inputs)
    run()
    memory = clock.memory(run)
    assert tensor_bytes <= memory.kept_bytes < 1.5 * tensor_bytes, "the output, and a number a row and head"
    assert memory.peak_bytes >= 4 * tensor_bytes, "output and three gradients"
    assert all(leaf.grad is None for leaf in inputs.leaves().values())
    maha(SMALL, inputs)()
    assert clock.memory(maha(SMALL, inputs)).peak_bytes > memory.kept_bytes


def test_a_card_is_between_what_cards_can_be(clock):
    card = clock.card()
    assert 2e11 < card.bytes_per_s < 1e13
    assert 2e13 < card.flops_per_s < 3e15


def test_a_step_is_replayed_as_a_graph():
    token = token_of(SMALL, 1024, 2, torch.bfloat16)
    times = CudaStepClock().step(cached_step(token, SMALL, 1024, CACHED["flash"]), repeats=5)
    assert times.not_replayed == ""
    assert 0 < times.replayed_s < 1e-3
    assert times.called_s > 0


def test_a_step_that_waits_for_the_device_is_no_graph():
    x = torch.ones(4, device="cuda")
    times = CudaStepClock().step(lambda: x.sum().item(), repeats=5)
    assert times.replayed_s is None
    assert times.not_replayed
    assert torch.equal(x + 1, torch.full_like(x, 2)), "the device goes on"

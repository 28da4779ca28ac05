"""The share of attention: forward by its range, backward by the numbers of the nodes that were made in it."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from maha_megatron.errors import TrainingError
from maha_megatron.train.apart import in_a_process
from maha_megatron.train.step_profile import ATTENTION, profile_step, summarised
from tests.support.training import training_config

RUN = "autograd::engine::evaluate_function: "


def event(name, start, taken, *, number=-1, children=(), scope=0, device=False, annotation=False):
    """An operation of `taken` microseconds at `start`; own time is what its children leave."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, elapsed_us=lambda: taken),
        device_type=DeviceType.CUDA if device else DeviceType.CPU,
        sequence_nr=number,
        cpu_children=list(children),
        scope=scope,
        is_user_annotation=annotation,
        cpu_time_total=taken,
        self_cpu_time_total=taken - sum(child.cpu_time_total for child in children),
        device_time_total=2 * taken,
    )


def events():
    """In the range a view without a node (number 4) and a product with node 4; behind it a sum with node 5, a number

    that the range's last operation shows too; in front of it one that shows number 4.
    """
    early = event("early", 0, 5, number=4)
    view, product = event("view", 10, 1, number=4), event("product", 11, 29, number=4)
    inside = event(ATTENTION, 10, 30, children=[view, product])
    late_view = event("late view", 39, 0, number=5)  # the last operation of the range: its number is the sum's
    inside.cpu_children.append(late_view)
    after = event("sum", 50, 25, number=5)
    own = event("ProductBackward", 101, 40, number=4, scope=1)
    backward = [event(RUN + "ProductBackward", 100, 40, number=4, children=[own]), event(RUN + "Sum", 90, 50, number=5)]
    accumulated = event(RUN + "AccumulateGrad", 150, 50)
    return [early, view, product, inside, late_view, after, own, *backward, accumulated]


def test_backward_belongs_to_where_its_node_was_made():
    found = summarised(events(), False, 0.1, 1, 10)
    assert found.device_s == pytest.approx((5 + 30 + 25 + 40 + 50 + 50) * 1e-6)
    assert found.attention_frac == pytest.approx((30 + 40) / 200)


def test_on_a_gpu_kernels_are_what_is_counted():
    kernels = [
        event("gemm", 0, 300, device=True),
        event("gemm", 0, 90, device=True),
        event("attend", 0, 410, device=True),
        event(ATTENTION, 0, 999, device=True, annotation=True),
    ]
    found = summarised([*events(), *kernels], True, 0.1, 2, 1)
    assert found.device_s == pytest.approx(400e-6)
    assert found.kernels == [("attend", 0.5, pytest.approx(205e-6))]
    assert found.attention_frac == pytest.approx(2 * (30 + 40) / 800)


def profile_alone(config, kernels):
    """With one thread: several wait for each other when something else runs on the cores."""
    torch.set_num_threads(1)
    return profile_step(config, kernels)


@pytest.mark.full
def test_a_real_step_is_profiled():
    """A narrow model over long samples: most of its step is attention, and backward is more of that than forward."""
    one_sample = {"train__global_batch_samples": 1, "train__micro_batch_samples": 1}
    whole = {"data__sequence_tokens": 512, "data__document_bounds": False}
    config = training_config(model__layers=2, zero__stage=1, optimizer__name="adamw", **one_sample, **whole)
    found = in_a_process(profile_alone, config, 40)
    assert 0 < found.step_s < 10
    assert 0 < found.attention_frac < 1
    if torch.cuda.is_available():
        return
    assert 0.4 < found.attention_frac < 0.95
    names = {name: seconds for name, _, seconds in found.kernels}
    attention_backward = names["aten::_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert found.attention_frac * found.device_s > attention_backward > 0.05 * found.device_s


def _die() -> None:
    import os

    os._exit(3)


def test_a_process_that_dies_is_an_error_of_ours():
    with pytest.raises(TrainingError, match="_die died, perhaps out of memory"):
        in_a_process(_die)

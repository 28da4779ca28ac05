"""Where the time of a training step goes: kernels by name, and the share of attention, forward and backward.

The share is that of the core-attention modules: convolution, normalisation, rotation, pyramid and attention. Their
forward operations lie in a named range. A backward operation belongs to them if the forward operation that made its
node does: torch gives both one sequence number, which earlier operations without a node may show too, so the last
forward operation that has it counts.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from maha_megatron.config.schema import Config
from maha_megatron.model.dense_core_attention import DenseCoreAttention
from maha_megatron.model.maha_core_attention import MahaCoreAttention
from maha_megatron.parallel import compat
from maha_megatron.train.engine import build_engine
from maha_megatron.train.guards import StepPlace
from maha_megatron.train.random_batches import random_batches

ATTENTION = "core attention"
_FORWARD = 0  # the scope of operations that autograd does not run
_BACKWARD = "autograd::engine::evaluate_function: "
_TIMED_STEPS, _PROFILED_STEPS = 3, 3
_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Means of one step.

    step_s: seconds that it takes, not profiled; device_s: that the device works in it, the rest of them it waits for
    the host; attention_frac: share of attention in that work; kernels: (name, calls, seconds), the longest first.
    """

    step_s: float
    device_s: float
    attention_frac: float
    kernels: list[tuple[str, float, float]]


def profile_step(config: Config, kernels: int = 15) -> StepProfile:
    """Profile a few steps of random tokens of this configuration, in this process, which must have no groups yet.

    Args:
        config: one that passed check_config, for one process; it states no program.
        kernels: how many rows the table has.
    """
    compat.initialise_distributed(config)
    compat.initialise_model_parallel(config)
    compat.seed_everything(config.run.seed)
    try:
        engine = build_engine(config)
        for module in engine.module.modules():
            if isinstance(module, MahaCoreAttention | DenseCoreAttention):
                _name_forward(module)
        batches, on_gpu = random_batches(config), torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

        def step() -> None:
            engine.step(batches, _RATE, StepPlace(step=1, first_sample=0, samples=config.train.global_batch_samples))

        step()  # compiles
        begin = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            step()
        step_s = (time.perf_counter() - begin) / _TIMED_STEPS
        with profile(activities=activities) as found:
            for _ in range(_PROFILED_STEPS):
                step()
            if on_gpu:
                torch.cuda.synchronize()
        engine.release()
    finally:
        compat.shutdown()
    return summarised(found.events(), on_gpu, step_s, _PROFILED_STEPS, kernels)


def summarised(events: Sequence[FunctionEvent], on_gpu: bool, step_s: float, steps: int, kernels: int) -> StepProfile:
    """What a profile of `steps` steps says of one; without a GPU, operations of the CPU stand for kernels."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    if on_gpu:
        worked = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
        times = [(event.name, event.time_range.elapsed_us()) for event in worked]
    else:
        times = [(event.name, event.self_cpu_time_total) for event in on_host]
    total_us = sum(taken for _, taken in times)
    by_name: dict[str, list[float]] = {}
    for name, taken in times:
        by_name.setdefault(name, []).append(taken)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:kernels]
    return StepProfile(
        step_s=step_s,
        device_s=1e-6 * total_us / steps,
        attention_frac=_attention_us(on_host, on_gpu) / total_us,
        kernels=[(name, len(taken) / steps, 1e-6 * sum(taken) / steps) for name, taken in longest],
    )


def _attention_us(on_host: Sequence[FunctionEvent], on_gpu: bool) -> float:
    """Microseconds of what the named ranges and the backward of what is in them did."""

    def taken_us(event: FunctionEvent) -> float:
        return event.device_time_total if on_gpu else event.cpu_time_total

    ranges = [event for event in on_host if event.name == ATTENTION]
    inside = {id(event) for event in _below(ranges)}
    owner: dict[int, FunctionEvent] = {}
    backward = [event for event in on_host if event.name.startswith(_BACKWARD)]
    forward = [event for event in on_host if event.scope == _FORWARD and not event.name.startswith(_BACKWARD)]
    for event in sorted(forward, key=lambda event: event.time_range.start):
        owner[event.sequence_nr] = event
    forward_us = sum(taken_us(child) for event in ranges for child in event.cpu_children)
    own = [event for event in backward if event.sequence_nr >= 0 and id(owner.get(event.sequence_nr)) in inside]
    return forward_us + sum(taken_us(event) for event in own)


def _below(events: Iterable[FunctionEvent]) -> Iterator[FunctionEvent]:
    """All descendants."""
    for event in events:
        yield from event.cpu_children
        yield from _below(event.cpu_children)


def _name_forward(module: nn.Module) -> None:
    """Run the module's forward in a range called ATTENTION."""
    open_ranges: list[record_function] = []

    def enter(*_) -> None:
        open_ranges.append(record_function(ATTENTION))
        open_ranges[-1].__enter__()

    def leave(*_) -> None:
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)

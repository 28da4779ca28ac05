"""Train a tiny model for a few steps on this process's ranks, and hand back everything that must not depend on them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from maha_megatron.config.rules import check_config, check_topology
from maha_megatron.config.schema import Config
from maha_megatron.data.batch import MicroBatch
from maha_megatron.model import init
from maha_megatron.model.init import named_generator
from maha_megatron.parallel import compat, groups
from maha_megatron.train.engine import Engine, build_engine
from maha_megatron.train.guards import StepPlace
from tests.support.model import tiny_config

SAMPLES, STEPS = 8, 20


def training_config(**changes: Any) -> Config:
    """A tiny fp32 hybrid of four layers, 8 samples of 64 tokens a step, no clipping unless asked for."""
    settings = {
        "model__layers": 4,
        "train__global_batch_samples": SAMPLES,
        "train__micro_batch_samples": SAMPLES,
        "optimizer__name": "sgd",
        "optimizer__clip_norm": 0.0,
        "zero__stage": 0,
    }
    return tiny_config(**(settings | changes))


def random_value(name: str, shape: tuple[int, ...], config: Config) -> torch.Tensor:
    """A full tensor with nothing inert in it: gains around 1, all else around 0."""
    noise = torch.randn(tuple(shape), generator=named_generator(config.run.seed, name))
    return 1 + 0.3 * noise if "norm" in name or name.endswith("gain") else 0.1 * noise


def sample(config: Config, number: int, mask: str) -> dict[str, torch.Tensor]:
    """One sample of two documents, a function of its number alone."""
    rows = config.data.sequence_tokens
    generator = torch.Generator().manual_seed(number)
    tokens_t = torch.randint(config.model.vocabulary, (rows + 1,), generator=generator)
    border = int(torch.randint(1, rows, (1,), generator=generator))
    start_t = torch.zeros(rows, dtype=torch.int32)
    start_t[border:] = border
    loss_mask_t = torch.rand(rows, generator=generator) > 0.2
    if mask == "first half" and number % SAMPLES >= SAMPLES // 2:  # with two data-parallel ranks: those of rank 1
        loss_mask_t[:] = False
    return {"input_ids_t": tokens_t[:-1], "labels_t": tokens_t[1:], "loss_mask_t": loss_mask_t, "start_t": start_t}


def micro_batches(config: Config, consumed: int, mask: str) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of a step: a contiguous part of its samples, cut into micro-batches.

    Contiguous so that one rank can hold all the unmasked tokens; which rank has a sample must not matter.
    """
    per_rank = config.train.global_batch_samples // groups.data_size()
    first = consumed + groups.data_rank() * per_rank
    micro = config.train.micro_batch_samples
    return [_packed(config, range(start, start + micro), mask) for start in range(first, first + per_rank, micro)]


def _packed(config: Config, numbers: range, mask: str) -> MicroBatch:
    samples = [sample(config, number, mask) for number in numbers]
    joined = {key: torch.cat([sample[key] for sample in samples]) for key in ("input_ids_t", "labels_t", "loss_mask_t")}
    rows = config.data.sequence_tokens
    starts = torch.cat([sample["start_t"] + index * rows for index, sample in enumerate(samples)])
    return MicroBatch(**joined, document_start_t=starts)


@contextmanager
def engine_for(config: Config, world_size: int) -> Iterator[Engine]:
    """An engine whose every learned parameter is random; other engines may follow in the same process."""
    check_config(config)
    check_topology(config, world_size)
    with mock.patch.object(init, "initial_value", random_value):
        engine = build_engine(config)
    yield engine
    engine.release()


def observe(
    config: Config, world_size: int, *, mask: str = "random", steps: int = STEPS, rate: float
) -> dict[str, Any]:
    """Train `steps` steps.

    Returns:
        On rank 0: gradients and their norm at step 1, parameters before and after, losses of all steps.
    """
    seen: dict[str, Any] = {"losses": []}
    with engine_for(config, world_size) as engine:
        seen["before"] = dict(engine.full_masters())
        for step in range(1, steps + 1):
            consumed = (step - 1) * config.train.global_batch_samples
            loss = engine.accumulate(micro_batches(config, consumed, mask))
            if step == 1:
                seen["gradients"] = dict(engine.full_gradients())
            place = StepPlace(step=step, first_sample=consumed, samples=config.train.global_batch_samples)
            norm, _ = engine.update(rate, place)
            seen["losses"].append(loss)
            if step == 1:
                seen["norm"] = norm
        seen["after"] = dict(engine.full_masters())
    return {key: _cloned(value) for key, value in seen.items()}


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: tensor if tensor is None else tensor.detach().float().clone() for name, tensor in value.items()}
    return value


def start_groups(config: Config) -> None:
    """Process and model-parallel groups of this process's ranks."""
    compat.initialise_distributed(config)
    compat.initialise_model_parallel(config)
    compat.seed_everything(config.run.seed)


def with_changes(config: Config, **changes: Any) -> Config:
    """A copy with other values: section__key=value."""
    for path, value in changes.items():
        section, key = path.split("__")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config

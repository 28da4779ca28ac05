"""bf16 with fp32 accumulation and reduction: no ZeRO stage and no accumulation changes what the weights are told."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.everyday import everyday
from tests.support.training import observe, start_groups, training_config

STAGES, ACCUMULATIONS = (1, 2, 3), (1, 16)
# After step 1 a rounding of some bf16 weight falls the other way, and every activation with it: the second loss of two
# equally good runs differs by up to 6e-5 of itself (1e-6 in step 1), what both steps did to the masters by 0.8 %.
WORST_SECOND_LOSS, WORST_MOVEMENT = 1e-4, 0.015
WORST_ROUNDING = 0.0035  # of the whole gradient; bf16 keeps 8 bits, so a micro-batch's gradients are off by 0.002


def first_steps(rank: int, world_size: int, stage: int, accumulation: int, dtype: str) -> dict[str, Any]:
    """Two steps of one case."""
    config = training_config(
        model__layers=2,
        train__precision="bf16",
        train__global_batch_samples=32,
        train__micro_batch_samples=16 // accumulation,
        zero__stage=stage,
        zero__accumulation_dtype=dtype,
    )
    start_groups(config)
    seen = observe(config, world_size, rate=1e-2, steps=2)
    return seen if rank == 0 else {}


@pytest.fixture(scope="module")
def run_of() -> Callable[..., dict[str, Any]]:
    """Two steps of a stage, an accumulation and its dtype, done when they are first asked for."""

    @functools.cache
    def run(stage: int, accumulation: int, dtype: str = "fp32") -> dict[str, Any]:
        return run_ranks(first_steps, 2, 2, stage, accumulation, dtype, timeout_s=300)[0]

    return run


def flat(run: dict[str, Any]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in run["gradients"].values()])


def movement(run: dict[str, Any]) -> torch.Tensor:
    """What two steps did to the fp32 master weights."""
    return torch.cat([(after - run["before"][name]).flatten() for name, after in run["after"].items()])


def difference(run: dict[str, Any], other: dict[str, Any]) -> float:
    return float((flat(run) - flat(other)).norm() / flat(other).norm())


@pytest.mark.parametrize(
    ("stage", "accumulation"),
    everyday(
        itertools.product(STAGES[1:], ACCUMULATIONS), lambda stage, accumulation: stage == 3 or accumulation == 16
    ),
)
def test_stages_agree(run_of: Callable, stage: int, accumulation: int) -> None:
    one, other = run_of(1, accumulation), run_of(stage, accumulation)
    assert other["norm"] == pytest.approx(one["norm"], rel=1e-6)
    assert difference(other, one) < 1e-6
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)


@pytest.mark.parametrize("stage", everyday(STAGES, lambda stage: stage != 2))
def test_accumulation_in_fp32_costs_one_rounding_only(run_of: Callable, stage: int) -> None:
    once, often = run_of(stage, 1), run_of(stage, 16)
    assert often["norm"] == pytest.approx(once["norm"], rel=1e-4)
    assert difference(often, once) < WORST_ROUNDING
    assert often["losses"][0] == pytest.approx(once["losses"][0], rel=1e-6)
    assert often["losses"][1] == pytest.approx(once["losses"][1], rel=WORST_SECOND_LOSS)
    assert (movement(often) - movement(once)).norm() < WORST_MOVEMENT * movement(once).norm()


@pytest.mark.parametrize("stage", everyday(STAGES, lambda stage: stage != 2))
def test_accumulation_in_bf16_would_show(run_of: Callable, stage: int) -> None:
    """The bound above is tight enough to notice gradients that are added up in bf16."""
    assert difference(run_of(stage, 16, "bf16"), run_of(stage, 1)) > WORST_ROUNDING

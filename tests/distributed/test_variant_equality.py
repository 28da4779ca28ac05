"""Tied embeddings and recomputation train as one process does, where a ZeRO stage or tensor ranks could lose them."""

from typing import Any

import pytest

from tests.support.distributed import run_ranks
from tests.support.training import observe, start_groups, training_config

VARIANTS = {
    "tied": {"model__tied_embeddings": True},
    "tied, recompute full": {"model__tied_embeddings": True, "train__recompute": "full"},
    "recompute selective": {"train__recompute": "selective"},
}
TOPOLOGIES = {
    "ZeRO 3, accumulation 2": {"zero__stage": 3, "train__micro_batch_samples": 2},
    "TP 2 + SP, ZeRO 1": {"parallel__tensor": 2, "parallel__sequence": True, "zero__stage": 1},
    "TP 2 + SP, ZeRO 3": {"parallel__tensor": 2, "parallel__sequence": True, "zero__stage": 3},
}


def observations(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    start_groups(training_config(**changes))
    configs = {name: training_config(model__layers=2, **variant, **changes) for name, variant in VARIANTS.items()}
    seen = {name: observe(config, world_size, rate=0.05, steps=3) for name, config in configs.items()}
    return seen if rank == 0 else {}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return run_ranks(observations, 1, 1, {})[0]


@pytest.fixture(scope="module")
def two_processes() -> dict[str, Any]:
    return {name: run_ranks(observations, 2, 2, changes)[0] for name, changes in TOPOLOGIES.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradients_norm_and_losses(topology: str, variant: str, one_process: dict, two_processes: dict) -> None:
    one, two = one_process[variant], two_processes[topology][variant]
    assert one["gradients"].keys() == two["gradients"].keys()
    assert ("output.weight" in one["gradients"]) == (not variant.startswith("tied"))
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)

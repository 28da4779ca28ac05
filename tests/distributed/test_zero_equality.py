"""Every topology, ZeRO stage and accumulation trains as one process does: gradients, norm, weights and losses.

All learned parameters are random (many start inert, and equality of nothing proves nothing). Gradients come first, then
SGD without clipping: AdamW, which forgives a wrong scale of the gradient, only last.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.compiler import HAS_COMPILER
from tests.support.distributed import run_ranks
from tests.support.training import observe, start_groups, training_config

LAYERS = 2  # one of MAHA, one dense
SGD_RATE, ADAMW_RATE = 0.05, 1e-3
ADAMW = {"optimizer__name": "adamw", "optimizer__clip_norm": 0.5}
MASKS = ("random", "first half")

# by name: changes of the configuration; 8 samples a step, so 2 data-parallel ranks accumulate 4 / micro_batch_samples
DATA_CASES = {
    f"ZeRO {stage}, accumulation {steps}": {"zero__stage": stage, "train__micro_batch_samples": 4 // steps}
    for stage in (0, 1, 2, 3)
    for steps in (1, 4)
}
TENSOR_CASES = {
    "TP 2": {"parallel__tensor": 2},
    "TP 2 + SP": {"parallel__tensor": 2, "parallel__sequence": True},
    "TP 2 + SP, ZeRO 1, accumulation 4": {
        "parallel__tensor": 2,
        "parallel__sequence": True,
        "zero__stage": 1,
        "train__micro_batch_samples": 2,
    },
    "TP 2, ZeRO 3": {"parallel__tensor": 2, "zero__stage": 3},
    "TP 2 + SP, ZeRO 2": {"parallel__tensor": 2, "parallel__sequence": True, "zero__stage": 2},
    "TP 2 + SP, ZeRO 3": {"parallel__tensor": 2, "parallel__sequence": True, "zero__stage": 3},
}
if HAS_COMPILER:
    DATA_CASES["ZeRO 3, compiled"] = {"zero__stage": 3, "train__micro_batch_samples": 2, "train__compile": True}
    TENSOR_CASES["TP 2 + SP, ZeRO 1, compiled, recomputed"] = {
        "parallel__tensor": 2,
        "parallel__sequence": True,
        "zero__stage": 1,
        "train__compile": True,
        "train__recompute": "full",
    }
# both axes at once: data rank 1 is ranks 2 and 3, which no single axis can tell from any other numbering
MESH_CASES = {
    f"TP 2 + SP x DP 2, ZeRO {stage}": {
        "parallel__tensor": 2,
        "parallel__sequence": True,
        "zero__stage": stage,
        "train__micro_batch_samples": 2,
    }
    for stage in (1, 3)
}
EVERYDAY = (
    *(f"ZeRO {stage}, accumulation {steps}" for stage in (1, 2, 3) for steps in (1, 4)),
    "ZeRO 0, accumulation 1",
    "TP 2",
    "TP 2 + SP",
)
# the batch whose unmasked tokens all sit on rank 0: where a mean of means, or a count of one's own, shows
ONE_SIDED = ("ZeRO 0, accumulation 1", "ZeRO 1, accumulation 4", "ZeRO 2, accumulation 1", "ZeRO 3, accumulation 4")


def observations(rank: int, world_size: int, changes: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Runs of one case on this process's ranks: what -> observe()'s dictionary, on rank 0."""
    changes = {"model__layers": LAYERS, **changes}
    sgd, adamw = training_config(**changes), training_config(**changes, **ADAMW)
    start_groups(sgd)
    runs = {
        "sgd": functools.partial(observe, sgd, rate=SGD_RATE),
        "adamw": functools.partial(observe, adamw, rate=ADAMW_RATE),
        "one-sided": functools.partial(observe, sgd, rate=SGD_RATE, mask="first half"),
    }
    seen = {kind: runs[kind](world_size=world_size) for kind in kinds}
    return seen if rank == 0 else {}


def kinds_of(name: str) -> tuple[str, ...]:
    return ("sgd", "adamw", "one-sided") if name in (*ONE_SIDED, *MESH_CASES) else ("sgd", "adamw")


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return run_ranks(observations, 1, 1, {}, ("sgd", "adamw", "one-sided"), timeout_s=300)[0]


@pytest.fixture(scope="module")
def several_processes() -> Callable[[str], dict[str, Any]]:
    """Runs of a case by its name, made when they are first asked for."""

    @functools.cache
    def runs_of(name: str) -> dict[str, Any]:
        changes, ranks = (DATA_CASES | TENSOR_CASES | MESH_CASES)[name], 4 if name in MESH_CASES else 2
        return run_ranks(observations, ranks, ranks, changes, kinds_of(name), timeout_s=500)[0]

    return runs_of


CASES = [(name, kind) for name in (*DATA_CASES, *TENSOR_CASES, *MESH_CASES) for kind in kinds_of(name)]


@pytest.fixture
def runs(request: pytest.FixtureRequest, one_process: dict[str, Any], several_processes: Callable) -> tuple[dict, dict]:
    """The same steps of one process and of several."""
    name, kind = request.param
    return one_process[kind], several_processes(name)[kind]


def over(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Four processes, what is compiled, and what stands between two everyday cases, are for the longer run."""
    parameters = [
        pytest.param(case, marks=() if case[0] in EVERYDAY else pytest.mark.full, id=" / ".join(case)) for case in cases
    ]
    return pytest.mark.parametrize("runs", parameters, indirect=True)


@over(CASES)
def test_first_gradients_and_their_norm(runs: tuple[dict, dict]) -> None:
    one, several = runs
    assert one["gradients"].keys() == several["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert gradient.norm() > 0, f"{name} has no gradient: the test would be blind to it"
        assert (several["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert several["norm"] == pytest.approx(one["norm"], rel=1e-5)
    whole = torch.cat([gradient.flatten() for gradient in one["gradients"].values()]).norm()
    assert one["norm"] == pytest.approx(float(whole), rel=1e-5)


@over([case for case in CASES if case[1] != "adamw"])
def test_weights_after_sgd(runs: tuple[dict, dict]) -> None:
    one, several = runs
    for name, after in one["after"].items():
        assert torch.equal(one["before"][name], several["before"][name]), name
        moved = (after - one["before"][name]).norm()
        assert moved > 0, name
        assert (several["after"][name] - after).norm() <= 1e-5 * moved + 1e-7 * after.norm(), name


@over(CASES)
def test_losses_of_twenty_steps(runs: tuple[dict, dict]) -> None:
    one, several = runs
    assert len(one["losses"]) == 20
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_clipping_is_at_work(one_process: dict) -> None:
    assert one_process["adamw"]["norm"] > ADAMW["optimizer__clip_norm"]

"""Every topology, ZeRO stage and accumulation trains as one process does: gradients, norm, weights and losses.

All learned parameters are random (many start inert, and equality of nothing proves nothing). Gradients come first, then
SGD without clipping: AdamW, which forgives a wrong scale of the gradient, only last.
"""

from typing import Any

import pytest
import torch

from tests.support.compiler import HAS_COMPILER
from tests.support.distributed import run_ranks
from tests.support.training import observe, start_groups, training_config

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
# the batch whose unmasked tokens all sit on rank 0: where a mean of means, or a count of one's own, shows
ONE_SIDED = ("ZeRO 0, accumulation 1", "ZeRO 1, accumulation 4", "ZeRO 2, accumulation 1", "ZeRO 3, accumulation 4")


def observations(rank: int, world_size: int, cases: dict[str, dict[str, Any]], one_sided: tuple[str, ...]) -> dict:
    """Runs of every case on this process's ranks: (case, what) -> observe()'s dictionary, on rank 0."""
    start_groups(training_config(**next(iter(cases.values()))))
    seen = {}
    for name, changes in cases.items():
        sgd, adamw = training_config(**changes), training_config(**changes, **ADAMW)
        seen[f"{name} / sgd"] = observe(sgd, world_size, rate=SGD_RATE)
        seen[f"{name} / adamw"] = observe(adamw, world_size, rate=ADAMW_RATE)
        if name in one_sided:
            seen[f"{name} / one-sided"] = observe(sgd, world_size, rate=SGD_RATE, mask="first half")
    return seen if rank == 0 else {}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    runs = run_ranks(observations, 1, 1, {"one": {}}, ("one",), timeout_s=300)[0]
    return {key.removeprefix("one / "): run for key, run in runs.items()}


@pytest.fixture(scope="module")
def two_processes() -> dict[str, Any]:
    data = run_ranks(observations, 2, 2, DATA_CASES, ONE_SIDED, timeout_s=500)[0]
    return data | run_ranks(observations, 2, 2, TENSOR_CASES, (), timeout_s=500)[0]


@pytest.fixture(scope="module")
def four_processes() -> dict[str, Any]:
    return run_ranks(observations, 4, 4, MESH_CASES, tuple(MESH_CASES), timeout_s=500)[0]


CASES = [("two_processes", f"{name} / {kind}") for name in (*DATA_CASES, *TENSOR_CASES) for kind in ("sgd", "adamw")]
CASES += [("two_processes", f"{name} / one-sided") for name in ONE_SIDED]
CASES += [("four_processes", f"{name} / {kind}") for name in MESH_CASES for kind in ("sgd", "adamw", "one-sided")]


@pytest.fixture
def runs(request: pytest.FixtureRequest, one_process: dict[str, Any]) -> tuple[dict, dict]:
    """The same steps of one process and of several."""
    processes, case = request.param
    return one_process[case.rpartition(" / ")[2]], request.getfixturevalue(processes)[case]


def over(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Four processes are for the longer run."""
    marks = {"two_processes": (), "four_processes": pytest.mark.full}
    parameters = [pytest.param(case, marks=marks[case[0]], id=case[1]) for case in cases]
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


@over([case for case in CASES if not case[1].endswith("adamw")])
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

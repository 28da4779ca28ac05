"""Missed solves are summed over ranks that hold different heads or different samples, and over micro-batches."""

from typing import Any

import pytest

from maha_megatron.attention.aggregation.stated_program import UnsolvedProgram
from maha_megatron.errors import ProgramError
from maha_megatron.model import maha_core_attention
from tests.support.distributed import run_ranks
from tests.support.solves import planted
from tests.support.training import SAMPLES, engine_for, micro_batches, start_groups, training_config

CASES = {
    "TP 2 + SP, recompute": {"parallel__tensor": 2, "parallel__sequence": True, "train__recompute": "full"},
    "DP 2, ZeRO 3, accumulation 2": {"zero__stage": 3, "train__micro_batch_samples": 2},
}


def observations(rank: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Counts after a step and a validation on two ranks, the first of which misses 1 a call and the second 100."""
    config = training_config(**changes)
    start_groups(config)
    maha_core_attention.maha_attention = planted((1, 100)[rank], (0.5, 0.25)[rank])
    with engine_for(config, 2) as engine:
        assert engine.take_solves() is None
        batches = micro_batches(config, 0, "random")
        engine.accumulate(batches)
        step = engine.take_solves()
        assert engine.take_solves() is None
        engine.evaluate([("text", batches[0])])
        validation = engine.take_solves()
    return {"step": vars(step), "validation": vars(validation), "micro_batches": len(batches)}


def refusals(rank: int, changes: dict[str, Any]) -> str:
    """What tensor rank 1 says of a program without a solution for its own head 2."""
    config = training_config(**changes)
    start_groups(config)

    def failing(*_: object, **__: object) -> None:
        raise UnsolvedProgram("mine:build is infeasible", row=0, head=2)

    maha_core_attention.maha_attention = failing
    with engine_for(config, 2) as engine:
        try:
            engine.accumulate(micro_batches(config, 0, "random"))
        except ProgramError as error:
            return str(error)
    return ""


def test_an_error_names_the_head_of_the_whole_model() -> None:
    first, second = run_ranks(refusals, 2, CASES["TP 2 + SP, recompute"] | {"train__micro_batch_samples": SAMPLES})
    assert first.startswith("layer 0, head 2, token 0 of its document")
    assert second.startswith("layer 0, head 6, token 0 of its document")


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_all_ranks(case: str) -> None:
    changes = {"train__micro_batch_samples": SAMPLES, **CASES[case]}
    first, second = run_ranks(observations, 2, changes)
    assert first == second
    layers, rows, heads = 2, 64, 8
    count = first["micro_batches"]
    assert count == (1 if "parallel__tensor" in changes else 2)
    assert first["step"]["programs"] == layers * rows * heads * SAMPLES
    assert first["step"]["missed"] == layers * count * 101
    assert first["step"]["steps_mean"] == 3.0
    assert first["step"]["residual_max"] == 0.5
    assert first["validation"]["missed"] == layers * 101
    assert first["validation"]["programs"] == first["step"]["programs"] / count

"""Reports of solves from the layers to the model: sums by hand, once per forward, and errors that name their place."""

import pytest
import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.attention.aggregation.stated_program import UnsolvedProgram
from maha_megatron.attention.spec import absent_program
from maha_megatron.errors import ConfigError, ProgramError
from maha_megatron.model import maha_core_attention
from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.operators import stated_program
from maha_megatron.model.solve_totals import SolveTotals
from tests.support.model import random_batch, random_model, tiny_config
from tests.support.solves import planted

pytestmark = pytest.mark.usefixtures("one_rank")
STATED = {"maha__aggregation": "program", "maha__program": "configs.programs.budget:build"}


def report(residuals: list[float], steps: list[int] | None, missed: int) -> SolveReport:
    steps_tn = None if steps is None else torch.tensor([steps], dtype=torch.int32)
    return SolveReport(residual_tn=torch.tensor([residuals]), steps_tn=steps_tn, missed=torch.tensor(missed))


def test_totals_by_hand():
    totals = SolveTotals.of(report([1e-7, 2e-6], [2, 5], 1)) + SolveTotals.of(report([3e-5], [5], 1))
    totals = totals + SolveTotals.of(report([1e-6], [8], 0))
    counts = totals.over_all_ranks()
    assert (counts.programs, counts.missed) == (4, 2)
    assert counts.steps_mean == pytest.approx(5.0)
    assert counts.residual_max == pytest.approx(3e-5)


def test_steps_that_nobody_counts_are_absent_and_a_residual_that_is_no_number_is_the_largest():
    totals = SolveTotals.of(report([1e-7, torch.nan], None, 1)) + SolveTotals.of(report([0.1], None, 0))
    counts = totals.over_all_ranks()
    assert counts.steps_mean is None
    assert counts.residual_max == torch.inf
    assert counts.programs == 3


def test_without_a_solver_there_is_nothing_to_report():
    config = tiny_config()
    model, batch = random_model(config), random_batch(config, rows=64)
    model(*batch)
    assert model.solve_totals() is None


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_every_forward_counts_once(recompute, monkeypatch):
    config = tiny_config(model__layers=4, train__recompute=recompute)
    model, batch, calls = random_model(config), random_batch(config, rows=64), []
    monkeypatch.setattr(maha_core_attention, "maha_attention", planted(2, 0.5, calls=calls))
    loss = model(*batch)
    before = model.solve_totals().over_all_ranks()
    loss.backward()
    assert len(calls) == (2 if recompute == "none" else 4), "recomputation must have run"
    after = model.solve_totals().over_all_ranks()
    assert before == after
    assert (before.programs, before.missed, before.steps_mean) == (2 * 64 * 8, 4, 3.0)


def test_an_unsolved_program_names_layer_head_and_token(monkeypatch):
    config = tiny_config(model__layers=4)
    model, batch = random_model(config), random_batch(config, rows=64, starts=(0, 20))
    honest, calls = maha_core_attention.maha_attention, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise UnsolvedProgram("mine:build with 2 feasible scales is infeasible", row=33, head=5)
        return honest(*args, **kwargs)

    monkeypatch.setattr(maha_core_attention, "maha_attention", failing)
    with pytest.raises(
        ProgramError,
        match=r"layer 2, head 5, token 13 of its document \(row 33 of the micro-batch\): mine:build with 2 feasible "
        "scales is infeasible. Loosen",
    ):
        model(*batch)


def test_a_program_is_loaded_only_when_allowed_and_never_forgotten():
    config = tiny_config(**STATED)
    with pytest.raises(ConfigError, match=r"add --allow-program configs.programs.budget:build"):
        stated_program(config, None)
    with pytest.raises(ConfigError, match="has to be loaded and given to build_gpt"):
        build_gpt(config, device="cpu")
    assert stated_program(tiny_config(), None) is None
    model = build_gpt(config, device="cpu", program=stated_program(config, config.maha.program))
    assert callable(model.layers[0].self_attention.core_attention.spec.program)
    shapes_only = build_gpt(config, device="meta").layers[0].self_attention.core_attention.spec
    assert shapes_only.program is absent_program
    with pytest.raises(ProgramError, match="give its MahaSpec the program"):
        shapes_only.program(torch.zeros(1, 3), None, torch.ones(1, 3, dtype=torch.bool))

"""Attention whose weights come from a stated program: equal to the exact solvers in every backend, and its errors."""

import dataclasses

import pytest
import torch

from maha_megatron.attention.aggregation import eager as aggregation_eager
from maha_megatron.attention.aggregation.stated_program import StatedProgram, UnsolvedProgram
from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState
from tests.support.attention import PLAIN_BACKENDS, Case, attend, leaves, parameter_specs, start_rows
from tests.support.stated_programs import bounded_above, stated
from tests.unit.attention.test_aggregation_causality import check_poisoned, huge_values
from tests.unit.attention.test_causality import check_jacobian

LENGTHS = (40, 1, 23)  # 64 tokens; scale 2 has 16 rows a block
WINDOWS = (8, 6, 4)


def case(regularizer: str, coupling: str, aggregation: str, **changes) -> Case:
    spec = MahaSpec(
        ratio=4, windows=WINDOWS, regularizer=regularizer, coupling=coupling, aggregation=aggregation, **changes
    )
    return Case(lengths=LENGTHS, spec=spec, n=4, g=2, d=8)


def with_program(regularizer: str, coupling: str, **changes) -> Case:
    coupled = coupling == "gram"
    program = StatedProgram(
        lambda m: stated(m, regularizer, coupled=coupled), scales=len(WINDOWS), coupled=coupled, name="stated"
    )
    return case("entropy", coupling, "program", program=program, **changes)  # a program reads no regularizer


def results(case: Case, backend: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Output, weights and the gradient of every leaf, fp64, on the CPU."""
    values = leaves(case, torch.float64, device)
    found = attend(case, values, backend)
    direction = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(found["out"], list(values.values()), direction.to(device))
    named = found | {f"grad of {name}": grad for name, grad in zip(values, grads, strict=True)}
    return {name: value.cpu() for name, value in named.items()}


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("coupling", ["none", "gram"])
@pytest.mark.parametrize("regularizer", ["entropy", "quadratic"])
def test_a_program_equals_the_exact_solver_at_64_tokens(regularizer, coupling, backend):
    stated_case, exact_case = with_program(regularizer, coupling), case(regularizer, coupling, "convex")
    assert parameter_specs(stated_case) == parameter_specs(exact_case)
    found, exact = results(stated_case, backend), results(exact_case, backend)
    for name, value in exact.items():
        tolerance = 1e-5 if name.startswith("grad") else 1e-6
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max().clamp_min(0.1), name
    assert (found["weights"].sum(-1) - 1).abs().max() <= 1e-6
    assert ((found["weights"] == 0) == (exact["weights"] == 0)).all() or regularizer == "quadratic"
    assert exact["grad of utility_bias"].abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("coupling", ["none", "gram"])
@pytest.mark.parametrize("regularizer", ["entropy", "quadratic"])
def test_on_a_gpu_a_program_gives_what_it_gives_on_the_cpu(regularizer, coupling):
    stated_case = with_program(regularizer, coupling)
    on_cpu, on_gpu = results(stated_case, "eager"), results(stated_case, "eager", "cuda")
    for name, value in on_cpu.items():
        tolerance = 1e-5 if name.startswith("grad") else 1e-6
        assert (on_gpu[name] - value).abs().max() <= tolerance * value.abs().max().clamp_min(0.1), name


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("coupling", ["none", "gram"])
def test_no_row_reads_a_later_row_or_another_document(coupling, backend):
    """Jacobian, and huge values in the future: not numbers have no solution, which is said of their own row."""
    short = dataclasses.replace(with_program("entropy", coupling), lengths=(3, 18), n=2, g=1, d=4)
    check_jacobian(short, backend)
    check_poisoned(short, backend, huge_values(), cuts=(2, 10, 20))


def test_utilities_shared_over_rows_are_caught(monkeypatch):
    honest = aggregation_eager._utilities

    def shared(*arguments):
        utilities = honest(*arguments)
        return utilities + utilities.mean(0, keepdim=True)

    monkeypatch.setattr(aggregation_eager, "_utilities", shared)
    short = dataclasses.replace(with_program("entropy", "none"), lengths=(3, 18), n=2, g=1, d=4)
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(short, "eager")
    with pytest.raises(AssertionError, match="read what they must not"):
        check_poisoned(short, "eager", huge_values(), cuts=(2, 10))


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_the_report_counts_every_row_and_head(backend, monkeypatch):
    stated_case = with_program("entropy", "none")
    values = leaves(stated_case, torch.float64)
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(stated_case)})
    inputs = (values["q"], values["k"], values["v"], start_rows(LENGTHS), parameters, stated_case.spec)
    report = maha_attention(*inputs, backend=backend).solves
    assert report.residual_tn.shape == (64, 4)
    assert report.steps_tn is None
    assert report.missed == 0
    monkeypatch.setattr("maha_megatron.attention.aggregation.stated_program.MISSED_ABOVE", -1.0)
    assert maha_attention(*inputs, backend=backend).solves.missed == 64 * 4


def bounded_case() -> tuple[Case, dict[str, torch.Tensor]]:
    """The first utility may be 2 at most; without the log-sum-exp it is <rho, q> + beta, and here 0."""
    program = StatedProgram(bounded_above, scales=len(WINDOWS), coupled=False, name="bounded")
    bounded = case("entropy", "none", "program", lse_utility=False, convolution=False, program=program)
    values = {name: value.detach().clone() for name, value in leaves(bounded, torch.float64).items()}
    values["utility_query"].zero_()
    values["utility_bias"].zero_()
    return bounded, values


def make_unsolvable(values: dict[str, torch.Tensor], row: int, head: int) -> None:
    """One query raises the first utility of its row and head above what the program allows."""
    values["query_gain"].fill_(1.0)
    values["q"][:, head] = -values["q"][:, head].abs()
    values["q"][row, head] *= -1
    values["utility_query"][0, head] = 1.0


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize(("row", "head"), [(0, 3), (37, 2)])
def test_a_row_and_head_without_a_solution_are_named(backend, row, head):
    bounded, values = bounded_case()
    assert attend(bounded, values, backend)["out"].shape == (64, 4, 8)
    make_unsolvable(values, row, head)
    with pytest.raises(UnsolvedProgram, match=r"bounded with . feasible scales is infeasible") as caught:
        attend(bounded, values, backend)
    assert (caught.value.row, caught.value.head) == (row, head)


def test_in_pieces_the_row_counts_over_all_streams():
    bounded, values = bounded_case()
    make_unsolvable(values, 37, 2)
    state = MahaState.initial(bounded.spec, streams=2, n=4, g=2, d=8, dtype=torch.float64)
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(bounded)})
    inputs = (values["q"], values["k"], values["v"], torch.zeros(64, dtype=torch.int64), parameters, bounded.spec)
    with pytest.raises(UnsolvedProgram, match="infeasible") as caught:
        maha_attention(*inputs, state=state)
    assert (caught.value.row, caught.value.head) == (37, 2)


def test_bf16_solves_in_double():
    stated_case = with_program("entropy", "gram")
    values = leaves(stated_case, torch.bfloat16)
    found = attend(stated_case, values, "eager")
    exact = attend(dataclasses.replace(stated_case, spec=case("entropy", "gram", "convex").spec), values, "eager")
    assert found["out"].dtype == torch.bfloat16
    assert (found["weights"] - exact["weights"]).abs().max() <= 1e-5

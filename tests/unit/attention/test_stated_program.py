"""Stated programs against the exact solvers, the worked examples, and what is said of every mistake."""

import itertools
import sys
import tracemalloc

import pytest
import torch

from configs.programs import budget
from maha_megatron.attention.aggregation import conic_layer, stated_program
from maha_megatron.attention.aggregation.solvers import gram_factor, gram_matrix, solve
from maha_megatron.attention.aggregation.stated_program import StatedProgram, UnsolvedProgram, load_program
from maha_megatron.errors import ProgramError
from tests.support.small_programs import complementarity
from tests.support.stated_programs import bounded_above, stated

MODULE = "tests.support.stated_programs"
ROWS, HEADS, SCALES, WIDTH = 64, 3, 4, 8


@pytest.fixture(scope="module")
def program(request):
    regularizer, coupled = request.param
    return StatedProgram(
        lambda m: stated(m, regularizer, coupled=coupled), scales=SCALES, coupled=coupled, name="stated"
    )


def inputs(magnitude: float):
    """Utilities, outputs and kappa of 64 tokens and 3 heads, and which scales the tokens see: the finest."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    payoff, outputs = magnitude * normal(ROWS * HEADS, SCALES), normal(ROWS * HEADS, SCALES, WIDTH)
    outputs[1::4, 1] = outputs[1::4, 0]  # equal outputs: G is singular
    kappa = magnitude * torch.rand(ROWS * HEADS, generator=generator, dtype=torch.float64)
    feasible = (torch.arange(SCALES) <= torch.arange(ROWS)[:, None] // 8).repeat_interleave(HEADS, 0)
    return [payoff.requires_grad_(), outputs.requires_grad_(), kappa.requires_grad_()], feasible


CASES = list(itertools.product(("entropy", "quadratic"), (False, True)))


@pytest.mark.parametrize("program", CASES, indirect=True, ids=lambda case: f"{case[0]}-{'gram' if case[1] else 'none'}")
@pytest.mark.parametrize("magnitude", [1.0, 5.0])
def test_a_stated_convex_program_equals_the_solver(program, magnitude, request):
    regularizer, coupled = request.node.callspec.params["program"]
    leaves, feasible = inputs(magnitude)
    payoff, outputs, kappa = leaves
    matrix = kappa[:, None, None] * gram_matrix(outputs, feasible) if coupled else outputs.new_zeros(1, SCALES, SCALES)
    factor = gram_factor(matrix) if coupled else None
    theirs, residual = program.solve(payoff, factor, feasible)
    ours = solve(matrix, payoff, feasible, regularizer).weights
    assert theirs.dtype == torch.float64
    assert (theirs - ours).abs().max() <= 1e-6
    assert residual.max() <= 1e-6
    margin = complementarity(matrix.detach(), payoff.detach(), feasible, ours.detach(), regularizer)
    away_from_ties = ((margin >= 1e-3) | (regularizer == "entropy")).double()  # with entropy there are none
    assert away_from_ties.mean() > 0.9
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4)).double() * away_from_ties[:, None]
    compared = leaves if coupled else leaves[:1]
    mine = torch.autograd.grad(theirs, compared, direction, retain_graph=True)
    exact = torch.autograd.grad(ours, compared, direction)
    for one, other in zip(mine, exact, strict=True):
        assert other.abs().max() > 1e-2
        assert (one - other).abs().max() <= 1e-5
    assert (theirs[~feasible] == 0).all()
    assert (mine[0][~feasible] == 0).all()
    assert not coupled or (mine[1][~feasible] == 0).all()


@pytest.mark.parametrize(("coupled", "values_to", "gradients_to"), [(False, 5e-7, 5e-6), (True, 1e-5, 2e-5)])
def test_no_gradient_explodes_where_weights_are_tiny(coupled, values_to, gradients_to):
    """Weights down to 1e-30: by diffcp's projection alone some of these gradients are off by 100 and more."""
    generator = torch.Generator().manual_seed(0)
    payoff = (20.0 * torch.randn(300, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    outputs = torch.randn(300, 4, WIDTH, generator=generator, dtype=torch.float64)
    matrix = 20.0 * gram_matrix(outputs, None) if coupled else torch.zeros(1, 4, 4, dtype=torch.float64)
    program = StatedProgram(lambda m: stated(m, "entropy", coupled=coupled), scales=4, coupled=coupled, name="stated")
    every = torch.ones(300, 4, dtype=torch.bool)
    theirs = program(payoff, gram_factor(matrix) if coupled else None, every)
    ours = solve(matrix, payoff, every, "entropy").weights
    assert ours.min() < 1e-25
    direction = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    mine, exact = (torch.autograd.grad(weights, payoff, direction)[0] for weights in (theirs, ours))
    assert (theirs - ours).abs().max() <= values_to
    assert (mine - exact).abs().max() <= gradients_to


def test_what_stands_at_infeasible_scales_is_not_read():
    program = StatedProgram(lambda m: stated(m, "entropy", coupled=False), scales=3, coupled=False, name="stated")
    feasible = torch.tensor([[True, True, False], [True, False, False]])
    payoff = torch.tensor([[0.5, 0.1, torch.nan], [1.0, -torch.inf, torch.nan]], requires_grad=True)
    weights = program(payoff, None, feasible)
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), payoff)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(grad).all()
    assert weights[1].tolist() == [1.0, 0.0, 0.0]
    assert grad.dtype == torch.float32


def test_gradients_of_a_mean_over_many_tokens_are_not_lost():
    """diffcp alone takes incoming gradients below 1e-8 for zero."""
    program = StatedProgram(lambda m: stated(m, "entropy", coupled=False), scales=3, coupled=False, name="stated")
    payoff = torch.tensor([[0.5, 0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    weights = program(payoff, None, torch.ones(1, 3, dtype=torch.bool))
    large, small = (torch.autograd.grad(size * weights[0, 0], payoff, retain_graph=True)[0] for size in (1.0, 1e-12))
    assert large.abs().max() > 0.1
    torch.testing.assert_close(small * 1e12, large)


def test_programs_a_few_at_a_time_are_the_same_and_bound_the_memory(monkeypatch):
    """Beside what is kept of every program there is only the working memory of those at hand."""
    program = StatedProgram(lambda m: stated(m, "entropy", coupled=True), scales=8, coupled=True, name="stated")
    generator = torch.Generator().manual_seed(0)
    payoff = torch.randn(100, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    factor = gram_factor(gram_matrix(torch.randn(100, 8, WIDTH, generator=generator, dtype=torch.float64), None))
    direction = torch.randn(100, 8, generator=generator, dtype=torch.float64)

    def run(count):
        tracemalloc.start()
        weights, residual = program.solve(payoff[:count], factor[:count], torch.ones(count, 8, dtype=torch.bool))
        kept, forward_peak = tracemalloc.get_traced_memory()
        (grad,) = torch.autograd.grad(weights, payoff, direction[:count])
        backward_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return (weights, residual, grad), (kept, forward_peak, backward_peak)

    whole, _ = run(100)
    monkeypatch.setattr(conic_layer, "PROGRAMS_AT_ONCE", 30)
    parts, large = run(100)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    _, small = run(30)
    table = 8 * (43 + 17 + 1) ** 2  # bytes of one Q
    assert all(more - less < 70 * table / 2 for more, less in zip(large, small, strict=True)), (large, small)


def test_the_budget_example_obeys_its_constraints():
    leaves, feasible = inputs(5.0)
    program = load_program("configs.programs.budget:build", scales=SCALES, coupling="none")
    weights = program(leaves[0], None, feasible).detach()
    free = solve(torch.zeros(1, SCALES, SCALES), leaves[0].detach(), feasible, "entropy").weights
    cost = budget.COST ** torch.arange(SCALES)
    several, coarsest = feasible.sum(1) > 1, feasible.sum(1, keepdim=True) - 1
    assert (weights.sum(1) - 1).abs().max() <= 1e-6
    assert weights.min() >= -1e-6
    assert (weights @ cost.double())[several].max() <= budget.BUDGET + 1e-6
    assert weights.gather(1, coarsest)[several].min() >= budget.FLOOR - 1e-6
    assert ((free @ cost.double()) > budget.BUDGET)[several].any(), "without the budget it would be kept too"
    assert (free.gather(1, coarsest) < budget.FLOOR)[several].any(), "without the floor it would be kept too"
    assert ((weights - free).abs().max(1).values > 0.05).float().mean() > 0.2


@pytest.mark.parametrize("coupled", [False, True])
def test_the_entropy_example_is_the_default_aggregation(coupled):
    leaves, feasible = inputs(1.0)
    name, coupling = ("build_coupled", "gram") if coupled else ("build", "none")
    program = load_program(f"configs.programs.entropy:{name}", scales=SCALES, coupling=coupling)
    matrix = 0.3 * gram_matrix(leaves[1], feasible) if coupled else torch.zeros(1, SCALES, SCALES)
    weights = program(leaves[0], gram_factor(matrix) if coupled else None, feasible)
    assert (weights - solve(matrix, leaves[0], feasible, "entropy").weights).abs().max() <= 1e-6


def test_gradients_pass_through_every_place_of_a_parameter():
    """Utilities as a matrix, a bound and a cost, each constraint active; against difference quotients."""

    def build(m):
        bounds = (lambda w, c: [(c + 3) @ w <= 3.6, w[0] <= 0.2 + 0.1 * c[1]]) if m == 3 else (lambda w, c: [])
        return stated(m, "entropy", coupled=False, constraints=bounds)

    program = StatedProgram(build, scales=3, coupled=False, name="placed")
    payoff = torch.tensor([[1.1, 0.9, -0.4]], dtype=torch.float64, requires_grad=True)
    every = torch.ones(1, 3, dtype=torch.bool)
    weights = program(payoff, None, every).detach()
    assert (payoff.detach() @ weights.T).item() == pytest.approx(0.6, abs=1e-6)
    assert weights[0, 0].item() == pytest.approx(0.29, abs=1e-6)
    (jacobian,) = torch.autograd.functional.jacobian(lambda c: program(c, None, every)[0], payoff).unbind(1)
    step = 1e-4
    for place in range(3):
        moved = [payoff.detach() + sign * step * torch.eye(3).double()[place] for sign in (1, -1)]
        quotient = (program(moved[0], None, every) - program(moved[1], None, every))[0] / (2 * step)
        assert (jacobian[:, place] - quotient).abs().max() <= 1e-4


# ------------------------------------------------------------------------------------------------------- the factor


def test_the_factor_is_one_of_the_matrix_and_keeps_its_blocks():
    leaves, feasible = inputs(1.0)
    matrix = gram_matrix(leaves[1], feasible)
    factor = gram_factor(matrix.float())
    assert factor.dtype == torch.float64
    assert (factor.mT @ factor - matrix).abs().max() <= 1e-6
    assert torch.linalg.eigvalsh(matrix)[2::4].min() < 1e-12, "no singular matrix among them"
    outside = ~(feasible[:, :, None] & feasible[:, None])
    assert gram_factor(matrix)[outside].abs().max() <= 1e-7
    for m in range(1, SCALES + 1):
        block = gram_factor(matrix)[:, :m, :m][feasible.sum(1) == m]
        assert (block.mT @ block - matrix[:, :m, :m][feasible.sum(1) == m]).abs().max() <= 1e-12


def test_the_factors_gradient_is_the_matrixs_also_where_outputs_are_equal():
    """With L(H'H) for a smooth L: the gradient of O through H is the one that needs no H."""
    leaves, feasible = inputs(1.0)
    outputs = leaves[1]
    target = torch.randn(SCALES, SCALES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss(matrix):
        return ((matrix @ target) ** 2).sum()

    matrix = gram_matrix(outputs, feasible)
    factor = gram_factor(matrix)
    (direct,) = torch.autograd.grad(loss(matrix), outputs, retain_graph=True)
    (through,) = torch.autograd.grad(loss(factor.mT @ factor), outputs)
    assert (direct - through).abs().max() <= 1e-7 * direct.abs().max()


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("plain", r"plain\(1\) returns a Problem; return a ScaleProgram"),
        ("column", r"column\(1\): weights has shape \(1, 1\); it must be \(1,\) for 1 scales"),
        ("wide", r"utilities has shape \(2,\); it must be \(1,\)"),
        ("another_parameter", "the parameters ceiling are not ScaleProgram.utilities or gram_factor; use numbers"),
        ("unused_utilities", "the parameters .*idle.* are not ScaleProgram.utilities"),
        ("other_weights", "the weights do not occur in the problem"),
        ("not_dpp", "the problem is not DPP, since it multiplies parameters with each other"),
        ("not_convex", "the problem is not convex; state it by cvxpy's rules"),
        ("integral", "cvxpylayers cannot differentiate this problem"),
        ("no_entropy", r"no_entropy\(1\) is unbounded at utilities"),
        ("off_simplex", r"gives weights \[2.0\] at utilities \[0.0\], off the simplex; add the constraints"),
        (
            "below_zero",
            r"below_zero\(2\) gives weights \[.*-.*\] at utilities .*, off the simplex; add",
        ),
        ("never_alone", r"never_alone\(1\) is infeasible at utilities .*every number of feasible scales .* 1 included"),
        ("raising", r"raising\(1\) raised KeyError: 'ceiling'"),
        ("entropy_coupled", "has a gram_factor, but maha.coupling is none .* set maha.coupling: gram, or remove it"),
        ("nothing", "has no function nothing; name one that it has"),
        ("NOT_A_FUNCTION", "has no function NOT_A_FUNCTION"),
    ],
)
def test_a_mistake_is_named_at_the_start(function, said):
    with pytest.raises(ProgramError, match=said):
        load_program(f"{MODULE}:{function}", scales=2, coupling="none")


def test_a_program_without_a_factor_is_refused_with_coupling():
    with pytest.raises(ProgramError, match=r"has no gram_factor, but maha.coupling is gram; state the coupling"):
        load_program(f"{MODULE}:entropy", scales=2, coupling="gram")


@pytest.mark.parametrize("name", ["module", "module:", ":build", ""])
def test_a_name_must_be_a_module_and_a_function(name):
    with pytest.raises(ProgramError, match="is no module:function"):
        load_program(name, scales=2, coupling="none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "broken_program cannot be imported .*PYTHONPATH.*ModuleNotFoundError"),
        ("import nowhere_to_be_found", "broken_program cannot be imported .*No module named 'nowhere_to_be_found'"),
        ("1 / 0", "broken_program cannot be imported .*ZeroDivisionError"),
    ],
)
def test_a_module_that_does_not_import_is_named(text, said, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "broken_program.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProgramError, match=said):
        load_program("broken_program:build", scales=2, coupling="none")


@pytest.mark.parametrize("package", ["cvxpy", "cvxpylayers.torch", "diffcp"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ProgramError, match=f"needs the package {package.split('.')[0]}.*pip install cvxpylayers"):
        load_program(f"{MODULE}:entropy", scales=2, coupling="none")


# --------------------------------------------------------------------------------------------------- at run time


@pytest.fixture(scope="module")
def bounded():
    return StatedProgram(bounded_above, scales=3, coupled=False, name="bounded")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((5, 0), 2.5, "bounded with 3 feasible scales is infeasible"),
        ((4, 0), 2.5, "bounded with 1 feasible scales is infeasible"),
        ((5, 1), torch.nan, "bounded with 3 feasible scales is not solved"),
    ],
)
def test_a_row_without_a_solution_is_named(bounded, place, value, said):
    payoff = torch.zeros(7, 3, dtype=torch.float64)
    feasible = torch.ones(7, 3, dtype=torch.bool)
    feasible[4, 1:] = False
    assert bounded(payoff, None, feasible).shape == (7, 3)
    payoff[place] = value
    with pytest.raises(UnsolvedProgram, match=said) as caught:
        bounded(payoff, None, feasible)
    assert caught.value.row == place[0]


def test_a_poor_solution_is_no_solution(bounded, monkeypatch):
    monkeypatch.setattr(stated_program, "UNSOLVED_ABOVE", 0.0)
    with pytest.raises(UnsolvedProgram, match=r"is not solved .relative residual"):
        bounded(torch.zeros(1, 3), None, torch.ones(1, 3, dtype=torch.bool))


def test_feasible_scales_must_be_the_finest(bounded):
    with pytest.raises(AssertionError, match="finest"):
        bounded(torch.zeros(1, 3), None, torch.tensor([[True, False, True]]))

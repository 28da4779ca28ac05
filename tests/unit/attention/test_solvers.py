"""The small-program solvers: optimality, uniqueness, implicit gradients, exact zeros, honest counts.

Their comparison with cvxpylayers is in test_solvers_oracle.py.
"""

import itertools

import pytest
import torch

from maha_megatron.attention.aggregation import entropy, solvers
from maha_megatron.attention.aggregation.programs import gather_programs
from maha_megatron.attention.aggregation.solvers import REGULARIZERS, TOLERANCE, gram_matrix, skew_matrix, solve
from maha_megatron.attention.aggregation.uncoupled import uncoupled_weights
from tests.support.everyday import everyday
from tests.support.small_programs import complementarity, random_programs, relative_residual, restricted

ALL_SCALES = range(2, 9)
KINDS = pytest.mark.parametrize("kind", REGULARIZERS)
SCALES = pytest.mark.parametrize("scales", ALL_SCALES)
# both sides of four scales, where another path begins
FEW_SCALES = pytest.mark.parametrize("scales", everyday(ALL_SCALES, lambda scales: scales in (4, 5)))


def everyday_and_full(few, many):
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.full)])


@KINDS
@SCALES
@everyday_and_full(2000, 20_000)
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 30.0), (torch.float64, 30.0), (torch.float64, 1e4)])
def test_every_program_meets_its_optimality_conditions(kind, scales, count, dtype, largest):
    matrix, payoff, feasible = random_programs(count, scales, largest=largest, seed=scales)
    matrix, payoff = matrix.to(dtype), payoff.to(dtype)
    result = solve(matrix, payoff, feasible, kind)
    assert result.weights.dtype == dtype
    assert result.missed == 0
    assert result.residual.max() <= TOLERANCE[dtype]
    assert relative_residual(matrix, payoff, feasible, result.weights, kind).max() <= TOLERANCE[dtype]
    assert (result.weights >= 0).all()
    torch.testing.assert_close(
        result.weights.sum(-1), torch.ones_like(payoff[:, 0]), rtol=0, atol=4 * torch.finfo(dtype).eps
    )


@SCALES
@everyday_and_full(200, 20_000)
def test_every_optimal_support_gives_the_same_weights(scales, count):
    matrix, payoff, feasible = random_programs(count, scales, largest=30.0, seed=100 + scales)
    weights = solve(matrix, payoff, feasible, "quadratic").weights
    plain_matrix, plain_payoff = restricted(matrix, payoff, feasible)
    optimal = torch.zeros(count, dtype=torch.int64)
    for size in range(1, scales + 1):
        for support in map(list, itertools.combinations(range(scales), size)):
            system = torch.ones(count, size + 1, size + 1, dtype=torch.float64)
            system[:, :size, :size] = plain_matrix[:, support][:, :, support] + torch.eye(size, dtype=torch.float64)
            system[:, size, size] = 0.0
            right = torch.ones(count, size + 1, dtype=torch.float64)
            right[:, :size] = plain_payoff[:, support]
            candidate = torch.zeros_like(weights)
            candidate[:, support] = torch.linalg.solve(system, right)[:, :size]
            residual = relative_residual(matrix, payoff, feasible, candidate, "quadratic")
            here = (residual <= 1e-11) & feasible[:, support].all(1)
            optimal += here
            if here.any():
                assert (weights - candidate)[here].abs().max() <= 1e-6
    assert (optimal >= 1).all()
    assert (optimal >= 2).any(), "no tie among the programs: the test shows less than it says"


@FEW_SCALES
def test_fifty_random_starts_agree_with_entropy(scales):
    matrix, payoff, feasible = random_programs(100, scales, largest=30.0, seed=200 + scales)
    weights = solve(matrix, payoff, feasible, "entropy").weights
    programs = gather_programs(matrix, payoff, feasible)
    generator = torch.Generator().manual_seed(scales)
    for _ in range(50):
        start_lp = 10.0 * torch.randn(scales, 100, generator=generator, dtype=torch.float64)
        _, solution = entropy.newton(programs, start_lp, steps=200, target=1e-13)
        assert (solution.weight_lp.t() - weights).abs().max() <= 1e-6


@FEW_SCALES
def test_fifty_random_starts_agree_with_the_quadratic(scales):
    """w <- projection of w - step (w + M w - c) onto the simplex contracts, from anywhere, for a small enough step."""
    matrix, payoff, feasible = random_programs(100, scales, largest=1.0, seed=300 + scales)
    weights = solve(matrix, payoff, feasible, "quadratic").weights
    plain_matrix, plain_payoff = restricted(matrix, payoff, feasible)
    system = plain_matrix + torch.eye(scales, dtype=torch.float64)
    step = 1.0 / torch.linalg.matrix_norm(system, 2)[:, None].square()
    starts = torch.rand(50, 100, scales, generator=torch.Generator().manual_seed(scales), dtype=torch.float64)
    for _ in range(25 * int((1.0 / step).max())):
        force = (system @ starts[..., None])[..., 0] - plain_payoff
        starts = uncoupled_weights(starts - step * force, feasible, "quadratic")
    assert (starts - weights).abs().max() <= 1e-6


@KINDS
@SCALES
def test_the_order_of_the_scales_does_not_matter(kind, scales):
    matrix, payoff, feasible = random_programs(300, scales, largest=30.0, seed=400 + scales)
    order = torch.randperm(scales, generator=torch.Generator().manual_seed(scales))
    weights = solve(matrix, payoff, feasible, kind).weights
    permuted = solve(matrix[:, order][:, :, order], payoff[:, order], feasible[:, order], kind).weights
    assert (permuted - weights[:, order]).abs().max() <= 1e-9


@KINDS
@pytest.mark.parametrize("scales", everyday((2, 3, 4, 5, 8), lambda scales: scales < 8))
def test_gradients_pass_gradcheck(kind, scales):
    matrix, payoff, feasible = random_programs(60, scales, largest=3.0, seed=500 + scales)
    weights = solve(matrix, payoff, feasible, kind).weights
    matrix, payoff = restricted(matrix, payoff, feasible)
    smooth = (complementarity(matrix, payoff, feasible, weights, kind) > 1e-2).nonzero()[:4, 0]
    assert smooth.numel() == 4
    matrix, payoff = matrix[smooth].requires_grad_(), payoff[smooth].requires_grad_()
    assert torch.autograd.gradcheck(lambda m, c: solve(m, c, feasible[smooth], kind).weights, (matrix, payoff))


@KINDS
@pytest.mark.parametrize("scales", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("dtype", "largest", "tolerance"), [(torch.float32, 30.0, 1e-5), (torch.float64, 1e4, 1e-10)])
def test_gradients_are_the_linearised_equilibrium(kind, scales, dtype, largest, tolerance):
    """Against a pivoting solve of (I + D M' D) z + nu D 1 = D g, 1' D z = 0, on the weights' own support."""
    matrix, payoff, feasible = random_programs(500, scales, largest=largest, seed=550 + scales)
    matrix, payoff = matrix.to(dtype).requires_grad_(), payoff.to(dtype).requires_grad_()
    weights = solve(matrix, payoff, feasible, kind).weights
    incoming = torch.randn(weights.shape, generator=torch.Generator().manual_seed(scales)).to(dtype)
    grad_matrix, grad_payoff = torch.autograd.grad(weights, (matrix, payoff), incoming)

    weights, incoming = weights.detach().double(), incoming.double()
    plain_matrix, _ = restricted(matrix.detach(), payoff.detach(), feasible)
    smallest = torch.finfo(dtype).eps * largest if kind == "quadratic" else 0.0
    scaling = (weights > smallest).double() if kind == "quadratic" else weights.sqrt()
    system = torch.zeros(500, scales + 1, scales + 1, dtype=torch.float64)
    system[:, :scales, :scales] = scaling[:, :, None] * plain_matrix.mT * scaling[:, None]
    system[:, :scales, :scales] += torch.eye(scales, dtype=torch.float64)
    system[:, :scales, scales] = system[:, scales, :scales] = scaling
    right = torch.cat((scaling * incoming, torch.zeros(500, 1, dtype=torch.float64)), -1)
    expected = scaling * torch.linalg.solve(system, right)[:, :scales]
    clear = ~((weights > 0) & (weights <= 10.0 * smallest)).any(
        -1
    )  # whether so small a weight counts is a matter of taste
    assert clear.float().mean() > 0.9
    assert (grad_payoff.double() - expected)[clear].abs().max() <= tolerance
    expected_matrix = -expected[:, :, None] * weights[:, None]
    assert (grad_matrix.double() - expected_matrix)[clear].abs().max() <= tolerance


@pytest.mark.parametrize("scales", [3, 4, 5, 8])
def test_scales_that_leave_at_a_tie_are_outside_the_support(scales):
    """c is made so that some scales have weight 0 and slack 0: their gradient is 0 whichever way the path came."""
    matrix, _, _ = random_programs(300, scales, largest=10.0, seed=580 + scales)
    matrix = matrix.nan_to_num(0.0)
    generator = torch.Generator().manual_seed(scales)
    weights = torch.rand(300, scales, generator=generator, dtype=torch.float64) + 0.1
    weights = weights * (torch.rand(300, scales, generator=generator) < 0.5)
    weights[:, 0] += 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    payoff = (weights + (matrix @ weights[..., None])[..., 0]).requires_grad_()
    solved = solve(matrix, payoff, None, "quadratic").weights
    assert (solved - weights).abs().max() <= 1e-12
    (grad,) = torch.autograd.grad(solved, payoff, torch.randn(solved.shape, generator=generator).double())
    assert (grad[weights == 0] == 0).all()
    assert (grad[weights > 0] != 0).any()


@KINDS
@SCALES
def test_gradients_are_no_longer_than_what_comes_in(kind, scales):
    """|dL/dc| <= |dL/dw|: strong monotonicity with lambda = 1. Nothing explodes through a solve, at 1e4 either."""
    matrix, payoff, feasible = random_programs(500, scales, largest=1e4, seed=600 + scales)
    matrix, payoff = matrix.requires_grad_(), payoff.requires_grad_()
    weights = solve(matrix, payoff, feasible, kind).weights
    incoming = torch.randn(weights.shape, generator=torch.Generator().manual_seed(scales), dtype=torch.float64)
    grad_matrix, grad_payoff = torch.autograd.grad(weights, (matrix, payoff), incoming)
    bound = incoming.norm(dim=-1) * (1.0 + 1e-9)
    assert (grad_payoff.norm(dim=-1) <= bound).all()
    assert (grad_matrix.flatten(1).norm(dim=-1) <= bound).all()
    torch.testing.assert_close(grad_payoff.sum(-1), torch.zeros(500, dtype=torch.float64), rtol=0, atol=1e-9)


@KINDS
@SCALES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_the_payoffs_sum_to_zero(kind, scales, dtype):
    """All payoffs raised alike change no weight; of nearly equal incoming gradients only rounding would be left."""
    matrix, payoff, feasible = random_programs(500, scales, largest=30.0, seed=650 + scales)
    matrix, payoff = matrix.to(dtype), payoff.to(dtype).requires_grad_()
    weights = solve(matrix, payoff, feasible, kind).weights
    generator = torch.Generator().manual_seed(scales)
    incoming = (1.0 + 1e-3 * torch.randn(weights.shape, generator=generator, dtype=torch.float64)).to(dtype)
    (grad,) = torch.autograd.grad(weights, payoff, incoming)
    assert grad.abs().max() > 1e-4
    eps = torch.finfo(dtype).eps
    rounding = 2.0 * eps * grad.double().abs().sum(-1) + 8.0 * eps**2  # eps^2: where a weight is 1 but for rounding
    assert (grad.double().sum(-1).abs() <= rounding).all()


@KINDS
@SCALES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_infeasible_scales_have_no_weight_and_no_gradient(kind, scales, dtype):
    matrix, payoff, feasible = random_programs(200, scales, largest=5.0, seed=700 + scales)
    feasible[0] = False  # no feasible scale at all: no weight anywhere
    matrix, payoff = matrix.to(dtype).requires_grad_(), payoff.to(dtype).requires_grad_()
    result = solve(matrix, payoff.masked_fill(~feasible, -torch.inf), feasible, kind)
    assert result.missed == 0
    assert (result.weights[~feasible] == 0).all()
    incoming = torch.ones_like(result.weights).cumsum(-1)
    grad_matrix, grad_payoff = torch.autograd.grad(result.weights, (matrix, payoff), incoming)
    assert (grad_payoff[~feasible] == 0).all()
    assert (grad_matrix[~(feasible[:, :, None] & feasible[:, None])] == 0).all()
    assert grad_payoff.isfinite().all()
    assert grad_matrix.isfinite().all()
    assert (grad_payoff[feasible] != 0).any()


@pytest.mark.parametrize("scales", [2, 4, 5, 8])
def test_at_a_tie_the_smallest_support_gives_the_gradient(scales):
    """c = (1, 0, -9, ..): scale 1 has no weight and no slack. On {0} the weights are fixed; on {0, 1} they are not."""
    payoff = torch.full((1, scales), -9.0, dtype=torch.float64)
    payoff[0, :2] = torch.tensor([1.0, 0.0])
    for swap in (False, True):
        tied = (payoff.flip(-1) if swap else payoff).requires_grad_()
        matrix = torch.zeros(1, scales, scales, dtype=torch.float64)
        weights = solve(matrix, tied, None, "quadratic").weights
        (grad,) = torch.autograd.grad(weights, tied, torch.randn_like(weights))
        assert weights.max() == 1.0
        assert (grad == 0).all()
        (grad,) = torch.autograd.grad(uncoupled_weights(tied, None, "quadratic"), tied, torch.randn_like(weights))
        assert (grad == 0).all()


@SCALES
def test_without_coupling_it_is_softmax_and_sparsemax(scales):
    sparsemax = pytest.importorskip("entmax").sparsemax
    _, payoff, feasible = random_programs(2000, scales, largest=30.0, seed=800 + scales)
    matrix = torch.zeros(2000, scales, scales, dtype=torch.float64)
    masked = payoff.masked_fill(~feasible, -torch.inf)
    finite = payoff.masked_fill(~feasible, -1e6)  # entmax has no masks
    witnesses = {"entropy": torch.softmax(masked, -1), "quadratic": sparsemax(finite, dim=-1)}
    for kind, expected in witnesses.items():
        assert (solve(matrix, payoff, feasible, kind).weights - expected).abs().max() <= 1e-12
        assert (uncoupled_weights(payoff, feasible, kind) - expected).abs().max() <= 1e-12


@KINDS
def test_closed_forms_have_the_gradients_of_the_solver(kind):
    _, payoff, feasible = random_programs(300, 5, largest=3.0, seed=9)
    matrix = torch.zeros(300, 5, 5, dtype=torch.float64)
    payoff = payoff.requires_grad_()
    incoming = torch.randn(300, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solved = torch.autograd.grad(solve(matrix, payoff, feasible, kind).weights, payoff, incoming)[0]
    closed = torch.autograd.grad(uncoupled_weights(payoff, feasible, kind), payoff, incoming)[0]
    weights = uncoupled_weights(payoff, feasible, kind).detach()
    strict = complementarity(matrix, payoff.detach(), feasible, weights, kind) > 1e-9
    assert strict.sum() > 150
    assert (solved - closed)[strict].abs().max() <= 1e-12
    assert (closed[~feasible] == 0).all()


@KINDS
def test_the_skew_part_of_two_feasible_scales_is_a_change_of_utility(kind):
    matrix, payoff, _ = random_programs(500, 4, largest=5.0, seed=10, skew=False)
    feasible = torch.tensor([False, True, False, True]).expand(500, 4)
    matrix, payoff = torch.nan_to_num(matrix), torch.nan_to_num(payoff)
    upper = torch.randn(500, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    nash = solve(matrix + skew_matrix(upper), payoff, feasible, kind).weights
    shift = torch.zeros_like(payoff)
    shift[:, 1] = skew_matrix(upper)[:, 1, 3]
    assert (nash - solve(matrix, payoff - shift, feasible, kind).weights).abs().max() <= 1e-11


@KINDS
def test_a_miss_is_counted_and_the_rescue_leaves_none(kind, monkeypatch):
    monkeypatch.setattr(solvers, "PATH_STEPS_PER_SCALE", 1)  # no program misses with the usual number
    matrix, payoff, feasible = random_programs(4000, 8, largest=1e4, seed=11)
    payoff = payoff.masked_fill(~feasible, 0.0)
    fixed = solve(matrix, payoff, feasible, kind, rescue=False)
    assert fixed.missed == (fixed.residual > TOLERANCE[torch.float64]).sum()
    assert fixed.missed > 0
    assert relative_residual(matrix, payoff, feasible, fixed.weights, kind).max() > 1e-6
    rescued = solve(matrix, payoff, feasible, kind)
    assert rescued.missed == 0
    assert rescued.steps.max() > fixed.steps.max()
    payoff[7] = torch.nan
    poisoned = solve(matrix, payoff, feasible, kind)
    assert poisoned.missed == 1
    assert poisoned.weights[7][feasible[7]].isnan().all()
    assert poisoned.weights[torch.arange(4000) != 7].isfinite().all()


@KINDS
def test_typical_programs_need_no_rescue(kind):
    """Normalised outputs, kappa = 0.1, a small skew part, utilities of a few nats: the fixed steps do, in float32."""
    generator = torch.Generator().manual_seed(12)
    for scales in ALL_SCALES:
        outputs = torch.randn(4096, scales, 16, generator=generator)
        skew = 0.3 * torch.randn(4096, scales * (scales - 1) // 2, generator=generator)
        matrix = 0.1 * gram_matrix(outputs, None) + skew_matrix(skew)
        payoff = 2.0 * torch.randn(4096, scales, generator=generator)
        result = solve(matrix, payoff, None, kind, rescue=False)
        exact = solve(matrix.double(), payoff.double(), None, kind)
        assert result.missed == 0
        assert (result.weights - exact.weights).abs().max() <= 1e-5
        if kind == "entropy":
            assert result.steps.float().mean() <= 5


@KINDS
def test_leading_dimensions_broadcast(kind):
    generator = torch.Generator().manual_seed(13)
    skew = skew_matrix(torch.randn(3, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    payoff = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    together = solve(skew, payoff, None, kind).weights
    one_by_one = torch.stack([solve(skew, row, None, kind).weights for row in payoff])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-14)
    (grad,) = torch.autograd.grad(together.square().sum(), skew)
    (expected,) = torch.autograd.grad(one_by_one.square().sum(), skew)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-14)


def test_gram_matrix_is_the_definition():
    generator = torch.Generator().manual_seed(14)
    outputs = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    feasible = torch.tensor([True, False, True, True]).expand(6, 4)
    gram = gram_matrix(outputs, feasible)
    for token in range(6):
        mean_square = sum(outputs[token, scale].square().sum() for scale in (0, 2, 3)) / 3
        for i, j in itertools.product(range(4), repeat=2):
            expected = outputs[token, i] @ outputs[token, j] / (mean_square + 1e-6) if i != 1 and j != 1 else 0.0
            assert abs(gram[token, i, j] - expected) <= 1e-14
    assert torch.autograd.gradcheck(lambda o: gram_matrix(o, feasible), (outputs.requires_grad_(),))
    (grad,) = torch.autograd.grad(gram_matrix(outputs, feasible).sum(), outputs)
    assert (grad[:, 1] == 0).all()
    assert gram_matrix(outputs.bfloat16(), None).dtype == torch.float32


def test_the_range_of_outputs_in_a_gram_matrix():
    """Whatever the size of the outputs up to 1e18, G and its gradient are those of outputs of size 1."""
    outputs = torch.randn(50, 4, 16, generator=torch.Generator().manual_seed(16))
    outputs /= outputs.norm(dim=-1, keepdim=True)
    direction = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(17))

    def gram_and_gradient(size):
        scaled = (size * outputs).requires_grad_()
        gram = gram_matrix(scaled, None)
        return gram.detach(), size * torch.autograd.grad(gram, scaled, direction)[0]

    for one, other in zip(gram_and_gradient(1e18), gram_and_gradient(1e3), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    beyond, _ = gram_and_gradient(1e20)
    assert not beyond.isfinite().any()
    assert solve(beyond, torch.zeros(50, 4), None, "entropy").missed == 50


def test_skew_matrix_fills_the_upper_triangle_in_row_order():
    expected = torch.tensor([[[0.0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]])
    assert torch.equal(skew_matrix(torch.arange(1.0, 7.0)[None]), expected)
    assert skew_matrix(torch.zeros(2, 0)).shape == (2, 1, 1)
    with pytest.raises(ValueError, match="5 entries"):
        skew_matrix(torch.zeros(2, 5))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="entropy, quadratic"):
        solve(torch.zeros(2, 2), torch.zeros(2), None, "entropic")
    with pytest.raises(ValueError, match="must end in"):
        solve(torch.zeros(3, 3), torch.zeros(2), None, "entropy")
    with pytest.raises(ValueError, match="must end in"):
        solve(torch.zeros(2, 2), torch.zeros(2), torch.ones(3, dtype=torch.bool), "entropy")
    with pytest.raises(ValueError, match="L <= 8"):
        solve(torch.zeros(9, 9), torch.zeros(9), None, "entropy")
    with pytest.raises(ValueError, match="regularizer"):
        uncoupled_weights(torch.zeros(2), None, "l1")


@KINDS
@SCALES
def test_without_rescue_nothing_depends_on_values(kind, scales):
    """On the meta device, which has no values, whatever would wait for a device's raises."""
    matrix = torch.empty(3, 2, scales, scales, device="meta", requires_grad=True)
    payoff = torch.empty(3, 2, scales, device="meta", requires_grad=True)
    feasible = torch.empty(3, 2, scales, device="meta", dtype=torch.bool)
    result = solve(matrix, payoff, feasible, kind, rescue=False)
    torch.autograd.grad(result.weights, (matrix, payoff), torch.empty_like(result.weights))
    assert result.residual.shape == result.steps.shape == (3, 2)
    with pytest.raises(NotImplementedError, match="meta"):
        solve(matrix, payoff, feasible, kind)


@pytest.mark.gpu
@KINDS
@SCALES
def test_without_rescue_nothing_waits_for_the_device(kind, scales):
    matrix, payoff, feasible = random_programs(1000, scales, largest=3.0, seed=15)
    on_host = solve(matrix, payoff, feasible, kind)
    matrix, payoff, feasible = matrix.cuda().requires_grad_(), payoff.cuda().requires_grad_(), feasible.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = solve(matrix, payoff, feasible, kind, rescue=False)
        torch.autograd.grad(result.weights, (matrix, payoff), torch.ones_like(result.weights))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    solved = result.residual <= TOLERANCE[torch.float64]
    assert solved.float().mean() > 0.95
    assert (result.weights.cpu() - on_host.weights)[solved.cpu()].abs().max() <= 1e-9

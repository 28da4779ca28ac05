"""The solvers against cvxpylayers (Clarabel, diffcp): the convex program as it stands, and the gap program of the game.

The oracle errs too. A conic solver finds the minimiser of an objective only to the square root of what it resolves of
that objective, so a few of the convex program's weights are off by up to 1e-5: there ours must have the objective that
is no higher. Of diffcp's gradients one in some hundreds is off by up to 3e-5: there a difference quotient decides. The
gap program, whose constraints are linear in the weights, has no such excuse.
"""

import pytest
import torch

from maha_megatron.attention.aggregation.cvxpy_oracle import oracle_weights
from maha_megatron.attention.aggregation.solvers import REGULARIZERS, skew_matrix, solve
from tests.support.small_programs import complementarity

CASES = [pytest.param(scales, 12, id=f"{scales}-12") for scales in (2, 4, 5)]
CASES += [pytest.param(scales, 200, id=f"{scales}-200", marks=pytest.mark.full) for scales in range(2, 9)]
SCALES_AND_COUNT = pytest.mark.parametrize(("scales", "count"), CASES)
KINDS = pytest.mark.parametrize("kind", REGULARIZERS)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in cvxpylayers


def random_inputs(count, scales, with_skew):
    """H with H'H = kappa G, the upper triangle of A (0 without skew), c: magnitudes 0.03 .. 30; and dL/dw."""
    generator = torch.Generator().manual_seed(1000 * scales + with_skew)

    def signed(*shape):
        return 2.0 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1.0

    def magnitude(*shape):
        return 30.0 * 10.0 ** (1.5 * signed(*shape) - 1.5)

    factor = signed(count, scales, scales)
    factor = factor / factor.square().sum((1, 2), keepdim=True).div(scales).sqrt() * magnitude(count, 1, 1).sqrt()
    upper = magnitude(count, 1) * signed(count, scales * (scales - 1) // 2) * with_skew
    payoff = magnitude(count, 1) * signed(count, scales)
    return [tensor.requires_grad_() for tensor in (factor, upper, payoff)], signed(count, scales)


def solve_inputs(factor, upper, payoff, kind):
    return solve(factor.mT @ factor + skew_matrix(upper), payoff, None, kind).weights


def compare_gradients(leaves, compared, ours, theirs, incoming, kind):
    """Gradients of the `compared` leaves to 1e-5 where complementarity is strict, or a difference quotient decides."""
    factor, upper, payoff = (leaf.detach() for leaf in leaves)
    matrix = factor.mT @ factor + skew_matrix(upper)
    margin = complementarity(matrix, payoff, torch.ones_like(payoff, dtype=torch.bool), ours.detach(), kind)
    strict = margin >= 1e-3
    assert strict.float().mean() > 0.4
    our_gradients = torch.autograd.grad(ours, [leaves[place] for place in compared], incoming)
    their_gradients = torch.autograd.grad(theirs, [leaves[place] for place in compared], incoming)
    error = torch.stack(
        [(mine - other).abs().flatten(1).amax(1) for mine, other in zip(our_gradients, their_gradients, strict=True)]
    )
    far = strict & (error.amax(0) > 1e-5)
    assert far.sum() <= 0.02 * len(far)
    step = 1e-6
    for program in far.nonzero()[:, 0]:
        for place, gradient in zip(compared, our_gradients, strict=True):
            direction = torch.randn(gradient[program].shape, generator=torch.Generator().manual_seed(1)).double()
            losses = []
            for sign in (1.0, -1.0):
                moved = [part[program].clone() for part in (factor, upper, payoff)]
                moved[place] += sign * step * direction
                losses.append(solve_inputs(*moved, kind) @ incoming[program])
            quotient = (losses[0] - losses[1]) / (2.0 * step)
            assert abs(quotient - (gradient[program] * direction).sum()) <= 1e-7


@KINDS
@SCALES_AND_COUNT
@pytest.mark.parametrize("with_skew", [False, True], ids=["potential", "nash"])
def test_equilibrium_equals_the_gap_program(kind, scales, count, with_skew):
    leaves, incoming = random_inputs(count, scales, with_skew)
    factor, upper, payoff = leaves
    ours = solve_inputs(*leaves, kind)
    theirs = oracle_weights(factor, skew_matrix(upper), payoff, kind)
    assert (ours - theirs).abs().max() <= 1e-6
    compare_gradients(leaves, (0, 1, 2), ours, theirs, incoming, kind)


@KINDS
@SCALES_AND_COUNT
def test_without_skew_it_is_the_convex_program(kind, scales, count):
    leaves, incoming = random_inputs(count, scales, False)
    factor, _, payoff = leaves
    ours = solve_inputs(*leaves, kind)
    theirs = oracle_weights(factor, None, payoff, kind)

    def objective(weights):
        omega = torch.xlogy(weights, weights) if kind == "entropy" else weights.square() / 2
        return (factor @ weights[..., None]).square().sum((1, 2)) / 2 + (omega - payoff * weights).sum(-1)

    error = (ours - theirs).abs().amax(-1)
    assert (error <= 1e-6).float().mean() >= 0.9
    assert error.max() <= 3e-5
    on_simplex = theirs.clamp_min(0.0) / theirs.clamp_min(0.0).sum(-1, keepdim=True)
    assert (objective(ours) <= objective(on_simplex) + 1e-14 * (1.0 + payoff.abs().amax(-1))).all()
    compare_gradients(leaves, (0, 2), ours, theirs, incoming, kind)

"""What a solver is counted to cost, against its algorithm and against the steps that it really takes."""

import pytest
import torch

from maha_megatron.attention.aggregation import solvers
from maha_megatron.config import aggregation_cost
from maha_megatron.config.aggregation_cost import NEWTON_STEPS, PATH_STEPS, gram_flops, solver_flops


def cost(scales, aggregation="nash", regularizer="entropy", coupling="gram"):
    return solver_flops(scales, aggregation=aggregation, regularizer=regularizer, coupling=coupling)


@pytest.mark.parametrize("scales", range(2, 9))
@pytest.mark.parametrize("regularizer", solvers.REGULARIZERS)
def test_the_counted_steps_are_no_fewer_than_typical_input_takes(regularizer, scales):
    """Normalised outputs, kappa 0.1 to 1, a skew part to 1, utilities of a few nats."""
    generator = torch.Generator().manual_seed(20 + scales)
    for kappa, skew in ((0.1, 0.0), (0.1, 0.3), (1.0, 1.0)):
        outputs = torch.randn(1024, scales, 64, generator=generator)
        upper = skew * torch.randn(1024, scales * (scales - 1) // 2, generator=generator)
        matrix = kappa * solvers.gram_matrix(outputs, None) + solvers.skew_matrix(upper)
        payoff = 2.0 * torch.randn(1024, scales, generator=generator)
        steps = solvers.solve(matrix, payoff, None, regularizer).steps.float().mean().item()
        if regularizer == "entropy":
            assert 1 < steps < 3 < NEWTON_STEPS
        elif scales <= aggregation_cost.ENUMERATED_SCALES:
            assert steps == 2**scales - 1
        else:
            assert 3 < steps < PATH_STEPS


def test_the_limit_of_enumeration_is_the_solvers():
    assert aggregation_cost.ENUMERATED_SCALES == solvers.ENUMERATED_SCALES


def test_a_newton_step_of_two_scales_by_hand():
    """Every operation of a step at L = 2, in the order of entropy.newton."""
    table = 4 + 4 + 2  # D M, times D, plus 1 on the diagonal
    elimination = 1 + 2  # one division; one entry gets a product taken off
    right = 2 + 2 * (2 + 2 + 2)  # D r; for each side two divisions, one entry forward, one backward
    price = 3 + 3 + 1
    direction = 2 + 2 + 2
    move = 6 + 2 + 2  # M shift; taken off the force; times the length
    softmax = 2 + 1 + 2 + 1 + 2  # the move, the largest, taken off; sum, division
    force = 6 + 2 + 2 + 2 + 2 + 4  # M w; plus x, minus c; the highest and lowest; centred; middle and half range
    accepted = 2 + 2 + 4  # |x| by its maximum and its sum with the magnitude, times the target; the decrease
    step = table + elimination + right + price + direction + move + softmax + force + accepted
    before = 6 + 2 + softmax + force  # the first guess and its force
    magnitude, assembled = 2 + 4 - 1, 4
    assert cost(2) == assembled + magnitude + before + NEWTON_STEPS * step


def test_only_what_is_done_is_counted():
    assert cost(1) == 0
    assert cost(4, "mean", coupling="none") == cost(4, "program") == cost(4, "convex", coupling="none") == 0
    assert 0 < cost(4, "convex", "quadratic", "none") < cost(4, "convex", "quadratic", "gram") / 10
    assert cost(4, "nash", coupling="gram") - cost(4, "nash", coupling="none") == 16  # kappa G + A
    assert cost(4, "convex", coupling="gram") == cost(4, "nash", coupling="none")


@pytest.mark.parametrize("regularizer", solvers.REGULARIZERS)
def test_more_scales_cost_more(regularizer):
    limit = aggregation_cost.ENUMERATED_SCALES
    costs = [cost(scales, regularizer=regularizer) for scales in range(2, 9)]
    rising = costs if regularizer == "entropy" else costs[limit - 1 :]  # beyond enumeration another method takes over
    assert rising == sorted(set(rising))


def test_gram_counts_each_pair_once():
    assert gram_flops(4, 64) == 10 * (2 * 64 + 2) + 4

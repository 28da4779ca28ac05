"""Random programs for the solvers of the scales' weights, and the conditions that their solutions must meet."""

import torch

from maha_megatron.attention.aggregation.solvers import skew_matrix


def random_programs(
    count: int, scales: int, *, largest: float, seed: int, skew: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """M = kappa G + A [count, L, L] and c [count, L] in float64, feasible bool [count, L].

    kappa, |A| and |c| are spread over six decades up to `largest`, G over every rank and near-collinearity. A third of
    the programs are near ties of the quadratic: c is made from a solution whose small weights and slacks are 0 or
    1e-3 .. 1e-12. Half have infeasible scales, at which M and c are NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def magnitude():
        return largest * 10.0 ** (-6.0 * uniform(count, 1, 1) ** 2)

    outputs = torch.randn(count, scales, 6, generator=generator, dtype=torch.float64)
    outputs[:, :, 1:] *= (10.0 ** (-8.0 * uniform(count, 1, 1))) * (uniform(count, 1, 5) < 0.7)
    gram = outputs @ outputs.mT
    matrix = magnitude() * gram / gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    if skew:
        matrix = matrix + magnitude() * skew_matrix(2.0 * uniform(count, scales * (scales - 1) // 2) - 1.0)
    payoff = magnitude()[..., 0] * (2.0 * uniform(count, scales) - 1.0)

    ties = uniform(count, 1) < 1 / 3
    small = (10.0 ** (-3.0 - 9.0 * uniform(count, scales))) * (uniform(count, scales) < 0.5)
    small = torch.where(uniform(count, scales) < 0.3, small, uniform(count, scales))
    inside = uniform(count, scales) < 0.5
    inside[:, 0] |= ~inside.any(1)
    weights = torch.where(inside, small, 0.0)
    weights[:, 0] += inside[:, 0] * 0.1
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-3)
    slack = torch.where(inside, 0.0, small)
    payoff = torch.where(ties, weights + (matrix @ weights[..., None])[..., 0] - slack, payoff)

    feasible = (uniform(count, scales) < 0.7) | (uniform(count, 1) < 0.5)
    feasible[:, 0] |= ~feasible.any(1)
    matrix = matrix.masked_fill(~(feasible[:, :, None] & feasible[:, None]), torch.nan)
    return matrix, payoff.masked_fill(~feasible, torch.nan), feasible


def restricted(matrix, payoff, feasible):
    """M and c in float64 with 0 for NaN at infeasible scales."""
    pairs = feasible[..., :, None] & feasible[..., None, :]
    return matrix.double().masked_fill(~pairs, 0.0), payoff.double().masked_fill(~feasible, 0.0)


def relative_residual(matrix, payoff, feasible, weights, regularizer) -> torch.Tensor:
    """How far weights are from meeting the optimality conditions, evaluated in float64, over |x| + |c| + |M|. [count]

    With entropy x = log w. Weights that underflow in float32 (below 1e-30) are held to x <= log 1e-30 only.
    """
    matrix, payoff = restricted(matrix, payoff, feasible)
    weights = weights.double()
    size = payoff.abs().amax(-1) + matrix.abs().amax((-1, -2))
    margin = payoff - (matrix @ weights[..., None])[..., 0]
    if regularizer == "quadratic":
        slack = weights - margin + _best_price(margin - weights, weights > 0)
        violation = torch.minimum(weights, slack).abs().masked_fill(~feasible, 0.0)
        return violation.amax(-1) / (weights.amax(-1) + size)
    logs = weights.clamp_min(1e-30).log()
    excess = margin - logs - _best_price(margin - logs, weights >= 1e-30)
    violation = torch.where(weights >= 1e-30, excess.abs(), excess.clamp_min(0.0)).masked_fill(~feasible, 0.0)
    logs = logs.masked_fill(~feasible, 0.0)
    return violation.amax(-1) / (logs.abs().amax(-1) + size).clamp_min(1e-30)


def _best_price(prices, inside) -> torch.Tensor:
    """Midway between the extremes of what is equal at an exact solution, [count, 1]."""
    highest = prices.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    return (highest + prices.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)) / 2


def complementarity(matrix, payoff, feasible, weights, regularizer) -> torch.Tensor:
    """The smallest of max(w_l, s_l) over feasible l (entropy: the smallest weight): 0 at a tie. [count]"""
    matrix, payoff = restricted(matrix, payoff, feasible)
    if regularizer == "entropy":
        return weights.masked_fill(~feasible, 1.0).amin(-1)
    slack = weights - payoff + (matrix @ weights[..., None])[..., 0]
    slack = slack - slack.gather(-1, weights.argmax(-1, keepdim=True))
    return torch.maximum(weights, slack).masked_fill(~feasible, torch.inf).amin(-1)

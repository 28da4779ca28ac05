"""The equilibria of solvers.py as cvxpylayers programs: slow (milliseconds each), independent, and differentiable.

The tests hold the solvers against it. M comes as kappa G = H'H and A, because a disciplined program needs the factor.
"""

from functools import lru_cache

import torch

# Clarabel to 1e-13 and diffcp's dense mode; with cvxpylayers' defaults gradients are off by up to 0.5.
SOLVER_ARGUMENTS = {
    "solve_method": "Clarabel",
    "tol_gap_abs": 1e-13,
    "tol_gap_rel": 1e-13,
    "tol_feas": 1e-13,
    "max_iter": 200,
}
DERIVATIVE_ARGUMENTS = {"mode": "dense"}  # refused where no gradient is asked for


def oracle_weights(
    factor: torch.Tensor, skew: torch.Tensor | None, payoff: torch.Tensor, regularizer: str
) -> torch.Tensor:
    """Weights of a batch of programs with every scale feasible, through cvxpylayers (lambda = 1).

    Args:
        factor: H [B, L, L] with H'H = kappa G.
        skew: A [B, L, L] for the Nash equilibrium (its gap program), or None for the convex program as it stands.
        payoff: c [B, L].
        regularizer: "entropy" or "quadratic".

    Returns:
        [B, L] float64, with cvxpylayers' gradients of H, A and c.
    """
    factor, payoff = factor.double(), payoff.double()
    if skew is None:
        layer, parameters = _convex_layer(payoff.shape[-1], regularizer), (factor, payoff)
    else:
        matrix = factor.transpose(-1, -2) @ factor + skew.double()
        layer, parameters = _nash_layer(payoff.shape[-1], regularizer), (factor, matrix, payoff)
    differentiable = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    return layer(*parameters, solver_args=DERIVATIVE_ARGUMENTS if differentiable else {})[0]


@lru_cache
def _convex_layer(scales: int, regularizer: str):
    """minimise 1/2 kappa w'Gw - c'w + Omega(w) over the simplex."""
    import cvxpy

    factor = cvxpy.Parameter((scales, scales))
    payoff = cvxpy.Parameter(scales)
    weight = cvxpy.Variable(scales)
    omega = -cvxpy.sum(cvxpy.entr(weight)) if regularizer == "entropy" else cvxpy.sum_squares(weight) / 2
    objective = cvxpy.sum_squares(factor @ weight) / 2 - payoff @ weight + omega
    return _layer(objective, [cvxpy.sum(weight) == 1, weight >= 0], [factor, payoff], weight)


@lru_cache
def _nash_layer(scales: int, regularizer: str):
    """minimise the gap of the complementarity conditions, which is convex and 0 (entropy: -1) at the equilibrium only.

    entropy:   kappa w'Gw + sum w log w - c'w - mu    subject to  c + mu - M w - 1 <= log w
    quadratic: kappa w'Gw + |w|^2 - c'w - mu          subject to  M w + w - c - mu >= 0
    over the simplex, mu free: w'Mw = kappa w'Gw, so each is the sum over l of w_l times the slack of constraint l.
    """
    import cvxpy

    factor = cvxpy.Parameter((scales, scales))
    matrix = cvxpy.Parameter((scales, scales))
    payoff = cvxpy.Parameter(scales)
    weight = cvxpy.Variable(scales)
    price = cvxpy.Variable()
    simplex = [cvxpy.sum(weight) == 1, weight >= 0]
    gap = cvxpy.sum_squares(factor @ weight) - payoff @ weight - price
    if regularizer == "entropy":
        gap = gap - cvxpy.sum(cvxpy.entr(weight))
        slack = cvxpy.log(weight) - (payoff + price - matrix @ weight - 1)
    else:
        gap = gap + cvxpy.sum_squares(weight)
        slack = matrix @ weight + weight - payoff - price
    return _layer(gap, [*simplex, slack >= 0], [factor, matrix, payoff], weight)


def _layer(objective, constraints, parameters, variable):
    import cvxpy
    from cvxpylayers.torch import CvxpyLayer

    problem = cvxpy.Problem(cvxpy.Minimize(objective), constraints)
    assert problem.is_dpp()
    return CvxpyLayer(problem, parameters=parameters, variables=[variable], solver_args=SOLVER_ARGUMENTS)

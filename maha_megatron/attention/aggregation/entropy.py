"""Equilibria with entropy, Omega(w) = sum w log w: w = softmax(x) with F(x) = x - c + M softmax(x) = 0 (lambda = 1)."""

import math

import torch

from maha_megatron.attention.aggregation.programs import Programs, Solution, matvec, solve_tangent

# A sufficient decrease of |F| that is asked of a step of length a: |F(x + a dx)| <= (1 - ARMIJO a) |F(x)|.
ARMIJO = 1e-4
# Continuation: lambda falls by this factor a stage at most; each stage may take so many Newton steps and is solved to
# this relative residual; so many stages in all.
LARGEST_FACTOR = 4.0
STAGE_STEPS = 16
STAGE_RESIDUAL = 1e-6
STAGES = 96


def newton(
    programs: Programs, start_lp: torch.Tensor, steps: int, target: torch.Tensor | float, *, two_trials: bool = False
) -> tuple[torch.Tensor, Solution]:
    """Damped Newton on the logits: at most `steps` trials, masked per program; returns x [L, P] and the solution.

    With S = diag(w) - w w' the Jacobian I + M S is invertible for every M with a positive semidefinite symmetric part,
    and |F| is coercive: damped Newton converges from every start, though in no bounded number of steps. A trial that
    does not lower |F| is undone and the next is four times shorter, so one step costs one linear system and one
    residual whatever happens, and nothing is asked of the device. On a CPU, where asking is free, the loop ends early.

    With `two_trials` the same direction is also tried on the weights, where M w is linear and only the logarithm is
    not, and the better trial counts: with |M| in the thousands the equilibrium may lie along a narrow curved valley of
    |F| over the logits that is straight over the weights.
    """
    blocked_lp = ~programs.feasible_lp
    floor_lp = torch.zeros_like(start_lp).masked_fill(blocked_lp, -torch.inf)
    on_host = start_lp.device.type == "cpu"

    def evaluate(x_lp):
        x_lp = (x_lp - (x_lp + floor_lp).amax(0)).masked_fill(blocked_lp, 0.0)
        weight_lp = torch.softmax(x_lp + floor_lp, dim=0)
        force_lp = x_lp - programs.payoff_lp + matvec(programs.matrix_llp, weight_lp)
        highest_p, lowest_p = (force_lp + floor_lp).amax(0), (force_lp - floor_lp).amin(0)
        return x_lp, weight_lp, force_lp - (highest_p + lowest_p) / 2, (highest_p - lowest_p) / 2

    x_lp, weight_lp, force_lp, size_p = evaluate(start_lp)
    length_p = torch.ones_like(size_p)
    steps_p = torch.zeros_like(size_p, dtype=torch.int32)
    for _ in range(steps):
        open_p = size_p > target * (x_lp.abs().amax(0) + programs.magnitude_p)
        if on_host and not open_p.any():
            break
        shift_lp = solve_tangent(programs.matrix_llp, weight_lp.sqrt(), force_lp, refine=False)
        move_lp = -length_p * (force_lp - matvec(programs.matrix_llp, shift_lp))
        trial = evaluate(x_lp + move_lp)
        if two_trials:
            other = evaluate(x_lp + _log_growth(move_lp - (weight_lp * move_lp).sum(0)))
            trial = _where(other[3] < trial[3], other, trial)
        better_p = open_p & (trial[3] <= (1.0 - ARMIJO * length_p) * size_p)
        x_lp, weight_lp, force_lp, size_p = _where(better_p, trial, (x_lp, weight_lp, force_lp, size_p))
        length_p = torch.where(better_p, (4.0 * length_p).clamp_max(1.0), length_p / 4.0)
        steps_p += open_p
    tiny = torch.finfo(size_p.dtype).tiny
    return x_lp, Solution(
        weight_lp=weight_lp,
        scaling_lp=weight_lp.sqrt(),
        residual_p=size_p / (x_lp.abs().amax(0) + programs.magnitude_p).clamp_min(tiny),
        steps_p=steps_p,
    )


def _where(mask_p, yes, no):
    return tuple(torch.where(mask_p, *pair) for pair in zip(yes, no, strict=True))


def _log_growth(growth_lp: torch.Tensor) -> torch.Tensor:
    """log(1 + growth), and below -1/2, where a weight would run out, the log of exp(2 growth + 1) / 2."""
    return torch.where(growth_lp >= -0.5, torch.log1p(growth_lp.clamp_min(-0.5)), 2.0 * growth_lp + 1.0 - math.log(2.0))


def first_guess(programs: Programs) -> torch.Tensor:
    """x = c - M u with u uniform over the feasible scales: exact without coupling, [L, P]."""
    share_lp = programs.feasible_lp / programs.feasible_lp.sum(0).clamp_min(1)
    return programs.payoff_lp - matvec(programs.matrix_llp, share_lp.to(programs.payoff_lp.dtype))


def continue_in_lambda(programs: Programs, target: float) -> Solution:
    """Solves by lowering lambda from max |M| to 1: sure where plain Newton crawls, dear, synchronises with the host.

    A program with regularisation lambda is (M / lambda, c / lambda) with 1. Each stage starts from the last weights
    (that is, from y = x / lambda: keeping x instead would raise the weights to the power of the factor). A stage that
    fails is tried again from the same point with the square root of its factor. What is not solved at lambda = 1
    within the stages has residual inf.
    """
    device = programs.payoff_lp.device
    start_lp = torch.zeros_like(programs.payoff_lp)
    solved_at_p = programs.matrix_llp.abs().amax((0, 1)).clamp_min(1.0)
    lambda_p = solved_at_p.clone()
    factor_p = torch.full_like(lambda_p, LARGEST_FACTOR)
    result = Solution(
        weight_lp=torch.zeros_like(start_lp),
        scaling_lp=torch.zeros_like(start_lp),
        residual_p=torch.full_like(lambda_p, torch.inf),
        steps_p=torch.zeros_like(lambda_p, dtype=torch.int32),
    )
    open_p = torch.arange(programs.count, device=device)
    for _ in range(STAGES):
        here = programs.select(open_p, start_lp.dtype).scaled(1.0 / lambda_p[open_p])
        target_p = torch.full_like(lambda_p[open_p], STAGE_RESIDUAL).masked_fill(lambda_p[open_p] == 1.0, target)
        y_lp, stage = newton(here, start_lp[:, open_p], STAGE_STEPS, target_p, two_trials=True)
        good_p = stage.residual_p <= target_p
        done_p = good_p & (lambda_p[open_p] == 1.0)
        result.steps_p[open_p] += stage.steps_p
        result = result.replaced(open_p[done_p], stage.select(done_p))
        start_lp[:, open_p] = torch.where(good_p, y_lp, start_lp[:, open_p])
        solved_at_p[open_p] = torch.where(good_p, lambda_p[open_p], solved_at_p[open_p])
        factor_p[open_p] = torch.where(
            good_p, factor_p[open_p].square().clamp_max(LARGEST_FACTOR), factor_p[open_p].sqrt()
        )
        lambda_p = (solved_at_p / factor_p).clamp_min(1.0)
        open_p = open_p[~done_p]
        if open_p.numel() == 0:
            break
    return result

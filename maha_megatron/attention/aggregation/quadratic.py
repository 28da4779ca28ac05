"""Equilibria with the quadratic, Omega(w) = 1/2 |w|^2: a linear complementarity problem with B = I + M (lambda = 1).

w is an equilibrium iff for some price nu the slack s = B w - c + nu satisfies w >= 0, s >= 0, w_l s_l = 0 on the
feasible scales and 1'w = 1. On a given support T it is one linear system: B_TT w_T + nu = c_T, 1'w_T = 1.
"""

import itertools

import torch

from maha_megatron.attention.aggregation.programs import Programs, Solution, matvec, solve_scaled


def enumerate_supports(programs: Programs, target: float) -> Solution:
    """Tries every support, the smallest first, and keeps the first that is optimal to `target`, else the best. [L, P]

    2^L - 1 systems in a fixed order: no host synchronisation and no degenerate case.
    """
    scales = programs.payoff_lp.shape[0]
    best_lp = torch.zeros_like(programs.payoff_lp)
    support_lp = torch.zeros_like(best_lp)
    residual_p = torch.full_like(best_lp[0], torch.inf)
    for size in range(1, scales + 1):
        for support in itertools.combinations(range(scales), size):
            weight_lp, price_p = _weights_on(programs, support)
            violation_p = _violation(programs, weight_lp, price_p)
            inside_p = _pick(programs.feasible_lp, support).all(0)
            better_p = inside_p & (violation_p < residual_p) & (residual_p > target)
            best_lp = torch.where(better_p, weight_lp, best_lp)
            residual_p = torch.where(better_p, violation_p, residual_p)
            for scale in range(scales):
                support_lp[scale].masked_fill_(better_p, float(scale in support))
    return Solution(
        weight_lp=best_lp.masked_fill(residual_p.isinf(), torch.nan),  # no support has a residual: a NaN came in
        scaling_lp=support_lp,
        residual_p=residual_p,
        steps_p=torch.full_like(residual_p, 2**scales - 1, dtype=torch.int32),
    )


def follow_path(programs: Programs, target: float, steps: int) -> Solution:
    """Lowers the price nu from max c, where w = 0, until the weights sum to 1: Lemke's path along the vector 1. [L, P]

    For a fixed price, (B w - c + nu, w) is a linear complementarity problem with a positive definite B: exactly one
    solution w(nu), piecewise linear, and 1'w(nu) rises strictly as nu falls; so the path meets 1'w = 1 once, has no
    secondary ray and no support twice. A step is one system with two right-hand sides and one scale that enters or
    leaves. Programs that need more than `steps`, or that rounding leads astray at a tie, show in the residual.
    """
    payoff_lp = programs.payoff_lp.masked_fill(~programs.feasible_lp, -torch.inf)
    scale_l1 = torch.arange(payoff_lp.shape[0], device=payoff_lp.device)[:, None]
    flipped_lp = scale_l1 == payoff_lp.argmax(0)
    support_lp = flipped_lp.to(payoff_lp.dtype)
    open_p = torch.ones_like(payoff_lp[0], dtype=torch.bool)
    steps_p = torch.zeros_like(open_p, dtype=torch.int32)
    on_host = payoff_lp.device.type == "cpu"
    for _ in range(steps):
        level_lp, slope_lp = solve_scaled(programs.matrix_llp, support_lp, programs.payoff_lp, refine=False)
        end_p = (level_lp.sum(0) - 1.0) / slope_lp.sum(0)
        event_lp = _next_events(programs, support_lp, level_lp, slope_lp).masked_fill(flipped_lp, -torch.inf)
        event_p, which_p = event_lp.max(0)
        steps_p += open_p
        open_p = open_p & (event_p > end_p)
        if on_host and not open_p.any():
            break
        flipped_lp = torch.where(open_p, scale_l1 == which_p, flipped_lp)
        support_lp = torch.where(open_p & flipped_lp, 1.0 - support_lp, support_lp)
    return _polish(programs, support_lp, target, steps_p)


def _next_events(programs, support_lp, level_lp, slope_lp):
    """Prices at which a scale next changes sides, going down: w = level - nu slope hits 0, or a slack does. [L, P]"""
    weight_event_lp = torch.where(slope_lp < 0, level_lp / slope_lp, -torch.inf)
    slack_slope_lp = 1.0 - matvec(programs.matrix_llp, slope_lp)
    slack_event_lp = (programs.payoff_lp - matvec(programs.matrix_llp, level_lp)) / slack_slope_lp
    slack_event_lp = torch.where((slack_slope_lp > 0) & programs.feasible_lp, slack_event_lp, -torch.inf)
    return torch.where(support_lp > 0, weight_event_lp, slack_event_lp)


def _polish(programs: Programs, support_lp, target, steps_p) -> Solution:
    """The weights on a support, or on the part of it with weight if that is optimal too: the smallest at a tie."""
    weight_lp, price_p = _weights_of(programs, support_lp)
    residual_p = _violation(programs, weight_lp, price_p)
    zero_p = target * (weight_lp.abs().amax(0) + programs.magnitude_p)
    smaller_lp = support_lp * (weight_lp > zero_p)
    smaller_weight_lp, smaller_price_p = _weights_of(programs, smaller_lp)
    smaller_residual_p = _violation(programs, smaller_weight_lp, smaller_price_p)
    take_p = smaller_residual_p <= torch.clamp_min(residual_p, target)
    return Solution(
        weight_lp=torch.where(take_p, smaller_weight_lp, weight_lp),
        scaling_lp=torch.where(take_p, smaller_lp, support_lp),
        residual_p=torch.where(take_p, smaller_residual_p, residual_p),
        steps_p=steps_p + 2,
    )


def _weights_on(programs: Programs, support: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [L, P] and price [P] on one support shared by all programs: a system of the support's size."""
    payoff = _pick(programs.payoff_lp, support)
    matrix = torch.stack([_pick(programs.matrix_llp[scale], support) for scale in support])
    level, slope = solve_scaled(matrix, torch.ones_like(payoff), payoff, refine=True)
    weight, price_p = _meet_simplex(level, slope)
    nothing_p = torch.zeros_like(price_p)
    rows = dict(zip(support, weight, strict=True))
    return torch.stack([rows.get(scale, nothing_p) for scale in range(len(programs.payoff_lp))]), price_p


def _pick(rows: torch.Tensor, support: tuple[int, ...]) -> torch.Tensor:
    """rows[list(support)] without sending an index to the device, which would wait for it."""
    return torch.stack([rows[scale] for scale in support])


def _weights_of(programs: Programs, support_lp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [L, P] and price [P] on each program's own support."""
    level_lp, slope_lp = solve_scaled(programs.matrix_llp, support_lp, programs.payoff_lp, refine=True)
    return _meet_simplex(level_lp, slope_lp)


def _meet_simplex(level_lp: torch.Tensor, slope_lp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The point of w(nu) = level - nu slope with 1'w = 1 and its price; negative weights, cut off, show in a slack."""
    price_p = (level_lp.sum(0) - 1.0) / slope_lp.sum(0)
    weight_lp = (level_lp - price_p * slope_lp).clamp_min(0.0)
    return weight_lp / weight_lp.sum(0), price_p


def _violation(programs: Programs, weight_lp: torch.Tensor, price_p: torch.Tensor) -> torch.Tensor:
    """max over F of |min(w, s)|, the natural residual of w >= 0, s >= 0, w s = 0; relative to |w| + |c| + |M|. [P]"""
    slack_lp = weight_lp + matvec(programs.matrix_llp, weight_lp) - programs.payoff_lp + price_p
    violation_lp = torch.minimum(weight_lp, slack_lp).abs().masked_fill(~programs.feasible_lp, 0.0)
    return violation_lp.amax(0) / (weight_lp.abs().amax(0) + programs.magnitude_p)

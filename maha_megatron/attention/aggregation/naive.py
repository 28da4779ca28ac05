"""Aggregation by its definition, with a solver of its own: nothing here is shared with solvers.py.

    out = sum_l w_l O_l,    w in the simplex over the feasible scales F, with   <M w - c + grad Omega(w), v - w> >= 0
                            for all v in it

    c_l = <rho_l, q> + beta_l, plus LSE_l if utilities carry it
    M   = kappa G (coupling gram) + A (nash)        G_ij = <O_i, O_j> / (mean over F of |O_l|^2 + 1e-6)
    Omega = sum_l w_l log w_l (entropy) or 1/2 |w|^2 (quadratic)

The weights are found in fp64 without gradient. Then one more step of the method, which changes them by no more than
rounding, is taken with M and c as autograd knows them: its derivative is the implicit one.
"""

import itertools

import torch
import torch.nn.functional as F

from maha_megatron.attention.aggregation.solvers import SolveReport, gram_factor
from maha_megatron.attention.aggregation.stated_program import solve_rows
from maha_megatron.attention.spec import AttentionParameters, MahaSpec

_SOLVED = 1e-12
_MISSED = {torch.float32: 1e-6, torch.float64: 1e-10}


def aggregate(
    q_tnd: torch.Tensor, out_tnld: torch.Tensor, lse_tnl: torch.Tensor, parameters: AttentionParameters, spec: MahaSpec
) -> tuple[torch.Tensor, torch.Tensor, SolveReport | None]:
    """Fused output [t, n, d], weights [t, n, L] and the solver's report; an infeasible scale (LSE -inf) weighs 0.

    `q_tnd` is the query after normalisation and gain, before the rotation. The report is None where nothing is sought:
    mean, M = 0.
    """
    feasible_tnl = lse_tnl != -torch.inf
    report = None
    if spec.aggregation == "mean" or spec.scales == 1:
        weights_tnl = feasible_tnl.to(lse_tnl.dtype) / feasible_tnl.sum(-1, keepdim=True)
    else:
        payoff_tnl, matrix_tnll = programs(q_tnd, out_tnld, lse_tnl, parameters, spec)
        if spec.aggregation == "program":
            factor = gram_factor(matrix_tnll) if spec.coupling == "gram" else None
            weights_pl, report = solve_rows(spec.program, payoff_tnl, factor, feasible_tnl)
        else:
            flat = (matrix_tnll.flatten(0, 1), payoff_tnl.flatten(0, 1), feasible_tnl.flatten(0, 1))
            weights_pl, residual_p = equilibrium(*flat, spec.regularizer)
            if spec.aggregation == "nash" or spec.coupling == "gram":
                missed = (~(residual_p <= _MISSED[payoff_tnl.dtype])).sum()
                report = SolveReport(residual_tn=residual_p.view(lse_tnl.shape[:2]), steps_tn=None, missed=missed)
        weights_tnl = weights_pl.view_as(lse_tnl)
    weights_tnl = weights_tnl.to(q_tnd.dtype)
    return torch.einsum("tnl,tnld->tnd", weights_tnl, out_tnld), weights_tnl, report


def programs(q_tnd, out_tnld, lse_tnl, parameters, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """c [t, n, L] and M [t, n, L, L], at least fp32; 0 at infeasible scales."""
    feasible_tnl = lse_tnl != -torch.inf
    payoff_tnl = torch.einsum("tnd,lnd->tnl", q_tnd, parameters.utility_query) + parameters.utility_bias.T
    if spec.lse_utility:
        payoff_tnl = payoff_tnl + lse_tnl
    wide = torch.promote_types(q_tnd.dtype, torch.float32)
    payoff_tnl = torch.where(feasible_tnl, payoff_tnl, 0.0).to(wide)
    branches = spec.branches
    matrix_tnll = payoff_tnl.new_zeros(*payoff_tnl.shape, branches)
    if spec.coupling == "gram":
        products = torch.einsum("tnid,tnjd->tnij", out_tnld, out_tnld).to(wide)
        mean_square = torch.einsum("tnii->tn", products) / feasible_tnl.sum(-1)
        gram = products / (mean_square + 1e-6)[..., None, None]
        matrix_tnll = matrix_tnll + F.softplus(parameters.coupling_raw)[:, None, None] * gram
    if spec.aggregation == "nash":
        game = {}
        for place, (i, j) in enumerate(itertools.combinations(range(branches), 2)):
            game[i, j], game[j, i] = parameters.skew[:, place], -parameters.skew[:, place]
        nothing = torch.zeros_like(parameters.skew[:, 0])
        rows = [[game.get((i, j), nothing) for j in range(branches)] for i in range(branches)]
        matrix_tnll = matrix_tnll + torch.stack([torch.stack(row, -1) for row in rows], -2)
    return payoff_tnl, matrix_tnll


def equilibrium(
    matrix_pll: torch.Tensor, payoff_pl: torch.Tensor, feasible_pl: torch.Tensor, regularizer: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [P, L] of P programs, and the residual [P] before the last step, relative to |x| + |c| + |M|."""
    solve = {"entropy": _entropy_equilibrium, "quadratic": _quadratic_equilibrium}[regularizer]
    weights_pl = torch.zeros_like(payoff_pl)
    residual_p = torch.zeros_like(payoff_pl[:, 0])
    for pattern in feasible_pl.unique(dim=0):
        chosen = (feasible_pl == pattern).all(-1).nonzero()[:, 0]
        scales = pattern.nonzero()[:, 0]
        matrix, payoff = matrix_pll[chosen][:, scales][:, :, scales], payoff_pl[chosen][:, scales]
        found, residual_p[chosen] = solve(matrix, payoff)
        weights_pl = weights_pl.index_put((chosen[:, None], scales), found)
    return weights_pl, residual_p


def _entropy_equilibrium(matrix, payoff):
    """w = softmax(x) with F(x) = x - c + M softmax(x) = 0: Newton, each step halved until |F| falls."""
    one = torch.eye(payoff.shape[-1], dtype=torch.float64, device=payoff.device)

    def evaluate(x, m, c):
        w = x.softmax(-1)
        return w, x - c + (m @ w[..., None])[..., 0]

    with torch.no_grad():
        m, c = matrix.double(), payoff.double()
        x = c.clone()
        for _ in range(200):
            w, force = evaluate(x, m, c)
            jacobian = one + m @ (torch.diag_embed(w) - w[:, :, None] * w[:, None])
            size = x.abs().amax(-1) + c.abs().amax(-1) + m.abs().amax((-1, -2))
            residual = force.abs().amax(-1) / size.clamp_min(1e-300)
            if not (residual > _SOLVED).any():
                break
            step = torch.linalg.solve(jacobian, force)
            length = torch.ones_like(x[:, :1])
            for _ in range(40):
                trial = evaluate(x - length * step, m, c)[1].norm(dim=-1, keepdim=True)
                worse = trial > (1 - 1e-4 * length) * force.norm(dim=-1, keepdim=True)
                if not worse.any():
                    break
                length = torch.where(worse, length / 2, length)
            x = x - length * step
    x = x.to(payoff.dtype)
    force = evaluate(x, matrix, payoff)[1]
    return (x - torch.linalg.solve(jacobian.to(x.dtype), force)).softmax(-1), residual.to(payoff.dtype)


def _quadratic_equilibrium(matrix, payoff):
    """The smallest support on which w >= 0 and the slack s = w + M w - c + price >= 0 vanishes where w does not."""
    scales = payoff.shape[-1]
    supports = [s for size in range(1, scales + 1) for s in itertools.combinations(range(scales), size)]
    with torch.no_grad():
        m, c = matrix.double(), payoff.double()
        best = torch.full_like(c[:, 0], torch.inf)
        choice = torch.full_like(best, len(supports) - 1, dtype=torch.long)  # what NaN is left with
        for number, support in enumerate(supports):
            w, price = _weights_on(support, m, c)
            slack = w + (m @ w[..., None])[..., 0] - c + price
            size = w.abs().amax(-1) + c.abs().amax(-1) + m.abs().amax((-1, -2))
            violation = torch.minimum(w, slack).abs().amax(-1) / size
            better = (best > _SOLVED) & (violation < best)
            best, choice = torch.where(better, violation, best), torch.where(better, number, choice)
    weights = torch.zeros_like(payoff)
    for number in choice.unique().tolist():
        chosen = (choice == number).nonzero()[:, 0]
        weights = weights.index_copy(0, chosen, _weights_on(supports[number], matrix[chosen], payoff[chosen])[0])
    return weights, best.to(payoff.dtype)


def _weights_on(support, matrix, payoff):
    """w [P, L] and price [P, 1] with (w + M w - c + price) = 0 on the support T, w = 0 elsewhere, 1'w = 1."""
    inside = list(support)
    size = len(inside)
    system = matrix.new_zeros(len(payoff), size + 1, size + 1)
    system[:, size, :size] = system[:, :size, size] = 1
    system[:, :size, :size] = matrix[:, inside][:, :, inside]
    system[:, range(size), range(size)] += 1
    right = torch.cat((payoff[:, inside], torch.ones_like(payoff[:, :1])), dim=-1)
    solution = torch.linalg.solve(system, right)
    weights = torch.zeros_like(payoff)
    weights[:, inside] = solution[:, :size]
    return weights, solution[:, size:]

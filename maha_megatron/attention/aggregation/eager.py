"""Aggregation on whole tensors: the joint path's softmax, and everything that reads each scale's output.

Without coupling the entropy's optimum is a softmax over feasible scales. Joint attention then asks for the log of each
scale's weight only (`scale_log_weights`), and never forms the scale's output. Everything else has O [t, n, L, d] and
LSE [t, n, L] from scale attention and is plain autograd from there on (`aggregate`).
"""

import torch
import torch.nn.functional as F

from maha_megatron.attention.aggregation.solvers import SolveReport, gram_factor, gram_matrix, skew_matrix, solve
from maha_megatron.attention.aggregation.stated_program import solve_rows
from maha_megatron.attention.aggregation.uncoupled import uncoupled_weights
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def scale_log_weights(utility: torch.Tensor, lse: torch.Tensor, lse_utility: bool) -> torch.Tensor:
    """log w_l over the last dimension, for entropy without coupling.

    Args:
        utility: [..., L] learned part <rho_l, q> + beta_l.
        lse: [..., L] log-sum-exp of each scale; -inf marks an infeasible one.
        lse_utility: whether the utility carries the log-sum-exp.

    Returns:
        [..., L]; -inf where infeasible.
    """
    total = utility + lse if lse_utility else utility.masked_fill(lse == -torch.inf, -torch.inf)
    return total.log_softmax(-1)


def aggregate(
    q_tnd: torch.Tensor,
    outputs_tnld: torch.Tensor,
    lse_tnl: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
) -> tuple[torch.Tensor, torch.Tensor, SolveReport | None]:
    """sum_l w_l O_l per row and head, in at least fp32 inside.

    Args:
        q_tnd: queries after the convolution, before normalisation.
        outputs_tnld, lse_tnl: of every scale, at least fp32, 0 and -inf where infeasible. Infeasible scales get weight
            and gradient exactly 0.

    Returns:
        Output [t, n, d] in q's dtype, weights [t, n, L] in that of the outputs, and the solver's report, None where the
        weights have a closed form.

    Raises:
        UnsolvedProgram: a stated program has no solution for some row and head.
    """
    weights_tnl, report = _scale_weights(q_tnd, outputs_tnld, lse_tnl, parameters, spec)
    out_tnd = (weights_tnl[:, :, None] @ outputs_tnld).squeeze(2)
    return out_tnd.to(q_tnd.dtype), weights_tnl, report


def _scale_weights(q_tnd, outputs_tnld, lse_tnl, parameters, spec):
    feasible_tnl = lse_tnl != -torch.inf
    if spec.aggregation == "mean":
        return feasible_tnl.to(lse_tnl.dtype) / feasible_tnl.sum(-1, keepdim=True), None
    payoff_tnl = _utilities(q_tnd, parameters, spec, lse_tnl.dtype)
    if spec.lse_utility:
        payoff_tnl = payoff_tnl + lse_tnl.masked_fill(~feasible_tnl, 0.0)
    matrix = None
    if spec.coupling == "gram":
        kappa = F.softplus(parameters.coupling_raw.to(lse_tnl.dtype))
        matrix = kappa[:, None, None] * gram_matrix(outputs_tnld, feasible_tnl)
    if spec.aggregation == "program":
        factor = None if matrix is None else gram_factor(matrix)
        weights_tnl, report = solve_rows(spec.program, payoff_tnl, factor, feasible_tnl)
        return weights_tnl.to(lse_tnl.dtype), report
    if spec.aggregation == "nash":
        game = skew_matrix(parameters.skew.to(lse_tnl.dtype))
        matrix = game if matrix is None else matrix + game
    if matrix is None:
        return uncoupled_weights(payoff_tnl, feasible_tnl, spec.regularizer), None
    solved = solve(matrix, payoff_tnl, feasible_tnl, spec.regularizer)
    return solved.weights, SolveReport(residual_tn=solved.residual, steps_tn=solved.steps, missed=solved.missed)


def _utilities(q_tnd, parameters, spec, dtype):
    """<rho_l, q> + beta_l [t, n, L] with q normalised and times its gain; nothing of q's size is kept but q."""
    q_tnd = q_tnd.to(dtype)
    rho = parameters.utility_query.to(dtype) * parameters.query_gain.to(dtype)
    scale = torch.rsqrt(q_tnd.square().mean(-1, keepdim=True) + spec.norm_epsilon)
    return torch.einsum("tnd,lnd->tnl", q_tnd, rho) * scale + parameters.utility_bias.to(dtype).T

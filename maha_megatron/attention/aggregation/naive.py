"""Aggregation by its definition, for one row: convex with entropy and no coupling, whose optimum is a softmax.

w = argmin over the simplex of  -c'w + sum_l w_l log w_l      over the feasible scales only
  = softmax(c)        c_l = <rho_l, q> + beta_l, plus LSE_l if utilities carry it
"""

import torch

from maha_megatron.attention.spec import AttentionParameters


def aggregate(
    q_nd: torch.Tensor, out_lnd: torch.Tensor, lse_ln: torch.Tensor, parameters: AttentionParameters, lse_utility: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused output [n, d] and weights [n, L] of one row; an infeasible scale (LSE -inf) weighs exactly 0.

    `q_nd` is the query after normalisation and gain, before the rotation.
    """
    weights = torch.zeros_like(lse_ln)
    feasible = [scale for scale, lse in enumerate(lse_ln) if lse.max() > -torch.inf]
    if parameters.utility_query is None:
        return out_lnd[0], torch.ones_like(lse_ln).T
    utilities = torch.einsum("lnd,nd->ln", parameters.utility_query, q_nd) + parameters.utility_bias
    if lse_utility:
        utilities = utilities + lse_ln
    weights = weights.index_copy(0, torch.tensor(feasible, device=q_nd.device), utilities[feasible].softmax(0))
    return torch.einsum("ln,lnd->nd", weights, out_lnd), weights.T

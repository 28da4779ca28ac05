"""Aggregation on whole tensors: convex with entropy and no coupling, whose optimum is a softmax over feasible scales.

Scale attention hands over each scale's log-sum-exp and asks for the log of its weight, so it never matters here how
the scale's output is held; its backward hands over <dO, O_l> in the form that costs it least.
"""

import torch


def scale_log_weights(utility: torch.Tensor, lse: torch.Tensor, lse_utility: bool) -> torch.Tensor:
    """log w_l over the last dimension.

    Args:
        utility: [..., L] learned part <rho_l, q> + beta_l.
        lse: [..., L] log-sum-exp of each scale; -inf marks an infeasible one.
        lse_utility: whether the utility carries the log-sum-exp.

    Returns:
        [..., L]; -inf where infeasible.
    """
    total = utility + lse if lse_utility else utility.masked_fill(lse == -torch.inf, -torch.inf)
    return total.log_softmax(-1)

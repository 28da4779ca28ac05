"""Weights without coupling, M = 0, in closed form: softmax (entropy) and sparsemax (quadratic)."""

import torch


def uncoupled_weights(payoff: torch.Tensor, feasible: torch.Tensor | None, regularizer: str) -> torch.Tensor:
    """argmax over the feasible simplex of c'w - Omega(w), what `solvers.solve` gives for M = 0.

    Args:
        payoff: c [..., L], any floating dtype; not read at infeasible scales.
        feasible: bool [..., L], or None where all are. A row with no feasible scale gets weights 0.
        regularizer: "entropy" or "quadratic".

    Returns:
        [..., L], at least float32; differentiable, at a tie through the smallest support. Infeasible scales have weight
        and gradient exactly 0.

    Raises:
        ValueError: unknown regularizer.

    Source: sparsemax, Martins and Astudillo 2016 (arXiv 1602.02068), algorithm 1.
    """
    payoff = payoff.to(torch.promote_types(payoff.dtype, torch.float32))
    if feasible is not None:
        payoff = payoff.masked_fill(~feasible, -torch.inf)
    if regularizer == "entropy":
        weights = torch.softmax(payoff, dim=-1)
    elif regularizer == "quadratic":
        weights = _sparsemax(payoff)
    else:
        raise ValueError(f"regularizer is {regularizer!r}; it must be entropy or quadratic")
    return weights if feasible is None else weights.masked_fill(~feasible, 0.0)


def _sparsemax(payoff: torch.Tensor) -> torch.Tensor:
    """max(c - tau, 0) with tau such that it sums to 1; -inf marks what may have no weight."""
    with torch.no_grad():
        ordered = payoff.sort(dim=-1, descending=True).values
        rank = torch.arange(1, payoff.shape[-1] + 1, dtype=payoff.dtype, device=payoff.device)
        size = (1.0 + rank * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
        support = payoff > (ordered.cumsum(-1).gather(-1, (size - 1).clamp_min(0)) - 1.0) / size.clamp_min(1)
    inside = payoff.masked_fill(~support, 0.0)
    count = support.sum(-1, keepdim=True).clamp_min(1)
    return (inside - (inside.sum(-1, keepdim=True) - 1.0) / count).masked_fill(~support, 0.0)

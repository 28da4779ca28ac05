"""Small-program solvers: the weights of the scales as an equilibrium, batched over tokens and heads.

    solve(M, c, feasible, regularizer):  <M w - c + grad Omega(w), v - w> >= 0 for all v in the feasible simplex

README.md beside this file holds the equations, the proof that there is exactly one equilibrium, and the algorithms.
"""

from dataclasses import dataclass

import torch

from maha_megatron.attention.aggregation import entropy, quadratic
from maha_megatron.attention.aggregation.programs import Programs, Solution, batch_last, gather_programs, solve_tangent

REGULARIZERS = ("entropy", "quadratic")
LARGEST_SCALES = 8
# A residual (relative to |x| + |c| + |M|) above the tolerance is a miss; iterations aim for the target, near rounding.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
TARGET = {torch.float32: 2.4e-7, torch.float64: 1e-13}
NEWTON_STEPS = 8
ENUMERATED_SCALES = 4
PATH_STEPS_PER_SCALE = 3
GRAM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class SolveResult:
    """What `solve` returns; only `weights` carries a gradient.

    weights [..., L] (at least float32); residual [...] relative to |x| + |c| + |M|; steps int32 [...], linear systems
    solved; missed int64 [], how many residuals exceed TOLERANCE: report it, a missed program has wrong weights.
    """

    weights: torch.Tensor
    residual: torch.Tensor
    steps: torch.Tensor
    missed: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """How well the programs of all rows and heads were solved: what a trainer shows.

    residual_tn [t, n] relative, detached; steps_tn int32 [t, n], None for stated programs; missed int64 [].
    """

    residual_tn: torch.Tensor
    steps_tn: torch.Tensor | None
    missed: torch.Tensor


def solve(
    matrix: torch.Tensor,
    payoff: torch.Tensor,
    feasible: torch.Tensor | None,
    regularizer: str,
    *,
    rescue: bool = True,
) -> SolveResult:
    """Weights of the scales: the unique w with <M w - c + grad Omega(w), v - w> >= 0 on the simplex (lambda = 1).

    Args:
        matrix: M [..., L, L], any floating dtype, L <= 8; its symmetric part must be positive semidefinite (kappa times
            a Gram matrix, plus a skew matrix, is). Leading dimensions broadcast against those of `payoff`.
        payoff: c [..., L]. Neither M nor c is read at infeasible scales, so -inf or NaN may stand there.
        feasible: bool [..., L], or None where all are. A row with no feasible scale gets weights 0.
        regularizer: "entropy" (sum w log w) or "quadratic" (1/2 |w|^2).
        rescue: solve the programs that the fixed number of steps missed by slower and surer means, in float64. This
            is one host synchronisation (to learn whether there are any); False leaves them counted as missed.

    Returns:
        SolveResult. Gradients of M (all L^2 entries) and c are implicit: the derivative of the equilibrium, whatever
        path found it. Infeasible scales have weight exactly 0 and gradient exactly 0.

    Raises:
        ValueError: unknown regularizer, shapes that do not fit, more than 8 scales.

    Sharding: local; every program is one token and head.
    """
    scales = payoff.shape[-1]
    if regularizer not in REGULARIZERS:
        raise ValueError(f"regularizer is {regularizer!r}; it must be one of {', '.join(REGULARIZERS)}")
    fits = matrix.shape[-2:] == (scales, scales) and (feasible is None or feasible.shape[-1] == scales)
    if not fits or not 1 <= scales <= LARGEST_SCALES:
        shapes = [tuple(tensor.shape) for tensor in (matrix, payoff, feasible) if tensor is not None]
        raise ValueError(f"matrix, payoff and feasible must end in [L, L], [L] and [L] with L <= 8; they are {shapes}")
    dtype = torch.promote_types(torch.promote_types(matrix.dtype, payoff.dtype), torch.float32)
    batch = torch.broadcast_shapes(
        matrix.shape[:-2], payoff.shape[:-1], () if feasible is None else feasible.shape[:-1]
    )
    if feasible is not None:
        feasible = feasible.expand(*batch, scales)
    weights, residual, steps = _Equilibrium.apply(
        matrix.to(dtype).expand(*batch, scales, scales),
        payoff.to(dtype).expand(*batch, scales),
        feasible,
        regularizer,
        rescue,
    )
    missed = (~(residual <= TOLERANCE[dtype])).sum()
    return SolveResult(weights=weights, residual=residual, steps=steps, missed=missed)


class _Equilibrium(torch.autograd.Function):
    """w(M, c) with the implicit derivative dw = D z, (I + D M D) z + nu D 1 = D (dc - dM w), 1' D z = 0."""

    @staticmethod
    def forward(ctx, matrix, payoff, feasible, regularizer, rescue):
        programs = gather_programs(matrix, payoff, feasible)
        solution = _solve_programs(programs, regularizer, rescue)
        weight_lp, scaling_lp = solution.weight_lp, solution.scaling_lp
        if feasible is not None:
            outside_lp = ~batch_last(feasible)
            weight_lp, scaling_lp = (part.masked_fill(outside_lp, 0.0) for part in (weight_lp, scaling_lp))
        ctx.save_for_backward(programs.matrix_llp, scaling_lp, weight_lp)
        weights = weight_lp.t().reshape(payoff.shape)
        residual = solution.residual_p.view(payoff.shape[:-1])
        steps = solution.steps_p.view(payoff.shape[:-1])
        ctx.mark_non_differentiable(residual, steps)
        return weights, residual, steps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, _grad_residual, _grad_steps):
        matrix_llp, scaling_lp, weight_lp = ctx.saved_tensors
        grad_lp = batch_last(grad_weights)
        grad_payoff_lp = solve_tangent(matrix_llp.transpose(0, 1), scaling_lp, grad_lp, refine=True)
        # a change of all payoffs alike changes nothing: take out what rounding left in that direction, scale by scale
        # as D^2, so that a scale of little or no weight gets little or nothing
        share_lp = scaling_lp.square()
        share_lp /= share_lp.sum(0).clamp_min(torch.finfo(share_lp.dtype).tiny)
        grad_payoff_lp -= share_lp * grad_payoff_lp.sum(0)
        grad_payoff = grad_payoff_lp.t().reshape(grad_weights.shape)
        grad_matrix = None
        if ctx.needs_input_grad[0]:
            weights = weight_lp.t().reshape(grad_weights.shape)
            grad_matrix = -grad_payoff[..., :, None] * weights[..., None, :]
        return grad_matrix, grad_payoff, None, None, None


def _solve_programs(programs: Programs, regularizer: str, rescue: bool) -> Solution:
    """The fixed number of steps for all, then the surer method for the few that it missed."""
    dtype = programs.payoff_lp.dtype
    scales = programs.payoff_lp.shape[0]
    if regularizer == "entropy":
        _, solution = entropy.newton(programs, entropy.first_guess(programs), NEWTON_STEPS, TARGET[dtype])
    elif scales <= ENUMERATED_SCALES:
        solution = quadratic.enumerate_supports(programs, TARGET[dtype])
    else:
        solution = quadratic.follow_path(programs, TARGET[dtype], steps=PATH_STEPS_PER_SCALE * scales)
    if not rescue:
        return solution
    missed_p = ~(solution.residual_p <= TOLERANCE[dtype] / 2) & programs.magnitude_p.isfinite()
    missed_p = missed_p.nonzero()[:, 0]  # the one host synchronisation
    if missed_p.numel() == 0:
        return solution
    hard = programs.select(missed_p, torch.float64)
    if regularizer == "entropy":
        rescued = entropy.continue_in_lambda(hard, TARGET[torch.float64])
    else:
        rescued = quadratic.enumerate_supports(hard, TARGET[torch.float64])
    solution.steps_p[missed_p] += rescued.steps_p
    better_p = rescued.residual_p < solution.residual_p[missed_p]
    return solution.replaced(missed_p[better_p], rescued.select(better_p))


def gram_matrix(outputs: torch.Tensor, feasible: torch.Tensor | None) -> torch.Tensor:
    """G_ij = <O_i, O_j> / (mean over the feasible scales of |O_l|^2 + 1e-6), differentiable.

    Args:
        outputs: O [..., L, d], each scale's attention output, any floating dtype; finite at infeasible scales too.
            Squares are formed as they stand, so in float32 |O_l| may be up to 1e19: beyond, G is not a number, and
            `solve` counts the program as missed.
        feasible: bool [..., L], or None where all are; rows and columns of infeasible scales are 0, with no gradient.

    Returns:
        [..., L, L] symmetric positive semidefinite, at least float32.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    products = outputs @ outputs.transpose(-1, -2)
    count = outputs.shape[-2]
    if feasible is not None:
        products = products.masked_fill(~(feasible[..., :, None] & feasible[..., None, :]), 0.0)
        count = feasible.sum(-1).clamp_min(1)
    mean_square = products.diagonal(dim1=-2, dim2=-1).sum(-1) / count
    return products / (mean_square + GRAM_EPSILON)[..., None, None]


def gram_factor(matrix: torch.Tensor) -> torch.Tensor:
    """H with H'H = kappa G, for programs that need the factor (stated_program.py): the symmetric square root.

    Not Cholesky's: that needs a jitter where scales have equal outputs, and its gradient magnifies the solver's error
    by up to the condition number. Here nothing is added, and since G is made of products <O_i, O_j>, an error in dL/dH
    comes out no larger in dL/dO: with S = dL/d(kappa G), S_ij = (dL/dH)_ij / (h_i + h_j) in H's eigenbasis, dL/dO holds
    S_ij h_j. Where h_i + h_j = 0, O has no component, and S_ij is set to 0. Infeasible scales, whose rows and columns
    are 0, stay so.

    Args:
        matrix: kappa G [..., L, L], symmetric positive semidefinite up to rounding, any floating dtype.

    Returns:
        [..., L, L] float64, symmetric.
    """
    return _SquareRoot.apply(matrix.double())


class _SquareRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix):
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp_min(0.0).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors * roots[..., None, :]) @ vectors.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        roots, vectors = ctx.saved_tensors
        sums = roots[..., :, None] + roots[..., None, :]
        inner = vectors.mT @ ((grad + grad.mT) / 2.0) @ vectors
        inner = torch.where(sums > 0.0, inner / sums, 0.0)
        return vectors @ inner @ vectors.mT


def skew_matrix(upper: torch.Tensor) -> torch.Tensor:
    """The skew matrices A [n, L, L] with A_ij = +a, A_ji = -a for i < j, from a [n, L (L - 1) / 2] in row order.

    Raises:
        ValueError: a length that is no L (L - 1) / 2.
    """
    pairs = upper.shape[-1]
    scales = next((size for size in range(1, LARGEST_SCALES + 1) if size * (size - 1) // 2 == pairs), None)
    if scales is None:
        raise ValueError(f"{pairs} entries are no upper triangle of at most {LARGEST_SCALES} scales")
    rows, columns = torch.triu_indices(scales, scales, 1, device=upper.device)
    matrix = upper.new_zeros(*upper.shape[:-1], scales, scales)
    matrix[..., rows, columns] = upper
    return matrix - matrix.transpose(-1, -2)

"""Cone programs, many of one form at once: solved to rounding, judged, differentiated.

    minimise c'x subject to A x + s = b, s in a cone K

A solution is a zero of the residual of the homogeneous embedding (Busseti, Moursi and Boyd, "Solution refinement at
regular points of conic problems", 2019), for z = (x, v, 1), y the projection of v on the dual cone and s = y - v:

    R(z) = (Q - I) P(z) + z,    Q = [0 A' c; -A 0 b; -c' -b' 0],    P(z) = (x, y, 1)

Clarabel finds z; Newton steps on R take what an interior-point method leaves, up to 1e-5 in the minimiser, to rounding;
and R's Jacobian gives the derivative of the solution (Agrawal and others, "Differentiating through a cone program",
2019). Projections are diffcp's, but for the exponential cone's (exponential_cone.py).
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from diffcp.cone_program import _diffcp, solve_internal
from diffcp.cones import EXP, parse_cone_dict, parse_cone_dict_cpp, pi

from maha_megatron.attention.aggregation.cvxpy_oracle import SOLVER_ARGUMENTS
from maha_megatron.attention.aggregation.exponential_cone import dual_derivatives, project_on_dual

REFINEMENTS = 5
REFINED_BELOW = 1e-14
CUTOFFS = (1e-13, 1e-10, 1e-8)
# a proof that there is no solution, in the words that diffcp has for Clarabel's
NO_SOLUTION = {
    "Infeasible": "infeasible",
    "Infeasible Inaccurate": "infeasible",
    "Unbounded": "unbounded",
    "Unbounded Inaccurate": "unbounded",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one program ended.

    Attributes:
        residual: of the optimality conditions, relative to 1 + the largest number in the solution; NaN where the
            program holds one.
        no_solution: "infeasible" or "unbounded" where that was proven, else None.
    """

    residual: float
    no_solution: str | None


class ConePrograms:
    """B programs.

    Kept from `solve` to `pull_back` are A, b, c and z. While either runs there are a few tables of (rows + columns)^2
    numbers for every program: ask for about a thousand programs at a time (conic_layer.py does).

    Args:
        matrix, offset, cost: A [B, rows, columns], b [B, rows], c [B, columns], float64.
        cones: K as diffcp names it, the same for all.
    """

    def __init__(self, matrix: np.ndarray, offset: np.ndarray, cost: np.ndarray, cones: dict) -> None:
        self._matrix, self._offset, self._cost, self._cones = matrix, offset, cost, cones
        parsed = parse_cone_dict(cones)
        self._other_cones = [(kind, size) for kind, size in parsed if kind != EXP]
        self._other_rows = matrix.shape[1] - 3 * dict(parsed).get(EXP, 0)  # exponential cones come last
        self._skew = None  # Q [B, N, N], while it is needed

    def solve(self) -> tuple[np.ndarray, np.ndarray, list[Verdict]]:
        """x [B, columns], y [B, rows], and how each program ended."""
        results = [
            solve_internal(sparse.csc_matrix(one), offset, cost, self._cones, **SOLVER_ARGUMENTS)
            for one, offset, cost in zip(self._matrix, self._offset, self._cost, strict=True)
        ]
        found = [np.concatenate([one["x"], one["y"] - one["s"], [1.0]]) for one in results]
        self._z, every = np.stack(found), np.arange(len(found))
        self._skew = self._embedding()
        no_solution = [NO_SOLUTION.get(one["info"]["status"]) for one in results]
        finite = np.isfinite(self._skew).all((1, 2)) & np.isfinite(self._z).all(1)
        self._refine(every[finite & np.array([why is None for why in no_solution])])
        residual = np.full(len(every), np.nan)
        residual[finite] = self._relative_residual(self._z[finite], every[finite])
        projected = np.full_like(self._z, np.nan)
        projected[finite] = self._project(self._z[finite])
        self._projected, self._skew = projected, None
        verdicts = [
            Verdict(residual=float(size), no_solution=why) for size, why in zip(residual, no_solution, strict=True)
        ]
        columns = self._cost.shape[1]
        return projected[:, :columns], projected[:, columns:-1], verdicts

    def pull_back(self, d_primal: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of A, b and c from that of x [B, columns]."""
        columns = d_primal.shape[1]
        incoming = np.zeros_like(self._z)
        incoming[:, :columns] = d_primal
        incoming[:, -1] = -(self._projected[:, :columns] * d_primal).sum(1)
        self._skew = self._embedding()
        jacobian = self._jacobian(self._z, np.arange(len(self._z)))
        self._skew = None
        response = _least_squares(jacobian.swapaxes(1, 2), incoming, CUTOFFS[0])
        outer = self._projected[:, :, None] * response[:, None]  # minus the transpose of Q's gradient
        d_skew = outer - outer.swapaxes(1, 2)
        return d_skew[:, :columns, columns:-1].swapaxes(1, 2), d_skew[:, columns:-1, -1], d_skew[:, :columns, -1]

    def _embedding(self) -> np.ndarray:
        """Q [B, N, N] of the homogeneous embedding."""
        count, rows, columns = self._matrix.shape
        skew = np.zeros((count, *(rows + columns + 1,) * 2))
        skew[:, :columns, columns:-1] = self._matrix.swapaxes(1, 2)
        skew[:, :columns, -1], skew[:, columns:-1, -1] = self._cost, self._offset
        return skew - skew.swapaxes(1, 2)

    def _refine(self, active: np.ndarray) -> None:
        """Newton steps for the programs `active`, as long as they help.

        A weight w of an entropy makes a singular value of about w, and where that is no more than the noise of the
        residual the step goes astray; then the shortest step without such directions is tried.
        """
        residual = self._relative_residual(self._z[active], active)
        for _ in range(REFINEMENTS):
            left = residual > REFINED_BELOW
            active, residual = active[left], residual[left]
            if len(active) == 0:
                return
            better = np.zeros(len(active), dtype=bool)
            for cutoff in CUTOFFS:
                rest = np.flatnonzero(~better)
                if len(rest):
                    better[rest], residual[rest] = self._step(active[rest], residual[rest], cutoff)
            active, residual = active[better], residual[better]

    def _step(self, active, residual, cutoff) -> tuple[np.ndarray, np.ndarray]:
        """One Newton step, or a quarter of it, where that lowers the residual: whether it did, and the residual."""
        z, better = self._z[active], np.zeros(len(active), dtype=bool)
        step = np.zeros_like(z)
        step[:, :-1] = _least_squares(self._jacobian(z, active)[:, :, :-1], -self._residual(z, active), cutoff)
        for size in (1.0, 0.25):
            tried = z + size * step
            after = self._relative_residual(tried, active)
            taken = ~better & (after < residual)
            self._z[active[taken]], residual[taken] = tried[taken], after[taken]
            better |= taken
        return better, residual

    def _project(self, z):
        columns = self._cost.shape[1]
        v, projected = z[:, columns:-1], z.copy()
        y = projected[:, columns:-1]
        for row, point in zip(y, v[:, : self._other_rows], strict=True):
            row[: self._other_rows] = pi(point, self._other_cones, dual=True)
        y[:, self._other_rows :] = project_on_dual(v[:, self._other_rows :])
        return projected

    def _residual(self, z, chosen):
        projected = self._project(z)
        return (self._skew[chosen] @ projected[:, :, None])[:, :, 0] - projected + z

    def _relative_residual(self, z, chosen):
        return np.abs(self._residual(z, chosen)).max(1, initial=0.0) / (1.0 + np.abs(z).max(1, initial=0.0))

    def _jacobian(self, z, chosen):
        """(Q - I) P' + I [B, N, N]."""
        size, columns = z.shape[1], self._cost.shape[1]
        derivative = np.zeros((len(z), size, size))
        derivative[:, range(columns), range(columns)] = derivative[:, -1, -1] = 1.0
        first_exponential = columns + self._other_rows
        if self._other_rows:
            cones, nothing = parse_cone_dict_cpp(self._other_cones), np.zeros((self._other_rows + 2,) * 2)
            for one, point in zip(derivative, z[:, columns:first_exponential], strict=True):
                whole = np.eye(len(nothing)) - _diffcp.M_dense(nothing, cones, np.zeros(1), point, 1.0)
                one[columns:first_exponential, columns:first_exponential] = whole[1:-1, 1:-1]
        blocks = dual_derivatives(z[:, first_exponential:-1])
        for place in range(blocks.shape[1]):
            rows = slice(first_exponential + 3 * place, first_exponential + 3 * place + 3)
            derivative[:, rows, rows] = blocks[:, place]
        identity = np.eye(size)
        return (self._skew[chosen] - identity) @ derivative + identity


def _least_squares(matrix: np.ndarray, right: np.ndarray, cutoff: float) -> np.ndarray:
    """The shortest of the nearest solutions of every program; smaller singular values, relatively, count as 0."""
    batch = (torch.from_numpy(np.ascontiguousarray(matrix)), torch.from_numpy(right)[:, :, None])
    return torch.linalg.lstsq(*batch, rcond=cutoff, driver="gelsd").solution[:, :, 0].numpy()

"""A cvxpy problem as a batched, differentiable function that knows how well it was solved.

cvxpylayers turns the problem into cone programs. Left to itself it would also pass on whatever the solver ends with
(an infeasible program's weights look like any others), take a gradient below 1e-8 for zero, and stop where an
interior-point method stops, up to 1e-5 from the minimiser. So the cone programs are solved here, one at a time:
Clarabel as in cvxpy_oracle.py, Newton steps on the optimality conditions, and the derivative there.

This module imports cvxpy, cvxpylayers and diffcp: import it where a program is stated, not before.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from cvxpy.reductions.solvers.conic_solvers.scs_conif import dims_to_solver_dict
from cvxpylayers.interfaces.base import SolverInterface
from cvxpylayers.torch import CvxpyLayer
from diffcp.cone_program import _diffcp, solve_internal
from diffcp.cones import parse_cone_dict, parse_cone_dict_cpp, pi

from maha_megatron.attention.aggregation.cvxpy_oracle import SOLVER_ARGUMENTS

REFINEMENTS = 3
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


class ConicLayer:
    """The variable that solves a problem, as a function of its parameters.

    Args:
        problem: a DPP-compliant cvxpy.Problem.
        parameters: all its cvxpy.Parameters, in the order of the call.
        variable: the cvxpy.Variable to return.
    """

    def __init__(self, problem, parameters, variable) -> None:
        self._solver = _RefinedClarabel()
        self._layer = CvxpyLayer(problem, parameters=parameters, variables=[variable], solver=self._solver)

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, list[Verdict]]:
        """The variable [B, m], differentiable, and a verdict for each of the B programs.

        Args:
            values: parameters [B, ...] in float64 on the CPU.
        """
        (variable,) = self._layer(*values)
        return variable, self._solver.verdicts


class _RefinedClarabel(SolverInterface):
    """Clarabel, refined, and the implicit derivative, one program after another (threads gain nothing here)."""

    canon_solver = "DIFFCP"

    def setup(self, ctx) -> None:
        rows, starts, shape = ctx.reduced_A.problem_data_index
        self._place = (rows, np.repeat(np.arange(shape[1]), np.diff(starts)))
        self._shape = shape

    def solve_torch_batch(self, P, q, A, dims, solver_args, needs_grad):
        cones = dims_to_solver_dict(dims)
        programs = []
        for cost, entries in zip(q.numpy(), A.numpy(), strict=True):
            table = np.zeros(self._shape)
            table[self._place] = entries
            programs.append(_ConeProgram(-table[:, :-1], table[:, -1], cost[:-1].copy(), cones))
        self.verdicts = [program.solve() for program in programs]
        primal, dual = (np.stack(parts) for parts in zip(*[(one.x, one.y) for one in programs], strict=True))
        return torch.from_numpy(primal), torch.from_numpy(dual), programs if needs_grad else None

    def derivative_torch_batch(self, dprimal, ddual, saved_state):
        costs, entries = [], []
        for program, step in zip(saved_state, dprimal.numpy(), strict=True):
            d_matrix, d_offset, d_cost = program.pull_back(step)
            costs.append(np.append(d_cost, 0.0))
            entries.append(np.column_stack([-d_matrix, d_offset])[self._place])
        return None, torch.from_numpy(np.stack(costs)), torch.from_numpy(np.stack(entries))


class _ConeProgram:
    """min c'x subject to A x + s = b, s in a cone K, and its dual.

    A solution is a zero of the homogeneous embedding's residual (Busseti, Moursi and Boyd, "Solution refinement at
    regular points of conic problems", 2019), for z = (x, v, 1), y the projection of v on the dual cone and s = y - v:

        R(z) = (Q - I) P(z) + z,    Q = [0 A' c; -A 0 b; -c' -b' 0],    P(z) = (x, y, 1)

    Newton steps on R take what an interior-point method leaves, up to 1e-5 in the minimiser, to rounding (with an
    exponential cone to about 1e-9, and 1e-6 where a weight is below 1e-6: diffcp's projection is no better); and R's
    Jacobian gives the derivative of the solution (Agrawal and others, "Differentiating through a cone program", 2019).
    """

    def __init__(self, matrix, offset, cost, cones) -> None:
        self._matrix, self._offset, self._cost, self._cones = matrix, offset, cost, cones
        rows, columns = matrix.shape
        self._skew = np.zeros((rows + columns + 1,) * 2)
        self._skew[:columns, columns:-1], self._skew[:columns, -1] = matrix.T, cost
        self._skew[columns:-1, -1] = offset
        self._skew -= self._skew.T
        self._parsed = parse_cone_dict(cones)

    def solve(self) -> Verdict:
        program = (sparse.csc_matrix(self._matrix), self._offset, self._cost, self._cones)
        result = solve_internal(*program, **SOLVER_ARGUMENTS)
        self._z = np.concatenate([result["x"], result["y"] - result["s"], [1.0]])
        no_solution = NO_SOLUTION.get(result["info"]["status"])
        residual = np.abs(self._residual(self._z)).max()
        if no_solution is None and np.isfinite(residual):
            residual = self._refine(residual)
        projected = self._project(self._z)
        self.x, self.y = np.split(projected[:-1], [len(self._cost)])
        return Verdict(residual=float(residual / (1.0 + np.abs(self._z).max())), no_solution=no_solution)

    def _refine(self, residual) -> float:
        """Newton steps, each halved until it helps, as long as it does."""
        for _ in range(REFINEMENTS):
            step = np.linalg.lstsq(self._jacobian()[:, :-1], -self._residual(self._z), rcond=None)[0]
            for size in (1.0, 0.5, 0.25, 0.125):
                moved = self._z + np.append(size * step, 0.0)
                after = np.abs(self._residual(moved)).max()
                if after < residual:
                    break
            else:
                return residual
            self._z, residual = moved, after
        return residual

    def pull_back(self, d_primal):
        """Gradients of A, b and c from that of x."""
        columns = len(d_primal)
        incoming = np.concatenate([d_primal, np.zeros(len(self._offset)), [-self.x @ d_primal]])
        response = np.linalg.lstsq(self._jacobian().T, incoming, rcond=None)[0]
        projected = self._project(self._z)
        outer = np.outer(projected, response)  # minus the transpose of the gradient of Q
        d_skew = outer - outer.T
        return d_skew[:columns, columns:-1].T, d_skew[-1, columns:-1], d_skew[:columns, -1]

    def _project(self, z):
        columns = len(self._cost)
        return np.concatenate([z[:columns], pi(z[columns:-1], self._parsed, dual=True), z[-1:]])

    def _residual(self, z):
        projected = self._project(z)
        return self._skew @ projected - projected + z

    def _jacobian(self):
        x, v = np.split(self._z[:-1], [len(self._cost)])
        return _diffcp.M_dense(self._skew, parse_cone_dict_cpp(self._parsed), x, v, 1.0)

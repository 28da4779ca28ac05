"""A cvxpy problem as a batched, differentiable function that knows how well it was solved.

cvxpylayers turns the problem into cone programs. Left to itself it would also pass on whatever the solver ends with
(an infeasible program's weights look like any others), take a gradient below 1e-8 for zero, and stop where an
interior-point method stops, up to 1e-5 from the minimiser; and where an entropy's weight is small, its gradient may be
off by any factor. So the cone programs are solved and differentiated here (cone_programs.py), with Clarabel set as in
cvxpy_oracle.py.

This module imports cvxpy, cvxpylayers and diffcp: import it where a program is stated, not before.
"""

import itertools

import numpy as np
import torch
from cvxpy.reductions.solvers.conic_solvers.scs_conif import dims_to_solver_dict
from cvxpylayers.interfaces.base import SolverInterface
from cvxpylayers.torch import CvxpyLayer

from maha_megatron.attention.aggregation.cone_programs import ConePrograms, Verdict

# bounds what exists beside the programs themselves; more at once is no faster
PROGRAMS_AT_ONCE = 1000


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
    """ConePrograms behind cvxpylayers' interface of a solver."""

    canon_solver = "DIFFCP"

    def setup(self, ctx) -> None:
        rows, starts, self._shape = ctx.reduced_A.problem_data_index
        self._place = (slice(None), rows, np.repeat(np.arange(self._shape[1]), np.diff(starts)))

    def solve_torch_batch(self, P, q, A, dims, solver_args, needs_grad):
        parts, solved = [], []
        for start in range(0, len(A), PROGRAMS_AT_ONCE):
            here = slice(start, start + PROGRAMS_AT_ONCE)
            table = np.zeros((len(A[here]), *self._shape))
            table[self._place] = A[here].numpy()
            cost = q[here].numpy()[:, :-1].copy()
            programs = ConePrograms(-table[:, :, :-1], table[:, :, -1].copy(), cost, dims_to_solver_dict(dims))
            solved.append(programs.solve())
            parts.append(programs if needs_grad else None)
        primal, dual, verdicts = zip(*solved, strict=True)
        self.verdicts = list(itertools.chain.from_iterable(verdicts))
        return *(torch.from_numpy(np.concatenate(part)) for part in (primal, dual)), parts if needs_grad else None

    def derivative_torch_batch(self, dprimal, ddual, saved_state):
        incoming = dprimal.split(PROGRAMS_AT_ONCE)
        parts = [self._pull_back(*one) for one in zip(saved_state, incoming, strict=True)]
        d_table, d_costs = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        return None, d_costs, d_table

    def _pull_back(self, programs, dprimal) -> tuple[np.ndarray, np.ndarray]:
        d_matrix, d_offset, d_cost = programs.pull_back(dprimal.numpy())
        d_table = np.concatenate([-d_matrix, d_offset[:, :, None]], axis=2)
        return d_table[self._place], np.pad(d_cost, ((0, 0), (0, 1)))

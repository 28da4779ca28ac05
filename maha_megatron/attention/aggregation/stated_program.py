"""Programs over the scales that a researcher states with cvxpy: `aggregation: program`.

A program is written once for every number m of feasible scales. Feasible scales are always the finest ones, since scale
l needs r^l rows, so m says which they are; entry 0 is the finest, entry m - 1 the coarsest. For example

    def build(scales: int) -> ScaleProgram:
        weights, utilities = cvxpy.Variable(scales), cvxpy.Parameter(scales)
        worth = utilities @ weights + cvxpy.sum(cvxpy.entr(weights))
        problem = cvxpy.Problem(cvxpy.Maximize(worth), [cvxpy.sum(weights) == 1, weights >= 0])
        return ScaleProgram(problem=problem, weights=weights, utilities=utilities)

A program has to keep its weights on the simplex (they sum to 1, none is negative) whatever the utilities are, because
the output is a mean of the scales' outputs; that is checked where the program is loaded, to 1e-6. configs/programs/ has
worked examples and their cost: one solve takes 0.25 to 1.1 ms forward, for every row and head.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.errors import ProgramError

if TYPE_CHECKING:
    import cvxpy

SIMPLEX_TOLERANCE = 1e-6
# relative residuals of the optimality conditions: a miss is counted, an unsolved program ends the run
MISSED_ABOVE, UNSOLVED_ABOVE = 1e-6, 1e-4
_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class ScaleProgram:
    """A program over m scales.

    Attributes:
        problem: a DPP-compliant cvxpy.Problem without other parameters than these.
        weights: the cvxpy.Variable of shape (m,) that holds the scales' weights, finest first.
        utilities: the cvxpy.Parameter of shape (m,) that receives the utilities c.
        gram_factor: with coupling: gram, the cvxpy.Parameter of shape (m, m) that receives H with H'H = kappa G, so
            that kappa w'Gw is cvxpy.sum_squares(gram_factor @ weights); without coupling None.
    """

    problem: "cvxpy.Problem"
    weights: "cvxpy.Variable"
    utilities: "cvxpy.Parameter"
    gram_factor: "cvxpy.Parameter | None" = None


class UnsolvedProgram(ProgramError):
    """One row and head whose program has no solution. `row` counts in the call, `head` on this rank."""

    def __init__(self, reason: str, *, row: int, head: int = 0) -> None:
        super().__init__(f"row {row}, head {head}: {reason}")
        self.reason, self.row, self.head = reason, row, head


class StatedProgram:
    """A researcher's program for every number of feasible scales, as one function of a batch.

    Args:
        build: gives the ScaleProgram of m scales.
        scales: L; m goes from 1 to it.
        coupled: whether programs have a gram_factor (coupling: gram).
        name: for messages.

    Raises:
        ProgramError: some ScaleProgram is not what it has to be; the message says what to change.
    """

    def __init__(self, build: Callable[[int], ScaleProgram], *, scales: int, coupled: bool, name: str) -> None:
        self._name, self._coupled = name, coupled
        self._layers = {m: self._layer(build, m) for m in range(1, scales + 1)}

    def __call__(self, payoff: torch.Tensor, gram_factor: torch.Tensor | None, feasible: torch.Tensor) -> torch.Tensor:
        """Weights of P programs: as `solve`, without the residuals."""
        return self.solve(payoff, gram_factor, feasible)[0]

    def solve(
        self, payoff: torch.Tensor, gram_factor: torch.Tensor | None, feasible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of P programs, and how well each was solved.

        Args:
            payoff: utilities c [P, L], any floating dtype and device; not read at infeasible scales.
            gram_factor: H [P, L, L] with H'H = kappa G (solvers.gram_factor), with coupling only.
            feasible: bool [P, L]; in each row the finest scales, at least one.

        Returns:
            weights [P, L] in float64 on payoff's device, differentiable; infeasible scales have weight and gradient
            exactly 0. Residuals [P] float64, relative, detached. This waits for the device: the solver is on the CPU.

        Raises:
            UnsolvedProgram: infeasible, unbounded or not solved; its `row` counts in P.
        """
        assert (gram_factor is not None) == self._coupled
        scales = payoff.shape[-1]
        count = feasible.sum(-1).cpu()
        assert torch.equal(feasible.cpu(), torch.arange(scales) < count[:, None]), "feasible scales are the finest ones"
        payoff_cpu = payoff.double().cpu()
        factor_cpu = None if gram_factor is None else gram_factor.double().cpu()
        weights = payoff_cpu.new_zeros(payoff.shape)
        residual = payoff_cpu.new_zeros(len(payoff))
        for m in range(1, scales + 1):
            chosen = (count == m).nonzero()[:, 0]
            if len(chosen) == 0:
                continue
            factor = None if factor_cpu is None else factor_cpu[chosen, :m, :m]
            found, residual[chosen] = self._solve_group(m, payoff_cpu[chosen, :m], factor, chosen)
            weights = weights.index_copy(0, chosen, torch.nn.functional.pad(found, (0, scales - m)))
        return weights.to(payoff.device), residual.to(payoff.device)

    def _solve_group(self, m, payoff, factor, places) -> tuple[torch.Tensor, torch.Tensor]:
        layer, parameters_constrain = self._layers[m]
        if m == 1 and not parameters_constrain:  # one point, known to be feasible since the program was loaded
            return payoff.new_ones(payoff.shape), payoff.new_zeros(len(payoff))
        weights, verdicts = layer(payoff) if factor is None else layer(payoff, factor)
        for place, verdict in zip(places.tolist(), verdicts, strict=True):
            if verdict.no_solution or not verdict.residual <= UNSOLVED_ABOVE:
                raise UnsolvedProgram(f"{self._name} with {m} feasible scales is {_why(verdict)}", row=place)
        return weights, payoff.new_tensor([verdict.residual for verdict in verdicts])

    # ------------------------------------------------------------------------------------------- checks at the start

    def _layer(self, build, m: int):
        """The differentiable layer of m scales, tried, and whether parameters stand in its constraints."""
        from maha_megatron.attention.aggregation.conic_layer import ConicLayer

        with _explained(f"{self._name}({m}) raised"):
            program = build(m)
        self._check(program, m)
        parameters = [program.utilities, *([program.gram_factor] if self._coupled else [])]
        with _explained(f"{self._name}({m}): cvxpylayers cannot differentiate this problem, or not solve it:"):
            layer = ConicLayer(program.problem, parameters, program.weights)
        self._try(layer, m)
        return layer, any(constraint.parameters() for constraint in program.problem.constraints)

    def _check(self, program: ScaleProgram, m: int) -> None:
        """Form and shapes; nothing is solved."""
        place = f"{self._name}({m})"
        if not isinstance(program, ScaleProgram):
            raise ProgramError(f"{place} returns a {type(program).__name__}; return a ScaleProgram ({__name__})")
        for part, shape in (("weights", (m,)), ("utilities", (m,)), ("gram_factor", (m, m))):
            found = getattr(program, part)
            if found is not None and found.shape != shape:
                raise ProgramError(f"{place}: {part} has shape {found.shape}; it must be {shape} for {m} scales")
        if self._coupled and program.gram_factor is None:
            raise ProgramError(
                f"{place} has no gram_factor, but maha.coupling is gram; state the coupling through "
                "ScaleProgram.gram_factor, or set maha.coupling: none"
            )
        if program.gram_factor is not None and not self._coupled:
            raise ProgramError(
                f"{place} has a gram_factor, but maha.coupling is none and would leave it without a value; set "
                "maha.coupling: gram, or remove it"
            )
        given = {part for part in (program.utilities, program.gram_factor) if part is not None}
        used = set(program.problem.parameters())
        if used != given:
            names = sorted(str(part) for part in used ^ given)
            what = "are not ScaleProgram.utilities or gram_factor" if used - given else "do not occur in the problem"
            raise ProgramError(f"{place}: the parameters {', '.join(names)} {what}; use numbers, or remove them")
        if not any(program.weights is variable for variable in program.problem.variables()):
            raise ProgramError(f"{place}: the weights do not occur in the problem")
        if not program.problem.is_dpp():
            why = "convex" if not program.problem.is_dcp() else "DPP, since it multiplies parameters with each other"
            raise ProgramError(
                f"{place}: the problem is not {why}; state it by cvxpy's rules of disciplined parametrised programming "
                "(a parameter enters affinely: sum_squares(gram_factor @ weights) instead of quad_form)"
            )

    def _try(self, layer, m: int) -> None:
        """Solve at utilities 0 and at random ones: a feasible point exists, and the weights are on the simplex."""
        generator = torch.Generator().manual_seed(m)
        payoff = torch.randn(_SAMPLES, m, generator=generator, dtype=torch.float64)
        payoff[0] = 0.0
        outputs = torch.randn(_SAMPLES, m, m, generator=generator, dtype=torch.float64)
        place = f"{self._name}({m})"
        with torch.no_grad(), _explained(f"{place}: the solver fails:"):
            weights, verdicts = layer(payoff, outputs) if self._coupled else layer(payoff)
        for sample, weight, verdict in zip(payoff, weights, verdicts, strict=True):
            at = f"at utilities {[round(value, 3) for value in sample.tolist()]}"
            if verdict.no_solution or not verdict.residual <= UNSOLVED_ABOVE:
                raise ProgramError(
                    f"{place} is {_why(verdict)} {at}; every number of feasible scales needs a solution, 1 included"
                )
            if abs(weight.sum() - 1.0) > SIMPLEX_TOLERANCE or weight.min() < -SIMPLEX_TOLERANCE:
                raise ProgramError(
                    f"{place} gives weights {[round(value, 6) for value in weight.tolist()]} {at}, off the simplex; "
                    "add the constraints cvxpy.sum(weights) == 1 and weights >= 0"
                )


def solve_rows(
    program: Callable[..., torch.Tensor],
    payoff_tnl: torch.Tensor,
    gram_factor_tnll: torch.Tensor | None,
    feasible_tnl: torch.Tensor,
) -> tuple[torch.Tensor, SolveReport | None]:
    """A program for every row and head: weights [t, n, L], and the report of a StatedProgram.

    Args:
        program: a StatedProgram, or any function that is called like one; that answers for its weights itself.

    Raises:
        UnsolvedProgram: with row and head.
    """
    t, n, scales = payoff_tnl.shape
    factor = None if gram_factor_tnll is None else gram_factor_tnll.flatten(0, 1)
    payoff_pl = payoff_tnl.masked_fill(~feasible_tnl, 0.0).flatten(0, 1)
    batch = (payoff_pl, factor, feasible_tnl.flatten(0, 1))
    if not isinstance(program, StatedProgram):
        return program(*batch).view(t, n, scales), None
    try:
        weights_pl, residual_p = program.solve(*batch)
    except UnsolvedProgram as error:
        raise UnsolvedProgram(error.reason, row=error.row // n, head=error.row % n) from error
    missed = (residual_p > MISSED_ABOVE).sum()
    report = SolveReport(residual_tn=residual_p.view(t, n), steps_tn=None, missed=missed)
    return weights_pl.view(t, n, scales), report


def load_program(name: str, *, scales: int, coupling: str) -> StatedProgram:
    """Import `module:function` and make its programs ready. THIS RUNS CODE: ask for permission first.

    Args:
        name: module:function, importable.
        scales: L.
        coupling: "none" or "gram".

    Raises:
        ProgramError: it cannot be imported or is no usable program; the message says what to change.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ProgramError(f"maha.program: '{name}' is no module:function; write for example my_module:build")
    for package in ("cvxpy", "cvxpylayers.torch", "diffcp"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ProgramError(
                f"maha.aggregation: program needs the package {package.split('.')[0]}, which cannot be imported "
                f"({error}); install it: pip install cvxpylayers"
            ) from error
    with _explained(f"maha.program: {module_name} cannot be imported (its folder must be on PYTHONPATH):"):
        module = importlib.import_module(module_name)
    build = getattr(module, function_name, None)
    if not callable(build):
        raise ProgramError(f"maha.program: {module.__file__} has no function {function_name}; name one that it has")
    return StatedProgram(build, scales=scales, coupled=coupling == "gram", name=name)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever a researcher's code or cvxpy raises, said as an error for people."""
    try:
        yield
    except Exception as error:
        raise ProgramError(f"{what} {type(error).__name__}: {error}") from error


def _why(verdict) -> str:
    return verdict.no_solution or f"not solved (relative residual {verdict.residual:.1e})"

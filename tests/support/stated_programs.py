"""Programs over the scales as a researcher would state them: right ones, and one with every mistake."""

import cvxpy

from maha_megatron.attention.aggregation.stated_program import ScaleProgram


def stated(scales: int, regularizer: str, *, coupled: bool, constraints=lambda weights, utilities: []) -> ScaleProgram:
    """The convex program, coupled or not, with further constraints."""
    weights, utilities = cvxpy.Variable(scales), cvxpy.Parameter(scales)
    factor = cvxpy.Parameter((scales, scales)) if coupled else None
    omega = -cvxpy.sum(cvxpy.entr(weights)) if regularizer == "entropy" else cvxpy.sum_squares(weights) / 2
    cost = omega - utilities @ weights + (cvxpy.sum_squares(factor @ weights) / 2 if coupled else 0)
    simplex = [cvxpy.sum(weights) == 1, weights >= 0]
    problem = cvxpy.Problem(cvxpy.Minimize(cost), simplex + constraints(weights, utilities))
    return ScaleProgram(problem=problem, weights=weights, utilities=utilities, gram_factor=factor)


def changed(scales: int, **parts) -> ScaleProgram:
    """The uncoupled entropy program with parts of it replaced by what a function of it gives."""
    program = stated(scales, "entropy", coupled=False)
    values = {name: getattr(program, name) for name in ("problem", "weights", "utilities", "gram_factor")}
    return ScaleProgram(**(values | {name: make(program) for name, make in parts.items()}))


def bounded_above(scales: int) -> ScaleProgram:
    """The first utility may be at most 2: otherwise there is no feasible point."""
    return stated(scales, "entropy", coupled=False, constraints=lambda w, c: [c[0] + 0 * w[0] <= 2])


def no_entropy(scales: int) -> ScaleProgram:
    """A linear program without its simplex: unbounded."""
    return changed(scales, problem=lambda p: cvxpy.Problem(cvxpy.Maximize(p.utilities @ p.weights), [p.weights >= 0]))


def off_simplex(scales: int) -> ScaleProgram:
    """Weights that sum to 2."""
    return changed(
        scales,
        problem=lambda p: cvxpy.Problem(p.problem.objective, [cvxpy.sum(p.weights) == 2, p.weights >= 0]),
    )


def below_zero(scales: int) -> ScaleProgram:
    """Weights that sum to 1 and may be negative."""
    weights, utilities = cvxpy.Variable(scales), cvxpy.Parameter(scales)
    worth = utilities @ weights - cvxpy.sum_squares(weights) / 20
    problem = cvxpy.Problem(cvxpy.Maximize(worth), [cvxpy.sum(weights) == 1])
    return ScaleProgram(problem=problem, weights=weights, utilities=utilities)


def never_alone(scales: int) -> ScaleProgram:
    """No scale above 0.8: infeasible with one scale."""
    return stated(scales, "entropy", coupled=False, constraints=lambda w, c: [w <= 0.8])


def not_dpp(scales: int) -> ScaleProgram:
    """Two parameters multiplied."""
    return changed(
        scales,
        problem=lambda p: cvxpy.Problem(
            cvxpy.Maximize(cvxpy.sum(cvxpy.entr(p.weights)) + cvxpy.multiply(p.utilities, p.utilities) @ p.weights),
            p.problem.constraints,
        ),
    )


def not_convex(scales: int) -> ScaleProgram:
    """A convex function maximised."""
    return changed(
        scales,
        problem=lambda p: cvxpy.Problem(
            cvxpy.Maximize(cvxpy.sum_squares(p.weights) + p.utilities @ p.weights), p.problem.constraints
        ),
    )


def integral(scales: int) -> ScaleProgram:
    """One scale takes all: not differentiable."""
    weights, utilities = cvxpy.Variable(scales, boolean=True), cvxpy.Parameter(scales)
    problem = cvxpy.Problem(cvxpy.Maximize(utilities @ weights), [cvxpy.sum(weights) == 1])
    return ScaleProgram(problem=problem, weights=weights, utilities=utilities)


def another_parameter(scales: int) -> ScaleProgram:
    """A bound that nobody would give a value."""
    return stated(scales, "entropy", coupled=False, constraints=lambda w, c: [w <= cvxpy.Parameter(name="ceiling")])


def unused_utilities(scales: int) -> ScaleProgram:
    """The utilities do not occur."""
    return changed(scales, utilities=lambda p: cvxpy.Parameter(scales, name="idle"))


def other_weights(scales: int) -> ScaleProgram:
    """The weights are a variable of no problem."""
    return changed(scales, weights=lambda p: cvxpy.Variable(scales))


def column(scales: int) -> ScaleProgram:
    """Weights as a column."""
    return changed(scales, weights=lambda p: cvxpy.Variable((scales, 1)))


def wide(scales: int) -> ScaleProgram:
    """Utilities of more scales than there are."""
    return changed(scales, utilities=lambda p: cvxpy.Parameter(scales + 1))


def plain(scales: int):
    """A cvxpy problem instead of a ScaleProgram."""
    return stated(scales, "entropy", coupled=False).problem


def raising(scales: int) -> ScaleProgram:
    """An error of the researcher's own."""
    raise KeyError("ceiling")


def entropy(scales: int) -> ScaleProgram:
    return stated(scales, "entropy", coupled=False)


def entropy_coupled(scales: int) -> ScaleProgram:
    return stated(scales, "entropy", coupled=True)


NOT_A_FUNCTION = 3

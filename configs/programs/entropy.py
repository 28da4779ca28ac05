r"""The default aggregation, stated as a program: the smallest example, and the one to compare your own with.

    maximise  c'w - sum_l w_l log w_l   over the simplex                       build
    maximise  c'w - 1/2 kappa w'Gw - sum_l w_l log w_l   over the simplex      build_coupled, with maha.coupling: gram

    python launch/pretrain.py --config FILE --set maha.aggregation=program \
        --set maha.program=configs.programs.entropy:build --allow-program configs.programs.entropy:build

`aggregation: convex` has the same weights and is about a thousand times faster: for every row and head a program of 2,
4 and 8 feasible scales costs 0.25, 0.4 and 0.75 ms forward (coupled: 0.4, 0.6 and 1.1 ms) and 0.03, 0.1 and 0.3 ms
backward, on one x86 core, so a step of 4,096 tokens with 4 heads takes about 8 s a layer. Kept for backward are about
1, 2.5 and 7.5 kB a program (coupled: 2, 4 and 11 kB), some 40 MB for that layer, and up to 0.13 MB for each of the
1,000 that are solved at once. Use programs on short sequences, to learn whether a constraint is worth a solver of its
own.
"""

import cvxpy

from maha_megatron.attention.aggregation.stated_program import ScaleProgram


def build(scales: int) -> ScaleProgram:
    """The program of `scales` feasible scales."""
    weights, utilities = cvxpy.Variable(scales), cvxpy.Parameter(scales)
    worth = utilities @ weights + cvxpy.sum(cvxpy.entr(weights))
    problem = cvxpy.Problem(cvxpy.Maximize(worth), [cvxpy.sum(weights) == 1, weights >= 0])
    return ScaleProgram(problem=problem, weights=weights, utilities=utilities)


def build_coupled(scales: int) -> ScaleProgram:
    """The same with coupling; kappa w'Gw enters through the factor H, as disciplined programming asks for."""
    weights, utilities = cvxpy.Variable(scales), cvxpy.Parameter(scales)
    factor = cvxpy.Parameter((scales, scales))
    likeness = cvxpy.sum_squares(factor @ weights)
    worth = utilities @ weights - likeness / 2 + cvxpy.sum(cvxpy.entr(weights))
    problem = cvxpy.Problem(cvxpy.Maximize(worth), [cvxpy.sum(weights) == 1, weights >= 0])
    return ScaleProgram(problem=problem, weights=weights, utilities=utilities, gram_factor=factor)

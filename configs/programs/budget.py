r"""A budget and a floor: fine scales may be used only so much, and the coarsest always a little.

    maximise    c'w - sum_l w_l log w_l
    subject to  sum_l w_l = 1,  w >= 0
                sum_l COST^l w_l <= BUDGET       a key of scale l stands for 4^l rows, so it costs a row 4^-l of a key
                w of the coarsest feasible scale >= FLOOR

    python launch/pretrain.py --config FILE --set maha.aggregation=program \
        --set maha.program=configs.programs.budget:build --allow-program configs.programs.budget:build

Feasible scales are the finest ones: rows at a document's start have scale 0 alone, where no budget below 1 can be kept
and none is asked for. Cost for every row and head that sees 2, 4 or 8 scales, on one x86 core: 0.25, 0.4 or 0.8 ms
forward, 0.04, 0.1 or 0.3 ms backward, and 1, 3 or 7.5 kB of memory until then; see entropy.py.
"""

import cvxpy
import numpy as np

from maha_megatron.attention.aggregation.stated_program import ScaleProgram

COST, BUDGET, FLOOR = 0.25, 0.6, 0.1


def build(scales: int) -> ScaleProgram:
    """The program of `scales` feasible scales."""
    weights, utilities = cvxpy.Variable(scales), cvxpy.Parameter(scales)
    constraints = [cvxpy.sum(weights) == 1, weights >= 0]
    if scales > 1:
        constraints += [COST ** np.arange(scales) @ weights <= BUDGET, weights[-1] >= FLOOR]
    worth = utilities @ weights + cvxpy.sum(cvxpy.entr(weights))
    problem = cvxpy.Problem(cvxpy.Maximize(worth), constraints)
    return ScaleProgram(problem=problem, weights=weights, utilities=utilities)

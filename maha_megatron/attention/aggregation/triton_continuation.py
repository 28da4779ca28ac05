"""Programs that Newton's fixed steps left unsolved, by lowering lambda in fp64: `continue_in_lambda` of entropy.py.

One program per tile of rows and head. It looks at what the steps left over, and goes over those lines one after the
other, with a vector over scales and a matrix over pairs of scales, in loops that end by themselves: the device is never
asked whether there were any, so that a pass does not wait for it. There seldom are.
"""

import triton
import triton.language as tl

from maha_megatron.attention.aggregation import entropy
from maha_megatron.attention.aggregation.triton_equilibrium import EPSILON

ARMIJO = tl.constexpr(entropy.ARMIJO)
LARGEST_FACTOR = tl.constexpr(entropy.LARGEST_FACTOR)
STAGE_STEPS = tl.constexpr(entropy.STAGE_STEPS)
STAGE_RESIDUAL = tl.constexpr(entropy.STAGE_RESIDUAL)
STAGES = tl.constexpr(entropy.STAGES)
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def times(matrix, vector):
    """M v."""
    return tl.sum(matrix * vector[None, :], 1)


@triton.jit
def entry(vector, at, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == at, vector, 0.0), 0)


@triton.jit
def tangent(matrix, scaling, right, SIZE: tl.constexpr):
    """`solve_tangent` of programs.py: (I + D M D)^-1 of D r and D by elimination, without pivoting."""
    index = tl.arange(0, SIZE)
    diagonal = (index[:, None] == index[None, :]).to(tl.float64)
    table = diagonal + scaling[:, None] * matrix * scaling[None, :]
    first, second = scaling * right, scaling
    for k in tl.range(0, SIZE):
        here = (index == k)[:, None]
        row = tl.sum(tl.where(here, table, 0.0), 0)
        column = tl.sum(tl.where((index == k)[None, :], table, 0.0), 1)
        pivot = entry(row, k, SIZE)
        row = row / pivot
        first_here, second_here = entry(first, k, SIZE) / pivot, entry(second, k, SIZE) / pivot
        table = tl.where(here, row[None, :], table - column[:, None] * row[None, :])
        first = tl.where(index == k, first_here, first - column * first_here)
        second = tl.where(index == k, second_here, second - column * second_here)
    price = tl.sum(scaling * first, 0) / tl.sum(scaling * second, 0)
    return scaling * (first - price * second)


@triton.jit
def evaluated(x, matrix, payoff, feasible):
    """x moved to a maximum of 0, its softmax w, F = x - c + M w centred, and its magnitude; over feasible scales."""
    x = tl.where(feasible, x - tl.max(tl.where(feasible, x, float("-inf")), 0), 0.0)
    weight = tl.where(feasible, tl.exp(x), 0.0)
    weight = weight / tl.sum(weight, 0)
    force = x - payoff + times(matrix, weight)
    highest = tl.max(tl.where(feasible, force, float("-inf")), 0)
    lowest = tl.min(tl.where(feasible, force, float("inf")), 0)
    size = (highest - lowest) / 2 + 0.0 * tl.sum(force, 0)  # no number if F has one that is none
    return x, weight, force - (highest + lowest) / 2, size


@triton.jit
def stage(start, matrix, payoff, feasible, target, SIZE: tl.constexpr):
    """Damped Newton with two trials a step, `newton` of entropy.py: x, w, relative residual and steps."""
    magnitude = tl.max(tl.abs(payoff), 0) + tl.max(tl.max(tl.abs(matrix), 0), 0)
    x, weight, force, size = evaluated(start, matrix, payoff, feasible)
    length, steps = tl.full([], 1.0, tl.float64), tl.full([], 0, tl.int32)
    unsolved = size > target * (tl.max(tl.abs(x), 0) + magnitude)
    while unsolved & (steps < STAGE_STEPS):
        shift = tangent(matrix, tl.sqrt(weight), force, SIZE)
        move = length * (times(matrix, shift) - force)
        new_x, new_weight, new_force, new_size = evaluated(x + move, matrix, payoff, feasible)
        growth = move - tl.sum(weight * move, 0)
        grown = tl.where(growth >= -0.5, tl.log(1.0 + tl.maximum(growth, -0.5)), 2.0 * growth + 1.0 - LOG_2)
        other_x, other_weight, other_force, other_size = evaluated(x + grown, matrix, payoff, feasible)
        if other_size < new_size:
            new_x, new_weight, new_force, new_size = other_x, other_weight, other_force, other_size
        if new_size <= (1.0 - ARMIJO * length) * size:
            x, weight, force, size = new_x, new_weight, new_force, new_size
            length = tl.minimum(4.0 * length, 1.0)
        else:
            length = length / 4.0
        steps += 1
        unsolved = size > target * (tl.max(tl.abs(x), 0) + magnitude)
    return x, weight, size / tl.maximum(tl.max(tl.abs(x), 0) + magnitude, 2.2250738585072014e-308), steps


@triton.jit
def load_program(
    utilities, lses, products, kappa, skew, line, SCALES: tl.constexpr, LSE: tl.constexpr, SIZE: tl.constexpr
):
    """M, c and which scales are feasible, of one line, in fp64; what is not feasible is 0."""
    index = tl.arange(0, SIZE)
    lse = tl.load(lses + line * SCALES + index, mask=index < SCALES, other=float("-inf")).to(tl.float64)
    feasible = lse > float("-inf")
    payoff = tl.load(utilities + line * SCALES + index, mask=feasible, other=0.0).to(tl.float64)
    if LSE:
        payoff += tl.where(feasible, lse, 0.0)
    i, j = index[:, None], index[None, :]
    both = feasible[:, None] & feasible[None, :]
    matrix = tl.zeros([SIZE, SIZE], tl.float64)
    if products is not None:
        at = products + line * (SCALES * SCALES) + i * SCALES + j
        matrix = tl.load(at, mask=both, other=0.0).to(tl.float64)
        mean = tl.sum(tl.sum(tl.where(i == j, matrix, 0.0), 0), 0) / tl.sum(feasible.to(tl.float64), 0)
        matrix = matrix * (tl.load(kappa + tl.program_id(1)) / (mean + EPSILON))
    if skew is not None:
        low, high = tl.minimum(i, j), tl.maximum(i, j)
        at = skew + tl.program_id(1) * (SCALES * (SCALES - 1) // 2)
        at = at + low * SCALES - low * (low + 1) // 2 + high - low - 1
        part = tl.load(at, mask=both & (i != j), other=0.0).to(tl.float64)
        matrix += tl.where(i < j, part, -part)
    return matrix, payoff, feasible


@triton.jit
def continued(matrix, payoff, feasible, TARGET: tl.constexpr, SIZE: tl.constexpr):
    """Weights, relative residual (inf where not solved at lambda = 1) and steps: lambda from max |M| down to 1."""
    start = tl.zeros([SIZE], tl.float64)
    weight, residual = start, tl.full([], float("inf"), tl.float64)
    solved_at = tl.maximum(tl.max(tl.max(tl.abs(matrix), 0), 0), 1.0)
    at, factor = solved_at, tl.full([], LARGEST_FACTOR, tl.float64)
    steps, stages = tl.full([], 0, tl.int32), tl.full([], STAGES, tl.int32)
    while stages > 0:
        target = tl.where(at == 1.0, TARGET, STAGE_RESIDUAL)
        x, found, left, taken = stage(start, matrix / at, payoff / at, feasible, target, SIZE)
        if left <= target:
            if at == 1.0:
                weight, residual, stages = found, left, 1
            start, solved_at = x, at
            factor = tl.minimum(factor * factor, LARGEST_FACTOR)
        else:
            factor = tl.sqrt(factor)
        at = tl.maximum(solved_at / factor, 1.0)
        steps += taken
        stages -= 1
    return weight, residual, steps


@triton.jit
def continuation_kernel(
    utilities,  # [t, n, L]
    lses,  # [t, n, L]
    products,  # [t, n, L, L] or None
    kappa,  # [n] or None
    skew,  # [n, L (L - 1) / 2] or None
    weights,  # [t, n, L]: these three are read, and written where a line was unsolved and is better now
    residuals,  # [t, n]
    steps,  # [t, n]
    rows,
    n,
    SCALES: tl.constexpr,
    LSE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    TARGET: tl.constexpr,
    LINES: tl.constexpr,
    SIZE: tl.constexpr,  # the least power of 2 that is at least SCALES
):
    tile = tl.arange(0, LINES)
    row = tl.program_id(0) * LINES + tile
    left = tl.load(residuals + row.to(tl.int64) * n + tl.program_id(1), mask=row < rows, other=0.0)
    unsolved = tl.where(left <= TOLERANCE, 0, 1)  # what is no number is unsolved too
    while tl.max(unsolved, 0) > 0:
        first = tl.min(tl.where(unsolved > 0, tile, LINES), 0)
        unsolved = tl.where(tile == first, 0, unsolved)
        line = (tl.program_id(0) * LINES + first).to(tl.int64) * n + tl.program_id(1)
        matrix, payoff, feasible = load_program(utilities, lses, products, kappa, skew, line, SCALES, LSE, SIZE)
        weight, residual, taken = continued(matrix, payoff, feasible, TARGET, SIZE)
        if residual < float("inf"):
            index = tl.arange(0, SIZE)
            tl.store(weights + line * SCALES + index, weight.to(tl.float32), mask=index < SCALES)
            tl.store(residuals + line, residual.to(tl.float32))
        tl.store(steps + line, tl.load(steps + line) + taken)

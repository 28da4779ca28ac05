"""Small programs inside a kernel: a tuple has a vector over lines (a row and head each) per scale, or per entry of M.

The arithmetic is that of programs.py and entropy.py, where the equations and the reasons stand: M in row order, D
sqrt(w) or the support, no pivoting. A thread has whole programs, so nothing below crosses threads.
"""

# ruff: noqa: RUF005 (tuples are added: Triton compiles no unpacking into one)

import triton
import triton.language as tl

from maha_megatron.attention.aggregation import entropy

ARMIJO = tl.constexpr(entropy.ARMIJO)


@triton.jit
def positive(x):
    """x >= 0, at least the smallest normal number: keeps 0/0 away."""
    return tl.maximum(x, 1.1754943508222875e-38)


@triton.jit
def times(matrix, vector, SCALES: tl.constexpr):
    """M v."""
    out = ()
    for i in tl.static_range(SCALES):
        total = matrix[i * SCALES] * vector[0]
        for j in tl.static_range(1, SCALES):
            total += matrix[i * SCALES + j] * vector[j]
        out = out + (total,)
    return out


@triton.jit
def transposed(matrix, SCALES: tl.constexpr):
    out = ()
    for i in tl.static_range(SCALES):
        for j in tl.static_range(SCALES):
            out = out + (matrix[j * SCALES + i],)
    return out


@triton.jit
def dot(first, second, COUNT: tl.constexpr):
    total = first[0] * second[0]
    for i in tl.static_range(1, COUNT):
        total += first[i] * second[i]
    return total


@triton.jit
def largest(values, COUNT: tl.constexpr):
    """The greatest magnitude."""
    most = tl.abs(values[0])
    for i in tl.static_range(1, COUNT):
        most = tl.maximum(most, tl.abs(values[i]))
    return most


@triton.jit
def chosen(condition, yes, no, COUNT: tl.constexpr):
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.where(condition, yes[i], no[i]),)
    return out


@triton.jit
def factorised(matrix, scaling, SCALES: tl.constexpr):
    """I + D M D as L U, U with a unit diagonal, L with the pivots."""
    table = ()
    for i in tl.static_range(SCALES):
        for j in tl.static_range(SCALES):
            entry = scaling[i] * matrix[i * SCALES + j] * scaling[j]
            table = table + (entry + 1.0 if i == j else entry,)
    for k in tl.static_range(SCALES - 1):
        inverse = 1.0 / table[k * SCALES + k]
        after = ()
        for i in tl.static_range(SCALES):
            for j in tl.static_range(SCALES):
                entry = table[i * SCALES + j]
                if i == k and j > k:
                    entry = entry * inverse
                if i > k and j > k:
                    entry = entry - table[i * SCALES + k] * (table[k * SCALES + j] * inverse)
                after = after + (entry,)
        table = after
    return table


@triton.jit
def substituted(table, right, SCALES: tl.constexpr):
    """(L U)^-1 r."""
    lower = ()
    for k in tl.static_range(SCALES):
        total = right[k]
        for j in tl.static_range(k):
            total -= table[k * SCALES + j] * lower[j]
        lower = lower + (total / table[k * SCALES + k],)
    upper = (lower[SCALES - 1],)  # of the last scales, in order
    for k in tl.static_range(SCALES - 2, -1, -1):
        total = lower[k]
        for j in tl.static_range(k + 1, SCALES):
            total -= table[k * SCALES + j] * upper[j - k - 1]
        upper = (total,) + upper
    return upper


@triton.jit
def solved(matrix, scaling, table, right, SCALES: tl.constexpr, REFINE: tl.constexpr):
    """(I + D M D)^-1 D r."""
    scaled = ()
    for i in tl.static_range(SCALES):
        scaled = scaled + (scaling[i] * right[i],)
    found = substituted(table, scaled, SCALES)
    if REFINE:
        inner = ()
        for i in tl.static_range(SCALES):
            inner = inner + (scaling[i] * found[i],)
        product, left = times(matrix, inner, SCALES), ()
        for i in tl.static_range(SCALES):
            left = left + (scaled[i] - (found[i] + scaling[i] * product[i]),)
        more, better = substituted(table, left, SCALES), ()
        for i in tl.static_range(SCALES):
            better = better + (found[i] + more[i],)
        found = better
    return found


@triton.jit
def tangent(matrix, scaling, right, SCALES: tl.constexpr, REFINE: tl.constexpr):
    """D z with (I + D M D) z + nu D 1 = D r and 1' D z = 0: the linearised equilibrium."""
    table, ones = factorised(matrix, scaling, SCALES), ()
    for _ in tl.static_range(SCALES):
        ones = ones + (1.0,)
    along_right = solved(matrix, scaling, table, right, SCALES, REFINE)
    along_scaling = solved(matrix, scaling, table, ones, SCALES, REFINE)
    mass = positive(dot(scaling, along_scaling, SCALES))
    price, out = dot(scaling, along_right, SCALES) / mass, ()
    for i in tl.static_range(SCALES):
        out = out + (scaling[i] * (along_right[i] - price * along_scaling[i]),)
    return out


@triton.jit
def highest_of(x, feasible, SCALES: tl.constexpr):
    top = tl.where(feasible[0], x[0], float("-inf"))
    for i in tl.static_range(1, SCALES):
        top = tl.maximum(top, tl.where(feasible[i], x[i], float("-inf")))
    return top


@triton.jit
def softmax(x, feasible, SCALES: tl.constexpr):
    top, raised, total, out = highest_of(x, feasible, SCALES), (), 0.0, ()
    for i in tl.static_range(SCALES):
        raised = raised + (tl.where(feasible[i], tl.exp(tl.where(feasible[i], x[i] - top, 0.0)), 0.0),)
        total += raised[i]
    for i in tl.static_range(SCALES):
        out = out + (raised[i] / total,)
    return out


@triton.jit
def evaluated(x, matrix, payoff, feasible, SCALES: tl.constexpr):
    """x moved to a maximum of 0, its softmax w, F = x - c + M w centred, and its magnitude; over feasible scales."""
    top, moved = highest_of(x, feasible, SCALES), ()
    for i in tl.static_range(SCALES):
        moved = moved + (tl.where(feasible[i], x[i] - top, 0.0),)
    share = softmax(moved, feasible, SCALES)
    product, force = times(matrix, share, SCALES), ()
    for i in tl.static_range(SCALES):
        force = force + (moved[i] - payoff[i] + product[i],)
    lowest = tl.where(feasible[0], force[0], float("inf"))
    for i in tl.static_range(1, SCALES):
        lowest = tl.minimum(lowest, tl.where(feasible[i], force[i], float("inf")))
    highest = highest_of(force, feasible, SCALES)
    middle, centred = (highest + lowest) / 2, ()
    for i in tl.static_range(SCALES):
        centred = centred + (force[i] - middle,)
    return moved, share, centred, (highest - lowest) / 2


@triton.jit
def newton(matrix, payoff, feasible, SCALES: tl.constexpr, STEPS: tl.constexpr, TARGET: tl.constexpr):
    """Weights, relative residual and steps of damped Newton on the logits: `newton` of entropy.py, without host."""
    count, start = 0.0, ()
    for i in tl.static_range(SCALES):
        count += feasible[i].to(tl.float32)
    for i in tl.static_range(SCALES):
        start = start + (tl.where(feasible[i], 1.0 / count, 0.0),)
    product, guess = times(matrix, start, SCALES), ()
    for i in tl.static_range(SCALES):
        guess = guess + (payoff[i] - product[i],)
    x, weight, force, size = evaluated(guess, matrix, payoff, feasible, SCALES)
    magnitude = largest(payoff, SCALES) + largest(matrix, SCALES * SCALES)
    length, steps = tl.full(size.shape, 1.0, tl.float32), tl.zeros(size.shape, tl.int32)
    for _ in tl.range(0, STEPS):
        unsolved = size > TARGET * (largest(x, SCALES) + magnitude)
        scaling = ()
        for i in tl.static_range(SCALES):
            scaling = scaling + (tl.sqrt(weight[i]),)
        shift = tangent(matrix, scaling, force, SCALES, False)
        product, moved = times(matrix, shift, SCALES), ()
        for i in tl.static_range(SCALES):
            moved = moved + (x[i] - length * (force[i] - product[i]),)
        new_x, new_weight, new_force, new_size = evaluated(moved, matrix, payoff, feasible, SCALES)
        better = unsolved & (new_size <= (1.0 - length * ARMIJO) * size)
        x, weight = chosen(better, new_x, x, SCALES), chosen(better, new_weight, weight, SCALES)
        force, size = chosen(better, new_force, force, SCALES), tl.where(better, new_size, size)
        length = tl.where(better, tl.minimum(4.0 * length, 1.0), length / 4.0)
        steps += unsolved.to(tl.int32)
    total = weight[0]
    for i in tl.static_range(1, SCALES):
        total += weight[i]
    residual = size / positive(largest(x, SCALES) + magnitude)
    return weight, residual + 0.0 * total, steps  # no number where weights are none: maxima pass over those


@triton.jit
def sparsemax(payoff, feasible, SCALES: tl.constexpr):
    """max(c - tau, 0) with tau such that it sums to 1: scale i has weight iff 1 + k c_i exceeds the sum of the k
    payoffs that are at least c_i.
    """
    count, total, inside = 0.0, 0.0, ()
    for i in tl.static_range(SCALES):
        higher, total_higher = 0.0, 0.0
        for j in tl.static_range(SCALES):
            above = feasible[j] & (payoff[j] >= payoff[i])
            higher += above.to(tl.float32)
            total_higher += tl.where(above, payoff[j], 0.0)
        inside = inside + (feasible[i] & (1.0 + higher * payoff[i] > total_higher),)
        count += inside[i].to(tl.float32)
        total += tl.where(inside[i], payoff[i], 0.0)
    weight, tau = (), (total - 1.0) / count
    for i in tl.static_range(SCALES):
        weight = weight + (tl.where(inside[i], payoff[i] - tau, 0.0),)
    return weight

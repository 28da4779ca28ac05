"""The weights of the scales and their implicit derivative by kernels: a line (a row and head) to each thread.

    c_l = u_l + LSE_l (where it is a utility)        M = kappa G + A        G = products / (mean of |O_l|^2 + 1e-6)

With dw from what the weights are made into: dc is the linearised equilibrium of M' along dw, and dM_ij = -dc_i w_j. So
the outputs' gradient through G needs no matrix: with a = kappa / (mean + 1e-6) and b = 2 a <dM, G> / |F|,

    dO_l = ... - a (dc_l out + w_l sum_j dc_j O_j) - b O_l
"""

# ruff: noqa: RUF005 (tuples are added: Triton compiles no unpacking into one)

import triton
import triton.language as tl

from maha_megatron.attention.aggregation.triton_programs import (
    dot,
    newton,
    positive,
    sparsemax,
    tangent,
    times,
    transposed,
)

EPSILON = tl.constexpr(1e-6)  # solvers.GRAM_EPSILON


@triton.jit
def lines_here(rows, n, LINES: tl.constexpr):
    """The lines of a tile of rows and a head, which they have in common: row * n + head, and whether there is a row."""
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    return row.to(tl.int64) * n + tl.program_id(1), row < rows


@triton.jit
def load_scales(numbers, line, inside, SCALES: tl.constexpr):
    """A vector over lines for each of a line's L numbers; 0 beyond the last row."""
    out = ()
    for i in tl.static_range(SCALES):
        out = out + (tl.load(numbers + line * SCALES + i, mask=inside, other=0.0),)
    return out


@triton.jit
def load_products(products, line, inside, SCALES: tl.constexpr):
    """A line's <O_i, O_j>, of which those with i >= j are read."""
    out = ()
    for i in tl.static_range(SCALES):
        for j in tl.static_range(SCALES):
            if i >= j:
                at = products + line * (SCALES * SCALES) + i * SCALES + j
                out = out + (tl.load(at, mask=inside, other=0.0),)
    return mirrored(out, SCALES)


@triton.jit
def mirrored(lower, SCALES: tl.constexpr):
    """A symmetric matrix from its entries with i >= j, in row order."""
    out = ()
    for i in tl.static_range(SCALES):
        for j in tl.static_range(SCALES):
            out = out + (lower[i * (i + 1) // 2 + j] if i >= j else lower[j * (j + 1) // 2 + i],)
    return out


@triton.jit
def store_scales(numbers, line, inside, values, SCALES: tl.constexpr):
    for i in tl.static_range(SCALES):
        tl.store(numbers + line * SCALES + i, values[i], mask=inside)


@triton.jit
def feasible_scales(lse, SCALES: tl.constexpr):
    feasible = ()
    for i in tl.static_range(SCALES):
        feasible = feasible + (lse[i] > float("-inf"),)
    return feasible


@triton.jit
def gram(products, feasible, SCALES: tl.constexpr):
    """1 / (mean over feasible scales of |O_l|^2 + 1e-6), and how many those are; O_l is 0 at the others."""
    count, total = 0.0, 0.0
    for i in tl.static_range(SCALES):
        count += feasible[i].to(tl.float32)
        total += products[i * SCALES + i]
    return 1.0 / (total / count + EPSILON), count


@triton.jit
def skew_part(skew, ROW: tl.constexpr, COLUMN: tl.constexpr, SCALES: tl.constexpr):
    """A_ij of this program's head, for i < j."""
    at: tl.constexpr = ROW * SCALES - ROW * (ROW + 1) // 2 + COLUMN - ROW - 1
    return tl.load(skew + tl.program_id(1) * (SCALES * (SCALES - 1) // 2) + at)


@triton.jit
def coupling_matrix(products, strength, skew, feasible, SCALES: tl.constexpr):
    """M of every line: strength times products, plus the skew part; either may be None."""
    matrix = ()
    for i in tl.static_range(SCALES):
        for j in tl.static_range(SCALES):
            entry = tl.zeros(feasible[0].shape, tl.float32)
            if products is not None:
                entry += strength * products[i * SCALES + j]
            if skew is not None and i != j:
                part = skew_part(skew, i, j, SCALES) if i < j else -skew_part(skew, j, i, SCALES)
                entry += tl.where(feasible[i] & feasible[j], part, 0.0)
            matrix = matrix + (entry,)
    return matrix


@triton.jit
def equilibrium_kernel(
    utilities,  # [t, n, L]
    lses,  # [t, n, L]
    products,  # [t, n, L, L] or None
    kappa,  # [n] or None
    skew,  # [n, L (L - 1) / 2] or None
    weights,  # [t, n, L]
    residuals,  # [t, n]
    steps,  # [t, n]
    rows,
    n,
    SCALES: tl.constexpr,
    LSE: tl.constexpr,
    STEPS: tl.constexpr,
    TARGET: tl.constexpr,
    LINES: tl.constexpr,
):
    line, inside = lines_here(rows, n, LINES)
    lse, learned = load_scales(lses, line, inside, SCALES), load_scales(utilities, line, inside, SCALES)
    feasible, payoff = feasible_scales(lse, SCALES), ()
    for i in tl.static_range(SCALES):
        payoff = payoff + (tl.where(feasible[i], learned[i] + lse[i] if LSE else learned[i], 0.0),)
    if products is None and skew is None:
        weight = sparsemax(payoff, feasible, SCALES)  # the entropy's needs no outputs (triton_joint.py)
    else:
        given, strength = None, None
        if products is not None:
            given = load_products(products, line, inside, SCALES)
            inverse, _ = gram(given, feasible, SCALES)
            strength = tl.load(kappa + tl.program_id(1)) * inverse
        matrix = coupling_matrix(given, strength, skew, feasible, SCALES)
        weight, residual, taken = newton(matrix, payoff, feasible, SCALES, STEPS, TARGET)
        tl.store(residuals + line, residual, mask=inside)
        tl.store(steps + line, taken, mask=inside)
    store_scales(weights, line, inside, weight, SCALES)


@triton.jit
def equilibrium_gradient_kernel(
    grad_weights,  # [t, n, L]
    weights,
    lses,
    products,
    kappa,
    skew,
    grad_payoffs,  # dc [t, n, L]
    through_gram,  # [t, n, 2]: a and b of outputs_gradient_kernel; or None
    grad_kappas,  # [t, n]; or None
    rows,
    n,
    SCALES: tl.constexpr,
    ENTROPY: tl.constexpr,
    LINES: tl.constexpr,
):
    line, inside = lines_here(rows, n, LINES)
    grad, weight = load_scales(grad_weights, line, inside, SCALES), load_scales(weights, line, inside, SCALES)
    feasible = feasible_scales(load_scales(lses, line, inside, SCALES), SCALES)
    given, strength, inverse, count = None, None, 0.0, 1.0
    if products is not None:
        given = load_products(products, line, inside, SCALES)
        inverse, count = gram(given, feasible, SCALES)
        strength = tl.load(kappa + tl.program_id(1)) * inverse
    matrix = coupling_matrix(given, strength, skew, feasible, SCALES)
    scaling, squares, total = (), (), 0.0
    for i in tl.static_range(SCALES):
        support = tl.where(weight[i] > 0, 1.0, 0.0)
        scaling = scaling + (tl.sqrt(weight[i]) if ENTROPY else support,)
        squares = squares + (weight[i] if ENTROPY else support,)
        total += squares[i]
    raw = tangent(transposed(matrix, SCALES), scaling, grad, SCALES, True)
    # a change of all payoffs alike changes nothing: take out what rounding left in that direction (solvers.py)
    left, payoff = 0.0, ()
    for i in tl.static_range(SCALES):
        left += raw[i]
    left /= positive(total)
    for i in tl.static_range(SCALES):
        payoff = payoff + (raw[i] - squares[i] * left,)
    store_scales(grad_payoffs, line, inside, payoff, SCALES)
    if products is not None:
        contraction = -dot(payoff, times(given, weight, SCALES), SCALES) * inverse  # <dM, G>
        tl.store(grad_kappas + line, contraction, mask=inside)
        tl.store(through_gram + 2 * line, strength, mask=inside)
        tl.store(through_gram + 2 * line + 1, 2.0 * strength * contraction / count, mask=inside)

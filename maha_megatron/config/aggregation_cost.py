"""Operations of fusing the scales of one row and head beyond utilities and combination: Gram matrix and solver.

What aggregation/solvers.py does, counted by the rules of accounting.py, with every scale feasible. A maximum counts as
one operation per comparison; exponentials, roots, logarithms and selections count as nothing. The number of steps is a
mean that is assumed, not a bound:

    Newton (entropy)        6 steps, the figure of the operator's definition. On typical input 1.2 to 2.9 are measured
                            (kappa 0.1 to 1, a skew part to 1, utilities of a few nats, L = 2..8); a GPU, which cannot
                            stop early without waiting for itself, makes 8.
    supports (quadratic)    up to L = 4 all 2^L - 1, whatever the input.
    path (quadratic)        beyond, 8 steps: 5 to 8 on random programs up to magnitudes of 1e4, 3.6 to 4.6 on typical
                            input.
"""

from math import comb

NEWTON_STEPS = 6
PATH_STEPS = 8
ENUMERATED_SCALES = 4


def gram_flops(scales: int, head_width: int) -> int:
    """G and kappa G: a product of 2d for each pair of scales, i <= j, since G is symmetric.

    Each entry is then divided by the mean of the diagonal and multiplied by kappa; the mean takes L.
    """
    pairs = scales * (scales + 1) // 2
    return pairs * (2 * head_width + 2) + scales


def solver_flops(scales: int, *, aggregation: str, regularizer: str, coupling: str) -> int:
    """Finding the weights once c and kappa G are there.

    0 where there is nothing to find: one scale, equal weights, a softmax. 0 also for a stated program, since nobody but
    its author knows its size; what it costs is measured, not counted.
    """
    if scales == 1 or aggregation in ("mean", "program"):
        return 0
    if aggregation == "convex" and coupling == "none":
        return 0 if regularizer == "entropy" else _sparsemax(scales)
    assembled = scales**2 if (aggregation, coupling) == ("nash", "gram") else 0  # kappa G + A
    magnitude = scales + scales**2 - 1
    if regularizer == "entropy":
        solved = _newton(scales)
    elif scales <= ENUMERATED_SCALES:
        solved = sum(comb(scales, size) * _weights_on_support(size, scales) for size in range(1, scales + 1))
    else:
        # the last support is solved for twice: as it is, and less its scales without weight
        solved = PATH_STEPS * _path_step(scales) + 2 * _weights_on_support(scales, scales)
    return assembled + magnitude + solved


def _newton(scales: int) -> int:
    first_guess = _product(scales) + scales
    step = (
        _linear_system(scales)
        + 2 * (2 * scales - 1)  # the price of sum w = 1: two sums of products
        + 1
        + 3 * scales  # D (a - price b)
        + _product(scales)
        + 2 * scales  # the move
        + _force(scales)
        + scales  # |x|
        + 2
        + 4  # is it better, is it enough
    )
    return first_guess + _force(scales) + NEWTON_STEPS * step


def _force(scales: int) -> int:
    """F(x) = x - c + M softmax(x), its middle taken out, and its half range, from x and a move."""
    softmax = scales + (scales - 1) + scales + (scales - 1) + scales  # moved, less the largest; sum, division
    return softmax + _product(scales) + 2 * scales + 2 * (scales - 1) + scales + 4


def _weights_on_support(size: int, scales: int) -> int:
    """Weights on a support of `size` scales, refined once, and how far all scales are from an equilibrium."""
    refined = _linear_system(size) + 2 * (_product(size) + 4 * size + _substitution(size))
    simplex = 2 * (size - 1) + 2 + 2 * size + (size - 1) + size
    violation = _product(scales) + 4 * scales + (scales - 1) + scales + 2
    return refined + simplex + violation


def _path_step(scales: int) -> int:
    end = 2 * (scales - 1) + 2
    events = scales + 2 * _product(scales) + 3 * scales + (scales - 1)
    return _linear_system(scales) + end + events


def _linear_system(scales: int) -> int:
    """(I + D M D)^-1 times D r and D 1: elimination without pivoting, two right-hand sides."""
    table = 2 * scales**2 + scales
    elimination = scales * (scales - 1) // 2 + (scales - 1) * scales * (2 * scales - 1) // 3
    return table + elimination + scales + 2 * _substitution(scales)


def _substitution(scales: int) -> int:
    return scales + 2 * scales * (scales - 1)


def _product(scales: int) -> int:
    """M v."""
    return scales * (2 * scales - 1)


def _sparsemax(scales: int) -> int:
    sort = scales * (scales - 1) // 2
    support = (scales - 1) + 3 * scales + (scales - 1) + 2 + scales
    return sort + support + (scales - 1) + 2 + scales

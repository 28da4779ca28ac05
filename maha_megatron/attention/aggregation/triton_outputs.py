"""What an aggregation does with the scales' outputs by kernels: each is one pass over O [lines, L, d].

products <O_i, O_j>        out = sum_l w_l O_l        dw_l = <dO, O_l>        dO_l = w_l dO + sum_j S_lj O_j
"""

# ruff: noqa: RUF005 (tuples are added: Triton compiles no unpacking into one)

import triton
import triton.language as tl


@triton.jit
def load_lines(tensor, line, inside, WIDTH: tl.constexpr):
    """[lines, WIDTH] in fp32."""
    at = tensor + line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_lines(tensor, line, inside, x, WIDTH: tl.constexpr):
    at = tensor + line[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at, x.to(tensor.dtype.element_ty), mask=inside[:, None])


@triton.jit
def lines_of_program(lines, LINES: tl.constexpr):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    return line, line < lines


@triton.jit
def products_kernel(outs, products, lines, SCALES: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """<O_i, O_j> [lines, L, L]; every O_i is read once, and held in registers."""
    line, inside = lines_of_program(lines, LINES)
    loaded = ()
    for i in tl.static_range(SCALES):
        loaded = loaded + (load_lines(outs, line * SCALES + i, inside, WIDTH),)
        for j in tl.static_range(i + 1):
            product = tl.sum(loaded[i] * loaded[j], 1)
            tl.store(products + (line * SCALES + i) * SCALES + j, product, mask=inside)
            tl.store(products + (line * SCALES + j) * SCALES + i, product, mask=inside)


@triton.jit
def combine_kernel(outs, weights, out, lines, SCALES: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr):
    line, inside = lines_of_program(lines, LINES)
    total = tl.zeros([LINES, WIDTH], tl.float32)
    for scale in tl.static_range(SCALES):
        weight = tl.load(weights + line * SCALES + scale, mask=inside, other=0.0)
        total += weight[:, None] * load_lines(outs, line * SCALES + scale, inside, WIDTH)
    store_lines(out, line, inside, total, WIDTH)


@triton.jit
def weights_gradient_kernel(
    outs, grad_out, grad_weights, lines, SCALES: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr
):
    line, inside = lines_of_program(lines, LINES)
    grad = load_lines(grad_out, line, inside, WIDTH)
    for scale in tl.static_range(SCALES):
        product = tl.sum(grad * load_lines(outs, line * SCALES + scale, inside, WIDTH), 1)
        tl.store(grad_weights + line * SCALES + scale, product, mask=inside)


@triton.jit
def outputs_gradient_kernel(
    outs,
    out,  # [lines, d]
    weights,
    grad_out,
    grad_payoffs,  # dc [lines, L]; read with `through_gram` only
    through_gram,  # a and b [lines, 2]; or None
    grad_outs,  # [lines, L, d]
    lines,
    SCALES: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
):
    line, inside = lines_of_program(lines, LINES)
    shared = load_lines(grad_out, line, inside, WIDTH)  # of all scales, by weight
    if through_gram is None:
        for scale in tl.range(0, SCALES):
            weight = tl.load(weights + line * SCALES + scale, mask=inside, other=0.0)[:, None]
            store_lines(grad_outs, line * SCALES + scale, inside, weight * shared, WIDTH)
    else:
        strength = tl.load(through_gram + 2 * line, mask=inside, other=0.0)[:, None]
        own_share = tl.load(through_gram + 2 * line + 1, mask=inside, other=0.0)[:, None]
        fused = strength * load_lines(out, line, inside, WIDTH)
        for scale in tl.range(0, SCALES):
            payoff = tl.load(grad_payoffs + line * SCALES + scale, mask=inside, other=0.0)[:, None]
            shared -= strength * payoff * load_lines(outs, line * SCALES + scale, inside, WIDTH)
        for scale in tl.range(0, SCALES):
            weight = tl.load(weights + line * SCALES + scale, mask=inside, other=0.0)[:, None]
            payoff = tl.load(grad_payoffs + line * SCALES + scale, mask=inside, other=0.0)[:, None]
            own = own_share * load_lines(outs, line * SCALES + scale, inside, WIDTH)
            store_lines(grad_outs, line * SCALES + scale, inside, weight * shared - payoff * fused - own, WIDTH)

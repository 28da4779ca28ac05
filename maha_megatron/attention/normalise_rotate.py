"""RMS normalisation and rotary positions of queries and keys, per head.

Plain functions for the reference, and a fused pair (forward, backward) for the fast backends that keeps only the
raw input: y = rotate(normalise(x) * gain). Angles are position * base**(-2i/d) with rotate-half pairs (i, i + d/2).
Positions are fractions (t / R_l), so angles are formed in fp64 and reduced to one turn before they are rounded to the
dtype of the data: at a million rows an fp32 angle would be off by several hundredths of a radian.
"""

import math

import torch

from maha_megatron.attention.row_blocks import row_blocks


def rotation(position: torch.Tensor, width: int, base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every rotary angle.

    Args:
        position: [...] positions in float64.
        width: head width d.
        dtype: dtype of the result; angles are reduced to one turn in fp64 before they are rounded to it.

    Returns:
        cos, sin [..., d], the d/2 angles twice: once for each half.
    """
    exponents = torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / width
    turns = position[..., None] * (base**-exponents / (2 * math.pi))
    angle = ((turns - turns.floor()) * (2 * math.pi)).to(dtype)
    return torch.cat((angle.cos(),) * 2, dim=-1), torch.cat((angle.sin(),) * 2, dim=-1)


def quarter_turn(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) on the two halves of the last dimension: every pair turned by 90 degrees."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half rotary embedding; the rotation by the negative angle, its transpose, is `rotate(x, cos, -sin)`."""
    return x * cos + quarter_turn(x) * sin


def normalise(x: torch.Tensor, gain: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * gain over the last dimension; x itself where there is no gain."""
    return x if gain is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


def normalise_backward(
    grad: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `normalise`: that of x, and that of the gain before its sum over the rows."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    unit = x * scale
    grad_gain = grad * unit
    grad_unit = grad * gain
    grad_x = (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True)) * scale
    return grad_x, grad_gain


def normalise_rotate(
    x: torch.Tensor, gain: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, epsilon: float, out: torch.Tensor
) -> torch.Tensor:
    """rotate(normalise(x)) of rows x [t, heads, d], into `out`; arithmetic in the dtype of cos and sin [t, 1, d]."""
    gain = None if gain is None else gain.to(cos.dtype)
    for start, stop in row_blocks(len(x), x[0].numel(), x.device):
        rows = slice(start, stop)
        out[rows] = rotate(normalise(x[rows].to(cos.dtype), gain, epsilon), cos[rows], sin[rows])
    return out


def normalise_rotate_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gain: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
) -> torch.Tensor | None:
    """Gradient of `normalise_rotate`: that of x into `out`, that of the gain returned."""
    wide_gain = None if gain is None else gain.to(cos.dtype)
    grad_gain = None if gain is None else torch.zeros_like(wide_gain)
    for start, stop in row_blocks(len(x), x[0].numel(), x.device):
        rows = slice(start, stop)
        share = rotate(grad[rows].to(cos.dtype), cos[rows], -sin[rows])
        if gain is not None:
            share, gain_share = normalise_backward(share, x[rows].to(cos.dtype), wide_gain, epsilon)
            grad_gain += gain_share.sum(0)
        out[rows] = share
    return grad_gain


class NormaliseRotate(torch.autograd.Function):
    """rotate(normalise(x)) in x's dtype; kept for backward are the arguments alone."""

    @staticmethod
    def forward(ctx, x, gain, cos, sin, epsilon):
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.epsilon = epsilon
        return normalise_rotate(x, gain, cos, sin, epsilon, torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gain, cos, sin = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_gain = normalise_rotate_backward(grad, x, gain, cos, sin, ctx.epsilon, grad_x)
        return grad_x, None if gain is None else grad_gain.to(gain.dtype), None, None, None

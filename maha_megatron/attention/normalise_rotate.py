"""RMS normalisation and rotary positions of queries and keys, per head.

Plain functions for the reference, and a fused pair (forward, backward) for the fast backends that keeps only the
raw input: y = rotate(normalise(x) * gain). Angles are position * base**(-2i/d) with rotate-half pairs (i, i + d/2).
Positions are fractions (t / R_l), so angles are formed in fp64 and reduced to one turn before they are rounded to the
dtype of the data: at a million rows an fp32 angle would be off by several hundredths of a radian.
"""

import math

import torch


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


class NormaliseRotate(torch.autograd.Function):
    """rotate(normalise(x, gain)), computed in at least fp32, returned in x's dtype; keeps x, gain, cos and sin."""

    @staticmethod
    def forward(ctx, x, gain, cos, sin, epsilon):
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.epsilon = epsilon
        gain = None if gain is None else gain.to(cos.dtype)
        return rotate(normalise(x.to(cos.dtype), gain, epsilon), cos, sin).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gain, cos, sin = ctx.saved_tensors
        grad_x, grad_gain = rotate(grad.to(cos.dtype), cos, -sin), None
        if gain is not None:
            grad_x, grad_gain = normalise_backward(grad_x, x.to(cos.dtype), gain.to(cos.dtype), ctx.epsilon)
            grad_gain = grad_gain.sum_to_size(gain.shape).to(gain.dtype)
        return grad_x.to(x.dtype), grad_gain, None, None, None

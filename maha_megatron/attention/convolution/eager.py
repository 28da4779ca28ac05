"""The convolution in plain torch: shifted copies of the rows, block of rows by block, so that they stay in the cache.

Kept for backward is the input alone; the mixed rows are recomputed there. Every row of the gradient gathers what the
rows after it contribute, so nothing is scattered and the result is bitwise reproducible.
"""

import torch
import torch.nn.functional as F

from maha_megatron.attention.convolution.naive import DILATION, KERNEL, convolve_after
from maha_megatron.attention.row_blocks import row_blocks

_SHIFTS = tuple(DILATION * (KERNEL - 1 - tap) for tap in range(KERNEL))  # tap 0 reads 4 rows back, tap 2 the row itself


def convolve(q_tnd, k_tgd, v_tgd, document_start_t, weight, past_rows=None):
    """x + silu(conv(x)) on every channel of q, k and v; see convolution/naive.py for shapes."""
    if past_rows is not None:
        return convolve_after(convolve, past_rows, q_tnd, k_tgd, v_tgd, document_start_t, weight)
    g, heads_per_group = k_tgd.shape[1], q_tnd.shape[1] // k_tgd.shape[1]
    taps = weight.view(g, heads_per_group + 2, -1, KERNEL)
    position = torch.arange(document_start_t.numel(), device=document_start_t.device) - document_start_t
    q = _Convolution.apply(q_tnd, taps[:, :heads_per_group].flatten(0, 1), position)
    k = _Convolution.apply(k_tgd, taps[:, heads_per_group], position)
    v = _Convolution.apply(v_tgd, taps[:, heads_per_group + 1], position)
    return q, k, v


class _Convolution(torch.autograd.Function):
    """x [t, heads, d] + silu(conv(x)) with taps [heads, d, 3]; arithmetic in at least fp32, result in x's dtype."""

    @staticmethod
    def forward(ctx, x, taps, position):
        ctx.save_for_backward(x, taps, position)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        weights, inside = _prepare(x, taps, position)
        for start, stop in row_blocks(len(x), x[0].numel(), x.device):
            sources, mixed = _mix(x, weights, inside, start, stop)
            out[start:stop] = F.silu(mixed).add_(sources[-1])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, taps, position = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        weights, inside = _prepare(x, taps, position)
        grad_weights = torch.zeros_like(weights)
        for start, stop in row_blocks(len(x), x[0].numel(), x.device):
            reach = min(stop + max(_SHIFTS), len(x))
            sources, mixed = _mix(x, weights, inside, start, reach)
            gate = mixed.sigmoid()
            grad_mixed = mixed.mul_(1 - gate).add_(1).mul_(gate).mul_(grad[start:reach])
            grad_rows = grad[start:stop].to(weights.dtype, copy=True)
            for tap, shift in enumerate(_SHIFTS):
                grad_weights[tap] += (sources[tap][: stop - start] * grad_mixed[: stop - start]).sum(0)
                readers = grad_mixed[shift : shift + stop - start]
                grad_rows[: len(readers)] += readers * weights[tap] * inside[tap][start + shift :][: len(readers)]
            grad_x[start:stop] = grad_rows
        return grad_x, grad_weights.movedim(0, -1).to(taps.dtype), None


def _prepare(x, taps, position):
    """Taps [3, heads, d], and per tap whether the row it reads lies in the reader's document, as factors [t, 1, 1]."""
    weights = taps.to(torch.promote_types(x.dtype, torch.float32)).movedim(-1, 0).contiguous()
    return weights, [(position >= shift).to(weights.dtype)[:, None, None] for shift in _SHIFTS]


def _mix(x, weights, inside, start, stop):
    """What each tap reads for rows start..stop (zero outside the document), and its weighted sum."""
    sources = []
    for factor, shift in zip(inside, _SHIFTS, strict=True):
        missing = min(max(shift - start, 0), stop - start)
        rows = x[max(start - shift, 0) : max(stop - shift, 0)].to(weights.dtype)
        rows = F.pad(rows, (0, 0, 0, 0, missing, 0)) if missing else rows
        sources.append(rows * factor[start:stop] if shift else rows)
    mixed = sources[0] * weights[0]
    for rows, weight in zip(sources[1:], weights[1:], strict=True):
        mixed.addcmul_(rows, weight)
    return sources, mixed

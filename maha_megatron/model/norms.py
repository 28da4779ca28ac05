"""Root-mean-square normalisation of the residual stream."""

import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own: [..., h] over its last dimension, statistics in fp32."""
    return F.rms_norm(hidden, weight.shape, weight, eps)


def rms_norm_formula(hidden_th: torch.Tensor, weight_h: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in elementary operations, to be compiled: at least fp32 throughout, the result rounded once.

    So is the gradient of the weight, a sum over all rows, rounded to the weight's dtype at its end only.
    """
    precise = torch.promote_types(hidden_th.dtype, torch.float32)
    wide_th = hidden_th.to(precise)
    inverse_t1 = torch.rsqrt(wide_th.square().mean(-1, keepdim=True) + eps)
    return (wide_th * inverse_t1 * weight_h.to(precise)).to(hidden_th.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the hidden width; the statistics are fp32 whatever the dtype of x.

    megatron-core's torch norm refuses sequence parallelism; this one marks its weight for `sum_partial_gradients`.
    `normalise` is the function of hidden rows, weight and eps; compiled.py puts a fused form there.

    Sharding: the weight is replicated; under sequence parallelism each tensor-parallel rank sees its own rows.
    """

    def __init__(self, config, hidden_size: int, eps: float, **_) -> None:
        super().__init__()
        self.eps = eps
        self.normalise = rms_norm
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of [..., h]; returns the input's dtype."""
        return self.normalise(hidden, self.weight, self.eps)

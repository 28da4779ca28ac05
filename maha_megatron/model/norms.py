"""Root-mean-square normalisation of the residual stream."""

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the hidden width; the statistics are fp32 whatever the dtype of x.

    megatron-core's torch norm refuses sequence parallelism; this one marks its weight for `sum_partial_gradients`.

    Sharding: the weight is replicated; under sequence parallelism each tensor-parallel rank sees its own rows.
    """

    def __init__(self, config, hidden_size: int, eps: float, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of [..., h]; returns the input's dtype."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)

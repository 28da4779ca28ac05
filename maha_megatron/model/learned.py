"""Learned tensors of an attention layer as parameters of its module, cut along heads or KV groups."""

from collections.abc import Mapping

import torch
from torch import nn

from maha_megatron.attention.spec import AttentionParameters, ParameterSpec


class LearnedAttention(nn.Module):
    """A core-attention module that owns the AttentionParameters of its heads.

    Sharding: every parameter holds this tensor-parallel rank's heads or groups, and none is replicated. Each carries
    the attributes that megatron-core's own shards carry; DeepSpeed's gradient norm counts only rank 0 without them.
    """

    def __init__(self, specs: Mapping[str, ParameterSpec], dtype: torch.dtype) -> None:
        super().__init__()
        self._fields = tuple(specs)
        for name, spec in specs.items():
            setattr(self, name, nn.Parameter(spec.initial().to(dtype)))

    def learned(self) -> AttentionParameters:
        """The tensors of this rank, as the operator takes them."""
        return AttentionParameters(**{name: getattr(self, name) for name in self._fields})


def local_heads(config) -> dict[str, int]:
    """Head counts of this rank: n query heads, g KV groups, d head width (megatron-core's TransformerConfig)."""
    ranks = config.tensor_model_parallel_size
    assert config.num_attention_heads % ranks == 0
    assert config.num_query_groups % ranks == 0
    return {
        "n": config.num_attention_heads // ranks,
        "g": config.num_query_groups // ranks,
        "d": config.kv_channels,
    }

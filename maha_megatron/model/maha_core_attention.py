"""MAHA in megatron-core's core_attention slot."""

import torch

from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.spec import MahaSpec, maha_parameter_specs
from maha_megatron.model.bounds import DocumentBounds
from maha_megatron.model.learned import LearnedAttention, local_heads


class MahaCoreAttention(LearnedAttention):
    """The operator between megatron-core's linear_qkv and linear_proj.

    Sharding: the heads and KV groups of this tensor-parallel rank; no communication.
    """

    def __init__(self, *, config, spec: MahaSpec, backend: str, **_) -> None:
        super().__init__(maha_parameter_specs(spec, **local_heads(config)), config.params_dtype)
        self.spec = spec
        self.backend = backend
        self.collect_scale_weights = False
        self.scale_weights_l: torch.Tensor | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: DocumentBounds,
        **_,
    ) -> torch.Tensor:
        """Attend within documents.

        Args:
            query: [t, n, d] of this rank, as projected.
            key, value: [t, g, d] of this rank, as projected.
            attention_mask: None; the bounds say all there is to say.
            packed_seq_params: bounds of the packed documents.

        Returns:
            [t, n * d] in query's dtype.
        """
        assert attention_mask is None
        result = maha_attention(
            query,
            key,
            value,
            packed_seq_params.document_start_t,
            self.learned(),
            self.spec,
            backend=self.backend,
            with_weights=self.collect_scale_weights,
        )
        if self.collect_scale_weights:
            self.scale_weights_l = result.scale_weights_tnl.detach().float().mean(dim=(0, 1))
        return result.out_tnd.flatten(1)

"""Dense attention in the same slot: the layers of a hybrid, and the baseline."""

import torch

from maha_megatron.attention.api import dense_attention
from maha_megatron.attention.spec import DenseSpec, dense_parameter_specs
from maha_megatron.model.bounds import DocumentBounds
from maha_megatron.model.learned import LearnedAttention, local_heads


class DenseCoreAttention(LearnedAttention):
    """Causal softmax attention within documents, between megatron-core's linear_qkv and linear_proj.

    Sharding: the heads and KV groups of this tensor-parallel rank; no communication.
    """

    def __init__(self, *, config, spec: DenseSpec, backend: str, **_) -> None:
        super().__init__(dense_parameter_specs(spec, **local_heads(config)), config.params_dtype)
        self.spec = spec
        self.backend = backend

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
        """Attend within documents: query [t, n, d], key and value [t, g, d] as projected; returns [t, n * d]."""
        assert attention_mask is None
        out_tnd = dense_attention(
            query,
            key,
            value,
            packed_seq_params.document_start_t,
            self.learned(),
            self.spec,
            backend=self.backend,
            document_lengths=packed_seq_params.document_lengths,
            document_bounds=packed_seq_params.cu_seqlens_q,
            longest_document=packed_seq_params.max_seqlen_q,
        )
        return out_tnd.flatten(1)

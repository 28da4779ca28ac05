"""MAHA in megatron-core's core_attention slot."""

from collections.abc import Callable

import torch

from maha_megatron.attention.aggregation.stated_program import UnsolvedProgram
from maha_megatron.attention.api import MahaOutput, maha_attention
from maha_megatron.attention.spec import AttentionParameters, MahaSpec, maha_parameter_specs
from maha_megatron.errors import ProgramError
from maha_megatron.model.bounds import DocumentBounds
from maha_megatron.model.learned import LearnedAttention, local_heads
from maha_megatron.model.solve_totals import SolveTotals
from maha_megatron.parallel import groups


class MahaCoreAttention(LearnedAttention):
    """The operator between megatron-core's linear_qkv and linear_proj.

    Sharding: the heads and KV groups of this tensor-parallel rank; no communication.
    """

    def __init__(self, *, config, spec: MahaSpec, backend: str, layer_number: int, **_) -> None:
        super().__init__(maha_parameter_specs(spec, **local_heads(config)), config.params_dtype)
        self.spec = spec
        self.backend = backend
        self.layer_number = layer_number  # from 1, as megatron-core counts
        self.solve_totals: SolveTotals | None = None
        self.collect_scale_weights = False
        self.scale_weights_l: torch.Tensor | None = None
        self.captured: Callable | None = None  # CUDA graphs of training passes (captured.py)

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
            [t, n * d] in query's dtype. `solve_totals` then holds this forward's programs, None where none are solved;
            activation recomputation writes the same again.

        Raises:
            ProgramError: a stated program has no solution; names layer, head and token.
        """
        assert attention_mask is None
        start_t = packed_seq_params.document_start_t
        if self.captured is not None and self.captured.serves(query) and not self.collect_scale_weights:
            return self.captured(query, key, value, start_t).flatten(1)
        try:
            result = self.attend(query, key, value, start_t, self.learned())
        except UnsolvedProgram as error:
            raise self._placed(error, start_t, query.shape[1]) from error
        self.solve_totals = None if result.solves is None else SolveTotals.of(result.solves)
        if self.collect_scale_weights:
            self.scale_weights_l = result.scale_weights_tnl.detach().float().mean(dim=(0, 1))
        return result.out_tnd.flatten(1)

    def attend(self, query, key, value, start_t, learned: AttentionParameters) -> MahaOutput:
        """The operator; shapes as `forward` has them."""
        return maha_attention(
            query,
            key,
            value,
            start_t,
            learned,
            self.spec,
            backend=self.backend,
            with_weights=self.collect_scale_weights,
        )

    def _placed(self, error: UnsolvedProgram, start_t: torch.Tensor, heads: int) -> ProgramError:
        """The error with its place in the model; layers, heads and tokens count from 0."""
        head = groups.tensor_rank() * heads + error.head
        token = error.row - int(start_t[error.row])
        return ProgramError(
            f"layer {self.layer_number - 1}, head {head}, token {token} of its document (row {error.row} of the "
            f"micro-batch): {error.reason}. Loosen the program's constraints, or keep the utilities smaller"
        )

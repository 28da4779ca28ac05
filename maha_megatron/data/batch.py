"""What one forward pass is given."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The samples of one micro-batch laid end to end, on the CPU; t = micro_batch_samples * sequence_tokens rows.

    Sharding: one data-parallel rank's own; identical on the tensor-parallel ranks that share its samples.
    """

    input_ids_t: Tensor
    """int64 [t]: the token each row reads."""
    labels_t: Tensor
    """int64 [t]: the token each row predicts, that is, the next one of its sample."""
    loss_mask_t: Tensor
    """bool [t]: whether the row's loss counts."""
    document_start_t: Tensor
    """int32 [t]: the row where the row's document starts; never before the row's sample."""

    @property
    def unmasked(self) -> int:
        """Rows whose loss counts."""
        return int(self.loss_mask_t.sum())

    def pinned(self) -> "MicroBatch":
        """A copy in page-locked memory, from which a GPU reads while the CPU goes on."""
        return MicroBatch(
            input_ids_t=self.input_ids_t.pin_memory(),
            labels_t=self.labels_t.pin_memory(),
            loss_mask_t=self.loss_mask_t.pin_memory(),
            document_start_t=self.document_start_t.pin_memory(),
        )

    @property
    def positions_t(self) -> Tensor:
        """int32 [t]: each row's position in its document."""
        return torch.arange(self.document_start_t.numel(), dtype=torch.int32) - self.document_start_t

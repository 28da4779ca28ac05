"""How well a model predicts chosen rows of packed documents: one forward pass, and never more logits than a chunk's."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import Gpt


@dataclass(frozen=True)
class RowScores:
    """Predictions of r rows, on the CPU."""

    loss_r: torch.Tensor
    """fp32 [r]: nats of each row's label."""
    right_r: torch.Tensor
    """bool [r]: whether the label is the likeliest token."""


Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], RowScores]
"""score_rows without its first argument: whatever predicts the next tokens of packed documents."""


@torch.no_grad()
def score_rows(
    model: Gpt,
    input_ids_t: torch.Tensor,
    labels_t: torch.Tensor,
    document_start_t: torch.Tensor,
    rows_r: torch.Tensor,
) -> RowScores:
    """Score the labels of some rows; the other ones get no logits.

    Args:
        model: on one process, in evaluation mode.
        input_ids_t: int64 [t] on the CPU, packed documents.
        labels_t: int64 [t] on the CPU, the next token of each row.
        document_start_t: integer [t] on the CPU, the row where each row's document starts.
        rows_r: int64 [r] on the CPU, the rows to score.
    """
    device = next(model.parameters()).device
    hidden = model.hidden(input_ids_t.to(device), document_bounds(document_start_t, device))
    losses, right = [], []
    for rows_c in rows_r.split(model.output.chunk_tokens):
        labels_c = labels_t[rows_c].to(device)
        logits_cv = model.output(hidden[rows_c.to(device)])
        losses.append(logits_cv.logsumexp(1) - logits_cv.gather(1, labels_c[:, None])[:, 0])
        right.append(logits_cv.argmax(1) == labels_c)
    return RowScores(torch.cat(losses).cpu(), torch.cat(right).cpu())

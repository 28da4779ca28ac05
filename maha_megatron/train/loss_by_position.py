"""Loss by how many tokens of its document a row has before it: does a model use what lies far back?

Where document bounds are on, a position counts from the document's start, or from the sample's where that begins inside
a document: what a row can attend to. Where they are off, it counts from the sample's start. Buckets are powers of two:
0, 1, 2-3, 4-7, 8-15, ...
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from maha_megatron.data.batch import MicroBatch
from maha_megatron.errors import DataError
from maha_megatron.model.scoring import Scorer
from maha_megatron.train.grouped_mean import Mean, grouped_mean


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Losses in nats per unmasked token; a group of a mean is a sample.

    Attributes:
        overall: over all tokens: what the trainer calls the validation loss.
        buckets: first and last position of a bucket, and its mean, for those that hold a token.
    """

    overall: Mean
    buckets: tuple[tuple[int, int, Mean], ...]


def bucket_range(number: int) -> tuple[int, int]:
    """First and last position of a bucket; bucket 0 is position 0."""
    return (2 ** (number - 1), 2**number - 1) if number else (0, 0)


def loss_by_position(
    score: Scorer,
    batches: Iterable[MicroBatch],
    sequence_tokens: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> PositionLoss:
    """Score every unmasked token of the batches.

    Args:
        score: the model.
        batches: whole samples of sequence_tokens rows.
        sequence_tokens: rows of a sample.
        advance: called with the rows of each batch that is done.

    Raises:
        DataError: no token of the batches may be predicted.
    """
    buckets = (sequence_tokens - 1).bit_length() + 1
    sums, counts = [], []
    for batch in batches:
        rows_r = batch.loss_mask_t.nonzero().flatten()
        if len(rows_r):
            scores = score(batch.input_ids_t, batch.labels_t, batch.document_start_t, rows_r)
            samples = batch.input_ids_t.numel() // sequence_tokens
            exponent_r = torch.frexp(batch.positions_t[rows_r].double()).exponent  # the bits of the position
            place_r = rows_r // sequence_tokens * buckets + exponent_r
            sums.append(_added(place_r, scores.loss_r.double(), samples * buckets).view(samples, buckets))
            counts.append(torch.bincount(place_r, minlength=samples * buckets).view(samples, buckets))
        advance(batch.input_ids_t.numel())
    if not counts:
        raise DataError("the validation samples have no token that may be predicted")
    sum_kb, count_kb = torch.cat(sums), torch.cat(counts)
    held = [number for number in range(buckets) if count_kb[:, number].any()]
    return PositionLoss(
        overall=grouped_mean(sum_kb.sum(1), count_kb.sum(1)),
        buckets=tuple((*bucket_range(b), grouped_mean(sum_kb[:, b], count_kb[:, b])) for b in held),
    )


def _added(place_r: torch.Tensor, value_r: torch.Tensor, places: int) -> torch.Tensor:
    return torch.zeros(places, dtype=value_r.dtype).index_add_(0, place_r, value_r)

"""The output layer: logits, or the summed cross-entropy without ever holding all logits.

For a chunk of rows at a time the loss forms the logits of this rank's vocabulary rows, their log-sum-exp over the
tensor-parallel group, and (in training) at once the gradients of the hidden rows and of the weight. What lives at a
time is one chunk of fp32 logits, never [t, v] of them; nothing is kept for backward but the two gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import nn

from maha_megatron.parallel import groups


@dataclass(frozen=True)
class VocabularyRows:
    """Token ids first .. end - 1 are this rank's; further rows of its weight are padding (end may lie below first)."""

    first: int
    end: int

    @property
    def count(self) -> int:
        return max(self.end - self.first, 0)


@dataclass(frozen=True)
class LossPieces:
    """What is done to a chunk of logits between its products and reductions over ranks.

    compiled.py puts fused forms here.
    """

    peaks: Callable
    exponentials: Callable
    probabilities: Callable


def row_peaks(logits_tv: torch.Tensor, count: int) -> torch.Tensor:
    """The largest of the first `count` logits of every row, at least fp32 [t]; -inf where count is 0."""
    dtype = torch.promote_types(logits_tv.dtype, torch.float32)
    if count == 0:
        return logits_tv.new_full((len(logits_tv),), float("-inf"), dtype=dtype)
    return logits_tv[:, :count].amax(dim=1).to(dtype)


def row_exponentials(
    logits_tv: torch.Tensor, peak_t: torch.Tensor, local_label_t: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(logit - peak) [t, v], its sum over the row [t], and the label's logit - peak [t], at least fp32.

    Logits that are fp32 already are overwritten. `local_label_t` int64 [t], within 0 .. v - 1.
    """
    shifted_tv = logits_tv.to(peak_t.dtype).sub_(peak_t[:, None])
    if count < shifted_tv.shape[1]:
        shifted_tv[:, count:] = float("-inf")  # padding rows of the vocabulary
    target_t = shifted_tv.gather(1, local_label_t[:, None])[:, 0]
    exponential_tv = shifted_tv.exp_()
    return exponential_tv, exponential_tv.sum(dim=1), target_t


def row_probabilities(
    exponential_tv: torch.Tensor, sum_t: torch.Tensor, loss_mask_t: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """exp / sum, 0 in masked rows, in `dtype` [t, v]; overwrites its first argument where that has the dtype."""
    factor_t1 = (loss_mask_t / sum_t)[:, None]
    if exponential_tv.dtype == dtype:
        return exponential_tv.mul_(factor_t1)
    return (exponential_tv * factor_t1).to(dtype)


PLAIN_PIECES = LossPieces(peaks=row_peaks, exponentials=row_exponentials, probabilities=row_probabilities)


class OutputLayer(nn.Module):
    """Hidden rows to logits or to their loss.

    Sharding: `weight` [v / tensor, h] holds this rank's rows of the padded vocabulary. With tied embeddings it is the
    embedding's own parameter, registered here too, so that ZeRO 3 gathers it for this module as for its other owner.
    """

    def __init__(
        self,
        config,
        *,
        vocabulary: int,
        padded_vocabulary: int,
        chunk_tokens: int,
        tied_weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.local_rows = padded_vocabulary // groups.tensor_size()
        weight = tied_weight
        if weight is None:
            weight = nn.Parameter(torch.empty(self.local_rows, config.hidden_size, dtype=config.params_dtype))
        self.weight = weight
        self.vocabulary = vocabulary
        self.chunk_tokens = chunk_tokens
        self.sequence_parallel = config.sequence_parallel
        self.pieces = PLAIN_PIECES

    def forward(
        self, hidden: torch.Tensor, labels_t: torch.Tensor | None = None, loss_mask_t: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of the unmasked rows' losses in nats; without labels, the logits.

        Args:
            hidden: [t, 1, h], normalised; under sequence parallelism this rank's t / tensor rows.
            labels_t: int [t], every one in 0 .. vocabulary - 1, masked rows included. The loader refuses data with
                other ids; here they are not checked, since that would ask the device: no rank has such a label's
                row, so its logit would count as 0 (relative to the row's largest) and its loss be wrong unseen.
            loss_mask_t: bool [t], True where the row's loss counts.

        Returns:
            fp32 scalar, the same on every tensor-parallel rank; or fp32 logits [t, vocabulary] without padding.
        """
        group = groups.tensor_group()
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        hidden_th = hidden.flatten(0, 1)
        if labels_t is None:
            logits_tv = gather_from_tensor_model_parallel_region(hidden_th @ self.weight.t(), group=group)
            return logits_tv[:, : self.vocabulary].float()
        rows = VocabularyRows(
            first=groups.tensor_rank() * self.local_rows,
            end=min((groups.tensor_rank() + 1) * self.local_rows, self.vocabulary),
        )
        options = (rows, self.chunk_tokens, self.pieces, torch.is_grad_enabled())
        return LossSum.apply(hidden_th, self.weight, labels_t, loss_mask_t, *options)


class LossSum(torch.autograd.Function):
    """Summed cross-entropy of hidden rows against vocabulary-parallel output rows; see the module's docstring."""

    @staticmethod
    def forward(ctx, hidden_th, weight_vh, labels_t, loss_mask_t, rows, chunk_tokens, pieces, with_gradients):
        precise = torch.promote_types(weight_vh.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden_th.device)
        if with_gradients:
            hidden_gradient_th = torch.empty_like(hidden_th, memory_format=torch.contiguous_format)
            weight_gradient_vh = torch.zeros_like(weight_vh, dtype=precise)
        for start in range(0, hidden_th.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            chunk_loss, logits_gradient = _chunk_loss(
                hidden_th[chunk], weight_vh, labels_t[chunk], loss_mask_t[chunk], rows, pieces, with_gradients
            )
            total += chunk_loss
            if with_gradients:
                torch.mm(logits_gradient, weight_vh, out=hidden_gradient_th[chunk])
                _accumulate_product(weight_gradient_vh, logits_gradient, hidden_th[chunk])
        if with_gradients:
            ctx.save_for_backward(hidden_gradient_th, weight_gradient_vh)
            ctx.weight_dtype = weight_vh.dtype
        return total

    @staticmethod
    def backward(ctx, loss_gradient):
        hidden_gradient_th, weight_gradient_vh = ctx.saved_tensors
        # in place: a second backward through the same graph is refused by autograd's version check
        hidden_gradient_th.mul_(loss_gradient)
        weight_gradient_vh.mul_(loss_gradient)
        return hidden_gradient_th, weight_gradient_vh.to(ctx.weight_dtype), *[None] * 6


def _chunk_loss(
    hidden_th: torch.Tensor,
    weight_vh: torch.Tensor,
    labels_t: torch.Tensor,
    loss_mask_t: torch.Tensor,
    rows: VocabularyRows,
    pieces: LossPieces,
    with_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of one chunk of rows, and the gradient of its logits in the compute dtype (None without gradients)."""
    logits_tv = hidden_th @ weight_vh.t()
    peak_t = _over_ranks(pieces.peaks(logits_tv, rows.count), dist.ReduceOp.MAX)
    mine_t = (labels_t >= rows.first) & (labels_t < rows.end)
    local_label_t = (labels_t - rows.first).clamp(0, weight_vh.shape[0] - 1)
    exponential_tv, sum_t, target_t = pieces.exponentials(logits_tv, peak_t, local_label_t, rows.count)
    del logits_tv
    own_target_t = torch.where(mine_t, target_t, 0.0)
    sum_t, target_t = _over_ranks(torch.stack([sum_t, own_target_t]), dist.ReduceOp.SUM)
    loss = torch.where(loss_mask_t, sum_t.log() - target_t, 0.0).sum()
    if not with_gradients:
        return loss, None
    gradient_tv = pieces.probabilities(exponential_tv, sum_t, loss_mask_t, weight_vh.dtype)
    # the label's own: p - 1, in one rounding
    of_label_t = ((own_target_t.exp() / sum_t - 1) * loss_mask_t).to(gradient_tv.dtype)
    label = local_label_t[:, None]
    gradient_tv.scatter_(1, label, torch.where(mine_t[:, None], of_label_t[:, None], gradient_tv.gather(1, label)))
    return loss, gradient_tv


def _over_ranks(value: torch.Tensor, operation: dist.ReduceOp) -> torch.Tensor:
    """Reduce in place over the tensor-parallel group."""
    if groups.tensor_size() > 1:
        dist.all_reduce(value, op=operation, group=groups.tensor_group())
    return value


def _accumulate_product(total_vh: torch.Tensor, logits_gradient_tv: torch.Tensor, hidden_th: torch.Tensor) -> None:
    """total += logits_gradient^T @ hidden; the product is in the compute dtype, the sum in the total's."""
    if total_vh.dtype == hidden_th.dtype:
        total_vh.addmm_(logits_gradient_tv.t(), hidden_th)
    else:
        total_vh += logits_gradient_tv.t() @ hidden_th

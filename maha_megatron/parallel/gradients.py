"""Gradients that tensor parallelism leaves partial, and that nobody else sums."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from maha_megatron.parallel import groups


def sum_partial_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Register hooks that sum the partial gradients of replicated parameters over the tensor-parallel group.

    Under sequence parallelism each rank normalises its slice of the rows, so the gradient of a norm's weight (marked
    `sequence_parallel`) is a sum over ranks that DeepSpeed does not form. Outside sequence parallelism every rank
    already holds the whole gradient of a norm: summing it would multiply it by the tensor-parallel size, which AdamW
    hides. Everything inside the head-sharded region is itself sharded, so nothing else is partial.

    Call it before `deepspeed.initialize`: tensor hooks run before DeepSpeed takes the gradient, at every ZeRO stage.

    Returns:
        The hooks' handles (removing them takes the sums away again).
    """
    group = groups.tensor_group()

    def sum_over_ranks(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    partial = [parameter for parameter in model.parameters() if getattr(parameter, "sequence_parallel", False)]
    return [parameter.register_hook(sum_over_ranks) for parameter in partial]

"""This process's groups, ranks and sizes, by axis. `compat.initialise_model_parallel` makes them."""

import torch.distributed as dist
from megatron.core import parallel_state


def tensor_group() -> dist.ProcessGroup:
    """Ranks that share one model copy's layers."""
    return parallel_state.get_tensor_model_parallel_group()


def tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def data_group() -> dist.ProcessGroup:
    """Ranks that hold the same shard and read different samples."""
    return parallel_state.get_data_parallel_group()


def data_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    return parallel_state.get_data_parallel_world_size()

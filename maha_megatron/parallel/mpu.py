"""The adapter through which DeepSpeed learns the process groups (`deepspeed.initialize(mpu=Mpu())`)."""

import torch.distributed as dist
from megatron.core import parallel_state

from maha_megatron.parallel import groups


class Mpu:
    """The groups under the names that DeepSpeed asks for; its "model parallel" axis is the tensor axis.

    There is no method with "sequence" in its name, and there must be none: DeepSpeed would take it for Ulysses and the
    model-parallel size for 1. Without an mpu it would take every rank as data parallel and overwrite shards, silently.
    """

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return groups.tensor_group()

    def get_model_parallel_rank(self) -> int:
        return groups.tensor_rank()

    def get_model_parallel_world_size(self) -> int:
        return groups.tensor_size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return groups.tensor_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return groups.tensor_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return groups.tensor_size()

    def get_tensor_model_parallel_src_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return groups.data_group()

    def get_data_parallel_rank(self) -> int:
        return groups.data_rank()

    def get_data_parallel_world_size(self) -> int:
        return groups.data_size()

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from maha_megatron.parallel import compat, groups
from maha_megatron.parallel.mpu import Mpu
from tests.support.model import tiny_config


@pytest.mark.parametrize("rank", range(8))
def test_tensor_ranks_are_adjacent_and_data_ranks_a_stride_apart(rank):
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    compat.initialise_model_parallel(tiny_config(parallel__tensor=2))
    try:
        first = rank - rank % 2
        assert groups.tensor_rank() == rank % 2
        assert groups.data_rank() == rank // 2
        assert groups.data_size() == 4
        assert dist.get_process_group_ranks(groups.tensor_group()) == [first, first + 1]
        assert dist.get_process_group_ranks(groups.data_group()) == list(range(rank % 2, 8, 2))
        assert Mpu().get_tensor_model_parallel_src_rank() == first
    finally:
        compat.shutdown()


def test_deepspeed_finds_no_ulysses_in_the_adapter():
    assert [name for name in dir(Mpu()) if "sequence" in name] == []


def test_shutdown_leaves_nothing(one_rank):
    assert dist.is_initialized()
    compat.shutdown()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()

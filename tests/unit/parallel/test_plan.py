import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from maha_megatron.errors import ConfigError
from maha_megatron.parallel import compat, groups
from maha_megatron.parallel.mpu import Mpu
from maha_megatron.parallel.plan import RankGrid
from tests.support.model import tiny_config


@pytest.mark.parametrize("rank", range(8))
def test_the_grid_is_what_megatron_core_makes(rank):
    grid = RankGrid(world_size=8, tensor=2)
    dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
    compat.initialise_model_parallel(tiny_config(parallel__tensor=2))
    try:
        assert groups.tensor_rank() == grid.tensor_rank(rank)
        assert groups.data_rank() == grid.data_rank(rank)
        assert groups.data_size() == grid.data == 4
        assert dist.get_process_group_ranks(groups.tensor_group()) == grid.tensor_ranks(rank)
        assert dist.get_process_group_ranks(groups.data_group()) == grid.data_ranks(rank)
        assert Mpu().get_tensor_model_parallel_src_rank() == grid.tensor_ranks(rank)[0]
    finally:
        compat.shutdown()


def test_a_tensor_size_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 3 does not divide the 8 processes"):
        RankGrid(world_size=8, tensor=3)


def test_deepspeed_finds_no_ulysses_in_the_adapter():
    assert [name for name in dir(Mpu()) if "sequence" in name] == []


def test_shutdown_leaves_nothing(one_rank):
    assert dist.is_initialized()
    compat.shutdown()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()

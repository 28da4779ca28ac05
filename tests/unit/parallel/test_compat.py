import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from maha_megatron.parallel import compat
from tests.support.model import random_model, tiny_config


def test_state_dict_has_no_extra_state_and_loads_strictly(one_rank):
    model = random_model(tiny_config())
    state = model.state_dict()
    assert [key for key in state if "extra_state" in key] == []
    other = random_model(tiny_config(), seed=8)
    other.load_state_dict(state, strict=True)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the tracker is megatron-core's own")
def test_named_random_streams_are_apart_and_leave_the_outer_stream_alone(one_rank):
    compat.seed_everything(3)
    expected = torch.rand(2)
    compat.seed_everything(3)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(1)
    first = torch.rand(1)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(1)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert len({inside.item(), again.item(), first.item()}) == 3


def test_preparing_twice_is_harmless():
    compat.prepare()
    compat.prepare()
    assert compat.compute_device().type in ("cpu", "cuda")

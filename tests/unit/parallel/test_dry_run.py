import pytest
import torch.distributed as dist

from maha_megatron.model.gpt import build_gpt
from maha_megatron.parallel import compat
from tests.support.model import tiny_config


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_dry_run_builds_the_shapes_of_any_topology_in_one_process(tensor):
    config = tiny_config(parallel__tensor=tensor, parallel__sequence=tensor > 1)
    compat.initialise_dry_run(config)
    try:
        model = build_gpt(config, device="meta")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model.embedding.weight.shape == (128 // tensor, 32)
        assert model.layers[0].self_attention.core_attention.key_gain.shape == (4 // tensor, 8)
    finally:
        compat.shutdown()
    assert not dist.is_initialized()

import math
from contextlib import contextmanager

import pytest
import torch

from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.init import initial_value, initialise_parameters
from maha_megatron.model.names import logical_names
from tests.support.model import random_model, tiny_config


@pytest.fixture
def parameters(one_rank):
    config = tiny_config()
    model = build_gpt(config, device="cpu")
    initialise_parameters(model, config)
    return logical_names(model)


def test_norms_and_gains_start_at_one_and_the_operators_inert(parameters):
    for name, parameter in parameters.items():
        if "norm" in name or name.endswith("gain"):
            assert (parameter == 1).all(), name
        elif name.endswith(("gate_query", "gate_bias", "utility_query", "utility_bias", "convolution")):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std() > 0, name


def test_every_option_starts_where_its_definition_says(one_rank):
    config = tiny_config(maha__downsampling="conv", maha__key_map=True, maha__aggregation="nash", maha__coupling="gram")
    model = build_gpt(config, device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    initialise_parameters(model, config)
    parameters = {name.removeprefix("layers.0.attention."): value for name, value in logical_names(model).items()}
    assert (parameters["pool_kernel"] == 1 / 2).all()  # the mean of two children
    assert torch.equal(parameters["key_map"], torch.eye(8).expand(2, 4, 8, 8))
    torch.testing.assert_close(torch.nn.functional.softplus(parameters["coupling_raw"]), torch.full((8,), 0.1))
    assert (parameters["skew"] == 0).all()


def test_padding_rows_are_zero(parameters):
    for name in ("embedding.weight", "output.weight"):
        assert (parameters[name][100:] == 0).all()
        assert (parameters[name][:100].std(dim=1) > 0).all()


def test_residual_outputs_start_smaller():
    config = tiny_config(model__layers=8)
    wide = (400, 400)
    assert initial_value("layers.0.mlp.gate_up.weight", wide, config).std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("layers.0.mlp.down.weight", "layers.7.attention.output.weight"):
        assert initial_value(name, wide, config).std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)


def test_an_embedding_of_its_own_starts_with_its_own_std_and_a_tied_one_as_an_output_layer():
    def std(name, **changes):
        return initial_value(name, (96, 800), tiny_config(**changes)).std().item()

    assert std("embedding.weight") == pytest.approx(0.2, rel=0.02)
    assert std("embedding.weight", model__embedding_init_std=1.0) == pytest.approx(1.0, rel=0.02)
    assert std("embedding.weight", model__tied_embeddings=True) == pytest.approx(0.02, rel=0.02)
    assert std("output.weight") == pytest.approx(0.02, rel=0.02)


def test_a_value_depends_on_the_seed_and_the_name_alone():
    config = tiny_config()
    first = initial_value("layers.0.mlp.down.weight", (8, 8), config)
    torch.rand(100)
    assert torch.equal(initial_value("layers.0.mlp.down.weight", (8, 8), config), first)
    assert not torch.equal(initial_value("layers.1.mlp.down.weight", (8, 8), config), first)
    assert not torch.equal(initial_value("layers.0.mlp.down.weight", (8, 8), tiny_config(run__seed=9)), first)


def test_partitioned_parameters_are_written_inside_the_gather(one_rank):
    config = tiny_config()
    model = build_gpt(config, device="cpu")
    gathered = []

    @contextmanager
    def gather(parameters):
        gathered.extend(parameters)
        yield

    initialise_parameters(model, config, gather=gather)
    assert [id(parameter) for parameter in gathered] == [id(parameter) for parameter in model.parameters()]


def test_randomising_leaves_no_parameter_at_its_start(parameters):
    """The helper that every equality test leans on."""
    for (name, start), parameter in zip(parameters.items(), random_model(tiny_config()).parameters(), strict=True):
        assert not torch.isclose(parameter, start).any(), name


def test_randomising_moves_every_option_too(one_rank):
    config = tiny_config(maha__downsampling="conv", maha__key_map=True, maha__aggregation="nash", maha__coupling="gram")
    moved = logical_names(random_model(config))
    start = build_gpt(config, device="cpu")
    initialise_parameters(start, config)
    for name, parameter in logical_names(start).items():
        assert not torch.isclose(moved[name], parameter).any(), name

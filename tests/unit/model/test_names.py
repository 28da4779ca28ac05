import re
from pathlib import Path

import pytest
import torch

import maha_megatron.model
from maha_megatron.config.accounting import total_parameters
from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.init import decays_weight
from maha_megatron.model.names import cut_shard, full_shape, logical_names, merge_shards, sharding
from tests.support.model import random_model, tiny_config

LAYER = {
    "attention_norm.weight",
    "attention.qkv.weight",
    "attention.output.weight",
    "attention.query_gain",
    "attention.key_gain",
    "attention.convolution",
    "mlp_norm.weight",
    "mlp.gate_up.weight",
    "mlp.down.weight",
}
MAHA = {
    "attention.gate_query",
    "attention.gate_bias",
    "attention.utility_query",
    "attention.utility_bias",
}
# each belongs to an option of MAHA: conv, key_map, gram, nash
OPTIONAL = {
    "attention.pool_kernel",
    "attention.key_map",
    "attention.coupling_raw",
    "attention.skew",
}
EVERY_OPTION = {
    "maha__downsampling": "conv",
    "maha__key_map": True,
    "maha__aggregation": "nash",
    "maha__coupling": "gram",
}
OUTSIDE = {"embedding.weight", "final_norm.weight", "output.weight"}


def test_the_names_of_a_hybrid_are_fixed(one_rank):
    """These names are keys of checkpoints: a change here is a migration."""
    expected = OUTSIDE | {f"layers.0.{name}" for name in LAYER | MAHA} | {f"layers.1.{name}" for name in LAYER}
    assert set(logical_names(random_model(tiny_config()))) == expected


def test_the_names_of_the_options_are_fixed(one_rank):
    names = set(logical_names(random_model(tiny_config(**EVERY_OPTION))))
    default = set(logical_names(random_model(tiny_config())))
    assert names - default == {f"layers.0.{name}" for name in OPTIONAL}
    assert default - names == {"layers.0.attention.gate_query", "layers.0.attention.gate_bias"}
    without_utilities = set(logical_names(random_model(tiny_config(maha__aggregation="mean"))))
    assert default - without_utilities == {"layers.0.attention.utility_query", "layers.0.attention.utility_bias"}


def test_the_readme_lists_every_name_with_its_cut_and_its_decay():
    text = (Path(maha_megatron.model.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| `([a-z_.{}]+)`.*\| ([-\d]) \| (yes|no) \|", text, flags=re.MULTILINE)
    assert {name.removeprefix("layers.{i}.") for name, _, _ in rows} == OUTSIDE | LAYER | MAHA | OPTIONAL
    for name, cut, decays in rows:
        name = name.format(i=0)
        assert cut == ("-" if sharding(name).dim is None else str(sharding(name).dim)), name
        assert (decays == "yes") == decays_weight(name, 1 if cut == "-" else 2), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model__attention": ("dense",)},
        {"maha__downsampling": "conv"},
        {"maha__downsampling": "mean"},
        {"maha__downsampling": "max", "maha__key_map": True},
        {"maha__coupling": "gram"},
        {"maha__aggregation": "nash", "maha__regularizer": "quadratic"},
        {"maha__aggregation": "mean"},
        {"maha__queries": "pooled"},
        EVERY_OPTION,
        {"maha__windows": (64,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_has_the_parameters_that_the_accounting_counts(one_rank, options, tied):
    config = tiny_config(**{"model__attention": ("maha",), "model__tied_embeddings": tied, **options})
    model = build_gpt(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == total_parameters(config)


def test_a_tied_output_has_no_name_of_its_own(one_rank):
    model = random_model(tiny_config(model__tied_embeddings=True))
    assert "output.weight" not in logical_names(model)
    assert model.output.weight is model.embedding.weight


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["default", "every option"])
def test_sharded_parameters_carry_the_marks_and_replicated_ones_do_not(one_rank, options):
    for name, parameter in logical_names(random_model(tiny_config(**options))).items():
        assert getattr(parameter, "tensor_model_parallel", False) == (sharding(name).dim is not None), name
        if sharding(name).dim is not None:
            assert parameter.partition_dim == sharding(name).dim, name


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["default", "every option"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_merging_undoes_cutting_for_every_name(one_rank, options, size):
    for name, parameter in logical_names(random_model(tiny_config(**options))).items():
        full = torch.randn(parameter.shape)
        shards = [cut_shard(name, full, rank, size) for rank in range(size)]
        assert full_shape(name, shards[0].shape, size) == tuple(full.shape), name
        assert torch.equal(merge_shards(name, shards), full), name


def test_a_gate_up_shard_holds_half_a_gate_and_half_an_up():
    full = torch.arange(8.0)[:, None]  # gate rows 0-3, up rows 4-7
    assert cut_shard("layers.0.mlp.gate_up.weight", full, 1, 2).flatten().tolist() == [2, 3, 6, 7]


def test_weight_decay_is_for_matrices_outside_the_attention_operators():
    assert decays_weight("layers.3.attention.qkv.weight", 2)
    assert decays_weight("embedding.weight", 2)
    assert not decays_weight("layers.3.attention_norm.weight", 1)
    for name in MAHA | OPTIONAL | {"attention.query_gain", "attention.key_gain", "attention.convolution"}:
        assert not decays_weight(f"layers.3.{name}", 2), name

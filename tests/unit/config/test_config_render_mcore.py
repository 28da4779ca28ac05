"""The TransformerConfig table: every field exists, the whole builds, and each setting arrives where it should."""

import dataclasses

import pytest
import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from maha_megatron.config.load import config_from_dict
from maha_megatron.config.render_mcore import transformer_config_fields

KNOWN = {field.name for field in dataclasses.fields(TransformerConfig)}


def build(**sections):
    fields = transformer_config_fields(config_from_dict(sections))
    fields["params_dtype"] = getattr(torch, fields["params_dtype"])
    fields["activation_func"] = getattr(torch.nn.functional, fields["activation_func"])
    return TransformerConfig(**fields)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_field_exists(recompute, precision):
    fields = transformer_config_fields(config_from_dict({"train": {"recompute": recompute, "precision": precision}}))
    assert set(fields) <= KNOWN


def test_values_are_plain():
    for value in transformer_config_fields(config_from_dict({})).values():
        assert value is None or isinstance(value, int | float | str | bool | list)


def test_shape_and_block_arrive():
    built = build(
        model={"layers": 8, "hidden": 512, "heads": 8, "kv_groups": 2, "head_width": 32, "ffn_hidden": 640},
        parallel={"tensor": 2, "sequence": True},
    )
    assert (built.num_layers, built.hidden_size, built.ffn_hidden_size) == (8, 512, 640)
    assert (built.num_attention_heads, built.num_query_groups, built.kv_channels) == (8, 2, 32)
    assert built.tensor_model_parallel_size == 2
    assert built.sequence_parallel
    assert built.gated_linear_unit
    assert not built.add_bias_linear
    assert not built.add_qkv_bias
    assert built.activation_func is torch.nn.functional.silu
    assert built.normalization == "RMSNorm"
    assert built.layernorm_epsilon == 1e-5
    assert built.hidden_dropout == built.attention_dropout == 0.0


def test_precision_arrives():
    assert build(train={"precision": "bf16"}).params_dtype == torch.bfloat16
    assert build(train={"precision": "bf16"}).bf16
    assert build(train={"precision": "fp32"}).params_dtype == torch.float32
    assert not build(train={"precision": "fp32"}).bf16


def test_recompute_and_determinism_arrive():
    assert build().recompute_granularity is None
    selective = build(train={"recompute": "selective"})
    assert (selective.recompute_granularity, selective.recompute_modules) == ("selective", ["core_attn"])
    full = build(train={"recompute": "full", "deterministic": True})
    assert (full.recompute_granularity, full.recompute_method, full.recompute_num_layers) == ("full", "uniform", 1)
    assert full.deterministic_mode


class OneRank:
    """The process group of a single tensor rank, as far as a constructor asks."""

    def rank(self):
        return 0

    def size(self):
        return 1


@pytest.mark.parametrize("initialise", [True, False])
def test_embedding_marks_its_weight_only_while_initialising(initialise):
    """Why perform_initialization is on: an unmarked weight drops out of the gradient norm of all ranks but the first.

    The second case fails when megatron-core has changed; then the table may turn its initialisation off.
    """
    assert transformer_config_fields(config_from_dict({}))["perform_initialization"]
    config = dataclasses.replace(build(), perform_initialization=initialise)
    embedding = VocabParallelEmbedding(8, 4, init_method=torch.nn.init.zeros_, config=config, tp_group=OneRank())
    assert getattr(embedding.weight, "tensor_model_parallel", False) == initialise

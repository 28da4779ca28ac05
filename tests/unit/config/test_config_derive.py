"""Derived values: what follows from a configuration and a number of ranks."""

from maha_megatron.config import derive
from maha_megatron.config.load import config_from_dict


def test_attention_pattern_repeats_over_layers():
    config = config_from_dict({"model": {"layers": 8, "attention": ["maha", "maha", "maha", "dense"]}})
    assert derive.layer_attention(config) == ("maha", "maha", "maha", "dense") * 2


def test_windows_default_to_the_sequence_and_yield_to_given_ones():
    assert derive.maha_windows(config_from_dict({}), "maha") == (128, 112, 124, 64)
    assert derive.maha_windows(config_from_dict({"data": {"sequence_tokens": 512}}), "maha") == (128, 128)
    assert derive.maha_windows(config_from_dict({"maha": {"windows": [428]}}), "maha") == (428,)


def test_refined_layers_have_windows_of_their_own_where_they_are_given():
    tree = {"model": {"attention": ["maha", "refined", "dense"]}, "maha": {"windows": [256], "full_reach": False}}
    config = config_from_dict(tree | {"refine": {"windows": [128, 64, 256]}})
    assert derive.scaled_kinds(config) == ("maha", "refined")
    assert derive.maha_windows(config, "maha") == (256,)
    assert derive.maha_windows(config, "refined") == (128, 64, 256)
    config = config_from_dict({"model": {"attention": ["refined"]}})
    assert derive.scaled_kinds(config) == ("refined",)
    assert derive.maha_windows(config, "refined") == (128, 112, 124, 64)


def test_padding_does_not_depend_on_ranks():
    for tensor in (1, 2, 4):
        config = config_from_dict({"model": {"vocabulary": 32001}, "parallel": {"tensor": tensor}})
        assert derive.padded_vocabulary(config) == 32128
    assert derive.padded_vocabulary(config_from_dict({"model": {"vocabulary": 32000}})) == 32000


def test_batch_arithmetic():
    config = config_from_dict(
        {
            "parallel": {"tensor": 2},
            "train": {"global_batch_samples": 48, "micro_batch_samples": 3},
            "data": {"sequence_tokens": 100},
        }
    )
    assert derive.data_parallel_size(config, 8) == 4
    assert derive.accumulation_steps(config, 8) == 4
    assert derive.micro_batch_tokens(config) == 300

"""A fingerprint changes with the model and with nothing else."""

import pytest

from maha_megatron.config.fingerprint import model_fingerprint, shape_differences
from maha_megatron.config.load import config_from_dict, config_to_dict, load_fragments


def fingerprint(**sections):
    return model_fingerprint(config_from_dict(sections))


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"layers": 8}},
        {"model": {"hidden": 512}},
        {"model": {"heads": 4}},
        {"model": {"kv_groups": 12}},
        {"model": {"head_width": 32}},
        {"model": {"ffn_hidden": 512}},
        {"model": {"norm_epsilon": 1e-6}},
        {"model": {"attention": ["maha", "dense"]}},
        {"model": {"vocabulary": 31999}},
        {"model": {"vocabulary_multiple": 1024}},
        {"model": {"tied_embeddings": True}},
        {"model": {"rope_base": 5e5}},
        {"maha": {"windows": [128, 112, 124, 65]}},
        {"maha": {"downsampling": "mean"}},
        {"maha": {"lse_utility": False}},
        {"maha": {"convolution": False}},
        {"maha": {"ratio": 8}},
        {"maha": {"downsampling": "conv"}},
        {"maha": {"downsampling": "max"}},
        {"maha": {"key_map": True}},
        {"maha": {"queries": "pooled"}},
        {"maha": {"aggregation": "nash"}},
        {"maha": {"aggregation": "mean"}},
        {"maha": {"regularizer": "quadratic"}},
        {"maha": {"coupling": "gram"}},
        {"maha": {"aggregation": "program", "program": "a:b"}},
        {"data": {"sequence_tokens": 16384}},  # another length has other default windows
    ],
)
def test_another_model_has_another_fingerprint(sections):
    assert fingerprint(**sections) != fingerprint()


def test_another_program_is_another_model():
    first, second = (fingerprint(maha={"aggregation": "program", "program": name}) for name in ("a:b", "a:c"))
    assert first != second


def test_a_model_without_the_younger_keys_has_the_fingerprint_it_always_had():
    """Checkpoints from before those keys hold these, and continue."""
    assert fingerprint() == "88010b2c2e8289661a379d2e31b89b88928b72a11af18bdfe8c2e2725a882e5f"
    window = load_fragments(["model/window_hybrid"])
    assert model_fingerprint(window) == "46c6668e709f0fc2c04b40880a89a6365c3bd045203436f8acbe687b19392206"


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"attention": ["maha", "maha"]}},  # the same layers, written longer
        {"model": {"loss_chunk_tokens": 64}},
        {"model": {"init_std": 0.1}},
        {"maha": {"windows": [128, 112, 124, 64]}},  # the default, written out
        {"maha": {"backend": "naive"}},
        {"dense": {"qk_norm": False}},  # no layer is dense
        {"parallel": {"tensor": 2}},
        {"zero": {"stage": 3}},
        {"train": {"precision": "fp32"}},
        {"run": {"seed": 7}},
    ],
)
def test_what_is_not_the_model_does_not_count(sections):
    assert fingerprint(**sections) == fingerprint()


def test_differences_are_readable_and_only_the_models():
    saved = config_to_dict(config_from_dict({"model": {"hidden": 512}, "train": {"steps": 5}}))
    current = config_to_dict(config_from_dict({"model": {"attention": ["dense"]}}))
    lines = shape_differences(saved, current)
    assert "model.hidden: 512 in the checkpoint, 768 in this run" in lines
    assert "maha.ratio: 4 in the checkpoint, absent in this run" in lines
    assert "dense.qk_norm: absent in the checkpoint, True in this run" in lines
    assert not any("train" in line for line in lines)
    assert shape_differences(saved, saved) == []
    game = config_to_dict(config_from_dict({"maha": {"aggregation": "nash", "coupling": "gram"}}))
    assert shape_differences(config_to_dict(config_from_dict({})), game) == [
        "maha.aggregation: convex in the checkpoint, nash in this run",
        "maha.coupling: none in the checkpoint, gram in this run",
    ]
    older = config_to_dict(config_from_dict({}))  # as it was written before the key existed
    del older["maha"]["coupling"]
    assert shape_differences(older, config_to_dict(config_from_dict({}))) == []

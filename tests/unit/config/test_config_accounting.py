"""Parameters and operations against formulae, figures of the definition, and counts made another way."""

import dataclasses
import itertools
import math

import pytest

from maha_megatron import scales
from maha_megatron.attention.spec import (
    DenseSpec,
    MahaSpec,
    absent_program,
    dense_parameter_specs,
    maha_parameter_specs,
)
from maha_megatron.config import accounting
from maha_megatron.config.load import config_from_dict, load_fragments


def config(**sections):
    return config_from_dict(sections)


# ------------------------------------------------------------------------------------------------------- parameters


def test_parameters_of_the_default_model_by_hand():
    counts = accounting.parameter_counts(config())
    assert counts["embedding"] == counts["output"] == 32000 * 768
    assert counts["attention_projections"] == 12 * (768 * (768 + 2 * 256) + 768 * 768)
    assert counts["mlp"] == 12 * 3 * 768 * 2048
    assert counts["norms"] == (2 * 12 + 1) * 768
    # gains, convolution, utilities and gates of 12 heads, 4 groups, width 64, 4 scales, ratio 4
    layer = 16 * 64 + 20 * 64 * 3 + 4 * 12 * 65 + 3 * 2 * 4 * 68
    assert counts["attention_operator"] == 12 * layer
    assert accounting.total_parameters(config()) == sum(counts.values()) == 124_784_064


def test_tied_and_padded_vocabulary():
    tied = accounting.parameter_counts(config(model={"tied_embeddings": True, "vocabulary": 32001}))
    assert (tied["embedding"], tied["output"]) == (32128 * 768, 0)


@pytest.mark.parametrize(
    ("maha", "dense"),
    [
        ({}, {}),
        ({"downsampling": "mean"}, {"convolution": False}),
        ({"convolution": False, "ratio": 2}, {"qk_norm": False}),
        ({"windows": [428], "full_reach": False}, {"convolution": False, "qk_norm": False}),
        ({"downsampling": "conv", "key_map": True}, {}),
        ({"downsampling": "max", "ratio": 8}, {}),
        ({"coupling": "gram"}, {}),
        ({"aggregation": "nash", "regularizer": "quadratic"}, {}),
        ({"aggregation": "nash", "coupling": "gram", "downsampling": "conv", "ratio": 3}, {}),
        ({"aggregation": "mean", "key_map": True}, {}),
        ({"aggregation": "program", "program": "a:b", "coupling": "gram"}, {}),
        ({"queries": "pooled"}, {}),
    ],
)
def test_operator_parameters_are_the_operators(maha, dense):
    """The torch-free count equals the shapes that the attention operator asks for."""
    tree = config(model={"layers": 3, "attention": ["maha", "maha", "dense"]}, maha=maha, dense=dense)
    windows = tuple(maha.get("windows") or scales.default_windows(4096, tree.maha.ratio))
    chosen = {key: value for key, value in maha.items() if key not in ("windows", "full_reach", "ratio", "program")}
    program = absent_program if "program" in maha else None
    spec = MahaSpec(ratio=tree.maha.ratio, windows=windows, program=program, **chosen)
    dense_spec = DenseSpec(qk_norm=tree.dense.qk_norm, convolution=tree.dense.convolution)
    shape = {"n": 12, "g": 4, "d": 64}
    tensors = [*maha_parameter_specs(spec, **shape).values()] * 2 + [
        *dense_parameter_specs(dense_spec, **shape).values()
    ]
    expected = sum(math.prod(tensor.shape) for tensor in tensors)
    assert accounting.parameter_counts(tree)["attention_operator"] == expected


# --------------------------------------------------------------------------------------------------------- operations


GAME = {"aggregation": "nash", "coupling": "gram"}


@pytest.mark.parametrize(
    ("windows", "options", "pairs", "all_in"),
    [
        ([128, 128, 128, 64], {}, 0.818, {64: 0.810, 128: 0.810}),
        ([128, 112, 124, 64], {}, 0.826, {64: 0.818, 128: 0.818}),
        ([128, 128, 128, 64], {"coupling": "gram"}, 0.818, {64: 0.805, 128: 0.806}),
        ([128, 112, 124, 64], {"coupling": "gram"}, 0.826, {64: 0.812, 128: 0.814}),
        ([128, 128, 128, 64], GAME, 0.818, {64: 0.805, 128: 0.806}),
        ([128, 112, 124, 64], GAME, 0.826, {64: 0.812, 128: 0.814}),
    ],
    ids=str,
)
def test_savings_are_those_of_the_definition(windows, options, pairs, all_in):
    """The table of the all-in accounting: 4,096 tokens, as many KV groups as heads, 6 Newton steps."""
    for head_width, expected in all_in.items():
        shape = {"heads": 12, "kv_groups": 12, "head_width": head_width}
        savings = accounting.attention_savings(config(model=shape, maha={"windows": windows, **options}))
        assert round(savings["saved_frac_pairs"], 3) == pairs
        assert round(savings["saved_frac_all_in"], 3) == expected


def test_loaded_tiles_save_less():
    savings = accounting.attention_savings(config())
    assert round(savings["saved_frac_loaded"], 3) == 0.765
    assert savings["visible_pairs"] == {"maha": 1_462_828, "dense": 4096 * 4097 // 2}


def test_grouped_queries_save_a_little_more_since_the_pyramid_is_shared():
    grouped = accounting.attention_savings(config(model={"kv_groups": 4}))["saved_frac_all_in"]
    single = accounting.attention_savings(config(model={"kv_groups": 12}))["saved_frac_all_in"]
    assert 0.81 <= single < grouped < 0.825


def test_hybrid_keeps_its_dense_layers_pairs():
    hybrid = config(model={"attention": ["maha", "maha", "maha", "dense"]})
    assert round(1 - accounting.attention_savings(hybrid)["saved_frac_pairs"], 2) == 0.38


def test_dense_saves_nothing():
    savings = accounting.attention_savings(config(model={"attention": ["dense"]}))
    assert savings["saved_frac_pairs"] == savings["saved_frac_loaded"] == savings["saved_frac_all_in"] == 0


def test_a_convolution_on_one_side_only_is_no_saving():
    """Without convolution in MAHA, its dense peer is counted without one too."""
    without = config(model={"kv_groups": 12}, maha={"convolution": False})
    flops = accounting.attention_flops(without, 4096)
    maha, dense = (sum(flops[kind].values()) for kind in ("maha", "dense"))
    assert flops["dense"]["convolution"] > 0
    expected = 1 - maha / (dense - flops["dense"]["convolution"])
    assert accounting.attention_savings(without)["saved_frac_all_in"] == pytest.approx(expected)


def test_operator_counted_row_by_row():
    """Every term of a short sequence, counted by walking over rows, scales and blocks."""
    n, g, d, rows, ratio, windows = 6, 2, 8, 37, 3, (5, 4, 3)
    tree = config(
        model={"heads": n, "kv_groups": g, "head_width": d},
        maha={"ratio": ratio, "windows": list(windows)},
        data={"sequence_tokens": rows},
    )
    pairs = rope = pyramid = utilities = combination = 0
    for scale, window in enumerate(windows):
        blocks = rows // ratio**scale
        rope += 3 * d * g * blocks
        pyramid += g * 2 * ratio * blocks * (2 * d + 1 + 2 * d) if scale else 0
        for row in range(rows):
            complete = [b for b in range(blocks) if ratio**scale * (b + 1) - 1 <= row]
            pairs += n * len(complete[-window:])
            rope += 3 * d * n
            utilities += n * (2 * d + 1 + 1)
            combination += n * 2 * d
    assert accounting.attention_flops(tree, rows)["maha"] == {
        "scores_and_values": 4 * d * pairs,
        "rope": rope,
        "convolution": 8 * (n + 2 * g) * d * rows,
        "pyramid": pyramid,
        "key_map": 0,
        "pooled_queries": 0,
        "utilities": utilities,
        "gram": 0,
        "solver": 0,
        "combination": combination,
    }
    in_tokens = dataclasses.replace(tree, maha=dataclasses.replace(tree.maha, rope_unit="token"))
    found = accounting.attention_flops(in_tokens, rows)["maha"]["rope"]
    assert found == rope - (len(windows) - 1) * 3 * d * n * rows, "queries turn once"


def test_every_option_counted_row_by_row():
    """The same for a kernel, key maps and pooled queries; coupling by walking over pairs of scales."""
    n, g, d, rows, ratio, windows = 6, 2, 8, 37, 3, (5, 4, 3)
    tree = config(
        model={"heads": n, "kv_groups": g, "head_width": d},
        maha={"ratio": ratio, "windows": list(windows), "queries": "pooled", "downsampling": "conv", "key_map": True}
        | {"coupling": "gram", "lse_utility": False},
        data={"sequence_tokens": rows},
    )
    pairs = rope = pyramid = key_map = pooled = gram = 0
    for scale, window in enumerate(windows):
        for block in range(rows // ratio**scale):
            pairs += n * min(block + 1, window)
            rope += 3 * d * (n + g)
            pyramid += g * 2 * d * ratio * 2 if scale else 0  # keys and values, channels, children, multiply and add
            key_map += g * d * d * 2 if scale else 0
            pooled += n * d * ratio if scale else 0
    for _ in range(rows * n):
        for _ in itertools.combinations_with_replacement(range(len(windows)), 2):
            gram += 2 * d + 2  # the product, over the mean, times kappa
        gram += len(windows)
    terms = accounting.attention_flops(tree, rows)["maha"]
    assert terms["scores_and_values"] == 4 * d * pairs
    assert terms["rope"] == rope
    assert terms["pyramid"] == pyramid
    assert terms["key_map"] == key_map
    assert terms["pooled_queries"] == pooled
    assert terms["gram"] == gram
    assert terms["solver"] > 0
    assert terms["utilities"] == rows * n * 3 * (2 * d + 1)
    assert terms["combination"] == rows * n * 3 * 2 * d
    savings = accounting.attention_savings(tree)
    assert savings["visible_pairs"]["maha"] * n == pairs


def test_a_window_has_neither_pyramid_nor_utilities():
    terms = accounting.attention_flops(load_fragments(["model/window"]), 4096)["maha"]
    assert [term for term, flops in terms.items() if flops] == ["scores_and_values", "rope", "convolution"]


def test_switches_of_the_operator_are_counted():
    base = accounting.attention_flops(config(), 4096)["maha"]
    without_lse = accounting.attention_flops(config(maha={"lse_utility": False}), 4096)["maha"]
    mean = accounting.attention_flops(config(maha={"downsampling": "mean"}), 4096)["maha"]
    assert base["utilities"] - without_lse["utilities"] == 12 * 4 * 4096
    assert mean["pyramid"] < base["pyramid"] / 4
    assert accounting.attention_flops(config(maha={"downsampling": "max"}), 4096)["maha"] == mean
    equal_weights = accounting.attention_flops(config(maha={"aggregation": "mean"}), 4096)["maha"]
    assert base | {"utilities": 0} == equal_weights
    program = accounting.attention_flops(config(maha={"aggregation": "program", "program": "a:b"}), 4096)["maha"]
    assert program == base, "a stated program's solver is not counted"


def test_pooled_queries_load_tiles_of_blocks():
    """A scale whose blocks fit one tile loads one tile of pairs, not a tile per 64 rows."""
    tree = config(maha={"windows": [64, 64], "queries": "pooled"}, data={"sequence_tokens": 128})
    # scale 0: two tiles of queries, the second loads two of keys; scale 1: 32 blocks
    assert accounting.attention_savings(tree)["loaded_pairs"]["maha"] == (1 + 2 + 1) * 64 * 64


def test_flops_per_token_are_two_per_weight():
    tree = config(model={"attention": ["maha", "dense"]})
    terms, counts = accounting.flops_per_token(tree), accounting.parameter_counts(tree)
    assert terms["qkv"] + terms["attention_output"] == 2 * counts["attention_projections"]
    assert terms["mlp"] == 2 * counts["mlp"]
    assert terms["logits"] == 2 * counts["output"]
    operator = accounting.attention_flops(tree, 4096)
    assert terms["attention_maha"] == 6 * sum(operator["maha"].values()) / 4096
    assert terms["attention_dense"] == 6 * sum(operator["dense"].values()) / 4096
    assert accounting.training_flops_per_token(tree) == 3 * sum(terms.values())


def test_share_is_of_the_whole():
    terms = accounting.flops_per_token(config())
    assert accounting.attention_share(config()) == terms["attention_maha"] / sum(terms.values())
    dense = config(model={"attention": ["dense"]})
    assert accounting.attention_share(config()) < accounting.attention_share(dense) < 1


# ------------------------------------------------------------------------------------------------------------- memory


def memory_per_parameter(stage, precision="bf16", world_size=4, **zero):
    tree = config(zero={"stage": stage, **zero}, train={"precision": precision})
    memory = accounting.memory_estimate(tree, world_size)
    assert memory["total"] == sum(value for key, value in memory.items() if key != "total")
    return tuple(memory[key] / accounting.total_parameters(tree) for key in ("weights", "gradients", "optimizer"))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(1, (2, 6, 3)), (2, (2, 1, 3)), (3, (0.5, 1, 3))],
)
def test_memory_of_bf16_by_stage(stage, expected):
    assert memory_per_parameter(stage) == expected


@pytest.mark.parametrize(("stage", "expected"), [(0, (4, 4, 8)), (1, (4, 4, 3)), (2, (4, 1, 3)), (3, (1, 1, 3))])
def test_memory_of_fp32_by_stage(stage, expected):
    assert memory_per_parameter(stage, "fp32") == expected


def test_memory_of_bf16_accumulation():
    assert memory_per_parameter(1, accumulation_dtype="bf16") == (2, 2, 3)


def test_tensor_parallelism_divides_all_but_the_norms():
    tree = config(parallel={"tensor": 4})
    counts = accounting.parameter_counts(tree)
    local = (sum(counts.values()) - counts["norms"]) / 4 + counts["norms"]
    assert accounting.memory_estimate(tree, 4)["weights"] == 2 * local

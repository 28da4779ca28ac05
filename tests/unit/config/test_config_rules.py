"""Every rule refuses what it is for, with a message that says what to change, and lets good configurations pass."""

import inspect

import pytest

from maha_megatron.config import data_rules, refine_rules, rules
from maha_megatron.config.load import config_from_dict
from maha_megatron.config.rules import RULES, TOPOLOGY_RULES, check_config, check_topology
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError

REFINED = {"model": {"attention": ["maha", "refined"]}}
GRAPHS = {"train": {"cuda_graphs": True}}
# rule -> configurations it must refuse, each with words its message must hold
REFUSED = {
    "groups_divide_heads": [({"model": {"heads": 12, "kv_groups": 5}}, ["kv_groups = 5", "[1, 2, 3, 4, 6, 12]"])],
    "head_width_is_even": [({"model": {"head_width": 63}}, ["head_width = 63", "64"])],
    "pattern_fills_layers": [
        ({"model": {"layers": 10, "attention": ["maha", "maha", "maha", "dense"]}}, ["layers = 10", "use 8 layers"]),
        ({"model": {"attention": []}}, ["model.attention is empty"]),
    ],
    "embedding_start_is_used": [
        ({"model": {"tied_embeddings": True, "embedding_init_std": 0.1}}, ["model.embedding_init_std", "init_std"]),
    ],
    "windows_are_possible": [
        ({"maha": {"ratio": 9}}, ["ratio = 9", "2..8"]),
        ({"maha": {"windows": [3] * 9}}, ["9 scales", "at most 8", "maha.windows: [128, 112, 124, 64]"]),
        ({"maha": {"windows": [128, 2, 1000]}}, ["windows[1] = 2", "holes", "at least 3"]),
        ({"maha": {"windows": [128, 112, 124, 0]}}, ["windows[3] = 0", "at least 1"]),
        ({"maha": {"windows": [9, 9, 9, 9]}, "data": {"sequence_tokens": 60}}, ["64 rows", "never completes"]),
        ({"maha": {"ratio": 2}, "data": {"sequence_tokens": 65536}}, ["10 scales", "with maha.ratio: 4"]),
        (REFINED | {"refine": {"windows": [128, 2, 256]}}, ["refine.windows[1] = 2", "at least 3"]),
    ],
    "windows_reach_sequence": [
        ({"maha": {"windows": [128, 112, 124, 63]}}, ["row 4095", "[128, 112, 124, 64]", "full_reach"]),
        ({"maha": {"windows": [428]}}, ["row 428", "maha.full_reach: false"]),
        (
            REFINED | {"refine": {"windows": [128, 3, 9]}},
            ["refine.windows = [128, 3, 9]", "use refine.windows: [128, 112"],
        ),
    ],
    "tensor_within_groups": [({"parallel": {"tensor": 8}}, ["tensor = 8 exceeds model.kv_groups = 4"])],
    "tensor_divides_model": [
        ({"parallel": {"tensor": 3}}, ["tensor = 3", "kv_groups = 4", "ffn_hidden = 2048"]),
        ({"model": {"ffn_hidden": 2050}, "parallel": {"tensor": 4}}, ["ffn_hidden = 2050"]),
    ],
    "tensor_divides_vocabulary": [
        ({"model": {"vocabulary": 101, "vocabulary_multiple": 1}, "parallel": {"tensor": 2}}, ["101 rows", "of 2"])
    ],
    "sequence_parallel_is_possible": [
        ({"parallel": {"sequence": True}}, ["parallel.tensor > 1"]),
        ({"parallel": {"sequence": True, "tensor": 2}, "data": {"sequence_tokens": 129}}, ["129 rows", "tensor = 2"]),
    ],
    "zero_stage_exists": [({"zero": {"stage": 4}}, ["zero.stage = 4", "0, 1, 2 or 3"])],
    "bf16_needs_zero": [({"zero": {"stage": 0}}, ["bf16", "zero.stage: 1", "fp32"])],
    "fp32_gradients_stay_fp32": [
        ({"train": {"precision": "fp32"}, "zero": {"accumulation_dtype": "bf16"}}, ["zero.accumulation_dtype"]),
        ({"train": {"precision": "fp32"}, "zero": {"communication_dtype": "bf16"}}, ["zero.communication_dtype"]),
    ],
    "zero_keys_have_effect": [
        ({"train": {"precision": "fp32"}, "zero": {"stage": 0, "overlap": True}}, ["zero.overlap", "stage: 0"]),
        ({"train": {"precision": "fp32"}, "zero": {"stage": 0, "bucket_elements": 8}}, ["zero.bucket_elements"]),
        ({"zero": {"overlap": True}}, ["zero.overlap", "use stage 2"]),
    ],
    "buckets_are_even": [({"zero": {"bucket_elements": 7}}, ["bucket_elements = 7", "even"])],
    "micro_batch_divides_batch": [
        ({"train": {"global_batch_samples": 10, "micro_batch_samples": 4}}, ["= 10", "= 4", "use 8 samples"])
    ],
    "schedule_fits_run": [
        ({"train": {"steps": 99}}, ["100", "train.steps = 99"]),
        ({"schedule": {"kind": "wsd", "decay_steps": 901}}, ["1001", "train.steps = 1000"]),
        ({"schedule": {"final": 1.0}}, ["schedule.final = 1.0", "schedule.peak"]),
    ],
    "schedule_keys_have_effect": [
        ({"schedule": {"decay_steps": 5}}, ["schedule.decay_steps", "cosine"]),
        ({"schedule": {"kind": "wsd"}}, ["decay_steps > 0"]),
        ({"schedule": {"kind": "constant", "final": 1e-5}}, ["schedule.final", "constant"]),
    ],
    "optimizer_keys_make_sense": [
        ({"optimizer": {"name": "sgd", "beta1": 0.5}}, ["optimizer.beta1", "sgd"]),
        ({"optimizer": {"name": "sgd", "weight_decay": 0.2}}, ["optimizer.weight_decay", "sgd"]),
        ({"optimizer": {"beta2": 1.0}}, ["optimizer.beta2 = 1.0", "below 1"]),
    ],
    "validation_share_is_a_share": [
        ({"data": {"validation_frac": 1.0}}, ["below 1"]),
        ({"data": {"validation_frac": 0.1, "validation": [{"prefix": "v"}]}}, ["no effect beside data.validation"]),
    ],
    "sources_are_used": [({"data": {"train": [{"prefix": "c", "weight": 0}]}}, ["'c' has weight 0"])],
    "sources_are_named_once": [
        ({"data": {"train": [{"prefix": "c"}, {"prefix": "c"}]}}, ["data.train names source 'c' more than once"]),
        ({"data": {"train": [{"prefix": " "}]}}, ["data.train has a source without a prefix"]),
        (
            {"data": {"train": [{"prefix": "c"}], "validation": [{"prefix": "c"}]}},
            ["'c' is trained on too", "data.validation_frac"],
        ),
    ],
    "sources_ask_in_one_way": [
        ({"data": {"train": [{"prefix": "c", "epochs": 2}, {"prefix": "d"}]}}, ["'c' asks by epochs and 'd' does not"]),
        ({"data": {"train": [{"prefix": "c", "epochs": 2, "weight": 3}]}}, ["'c' has both weight and epochs"]),
    ],
    "skipped_ranges_ascend": [
        ({"data": {"skip": [{"first": 5, "last": 4}]}}, ["data.skip[0]", "last = 4 is before first = 5"]),
        ({"data": {"skip": [{"first": 5, "last": 9}, {"first": 9, "last": 9}]}}, ["data.skip[1]", "sample 9"]),
    ],
    "attention_keys_have_effect": [
        ({"model": {"attention": ["dense"]}, "maha": {"ratio": 2}}, ["maha.ratio", "no effect"]),
        ({"dense": {"qk_norm": False}}, ["dense.qk_norm", "no effect"]),
        (
            {"maha": {"windows": [428], "full_reach": False, "downsampling": "mean", "ratio": 2}},
            ["maha.downsampling, maha.ratio", "no effect"],
        ),
        *(
            ({"maha": {"windows": [428], "full_reach": False} | options}, [f"maha.{key}", "no effect"])
            for options in (
                {"key_map": True},
                {"queries": "pooled"},
                {"aggregation": "nash"},
                {"aggregation": "mean"},
                {"regularizer": "quadratic"},
                {"coupling": "gram"},
                {"program": "a:b"},
            )
            for key in options
        ),
        ({"model": {"attention": ["dense"]}, "maha": {"key_map": True}}, ["maha.key_map", "no effect"]),
        ({"model": {"attention": ["dense"]}, "maha": {"aggregation": "nash"}}, ["maha.aggregation", "no effect"]),
    ],
    "aggregation_keys_have_effect": [
        ({"maha": {"program": "a:b"}}, ["maha.program", "aggregation: convex", "only maha.aggregation: program"]),
        ({"maha": {"aggregation": "nash", "program": "a:b"}}, ["maha.program", "aggregation: nash"]),
        (
            {"maha": {"aggregation": "mean", "regularizer": "quadratic", "coupling": "gram", "lse_utility": False}},
            ["maha.regularizer, maha.coupling, maha.lse_utility", "aggregation: mean"],
        ),
        ({"maha": {"aggregation": "mean", "program": "a:b"}}, ["maha.program", "aggregation: mean"]),
        (
            {"maha": {"aggregation": "program", "program": "a:b", "regularizer": "quadratic"}},
            ["maha.regularizer", "states its own"],
        ),
    ],
    "layers_can_be_captured": [
        (GRAPHS | {"model": {"attention": ["dense"]}}, ["no effect", "['dense']"]),
        (GRAPHS | {"maha": {"backend": "eager"}}, ["needs maha.backend: triton; or set it to false"]),
        (GRAPHS | {"maha": {"backend": "triton", "coupling": "gram"}}, ["convex with maha.coupling: none"]),
        (GRAPHS | {"maha": {"backend": "triton", "aggregation": "nash"}}, ["convex with maha.coupling: none"]),
        (GRAPHS | {"maha": {"backend": "triton", "queries": "pooled"}}, ["needs maha.queries: full"]),
        (GRAPHS | {"maha": {"backend": "triton", "key_map": True}}, ["maha.key_map: false"]),
        (
            {"train": {"cuda_graphs": True, "recompute": "full"}, "zero": {"stage": 3}},
            ["maha.backend: triton; train.recompute: none; zero.stage: 2"],
        ),
    ],
    "program_is_named": [
        ({"maha": {"aggregation": "program"}}, ["''", "my_module:build"]),
        ({"maha": {"aggregation": "program", "program": "my_module"}}, ["'my_module'", "module:function"]),
        ({"maha": {"aggregation": "program", "program": "a/b.py:build"}}, ["'a/b.py:build'"]),
        ({"maha": {"aggregation": "program", "program": "a:b:c"}}, ["'a:b:c'"]),
    ],
    "rope_unit_fits_queries": [
        ({"maha": {"rope_unit": "token", "queries": "pooled"}}, ["rope_unit: token", "use block, or full"]),
    ],
    "refine_keys_have_effect": [
        ({"refine": {"from_scale": 3, "blocks": 9}}, ["refine.from_scale, refine.blocks", "no effect", "refined]"]),
    ],
    "windows_have_effect": [
        (
            {
                "model": {"attention": ["refined"]},
                "maha": {"windows": [128, 112, 256]},
                "refine": {"windows": [64, 64, 256]},
            },
            ["maha.windows: no effect", "every layer is refined", "remove refine.windows"],
        ),
    ],
    "refinement_lies_between_scales": [
        (REFINED | {"maha": {"windows": [4096]}}, ["maha.windows has one scale", "use two"]),
        (REFINED | {"refine": {"windows": [4096]}}, ["refine.windows has one scale", "use two"]),
        (REFINED | {"refine": {"windows": [64, 64, 256], "from_scale": 3}}, ["refine.windows = [64, 64, 256]"]),
        (REFINED | {"refine": {"from_scale": 4}}, ["from_scale = 4", "scales 0 to 3", "refine.from_scale: 3"]),
        (REFINED | {"refine": {"to_scale": 2}}, ["to_scale = 2", "at most 1"]),
        (
            REFINED | {"data": {"sequence_tokens": 2048}, "maha": {"windows": [2033, 3, 128]}},
            ["nothing can ever be opened", "the last 2033 rows", "reaches 2048", "narrow maha.windows[0]"],
        ),
    ],
    "refinement_goes_with_the_rest": [
        (REFINED | {"maha": {"queries": "pooled"}}, ["maha.queries: pooled", "use full"]),
        (REFINED | {"maha": {"aggregation": "program", "program": "a:b"}}, ["aggregation: program", "use another"]),
    ],
}

ACCEPTED = [
    {},
    GRAPHS | {"maha": {"backend": "triton"}},
    GRAPHS | {"maha": {"backend": "triton", "aggregation": "mean"}},
    {"data": {"train": [{"prefix": "c", "epochs": 2}, {"prefix": "d", "epochs": 0.5}], "packing": "best_fit"}},
    {"data": {"skip": [{"first": 0, "last": 0}, {"first": 5, "last": 9}]}},
    {"train": {"precision": "fp32"}, "zero": {"stage": 0}},
    {"maha": {"windows": [428], "full_reach": False}},
    {"maha": {"windows": [4096]}},
    {"maha": {"windows": [3, 3, 256]}},
    {"maha": {"windows": [128, 112, 124, 70]}},
    {"maha": {"aggregation": "nash", "regularizer": "quadratic", "coupling": "gram", "lse_utility": False}},
    {"maha": {"aggregation": "nash"}},
    {"maha": {"rope_unit": "token"}},
    {"maha": {"regularizer": "quadratic"}},
    {"maha": {"coupling": "gram"}},
    {"maha": {"aggregation": "mean", "queries": "pooled", "downsampling": "max", "key_map": True}},
    {"maha": {"aggregation": "program", "program": "a.b:build", "coupling": "gram", "lse_utility": False}},
    {"maha": {"windows": [3, 256], "ratio": 4, "downsampling": "conv"}, "data": {"sequence_tokens": 1024}},
    REFINED,
    REFINED | {"maha": {"windows": [256], "full_reach": False}, "refine": {"windows": [128, 64, 256]}},
    {"model": {"attention": ["refined"]}, "refine": {"from_scale": 3, "to_scale": 2, "blocks": 999}},
    REFINED | {"data": {"sequence_tokens": 2048}, "maha": {"windows": [2032, 3, 128]}},
    {"data": {"sequence_tokens": 5}},
    {"data": {"sequence_tokens": 1_048_576}},
    {"model": {"attention": ["dense"]}, "maha": {"backend": "naive"}},
    {"parallel": {"tensor": 4, "sequence": True}},
    {"zero": {"stage": 2, "overlap": True}},
    {"zero": {"overlap": True, "accumulation_dtype": "bf16"}},
    {"schedule": {"kind": "wsd", "decay_steps": 900}},
    {"schedule": {"kind": "constant", "peak": 0.1}},
    {"schedule": {"kind": "constant", "peak": 0.1, "final": 0.1}},
    {"optimizer": {"name": "sgd"}},
    {"optimizer": {"name": "sgd", "weight_decay": 0.0}},
]


@pytest.mark.parametrize(
    ("rule", "tree", "words"), [(rule, *case) for rule, cases in REFUSED.items() for case in cases]
)
def test_rule_refuses_and_says_what_to_change(rule, tree, words):
    config = config_from_dict(tree)
    message = next(written for written in RULES if written.__name__ == rule)(config)
    assert message is not None
    for word in words:
        assert word in message
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("tree", ACCEPTED)
def test_good_configurations_pass(tree):
    check_config(config_from_dict(tree))


def test_every_rule_is_applied_and_tried():
    written = [
        function
        for module in (rules, data_rules, refine_rules)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith(("_", "check_"))
    ]
    assert {*RULES, *TOPOLOGY_RULES} == set(written)
    assert {rule.__name__ for rule in RULES} == set(REFUSED)


def test_what_one_scale_makes_useless_is_said_once():
    with pytest.raises(ConfigError) as caught:
        check_config(config_from_dict({"maha": {"windows": [4096], "aggregation": "mean", "coupling": "gram"}}))
    assert len(str(caught.value).splitlines()) == 1


def test_all_broken_rules_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        check_config(config_from_dict({"model": {"head_width": 63}, "zero": {"stage": 4}}))
    assert len(str(caught.value).splitlines()) == 2


def test_tensor_above_groups_has_one_message():
    with pytest.raises(ConfigError) as caught:
        check_config(config_from_dict({"parallel": {"tensor": 16}}))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_that_fit_pass(world_size):
    check_topology(Config(), world_size)


def test_ranks_must_divide():
    config = config_from_dict({"parallel": {"tensor": 2}})
    with pytest.raises(ConfigError, match=r"3 ranks do not divide into groups of parallel\.tensor = 2"):
        check_topology(config, 3)
    check_topology(config, 16)
    with pytest.raises(ConfigError, match=r"global_batch_samples = 8 .* x 16 data-parallel ranks = 16; use 16 samples"):
        check_topology(config, 32)

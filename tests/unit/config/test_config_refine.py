"""Refined layers in the configuration: what they cost, counted another way, and what makes another model."""

import math

import pytest

from maha_megatron.attention.spec import MahaSpec, Refinement, maha_parameter_specs
from maha_megatron.config import accounting
from maha_megatron.config.fingerprint import model_description, model_fingerprint
from maha_megatron.config.load import config_from_dict, config_to_dict, load_fragments

N, G, D, ROWS, RATIO, WINDOWS = 6, 2, 8, 75, 3, (5, 4, 6)
CHILDREN = {(2, 0): 9, (2, 1): 3, (1, 0): 3}


def config(from_scale=2, to_scale=0, blocks=2, **maha):
    return config_from_dict(
        {
            "model": {"heads": N, "kv_groups": G, "head_width": D, "layers": 4, "attention": ["maha", "refined"]},
            "maha": {"ratio": RATIO, "windows": list(WINDOWS)} | maha,
            "refine": {"from_scale": from_scale, "to_scale": to_scale, "blocks": blocks},
            "data": {"sequence_tokens": ROWS},
        }
    )


@pytest.mark.parametrize(
    "maha", [{}, {"aggregation": "nash", "coupling": "gram"}, {"aggregation": "mean"}, {"key_map": True}], ids=str
)
def test_operator_parameters_are_the_operators(maha):
    spec = MahaSpec(ratio=RATIO, windows=WINDOWS, **maha)
    refined = MahaSpec(ratio=RATIO, windows=WINDOWS, refine=Refinement(from_scale=2, to_scale=0, blocks=2), **maha)
    tensors = [tensor for one in (spec, refined) for tensor in maha_parameter_specs(one, n=N, g=G, d=D).values()]
    expected = 2 * sum(math.prod(tensor.shape) for tensor in tensors)
    assert accounting.parameter_counts(config(**maha))["attention_operator"] == expected


@pytest.mark.parametrize(("from_scale", "to_scale"), CHILDREN)
@pytest.mark.parametrize("blocks", [1, 2, 50])
def test_what_opening_adds_counted_row_by_row(from_scale, to_scale, blocks):
    terms = accounting.attention_flops(config(from_scale, to_scale, blocks), ROWS)
    coarse, fine = RATIO**from_scale, RATIO**to_scale
    pairs = loaded = selection = 0
    for row in range(ROWS):
        seen = [b for b in range(ROWS // coarse) if coarse * (b + 1) <= row + 1][-WINDOWS[from_scale] :]
        shown = [b for b in range(ROWS // fine) if fine * (b + 1) <= row + 1][-WINDOWS[to_scale] :]
        openable = [b for b in seen if coarse * (b + 1) <= fine * shown[0]]
        pairs += min(len(openable), blocks) * CHILDREN[from_scale, to_scale]
        loaded += blocks * CHILDREN[from_scale, to_scale] if openable else 0
        selection += len(openable) * (N + (N - G) + blocks * G)
    expected = terms["maha"] | {"selection": selection}
    expected["scores_and_values"] += 4 * D * N * pairs
    expected["utilities"] += ROWS * N * (2 * D + 2)
    expected["combination"] += ROWS * N * 2 * D
    assert terms["refined"] == expected
    savings = accounting.attention_savings(config(from_scale, to_scale, blocks))
    assert savings["visible_pairs"]["refined"] - savings["visible_pairs"]["maha"] == pairs > 0
    assert savings["loaded_pairs"]["refined"] - savings["loaded_pairs"]["maha"] == loaded


def test_what_fuses_the_scales_counts_one_more():
    terms = accounting.attention_flops(config(aggregation="nash", coupling="gram"), ROWS)
    four = accounting.attention_flops(config(aggregation="nash", coupling="gram", windows=[5, 4, 6, 1]), ROWS)["maha"]
    for term in ("utilities", "gram", "solver", "combination"):
        assert terms["maha"][term] < terms["refined"][term] == four[term]


def test_the_model_file_keeps_the_saving_and_counts_in_the_step():
    for groups, expected in ((4, 0.812), (12, 0.810)):
        tree = load_fragments(["model/refined"], [f"model.kv_groups={groups}"])
        savings = accounting.attention_savings(tree)
        assert round(savings["saved_frac_all_in"], 3) == expected
        assert round(savings["saved_frac_pairs"], 3) == 0.817
    terms = accounting.flops_per_token(tree)
    operator = accounting.attention_flops(tree, 4096)["refined"]
    assert terms["attention_refined"] == 3 * sum(operator.values()) / 4096
    attention = terms["attention_maha"] + terms["attention_refined"]
    assert accounting.attention_share(tree) == attention / sum(terms.values())
    every = load_fragments(["model/refined"], ["model.attention=[refined]"])
    assert round(accounting.attention_savings(every)["saved_frac_all_in"], 3) == 0.789


def windowed(**refine):
    """A plain window in MAHA layers, beside refined layers with the windows of `config`."""
    tree = {"maha": {"windows": [7], "full_reach": False, "ratio": RATIO}, "refine": {"blocks": 2, **refine}}
    model = {"heads": N, "kv_groups": G, "head_width": D, "layers": 4, "attention": ["maha", "refined"]}
    return config_from_dict(tree | {"model": model, "data": {"sequence_tokens": ROWS}})


def test_windows_of_refined_layers_alone_are_counted_there_and_nowhere_else():
    mixed, refined = windowed(windows=list(WINDOWS)), config()
    plain = config_from_dict(
        {
            "model": {"heads": N, "kv_groups": G, "head_width": D, "layers": 4, "attention": ["maha"]},
            "maha": {"windows": [7], "full_reach": False},
            "data": {"sequence_tokens": ROWS},
        }
    )
    terms, counts = accounting.attention_flops(mixed, ROWS), accounting.attention_savings(mixed)
    for kind, other in (("maha", plain), ("refined", refined)):
        assert terms[kind] == accounting.attention_flops(other, ROWS)[kind]
        for pairs in ("visible_pairs", "loaded_pairs"):
            assert counts[pairs][kind] == accounting.attention_savings(other)[pairs][kind]
    assert terms["maha"]["pyramid"] == 0 < terms["refined"]["pyramid"]
    spec = MahaSpec(ratio=RATIO, windows=WINDOWS, refine=Refinement(from_scale=2, to_scale=0, blocks=2))
    tensors = [
        tensor
        for one in (MahaSpec(ratio=RATIO, windows=(7,)), spec)
        for tensor in maha_parameter_specs(one, n=N, g=G, d=D).values()
    ]
    assert accounting.parameter_counts(mixed)["attention_operator"] == 2 * sum(math.prod(t.shape) for t in tensors)


def test_windows_of_refined_layers_make_another_model_unless_they_are_those_of_the_others():
    given = config_from_dict(config_to_dict(config()) | {"refine": {"blocks": 2, "windows": list(WINDOWS)}})
    assert model_description(given) == model_description(config())
    mixed, other = windowed(windows=list(WINDOWS)), windowed(windows=[5, 4, 7])
    assert model_description(mixed)["maha.windows"] == [7]
    assert model_description(mixed)["refine.windows"] == list(WINDOWS)
    assert len({model_fingerprint(tree) for tree in (config(), mixed, other)}) == 3


def test_another_refinement_is_another_model_and_without_refined_layers_it_is_none():
    described = model_description(config())
    assert {key for key in described if key.startswith("refine.")} == {
        "refine.from_scale", "refine.to_scale", "refine.blocks"
    }  # fmt: skip
    others = [config(1), config(2, 1), config(2, 0, 3)]
    assert len({model_fingerprint(tree) for tree in [config(), *others]}) == 4
    assert not any(key.startswith("refine") for key in model_description(load_fragments(["model/maha"])))

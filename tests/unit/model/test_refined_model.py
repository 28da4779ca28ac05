"""Refined layers among others in a model: their parameters start inert and never decay, and nothing reads ahead."""

import pytest
import torch

from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.init import decays_weight, initialise_parameters
from maha_megatron.model.inspection import inspect_layers
from maha_megatron.model.maha_core_attention import MahaCoreAttention
from maha_megatron.model.names import logical_names
from tests.support.model import random_batch, random_model, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")
PATTERN = {"model__attention": ("maha", "refined", "dense"), "model__layers": 3, "maha__windows": (4, 6, 16)}


def test_a_refined_layer_starts_as_the_others_with_a_row_more_for_what_it_opens():
    config = tiny_config(**PATTERN)
    model = build_gpt(config, device="cpu")
    initialise_parameters(model, config)
    parameters = logical_names(model)
    for name, rows in (("utility_query", 3), ("utility_bias", 3)):
        maha, refined = (parameters[f"layers.{layer}.attention.{name}"] for layer in (0, 1))
        assert (len(maha), len(refined)) == (rows, rows + 1)
        assert not refined.any()
    assert f"layers.2.attention.{name}" not in parameters
    of_refined = {name: value for name, value in parameters.items() if name.startswith("layers.1.attention.")}
    decaying = {name for name, value in of_refined.items() if decays_weight(name, value.ndim)}
    assert decaying == {"layers.1.attention.qkv.weight", "layers.1.attention.output.weight"}


WINDOWED = PATTERN | {"maha__windows": (9,), "maha__full_reach": False, "refine__windows": (4, 6, 16)}


def test_refined_layers_may_have_windows_that_the_others_have_not():
    config = tiny_config(**WINDOWED)
    model, batch = random_model(config), random_batch(config, rows=60)
    model.collect_scale_weights = True
    model(*batch)
    assert {layer: len(mean_l) for layer, mean_l in model.scale_weights().items()} == {0: 1, 1: 4}
    specs = {module.spec.windows for module in model.modules() if isinstance(module, MahaCoreAttention)}
    assert specs == {(9,), (4, 6, 16)}


@torch.no_grad()
@pytest.mark.parametrize("settings", [PATTERN, WINDOWED], ids=["same windows", "own windows"])
def test_no_token_reaches_an_earlier_logit(settings):
    config = tiny_config(**settings)
    model, batch = random_model(config), random_batch(config, rows=90, starts=(0, 51))
    logits = model.logits(batch.input_ids_t, batch.bounds)
    for row in range(1, 90, 4):
        changed = batch.input_ids_t.clone()
        changed[row] = (changed[row] + 1) % 100
        same = (model.logits(changed, batch.bounds) == logits).all(-1)
        assert same[:row].all()
        assert not same[row]
        assert row >= 51 or same[51:].all()


def test_scale_weights_and_inspection_name_what_was_opened():
    config = tiny_config(**PATTERN)
    model, batch = random_model(config), random_batch(config, rows=60)
    model.collect_scale_weights = True
    model(*batch)
    assert {layer: len(mean_l) for layer, mean_l in model.scale_weights().items()} == {0: 3, 1: 4}
    found = inspect_layers(model, batch.input_ids_t.tolist())
    assert found[0].names_l == ("scale 0", "scale 1", "scale 2")
    assert found[1].names_l == ("scale 0", "scale 1", "scale 2", "opened")
    torch.testing.assert_close(found[1].mass_by_distance_nk.sum(-1), torch.ones(8))

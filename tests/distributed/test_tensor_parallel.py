"""The same model over one and over two tensor-parallel ranks: losses, logits and every gradient by logical name.

One launch of two ranks computes everything; the tests look at what came back. The reference runs in the same
processes with parallel.tensor = 1.
"""

import contextlib
from typing import Any

import pytest
import torch

from maha_megatron.config.schema import Config
from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.init import initialise_parameters
from maha_megatron.parallel import compat
from maha_megatron.parallel.gradients import sum_partial_gradients
from tests.support.distributed import run_ranks
from tests.support.model import (
    full_gradients,
    full_parameters,
    random_batch,
    random_model,
    relative_difference,
    tiny_config,
)

CONFIGS = {
    "maha": {"model__attention": ("maha",)},
    "maha_mean_no_lse": {"model__attention": ("maha",), "maha__downsampling": "mean", "maha__lse_utility": False},
    "maha_conv_key_map": {"model__attention": ("maha",), "maha__downsampling": "conv", "maha__key_map": True},
    "maha_nash_gram": {"model__attention": ("maha",), "maha__aggregation": "nash", "maha__coupling": "gram"},
    "refined": {"model__attention": ("maha", "refined"), "maha__windows": (4, 6, 16)},
    # the second rank's share of the vocabulary is nothing but padding
    "hybrid_tied": {"model__tied_embeddings": True, "model__vocabulary": 60},
    "dense": {"model__attention": ("dense",)},
    "dense_plain_tied": {
        "model__attention": ("dense",),
        "dense__qk_norm": False,
        "dense__convolution": False,
        "model__tied_embeddings": True,
    },
}
TENSOR = {"parallel__tensor": 2}
SEQUENCE = {"parallel__tensor": 2, "parallel__sequence": True}
ROWS, STARTS = 64, (0, 21, 32, 33)


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[str, Any]]:
    return run_ranks(_all_results, 2, timeout_s=300)


@pytest.fixture(scope="module")
def results(both_ranks) -> dict[str, Any]:
    return both_ranks[0]


@pytest.mark.parametrize("topology", ["tensor", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_ranks_see_the_same_loss(both_ranks, name, topology):
    first, second = (results[name][topology] for results in both_ranks)
    assert torch.equal(first["loss"], second["loss"])
    assert torch.equal(first["logits"], second["logits"])


@pytest.mark.parametrize("topology", ["tensor", "sequence"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_one_rank(results, name, topology):
    reference, result = results[name]["one"], results[name][topology]
    assert result["loss"].item() == pytest.approx(reference["loss"].item(), rel=1e-6)
    assert relative_difference(result["logits"], reference["logits"]) < 1e-5
    differences = _differences(result, reference)
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_gradient(results, name):
    zero = [key for key, gradient in results[name]["one"]["gradients"].items() if not gradient.any()]
    assert zero == []


def test_partial_gradients_need_their_sum(results):
    """Without the hooks the norms' gradients under sequence parallelism are wrong, and only they are."""
    differences = _differences(results["maha"]["sequence_without_sums"], results["maha"]["one"])
    assert {name for name, difference in differences.items() if difference > 1e-2} == {
        name for name in differences if "norm" in name
    }


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("topology", ["one", "sequence"])
def test_recompute_changes_no_bit(results, topology, recompute):
    reference, result = results["hybrid_tied"][topology], results["hybrid_tied"][f"{topology}_{recompute}"]
    assert torch.equal(result["loss"], reference["loss"])
    for name, gradient in reference["gradients"].items():
        assert torch.equal(result["gradients"][name], gradient), name


@pytest.mark.parametrize("topology", ["tensor", "sequence"])
def test_scale_weights_average_over_all_heads(results, topology):
    reference, result = results["hybrid_tied"]["one"]["scale_weights"], results["hybrid_tied"][topology]
    assert list(reference) == [0]
    torch.testing.assert_close(result["scale_weights"][0], reference[0])
    assert reference[0].sum().item() == pytest.approx(1)


def test_initial_weights_are_the_same_at_every_topology(results):
    one, two = results["initial"]["one"], results["initial"]["tensor"]
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_padding_rows_get_no_gradient(results):
    for topology in ("one", "tensor"):
        assert not results["hybrid_tied"][topology]["gradients"]["embedding.weight"][60:].any()
        assert not results["maha"][topology]["gradients"]["output.weight"][100:].any()


def _differences(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    assert list(result["gradients"]) == list(reference["gradients"])
    return {
        name: relative_difference(result["gradients"][name], gradient)
        for name, gradient in reference["gradients"].items()
    }


def _all_results(rank: int) -> dict[str, Any]:
    """Everything the tests look at, computed on both ranks alike."""
    compat.initialise_distributed(tiny_config())
    results: dict[str, Any] = {name: {} for name in CONFIGS} | {"initial": {}}
    for topology, changes in {"one": {}, "tensor": TENSOR, "sequence": SEQUENCE}.items():
        with _topology(tiny_config(**changes)) as config:
            for name, variant in CONFIGS.items():
                results[name][topology] = _run(tiny_config(**changes, **variant))
            for recompute in ("selective", "full"):
                variant = CONFIGS["hybrid_tied"] | {"train__recompute": recompute}
                results["hybrid_tied"][f"{topology}_{recompute}"] = _run(tiny_config(**changes, **variant))
            if topology == "sequence":
                results["maha"]["sequence_without_sums"] = _run(
                    tiny_config(**changes, **CONFIGS["maha"]), sum_gradients=False
                )
            model = build_gpt(config, device="cpu")
            initialise_parameters(model, config)
            results["initial"][topology] = full_parameters(model)
    compat.shutdown()
    return results


@contextlib.contextmanager
def _topology(config: Config):
    compat.initialise_model_parallel(config)
    compat.seed_everything(1)
    yield config
    compat.parallel_state.destroy_model_parallel()


def _run(config: Config, *, sum_gradients: bool = True) -> dict[str, Any]:
    model = random_model(config)
    if sum_gradients:
        sum_partial_gradients(model)
    batch = random_batch(config, rows=ROWS, starts=STARTS)
    model.collect_scale_weights = True
    with torch.no_grad():
        logits = model.logits(batch.input_ids_t, batch.bounds)
    loss = model(*batch)
    (loss / 40).backward()
    return {
        "loss": loss.detach(),
        "logits": logits,
        "gradients": full_gradients(model),
        "scale_weights": model.scale_weights(),
    }

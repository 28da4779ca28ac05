"""What aggregations and pooled queries must equal in special cases."""

import dataclasses
import itertools

import pytest
import torch

from maha_megatron.attention.spec import MahaSpec
from maha_megatron.scales import stride
from tests.support.attention import (
    FAST_BACKENDS,
    PACKED,
    Case,
    assert_close,
    attend,
    every_aggregation,
    leaves,
    reference,
    results,
    start_rows,
)
from tests.support.everyday import everyday

BACKENDS = pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
REGULARIZERS = pytest.mark.parametrize("regularizer", ["entropy", "quadratic"])
COUPLINGS = pytest.mark.parametrize("coupling", ["none", "gram"])
LSE = pytest.mark.parametrize("lse_utility", [True, False])
# the reference with half of the others
ALL_THREE = pytest.mark.parametrize(
    ("backend", "regularizer", "lse_utility"),
    everyday(
        itertools.product(("naive", *FAST_BACKENDS), ("entropy", "quadratic"), (True, False)),
        lambda backend, regularizer, lse_utility: backend != "naive" or lse_utility == (regularizer == "entropy"),
    ),
)
EXACT = 1e-10


def a_case(windows=(10, 5, 6), **options) -> Case:
    return Case(lengths=PACKED, n=2, g=1, d=8, spec=MahaSpec(ratio=4, windows=windows, **options))


def run(case: Case, values: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """Output, weights, and the gradients of what every case has, on these values."""
    shared = [name for name in values if name not in ("coupling_raw", "skew")]
    values = {name: value.detach().requires_grad_() for name, value in values.items()}
    found = attend(case, values, backend)
    direction = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(found["out"], [values[name] for name in shared], direction, materialize_grads=True)
    return found | {f"grad of {name}": grad for name, grad in zip(shared, grads, strict=True)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    assert_close(found, {name: value.detach() for name, value in expected.items()}, tolerance)


@ALL_THREE
def test_a_game_without_skew_and_coupling_is_the_uncoupled_program(backend, regularizer, lse_utility):
    """With entropy that is the joint softmax, whose path forms no output of a scale."""
    options = {"regularizer": regularizer, "lse_utility": lse_utility}
    nash, convex = a_case(aggregation="nash", **options), a_case(**options)
    assert convex.spec.joint_softmax == (regularizer == "entropy")
    values = leaves(convex, torch.float64)
    skew = {"skew": torch.zeros(2, 3, dtype=torch.float64)}
    same(run(nash, values | skew, backend), run(convex, values, backend))


@ALL_THREE
def test_coupling_that_tends_to_nothing_is_no_coupling(backend, regularizer, lse_utility):
    options = {"regularizer": regularizer, "lse_utility": lse_utility}
    coupled, convex = a_case(coupling="gram", **options), a_case(**options)
    values = leaves(convex, torch.float64)
    expected = run(convex, values, backend)
    errors = []
    for raw in (-4.0, -8.0, -1e3):  # kappa = 1.8e-2, 3.4e-4, 0
        raw = {"coupling_raw": torch.full((2,), raw, dtype=torch.float64)}
        found = run(coupled, values | raw, backend)
        errors.append((found["weights"] - expected["weights"]).abs().max().item())
    assert errors[0] > 10 * errors[1] > 0
    same(found, expected)


def sparsemax_by_bisection(payoff: torch.Tensor) -> torch.Tensor:
    low, high = payoff.amax(-1, keepdim=True) - 1, payoff.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        enough = (payoff - middle).clamp_min(0).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (payoff - low).clamp_min(0)


@LSE
@BACKENDS
def test_the_quadratic_without_coupling_is_sparsemax(backend, lse_utility):
    """The softmax's logarithms are the utilities up to a constant, which sparsemax does not see."""
    entropy, quadratic = (a_case(regularizer=kind, lse_utility=lse_utility) for kind in ("entropy", "quadratic"))
    values = leaves(entropy, torch.float64)
    utilities = attend(entropy, values, backend)["weights"].log()
    weights = attend(quadratic, values, backend)["weights"]
    assert ((weights == 0) & utilities.isfinite()).any(), "some feasible scale weighs nothing"
    assert ((weights > 0).sum(-1) > 1).any()
    torch.testing.assert_close(weights, sparsemax_by_bisection(utilities), rtol=0, atol=1e-12)


@COUPLINGS
@REGULARIZERS
@BACKENDS
def test_a_game_of_two_scales_is_a_convex_program(backend, regularizer, coupling):
    """(Mw)_0 - (Mw)_1 = a (w_1 + w_0) = a: the skew part is a change of the bias."""
    options = {"windows": (10, 9), "regularizer": regularizer, "coupling": coupling}
    nash, convex = a_case(aggregation="nash", **options), a_case(**options)
    values = leaves(nash, torch.float64)
    bias = values["utility_bias"].detach().clone()
    bias[1] += values["skew"].detach()[:, 0]
    found = run(nash, values, backend)
    shifted = {name: value for name, value in values.items() if name != "skew"} | {"utility_bias": bias}
    same(found, run(convex, shifted, backend))
    assert (found["weights"] - attend(convex, values, backend)["weights"]).abs().max() > 1e-3


@COUPLINGS
@REGULARIZERS
@BACKENDS
def test_a_skew_part_that_is_a_difference_is_a_change_of_bias(backend, regularizer, coupling):
    """A_ij = b_i - b_j gives (Aw)_i = b_i - b'w on every feasible set: what beta - b gives."""
    options = {"windows": (10, 5, 6, 2), "regularizer": regularizer, "coupling": coupling}
    nash, convex = a_case(aggregation="nash", **options), a_case(**options)
    values = leaves(nash, torch.float64)
    b = torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    i, j = torch.triu_indices(4, 4, 1)
    shifted = {name: value for name, value in values.items() if name != "skew"}
    shifted["utility_bias"] = values["utility_bias"].detach() - b
    same(run(nash, values | {"skew": (b[i] - b[j]).T}, backend), run(convex, shifted, backend))


@BACKENDS
def test_the_mean_is_the_mean_of_what_each_scale_gives_alone(backend):
    mean, entropy = a_case(aggregation="mean"), a_case(lse_utility=False)
    values = {name: value.detach() for name, value in leaves(entropy, torch.float64).items()}
    position = torch.arange(sum(PACKED)) - start_rows(PACKED)
    feasible = torch.stack([position + 1 >= stride(4, scale) for scale in range(3)], dim=-1)
    alone = []
    for scale in range(3):
        only = torch.zeros(3, 2, dtype=torch.float64)
        only[scale] = 1e4
        alone.append(attend(entropy, values | {"utility_bias": only}, backend)["out"] * feasible[:, scale, None, None])
    found = attend(mean, values, backend)
    count = feasible.sum(-1)[:, None, None]
    torch.testing.assert_close(found["out"], sum(alone) / count, rtol=0, atol=1e-12)
    expected = (feasible[:, None] / count.double()).expand_as(found["weights"])
    torch.testing.assert_close(found["weights"], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("backend", "options"),
    everyday(
        itertools.product(("naive", *FAST_BACKENDS), every_aggregation()),
        lambda backend, options: backend != "naive" or options.get("lse_utility", True),
    ),
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_weights_lie_on_the_simplex_and_an_infeasible_scale_weighs_exactly_nothing(backend, options):
    case = Case(lengths=PACKED, n=2, g=1, d=8, spec=MahaSpec(ratio=4, windows=(6, 5, 12, 3), **options))
    found = reference(case) if backend == "naive" else results(case, backend, torch.float64)
    weights = found["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
    assert weights.min() >= -1e-15
    position = torch.arange(sum(PACKED)) - start_rows(PACKED)
    for scale in range(4):
        feasible = position + 1 >= stride(4, scale)
        assert (weights[~feasible, :, scale] == 0).all()
        if options.get("regularizer") != "quadratic":
            assert (weights[feasible, :, scale] > 0).all()
    # no document has a complete block of 64 rows: nothing reaches that scale's parameters
    for name in ("utility_query", "utility_bias", "gate_query", "gate_bias"):
        if f"grad of {name}" in found:
            assert (found[f"grad of {name}"][-1] == 0).all()
            assert (found[f"grad of {name}"][0] != 0).any()
    if "grad of skew" in found:
        _, j = torch.triu_indices(4, 4, 1)
        skew = found["grad of skew"]
        assert (skew[:, j == 3] == 0).all()
        assert (skew[:, j != 3] != 0).any()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("options", [{"coupling": "gram"}, {"aggregation": "nash", "coupling": "gram"}], ids=str)
@REGULARIZERS
@BACKENDS
def test_extreme_utilities_and_logits_stay_finite(backend, regularizer, options):
    case = a_case(regularizer=regularizer, **options)
    values = leaves(case, torch.float32)
    values["utility_bias"] = (1e3 * values["utility_bias"].detach()).requires_grad_()
    values["query_gain"] = (100 * values["query_gain"].detach()).requires_grad_()
    found = attend(case, values, backend)
    grads = torch.autograd.grad(found["out"].sum(), list(values.values()))
    assert found["out"].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def one_scale_only(case: Case, scale: int) -> dict[str, torch.Tensor]:
    """Leaves that give a scale all the weight wherever it is feasible."""
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    values["utility_query"] = torch.zeros_like(values["utility_query"])
    values["utility_bias"] = torch.zeros_like(values["utility_bias"])
    values["utility_bias"][scale] = 1e4
    return values


@BACKENDS
def test_a_pooled_output_holds_until_the_next_block_is_complete(backend):
    case = a_case(queries="pooled", lse_utility=False)
    position = torch.arange(sum(PACKED)) - start_rows(PACKED)
    for scale, rows in ((1, 4), (2, 16)):
        out = attend(case, one_scale_only(case, scale), backend)["out"]
        unchanged = (out[1:] == out[:-1]).flatten(1).all(1)
        reads = position + 1 >= rows
        completes = (position + 1) % rows == 0
        assert unchanged[(reads & ~completes)[1:]].all()
        assert not unchanged[(reads & completes)[1:]].any()


@COUPLINGS
@BACKENDS
def test_pooling_equal_queries_changes_nothing_where_every_block_ends(backend, coupling):
    """At a block's last row the pooled query stands where the full one does, and sees the same keys."""
    case = a_case(queries="pooled", convolution=False, coupling=coupling)
    full = dataclasses.replace(case, spec=dataclasses.replace(case.spec, queries="full"))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    values["q"] = values["q"][start_rows(PACKED)]
    pooled, straight = (attend(one, values, backend)["out"] for one in (case, full))
    position = torch.arange(sum(PACKED)) - start_rows(PACKED)
    ends = ((position + 1) % 16 == 0) | (position < 3)
    assert ends.sum() > 10
    torch.testing.assert_close(pooled[ends], straight[ends], rtol=0, atol=1e-12)
    assert (pooled - straight).abs().flatten(1).amax(1)[position == 6].min() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"aggregation": "nash", "regularizer": "quadratic", "coupling": "gram"}], ids=str
)
@BACKENDS
def test_one_scale_is_a_sliding_window_whatever_the_aggregation_and_the_queries(backend, options):
    case = a_case(windows=(17,), queries="pooled", **options)
    same(results(case, backend, torch.float64), reference(a_case(windows=(17,))))

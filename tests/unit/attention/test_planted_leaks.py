"""Leaks seen in the wild, planted in masks, norms and empty rows: which check sees which.

Those in geometry, pyramid and convolution are planted in test_causality.py, those in weights in
test_aggregation_causality.py. A finite value for -inf is the hardest to see: exp(-1e4) is 0, so with an LSE in the
utilities it leaks only once logits or utilities are as large.
"""

import re

import pytest
import torch

from maha_megatron.attention.scale_attention import chunks, eager_joint, eager_pooled, eager_scales
from maha_megatron.attention.scale_attention import naive as naive_scales
from maha_megatron.attention.spec import MahaSpec
from tests.support.attention import Case
from tests.unit.attention.test_causality import check_changed_tokens, check_infeasible_scales, check_jacobian

LENGTHS = (30, 1, 28)
ROWS = list(range(1, 59, 2))
OPTIONS = {
    "lse": {},
    "no lse": {"lse_utility": False, "downsampling": "mean"},
    "gram": {"aggregation": "nash", "coupling": "gram"},
    "quadratic": {"regularizer": "quadratic"},
}
POOLED = {"pooled": {"queries": "pooled", "coupling": "gram"}}
CHECKS = {
    "jacobian": (lambda case: check_jacobian(case, "eager", sparse=True), "reads row|are not numbers"),
    "changed": (
        lambda case: check_changed_tokens(case, "eager", ROWS, sparse=True),
        "a change of row|are not numbers",
    ),
    "loud": (lambda case: check_changed_tokens(case, "eager", ROWS, loud=True), "a change of row|are not numbers"),
    "infeasible": (lambda case: check_infeasible_scales(case, "eager"), "infeasible"),
}
EVERY_OPTIONS = pytest.mark.parametrize("options", [*OPTIONS, *POOLED])
FULL_RATE = pytest.mark.parametrize("options", OPTIONS)


def a_case(options: str) -> Case:
    spec = MahaSpec(ratio=4, windows=(6, 5, 3), **(OPTIONS | POOLED)[options])
    return Case(lengths=LENGTHS, n=2, g=1, d=4, spec=spec)


def caught_by(case: Case) -> set[str]:
    """The checks that fail, each with its own words; an error of another kind is an error."""
    found = set()
    for name, (check, said) in CHECKS.items():
        try:
            check(case)
        except AssertionError as error:
            if not re.search(said, str(error)):
                raise
            found.add(name)
    return found


@EVERY_OPTIONS
def test_without_a_leak_no_check_fails(options):
    assert caught_by(a_case(options)) == set()


def plant_in_mask(monkeypatch, change) -> None:
    honest = chunks.visibility_bias
    monkeypatch.setattr(chunks, "visibility_bias", lambda *arguments: change(honest(*arguments)))


@EVERY_OPTIONS
def test_an_inverted_mask_is_caught(monkeypatch, options):
    plant_in_mask(monkeypatch, lambda bias: torch.where(bias == 0, -torch.inf, 0.0))
    assert caught_by(a_case(options)) >= {"jacobian", "changed", "loud"}


@EVERY_OPTIONS
@pytest.mark.parametrize("sentinel", [-30.0, -1e4])
def test_a_finite_value_for_minus_infinity_is_caught(monkeypatch, sentinel, options):
    plant_in_mask(monkeypatch, lambda bias: bias.clamp(min=sentinel))
    caught = caught_by(a_case(options))
    assert "loud" in caught
    if options in OPTIONS:  # a pooled query sees its own block at least
        assert "infeasible" in caught
    if sentinel == -30.0 or options == "no lse":
        assert "jacobian" in caught
    if options == "no lse":
        assert "changed" in caught


@FULL_RATE
def test_the_least_number_for_minus_infinity_is_caught(monkeypatch, options):
    """No logit and no utility comes near it: it shows in the LSE of what sees nothing."""
    plant_in_mask(monkeypatch, lambda bias: bias.clamp(min=torch.finfo(bias.dtype).min))
    assert "infeasible" in caught_by(a_case(options))


@FULL_RATE
def test_empty_rows_that_attend_to_everything_are_caught(monkeypatch, options):
    plant_in_mask(monkeypatch, lambda bias: bias.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0.0))
    assert caught_by(a_case(options)) >= {"jacobian", "changed", "loud", "infeasible"}


@FULL_RATE
def test_empty_rows_that_are_not_numbers_are_caught(monkeypatch, options):
    """softmax over nothing: 0 / 0."""

    def attend_scale(chunk, scale):
        logits = chunk.logits(chunk.rotated(scale), scale)
        p = logits.softmax(-1)
        output = chunk.from_tiles(torch.bmm(chunk.to_tiles(p, scale, p.dtype), chunk.tiles(scale)[1]))
        return output, logits.logsumexp(-1)

    for module in (eager_joint, eager_scales):
        monkeypatch.setattr(module, "attend_scale", attend_scale)
    assert caught_by(a_case(options)) >= {"changed", "loud", "infeasible"}


def test_pooled_rows_that_read_a_block_that_is_not_complete_are_caught(monkeypatch):
    """Each takes the first one that there is."""
    honest = eager_pooled._readers

    def always(*arguments):
        slot, feasible, *back = honest(*arguments)
        return slot, torch.ones_like(feasible), *back

    monkeypatch.setattr(eager_pooled, "_readers", always)
    assert caught_by(a_case("pooled")) >= {"changed", "loud", "infeasible"}


def test_weight_of_an_infeasible_scale_is_caught(monkeypatch):
    """Its output is 0, so that nothing leaks; but the others lose what it has."""
    monkeypatch.setattr(eager_joint, "scale_log_weights", lambda utility, lse, lse_utility: utility.log_softmax(-1))
    assert caught_by(a_case("no lse")) == {"infeasible"}


def over_rows(x: torch.Tensor) -> torch.Tensor:
    """What a norm with a statistic over time multiplies by: near 1, and the same for all rows."""
    return 1 + 0.01 * x.square().mean()


@pytest.mark.parametrize("where", ["queries", "keys"])
def test_a_statistic_over_rows_in_a_norm_is_caught(monkeypatch, where):
    """By changed tokens: the backward is written by hand and knows nothing of it, so the Jacobian does not."""
    honest, honest_rotated = chunks.normalise, chunks.normalise_rotate
    if where == "queries":
        monkeypatch.setattr(chunks, "normalise", lambda x, *rest: honest(x, *rest) * over_rows(x))
    else:
        monkeypatch.setattr(chunks, "normalise_rotate", lambda x, *rest: honest_rotated(x, *rest).mul_(over_rows(x)))
    caught = caught_by(a_case("lse"))
    assert {"changed", "loud"} <= caught
    assert "jacobian" not in caught, "now it is: say so above"


def test_a_statistic_over_rows_in_the_norm_of_the_reference_is_caught(monkeypatch):
    """There autograd goes through it, and both checks see it."""
    honest = naive_scales.normalise
    monkeypatch.setattr(naive_scales, "normalise", lambda x, *rest: honest(x, *rest) * over_rows(x))
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(a_case("lse"), "naive")
    with pytest.raises(AssertionError, match="a change of row"):
        check_changed_tokens(a_case("lse"), "naive", [50])

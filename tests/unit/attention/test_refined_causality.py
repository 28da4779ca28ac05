"""Causality and document bounds of refined layers, and leaks planted in what chooses and in what is read.

What chooses has no gradient: a choice that depends on later rows does not show in the Jacobian, only in outputs. So
both are asked, and the leaks in the choice say which of them sees it.
"""

import dataclasses

import pytest
import torch

from maha_megatron.attention.scale_attention import opened
from maha_megatron.attention.slots import openable_slots
from maha_megatron.attention.spec import MahaSpec, Refinement
from tests.support.attention import Case, assert_close, attend, leaves, results
from tests.unit.attention.test_aggregation_causality import check_poisoned, huge_values, not_a_number
from tests.unit.attention.test_causality import check_changed_tokens, check_jacobian

TOKENS, SUMMARIES = (Refinement(from_scale=2, to_scale=scale, blocks=2) for scale in (0, 1))
SPECS = {
    "tokens": MahaSpec(ratio=2, windows=(4, 3, 9), refine=TOKENS),
    "summaries": MahaSpec(ratio=2, windows=(4, 3, 9), refine=SUMMARIES, downsampling="max"),
    "gram": MahaSpec(ratio=2, windows=(4, 3, 9), refine=TOKENS, aggregation="nash", coupling="gram"),
    "no lse": MahaSpec(ratio=3, windows=(4, 3, 6), refine=TOKENS, lse_utility=False),
}
LENGTHS = (27, 1, 31, 4)
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS)


def a_case(spec: str, lengths=LENGTHS) -> Case:
    return Case(lengths=lengths, n=2, g=1, d=8, spec=SPECS[spec])


@EVERY_SPEC
def test_no_row_reads_a_later_row_or_another_document(spec):
    check_jacobian(a_case(spec), "eager")


@EVERY_SPEC
@pytest.mark.parametrize("loud", [False, True])
def test_a_changed_token_leaves_earlier_rows_bitwise_unchanged(spec, loud):
    check_changed_tokens(a_case(spec), "eager", list(range(0, 63, 3)), loud=loud)


@pytest.mark.full
@EVERY_SPEC
@pytest.mark.parametrize("lengths", [(200,), (61, 70, 5, 64)], ids=str)
def test_every_token_of_two_tiles_and_every_zero_of_the_jacobian(spec, lengths):
    check_changed_tokens(a_case(spec, lengths), "eager", list(range(60, 200)))
    check_jacobian(a_case(spec, lengths), "eager")


@EVERY_SPEC
def test_what_a_row_must_not_see_may_be_anything(spec):
    check_poisoned(a_case(spec), "eager", huge_values(), cuts=(26, 50, 60))
    check_poisoned(a_case(spec), "naive", not_a_number, cuts=(50,))


@pytest.mark.parametrize("spec", ["tokens", "gram"])
def test_packed_documents_equal_separate_ones(spec):
    case = a_case(spec)
    packed, values, start = results(case, "eager", torch.float64), leaves(case, torch.float64), 0
    direction = torch.randn(packed["out"].shape, generator=torch.Generator().manual_seed(1)).double()
    for length in case.lengths:
        rows = slice(start, start + length)
        inputs = {name: values[name][rows].detach().requires_grad_() for name in "qkv"}
        out = attend(dataclasses.replace(case, lengths=(length,)), values | inputs, "eager")["out"]
        grads = torch.autograd.grad(out, list(inputs.values()), direction[rows])
        found = {"out": out} | {f"grad of {name}": grad for name, grad in zip("qkv", grads, strict=True)}
        assert_close(found, {name: packed[name][rows] for name in found}, 1e-12)
        start += length


def caught_by(case: Case) -> set[str]:
    found = set()
    for name, check, said in (
        ("jacobian", lambda: check_jacobian(case, "eager"), "reads row"),
        ("changed", lambda: check_changed_tokens(case, "eager", list(range(20, 60, 2))), "a change of row"),
    ):
        try:
            check()
        except AssertionError as error:
            if said not in str(error):
                raise
            found.add(name)
    return found


def test_a_block_that_is_not_complete_is_caught_when_it_is_opened(monkeypatch):
    """The last one, its rows to come included, whatever its score."""
    honest = opened.best_blocks

    def newest(scores, openable, blocks):
        place, found = honest(scores, openable, blocks)
        last = openable.shape[-1] - 1 - openable.flip(-1).int().argmax(-1)
        return torch.where(
            found, (last[..., None] + 3).expand_as(place).clamp(max=openable.shape[-1] - 1), place
        ), found

    monkeypatch.setattr(opened, "best_blocks", newest)
    assert caught_by(a_case("tokens")) == {"jacobian", "changed"}


def test_opened_keys_that_lie_one_block_further_are_caught_where_the_window_is_narrow(monkeypatch):
    honest = opened.Opened._index

    def further(self, chunk):
        return (honest(self, chunk) + 8).clamp(max=self.operands[0].shape[0] - 1)

    monkeypatch.setattr(opened.Opened, "_index", further)
    assert caught_by(a_case("tokens")) == {"jacobian", "changed"}


def test_blocks_of_an_earlier_document_are_caught_when_they_are_opened(monkeypatch):
    """Openable slots that know no documents, with scores that do not either."""

    def anywhere(row, document, *numbers):
        return openable_slots(row, torch.zeros_like(document), *numbers)

    monkeypatch.setattr(opened, "openable_slots", anywhere)
    monkeypatch.setattr(opened, "first_slot_of", lambda document, step: torch.zeros_like(document))
    assert caught_by(a_case("tokens")) == {"jacobian", "changed"}


def test_a_choice_that_later_rows_take_part_in_is_caught_by_outputs_alone(monkeypatch):
    """Scores that are normalised over rows: shares of a block, in place of shares of a row."""
    honest = opened.best_blocks

    def of_all_rows(scores, *rest):
        return honest(scores / scores.sum(1, keepdim=True).clamp(min=1e-9), *rest)

    monkeypatch.setattr(opened, "best_blocks", of_all_rows)
    assert caught_by(a_case("tokens", (63,))) == {"changed"}

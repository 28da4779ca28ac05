"""Causality of every aggregation and of pooled queries: zeros of the Jacobian, poisoned futures, planted leaks."""

from collections.abc import Callable, Sequence

import pytest
import torch

from maha_megatron.attention.aggregation import eager as aggregation_eager
from maha_megatron.attention.aggregation.solvers import gram_matrix
from maha_megatron.attention.scale_attention import eager_pooled
from maha_megatron.attention.slots import visible_slots
from maha_megatron.attention.spec import MahaSpec
from tests.support.attention import (
    FAST_BACKENDS,
    Case,
    attend,
    every_aggregation,
    is_path_of_its_own,
    leaves,
    start_rows,
)
from tests.support.everyday import everyday
from tests.unit.attention.test_causality import check_changed_tokens, check_infeasible_scales, check_jacobian

OPTIONS = pytest.mark.parametrize(
    "options", every_aggregation(), ids=lambda options: "-".join(map(str, options.values()))
)
MAIN_OPTIONS = pytest.mark.parametrize(
    "options",
    everyday(every_aggregation(), is_path_of_its_own),
    ids=lambda options: "-".join(map(str, options.values())),
)
PYRAMIDS = pytest.mark.parametrize(
    "options",
    [
        {"downsampling": downsampling, "key_map": key_map}
        for downsampling in ("gated", "conv", "mean", "max")
        for key_map in (False, True)
    ],
    ids=lambda options: f"{options['downsampling']}{'-key_map' * options['key_map']}",
)
LENGTHS = (21, 1, 47, 9)
CUTS = (20, 40, 68, 75)


def a_case(options: dict) -> Case:
    return Case(lengths=LENGTHS, n=2, g=1, d=4, spec=MahaSpec(ratio=4, windows=(6, 5, 2), **options))


def is_sparse(options: dict) -> bool:
    return options.get("regularizer") == "quadratic"


@MAIN_OPTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_no_row_reads_a_later_row_or_another_document(backend, options):
    check_jacobian(a_case(options), backend, sparse=is_sparse(options))


@OPTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_changed_token_leaves_earlier_rows_bitwise_unchanged(backend, options):
    check_changed_tokens(a_case(options), backend, [0, 20, 21, 22, 37, 38, 53, 68, 69], sparse=is_sparse(options))


@OPTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_loud_token_leaves_earlier_rows_bitwise_unchanged(backend, options):
    check_changed_tokens(a_case(options), backend, [0, 1, 20, 21, 24, 38, 53, 69], loud=True)


@OPTIONS
@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_infeasible_scales_hold_exactly_nothing(backend, options):
    check_infeasible_scales(a_case(options), backend)


def check_poisoned(case: Case, backend: str, poison, cuts: Sequence[int] = CUTS) -> None:
    """Rows of a document up to a cut stay bitwise the same if all that they must not see is replaced by `poison`."""
    values = {name: value.detach() for name, value in leaves(case, torch.float32).items()}
    before = attend(case, values, backend)["out"]
    starts = start_rows(case.lengths)
    for cut in cuts:
        seen = (starts == starts[cut]) & (torch.arange(len(starts)) <= cut)
        changed = dict(values)
        for name in "qkv":
            changed[name] = torch.where(seen[:, None, None], values[name], poison(values[name]))
        after = attend(case, changed, backend)["out"]
        assert before[seen].isfinite().all()
        assert torch.equal(after[seen], before[seen]), f"rows up to {cut} read what they must not"
        assert not torch.equal(after, before)


def not_a_number(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, torch.nan)


def huge_values() -> Callable[[torch.Tensor], torch.Tensor]:
    """Random values up to 1e4."""
    generator = torch.Generator().manual_seed(3)
    return lambda x: 1e4 * (2 * torch.rand(x.shape, generator=generator) - 1)


@MAIN_OPTIONS
def test_naive_survives_not_a_number_in_the_future_and_in_other_documents(options):
    check_poisoned(a_case(options), "naive", not_a_number)


@OPTIONS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_huge_values_in_the_future_and_in_other_documents_change_nothing(backend, options):
    check_poisoned(a_case(options), backend, huge_values())


@PYRAMIDS
def test_naive_survives_not_a_number_with_every_pyramid(options):
    check_poisoned(a_case(options), "naive", not_a_number)


@PYRAMIDS
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_huge_values_change_nothing_with_every_pyramid(backend, options):
    check_poisoned(a_case(options), backend, huge_values())


def caught(case: Case) -> None:
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(case, "eager")
    with pytest.raises(AssertionError, match="a change of row"):
        check_changed_tokens(case, "eager", list(range(20, 60)))
    with pytest.raises(AssertionError, match="read what they must not"):
        check_poisoned(case, "eager", torch.zeros_like)


def test_pooled_outputs_that_are_not_shifted_are_caught(monkeypatch):
    """Every row reads the block that it lies in: the summary is broadcast back into its own block."""
    honest = eager_pooled._readers

    def unshifted(document_start_t, slots, stride_rows):
        slot, feasible, rows, _ = honest(document_start_t, slots, stride_rows)
        shift = stride_rows - 1
        own = slots.complete[:, None].expand_as(rows)
        return slot.roll(-shift), feasible.roll(-shift), (rows - shift).clamp(min=0), own

    monkeypatch.setattr(eager_pooled, "_readers", unshifted)
    caught(a_case({"queries": "pooled", "coupling": "gram"}))


def test_a_query_block_that_reads_the_next_key_block_is_caught(monkeypatch):
    def one_more(row, document, stride_rows, window):
        first, end = visible_slots(row, document, stride_rows, window)
        return first, end + 1

    monkeypatch.setattr("maha_megatron.attention.scale_attention.bands.visible_slots", one_more)
    caught(a_case({"queries": "pooled", "coupling": "gram"}))


@pytest.mark.parametrize("statistic", ["mean", "largest"])
def test_a_statistic_over_rows_in_the_coupling_is_caught(monkeypatch, statistic):
    def over_rows(outputs, feasible):
        size = outputs.square().sum(-1, keepdim=True)
        size = size.mean(0, keepdim=True) if statistic == "mean" else size.amax(0, keepdim=True)
        return gram_matrix(outputs, feasible) * size.sum(-2, keepdim=True)

    monkeypatch.setattr(aggregation_eager, "gram_matrix", over_rows)
    caught(a_case({"aggregation": "nash", "coupling": "gram"}))


@pytest.mark.parametrize("options", [{"regularizer": "quadratic"}, {"aggregation": "nash"}], ids=str)
def test_weights_that_are_shared_over_rows_are_caught(monkeypatch, options):
    honest = aggregation_eager._utilities

    def shared(*arguments):
        utilities = honest(*arguments)
        return utilities + utilities.mean(0, keepdim=True)

    monkeypatch.setattr(aggregation_eager, "_utilities", shared)
    caught(a_case(options))

"""Document starts that no packed sequence can have are refused on a CPU, with words that say which row is wrong."""

import dataclasses

import pytest
import torch

from maha_megatron.attention.spec import DenseSpec, MahaSpec
from maha_megatron.attention.state import check_document_start
from maha_megatron.errors import StateError
from tests.support.attention import Case, attend, documents_of, leaves, start_rows

SPECS = {"maha": MahaSpec(ratio=2, windows=(4, 3)), "dense": DenseSpec()}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([-7] * 8, "document_start of row 0 is -7: it must be 0. .* a piece of a longer one needs its state"),
        ([5] * 8, "document_start of row 0 is 5: it must be 0"),
        ([0, 0, 2, 2, 1, 1, 1, 1], "row 4 is 1: it must be 2 where the document goes on, or 4 where a new one starts"),
        ([0, 0, 0, 1, 1, 1, 1, 1], "row 3 is 1: it must be 0 where the document goes on, or 3"),
        ([0, 0, 3, 3, 3, 3, 3, 3], "row 2 is 3: it must be 0 .*, or 2"),
        ([0, 1, 2, 3, 4, 5, 6, 0], "row 7 is 0: it must be 6 .*, or 7"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_is_refused(starts, message, dtype):
    for spec in SPECS.values():
        case = Case(lengths=(8,), n=2, g=1, d=4, spec=spec)
        documents = dataclasses.replace(documents_of(case, "cpu"), start_t=torch.tensor(starts, dtype=dtype))
        with pytest.raises(StateError, match=message):
            attend(case, leaves(case, torch.float32), "eager", documents)


@pytest.mark.parametrize("lengths", [(8,), (1, 1, 1), (3, 1, 4), (1,)])
def test_starts_of_packed_documents_pass(lengths):
    for dtype in (torch.int32, torch.int64):
        check_document_start(start_rows(lengths).to(dtype))


def test_nothing_is_read_where_reading_would_wait():
    """A tensor on "meta" has no values: looking at one raises."""
    check_document_start(torch.full((8,), 5, device="meta"))

import pytest
import torch

from maha_megatron.model.bounds import document_bounds
from tests.support.model import start_rows


def test_the_three_forms_agree():
    start_t = start_rows(10, (0, 3, 4, 9))
    bounds = document_bounds(start_t, "cpu")
    assert bounds.document_lengths == (3, 1, 5, 1)
    assert bounds.cu_seqlens_q.tolist() == bounds.cu_seqlens_kv.tolist() == [0, 3, 4, 9, 10]
    assert bounds.cu_seqlens_q.dtype == bounds.document_start_t.dtype == torch.int32
    assert bounds.max_seqlen_q == bounds.max_seqlen_kv == 5
    assert torch.equal(bounds.document_start_t, start_t)
    assert bounds.qkv_format == "thd"


def test_rows_before_the_first_document_are_a_mistake():
    with pytest.raises(AssertionError, match="row 0"):
        document_bounds(torch.tensor([1, 1, 1]), "cpu")

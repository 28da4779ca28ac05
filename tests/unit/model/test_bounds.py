import pytest
import torch

from maha_megatron.model.bounds import document_bounds
from tests.support.model import random_batch, random_model, start_rows, tiny_config


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


def test_every_dense_layer_gets_the_bounds_that_were_sent_with_the_micro_batch(monkeypatch, one_rank):
    received = []

    def watched(q_tnd, *_, document_bounds, longest_document, document_lengths, **__):
        received.append((document_bounds, longest_document, document_lengths))
        return q_tnd

    monkeypatch.setattr("maha_megatron.model.dense_core_attention.dense_attention", watched)
    config = tiny_config(model__attention=("dense", "dense"))
    batch = random_batch(config, rows=10, starts=(0, 3, 4))
    random_model(config)(**batch._asdict())
    assert len(received) == 2
    for bounds, longest, lengths in received:
        assert bounds is batch.bounds.cu_seqlens_q
        assert (longest, lengths) == (6, (3, 1, 6))

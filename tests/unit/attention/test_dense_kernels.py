"""Which kernel dense attention takes, and that it says so once."""

import logging

import pytest
import torch
from torch.nn.attention import SDPBackend

from maha_megatron.attention.dense import eager
from maha_megatron.attention.spec import DenseSpec
from tests.support.attention import Case, attend, leaves

EQUAL = Case(lengths=(5, 5), spec=DenseSpec())
PACKED = Case(lengths=(5, 3, 2), spec=DenseSpec())


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("case", "manner"), [(EQUAL, "all documents at once"), (PACKED, "document by document")])
def test_the_kernel_is_logged_once(caplog, case, manner):
    eager._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=eager.__name__)
    for _ in range(2):
        attend(case, leaves(case, torch.float32), "eager")
    assert [record.getMessage() for record in caplog.records] == [
        f"dense attention kernel: torch's CPU kernel, {manner}"
    ]


def test_cudnn_is_first_where_nothing_asks_for_determinism():
    assert eager._cuda_kernels()[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def test_cudnn_is_left_out_under_determinism(deterministic):
    assert eager._cuda_kernels()[0] == SDPBackend.FLASH_ATTENTION
    assert SDPBackend.CUDNN_ATTENTION not in eager._cuda_kernels()


def test_repeated_heads_are_those_that_their_queries_read():
    q, kv = torch.empty(3, 6, 4), torch.arange(2.0)[None, :, None].expand(3, 2, 4)
    for repeated in eager._repeated(q, kv, kv):
        assert repeated[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("kernel_knows_groups", [True, False])
def test_variable_length_attention_gets_the_callers_bounds(monkeypatch, kernel_knows_groups):
    """The very tensor that came with the micro-batch, not one made anew in every layer."""
    received = []

    def grouped(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
        received.extend((key.shape[1], cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa))

    def ungrouped(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal):
        received.extend((key.shape[1], cu_seq_q, cu_seq_k, max_q, max_k, is_causal))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", grouped if kernel_knows_groups else ungrouped)
    monkeypatch.setattr(eager, "variable_length_attention", eager.variable_length_attention.__wrapped__)
    q, kv, bounds = torch.empty(10, 4, 8), torch.empty(10, 2, 8), torch.tensor([0, 5, 8, 10], dtype=torch.int32)
    eager.variable_length_attention()(q, kv, kv, bounds, 5)
    heads, first, second, *rest = received
    assert first is second is bounds
    assert [heads, *rest] == ([2, 5, 5, (-1, 0), True] if kernel_knows_groups else [4, 5, 5, True])

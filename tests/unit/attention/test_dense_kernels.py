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

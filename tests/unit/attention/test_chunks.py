"""Many small chunks give what one pass gives: spans that overlap, blocks longer than a chunk, fast powers."""

import dataclasses
import math

import pytest
import torch

from maha_megatron.attention.scale_attention import chunks
from maha_megatron.attention.scale_attention.bands import plan_bands
from maha_megatron.attention.spec import MahaSpec
from tests.support.attention import Case, assert_close, reference, results

SPEC = MahaSpec(ratio=4, windows=(9, 4, 5, 4, 2))
CASE = Case(lengths=(300, 40, 210), spec=SPEC, n=4, g=2, d=8)
NASH = dataclasses.replace(CASE, spec=dataclasses.replace(SPEC, aggregation="nash", coupling="gram"))


@pytest.mark.parametrize("case", [CASE, NASH], ids=["joint", "nash"])
def test_small_chunks_equal_the_reference(case, monkeypatch):
    """64 rows a chunk: the coarsest block has 256, so most chunks bring that scale no new slot."""
    limit = 64 * case.n * 2 * max(SPEC.windows)
    monkeypatch.setitem(chunks._LOGITS_PER_CHUNK, "cpu", limit)
    plan = plan_bands(sum(case.lengths), SPEC.ratio, SPEC.windows, 64, (0,) * SPEC.scales)
    assert plan.chunk_rows == 64 < plan.bands[-1].stride_rows
    assert_close(results(case, "eager", torch.float64), reference(case), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float64, 2e-16)])
def test_powers_are_exact_to_rounding(dtype, tolerance):
    x = -torch.logspace(-6, 2, 20001, dtype=dtype)
    expected = x.double().exp()
    found = chunks.exp_(x.clone()).double()
    assert (found - expected).abs().max() <= tolerance
    assert chunks.exp_(torch.tensor([-math.inf, 0.0], dtype=dtype)).tolist() == [0.0, 1.0]

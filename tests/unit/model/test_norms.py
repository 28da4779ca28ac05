from types import SimpleNamespace

import pytest
import torch

from maha_megatron.model.norms import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_formula(dtype):
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    norm = RMSNorm(config, 16, eps=0.5)
    torch.manual_seed(0)
    norm.weight.data.normal_()
    x = torch.randn(5, 1, 16, dtype=dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_is_marked_for_the_gradient_sum_under_sequence_parallelism_only(sequence_parallel):
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence_parallel)
    assert RMSNorm(config, 4, eps=1e-5).weight.sequence_parallel == sequence_parallel

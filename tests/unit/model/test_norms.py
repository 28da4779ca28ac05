from types import SimpleNamespace

import pytest
import torch

from maha_megatron.model.norms import RMSNorm, rms_norm_formula

WIDTH = 512  # wide enough that a mean of squares in bf16 would be far off


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm with every operation in the dtype of its arguments."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def largest_relative_error(dtype, norm) -> float:
    """Of norm(x, weight, eps) on random values of `dtype`, against the formula in fp64."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    exact = formula(x.double(), weight.double(), 0.5)
    found = norm(x, weight, 0.5)
    assert found.dtype == dtype
    return float(((found.double() - exact).abs() / exact.abs().clamp_min(1e-30)).max())


def module(x, weight, eps):
    norm = RMSNorm(SimpleNamespace(params_dtype=x.dtype, sequence_parallel=False), WIDTH, eps=eps)
    norm.weight.data.copy_(weight)
    return norm(x).detach()


# with fp32 statistics bf16 rounds at most twice, the normalised value and its product with the weight: 2^-9 each
BF16_BOUND = (1 + 2**-9) ** 2 - 1 + 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, BF16_BOUND)])
@pytest.mark.parametrize("norm", [module, rms_norm_formula])
def test_against_the_formula(norm, dtype, bound):
    assert largest_relative_error(dtype, norm) <= bound


def test_statistics_in_bf16_would_be_seen():
    assert largest_relative_error(torch.bfloat16, formula) > 2 * BF16_BOUND


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_is_marked_for_the_gradient_sum_under_sequence_parallelism_only(sequence_parallel):
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence_parallel)
    assert RMSNorm(config, 4, eps=1e-5).weight.sequence_parallel == sequence_parallel

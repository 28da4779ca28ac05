"""Kernels of joint attention against the naive backend: every output and gradient by name, in Triton's interpreter.

Learned parameters are random, gains included. Tiles are small, so that short sequences have many.
"""

import functools

import pytest
import torch

import tests.support.interpreter  # noqa: F401
from maha_megatron.attention.pyramid import eager as pyramid
from maha_megatron.attention.scale_attention import naive
from maha_megatron.attention.scale_attention.triton import attend
from maha_megatron.attention.scale_attention.triton_tuning import Tiles, Tuning
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from tests.support.attention import PACKED, Case, documents_of, leaves, parameter_specs


def spec(ratio=4, windows=(24, 9, 6), **options) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, convolution=False, **options)


def tuning(heads: int) -> Tuning:
    """Tiles whose sizes differ, so that none is taken for another."""
    rows = {1: Tiles(rows=32, keys=16), 2: Tiles(rows=16, keys=16, heads=2)}[heads]
    return Tuning(keys=Tiles(keys=32), forward=rows, query_gradient=rows, key_gradient=Tiles(rows=32, keys=16))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """New memory holds NaN: what a kernel reads and nothing wrote shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


CASES = [
    (Case(lengths=(1,), n=1, g=1, d=32, spec=spec()), 1),
    (Case(lengths=(67,), n=2, g=2, d=32, spec=spec()), 1),
    (Case(lengths=PACKED, n=4, g=2, d=32, spec=spec()), 2),
    (Case(lengths=(3, 50), n=2, g=1, d=32, spec=spec(ratio=3, windows=(20, 8, 5, 3, 2))), 1),
    (Case(lengths=(40, 41), n=1, g=1, d=32, spec=spec(ratio=2, windows=(5, 4, 3, 3, 4, 2, 1, 1))), 1),
    (Case(lengths=(70,), n=2, g=1, d=32, spec=spec(windows=(17,))), 2),
]


def run(case: Case, values: dict[str, torch.Tensor], attention) -> dict[str, torch.Tensor]:
    """Output, weights and every gradient by name, of `attention` on a pyramid in plain torch."""
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    start_t = documents_of(case, "cpu").start_t
    levels = pyramid.build_pyramid((values["k"], values["v"]), start_t, parameters, case.spec)
    attended = attention(values["q"], levels, start_t, parameters, case.spec)
    out = attended.out_tnd
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad(out, list(values.values()), direction, materialize_grads=True)
    found = {"out": out.detach(), "weights": attended.weights_tnl.detach()}
    return found | {f"grad of {name}": grad for name, grad in zip(values, grads, strict=True)}


def rounded(case: Case, dtype: torch.dtype, through: torch.dtype) -> dict[str, torch.Tensor]:
    """Leaves in `dtype`, of values that `through` holds exactly."""
    values = leaves(case, torch.float32)
    return {name: value.detach().to(through).to(dtype).requires_grad_() for name, value in values.items()}


@functools.cache
def exact(case: Case, through: torch.dtype) -> dict[str, torch.Tensor]:
    return run(case, rounded(case, torch.float64, through), naive.attend)


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The norm of each difference over that of what is expected, or 0.1: a row that sees one key has no gradient."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp(min=0.1)).item()
        for name, value in expected.items()
    }


@pytest.mark.parametrize(("case", "heads"), CASES, ids=str)
def test_every_output_and_gradient_in_fp32_equals_the_reference(case, heads):
    kernel = functools.partial(attend, tuning=tuning(heads))
    found = errors(run(case, rounded(case, torch.float32, torch.float32), kernel), exact(case, torch.float32))
    assert {name: error for name, error in found.items() if not error <= 3e-6} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bit_at_most_twice_as_far_from_exact_as_plain_torch(dtype):
    """Plain torch in bf16, its errors scaled by the dtypes' resolutions: on a CPU it is not to be trusted in fp16."""
    case, heads = CASES[2]
    bf16 = torch.bfloat16
    plain = errors(run(case, rounded(case, bf16, bf16), naive.attend), exact(case, bf16))
    found = errors(
        run(case, rounded(case, dtype, dtype), functools.partial(attend, tuning=tuning(heads))), exact(case, dtype)
    )
    finer = torch.finfo(dtype).eps / torch.finfo(bf16).eps
    assert {name: error for name, error in found.items() if not error <= 2 * finer * plain[name]} == {}, plain

"""Every fast backend against the naive one: forward and every gradient by name."""

import itertools

import pytest
import torch

from maha_megatron.attention import row_blocks
from maha_megatron.attention.scale_attention import chunks
from maha_megatron.attention.spec import DenseSpec, MahaSpec
from tests.support.attention import (
    FAST_BACKENDS,
    PACKED,
    Case,
    assert_close,
    assert_equals_reference,
    assert_within_twice_of_plain,
    leaves,
    reference,
    results,
)
from tests.support.attention import attend as run
from tests.support.everyday import everyday


def maha(ratio=4, windows=(24, 9, 6), **options) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, **options)


MAHA_CASES = [
    # rows around the ratio and the tile, over group sizes and widths
    Case(lengths=(1,), n=2, g=2, spec=maha()),
    Case(lengths=(3,), n=4, g=2, d=64, spec=maha(convolution=False)),
    Case(lengths=(4,), n=4, g=1, spec=maha(lse_utility=False)),
    Case(lengths=(5,), n=2, g=2, d=64, spec=maha(downsampling="mean")),
    Case(lengths=(63,), n=2, g=2, spec=maha(lse_utility=False, convolution=False)),
    Case(lengths=(63,), n=4, g=1, d=64, spec=maha(downsampling="mean", convolution=False)),
    Case(lengths=(257,), n=4, g=2, spec=maha()),
    Case(lengths=(257,), n=4, g=1, spec=maha(windows=(33, 17, 9, 2), lse_utility=False)),
    # documents that start anywhere
    Case(lengths=PACKED, n=4, g=2, spec=maha()),
    Case(lengths=PACKED, n=2, g=2, d=64, spec=maha(lse_utility=False, downsampling="mean")),
    Case(lengths=PACKED, n=4, g=1, spec=maha(ratio=2, windows=(5, 4, 3, 3, 4), convolution=False)),
    Case(lengths=(2, 1, 1, 3, 66, 128, 65), n=2, g=1, spec=maha(lse_utility=False, downsampling="mean")),
    # ratios whose powers do not divide a tile of 64 rows, and a stride longer than a chunk
    Case(lengths=(100, 50), n=2, g=1, spec=maha(ratio=3, windows=(20, 8, 5, 3, 2))),
    Case(lengths=(7, 160), n=2, g=1, spec=maha(ratio=5, windows=(20, 8, 5, 1), lse_utility=False)),
    Case(lengths=(170,), n=2, g=1, spec=maha(ratio=7, windows=(20, 8, 3))),
    # rotary positions in tokens at every scale
    Case(lengths=PACKED, n=4, g=2, spec=maha(rope_unit="token")),
    Case(lengths=(100, 50), n=2, g=1, spec=maha(ratio=3, windows=(20, 8, 5), rope_unit="token", lse_utility=False)),
    # one scale: a plain sliding window
    Case(lengths=(130,), n=4, g=2, spec=maha(windows=(17,))),
    Case(lengths=PACKED, n=4, g=1, spec=maha(windows=(300,), lse_utility=False, convolution=False)),
]
DENSE_CASES = [
    Case(lengths=(1,), n=2, g=2, spec=DenseSpec()),
    Case(lengths=(65,), n=4, g=1, d=64, spec=DenseSpec(qk_norm=False)),
    Case(lengths=(21, 21, 21), n=4, g=2, spec=DenseSpec(convolution=False)),
    Case(lengths=PACKED, n=4, g=2, spec=DenseSpec()),
    Case(lengths=PACKED, n=2, g=2, spec=DenseSpec(qk_norm=False, convolution=False)),
]


@pytest.mark.parametrize("case", MAHA_CASES + DENSE_CASES, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_forward_and_every_gradient_equal_the_reference(case, backend, dtype, tolerance):
    assert_equals_reference(case, backend, dtype, tolerance)


def test_the_comparison_sees_a_small_error_of_a_small_result():
    """Also beside large ones; what the naive form misses as well may be missed twice as far."""
    expected = {"large": torch.tensor([9.0, -3.0]), "small": torch.tensor([1e-3, 2e-4]), "nothing": torch.tensor(1e-15)}
    expected = {name: value.double() for name, value in expected.items()}
    off = expected | {"small": expected["small"] + 2e-8}
    with pytest.raises(AssertionError, match=r"'small': 1\.99"):
        assert_close(off, expected, 1e-5)
    assert_close(off, expected, 1e-5, lambda: expected | {"small": expected["small"] - 1.1e-8})
    with pytest.raises(AssertionError, match="small"):
        assert_close(off, expected, 1e-5, lambda: expected | {"small": expected["small"] - 0.9e-8})
    with pytest.raises(AssertionError, match="nan"):
        assert_close(expected | {"large": torch.full((2,), torch.nan)}, expected, 1e-5)
    assert_close(expected | {"nothing": torch.tensor(8e-5)}, expected, 1e-5)


MANY_CHUNKS_CASES = [
    Case(lengths=(150, 9, 400), n=2, g=1, d=8, spec=maha(windows=(20, 9, 6, 3, 1))),
    Case(lengths=(400,), n=2, g=2, d=8, spec=maha(ratio=5, windows=(20, 9, 6, 3), lse_utility=False)),
    DENSE_CASES[3],
]


@pytest.mark.parametrize("case", everyday(MANY_CHUNKS_CASES, lambda case: case is not MANY_CHUNKS_CASES[1]), ids=str)
def test_eager_in_many_chunks_and_blocks_equals_the_reference(monkeypatch, case):
    """Long sequences work through many chunks and blocks of rows, and strides longer than a chunk."""
    monkeypatch.setitem(chunks._LOGITS_PER_CHUNK, "cpu", 1)
    monkeypatch.setitem(row_blocks._BLOCK_ELEMENTS, "cpu", 200)
    assert_close(results(case, "eager", torch.float64), reference(case), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "case"),
    everyday(
        itertools.product(
            (torch.float32, torch.bfloat16), (MAHA_CASES[6], MAHA_CASES[8], MAHA_CASES[9], DENSE_CASES[3])
        ),
        lambda dtype, case: dtype == torch.bfloat16 or case in (MAHA_CASES[8], DENSE_CASES[3]),
    ),
    ids=str,
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_at_most_twice_as_far_from_exact_as_plain_torch_in_the_dtype(case, backend, dtype):
    assert_within_twice_of_plain(case, backend, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", MAHA_CASES + DENSE_CASES, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_on_a_gpu(case, backend):
    assert_equals_reference(case, backend, torch.float64, 1e-10, "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_twice_of_plain(case, backend, dtype, "cuda")


@pytest.mark.parametrize("lse_utility", [True, False])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_gradcheck(backend, lse_utility):
    spec = MahaSpec(ratio=2, windows=(3, 2, 2), lse_utility=lse_utility)
    case = Case(lengths=(7, 5), n=2, g=1, d=4, spec=spec)
    values = leaves(case, torch.float64)

    def out(*tensors):
        return run(case, dict(zip(values, tensors, strict=True)), backend)["out"]

    assert torch.autograd.gradcheck(out, list(values.values()), fast_mode=True)


@pytest.mark.parametrize("case", [MAHA_CASES[6], MAHA_CASES[8], DENSE_CASES[3]], ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_two_runs_are_bitwise_equal(case, backend):
    first, second = (results(case, backend, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_strided_views_are_welcome(backend):
    case = Case(lengths=PACKED, n=4, g=2, spec=maha())
    values = leaves(case, torch.float64)
    fused = torch.cat([values[name].detach().flatten(1) for name in "qkv"], dim=1)
    widths = [values[name][0].numel() for name in "qkv"]
    views = {
        name: part.unflatten(1, (-1, case.d)) for name, part in zip("qkv", fused.split(widths, dim=1), strict=True)
    }
    assert not views["k"].is_contiguous()
    assert torch.equal(run(case, values | views, backend)["out"], run(case, values, backend)["out"])

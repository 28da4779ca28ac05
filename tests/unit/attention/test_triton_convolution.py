"""The convolution's kernels against the naive backend: every output and gradient by name, in Triton's interpreter.

Segments are short, so that documents, segments and programs begin and end at different rows.
"""

import functools
import logging

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.api import dense_attention
from maha_megatron.attention.convolution import eager, naive, triton
from maha_megatron.attention.spec import AttentionParameters, DenseSpec, MahaSpec
from tests.support.attention import (
    PACKED,
    Case,
    documents_of,
    errors,
    exact_leaves,
    leaves,
    parameter_specs,
    start_rows,
    wrong,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SPEC = MahaSpec(ratio=4, windows=(7, 5))
TINY = (6, 1, 1, 2, 3, 11, 16, 2, 4, 5)
full = pytest.mark.full
CASES = [
    Case(lengths=(1,), n=1, g=1, d=32, spec=SPEC),
    Case(lengths=TINY, n=4, g=2, d=32, spec=SPEC),
    Case(lengths=(83,), n=2, g=2, d=64, spec=SPEC),
    Case(lengths=(33, 4), n=3, g=1, d=128, spec=SPEC),
    pytest.param(Case(lengths=PACKED, n=4, g=2, d=32, spec=SPEC), marks=full),
]
STEPS = [pytest.param(2, id="segments of 4"), pytest.param(triton.STEPS, marks=full, id="segments as they are")]


def kernels(steps: int):
    """The convolution with segments of other lengths."""

    def convolve(q, k, v, start_t, weight, past_rows=None):
        return triton.convolve_rows(q, k, v, past_rows, start_t, weight, steps)

    return convolve


def run(case: Case, values: dict[str, torch.Tensor], convolve, offset: int | None = None) -> dict[str, torch.Tensor]:
    """q, k and v after the convolution and, under a random direction, the gradient of every leaf, by name.

    `offset`: rows of the first document that were read before; then there are rows in front.
    """
    start_t = start_rows(case.lengths).to(values["q"].device)
    wrt = {name: values[name] for name in ("q", "k", "v", "convolution")}
    if offset is not None:
        start_t = torch.where(start_t == 0, -offset, start_t)
        past = torch.randn(4, case.n + 2 * case.g, case.d, generator=torch.Generator().manual_seed(5))
        wrt["past"] = past.to(torch.bfloat16).to(values["q"]).requires_grad_()
    q, k, v, weight, *past_rows = wrt.values()
    mixed = dict(zip(("mixed q", "mixed k", "mixed v"), convolve(q, k, v, start_t, weight, *past_rows), strict=True))
    generator = torch.Generator().manual_seed(6)
    directions = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x) for x in mixed.values()]
    grads = torch.autograd.grad(list(mixed.values()), list(wrt.values()), directions)
    found = mixed | {f"grad of {name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return {name: x.detach().cpu() for name, x in found.items()}


@functools.cache
def exact(case: Case, dtype: torch.dtype, offset: int | None = None) -> dict[str, torch.Tensor]:
    """By the naive backend in fp64, of leaves that `dtype` holds."""
    return run(case, exact_leaves(case, dtype), naive.convolve, offset)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_output_and_gradient_in_fp32_equals_the_reference(case, steps):
    found = run(case, leaves(case, torch.float32, DEVICE), kernels(steps))
    assert wrong(found, exact(case, torch.float32), 1e-6) == {}


@pytest.mark.parametrize("offset", [0, 1, 3, 21])
@pytest.mark.parametrize("lengths", [(1,), (2, 9), (40, 1)], ids=str)
def test_a_piece_reads_the_rows_in_front_of_it_and_sends_gradients_there(lengths, offset):
    case = Case(lengths=lengths, n=2, g=1, d=32, spec=SPEC)
    found = run(case, leaves(case, torch.float32, DEVICE), kernels(2), offset)
    assert wrong(found, exact(case, torch.float32, offset), 1e-6) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bit_at_most_twice_as_far_from_exact_as_eager(dtype):
    case = Case(lengths=TINY, n=4, g=2, d=32, spec=SPEC)
    expected = exact(case, dtype, 3)
    plain = errors(run(case, leaves(case, dtype), eager.convolve, 3), expected)
    found = errors(run(case, leaves(case, dtype, DEVICE), kernels(2), 3), expected)
    assert {name: error for name, error in found.items() if not error <= 2 * plain[name]} == {}, plain


def projected(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A fused projection [t, g, n/g + 2, d], and q, k and v as views of it: with n = g, as megatron-core hands them."""
    values = leaves(case, dtype, DEVICE)
    fused = torch.stack([values[name].detach() for name in "qkv"], dim=2).requires_grad_()
    return fused, list(fused.unbind(2))


def test_views_of_a_fused_projection_are_read_as_they_lie():
    case = Case(lengths=TINY, n=2, g=2, d=32, spec=SPEC)
    fused, views = projected(case, torch.float32)
    values, starts = leaves(case, torch.float32, DEVICE), start_rows(case.lengths).to(DEVICE)
    taps = values["convolution"]
    call = triton.Call([x.detach() for x in views], None, starts, taps, 2)
    assert [x.data_ptr() for x in call.x] == [x.data_ptr() for x in views]
    found, expected = (kernels(2)(*x, starts, taps) for x in (views, [values[name] for name in "qkv"]))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    (grad,) = torch.autograd.grad(sum(x.sum() for x in found), fused)
    wanted = torch.autograd.grad(sum(x.sum() for x in expected), [values[name] for name in "qkv"])
    assert torch.equal(grad, torch.stack(wanted, dim=2))


def test_gradients_may_be_views_too():
    """Of one number that stands for all, as those of a sum are."""
    case = Case(lengths=(9,), n=2, g=1, d=32, spec=SPEC)
    values, starts = leaves(case, torch.float32, DEVICE), start_rows(case.lengths).to(DEVICE)
    wrt = [values[name] for name in ("q", "k", "v", "convolution")]
    mixed = kernels(2)(*wrt[:3], starts, wrt[3])
    whole = [torch.ones_like(x) for x in mixed]
    views = [torch.ones((), device=DEVICE).expand(x.shape) for x in mixed]
    found, expected = (torch.autograd.grad(mixed, wrt, grads, retain_graph=True) for grads in (views, whole))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_what_other_documents_hold_is_not_read():
    """NaN in one document stays there, in gradients too."""
    case = Case(lengths=(5, 3, 6), n=1, g=1, d=32, spec=SPEC)
    values, starts = leaves(case, torch.float32, DEVICE), start_rows(case.lengths).to(DEVICE)
    inputs = [values[name] for name in "qkv"]
    with torch.no_grad():
        for x in inputs:
            x[5:8] = torch.nan
    mixed = kernels(2)(*inputs, starts, values["convolution"])
    outside = [*range(5), *range(8, 14)]
    grads = torch.autograd.grad([x[outside] for x in mixed], inputs, [torch.ones_like(x[outside]) for x in mixed])
    for x in (*mixed, *grads):
        assert x[outside].isfinite().all()


def test_two_runs_are_bitwise_equal():
    case = Case(lengths=TINY, n=4, g=2, d=32, spec=SPEC)
    first, second = (run(case, leaves(case, torch.float32, DEVICE), kernels(2), 3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dense_attention_by_kernels_takes_the_convolution_by_kernels(monkeypatch):
    case = Case(lengths=(7, 7), n=2, g=1, d=32, spec=DenseSpec())
    values, documents = leaves(case, torch.float32, DEVICE), documents_of(case, DEVICE)
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    inputs = (*(values[name] for name in "qkv"), documents.start_t, parameters, case.spec)
    expected = dense_attention(*inputs, **documents.for_dense)
    called = []
    monkeypatch.setattr(
        triton.Call, "forward", lambda call, forward=triton.Call.forward: called.append(1) or forward(call)
    )
    found = dense_attention(*inputs, backend="triton", **documents.for_dense)
    assert called
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "dtype", "missing"),
    [(16, torch.float32, "heads of 16 channels"), (32, torch.float64, "torch.float64")],
    ids=["width", "fp64"],
)
def test_what_no_kernel_serves_is_said_once_and_eager_does_it(caplog, width, dtype, missing):
    triton._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=triton.__name__)
    case = Case(lengths=(19,), n=1, g=1, d=width, spec=SPEC)
    found, _ = (run(case, leaves(case, dtype, DEVICE), triton.convolve, 3) for _ in range(2))
    assert wrong(found, exact(case, dtype, 3), 5e-6) == {}
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"convolution: no kernel serves {missing}; eager does"]

"""Kernels of the pyramid against the naive backend: every level and gradient by name, in Triton's interpreter."""

import dataclasses
import itertools
import logging

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.pyramid import naive, triton
from maha_megatron.attention.pyramid.queries import pool_queries
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from tests.support.attention import Case, exact_leaves, leaves, parameter_specs, start_rows, wrong
from tests.support.everyday import everyday

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DOWNSAMPLINGS = ("gated", "conv", "mean", "max")
SHORT = (6, 1, 3, 11, 16, 2)


def spec(downsampling="gated", ratio=4, windows=(7, 5, 4)) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, downsampling=downsampling, convolution=False)


CASES = [
    *(Case(lengths=SHORT, n=2, g=2, d=32, spec=spec(downsampling)) for downsampling in DOWNSAMPLINGS),
    *(
        Case(lengths=(2 * ratio**2 + 1, 1, ratio - 1, ratio, ratio + 1), n=1, g=1, d=32, spec=spec(ratio=ratio))
        for ratio in (2, 3, 5, 8)
    ),
    Case(lengths=(1,), n=1, g=1, d=32, spec=spec()),
    Case(lengths=(47,), n=5, g=5, d=64, spec=spec(windows=(3, 3, 2))),
]


def run(case: Case, values: dict[str, torch.Tensor], build, offset: int | None = None):
    """Levels, and the gradient of every leaf under a random direction at every entry, by name.

    `offset`: rows of the first document that were read before; then every scale has a past.
    """
    learned = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    start_t, past = start_rows(case.lengths).to(values["k"].device), None
    rows, wrt = (values["k"], values["v"]), dict(values)
    if offset is not None:
        start_t = torch.where(start_t == 0, -offset, start_t)
        generator = torch.Generator().manual_seed(5)
        past = []
        for scale, window in enumerate(case.spec.windows):
            shape = (window, case.g, case.d)
            level = [torch.randn(shape, generator=generator).to(rows[0]).requires_grad_() for _ in range(2)]
            past.append(tuple(level))
            wrt |= {f"past {kind} {scale}": x for kind, x in zip("kv", level, strict=True)}
    levels = build(rows, start_t, learned, case.spec, past)
    named = {f"{kind} {scale}": x for scale, level in enumerate(levels) for kind, x in zip("kv", level, strict=True)}
    generator = torch.Generator().manual_seed(6)
    directions = [torch.randn(x.shape, generator=generator).to(x) for x in named.values()]
    wrt = {name: x for name, x in wrt.items() if name[0] in "kvgp"}
    grads = torch.autograd.grad(list(named.values()), list(wrt.values()), directions, materialize_grads=True)
    found = named | {f"grad of {name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return {name: x.detach().cpu() for name, x in found.items()}


def exact(case: Case, dtype: torch.dtype, offset: int | None = None) -> dict[str, torch.Tensor]:
    """By the naive backend in fp64, of leaves that `dtype` holds."""
    return run(case, exact_leaves(case, dtype), naive.build_pyramid, offset)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_level_and_gradient_in_fp32_equals_the_reference(case):
    found = run(case, leaves(case, torch.float32, DEVICE), triton.build_pyramid)
    assert wrong(found, exact(case, torch.float32), 1e-6) == {}


@pytest.mark.parametrize("offset", [1, 7, 21])
@pytest.mark.parametrize("downsampling", ["gated", "max"])
def test_a_piece_pools_what_lies_before_it(downsampling, offset):
    case = Case(lengths=SHORT, n=1, g=1, d=32, spec=spec(downsampling, ratio=3, windows=(8, 5, 4)))
    found = run(case, leaves(case, torch.float32, DEVICE), triton.build_pyramid, offset)
    assert wrong(found, exact(case, torch.float32, offset), 1e-6) == {}


@pytest.mark.parametrize(
    ("downsampling", "dtype"),
    everyday(
        itertools.product(DOWNSAMPLINGS, (torch.bfloat16, torch.float16)),
        lambda downsampling, dtype: dtype == torch.bfloat16 or downsampling == "gated",
    ),
    ids=str,
)
def test_in_16_bit_a_level_and_a_sum_of_gradients_are_rounded_once(downsampling, dtype):
    """Learned tensors' gradients are sums over all slots of what was rounded at three scales."""
    case = Case(lengths=SHORT, n=1, g=1, d=32, spec=spec(downsampling))
    found = run(case, leaves(case, dtype, DEVICE), triton.build_pyramid)
    assert wrong(found, exact(case, dtype), 1.5 * torch.finfo(dtype).eps) == {}


def strided(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One tensor of which keys and values are views, and leaves that have those views."""
    values = leaves(case, torch.float32, DEVICE)
    fused = torch.cat((values["q"], values["k"], values["v"]), dim=1).detach().requires_grad_()
    _, keys, of_values = fused.split((case.n, case.g, case.g), dim=1)
    return fused, values | {"k": keys, "v": of_values}


def test_views_are_read_as_they_lie():
    case = Case(lengths=SHORT, n=2, g=2, d=32, spec=spec())
    fused, values = strided(case)
    found = run(case, values, triton.build_pyramid)
    expected = run(case, leaves(case, torch.float32, DEVICE), triton.build_pyramid)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    learned = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    levels = triton.build_pyramid((values["k"], values["v"]), start_rows(SHORT).to(DEVICE), learned, case.spec)
    assert levels[0][0].data_ptr() == values["k"].data_ptr()
    (grad,) = torch.autograd.grad(levels[-1][1].sum(), fused)
    assert (grad[:, : case.n + case.g] == 0).all()
    assert (grad[:, case.n + case.g :] != 0).any()


def test_two_runs_are_bitwise_equal():
    first, second = (run(CASES[0], leaves(CASES[0], torch.float32, DEVICE), triton.build_pyramid) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "width", "dtype", "missing"),
    [
        ({"key_map": True}, 32, torch.float32, "a key map"),
        ({}, 16, torch.float32, "heads of 16 channels"),
        ({}, 32, torch.float64, "torch.float64"),
    ],
    ids=["key map", "width", "fp64"],
)
def test_what_no_kernel_serves_is_said_once_and_eager_does_it(caplog, options, width, dtype, missing):
    triton._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=triton.__name__)
    case = Case(lengths=(19,), n=1, g=1, d=width, spec=dataclasses.replace(spec(), **options))
    found, _ = (run(case, leaves(case, dtype, DEVICE), triton.build_pyramid) for _ in range(2))
    assert wrong(found, exact(case, dtype), 5e-6) == {}
    assert [record.getMessage() for record in caplog.records] == [f"pyramid: no kernel serves {missing}; eager does"]


def test_pooled_queries_have_no_kernel_and_go_to_eager():
    case = CASES[0]
    q, starts = leaves(case, torch.float32, DEVICE)["q"], start_rows(case.lengths).to(DEVICE)
    builds = (triton.build_pyramid, naive.build_pyramid)
    found, expected = (pool_queries(build, q, starts, case.spec) for build in builds)
    for level, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(level, reference, rtol=0, atol=1e-6)

"""Attention on a GPU at widths that fast kernels take: values, bitwise repetition, no waiting for the device."""

import dataclasses
import itertools
import logging

import pytest
import torch

from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.dense import eager as dense_eager
from maha_megatron.attention.spec import AttentionParameters, DenseSpec, MahaSpec
from maha_megatron.attention.state import MahaState, piece_document_start
from tests.support.attention import (
    FAST_BACKENDS,
    Case,
    assert_within_twice_of_plain,
    attend,
    documents_of,
    leaves,
    parameter_specs,
    results,
)
from tests.support.gpu import deterministic_algorithms, no_host_synchronisation

pytestmark = pytest.mark.gpu

MAHA = MahaSpec(ratio=4, windows=(64, 32, 16))
GPU_BACKENDS = (*FAST_BACKENDS, "triton")
DTYPES = [torch.float32, torch.bfloat16]
# what makes one output of the scales' own, but for the quadratic: its gradient jumps where rounding moves a support
FUSED = [
    {"lse_utility": False},
    {"rope_unit": "token"},
    {"aggregation": "mean"},
    {"coupling": "gram"},
    {"aggregation": "nash"},
    {"aggregation": "nash", "coupling": "gram"},
]
VALUE_CASES = [
    Case(lengths=(150, 1, 211), n=4, g=2, d=64, spec=MAHA),
    Case(lengths=(700,), n=2, g=1, d=128, spec=MahaSpec(ratio=3, windows=(130, 70, 30, 10), downsampling="conv")),
    Case(lengths=(128, 128, 128), n=4, g=2, d=64, spec=DenseSpec()),
    Case(lengths=(150, 1, 211), n=4, g=2, d=64, spec=DenseSpec()),
    *(Case(lengths=(150, 1, 211), n=4, g=2, d=64, spec=dataclasses.replace(MAHA, **options)) for options in FUSED),
]
PACKED_DENSE = Case(lengths=(1500, 1, 700, 1895), n=8, g=2, d=64, spec=DenseSpec())
EQUAL_DENSE = Case(lengths=(2048, 2048), n=8, g=2, d=64, spec=DenseSpec())
WIDE = Case(lengths=(1500, 2596), n=4, g=4, d=128, spec=MahaSpec(ratio=4, windows=(128, 112, 124, 64)))
NO_LSE = Case(lengths=(1500, 1, 700, 1895), n=8, g=2, d=64, spec=dataclasses.replace(MAHA, lse_utility=False))
GAME = dataclasses.replace(MAHA, aggregation="nash", coupling="gram")
LONG_GAME = Case(lengths=(1500, 1, 700, 1895), n=8, g=2, d=64, spec=GAME)
LONG_CASES = [NO_LSE, WIDE, Case(lengths=(1500, 1, 700, 1895), n=8, g=2, d=64, spec=MAHA), EQUAL_DENSE, PACKED_DENSE]


@pytest.mark.parametrize("case", VALUE_CASES, ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_most_twice_as_far_from_exact_as_plain_torch_in_the_dtype(case, backend, dtype):
    assert_within_twice_of_plain(case, backend, dtype, "cuda")


@pytest.mark.parametrize("case", [*LONG_CASES, LONG_GAME], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_runs_are_bitwise_equal(case, backend, dtype):
    with deterministic_algorithms():
        first, *others = (results(case, backend, dtype, "cuda") for _ in range(3))
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


# eager asks whether all programs of a game were solved
@pytest.mark.parametrize(
    ("case", "backend"), [*itertools.product(LONG_CASES, GPU_BACKENDS), (LONG_GAME, "triton")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_never_wait_for_the_device(case, backend, dtype):
    values, documents = leaves(case, dtype, "cuda"), documents_of(case, "cuda")

    def forward_and_backward():
        out = attend(case, values, backend, documents)["out"]
        torch.autograd.grad(out, list(values.values()), torch.ones_like(out))

    forward_and_backward()  # libraries may wait while they start
    with no_host_synchronisation():
        forward_and_backward()


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_pieces_never_wait_for_the_device_and_equal_one_pass(backend):
    case = LONG_CASES[2]
    values, starts = leaves(case, torch.float32, "cuda"), documents_of(case, "cuda").start_t
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    sizes = {"streams": 1, "n": case.n, "g": case.g, "d": case.d, "dtype": torch.float32, "device": "cuda"}

    def in_pieces():
        state, outs = MahaState.initial(case.spec, **sizes, rewind_rows=3), []
        for first, stop in itertools.pairwise((0, 1000, 1001, 1505, 4096)):
            inputs = [values[name][first:stop] for name in "qkv"]
            start_t = piece_document_start(starts, first, stop)
            result = maha_attention(*inputs, start_t, parameters, case.spec, backend=backend, state=state)
            state = result.state
            outs.append(result.out_tnd)
        state.document_start(5, [(2,)])
        out = torch.cat(outs)
        return out, torch.autograd.grad(out, list(values.values()), torch.ones_like(out))

    in_pieces()  # libraries may wait while they start
    with no_host_synchronisation():
        out, grads = in_pieces()
    expected = attend(case, values, backend)["out"]
    wanted = torch.autograd.grad(expected, list(values.values()), torch.ones_like(expected))
    for found, reference in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-5 * max(1.0, reference.abs().max().item()))


def test_the_guard_sees_a_wait():
    value = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_synchronisation():
        value.item()


@pytest.mark.parametrize(
    ("case", "dtype", "deterministic", "expected"),
    [
        (EQUAL_DENSE, torch.bfloat16, False, ("CUDNN_ATTENTION, all documents at once",)),
        (EQUAL_DENSE, torch.bfloat16, True, ("FLASH_ATTENTION, all documents at once",)),
        (EQUAL_DENSE, torch.float32, False, ("EFFICIENT_ATTENTION, all documents at once",)),
        (PACKED_DENSE, torch.float32, True, ("EFFICIENT_ATTENTION, document by document",)),
        (
            PACKED_DENSE,
            torch.bfloat16,
            True,
            ("variable-length flash attention", "FLASH_ATTENTION, document by document"),  # one, by torch's release
        ),
    ],
    ids=str,
)
def test_the_dense_kernel(caplog, case, dtype, deterministic, expected):
    dense_eager._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=dense_eager.__name__)
    torch.use_deterministic_algorithms(deterministic)
    try:
        attend(case, leaves(case, dtype, "cuda"), "eager")
    finally:
        torch.use_deterministic_algorithms(False)
    said = {record.getMessage().removeprefix("dense attention kernel: ") for record in caplog.records}
    assert len(said) == 1, said
    assert said <= set(expected), said

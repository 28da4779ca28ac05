"""Kernels of attention against the naive backend: every output and gradient by name, in Triton's interpreter.

Learned parameters are random, gains included. Tiles are small, so that short sequences have many.
"""

import functools
import itertools
import logging

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.pyramid import eager as pyramid
from maha_megatron.attention.scale_attention import naive, triton
from maha_megatron.attention.scale_attention.triton import attend
from maha_megatron.attention.scale_attention.triton_tuning import Tiles, Tuning
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState, piece_document_start
from tests.support.attention import (
    PACKED,
    Case,
    documents_of,
    errors,
    exact_leaves,
    leaves,
    parameter_specs,
    reference,
    wrong,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHORT = (13, 1, 7, 30, 3, 9)


def spec(ratio=4, windows=(24, 9, 6), **options) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, convolution=False, **options)


def tuning(heads: int) -> Tuning:
    """Tiles whose sizes differ, so that none is taken for another."""
    rows = {1: Tiles(rows=32, keys=16), 2: Tiles(rows=16, keys=16, heads=2)}[heads]
    tiles = {"keys": Tiles(keys=32), "forward": rows, "query_gradient": rows, "key_gradient": Tiles(rows=32, keys=16)}
    return Tuning(**tiles, span=40, programs=1)  # several programs share a tile of keys; KV groups one after the other


def kernels(heads: int):
    """With tiles of the tests' own; with the table's for 0 heads."""
    return functools.partial(attend, tuning=tuning(heads) if heads else None)


full = pytest.mark.full
GAME = {"aggregation": "nash", "coupling": "gram"}
# what makes one output of the scales' own, and whether every day
FUSED = [
    ("no LSE", {"lse_utility": False}, True),
    ("tokens", {"rope_unit": "token"}, True),
    ("tokens, gram", {"rope_unit": "token", "coupling": "gram"}, True),
    ("tokens, no LSE", {"rope_unit": "token", "lse_utility": False}, True),
    ("quadratic", {"regularizer": "quadratic"}, False),
    ("quadratic, no LSE", {"regularizer": "quadratic", "lse_utility": False}, False),
    ("gram", {"coupling": "gram"}, True),
    ("gram, quadratic", {"coupling": "gram", "regularizer": "quadratic"}, False),
    ("nash", {"aggregation": "nash"}, False),
    ("nash, gram", GAME, True),
    ("mean", {"aggregation": "mean"}, False),
]
PACKED_CASE = Case(lengths=SHORT, n=4, g=2, d=32, spec=spec())
CASES = [
    pytest.param(Case(lengths=(1,), n=1, g=1, d=32, spec=spec()), 1, id="one row"),
    pytest.param(Case(lengths=(67,), n=2, g=2, d=32, spec=spec()), 1, id="one document"),
    pytest.param(PACKED_CASE, 2, id="packed, two heads a tile"),
    pytest.param(PACKED_CASE, 1, marks=full, id="packed, one head a tile"),
    pytest.param(Case(lengths=PACKED, n=4, g=2, d=32, spec=spec()), 2, marks=full, id="many tiles"),
    pytest.param(Case(lengths=(3, 50), n=2, g=1, d=32, spec=spec(3, (20, 8, 5, 3, 2))), 1, id="ratio 3"),
    pytest.param(
        Case(lengths=(40, 41), n=1, g=1, d=32, spec=spec(2, (5, 4, 3, 3, 4, 2, 1, 1))), 1, marks=full, id="8 scales"
    ),
    pytest.param(Case(lengths=(70,), n=2, g=1, d=32, spec=spec(windows=(17,))), 2, id="one scale"),
    pytest.param(
        Case(lengths=(3, 50), n=2, g=1, d=32, spec=spec(3, (20, 8, 5, 3, 2), lse_utility=False)),
        1,
        id="ratio 3, no LSE",
    ),
    pytest.param(
        Case(lengths=(70,), n=2, g=1, d=32, spec=spec(windows=(17,), coupling="gram")), 2, id="one scale, a program"
    ),
    pytest.param(
        Case(lengths=(3, 50), n=2, g=1, d=32, spec=spec(3, (20, 8, 5, 3, 2), rope_unit="token")),
        1,
        marks=full,
        id="ratio 3, tokens",
    ),
    pytest.param(
        Case(lengths=(40, 41), n=1, g=1, d=32, spec=spec(2, (5, 4, 3, 3, 4, 2, 1, 1), lse_utility=False)),
        1,
        marks=full,
        id="8 scales, no LSE",
    ),
    *(
        pytest.param(Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(**options)), 2, id=name, marks=() if often else full)
        for name, options, often in FUSED
    ),
    pytest.param(
        Case(lengths=(3, 50), n=2, g=1, d=32, spec=spec(3, (20, 8, 5, 3, 2), **GAME)), 1, id="ratio 3, a game"
    ),
    pytest.param(
        Case(lengths=(40, 41), n=1, g=1, d=32, spec=spec(2, (5, 4, 3, 3, 4, 2, 1, 1), **GAME)),
        1,
        marks=full,
        id="8 scales, a game",
    ),
]


def run(case: Case, values: dict[str, torch.Tensor], attention) -> dict[str, torch.Tensor]:
    """Output, weights and every gradient by name, of `attention` on a pyramid in plain torch."""
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    start_t = documents_of(case, values["q"].device).start_t
    levels = pyramid.build_pyramid((values["k"], values["v"]), start_t, parameters, case.spec)
    attended = attention(values["q"], levels, start_t, parameters, case.spec)
    return with_gradients(attended.out_tnd, attended.weights_tnl, values)


def with_gradients(out, weights, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(values.values()), direction, materialize_grads=True)
    found = {"out": out, "weights": weights} | {f"grad of {name}": x for name, x in zip(values, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in found.items()}


@functools.cache
def exact(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the naive backend in fp64, of leaves that `dtype` holds."""
    return run(case, exact_leaves(case, dtype), naive.attend)


@pytest.mark.parametrize(("case", "heads"), CASES)
def test_every_output_and_gradient_in_fp32_equals_the_reference(case, heads):
    found = run(case, leaves(case, torch.float32, DEVICE), kernels(heads))
    assert wrong(found, exact(case, torch.float32), 3e-6) == {}


GAME_CASE = Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(**GAME))
TOKENS_CASE = Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(rope_unit="token"))
NO_LSE_CASE = Case(lengths=SHORT, n=4, g=2, d=32, spec=spec(lse_utility=False))
WIDE_CASES = [
    pytest.param(
        Case(lengths=(330, 1, 101), n=4, g=g, d=width, spec=spec(windows=(128, 112, 124, 64), **options)),
        0,
        marks=pytest.mark.gpu,
        id=f"wide, {name}, {width} channels, {g} groups",
    )
    for name, options, _ in [("one softmax", {}, True), *FUSED]
    for width, g in ((64, 4), (128, 2))
    if name in ("one softmax", "no LSE", "quadratic", "gram", "nash") or name.startswith("tokens")
]


@pytest.mark.parametrize(
    ("case", "heads"),
    [
        pytest.param(PACKED_CASE, 2, id="packed"),
        pytest.param(GAME_CASE, 2, id="a game"),
        pytest.param(NO_LSE_CASE, 2, id="no LSE"),
        pytest.param(TOKENS_CASE, 2, id="tokens"),
        *WIDE_CASES,
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=full)], ids=str)
def test_in_16_bit_at_most_twice_as_far_from_exact_as_plain_torch(case, heads, dtype):
    """Plain torch in bf16, its errors scaled by the dtypes' resolutions: on a CPU it is not to be trusted in fp16."""
    plain = errors(run(case, leaves(case, torch.bfloat16), naive.attend), exact(case, torch.bfloat16))
    found = errors(run(case, leaves(case, dtype, DEVICE), kernels(heads)), exact(case, dtype))
    finer = torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    assert {name: error for name, error in found.items() if not error <= 2 * finer * plain[name]} == {}, plain


@pytest.mark.parametrize("options", [{}, {"lse_utility": False}, GAME], ids=["joint", "no LSE", "a game"])
def test_two_runs_are_bitwise_equal(options):
    case = Case(lengths=(5, 32), n=2, g=1, d=32, spec=spec(windows=(20, 7), **options))
    first, second = (run(case, leaves(case, torch.float32, DEVICE), kernels(2)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lse_utility", [True, False])
def test_weights_are_written_when_asked_for_only(lse_utility):
    case = Case(lengths=(9,), n=1, g=1, d=32, spec=spec(windows=(5, 2), lse_utility=lse_utility))
    values = leaves(case, torch.float32, DEVICE)
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    start_t = documents_of(case, DEVICE).start_t
    levels = pyramid.build_pyramid((values["k"], values["v"]), start_t, parameters, case.spec)
    inputs = (values["q"], levels, start_t, parameters, case.spec)
    without, given = (attend(*inputs, with_weights=asked) for asked in (False, True))
    assert without.weights_tnl is None
    assert torch.equal(without.out_tnd, given.out_tnd)
    torch.testing.assert_close(given.weights_tnl.sum(-1), torch.ones(9, 1, device=DEVICE))


@pytest.mark.parametrize(
    ("lengths", "cuts", "windows", "options"),
    [
        pytest.param((23, 4, 16), (0, 10, 11, 43), (7, 4, 3), {}, id="packed"),
        pytest.param((107,), (0, 100, 101, 107), (64, 32, 11), {}, marks=full, id="a past of several tiles of keys"),
        pytest.param((23, 4, 16), (0, 10, 11, 43), (7, 4, 3), {"lse_utility": False}, id="no LSE"),
        pytest.param((23, 4, 16), (0, 10, 11, 43), (7, 4, 3), GAME, id="a game"),
        pytest.param((23, 4, 16), (0, 10, 11, 43), (7, 4, 3), {"rope_unit": "token"}, id="tokens"),
        pytest.param(
            (23, 4, 16), (0, 10, 11, 43), (7, 4, 3), GAME | {"rope_unit": "token"}, marks=full, id="tokens, a game"
        ),
    ],
)
def test_pieces_equal_one_pass_and_gradients_cross_their_borders(lengths, cuts, windows, options):
    case = Case(lengths=lengths, n=2, g=1, d=32, spec=MahaSpec(ratio=3, windows=windows, **options))
    assert wrong(in_pieces(case, cuts), reference(case), 3e-6) == {}


def in_pieces(case: Case, cuts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """As `run`, by pieces of rows from one cut to the next, the first of which is 0 and the last behind all rows."""
    values = leaves(case, torch.float32, DEVICE)
    sizes = {"streams": 1, "n": case.n, "g": case.g, "d": case.d, "dtype": torch.float32, "device": DEVICE}
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    state, starts, pieces = MahaState.initial(case.spec, **sizes), documents_of(case, DEVICE).start_t, []
    for first, stop in itertools.pairwise(cuts):
        rows = [values[name][first:stop] for name in "qkv"]
        piece_starts = piece_document_start(starts, first, stop)
        options = {"backend": "triton", "with_weights": True, "state": state}
        pieces.append(maha_attention(*rows, piece_starts, parameters, case.spec, **options))
        state = pieces[-1].state
    out, weights = (torch.cat([getattr(x, name) for x in pieces]) for name in ("out_tnd", "scale_weights_tnl"))
    return with_gradients(out, weights, values)


@pytest.mark.parametrize(
    ("options", "width", "dtype", "missing"),
    [
        ({}, 16, torch.float32, "heads of 16 channels"),
        ({}, 32, torch.float64, "torch.float64"),
        ({"queries": "pooled"}, 32, torch.float32, "pooled queries"),
        ({"queries": "pooled", "coupling": "gram"}, 32, torch.float32, "pooled queries"),
    ],
    ids=["width", "fp64", "pooled", "pooled, gram"],
)
def test_what_no_kernel_serves_is_said_once_and_eager_does_it(caplog, options, width, dtype, missing):
    triton._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=triton.__name__)
    case = Case(lengths=(19,), n=1, g=1, d=width, spec=spec(windows=(9, 4), **options))
    found, _ = (run(case, leaves(case, dtype, DEVICE), attend) for _ in range(2))
    assert wrong(found, exact(case, dtype), 3e-6) == {}
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"scale attention: no kernel serves {missing}; eager does"]

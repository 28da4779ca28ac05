"""Kernels of decoding against the plain form, stream by stream: outputs, weights and every tensor of the next state.

In Triton's interpreter. Streams stand at offsets of their own, in documents of their own.
"""

import dataclasses

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.api import MahaOutput, maha_attention
from maha_megatron.attention.decode import triton
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState
from tests.support.attention import Case, leaves, parameter_specs
from tests.support.everyday import everyday

pytestmark = pytest.mark.usefixtures("poisoned_memory")
full = pytest.mark.full
SPEC = MahaSpec(ratio=4, windows=(24, 9, 6))
OFFSETS = (37, 0, 15)


def a_case(spec: MahaSpec = SPEC, n: int = 2, g: int = 1, d: int = 32) -> Case:
    return Case(lengths=(60,), spec=spec, n=n, g=g, d=d)


def parameters_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> AttentionParameters:
    values = leaves(case, dtype, device)
    return AttentionParameters(**{name: values[name].detach() for name in parameter_specs(case)})


def rows_of(case: Case, rows: int, seed: int) -> list[torch.Tensor]:
    """q, k and v, exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, case.d) for heads in (case.n, case.g, case.g)]
    return [torch.randn(shape, generator=generator).to(torch.bfloat16).float() for shape in shapes]


def read(
    case: Case, state: MahaState, rows, new_documents=(), backend="eager", dtype=torch.float64, parameters=None
) -> MahaOutput:
    """The next rows of every stream."""
    device = DEVICE if backend == "triton" else "cpu"
    inputs, state = [x.to(device, dtype) for x in rows], state.to(device)
    starts = state.document_start(len(rows[0]) // state.streams, new_documents)
    parameters = parameters or parameters_of(case, dtype, device)
    return maha_attention(*inputs, starts, parameters, case.spec, backend=backend, with_weights=True, state=state)


def streams_of(case: Case, offsets=OFFSETS, rewind_rows: int = 0, dtype=torch.float32) -> MahaState:
    """Streams that have read documents of random rows, by the plain form in `dtype`."""
    states = []
    for seed, offset in enumerate(offsets):
        sizes = {"streams": 1, "n": case.n, "g": case.g, "d": case.d, "rewind_rows": rewind_rows}
        state = MahaState.initial(case.spec, dtype=dtype, **sizes)
        if offset:
            state = read(case, state, rows_of(case, offset, seed), dtype=dtype).state
        states.append(state)
    return MahaState.stack(states)


def named(found: MahaOutput) -> dict[str, torch.Tensor]:
    made = {"out": found.out_tnd, "weights": found.scale_weights_tnl} | found.state.tensors()
    return {name: x.detach().cpu() for name, x in made.items()}


def errors(found, expected) -> dict[str, float]:
    """The norm of each difference over that of what is expected, or 0.1; counts are equal or infinitely wrong."""
    assert found.keys() == expected.keys()
    differences = {}
    for name, value in expected.items():
        if value.is_floating_point():
            difference = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=0.1)
            differences[name] = difference.item()
        else:
            differences[name] = 0.0 if torch.equal(found[name], value) else float("inf")
    return differences


def wrong(found, expected, tolerance: float) -> dict[str, float]:
    return {name: error for name, error in errors(found, expected).items() if not error <= tolerance}


@pytest.fixture
def counted_steps(monkeypatch):
    """How many steps the kernels have done."""
    steps = []
    run = triton.Call.run
    monkeypatch.setattr(triton.Call, "run", lambda call, asked: steps.append(call.step.rows) or run(call, asked))
    return steps


def check(case: Case, state: MahaState, rows: int, seed: int, new_documents=(), tolerance: float = 2e-6) -> MahaState:
    """One piece, by kernels in fp32 and by the plain form in fp64; returns the kernels' state."""
    inputs = rows_of(case, rows * state.streams, seed)
    with torch.no_grad():
        found = read(case, state, inputs, new_documents, "triton", torch.float32)
    expected = read(case, state.to(dtype=torch.float64), inputs, new_documents)
    assert found.out_tnd.dtype == torch.float32
    assert wrong(named(found), named(expected), tolerance) == {}
    return found.state.to("cpu")


SPECS = {
    "default": a_case(n=4, g=2),
    "ratio 3": a_case(MahaSpec(ratio=3, windows=(7, 4, 3, 2), convolution=False), n=3, d=64),
    "positions in tokens": a_case(MahaSpec(ratio=3, windows=(7, 4, 3, 2), rope_unit="token")),
    "one scale": a_case(MahaSpec(ratio=2, windows=(9,)), d=128),
    "least windows, conv": a_case(MahaSpec(ratio=5, windows=(4, 4, 1), downsampling="conv")),
    "8 scales": a_case(MahaSpec(ratio=2, windows=(5, 4, 3, 3, 4, 2, 1, 1), downsampling="max"), n=1),
    "tiles of entries, mean": a_case(MahaSpec(ratio=4, windows=(70, 40), downsampling="mean")),
}
ONE_BY_ONE = everyday(
    SPECS, lambda name: name in ("default", "ratio 3", "positions in tokens", "tiles of entries, mean")
)
AT_ONCE = everyday(SPECS, lambda name: name in ("default", "one scale", "least windows, conv"))


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_tokens_one_by_one(name, counted_steps):
    """The first completes a block of every scale in one stream, begins a document in another."""
    case = SPECS[name]
    state = streams_of(case, (2 * case.spec.ratio ** (case.spec.scales - 1) - 1, 0, 5))
    for token in range(3):
        state = check(case, state, 1, 100 + token)
    assert counted_steps == [1] * 3


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_few_tokens_at_once_in_documents_that_start_anywhere(name, counted_steps):
    case = SPECS[name]
    state = streams_of(case, rewind_rows=5)
    state = check(case, state, 16, 200, [(3, 4, 11), (), (15,)])
    check(case, state, 3, 201, [(), (0,), ()])
    assert counted_steps == [16, 3]


def test_a_state_that_kernels_made_is_cut_back_reordered_and_restored():
    case = a_case()
    state = check(case, streams_of(case, rewind_rows=4), 4, 1)
    state = state.cut_back(torch.tensor([1, 3, 2])).reorder(torch.tensor([2, 0, 0]))
    check(case, MahaState.from_tensors(state.tensors(), case.spec), 2, 2)


def test_a_far_offset_is_no_other():
    """A million rows further, by a multiple of every stride: as the plain form has it."""
    case = a_case()
    state = streams_of(case)
    state = dataclasses.replace(state, offset=torch.where(state.offset > 0, state.offset + 2**20, 0))
    check(case, state, 1, 3, tolerance=1e-5)


def distances(case: Case, backend: str, dtype: torch.dtype) -> dict[str, float]:
    """Of the second token, after its form's own first one, from the plain form in fp64 on leaves of the dtype."""
    learned = {name: x for name, x in vars(parameters_of(case, dtype)).items() if x is not None}
    wide = AttentionParameters(**{name: x.double() for name, x in learned.items()})
    state, exact = (streams_of(case, dtype=torch.bfloat16).to(dtype=x) for x in (dtype, torch.float64))
    for token in range(2):
        rows = rows_of(case, len(OFFSETS), 300 + token)
        with torch.no_grad():
            found, expected = read(case, state, rows, (), backend, dtype), read(case, exact, rows, parameters=wide)
        state, exact = found.state, expected.state
    return errors(named(found), named(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=full)], ids=str)
def test_in_16_bit_at_most_twice_as_far_from_exact_as_plain_torch(dtype):
    """Plain torch in bf16, its errors scaled by the dtypes' resolutions: on a CPU it is not to be trusted in fp16."""
    found, plain = distances(a_case(), "triton", dtype), distances(a_case(), "naive", torch.bfloat16)
    finer = torch.finfo(dtype).eps / torch.finfo(torch.bfloat16).eps
    assert {name: error for name, error in found.items() if not error <= 2 * finer * plain[name]} == {}, plain


def test_views_of_a_projection_are_read_as_they_lie():
    case = a_case(n=2, g=2)
    state, rows = streams_of(case), rows_of(case, len(OFFSETS), 4)
    fused = torch.stack([x.to(DEVICE) for x in rows], dim=2)
    found, expected = (named(read(case, state, x, (), "triton", torch.float32)) for x in (fused.unbind(2), rows))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("case", "rows", "why"),
    [
        (a_case(), 17, "a long piece"),
        (a_case(n=8, g=1), 9, "many lines"),
        (a_case(MahaSpec(ratio=4, windows=(6, 5), key_map=True)), 1, "a key map"),
        (a_case(MahaSpec(ratio=4, windows=(6, 5), coupling="gram")), 1, "another aggregation"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_kernels_do_not_serve_goes_stream_by_stream(case, rows, why, counted_steps):
    check(case, streams_of(case, offsets=(5, 2)), rows, 5, tolerance=1e-5)
    assert counted_steps == []


def test_where_gradients_are_asked_for_streams_go_one_by_one(counted_steps):
    case = a_case()
    state, rows = streams_of(case), [x.to(DEVICE) for x in rows_of(case, len(OFFSETS), 6)]
    rows[1].requires_grad_()
    out = read(case, state, rows, (), "triton", torch.float32).out_tnd
    (grad,) = torch.autograd.grad(out.sum(), rows[1])
    assert (grad != 0).any()
    assert counted_steps == []
    with torch.no_grad():
        found = read(case, state, rows, (), "triton", torch.float32).out_tnd
    torch.testing.assert_close(found, out, rtol=0, atol=1e-5)
    assert counted_steps == [1]


def test_two_runs_are_bitwise_equal():
    case = a_case()
    state, rows = streams_of(case), rows_of(case, len(OFFSETS), 7)
    first, second = (named(read(case, state, rows, (), "triton", torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

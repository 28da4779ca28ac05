"""A sequence read in pieces through the state equals one pass: outputs, weights and every gradient by name."""

import dataclasses
import functools
import itertools
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from maha_megatron.attention import row_blocks
from maha_megatron.attention.api import _joined_reports, maha_attention
from maha_megatron.attention.scale_attention import chunks
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState, piece_document_start
from maha_megatron.errors import ConfigError, StateError
from maha_megatron.scales import default_windows
from tests.support.attention import Case, assert_close, attend, leaves, parameter_specs, results, start_rows
from tests.support.everyday import everyday

BACKENDS = ("naive", "eager")
SPECS = {
    "lse": MahaSpec(ratio=4, windows=(6, 5, 12)),
    "no lse, mean": MahaSpec(ratio=4, windows=(6, 5, 12), lse_utility=False, downsampling="mean"),
    "ratio 3, no convolution": MahaSpec(ratio=3, windows=(7, 4, 3, 2), convolution=False),
    "positions in tokens": MahaSpec(ratio=3, windows=(7, 4, 3, 2), rope_unit="token"),
    "least windows": MahaSpec(ratio=5, windows=(4, 4, 1)),
    "one scale": MahaSpec(ratio=2, windows=(9,)),
    "nash, gram": MahaSpec(ratio=4, windows=(6, 5, 12), aggregation="nash", coupling="gram", key_map=True),
    "quadratic": MahaSpec(ratio=4, windows=(6, 5, 12), regularizer="quadratic", downsampling="conv"),
    "mean of the scales": MahaSpec(ratio=4, windows=(6, 5, 12), aggregation="mean", downsampling="max", key_map=True),
}
PACKED = (37, 1, 66, 9, 37)
FIRST = ("lse", "nash, gram")  # the two ways through attention: what takes long is done with these every day


def a_case(spec: str, lengths: tuple[int, ...] = PACKED, **sizes) -> Case:
    return Case(lengths=lengths, spec=SPECS[spec], **({"n": 2, "g": 1, "d": 8} | sizes))


def initial(case: Case, dtype=torch.float64, **options) -> MahaState:
    sizes = {"streams": 1, "n": case.n, "g": case.g, "d": case.d} | options
    return MahaState.initial(case.spec, dtype=dtype, **sizes)


def read(case: Case, values, start_t, state, backend="eager", rows=slice(None)):
    """The rows of the values, a piece that begins where the state ends."""
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    inputs = [values[name][rows] for name in "qkv"]
    return maha_attention(*inputs, start_t, parameters, case.spec, backend=backend, with_weights=True, state=state)


def in_pieces(case: Case, values, cuts, backend="eager", state=None, first=0, stop=None, change=lambda state: state):
    """`out` and `weights` of rows first..stop in pieces that end at the cuts, and the state; `change` after each."""
    starts, found = start_rows(case.lengths), []
    stop = len(starts) if stop is None else stop
    state = state or initial(case, values["q"].dtype)
    for start, end in itertools.pairwise([first, *cuts, stop]):
        result = read(case, values, piece_document_start(starts, start, end), state, backend, slice(start, end))
        state = change(result.state)
        found.append(result)
    out = torch.cat([result.out_tnd for result in found])
    return {"out": out, "weights": torch.cat([result.scale_weights_tnl for result in found])}, state


def results_in_pieces(case: Case, cuts, backend="eager", dtype=torch.float64, **options) -> dict[str, torch.Tensor]:
    """As `results` of tests/support/attention.py."""
    values = leaves(case, dtype)
    found, _ = in_pieces(case, values, cuts, backend, **options)
    direction = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(found["out"], list(values.values()), direction, materialize_grads=True)
    found |= {f"grad of {name}": grad for name, grad in zip(values, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def cuts_of(rows: int, generator: random.Random, most: int) -> list[int]:
    return sorted(generator.sample(range(1, rows), min(generator.randint(1, most), rows - 1)))


def random_case(seed: int, most_rows: int) -> Case:
    generator = random.Random(seed)
    rows, ratio, scales = generator.randint(2, most_rows), generator.choice((2, 3, 4, 5, 8)), generator.randint(1, 5)
    spec = MahaSpec(
        ratio=ratio,
        windows=tuple(generator.randint(ratio - 1, 40) for _ in range(scales)),
        downsampling=generator.choice(("gated", "conv", "mean", "max")),
        key_map=generator.random() < 0.3,
        lse_utility=generator.random() < 0.7,
        convolution=generator.random() < 0.7,
    )
    if seed % 4 == 0:  # solvers take their time
        other = {"aggregation": "nash", "regularizer": generator.choice(("entropy", "quadratic")), "coupling": "gram"}
        spec = dataclasses.replace(spec, **other)
    bounds = cuts_of(rows, generator, 12) if generator.random() < 0.5 else []
    lengths = tuple(end - start for start, end in itertools.pairwise([0, *bounds, rows]))
    return Case(lengths=lengths, spec=spec, n=2, g=1, d=4, seed=seed)


@pytest.mark.parametrize("seed", everyday(range(40), lambda seed: seed < 5))
def test_five_random_ways_to_cut_a_sequence_equal_one_pass(seed):
    """200 in all, of 40 sequences of up to 3,000 rows, about half of them packed; 25 every day."""
    case, generator = random_case(seed, most_rows=3000), random.Random(seed)
    expected = results(case, "eager", torch.float64)
    for _ in range(5):
        assert_close(results_in_pieces(case, cuts_of(sum(case.lengths), generator, 9)), expected, 1e-10)


@pytest.mark.parametrize(
    ("backend", "spec"),
    everyday(
        itertools.product(BACKENDS, SPECS),
        lambda backend, spec: spec in FIRST[:1] or (backend == "eager" and spec in FIRST),
    ),
)
def test_pieces_of_one_row_equal_one_pass(backend, spec):
    case = a_case(spec)
    found = results_in_pieces(case, range(1, sum(PACKED)), backend)
    assert_close(found, _one_pass(case), 1e-10)


@functools.cache
def _one_pass(case: Case) -> dict[str, torch.Tensor]:
    return results(case, "naive", torch.float64)


@pytest.mark.parametrize(
    ("spec", "cuts"),
    everyday(
        itertools.product(SPECS, ((50, 51, 100), (3,), (37, 38, 104), (36, 39, 40, 41, 120))),
        lambda spec, cuts: cuts[0] in ((37, 50) if spec in FIRST else (36,)),
    ),
    ids=str,
)
def test_both_backends_in_pieces_equal_the_reference_and_hand_on_the_same_state(spec, cuts):
    case, states = a_case(spec), {}
    for backend in BACKENDS:
        assert_close(results_in_pieces(case, cuts, backend), _one_pass(case), 1e-10)
        _, states[backend] = in_pieces(case, leaves(case, torch.float64), cuts, backend)
    assert_close(states["eager"].tensors(), states["naive"].tensors(), 1e-12)


@pytest.mark.parametrize(
    "spec", everyday(("lse", "ratio 3, no convolution", "quadratic"), lambda spec: not spec.startswith("ratio"))
)
def test_pieces_of_many_chunks_and_blocks_equal_one_pass(monkeypatch, spec):
    monkeypatch.setitem(chunks._LOGITS_PER_CHUNK, "cpu", 1)
    monkeypatch.setitem(row_blocks._BLOCK_ELEMENTS, "cpu", 200)
    case = a_case(spec, lengths=(150, 9, 400))
    assert_close(results_in_pieces(case, (70, 71, 400)), _one_pass(case), 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=str)
def test_pieces_in_the_dtypes_of_training(dtype, tolerance):
    case = a_case("lse", d=16)
    found = results_in_pieces(case, (50, 51, 100), dtype=dtype)
    expected = {name: value.double() for name, value in results(case, "eager", dtype).items()}
    assert found["out"].dtype == dtype
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_in_lockstep_equal_each_alone(backend):
    """Three streams whose documents start, and whose offsets lie, anywhere."""
    lengths = ((30, 17), (8, 1, 38), (47,))
    cases = [a_case("lse", lengths=own, n=4, g=2) for own in lengths]
    every = [dataclasses.replace(case, seed=seed) for seed, case in enumerate(cases)]
    learned = leaves(cases[0], torch.float64)
    values = [learned | {name: leaves(case, torch.float64)[name] for name in "qkv"} for case in every]
    state, outs, cuts = initial(cases[0], streams=3), [], (0, 13, 14, 35, 47)
    for start, end in itertools.pairwise(cuts):
        starts = torch.cat([piece_document_start(start_rows(own), start, end) for own in lengths])
        inputs = {name: torch.cat([own[name][start:end] for own in values]) for name in "qkv"}
        result = read(cases[0], learned | inputs, starts, state, backend)
        outs.append(result.out_tnd.unflatten(0, (3, -1)))
        assert result.scale_weights_tnl.shape == (3 * (end - start), 4, 3)
        state = result.state
    together = torch.cat(outs, dim=1)
    alone = [in_pieces(case, own, cuts[1:-1], backend) for case, own in zip(cases, values, strict=True)]
    torch.testing.assert_close(together, torch.stack([found["out"] for found, _ in alone]), rtol=0, atol=1e-12)
    assert_close(state.tensors(), MahaState.stack([own for _, own in alone]).tensors(), 1e-12)
    inputs = [own[name] for own in values for name in "qkv"] + list(learned.values())[3:]
    found = torch.autograd.grad(together.square().sum(), inputs)
    expected = torch.autograd.grad(sum(own["out"].square().sum() for own, _ in alone), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_streams_solver_reports_are_joined():
    case = a_case("nash, gram", lengths=(20,))
    values = [leaves(dataclasses.replace(case, seed=seed), torch.float64) for seed in (0, 1)]
    both = values[0] | {name: torch.cat([own[name] for own in values]) for name in "qkv"}
    found = read(case, both, start_rows((20,)).repeat(2), initial(case, streams=2)).solves
    streams = [values[0] | {name: own[name] for name in "qkv"} for own in values]
    alone = [read(case, own, start_rows((20,)), initial(case)).solves for own in streams]
    assert torch.equal(found.steps_tn, torch.cat([own.steps_tn for own in alone]))
    torch.testing.assert_close(found.residual_tn, torch.cat([own.residual_tn for own in alone]), rtol=0, atol=1e-10)
    reports = [dataclasses.replace(own, missed=torch.tensor(3 + index)) for index, own in enumerate(alone)]
    assert _joined_reports(reports).missed == 7
    assert _joined_reports([dataclasses.replace(own, steps_tn=None) for own in alone]).steps_tn is None


@pytest.mark.parametrize(
    "spec",
    everyday(
        ("lse", "ratio 3, no convolution", "one scale", "nash, gram", "mean of the scales"),
        lambda spec: spec in FIRST,
    ),
)
def test_no_row_reads_a_later_row_or_another_document_through_the_state(spec):
    """d out[row] / d (q, k, v)[other] is exactly 0 unless other is in row's document and not after it."""
    case = a_case(spec, lengths=(21, 1, 40, 2))
    values, starts = leaves(case, torch.float64), start_rows((21, 1, 40, 2)).tolist()
    found, state = in_pieces(case, values, (5, 20, 21, 30, 47, 48, 60))
    inputs = [values[name] for name in "qkv"]
    for row, start in enumerate(starts):
        grads = torch.autograd.grad(found["out"][row].sum(), inputs, retain_graph=True)
        seen = sum(grad.abs().sum((1, 2)) for grad in grads).nonzero().flatten()
        assert seen.min() >= start, f"row {row} reads row {seen.min()}"
        assert seen.max() == row, f"row {row} reads row {seen.max()}"
    for name, tensor in state._named().items():
        if tensor.requires_grad:
            grads = torch.autograd.grad(tensor.sum(), inputs, retain_graph=True, materialize_grads=True)
            assert all((grad[: starts[-1]] == 0).all() for grad in grads), f"{name} holds rows of an earlier document"


@pytest.mark.parametrize("cut", [30, 32])
def test_values_of_an_earlier_document_never_reach_a_later_piece(cut):
    """Not even values that are not numbers, as exact zeros times them would show."""
    case = a_case("lse", lengths=(30, 3))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    expected, _ = in_pieces(case, values, (cut,), "naive")
    values["v"][:30] = torch.nan
    found, state = in_pieces(case, values, (cut,), "naive")
    assert torch.equal(found["out"][30:], expected["out"][30:])
    assert all(tensor.isfinite().all() for tensor in state.tensors().values())


def test_training_in_pieces_can_be_truncated():
    case = a_case("lse", lengths=(60,))
    values = leaves(case, torch.float64)
    for change, reaches in ((lambda state: state, True), (MahaState.detach, False)):
        found, _ = in_pieces(case, values, (30,), change=change)
        (grad,) = torch.autograd.grad(found["out"][30:].sum(), values["k"])
        assert (grad[:30] != 0).any() == reaches


def test_far_down_a_document_only_relative_positions_matter():
    """Two billion rows further, by a multiple of every stride: the same output."""
    case = a_case("lse", lengths=(400,))
    values = leaves(case, torch.float64)
    _, state = in_pieces(case, values, (), stop=391)
    further = dataclasses.replace(state, offset=state.offset + 2**31)
    near, far = (read(case, values, own.document_start(9), own, rows=slice(391, 400)) for own in (state, further))
    torch.testing.assert_close(far.out_tnd, near.out_tnd, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tokens", "entries"), [(4096, 428), (65536, 682), (131072, 746)])
def test_the_state_is_of_the_stated_size_whatever_has_been_read(tokens, entries):
    case = Case(lengths=(300,), n=2, g=1, d=4, spec=MahaSpec(ratio=4, windows=default_windows(tokens)))
    state = initial(case)
    _, later = in_pieces(case, leaves(case, torch.float64), (7,), state=state)
    for own in (state, later):
        assert sum(entry.shape[1] for entry in own.entries) == entries
        assert {entry.shape[2:] for entry in own.entries} == {(2, 1, 4)}
        assert own.rows.shape == (1, 4, 4, 4)


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_saved_and_restored_goes_on_bitwise(tmp_path, spec):
    case = a_case(spec)
    values = leaves(case, torch.float64)
    _, state = in_pieces(case, values, (), stop=90, state=initial(case, rewind_rows=5))
    save_file(state.tensors(), tmp_path / "state.safetensors")
    restored = MahaState.from_tensors(load_file(tmp_path / "state.safetensors"), case.spec)
    assert restored.rewind_rows == 5
    expected, last = in_pieces(case, values, (95,), state=state, first=90)
    found, restored_last = in_pieces(case, values, (95,), state=restored, first=90)
    for name, value in (expected | last.tensors()).items():
        assert torch.equal((found | restored_last.tensors())[name], value), name


def test_reordered_streams_go_on_as_the_streams_they_were():
    case = a_case("lse", lengths=(40,))
    states = []
    for seed, rows in enumerate((17, 33, 5)):
        values = leaves(dataclasses.replace(case, seed=seed), torch.float64)
        states.append(in_pieces(case, values, (), stop=rows)[1])
    index = torch.tensor([2, 0, 0, 1])
    beams = MahaState.stack(states).reorder(index)
    assert beams.offset.tolist() == [5, 17, 17, 33]
    values = leaves(case, torch.float64)
    wide = values | {name: values[name][:3].repeat(4, 1, 1) for name in "qkv"}
    found = read(case, wide, beams.document_start(3), beams).out_tnd.unflatten(0, (4, 3))
    for beam, stream in enumerate(index.tolist()):
        own = read(case, values, states[stream].document_start(3), states[stream], rows=slice(3))
        assert torch.equal(found[beam], own.out_tnd)


def test_a_state_moves_to_another_dtype():
    state = in_pieces(a_case("lse"), leaves(a_case("lse"), torch.float64), ())[1].to(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in (*state.entries, state.rows)} == {torch.bfloat16}
    assert state.offset.dtype == state.rewindable.dtype == torch.int64
    assert state.to("meta").rows.device.type == "meta"


@pytest.mark.parametrize(
    ("spec", "rewind_rows"),
    everyday(
        itertools.product(("lse", "ratio 3, no convolution", "least windows"), (1, 7, 30)),
        lambda spec, rewind_rows: (spec, rewind_rows) in (("lse", 30), ("ratio 3, no convolution", 7)),
    ),
)
def test_after_cutting_back_it_is_as_if_the_rows_had_never_been_read(spec, rewind_rows):
    """At every offset of a document, for every number of rows that the state holds: bitwise, and so again after it."""
    case = a_case(spec, lengths=(9, 90))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    others = {name: -value if name in "qkv" else value for name, value in values.items()}
    states = {9: in_pieces(case, values, (), stop=9, state=initial(case, rewind_rows=rewind_rows))[1]}
    for row in range(9, 70):
        states[row + 1] = in_pieces(case, values, (), state=states[row], first=row, stop=row + 1)[1]
    for row in range(10, 50):
        expected, last = in_pieces(case, values, (row + 3,), state=states[row], first=row, stop=row + 8)
        for back in {rewind_rows // 2 + 1, rewind_rows}:
            _, ahead = in_pieces(case, others, (), state=states[row], first=row, stop=row + back)
            returned = ahead.cut_back(back)
            assert (returned.offset, returned.rewindable) == (row - 9, min(row - 9, rewind_rows - back))
            found, found_last = in_pieces(case, values, (row + 3,), state=returned, first=row, stop=row + 8)
            assert torch.equal(found["out"], expected["out"])
            assert found_last.rewindable == min(rewind_rows, row + 8 - 9, returned.rewindable + 8)
            again, early = found_last.rewindable.item(), row + 8 - found_last.rewindable.item()
            if early > 9:
                here = found_last.cut_back(again)
                found, _ = in_pieces(case, values, (), state=here, first=early, stop=early + 5)
                wanted, _ = in_pieces(case, values, (), state=states[early], first=early, stop=early + 5)
                torch.testing.assert_close(found["out"], wanted["out"], rtol=0, atol=1e-12)
        assert last.offset == row + 8 - 9


def test_cutting_back_keeps_the_gradient():
    case = a_case("lse", lengths=(40,))
    values = leaves(case, torch.float64)
    _, state = in_pieces(case, values, (), stop=33, state=initial(case, rewind_rows=8))
    found, _ = in_pieces(case, values, (), state=state.cut_back(8), first=25)
    expected, _ = in_pieces(case, values, (25,))
    for name in "kv":
        (grad,) = torch.autograd.grad(found["out"].sum(), values[name], retain_graph=True)
        (wanted,) = torch.autograd.grad(expected["out"][25:].sum(), values[name], retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_streams_cut_back_by_rows_of_their_own():
    case = a_case("lse", lengths=(40,))
    values = leaves(case, torch.float64)
    states = [in_pieces(case, values, (), stop=rows, state=initial(case, rewind_rows=6))[1] for rows in (20, 23)]
    found = MahaState.stack(states).cut_back(torch.tensor([2, 5]))
    assert found.offset.tolist() == [18, 18]
    assert found.rewindable.tolist() == [4, 1]
    starts = found.document_start(4)
    wide = values | {name: values[name][18:22].repeat(2, 1, 1) for name in "qkv"}
    out = read(case, wide, starts, found).out_tnd.unflatten(0, (2, 4))
    assert torch.equal(out[0], out[1])


def test_cutting_back_to_the_start_of_the_document_gives_the_empty_state_however_far_it_is():
    case = a_case("lse", lengths=(9, 70))
    _, state = in_pieces(case, leaves(case, torch.float64), (), state=initial(case, rewind_rows=2))
    empty, fresh = state.cut_back(70), initial(case, rewind_rows=2)
    for name, tensor in fresh.tensors().items():
        assert torch.equal(empty.tensors()[name], tensor), name


@pytest.mark.parametrize("rows", [-1, 4, 10, 12])
def test_cutting_back_further_than_is_held_is_refused(rows):
    """Ten rows into its second document, with three rows held, of which one is given up before."""
    case = a_case("lse", lengths=(9, 12))
    _, state = in_pieces(case, leaves(case, torch.float64), (), stop=20, state=initial(case, rewind_rows=3))
    assert state.rewindable == 3
    with pytest.raises(StateError, match=r"of its running document it has read 11, and can go back 0 to 3 rows, or 11"):
        state.cut_back(rows)
    with pytest.raises(StateError, match=r"stream 1 cannot go back 1 rows.* create the state with rewind_rows \(now 3"):
        MahaState.stack([state, state.cut_back(3)]).cut_back(1)


def test_the_starts_of_a_piece_are_made_from_host_data():
    case = a_case("lse", lengths=(9, 12))
    _, state = in_pieces(case, leaves(case, torch.float64), (), stop=20)
    both = MahaState.stack([state, initial(case)])
    assert both.document_start(3).tolist() == [-11, -11, -11, 0, 0, 0]
    assert both.document_start(4, [(2,), (1, 3)]).tolist() == [-11, -11, 2, 2, 0, 1, 1, 3]
    assert state.document_start(1, [(0,)]).tolist() == [0]
    lengths = (9, 12, 5)
    assert torch.equal(state.document_start(6, [(1,)]), piece_document_start(start_rows(lengths), 20, 26))
    with pytest.raises(AssertionError, match="at row 3 of a piece of 3"):
        state.document_start(3, [(3,)])


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, -3, -3], r"row 1 of stream 0 is -3: it must be 0 where the document goes on, or 1"),
        ([-4, -4, -4], r"row 0 of stream 0 is -4: it must be -3 .* read 3 rows"),
        ([-3, -3, 1], r"row 2 of stream 0 is 1: it must be -3 where the document goes on, or 2 where a new one"),
        ([3, 3, 3], r"row 0 of stream 0 is 3: it must be -3"),
    ],
)
def test_starts_that_do_not_go_on_where_the_state_ends_are_refused(starts, message):
    case = a_case("lse", lengths=(6,))
    values = leaves(case, torch.float64)
    _, state = in_pieces(case, values, (), stop=3)
    with pytest.raises(StateError, match=message):
        read(case, values, torch.tensor(starts), state, rows=slice(3, 6))


def test_pooled_queries_have_no_state():
    case = a_case("lse", lengths=(6,))
    pooled = dataclasses.replace(case.spec, queries="pooled")
    with pytest.raises(ConfigError, match=r'pooled queries cannot run in pieces: use `queries: "full"`'):
        initial(dataclasses.replace(case, spec=pooled))
    with pytest.raises(ConfigError, match="pooled queries"):
        read(dataclasses.replace(case, spec=pooled), leaves(case, torch.float64), start_rows((6,)), initial(case))


def test_windows_too_narrow_to_hold_the_pending_children_are_refused():
    spec = MahaSpec(ratio=4, windows=(8, 2, 5))
    with pytest.raises(AssertionError, match="window of scale 1 is 2: at least ratio - 1 = 3 entries must be held"):
        initial(Case(lengths=(6,), spec=spec))
    initial(Case(lengths=(6,), spec=MahaSpec(ratio=4, windows=(8, 3, 1))))


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"streams": 4}, torch.float64, "6 rows are not pieces of equal length of 4 streams"),
        ({"g": 2}, torch.float64, r"entries.0 of the state is \(1, 6, 2, 2, 8\), not \(1, 6, 2, 1, 8\)"),
        ({"n": 4}, torch.float64, r"rows of the state is \(1, 4, 6, 8\), not \(1, 4, 4, 8\)"),
        ({}, torch.float32, r"entries.0 of the state is \(torch.float32.*move it with state.to"),
    ],
)
def test_a_state_of_other_sizes_is_refused(options, dtype, message):
    case = a_case("lse", lengths=(6,))
    with pytest.raises(AssertionError, match=message):
        read(case, leaves(case, torch.float64), start_rows((6,)), initial(case, dtype, **options))


@pytest.mark.parametrize("other", ["one scale", "ratio 3, no convolution"])
def test_a_state_of_another_layer_is_refused(other):
    case = a_case("lse", lengths=(6,))
    with pytest.raises(AssertionError, match=r"the state is of another layer: .*its windows are \("):
        read(case, leaves(case, torch.float64), start_rows((6,)), initial(a_case(other)))
    without = dataclasses.replace(case, spec=dataclasses.replace(case.spec, convolution=False))
    with pytest.raises(AssertionError, match="another layer: its convolution is not the layer's, "):
        read(case, leaves(case, torch.float64), start_rows((6,)), initial(without))


def test_no_state_is_returned_where_none_was_given():
    case = a_case("lse", lengths=(6,))
    assert read(case, leaves(case, torch.float64), start_rows((6,)), None).state is None
    assert attend(case, leaves(case, torch.float64), "eager")["out"].shape == (6, 2, 8)

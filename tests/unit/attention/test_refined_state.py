"""Refined layers in pieces: what may still be opened is in the state, and pieces cut anywhere equal one pass."""

import dataclasses
import itertools
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from maha_megatron.attention.spec import MahaSpec, Refinement
from maha_megatron.attention.state import MahaState
from maha_megatron.errors import StateError
from tests.support.attention import Case, assert_close, leaves, results
from tests.unit.attention.test_state import cuts_of, in_pieces, initial, results_in_pieces

TOKENS = Refinement(from_scale=2, to_scale=0, blocks=2)
SPECS = {
    "tokens": MahaSpec(ratio=2, windows=(4, 3, 9), refine=TOKENS),
    "summaries": MahaSpec(
        ratio=2, windows=(4, 3, 9), refine=Refinement(from_scale=2, to_scale=1, blocks=2), key_map=True
    ),
    "gram": MahaSpec(ratio=3, windows=(4, 3, 6), refine=TOKENS, aggregation="nash", coupling="gram"),
    "narrow": MahaSpec(
        ratio=4, windows=(3, 4, 2), refine=Refinement(from_scale=1, to_scale=0, blocks=1), convolution=False
    ),
}
LENGTHS = (40, 1, 52, 9)


def a_case(spec: str, lengths=LENGTHS) -> Case:
    return Case(lengths=lengths, spec=SPECS[spec], n=2, g=1, d=8)


@pytest.mark.parametrize("spec", SPECS)
def test_pieces_cut_anywhere_equal_one_pass_gradients_included(spec):
    case, generator = a_case(spec), random.Random(0)
    expected = results(case, "eager", torch.float64)
    for cuts in (*(cuts_of(sum(LENGTHS), generator, 9) for _ in range(2)), range(58, 80)):
        assert_close(results_in_pieces(case, cuts), expected, 1e-10)


@pytest.mark.parametrize("spec", ["tokens", "summaries"])
def test_both_backends_hand_on_the_same_state(spec):
    case, cuts, states = a_case(spec, (40, 23)), (31, 32, 50), {}
    values = leaves(case, torch.float64)
    found = {backend: in_pieces(case, values, cuts, backend) for backend in ("naive", "eager")}
    assert_close(found["eager"][0], found["naive"][0], 1e-10)
    states = {backend: state.tensors() for backend, (_, state) in found.items()}
    assert_close(states["eager"], states["naive"], 1e-12)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_random_ways_to_cut_random_sequences_equal_one_pass(seed):
    generator = random.Random(seed)
    ratio, scales = generator.choice((2, 3, 4)), generator.randint(2, 4)
    from_scale = generator.randint(1, scales - 1)
    refine = Refinement(
        from_scale=from_scale, to_scale=generator.randrange(from_scale), blocks=generator.choice((1, 3, 50))
    )
    windows = tuple(generator.randint(ratio - 1, 12) for _ in range(scales))
    spec = MahaSpec(ratio=ratio, windows=windows, refine=refine, lse_utility=seed % 2 == 0, convolution=seed % 3 == 0)
    bounds = [0, *cuts_of(700, generator, 5), 700]
    lengths = tuple(end - start for start, end in itertools.pairwise(bounds))
    case = Case(lengths=lengths, spec=spec, n=2, g=1, d=4, seed=seed)
    expected = results(case, "eager", torch.float64)
    for _ in range(5):
        assert_close(results_in_pieces(case, cuts_of(700, generator, 9)), expected, 1e-10)


@pytest.mark.full
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", ["naive", "eager"])
def test_pieces_of_one_row_equal_one_pass(backend, spec):
    case = a_case(spec)
    expected = results(case, "eager", torch.float64)
    assert_close(results_in_pieces(case, range(1, sum(LENGTHS)), backend), expected, 1e-10)


def test_the_state_holds_all_that_rows_to_come_may_open_and_no_more():
    """The children of the blocks that the coarse window spans: as many entries as the sequence has rows, where that
    window spans it. Each of them is read at some offset, by a layer that opens all that it may.
    """
    assert MahaSpec(ratio=4, windows=(128, 112, 256), refine=TOKENS).held_entries == (16 * 257 - 1, 112, 256)
    assert SPECS["tokens"].held_entries == (39, 3, 9)
    assert SPECS["summaries"].held_entries == (4, 19, 9)
    every = dataclasses.replace(SPECS["summaries"], refine=Refinement(from_scale=2, to_scale=1, blocks=99))
    case = dataclasses.replace(a_case("summaries", (90,)), spec=every)
    values, read = {name: value.detach() for name, value in leaves(case, torch.float64).items()}, 0
    for stop in (58, 59, 60, 61):
        _, state = in_pieces(case, values, (), stop=stop)
        entries = tuple(entry.requires_grad_() for entry in state.entries)
        assert entries[1].shape[1] == 19
        found, _ = in_pieces(case, values, (), state=dataclasses.replace(state, entries=entries), first=stop)
        read += torch.autograd.grad(found["out"].sum(), entries[1])[0].abs().sum((0, 2, 3, 4))
    assert (read > 0).all()


def test_a_state_saved_restored_and_cut_back_goes_on_bitwise(tmp_path):
    case = a_case("tokens", (70, 30))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    _, state = in_pieces(case, values, (), stop=60, state=initial(case, rewind_rows=5))
    _, ahead = in_pieces(case, values, (), stop=64, state=state, first=60)
    save_file(ahead.cut_back(4).tensors(), tmp_path / "state.safetensors")
    restored = MahaState.from_tensors(load_file(tmp_path / "state.safetensors"), case.spec)
    expected, _ = in_pieces(case, values, (66,), state=state, first=60)
    found, _ = in_pieces(case, values, (66,), state=restored, first=60)
    assert torch.equal(found["out"], expected["out"])


def test_a_state_goes_on_under_the_same_refinement_only_but_any_number_of_blocks():
    case = a_case("tokens")
    tensors = initial(case).tensors()
    more = dataclasses.replace(case.spec, refine=dataclasses.replace(TOKENS, blocks=7))
    assert MahaState.from_tensors(tensors, more).held == (39, 3, 9)
    for other in (None, dataclasses.replace(TOKENS, from_scale=1)):
        with pytest.raises(StateError, match="its refinement is not the layer's, "):
            MahaState.from_tensors(tensors, dataclasses.replace(case.spec, refine=other))
    plain = dataclasses.replace(case, spec=dataclasses.replace(case.spec, refine=None))
    with pytest.raises(StateError, match="its refinement is not the layer's, Refinement"):
        MahaState.from_tensors(initial(plain).tensors(), case.spec)

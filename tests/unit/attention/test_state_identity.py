"""A state goes on only under the operator that made it: what it says of that, saved and in memory."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from maha_megatron.attention.spec import MahaSpec
from maha_megatron.attention.state import MahaState, check_state
from maha_megatron.errors import StateError

SPEC = MahaSpec(ratio=4, windows=(6, 5, 12))
PINNED = [4, 2320954218, 1375746931, 2943028995, 4239699671, 2792775666, 6, 5, 12]


def initial(spec: MahaSpec = SPEC) -> MahaState:
    return MahaState.initial(spec, streams=1, n=4, g=2, d=8, dtype=torch.float32)


def test_a_state_of_other_windows_is_refused():
    tensors = initial().tensors()
    for windows in ((6, 5, 13), (7, 5, 12), (6, 5), (6, 5, 12, 1)):
        with pytest.raises(StateError, match=re.escape(f"its windows are (6, 5, 12), the layer's {windows}")):
            MahaState.from_tensors(tensors, MahaSpec(ratio=4, windows=windows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 2}, "its ratio is 4, the layer's 2"),
        ({"downsampling": "mean"}, "its downsampling is not the layer's, mean"),
        ({"key_map": True}, "its key_map is not the layer's, True"),
        ({"rope_base": 500000.0}, "its rope_base is not the layer's, 500000.0"),
        ({"rope_unit": "token"}, "its rope_unit is not the layer's, token"),
        ({"norm_epsilon": 1e-5}, "its norm_epsilon is not"),
        ({"convolution": False}, "its convolution is not the layer's, False"),
        ({"ratio": 3, "downsampling": "max"}, "its ratio is 4, the layer's 3; its downsampling is not"),
    ],
    ids=str,
)
def test_a_state_of_the_same_shapes_but_another_meaning_is_refused(options, message, tmp_path):
    """Shapes alone would fit, but for the convolution's."""
    state = initial()
    save_file(state.tensors(), tmp_path / "state.safetensors")
    other = dataclasses.replace(SPEC, **options)
    with pytest.raises(StateError, match=f"this state is not of this layer: {message}"):
        MahaState.from_tensors(load_file(tmp_path / "state.safetensors"), other)
    with pytest.raises(AssertionError, match=message):
        check_state(state, other, torch.zeros(4, 4, 8), torch.zeros(4, 2, 8))


def test_what_only_reads_a_state_may_change_and_equal_numbers_are_equal():
    tensors = initial().tensors()
    for options in ({"lse_utility": False}, {"aggregation": "nash", "coupling": "gram"}, {"rope_base": 10000}):
        MahaState.from_tensors(tensors, dataclasses.replace(SPEC, **options))


def test_a_saved_state_says_its_operator_by_numbers_that_never_change():
    """Pinned: files written today are read by later versions, on any machine."""
    saved = initial().tensors()["operator"]
    assert saved.dtype == torch.int64
    assert saved.tolist() == PINNED
    for tensors in ({}, {"operator": saved[:0]}, {"operator": saved[:3]}):
        whole = {name: tensor for name, tensor in initial().tensors().items() if name != "operator"}
        with pytest.raises(StateError, match="restore it with the spec that it was saved under"):
            MahaState.from_tensors(whole | tensors, SPEC)

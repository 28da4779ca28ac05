"""Kernels as operators of torch: schema, fake tensors, autograd, torch.compile and recomputation, interpreted."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.convolution import triton as convolution
from maha_megatron.attention.decode import triton as decode
from maha_megatron.attention.pyramid import triton as pyramid
from maha_megatron.attention.scale_attention import triton, triton_ops, triton_scales_ops
from maha_megatron.attention.scale_attention.triton_tuning import (
    GroupTiles,
    KeyGroupTiles,
    Tiles,
    Tuning,
    numbers_of,
    tuning_of,
)
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState
from tests.support.attention import Case, documents_of, leaves, parameter_specs

SPEC = MahaSpec(ratio=4, windows=(9, 5))
CASE = Case(lengths=(6, 11), n=2, g=1, d=32, spec=SPEC)
TILES = Tiles(rows=32, keys=16)
SMALL = Tuning(keys=TILES, forward=TILES, query_gradient=TILES, key_gradient=TILES)


def attention_inputs(with_weights: bool, utilities: bool = True, apart: bool = False) -> tuple:
    values = leaves(CASE, torch.float32, DEVICE)
    start_t = documents_of(CASE, DEVICE).start_t
    keys, levels = values["k"], [values["v"]]
    coarse = [torch.randn(5, 1, 32, device=DEVICE).requires_grad_() for _ in range(2)]
    learned = [values[name] for name in ("utility_query", "utility_bias")] if utilities else [None, None]
    gains = [values[name] for name in ("query_gain", "key_gain")]
    numbers = (4, [9, 5], [0, 0], 10000.0, "block", 1e-6, apart, with_weights, numbers_of(SMALL))
    return (values["q"], *gains, *learned, start_t, [keys, coarse[0]], [*levels, coarse[1]], *numbers)


def convolution_inputs(past: bool) -> tuple:
    values = leaves(CASE, torch.float32, DEVICE)
    rows = torch.randn(4, CASE.n + 2 * CASE.g, CASE.d, device=DEVICE).requires_grad_() if past else None
    return *(values[name] for name in "qkv"), rows, documents_of(CASE, DEVICE).start_t, values["convolution"], 2


def decoding_inputs(spec: MahaSpec, with_weights: bool) -> tuple:
    """Two streams in one document each, one of them at its start."""
    case = Case(lengths=(2,), n=2, g=1, d=32, spec=spec)
    values = {name: value.detach() for name, value in leaves(case, torch.float32, DEVICE).items()}
    state = MahaState.initial(spec, streams=2, n=2, g=1, d=32, dtype=torch.float32, device=DEVICE)
    of_state = (list(state.entries), state.rows, state.offset + torch.tensor([5, 0], device=DEVICE), state.rewindable)
    starts = torch.tensor([-5, 0], device=DEVICE)
    pyramid_learned = [values[name] for name in ("gate_query", "gate_bias") if name in values]
    names = ("query_gain", "key_gain", "utility_query", "utility_bias")
    learned = (values.get("convolution"), pyramid_learned, *(values.get(name) for name in names))
    numbers = ("gated", spec.ratio, list(spec.windows), spec.rope_base, spec.rope_unit, spec.norm_epsilon)
    return [values[name] for name in "qkv"], starts, *of_state, *learned, *numbers, with_weights


def pyramid_inputs(downsampling: str, past: bool) -> tuple:
    case = Case(lengths=(6, 11), n=1, g=1, d=32, spec=MahaSpec(ratio=4, windows=(3, 2), downsampling=downsampling))
    values = {name: value.detach() for name, value in leaves(case, torch.float32, DEVICE).items()}
    learned = [values[name] for name in ("gate_query", "gate_bias", "pool_kernel") if name in values]
    rows = [torch.cat((values[name][:3], values[name])) if past else values[name] for name in "kv"]
    older = [torch.randn(2, 1, 32, device=DEVICE) for _ in range(2)] if past else []
    past_slots = [3, 2] if past else [0, 0]
    return *rows, documents_of(case, DEVICE).start_t, learned, older, downsampling, 4, past_slots


@pytest.mark.parametrize(
    ("asked", "utilities", "apart"),
    [
        (True, True, False),
        (True, True, True),
        pytest.param(False, True, False, marks=pytest.mark.full),
        pytest.param(True, False, False, marks=pytest.mark.full),
        pytest.param(False, False, True, marks=pytest.mark.full),
    ],
)
def test_joint_attention_is_a_well_formed_operator(asked, utilities, apart):
    torch.library.opcheck(triton_ops.joint_attention, attention_inputs(asked, utilities, apart))


@pytest.mark.parametrize("apart", [False, True])
def test_the_backward_of_joint_attention_is_a_well_formed_operator(apart):
    *inputs, _, tiles = attention_inputs(True, apart=apart)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    inputs[6:8] = [[x.detach() for x in level] for level in inputs[6:8]]
    *kept, _ = triton_ops.joint_attention(*inputs, True, tiles)
    torch.library.opcheck(triton_ops.joint_attention_backward, (torch.ones_like(kept[0]), *kept, *inputs, tiles))


@pytest.mark.parametrize("past", [False, pytest.param(True, marks=pytest.mark.full)], ids=["whole", "piece"])
def test_the_convolution_is_made_of_well_formed_operators(past):
    inputs = convolution_inputs(past)
    torch.library.opcheck(convolution.convolve_rows, inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    grads = [torch.ones_like(x) for x in inputs[:3]]
    torch.library.opcheck(convolution.convolve_rows_backward, (grads, *inputs))


def scales_inputs(utilities: bool = True) -> tuple:
    """As of joint attention, but for whether scales are apart and weights asked for."""
    *inputs, _, _, tiles = attention_inputs(False, utilities)
    return *inputs, tiles


@pytest.mark.parametrize("utilities", [True, pytest.param(False, marks=pytest.mark.full)])
def test_attention_of_every_scale_is_a_well_formed_operator(utilities):
    torch.library.opcheck(triton_scales_ops.scales_attention, scales_inputs(utilities))


def test_the_backward_of_every_scale_is_a_well_formed_operator():
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in scales_inputs()]
    inputs[6:8] = [[x.detach() for x in level] for level in inputs[6:8]]
    outs, lses, utilities = triton_scales_ops.scales_attention(*inputs)
    grads = [torch.ones_like(x) for x in (outs, lses, utilities)]
    torch.library.opcheck(triton_scales_ops.scales_attention_backward, (*grads, outs, lses, *inputs))


@pytest.mark.parametrize("past", [False, True], ids=["whole", "piece"])
@pytest.mark.parametrize("downsampling", ["gated", pytest.param("max", marks=pytest.mark.full)])
def test_the_pyramid_is_made_of_well_formed_operators(downsampling, past):
    inputs = pyramid_inputs(downsampling, past)
    torch.library.opcheck(pyramid.pool_levels, inputs)
    keys, values, start_t, learned, _, *numbers = inputs
    grads = [torch.ones_like(x) for x in (keys, values, *pyramid.pool_levels(*inputs))]
    torch.library.opcheck(pyramid.pool_levels_backward, (grads, start_t, learned, [keys, values], *numbers))


@pytest.mark.parametrize(
    ("spec", "with_weights"),
    [
        (SPEC, True),
        pytest.param(MahaSpec(ratio=4, windows=(9,), convolution=False), False, marks=pytest.mark.full),
    ],
    ids=["default", "one scale"],
)
def test_a_decoding_step_is_a_well_formed_operator(spec, with_weights):
    torch.library.opcheck(decode.advance_streams, decoding_inputs(spec, with_weights))


def whole(values: dict[str, torch.Tensor], start_t: torch.Tensor) -> torch.Tensor:
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(CASE)})
    q, *rows = convolution.convolve(*(values[name] for name in "qkv"), start_t, parameters.convolution)
    levels = pyramid.build_pyramid(tuple(rows), start_t, parameters, SPEC)
    return triton.attend(q, levels, start_t, parameters, SPEC, with_weights=False).out_tnd


@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_the_whole_operator_compiled_and_recomputed_is_the_same(how):
    """Compiled as one graph."""
    values, start_t = leaves(CASE, torch.float32, DEVICE), documents_of(CASE, DEVICE).start_t
    if how == "compiled":
        out = torch.compile(whole, backend="aot_eager", fullgraph=True)(values, start_t)
    else:
        out = checkpoint(whole, values, start_t, use_reentrant=False)
    expected = whole(values, start_t)
    assert torch.equal(out, expected)
    wrt = list(values.values())
    grads, wanted = (torch.autograd.grad(x.sum(), wrt, materialize_grads=True) for x in (out, expected))
    assert all(torch.equal(x, y) for x, y in zip(grads, wanted, strict=True))


def test_a_tuning_is_the_same_after_a_list_of_numbers():
    tuning = Tuning(forward=Tiles(rows=16, heads=2, registers=168), key_gradient=Tiles(stages=3))
    assert tuning_of(numbers_of(tuning)) == tuning
    tuning = dataclasses.replace(tuning, groups=GroupTiles(heads=1, stages=3))
    assert tuning_of(numbers_of(tuning)) == tuning
    tuning = dataclasses.replace(tuning, key_groups=KeyGroupTiles(stages=2))
    assert tuning_of(numbers_of(tuning)) == tuning

"""A whole sequence by kernels as one operator: equal to the reference, well formed, and keeping what dense keeps."""

import dataclasses

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention import triton_sequence
from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.scale_attention.triton_tuning import Tiles, Tuning, numbers_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from tests.support.attention import Case, documents_of, leaves, parameter_specs

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SPEC = MahaSpec(ratio=4, windows=(24, 9, 6), convolution=False)
CASE = Case(lengths=(13, 1, 7, 30), n=4, g=2, d=32, spec=SPEC)
TILES = Tiles(rows=32, keys=16)
SMALL = Tuning(keys=TILES, forward=TILES, query_gradient=TILES, key_gradient=TILES, programs=1)
CASES = {
    "gated": CASE,
    "conv": dataclasses.replace(CASE, spec=dataclasses.replace(SPEC, downsampling="conv")),
    "no LSE": dataclasses.replace(CASE, spec=dataclasses.replace(SPEC, lse_utility=False)),
    "equal weights": dataclasses.replace(CASE, spec=dataclasses.replace(SPEC, aggregation="mean")),
    "one scale": dataclasses.replace(CASE, spec=dataclasses.replace(SPEC, windows=(17,))),
}


def found(case: Case, values: dict[str, torch.Tensor], attend) -> dict[str, torch.Tensor]:
    """Output, weights and every gradient by name, by `attend` from raw q, k and v."""
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    start_t = documents_of(case, values["q"].device).start_t
    out, weights = attend(values["q"], values["k"], values["v"], start_t, parameters, case.spec)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(values.values()), direction, materialize_grads=True)
    named = zip(values, grads, strict=True)
    return {"out": out, "weights": weights} | {f"gradient of {name}": x.detach() for name, x in named}


def by_kernels(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
    attended = triton_sequence.attend_sequence(*inputs, with_weights=True, tuning=SMALL)
    return attended.out_tnd, attended.weights_tnl


def by_reference(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
    output = maha_attention(*inputs, backend="naive", with_weights=True)
    return output.out_tnd, output.scale_weights_tnl


@pytest.mark.parametrize("name", CASES)
def test_every_output_and_gradient_equals_the_reference(name):
    case = CASES[name]
    ours = found(case, leaves(case, torch.float32, DEVICE), by_kernels)
    exact = {key: value.detach().double().requires_grad_() for key, value in leaves(case, torch.float32).items()}
    for key, value in found(case, exact, by_reference).items():
        torch.testing.assert_close(ours[key].double().cpu(), value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def operator_inputs(apart: bool) -> tuple:
    case = Case(lengths=(6, 11), n=2, g=1, d=32, spec=dataclasses.replace(SPEC, windows=(9, 5)))
    values = leaves(case, torch.float32, DEVICE)
    learned = [values["gate_query"], values["gate_bias"]]
    tensors = (*(values[name] for name in "qkv"), documents_of(case, DEVICE).start_t, learned)
    names = ("query_gain", "key_gain", "utility_query", "utility_bias")
    numbers = ("gated", 4, [9, 5], SPEC.rope_base, SPEC.rope_unit, SPEC.norm_epsilon, apart, True, numbers_of(SMALL))
    return *tensors, *(values[name] for name in names), *numbers


@pytest.mark.parametrize("apart", [False, True])
def test_it_is_made_of_well_formed_operators(apart):
    inputs = operator_inputs(apart)
    torch.library.opcheck(triton_sequence.sequence_attention, inputs)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    inputs[4] = [x.detach() for x in inputs[4]]
    *kept, _ = triton_sequence.sequence_attention(*inputs)
    *tensors_and_numbers, _, tiles = inputs
    given = (torch.ones_like(kept[0]), *kept, *tensors_and_numbers, tiles)
    torch.library.opcheck(triton_sequence.sequence_attention_backward, given)


@pytest.mark.parametrize(("lse_utility", "numbers"), [(True, 1), (False, 1 + SPEC.scales)])
def test_backward_keeps_no_level(lse_utility, numbers):
    """q, k, v, the output and one number per row and head, without LSE one more a scale; learned tensors aside, which
    are there anyway.
    """
    spec = dataclasses.replace(SPEC, lse_utility=lse_utility)
    values, start_t = leaves(CASE, torch.bfloat16, DEVICE), documents_of(CASE, DEVICE).start_t
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(CASE)})
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rows = (values["q"], values["k"], values["v"], start_t)
        out = maha_attention(*rows, parameters, spec, backend="triton").out_tnd
    for name in parameter_specs(CASE):
        kept.pop(values[name].untyped_storage().data_ptr(), None)
    kept.pop(start_t.untyped_storage().data_ptr(), None)
    dense = sum(x.nbytes for x in (*rows[:3], out)) + 4 * numbers * out.shape[0] * out.shape[1]
    assert sum(kept.values()) == dense

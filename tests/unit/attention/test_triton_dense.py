"""Dense attention with queries and keys turned by a kernel: every output and gradient by name, in Triton's interpreter.

Gains are random, documents begin and end within tiles of rows.
"""

import functools
import logging

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.dense import triton
from maha_megatron.attention.spec import DenseSpec
from tests.support.attention import PACKED, Case, attend, leaves, start_rows

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHORT = (13, 1, 7, 30, 3, 9)
CASES = [
    pytest.param(Case(lengths=(1,), n=1, g=1, d=32, spec=DenseSpec(qk_norm=True)), id="one row"),
    pytest.param(Case(lengths=SHORT, n=4, g=2, d=32, spec=DenseSpec(qk_norm=True)), id="packed"),
    pytest.param(Case(lengths=SHORT, n=3, g=1, d=64, spec=DenseSpec(qk_norm=False)), id="no norm"),
    pytest.param(Case(lengths=(70,), n=2, g=2, d=128, spec=DenseSpec(qk_norm=True)), id="wide"),
    pytest.param(Case(lengths=PACKED, n=4, g=2, d=32, spec=DenseSpec(qk_norm=True)), id="long", marks=pytest.mark.full),
]


def run(case: Case, values: dict[str, torch.Tensor], backend: str) -> dict[str, torch.Tensor]:
    """Output and, under a random direction, the gradient of every leaf, by name."""
    out = attend(case, values, backend)["out"]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(values.values()), direction)
    found = {"out": out} | {f"grad of {name}": grad for name, grad in zip(values, grads, strict=True)}
    return {name: x.detach().cpu() for name, x in found.items()}


@functools.cache
def exact(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the naive backend in fp64, of leaves that `dtype` holds."""
    values = {name: value.detach().double() for name, value in leaves(case, dtype).items()}
    return run(case, {name: x.requires_grad_() for name, x in values.items()}, "naive")


def errors(found, expected) -> dict[str, float]:
    """The norm of each difference over that of what is expected, or 0.1: a row that sees one key has no gradient."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp(min=0.1)).item()
        for name, value in expected.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_every_output_and_gradient_in_fp32_equals_the_reference(case):
    found = errors(run(case, leaves(case, torch.float32, DEVICE), "triton"), exact(case, torch.float32))
    assert {name: error for name, error in found.items() if not error <= 3e-6} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[1:3])
def test_in_16_bit_at_most_twice_as_far_from_exact_as_plain_torch(case, dtype):
    expected = exact(case, dtype)
    plain = errors(run(case, leaves(case, dtype), "eager"), expected)
    found = errors(run(case, leaves(case, dtype, DEVICE), "triton"), expected)
    assert {name: error for name, error in found.items() if not error <= 2 * plain[name]} == {}, plain


def test_views_of_a_fused_projection_are_read_as_they_lie():
    case = CASES[1].values[0]
    values, starts = leaves(case, torch.float32, DEVICE), start_rows(case.lengths).to(DEVICE)
    q, k, gains = values["q"].detach(), values["k"].detach(), (values["query_gain"], values["key_gain"])
    fused = torch.cat((q, k), dim=1)
    views = fused.split((case.n, case.g), dim=1)
    call = triton.Call(*views, *gains, starts, 1e4, 1e-6)
    assert [x.data_ptr() for x in call.x] == [x.data_ptr() for x in views]
    found, expected = call.forward(), triton.Call(q, k, *gains, starts, 1e4, 1e-6).forward()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES[1:3])
def test_it_is_made_of_well_formed_operators(case):
    values, starts = leaves(case, torch.float32, DEVICE), start_rows(case.lengths).to(DEVICE)
    gains = [values.get(name) for name in ("query_gain", "key_gain")]
    given = [x if x is None else x.detach() for x in (values["q"], values["k"], *gains)]
    arguments = (*given, starts, 1e4, 1e-6)
    torch.library.opcheck(triton.turn_heads, arguments)
    torch.library.opcheck(triton.turn_heads_backward, (given[0], given[1], *arguments))


def test_heads_that_no_kernel_serves_are_eagers_and_it_is_said_once(caplog):
    triton._say_once.cache_clear()
    caplog.set_level(logging.INFO, logger=triton.__name__)
    case = Case(lengths=(9,), n=2, g=1, d=16, spec=DenseSpec(qk_norm=True))
    for _ in range(2):
        found = run(case, leaves(case, torch.float32, DEVICE), "triton")
    assert max(errors(found, exact(case, torch.float32)).values()) < 3e-6
    said = [record.getMessage() for record in caplog.records if record.name == triton.__name__]
    assert said == ["normalisation and rotation of dense attention: no kernel serves heads of 16 channels; eager does"]

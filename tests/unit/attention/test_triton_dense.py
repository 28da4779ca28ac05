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
from tests.support.attention import PACKED, Case, attend, errors, exact_leaves, leaves, start_rows

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
    return run(case, exact_leaves(case, dtype), "naive")


@pytest.mark.parametrize("case", CASES)
def test_every_output_and_gradient_in_fp32_equals_the_reference(case):
    """On a GPU within twice of what eager's own operations leave there: its attention rounds where one key is seen."""
    plain, found = (run(case, leaves(case, torch.float32, DEVICE), backend) for backend in ("eager", "triton"))
    expected = exact(case, torch.float32)
    bounds = {name: max(3e-6, 2 * error * (DEVICE == "cuda")) for name, error in errors(plain, expected).items()}
    assert {name: error for name, error in errors(found, expected).items() if not error <= bounds[name]} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[1:3])
def test_in_16_bit_at_most_twice_as_far_from_exact_as_plain_torch(case, dtype):
    expected = exact(case, dtype)
    plain = errors(run(case, leaves(case, dtype), "eager"), expected)
    found = errors(run(case, leaves(case, dtype, DEVICE), "triton"), expected)
    assert {name: error for name, error in found.items() if not error <= 2 * plain[name]} == {}, plain


def fused(q, k):
    return torch.cat((q, k), dim=1).split((q.shape[1], k.shape[1]), dim=1)


def heads_outermost(q, k):
    return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]


def channels_apart(q, k):
    return [torch.stack((x, x), dim=-1)[..., 0] for x in (q, k)]


@pytest.mark.parametrize(("lay", "copied"), [(fused, False), (heads_outermost, False), (channels_apart, True)])
def test_views_give_what_their_copies_give(lay, copied):
    case = CASES[1].values[0]
    values, starts = leaves(case, torch.float32, DEVICE), start_rows(case.lengths).to(DEVICE)
    q, k, *gains = (values[name].detach() for name in ("q", "k", "query_gain", "key_gain"))
    views = lay(q, k)
    call, expected = (triton.Call(*x, *gains, starts, 1e4, 1e-6) for x in (views, (q, k)))
    assert [x.data_ptr() != view.data_ptr() for x, view in zip(call.x, views, strict=True)] == [copied] * 2
    found = [*call.forward(), *call.backward(lay(k.repeat(1, 2, 1), q[:, :2]))]
    expected = [*expected.forward(), *expected.backward((k.repeat(1, 2, 1), q[:, :2]))]
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

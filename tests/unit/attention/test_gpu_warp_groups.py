"""On Hopper cards, kernels by warp groups: beside the portable ones, plain torch and attention in double precision."""

import dataclasses
import itertools

import pytest
import torch

from maha_megatron.attention.scale_attention.eager import attend
from maha_megatron.attention.scale_attention.eager_scales import attend_scales
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import slot_count, stride
from tests.support.attention import Case, assert_within_twice_of_plain

triton_joint = pytest.importorskip("maha_megatron.attention.scale_attention.triton_joint")
triton_scales = pytest.importorskip("maha_megatron.attention.scale_attention.triton_scales")
tuning_for = pytest.importorskip("maha_megatron.attention.scale_attention.triton_tuning").tuning_for

pytestmark = pytest.mark.gpu

SPEC = MahaSpec(ratio=4, windows=(128, 112, 124, 64), convolution=False)
SMALL = MahaSpec(ratio=4, windows=(64, 32, 16))
CASES = [
    Case(lengths=(150, 1, 211), n=4, g=4, d=128, spec=SMALL),
    Case(lengths=(150, 1, 211), n=6, g=2, d=128, spec=MahaSpec(ratio=3, windows=(70, 30, 10))),
    Case(lengths=(300, 77), n=4, g=2, d=64, spec=dataclasses.replace(SMALL, lse_utility=False)),
    Case(lengths=(300, 77), n=4, g=2, d=128, spec=dataclasses.replace(SMALL, aggregation="nash", coupling="gram")),
    Case(lengths=(333,), n=4, g=1, d=64, spec=MahaSpec(ratio=2, windows=(100,))),
    Case(lengths=(150, 1, 211), n=6, g=2, d=128, spec=dataclasses.replace(SMALL, rope_unit="token")),
    Case(lengths=(300, 77), n=4, g=2, d=64, spec=dataclasses.replace(SMALL, rope_unit="token", coupling="gram")),
    Case(lengths=(300, 77), n=4, g=2, d=64, spec=dataclasses.replace(SMALL, rope_unit="token")),
    Case(lengths=(211, 150), n=4, g=4, d=128, spec=dataclasses.replace(SMALL, rope_unit="token", coupling="gram")),
]
FLOOR = {torch.bfloat16: 2**-8, torch.float16: 2**-10}
LENGTHS = {
    "uniform": (4096,) * 4,
    "packed": (901, 60, 1, 700, 64, 128, 1147),
    "one": (1991,),
    "a few rows": (5,),
}


JOINT = {"one softmax": triton_joint.Call, "weighed by utilities": triton_joint.WeighedCall}
KINDS = (*JOINT, "scale by scale")
HEADS = [
    (kind, n, g, dtype)
    for kind, (n, g), dtype in itertools.product(KINDS, [(16, 16), (8, 4), (8, 2)], [torch.bfloat16, torch.float16])
    # of the kinds that share everything but a scale's end with the first, one dtype each
    if kind == KINDS[0] or (n, g, dtype) in [(16, 16, torch.bfloat16), (8, 2, torch.float16)]
]
HEADS_OF_GRADIENTS = [
    (*one, rope_unit)
    for one, rope_unit in itertools.product(HEADS, ["block", "token"])
    if one[0] in JOINT and one[1:3] != (8, 4)
    if rope_unit == "block" or one[1:] in [(16, 16, torch.bfloat16), (8, 2, torch.float16)]
]


@pytest.mark.parametrize(("kind", "n", "g", "dtype"), HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("unit", ["block", "token"])
def test_warp_groups_are_as_near_to_exact_as_the_portable_kernel(unit, kind, width, n, g, lengths, dtype):
    """Every row, also of tiles after a scale's first, where operands in registers were once lost. Queries turn anew for
    every scale, and once for all.
    """
    tuning = tuning_for(2, torch.cuda.get_device_capability())
    if tuning.groups is None:
        pytest.skip("the table has no warp groups for this card")
    spec, inputs, found = dataclasses.replace(SPEC, rope_unit=unit), _inputs(width, n, g, lengths, dtype), []
    for groups in (None, tuning.groups):
        own = dataclasses.replace(tuning, groups=groups)
        found.append(_forward(kind, spec, *inputs, own))
        assert all(map(torch.equal, found[-1], _forward(kind, spec, *inputs, own)))
    (plain, *plain_numbers), (out, *numbers) = found
    exact = _exact(kind, spec, *inputs)
    norms = exact.norm(dim=-1)
    feasible = norms > 0
    worst, allowed = (((x.double() - exact).norm(dim=-1) / norms)[feasible] for x in (out, plain))
    assert worst.max() < 2 * allowed.max() + 1e-3
    assert (out[~feasible] == 0).all()
    for x, expected in zip(numbers, plain_numbers, strict=True):  # -inf where a scale is infeasible
        torch.testing.assert_close(x, expected, rtol=0, atol=0.1)


def _forward(kind: str, spec: MahaSpec, q, levels, start, parameters, tuning) -> list[torch.Tensor]:
    """Output, and what else the kernel writes."""
    learned = (parameters.query_gain, parameters.key_gain, parameters.utility_query, parameters.utility_bias)
    given = (q, *learned, start, spec, (0,) * spec.scales, tuning, levels)
    if kind == "scale by scale":
        return list(triton_scales.Call(*given).forward())
    return [x for x in JOINT[kind](*given).forward(True) if x is not None]


def _exact(kind: str, spec: MahaSpec, q, levels, start, parameters) -> torch.Tensor:
    """The output by plain torch in fp64."""
    double = AttentionParameters(**{name: x.double() for name, x in vars(parameters).items() if x is not None})
    given = (q.double(), [tuple(x.double() for x in level) for level in levels], start, double)
    if kind == "scale by scale":
        return attend_scales(*given, spec, (0,) * spec.scales)[0]
    return attend(*given, dataclasses.replace(spec, lse_utility=kind == "one softmax")).out_tnd


@pytest.mark.parametrize(("kind", "n", "g", "dtype", "rope_unit"), HEADS_OF_GRADIENTS, ids=str)
@pytest.mark.parametrize("offset", [0, 777], ids=["", "after a past"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("width", [64, 128])
def test_gradients_are_at_most_twice_as_far_from_exact_as_plain_torch(
    kind, width, n, g, lengths, offset, dtype, rope_unit
):
    """In the same dtype. Tiles of keys that one program has, and several, of one document and more; the first begins
    before row 0.
    """
    tuning = tuning_for(2, torch.cuda.get_device_capability())
    if tuning.key_groups is None:
        pytest.skip("the table has no warp groups for this card")
    past_slots = SPEC.windows if offset else (0,) * SPEC.scales
    q, levels, start, parameters = _inputs(width, n, g, lengths, dtype, past_slots)
    start = torch.where(start == 0, -offset, start)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).cuda().to(dtype)
    spec = dataclasses.replace(SPEC, lse_utility=kind == "one softmax", rope_unit=rope_unit)
    given = (q, levels, parameters, start, past_slots, grad_out, spec)
    exact, plain = (_plain_gradients(*given, own) for own in (torch.float64, dtype))
    learned = (parameters.query_gain, parameters.key_gain, parameters.utility_query, parameters.utility_bias)
    call = JOINT[kind](q, *learned, start, spec, past_slots, tuning, levels)
    made = call.made_by_key_gradients(call.raw_keys, call.values)
    launch = call.key_gradients(call.prepared_keys(), grad_out, call.made_by_query_gradients(), made)
    assert launch.kernel.is_gluon()
    out, lse, _, own_lse = call.forward(False)
    found, again = (_named(*call.backward(grad_out, out, lse, own_lse)) for _ in range(2))
    assert found.keys() == exact.keys() == plain.keys()
    assert [name for name in found if not torch.equal(found[name], again[name])] == []
    errors = {}
    for name, expected in exact.items():
        norm = expected.norm().clamp(min=0.1)
        error, allowed = ((x[name].double() - expected).norm() / norm for x in (found, plain))
        if not error <= 2 * allowed + FLOOR[dtype]:
            errors[name] = (error.item(), allowed.item())
    assert errors == {}


def _plain_gradients(
    q, levels, parameters, start, past_slots, grad_out, spec: MahaSpec, kind: torch.dtype
) -> dict[str, torch.Tensor]:
    """By eager, of inputs in `kind`; what is learned is in fp32 at least."""
    leaves = [x.detach().to(kind).clone().requires_grad_() for x in (q, *(x for level in levels for x in level))]
    names = ("query_gain", "key_gain", "utility_query", "utility_bias")
    at_least = torch.promote_types(kind, torch.float32)
    learned = [getattr(parameters, name).detach().to(at_least).clone().requires_grad_() for name in names]
    own_levels = list(zip(leaves[1::2], leaves[2::2], strict=True))
    own_parameters = AttentionParameters(**dict(zip(names, learned, strict=True)))
    out = attend(leaves[0], own_levels, start, own_parameters, spec, past_slots).out_tnd
    grads = torch.autograd.grad(out, [*leaves, *learned], grad_out.to(kind))
    return _named(grads[0], grads[len(leaves) :], grads[1 : len(leaves) : 2], grads[2 : len(leaves) : 2])


def _named(grad_q, learned, grad_keys, grad_values) -> dict[str, torch.Tensor]:
    names = ("query_gain", "key_gain", "utility_query", "utility_bias")
    return (
        {"q": grad_q}
        | dict(zip(names, learned, strict=True))
        | {f"keys {scale}": grad for scale, grad in enumerate(grad_keys)}
        | {f"values {scale}": grad for scale, grad in enumerate(grad_values)}
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_whole_operator_is_at_most_twice_as_far_from_naive_as_plain_torch_in_the_dtype(case):
    """Every aggregation's own way to the keys' gradients; the reference is the definition, in double precision."""
    assert_within_twice_of_plain(case, "triton", torch.bfloat16, "cuda")


def _inputs(width: int, n: int, g: int, lengths: tuple[int, ...], dtype: torch.dtype, past_slots=(0,) * SPEC.scales):
    """Queries, keys and values of every scale after a past of so many slots, where documents begin, and parameters."""
    torch.manual_seed(3)
    rows = sum(lengths)
    first = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    start = first.repeat_interleave(torch.tensor(lengths)).cuda()
    both = torch.randn(rows, n + 2 * g, width, device="cuda").to(dtype)  # q, k and v as one projection writes them
    levels = [] if past_slots[0] else [(both[:, n : n + g], both[:, n + g :])]
    for scale in range(len(levels), SPEC.scales):
        entries = past_slots[scale] + slot_count(rows, stride(SPEC.ratio, scale))
        levels.append(tuple(torch.randn(entries, g, width, device="cuda").to(dtype) for _ in range(2)))
    parameters = AttentionParameters(
        query_gain=1 + 0.3 * torch.randn(n, width, device="cuda"),
        key_gain=1 + 0.3 * torch.randn(g, width, device="cuda"),
        utility_query=0.1 * torch.randn(SPEC.scales, n, width, device="cuda"),
        utility_bias=torch.randn(SPEC.scales, n, device="cuda"),
    )
    return both[:, :n], levels, start, parameters

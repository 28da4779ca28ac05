"""On Hopper cards, the forward by warp groups: beside the portable kernels and attention in double precision."""

import dataclasses
import itertools

import pytest
import torch

from maha_megatron.attention.scale_attention.eager import attend
from maha_megatron.attention.scale_attention.eager_scales import attend_scales
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import slot_count, stride

triton_joint = pytest.importorskip("maha_megatron.attention.scale_attention.triton_joint")
triton_scales = pytest.importorskip("maha_megatron.attention.scale_attention.triton_scales")
tuning_for = pytest.importorskip("maha_megatron.attention.scale_attention.triton_tuning").tuning_for

pytestmark = pytest.mark.gpu

SPEC = MahaSpec(ratio=4, windows=(128, 112, 124, 64), convolution=False)
LENGTHS = {
    "uniform": (4096,) * 4,
    "packed": (901, 60, 1, 700, 64, 128, 1147),
    "one": (1991,),
    "a few rows": (5,),
}


KINDS = ("one softmax", "weighed by utilities", "scale by scale")
HEADS = [
    (kind, n, g, dtype)
    for kind, (n, g), dtype in itertools.product(KINDS, [(16, 16), (8, 4), (8, 2)], [torch.bfloat16, torch.float16])
    # of the kinds that share everything but a scale's end with the first, one dtype each
    if kind == KINDS[0] or (n, g, dtype) in [(16, 16, torch.bfloat16), (8, 2, torch.float16)]
]


@pytest.mark.parametrize(("kind", "n", "g", "dtype"), HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("width", [64, 128])
def test_warp_groups_are_as_near_to_exact_as_the_portable_kernel(kind, width, n, g, lengths, dtype):
    """Every row, also of tiles after a scale's first, where operands in registers were once lost."""
    tuning = tuning_for(2, torch.cuda.get_device_capability())
    if tuning.groups is None:
        pytest.skip("the table has no warp groups for this card")
    inputs = _inputs(width, n, g, lengths, dtype)
    found = []
    for groups in (None, tuning.groups):
        own = dataclasses.replace(tuning, groups=groups)
        found.append(_forward(kind, *inputs, own))
        assert all(map(torch.equal, found[-1], _forward(kind, *inputs, own)))
    (plain, *plain_numbers), (out, *numbers) = found
    exact = _exact(kind, *inputs)
    norms = exact.norm(dim=-1)
    feasible = norms > 0
    worst, allowed = (((x.double() - exact).norm(dim=-1) / norms)[feasible] for x in (out, plain))
    assert worst.max() < 2 * allowed.max() + 1e-3
    assert (out[~feasible] == 0).all()
    for x, expected in zip(numbers, plain_numbers, strict=True):  # -inf where a scale is infeasible
        torch.testing.assert_close(x, expected, rtol=0, atol=0.1)


def _forward(kind: str, q, levels, start, parameters, tuning) -> list[torch.Tensor]:
    """Output, and what else the kernel writes."""
    learned = (parameters.query_gain, parameters.key_gain, parameters.utility_query, parameters.utility_bias)
    given = (q, *learned, start, SPEC, (0,) * SPEC.scales, tuning, levels)
    if kind == "scale by scale":
        return list(triton_scales.Call(*given).forward())
    call = {"one softmax": triton_joint.Call, "weighed by utilities": triton_joint.WeighedCall}[kind](*given)
    return [x for x in call.forward(True) if x is not None]


def _exact(kind: str, q, levels, start, parameters) -> torch.Tensor:
    """The output by plain torch in fp64."""
    double = AttentionParameters(**{name: x.double() for name, x in vars(parameters).items() if x is not None})
    given = (q.double(), [tuple(x.double() for x in level) for level in levels], start, double)
    if kind == "scale by scale":
        return attend_scales(*given, SPEC, (0,) * SPEC.scales)[0]
    return attend(*given, dataclasses.replace(SPEC, lse_utility=kind == "one softmax")).out_tnd


def _inputs(width: int, n: int, g: int, lengths: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(3)
    rows = sum(lengths)
    first = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    start = first.repeat_interleave(torch.tensor(lengths)).cuda()
    both = torch.randn(rows, n + 2 * g, width, device="cuda").to(dtype)  # q, k and v as one projection writes them
    levels = [(both[:, n : n + g], both[:, n + g :])]
    for scale in range(1, SPEC.scales):
        entries = slot_count(rows, stride(SPEC.ratio, scale))
        levels.append(tuple(torch.randn(entries, g, width, device="cuda").to(dtype) for _ in range(2)))
    parameters = AttentionParameters(
        query_gain=1 + 0.3 * torch.randn(n, width, device="cuda"),
        key_gain=1 + 0.3 * torch.randn(g, width, device="cuda"),
        utility_query=0.1 * torch.randn(SPEC.scales, n, width, device="cuda"),
        utility_bias=torch.randn(SPEC.scales, n, device="cuda"),
    )
    return both[:, :n], levels, start, parameters

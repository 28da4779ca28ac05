"""On Hopper cards, the joint forward by warp groups: beside the portable kernel and attention in double precision."""

import dataclasses

import pytest
import torch

from maha_megatron.attention.scale_attention.eager import attend
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import slot_count, stride

triton_joint = pytest.importorskip("maha_megatron.attention.scale_attention.triton_joint")
tuning_for = pytest.importorskip("maha_megatron.attention.scale_attention.triton_tuning").tuning_for

pytestmark = pytest.mark.gpu

SPEC = MahaSpec(ratio=4, windows=(128, 112, 124, 64), convolution=False)
LENGTHS = {
    "uniform": (4096,) * 4,
    "packed": (901, 60, 1, 700, 64, 128, 1147),
    "one": (1991,),
    "a few rows": (5,),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("n", "g"), [(16, 16), (8, 4), (8, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_warp_groups_are_as_near_to_exact_as_the_portable_kernel(width, n, g, lengths, dtype):
    """Every row, also of tiles after a scale's first, where operands in registers were once lost."""
    tuning = tuning_for(2, torch.cuda.get_device_capability())
    if tuning.groups is None:
        pytest.skip("the table has no warp groups for this card")
    q, levels, start, parameters = _inputs(width, n, g, lengths, dtype)
    double = AttentionParameters(**{name: x.double() for name, x in vars(parameters).items() if x is not None})
    exact = attend(q.double(), [tuple(x.double() for x in level) for level in levels], start, double, SPEC).out_tnd
    learned = (parameters.query_gain, parameters.key_gain, parameters.utility_query, parameters.utility_bias)
    found = []
    for groups in (None, tuning.groups):
        own = dataclasses.replace(tuning, groups=groups)
        call = triton_joint.Call(q, *learned, start, SPEC, (0,) * SPEC.scales, own, levels)
        found.append(call.forward(True)[:3])
        assert all(map(torch.equal, found[-1], call.forward(True)))
    (plain, plain_lse, plain_parts), (out, lse, parts) = found
    norms = exact.norm(dim=-1)
    worst, allowed = ((x.double() - exact).norm(dim=-1) / norms for x in (out, plain))
    assert worst.max() < 2 * allowed.max() + 1e-3
    torch.testing.assert_close(lse, plain_lse, rtol=0, atol=0.05)
    torch.testing.assert_close(parts, plain_parts, rtol=0, atol=0.1)


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

"""Kernels of aggregation against plain torch in fp64, interpreted: output, weights and every gradient by name."""

import itertools

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.aggregation import eager, triton, triton_fusion
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from tests.support.everyday import everyday

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS, HEADS, WIDTH = 45, 3, 32
NAMES = ("outputs", "lse", "utilities", "coupling_raw", "skew")
OPTIONS = [
    {"aggregation": aggregation, "regularizer": regularizer, "coupling": coupling, "lse_utility": lse_utility}
    for aggregation, regularizer, coupling, lse_utility in itertools.product(
        ("convex", "nash"), ("entropy", "quadratic"), ("none", "gram"), (True, False)
    )
    if (aggregation, regularizer, coupling) != ("convex", "entropy", "none")  # needs no output of a scale
]


def is_short(scales: int, options: dict[str, object]) -> bool:
    """Every program of four scales; without the LSE, which is but a term less, the first and the last."""
    return scales == 4 and (options["lse_utility"] or options in (OPTIONS[3], OPTIONS[-1]))


def spec(scales: int, **options) -> MahaSpec:
    return MahaSpec(ratio=2, windows=(4,) * scales, **options)


def programs(scales: int, magnitude: float) -> dict[str, torch.Tensor]:
    """Outputs, LSE and utilities of rows of which some see but a few scales, and learned tensors, exact in fp32."""
    generator = torch.Generator().manual_seed(scales)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    feasible = torch.rand(ROWS, 1, scales, generator=generator).expand(-1, HEADS, -1) < 0.7
    feasible[..., 0] = True
    outputs = (random(ROWS, HEADS, 1, WIDTH) + random(ROWS, HEADS, scales, WIDTH)) * feasible[..., None]
    return {
        "outputs": outputs,
        "lse": random(ROWS, HEADS, scales).masked_fill(~feasible, -torch.inf),
        "utilities": random(ROWS, HEADS, scales),
        "coupling_raw": magnitude * (1 + random(HEADS).abs()),
        "skew": magnitude * random(HEADS, scales * (scales - 1) // 2),
    }


def kernels(outputs, lse, utilities, learned, one):
    return triton.aggregate(outputs, lse, utilities, learned, one)


def plain(outputs, lse, utilities, learned, one):
    """With these utilities in place of those of queries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "_utilities", lambda *_: utilities)
        return eager.aggregate(outputs[:, :, 0], outputs, lse, learned, one)


def run(given: dict[str, torch.Tensor], one: MahaSpec, dtype: torch.dtype, aggregate) -> dict[str, torch.Tensor]:
    values = {name: value.to(DEVICE, dtype).requires_grad_() for name, value in given.items()}
    learned = AttentionParameters(**{name: values[name] for name in ("coupling_raw", "skew")})
    out, weights, report = aggregate(*(values[name] for name in ("outputs", "lse", "utilities")), learned, one)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(values.values()), direction, materialize_grads=True)
    found = {"out": out, "weights": weights} | {f"grad of {name}": x for name, x in zip(values, grads, strict=True)}
    missed = 0 if report is None else report.missed.item()
    assert missed == 0
    return {name: value.detach().cpu().double() for name, value in found.items()}


def wrong(given: dict[str, torch.Tensor], one: MahaSpec, tolerance: float) -> dict[str, float]:
    """Of every result whose difference, relative to the largest value, exceeds the tolerance."""
    found, expected = run(given, one, torch.float32, kernels), run(given, one, torch.float64, plain)
    errors = {
        name: ((found[name] - x).abs().max() / x.abs().max().clamp(min=0.1)).item() for name, x in expected.items()
    }
    return {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize(
    ("scales", "options"),
    everyday(itertools.product((2, 3, 4, 8), OPTIONS), is_short),
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_every_output_and_gradient_equals_plain_torch(scales, options):
    assert wrong(programs(scales, 1.0), spec(scales, **options), 1e-5) == {}


class NotLaunched:
    def run(self) -> None:
        pass


def hard(scales: int) -> dict[str, torch.Tensor]:
    """A few games that a few steps do not solve."""
    given = programs(scales, 300.0)
    return {name: (x[:3, :1] if x.dim() > 2 else x[:1]).contiguous() for name, x in given.items()}


@pytest.mark.parametrize("scales", [4, *(pytest.param(number, marks=pytest.mark.full) for number in (3, 8))])
def test_what_newton_leaves_unsolved_is_solved(monkeypatch, scales):
    """And counted where nothing else solves it."""
    given, one = hard(scales), spec(scales, aggregation="nash", coupling="gram")
    weights = run(given, one, torch.float32, kernels)["weights"]
    torch.testing.assert_close(weights, run(given, one, torch.float64, plain)["weights"], rtol=0, atol=1e-4)
    monkeypatch.setattr(triton_fusion.Fusion, "continuation", lambda *_: NotLaunched())
    with pytest.raises(AssertionError, match="assert"):
        run(given, one, torch.float32, kernels)


def test_a_program_that_is_no_number_stays_so_and_is_counted():
    given, one = hard(4), spec(4, aggregation="nash", coupling="gram")
    given["utilities"][1, 0, 0] = torch.nan
    learned = AttentionParameters(**{name: given[name].to(DEVICE) for name in ("coupling_raw", "skew")})
    inputs = (given[name].to(DEVICE) for name in ("outputs", "lse", "utilities"))
    out, weights, report = triton.aggregate(*inputs, learned, one)
    assert report.missed == 1
    assert out[1, 0].isnan().all()
    assert weights.isnan().any(-1).nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "options",
    [
        {"regularizer": "quadratic", "lse_utility": False},
        pytest.param({"coupling": "gram"}, marks=pytest.mark.full),
        {"aggregation": "nash", "coupling": "gram"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_fusing_is_a_well_formed_operator(options):
    one, values = spec(3, **options), programs(3, 1.0)
    outs, lses, utilities, kappa, skew = (values[name][:5].to(DEVICE).requires_grad_() for name in NAMES)
    inputs = (
        outs,
        lses,
        utilities,
        kappa if one.coupling == "gram" else None,
        skew if one.aggregation == "nash" else None,
        one.regularizer,
        one.lse_utility,
    )
    torch.library.opcheck(triton.fuse_scales, inputs)
    inputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    out, weights, products, *_ = triton.fuse_scales(*inputs)
    given = (torch.ones_like(out), out, weights, products, *inputs)
    torch.library.opcheck(triton.fuse_scales_backward, given)

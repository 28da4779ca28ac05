"""Cases, inputs and runs for tests of attention; learned parameters are always random, gains included."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.attention.api import dense_attention, maha_attention
from maha_megatron.attention.dispatch import BACKEND_NAMES
from maha_megatron.attention.spec import (
    AttentionParameters,
    DenseSpec,
    MahaSpec,
    ParameterSpec,
    dense_parameter_specs,
    maha_parameter_specs,
)

# kernels have widths and dtypes of their own, and tests of their own (test_triton*.py, test_gpu_attention.py)
PLAIN_BACKENDS = tuple(name for name in BACKEND_NAMES if name != "triton")
FAST_BACKENDS = tuple(name for name in PLAIN_BACKENDS if name != "naive")
PACKED = (30, 1, 7, 60, 3, 16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One packed sequence and one operator; hashable, so that its reference is computed once."""

    lengths: tuple[int, ...]
    spec: MahaSpec | DenseSpec
    n: int = 4
    g: int = 2
    d: int = 32
    seed: int = field(default=0)

    def __str__(self) -> str:
        spec = self.spec
        shape = f"t{'+'.join(map(str, self.lengths))}-n{self.n}g{self.g}d{self.d}"
        if isinstance(spec, DenseSpec):
            return f"{shape}-norm{spec.qk_norm:d}-conv{spec.convolution:d}"
        windows = "_".join(map(str, spec.windows))
        parts = [shape, f"r{spec.ratio}", f"w{windows}", spec.downsampling, *aggregation_words(spec)]
        parts += [f"lse{spec.lse_utility:d}", f"conv{spec.convolution:d}"]
        return "-".join(parts + ([f"seed{self.seed}"] if self.seed else []))


def aggregation_words(spec: MahaSpec) -> list[str]:
    """What distinguishes a spec from the joint softmax, for test names."""
    words = {"queries": "full", "aggregation": "convex", "regularizer": "entropy", "coupling": "none"}
    return [getattr(spec, name) for name, default in words.items() if getattr(spec, name) != default]


def every_aggregation() -> list[dict[str, object]]:
    """Options of MahaSpec: every way to fuse the scales but stated programs, with full and with pooled queries."""
    solved = [
        {"aggregation": aggregation, "regularizer": regularizer, "coupling": coupling, "lse_utility": lse_utility}
        for aggregation, regularizer, coupling, lse_utility in itertools.product(
            ("convex", "nash"), ("entropy", "quadratic"), ("none", "gram"), (True, False)
        )
    ]
    fused = [*solved, {"aggregation": "mean"}]
    return [{"queries": queries} | options for queries in ("full", "pooled") for options in fused]


def is_path_of_its_own(options: dict[str, object]) -> bool:
    """Every program with full queries; with pooled ones the game: utilities without LSE are those without a term."""
    if options["queries"] == "pooled":
        return options["aggregation"] == "nash" and options["coupling"] == "gram" and options["lse_utility"]
    return options.get("lse_utility", True)


def start_rows(lengths: Sequence[int]) -> torch.Tensor:
    """document_start_t of documents with these lengths."""
    starts = [0, *itertools.accumulate(lengths)]
    return torch.cat([torch.full((length,), start) for start, length in zip(starts, lengths, strict=False)])


def parameter_specs(case: Case) -> dict[str, ParameterSpec]:
    specs = dense_parameter_specs if isinstance(case.spec, DenseSpec) else maha_parameter_specs
    return specs(case.spec, n=case.n, g=case.g, d=case.d)


def leaves(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Inputs q, k, v and every learned parameter by name, random, exact in fp32, requiring gradients."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = sum(case.lengths)
    shapes = {name: (rows, heads, case.d) for name, heads in (("q", case.n), ("k", case.g), ("v", case.g))}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, spec in parameter_specs(case).items():
        values[name] = spec.initial() + 0.4 * torch.randn(spec.shape, generator=generator)
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


def exact_leaves(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The leaves that `dtype` holds, in fp64 on the CPU: of them the naive backend gives what is exact."""
    return {name: value.detach().double().requires_grad_() for name, value in leaves(case, dtype).items()}


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A case's documents as attention takes them, on one device."""

    start_t: torch.Tensor
    for_dense: dict[str, object]


def documents_of(case: Case, device: torch.device | str) -> Documents:
    bounds = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32)
    for_dense = {
        "document_lengths": case.lengths,
        "document_bounds": bounds.to(device),
        "longest_document": max(case.lengths),
    }
    return Documents(start_t=start_rows(case.lengths).to(device), for_dense=for_dense)


def attend(
    case: Case, values: dict[str, torch.Tensor], backend: str, documents: Documents | None = None
) -> dict[str, torch.Tensor]:
    """`out`, and for MAHA `weights`, of the case on these leaves."""
    documents = documents or documents_of(case, values["q"].device)
    arguments = _arguments(case, values, documents)
    if isinstance(case.spec, DenseSpec):
        return {"out": dense_attention(*arguments, backend=backend, **documents.for_dense)}
    result = maha_attention(*arguments, backend=backend, with_weights=True)
    return {"out": result.out_tnd, "weights": result.scale_weights_tnl}


def _arguments(case: Case, values: dict[str, torch.Tensor], documents: Documents) -> tuple:
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    return (*(values[name] for name in "qkv"), documents.start_t, parameters, case.spec)


def solves(
    case: Case, backend: str, dtype: torch.dtype, values: dict[str, torch.Tensor] | None = None
) -> SolveReport | None:
    """What solving the scales' weights left, on the case's own leaves or on these."""
    values = values or leaves(case, dtype)
    arguments = _arguments(case, values, documents_of(case, values["q"].device))
    return maha_attention(*arguments, backend=backend).solves


def results(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Forward results, and the gradient of every leaf by name, all on the CPU."""
    values = leaves(case, dtype, device)
    found = attend(case, values, backend)
    direction = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    grads = torch.autograd.grad(found["out"], list(values.values()), direction, materialize_grads=True)
    found |= {f"grad of {name}": grad for name, grad in zip(values, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in found.items()}


@functools.cache
def reference(case: Case) -> dict[str, torch.Tensor]:
    """The naive backend in fp64."""
    return results(case, "naive", torch.float64)


def is_nothing(own: float, largest: float) -> bool:
    """Whether a gradient is exactly 0 (a row that sees one key): the difference of terms as large as others."""
    return own <= 1e-12 * largest


def assert_close(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float,
    plain: Callable[[], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Every result differs by at most `tolerance` times its largest reference value.

    Where a sum nearly cancels, no form keeps that in fp32. So a result of fp32 that misses it may differ by twice what
    the naive form in fp32, `plain`, differs by; it is asked for only then. Gradients of what pools keys may be nothing
    while those of what pools values, in the same tensor, are not.
    """
    assert found.keys() == expected.keys()
    errors, largest = {}, max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        parts = (...,) if name not in _OF_KEYS_AND_VALUES else ((slice(None), 0), (slice(None), 1))
        for part in parts:
            nothing = is_nothing(value[part].abs().max().item(), largest)
            scale = largest if nothing else value.abs().max().item()
            error = _distance(found[name][part], value[part])
            near = error <= tolerance * scale
            if not near and plain is not None:
                near = error <= 2 * _distance(plain()[name][part], value[part])
            if not near:
                errors[name] = error / scale
    assert not errors, errors


_OF_KEYS_AND_VALUES = ("grad of gate_query", "grad of gate_bias", "grad of pool_kernel")


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.double() - expected).abs().max().item()


def assert_equals_reference(
    case: Case, backend: str, dtype: torch.dtype, tolerance: float, device: str = "cpu"
) -> None:
    """Forward results and every gradient, by name."""
    plain = functools.partial(_plain, case, dtype) if dtype == torch.float32 else None
    assert_close(results(case, backend, dtype, device), reference(case), tolerance, plain)


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The norm of each difference over that of what is expected, or 0.1: a row that sees one key has no gradient."""
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].double() - value).norm() / value.norm().clamp(min=0.1)).item()
        for name, value in expected.items()
    }


def wrong(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> dict[str, float]:
    """Those of `errors` that exceed the tolerance, or are no number."""
    return {name: error for name, error in errors(found, expected).items() if not error <= tolerance}


# half a unit of bf16 in the largest value, twice over; in fp32 the order of sums matters more than their rounding: on a
# CPU 2^-19.7 is seen where the naive backend happens to be three times nearer
_ERROR_FLOOR = {torch.bfloat16: 2**-8, torch.float32: 2**-18}


def assert_within_twice_of_plain(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Results and gradients are at most twice as far from exact as the naive backend's in the same dtype."""
    plain, found, reference = (
        _plain(case, dtype),
        results(case, backend, dtype, device),
        _rounded_reference(case, dtype),
    )
    largest = max(exact.abs().max().item() for exact in reference.values())
    for name, exact in reference.items():
        error = (found[name].double() - exact).abs().max().item()
        plain_error = (plain[name].double() - exact).abs().max().item()
        own = exact.abs().max().item()
        floor = _ERROR_FLOOR[dtype] * (largest if is_nothing(own, largest) else max(own, 0.1))
        assert error <= max(2 * plain_error, floor), (name, error, plain_error, floor)


@functools.cache
def _plain(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return results(case, "naive", dtype)


@functools.cache
def _rounded_reference(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The naive backend in fp64 on leaves rounded to `dtype`: what a run in that dtype approximates."""
    values = exact_leaves(case, dtype)
    found = attend(case, values, "naive")
    direction = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    grads = torch.autograd.grad(found["out"], list(values.values()), direction, materialize_grads=True)
    return {name: value.detach() for name, value in found.items()} | {
        f"grad of {name}": grad for name, grad in zip(values, grads, strict=True)
    }

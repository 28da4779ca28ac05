"""The gate before any speed-up: the measured backend computes what the definition says, output and every gradient."""

from dataclasses import dataclass, replace

import torch

from maha_megatron.attention.benchmark.subjects import Setting, draw_inputs, maha
from maha_megatron.scales import stride

_ROWS, _DOCUMENT_ROWS = 150, 90
# of the largest reference value: half a unit of bf16, and some thirty of fp32, where the order of sums is what differs
_FLOOR = {torch.bfloat16: 2**-8, torch.float32: 2**-18, torch.float64: 1e-10}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Errors relative to the largest reference value by result, and the bound that each of them has to keep."""

    errors: dict[str, float]
    bounds: dict[str, float]

    @property
    def green(self) -> bool:
        return all(self.errors[name] <= bound for name, bound in self.bounds.items())  # NaN is not below its bound

    def __str__(self) -> str:
        wrong = [f"{name} {self.errors[name]:.2g} > {bound:.2g}" for name, bound in self.bounds.items()
                 if not self.errors[name] <= bound]  # fmt: skip
        return "; ".join(wrong) or f"largest error {max(self.errors.values()):.2g}"


def check(setting: Setting, dtype: torch.dtype) -> Verdict:
    """Compare the setting's backend with the naive one in fp64, on two packed documents, at a small shape.

    It may be twice as far from exact as the naive backend is in the same dtype. Heads, width and all choices of the
    operator are the setting's; windows are small, so that every scale slides.
    """
    scales = min(len(setting.windows) or 3, 3)
    small = tuple(3 * setting.operator.ratio for _ in range(scales)) if scales > 1 else (20,)
    assert stride(setting.operator.ratio, scales - 1) <= _DOCUMENT_ROWS
    setting = replace(setting, windows=small)
    naive = replace(setting, backend="naive")
    found = _results(setting, dtype, dtype)
    plain = _results(naive, dtype, dtype)
    exact = _results(naive, torch.float64, dtype)
    errors, bounds = {}, {}
    for name, reference in exact.items():
        scale = max(reference.abs().max().item(), 0.1)
        errors[name] = (found[name].double() - reference).abs().max().item() / scale
        plain_error = (plain[name].double() - reference).abs().max().item() / scale
        bounds[name] = max(2 * plain_error, _FLOOR[dtype])
    return Verdict(errors=errors, bounds=bounds)


def _results(setting: Setting, dtype: torch.dtype, rounded_to: torch.dtype) -> dict[str, torch.Tensor]:
    """Results in `dtype` of leaves that are exact in `rounded_to`."""
    inputs = draw_inputs(setting, _ROWS, rounded_to, _DOCUMENT_ROWS)
    ready = maha(setting, inputs)
    for leaf in (*inputs.leaves().values(), *ready.parameters.values(), inputs.grad_tnd):
        leaf.data = leaf.data.to(dtype)
    return ready.results()

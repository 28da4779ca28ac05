"""The gate before any speed-up: the measured backend computes what the definition says, output and every gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from maha_megatron.attention.benchmark.subjects import Setting, draw_inputs, maha
from maha_megatron.scales import complete_blocks, stride

_SCALES_AT_OWN_RATIO = 3
_DOCUMENT_ROWS, _TAIL_ROWS = 90, 26  # at least; and beyond two blocks of the coarsest scale, so that its window slides
# of the largest reference value: half a unit of bf16 and fp16, and some thirty of fp32, where the order of sums differs
FLOOR = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-18, torch.float64: 1e-10}


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


def check(setting: Setting, dtype: torch.dtype, lengths: Sequence[int]) -> Verdict:
    """Compare the setting's backend with the naive one in fp64, on two packed documents, at small shapes.

    It may be twice as far from exact as the naive backend is in the same dtype. Heads, width and all choices of the
    operator are the setting's; windows are small, so that every scale slides. Of more than three scales two shapes are
    compared: three at the setting's ratio, and as many as the longest of `lengths` has at ratio 2, since other code
    may solve for more scales than for few.
    """
    scales = max(len(setting.spec_at(rows).windows) for rows in lengths)
    shapes = {"": (setting.operator.ratio, min(scales, _SCALES_AT_OWN_RATIO))}
    if scales > _SCALES_AT_OWN_RATIO:
        shapes[f", {scales} scales"] = (2, scales)
    errors, bounds = {}, {}
    for suffix, (ratio, count) in shapes.items():
        for name, (error, bound) in _compared(setting, dtype, ratio, count).items():
            errors[name + suffix], bounds[name + suffix] = error, bound
    return Verdict(errors=errors, bounds=bounds)


def _compared(setting: Setting, dtype: torch.dtype, ratio: int, scales: int) -> dict[str, tuple[float, float]]:
    """Error and bound of each result at one small shape."""
    document_rows = max(_DOCUMENT_ROWS, 2 * stride(ratio, scales - 1) + _TAIL_ROWS)
    blocks = [complete_blocks(document_rows, stride(ratio, scale)) for scale in range(scales)]
    windows = tuple(min(3 * ratio, count - 1) for count in blocks) if scales > 1 else (20,)
    small = replace(setting, windows=windows, operator=replace(setting.operator, ratio=ratio))
    naive = replace(small, backend="naive", device="cpu")
    found = _results(small, document_rows, dtype, dtype)
    plain = _results(naive, document_rows, dtype, dtype)
    exact = _results(naive, document_rows, torch.float64, dtype)
    compared = {}
    for name, reference in exact.items():
        scale = max(reference.abs().max().item(), 0.1)
        error = (found[name].double() - reference).abs().max().item() / scale
        plain_error = (plain[name].double() - reference).abs().max().item() / scale
        compared[name] = error, max(2 * plain_error, FLOOR[dtype])
    return compared


def _results(
    setting: Setting, document_rows: int, dtype: torch.dtype, rounded_to: torch.dtype
) -> dict[str, torch.Tensor]:
    """Results in `dtype`, on the CPU, of leaves that are exact in `rounded_to`; the second document is shorter."""
    documents = (document_rows, document_rows * 2 // 3)
    drawn = draw_inputs(replace(setting, device="cpu"), document_rows, rounded_to, documents)
    ready = maha(setting, drawn.to(setting.device, dtype))
    for name, leaf in ready.parameters.items():
        ready.parameters[name] = leaf.detach().to(rounded_to).to(dtype).requires_grad_()
    return {name: result.cpu() for name, result in ready.results().items()}

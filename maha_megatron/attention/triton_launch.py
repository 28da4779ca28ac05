"""One launch of a kernel as data, which is run, or compiled without a device; and what every kernel asks of tensors."""

import contextlib
from dataclasses import dataclass

import torch
import triton

_WIDTHS = (32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Launch:
    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]
    options: dict[str, int]
    device: torch.device

    def run(self) -> None:
        """On the device of the tensors: Triton takes the current one, which may be another."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options)


def unserved_heads(width: int, dtype: torch.dtype) -> str | None:
    """What keeps kernels from heads of `width` channels in a dtype, in words; None where they serve them."""
    if dtype not in _DTYPES:
        return f"{dtype}"
    return None if width in _WIDTHS else f"heads of {width} channels"


def compiled() -> bool:
    """Whether kernels are compiled, rather than interpreted."""
    return not triton.knobs.runtime.interpret


def lined_up(x: torch.Tensor) -> torch.Tensor:
    """x [t, heads, d], a copy unless channels are next to each other and heads within what kernels count in 32 bits."""
    return x if x.stride(2) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()

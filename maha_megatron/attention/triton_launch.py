"""One launch of a kernel as data: what runs it, and what compiles it without a device, read the same arguments."""

from dataclasses import dataclass

import triton


@dataclass(frozen=True, kw_only=True)
class Launch:
    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]
    options: dict[str, int]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)

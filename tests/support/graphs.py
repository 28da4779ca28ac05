"""CUDA graphs without a device: what was captured is run again, on the same buffers, in place of a replay."""

import contextlib
from types import ModuleType, SimpleNamespace

import pytest
import torch

from maha_megatron.model import captured


def _torch_with_graphs() -> ModuleType:
    """torch, as one module sees it, with as much of torch.cuda as capturing calls."""
    found = ModuleType("torch")
    found.__dict__.update(vars(torch))
    found.cuda = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        Stream=lambda: None,
        stream=contextlib.nullcontext,
        graph_pool_handle=lambda: (0, 0),
        CUDAGraph=SimpleNamespace,
    )
    return found


@pytest.fixture
def graph_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with graphs until now: "capture" of a layer, and of every replay "forward" or "backward"."""
    seen: list[str] = []

    def capture(self: captured.CapturedAttention, *, backward: bool, pool: object) -> None:
        job = self.backward if backward else self.forward

        def replay() -> None:
            seen.append(job.__name__)
            with torch.enable_grad():
                job()

        seen.extend(() if backward else ("capture",))
        self._graphs[backward].replay = replay

    monkeypatch.setattr(captured, "torch", _torch_with_graphs())
    monkeypatch.setattr(captured.CapturedAttention, "capture", capture)
    return seen

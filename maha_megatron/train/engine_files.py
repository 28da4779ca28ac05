"""How DeepSpeed's state reaches the disk without one rank's error leaving the others in a barrier."""

import os
from pathlib import Path
from typing import Any

import torch

from maha_megatron.checkpoint.agreement import Failures


class CarefulFiles:
    """DeepSpeed's file writer, but errors are kept until all ranks are through the save, and disks are flushed."""

    def __init__(self, inner: Any, failures: Failures) -> None:
        self._inner, self._failures = inner, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._failures.kept():
            Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        # through an open file: torch reports a full disk as OSError, by a path as a RuntimeError without a reason
        with self._failures.kept(), open(path, "wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())

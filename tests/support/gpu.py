"""Guards around work on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """torch raises at every operation that makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch raises at every operation that has no deterministic form, as in training."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

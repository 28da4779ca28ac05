"""A process group of one rank inside the test process, for tests of the model that need no other rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from maha_megatron.parallel import compat
from tests.support.model import tiny_config

_ADDRESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Model-parallel groups of size 1 for a module's tests."""
    with groups_of_one_rank():
        yield


@contextmanager
def groups_of_one_rank() -> Iterator[None]:
    """Model-parallel groups of size 1, taken down afterwards; the environment is left as it was."""
    before = {name: os.environ.get(name) for name in _ADDRESS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compat.initialise_distributed(tiny_config())
    compat.initialise_model_parallel(tiny_config())
    compat.seed_everything(1)
    yield
    compat.shutdown()
    torch.set_num_threads(threads)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value

from collections.abc import Iterator
from subprocess import Popen

import pytest
import torch

from tests.support.ahead import EVERYDAY, compilation


@pytest.fixture(scope="session", autouse=True)
def compilations(request: pytest.FixtureRequest) -> Iterator[dict[int, Popen]]:
    """Compilations of kernels by capability, where their test is asked for.

    They begin with the folder's first test, since most of the others leave a core idle.
    """
    names = {getattr(item, "originalname", None) for item in request.session.items}
    asked = EVERYDAY if "test_kernels_compile_within_the_card" in names else {}
    running = {capability: compilation(capability, 128, "bfloat16", which) for capability, which in asked.items()}
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """New memory holds NaN: what a kernel reads and nothing wrote shows."""

    def poisoned(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))

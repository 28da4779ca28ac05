"""For all tests: those marked `gpu` are skipped without a CUDA device, and Triton then interprets kernels."""

import gc
import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first use of a GPU; determinism needs it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which megatron-core does too


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay: each time that they are looked through takes a third of a second


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")

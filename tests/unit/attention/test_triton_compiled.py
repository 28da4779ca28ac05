"""Kernels compiled ahead, with no card: what the tuned table asks of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of one program, on an A100 and an H100


def compiled(capability: int, width: int, dtype: str) -> dict[str, dict[str, int]]:
    """What the compiler made of every kernel, in a process of its own: this one may interpret kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.kernels", str(capability), str(width), dtype]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.full)])
@pytest.mark.parametrize("width", [pytest.param(32, marks=pytest.mark.full), 64, 128])
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.full), 90])
def test_every_kernel_compiles_within_the_card(capability, width, dtype):
    found = compiled(capability, width, dtype)
    assert {
        name: one["shared_bytes"] for name, one in found.items() if one["shared_bytes"] > SHARED_BYTES[capability]
    } == {}
    if (capability, dtype) == (90, "bfloat16"):
        assert {name: one["spilled_bytes"] for name, one in found.items() if one["spilled_bytes"]} == {}

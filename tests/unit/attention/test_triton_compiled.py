"""Kernels compiled ahead, with no card: what the tuned table asks of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
# of one program: Ampere and Ada at their least, and Hopper
SHARED_BYTES = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}

# by triton 3.6, between scales, never in the loop over keys or rows (nvdisasm)
SPILLED_BYTES = {
    "query gradients": 48,
    "attention, scale by scale": 16,
    "query gradients, scale by scale": 40,
    "equilibrium, a game, 8 scales": 16,
    "continuation, nash": 8,
}


def compiled(capability: int, width: int, dtype: str) -> dict[str, dict[str, int]]:
    """What the compiler made of every kernel, in a process of its own: this one may interpret kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.kernels", str(capability), str(width), dtype]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.full)])
@pytest.mark.parametrize("width", [*(pytest.param(narrow, marks=pytest.mark.full) for narrow in (32, 64)), 128])
@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.full), pytest.param(89, marks=pytest.mark.full), 90]
)
def test_every_kernel_compiles_within_the_card(capability, width, dtype):
    found = compiled(capability, width, dtype)
    assert {
        name: one["shared_bytes"] for name, one in found.items() if one["shared_bytes"] > SHARED_BYTES[capability]
    } == {}
    if (capability, dtype) == (90, "bfloat16"):
        most = SPILLED_BYTES if width == 128 else {}
        spilled = {name: one["spilled_bytes"] for name, one in found.items()}
        assert {name: number for name, number in spilled.items() if number > most.get(name, 0)} == {}

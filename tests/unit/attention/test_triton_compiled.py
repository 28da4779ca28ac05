"""Kernels compiled ahead, with no card: what the tuned table asks of one."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
# of one program: Ampere and Ada at their least, and Hopper
SHARED_BYTES = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}

# by triton 3.6, between scales or programs, never in the loop over keys or rows (nvdisasm); of games at any width
OF_GAMES = {"equilibrium, a game, 8 scales": 16, "continuation, a game": 8, "continuation, nash": 8}
# and where 8 bytes make room for one more program
OF_POOLING = {"pooling, conv": 8, "pooling and preparation, mean": 8, "pooling and preparation, max": 8}
SPILLED_BYTES = {
    32: OF_GAMES | OF_POOLING,
    64: OF_GAMES | OF_POOLING,
    128: OF_GAMES
    | OF_POOLING
    | {
        "attention, as the table has it": 32,
        "attention, weighed, as the table has it": 80,
        "query gradients": 48,
        "query gradients, refined": 72,
        "query gradients, refined, 3 heads a group": 72,
        "key gradients, refined, 3 heads a group": 144,  # as of other layers with heads in groups
        "attention, scale by scale": 16,
        "query gradients, scale by scale": 40,
        "attention, weighed": 144,
        "query gradients, weighed": 96,
    },
}


# what is compiled every day, both at once; the game of 8 scales alone takes longer than all that
EVERYDAY = {80: "first", 90: "of four scales"}


def compiled(capability: int, width: int, dtype: str, which: str = "all") -> dict[str, dict[str, int]]:
    """What the compiler made of the kernels, in a process of its own: this one may interpret kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.kernels", str(capability), str(width), dtype, which]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def check(found: dict[str, dict[str, int]], capability: int, width: int, dtype: str) -> None:
    """Shared memory of every kernel, and on Hopper what it spills."""
    assert {
        name: one["shared_bytes"] for name, one in found.items() if one["shared_bytes"] > SHARED_BYTES[capability]
    } == {}
    if (capability, dtype) == (90, "bfloat16"):
        most = SPILLED_BYTES[width]
        spilled = {name: one["spilled_bytes"] for name, one in found.items()}
        assert {name: number for name, number in spilled.items() if number > most.get(name, 0)} == {}


@pytest.fixture(scope="module")
def everyday() -> dict[int, dict[str, dict[str, int]]]:
    with ThreadPoolExecutor() as pool:
        running = {
            capability: pool.submit(compiled, capability, 128, "bfloat16", which)
            for capability, which in EVERYDAY.items()
        }
    return {capability: found.result() for capability, found in running.items()}


@pytest.mark.parametrize("capability", EVERYDAY)
def test_kernels_compile_within_the_card(capability, everyday):
    """Every kernel for Ampere, and for Hopper every use that the table knows."""
    assert len(everyday[capability]) >= 20
    check(everyday[capability], capability, 128, "bfloat16")


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_kernel_compiles_within_the_card(capability, width, dtype):
    check(compiled(capability, width, dtype), capability, width, dtype)


@pytest.mark.full
@pytest.mark.parametrize(("width", "dtype"), [(64, "bfloat16"), (128, "float16")])
def test_the_forward_by_warp_groups_compiles_at_the_ends_of_what_it_serves(width, dtype):
    """One row and one head, which are compiled in, one scale and eight, a ratio of 3, entries of a past."""
    found = compiled(90, width, dtype, "by warp groups")
    assert len(found) == 10
    check(found, 90, width, dtype)
    for name, one in found.items():
        assert one["spilled_bytes"] <= (80 if name.startswith("weighed") else 32), name

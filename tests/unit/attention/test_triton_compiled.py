"""Kernels compiled ahead, with no card: what the tuned table asks of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of one program, A100 and H100


def compiled(*arguments: str) -> dict[str, dict[str, int]]:
    """What tests/support/compile_kernels.py finds, in a process of its own: this one may interpret kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compile_kernels", *arguments]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)

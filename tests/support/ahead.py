"""Kernels compiled ahead in processes of their own: the tests' may interpret kernels instead."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what is compiled every day; the game of 8 scales alone takes longer than all that
EVERYDAY = {80: "first", 90: "of four scales"}


def compilation(capability: int, width: int, dtype: str, which: str) -> subprocess.Popen:
    """A running `tests.support.kernels`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.kernels", str(capability), str(width), dtype, which]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

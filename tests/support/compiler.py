"""Whether torch.compile finds a C++ compiler here; the project itself needs none."""

import shutil

import pytest

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler")

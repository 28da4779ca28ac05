"""Which room may import which, and where third-party packages may be named.

Every checker takes the root of a tree and returns its violations as lines, so that each is also tried on a small tree
with a planted violation.
"""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "maha_megatron"
COMMANDS = ("launch", "tools", "data_prep")

BASE = ("errors", "units", "scales")
# room -> rooms it may import beside itself; siblings (parallel, data, attention) do not know each other
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "units": (),
    "scales": (),
    "config": BASE,
    "attention": BASE,
    "parallel": (*BASE, "config"),
    "data": (*BASE, "config"),
    "model": (*BASE, "config", "attention", "parallel", "data"),
    "checkpoint": (*BASE, "config", "attention", "parallel", "data", "model"),
    "train": (*BASE, "config", "attention", "parallel", "data", "model", "checkpoint"),
    "scaling": (*BASE, "config"),
}
# module prefix -> the only files that may import it
FENCES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("maha_megatron/train/engine.py", "maha_megatron/parallel/compat.py"),
    "megatron": ("maha_megatron/parallel/*", "maha_megatron/model/*", "maha_megatron/data/*"),
    "megatron.training": (),
    "cvxpylayers": ("maha_megatron/attention/aggregation/*",),
    "cvxpy": ("maha_megatron/attention/aggregation/*",),
    "triton": ("maha_megatron/attention/*",),
    "transformers": (
        "maha_megatron/data/tokenizer*",
        "maha_megatron/checkpoint/hf/*",
        "maha_megatron/train/llama_peer.py",
    ),
    "sentencepiece": ("maha_megatron/data/*",),
    "datasets": ("maha_megatron/data/prepare/hub.py",),
    "yaml": ("maha_megatron/config/*",),
}
TORCH_FREE = ("errors", "units", "scales", "config", "scaling")


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def imported_names(path: Path, root: Path) -> set[str]:
    """Dotted names a file imports, anywhere in it: `from a.b import c` is a.b.c; relative ones are made absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root).parent.parts
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module of the package: the name after the package's; "" for the package and its version."""
    name = parts[1].removesuffix(".py") if len(parts) > 1 else ""
    return "" if name.startswith("__") else name


def wrong_directions(root: Path) -> list[str]:
    """Imports of the package that do not point down the table of rooms."""
    found = []
    for path in python_files(root, PACKAGE):
        relative = path.relative_to(root)
        room = room_of(relative.parts)
        if room and room not in ROOMS:
            found.append(f"{relative}: room '{room}' is not in the table")
            continue
        allowed = {"", room, *ROOMS[room]} if room else {""}
        for name in sorted(imported_names(path, root)):
            if is_within(name, PACKAGE) and room_of(tuple(name.split("."))) not in allowed:
                found.append(f"{relative}: imports {name}")
            if name.split(".")[0] in (*COMMANDS, "tests"):
                found.append(f"{relative}: imports {name}, a command line")
    return found


def commands_that_know_each_other(root: Path) -> list[str]:
    """Command lines are thin and independent: launch, tools and data_prep import the package only."""
    return [
        f"{path.relative_to(root)}: imports {name}"
        for path in python_files(root, *COMMANDS)
        for name in sorted(imported_names(path, root))
        if name.split(".")[0] in (*COMMANDS, "tests")
    ]


def broken_fences(root: Path) -> list[str]:
    """Third-party packages named outside their files; tests may name all but megatron.training."""
    found = []
    for path in python_files(root, PACKAGE, *COMMANDS, "tests"):
        relative = path.relative_to(root).as_posix()
        for name in sorted(imported_names(path, root)):
            for fenced, files in FENCES.items():
                if relative.startswith("tests/") and files:
                    continue
                if is_within(name, fenced) and not any(fnmatch(relative, pattern) for pattern in files):
                    found.append(f"{relative}: imports {name}, which belongs to {files or 'nobody'}")
            room = room_of(Path(relative).parts)
            if relative.startswith(PACKAGE) and room in TORCH_FREE and is_within(name, "torch"):
                found.append(f"{relative}: imports {name}, but {room} is torch-free")
    return found


CHECKERS = (wrong_directions, commands_that_know_each_other, broken_fences)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_house_is_in_order(checker):
    assert checker(ROOT) == []


@pytest.mark.parametrize(
    ("checker", "file", "line"),
    [
        (wrong_directions, "maha_megatron/config/a.py", "import maha_megatron.model"),
        (wrong_directions, "maha_megatron/config/a.py", "from maha_megatron import attention"),
        (wrong_directions, "maha_megatron/attention/a.py", "from maha_megatron.config.schema import Config"),
        (wrong_directions, "maha_megatron/attention/deep/a.py", "from ...config import schema"),
        (wrong_directions, "maha_megatron/data/a.py", "def f():\n    from maha_megatron.parallel import mpu"),
        (wrong_directions, "maha_megatron/model/a.py", "from ..train import loop"),
        (wrong_directions, "maha_megatron/scales.py", "from maha_megatron.errors import MahaError"),
        (wrong_directions, "maha_megatron/__init__.py", "from maha_megatron.errors import MahaError"),
        (wrong_directions, "maha_megatron/train/a.py", "from launch import pretrain"),
        (wrong_directions, "maha_megatron/attic/a.py", "x = 1"),
        (commands_that_know_each_other, "tools/a.py", "from data_prep.preprocess import main"),
        (commands_that_know_each_other, "launch/a.py", "import tools.flops"),
        (broken_fences, "maha_megatron/model/a.py", "import deepspeed"),
        (broken_fences, "launch/a.py", "from deepspeed.comm import barrier"),
        (broken_fences, "maha_megatron/attention/a.py", "from megatron.core import parallel_state"),
        (broken_fences, "maha_megatron/model/a.py", "from megatron.training import get_args"),
        (broken_fences, "maha_megatron/model/a.py", "from megatron import training"),
        (broken_fences, "tests/a.py", "import megatron.training"),
        (broken_fences, "maha_megatron/model/a.py", "import transformers"),
        (broken_fences, "maha_megatron/attention/a.py", "import cvxpylayers.torch"),
        (broken_fences, "maha_megatron/config/a.py", "import torch"),
        (broken_fences, "maha_megatron/scales.py", "from torch import nn"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, checker, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert checker(tmp_path)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("maha_megatron/model/a.py", "import megatron.core\nfrom maha_megatron.attention.spec import MahaSpec"),
        ("maha_megatron/train/engine.py", "import deepspeed\nfrom maha_megatron.checkpoint import save"),
        ("maha_megatron/attention/a.py", "import torch\nfrom . import spec\nfrom maha_megatron import scales"),
        ("tests/unit/a.py", "import deepspeed, megatron.core, transformers"),
        ("tools/a.py", "import torch\nfrom maha_megatron.train import loop"),
        ("maha_megatron/train/a.py", "import maha_megatron\nfrom maha_megatron import __version__"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert [violation for checker in CHECKERS for violation in checker(tmp_path)] == []


IMPORT_WITHOUT_TORCH = """
import importlib, sys
for name in ("torch", "numpy", "megatron", "deepspeed"):
    sys.modules[name] = None  # importing it now raises ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_without_torch(root: Path, *modules: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *modules],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_torch_free_rooms_import_where_torch_is_absent():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in python_files(ROOT, PACKAGE)
        if room_of(path.relative_to(ROOT).parts) in TORCH_FREE
    ]
    assert "maha_megatron.config.accounting" in modules
    done = import_without_torch(ROOT, *modules)
    assert done.returncode == 0, done.stderr


def test_a_hidden_torch_import_is_found(tmp_path):
    (tmp_path / "sly.py").write_text("import importlib\nimportlib.import_module('torch')")
    assert import_without_torch(tmp_path, "sly").returncode != 0

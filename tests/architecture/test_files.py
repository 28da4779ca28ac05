"""Habits of every file: short files and functions, no catch-all modules, empty __init__, no machine paths."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAXIMUM_LINES = 500
MAXIMUM_FUNCTION_LINES = 60
NOT_OURS = {
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    "build",
    "dist",
    "runs",
    "wheelhouse",
}
TEXT = {".py", ".sh", ".yaml", ".yml", ".md", ".toml", ".txt", ".cfg", ".sbatch", ".example", ".json", ""}
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|Users|work|mnt|scratch|tmp/w)/\w")


def files(root: Path, *endings: str) -> Iterator[Path]:
    """Files of the project with one of the endings, build products and run folders left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_OURS and not name.endswith(".egg-info"))
        yield from (Path(folder, name) for name in sorted(set(names) - NOT_OURS) if Path(name).suffix in endings)


def long_files(root: Path) -> list[str]:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(root, ".py", ".sh")}
    return [f"{path.relative_to(root)}: {count} lines" for path, count in counts.items() if count > MAXIMUM_LINES]


def long_functions(root: Path) -> list[str]:
    """Functions of 60 lines and more; the docstring does not count, since we want it to say enough."""
    found = []
    for path in files(root, ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node, clean=False) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                if lines >= MAXIMUM_FUNCTION_LINES:
                    found.append(f"{path.relative_to(root)}: {node.name} has {lines} lines")
    return found


def catch_all_modules(root: Path) -> list[str]:
    vague = {"utils", "util", "helpers", "misc", "common"}
    return [
        str(path.relative_to(root)) for path in files(root, ".py") if path.stem in vague or path.parent.name in vague
    ]


def filled_inits(root: Path) -> list[str]:
    """__init__.py files that hold more than a docstring and dunder assignments such as __version__."""
    found = []
    for path in files(root, ".py"):
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            dunder = isinstance(node, ast.Assign) and all(
                isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets
            )
            if not (docstring or dunder):
                found.append(f"{path.relative_to(root)}:{node.lineno}: {type(node).__name__}")
    return found


def machine_paths(root: Path) -> list[str]:
    """Absolute paths of somebody's machine, outside the tests."""
    found = []
    for path in files(root, *TEXT):
        if path.relative_to(root).parts[0] == "tests":
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # not a text
            continue
        found += [
            f"{path.relative_to(root)}:{i}: {line}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)
        ]
    return found


CHECKERS = (long_files, long_functions, catch_all_modules, filled_inits, machine_paths)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_the_house_is_in_order(checker):
    assert checker(ROOT) == []


@pytest.mark.parametrize(
    ("checker", "file", "text"),
    [
        (long_files, "a/b.py", "x = 1\n" * 501),
        (long_files, "launch/b.sh", "true\n" * 501),
        (long_functions, "a/b.py", "def f():\n" + "    x = 1\n" * 59),
        (long_functions, "a/b.py", "class A:\n    async def f():\n" + "        x = 1\n" * 59),
        (catch_all_modules, "a/utils.py", ""),
        (catch_all_modules, "a/utils/b.py", ""),
        (filled_inits, "a/__init__.py", '"""Doc."""\n\n\nclass A:\n    pass\n'),
        (filled_inits, "a/__init__.py", "from a.b import c\n"),
        (filled_inits, "a/__init__.py", "def f():\n    pass\n"),
        (machine_paths, "README.md", f"see /{'home'}/someone/notes"),
        (machine_paths, "launch/a.sh", f'cd "/{"work"}/main"'),
        (machine_paths, ".ci/run", f"cp x /{'root'}/y"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, checker, file, text):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert checker(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a/b.py", "x = 1\n" * 500),
        ("a/b.py", 'def f():\n    """' + "Say.\n" * 40 + '"""\n' + "    x = 1\n" * 58),
        ("a/__init__.py", '"""Doc."""\n\n__version__ = "1"\n'),
        ("README.md", "a/work/b, https://example.org/home/x and /tmp/x are no machine's"),
        ("tests/a.py", f'"/{"home"}/someone/x"'),
        (".venv/lib/utils.py", "x = 1\n" * 501),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path, file, text):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert [violation for checker in CHECKERS for violation in checker(tmp_path)] == []

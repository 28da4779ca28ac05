"""The default corpus: real text that every machine with Python and this project's requirements already has.

The standard library's sources come whole, then files of the installed packages until the wanted size is reached.
Tests, tables and duplicates are left out. The order is that of a hash of the files' names: the same everywhere for
the same versions, and mixed, so that the last documents (the validation split) are like the rest.
"""

import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".txt", ".rst", ".md")
PACKAGES = {
    "torch": "torch",
    "deepspeed": "deepspeed",
    "megatron": "megatron-core",
    "numpy": "numpy",
    "datasets": "datasets",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "sympy": "sympy",
    "pandas": "pandas",
    "networkx": "networkx",
    "cvxpy": "cvxpy",
    "tensorboard": "tensorboard",
    "huggingface_hub": "huggingface_hub",
}
"""Module and distribution of the packages to read: this project's requirements and what they bring."""
LEFT_OUT = {"test", "tests", "testing", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
LONGEST_FILE_BYTES = 1_000_000
LONGEST_MEAN_LINE = 120
"""Characters; text with longer lines on average is a table or generated."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the default corpus before it is read."""

    origin: str
    """"stdlib" or a module's name."""
    name: str
    """Path below the origin's parent, with forward slashes."""
    path: Path

    @property
    def order(self) -> bytes:
        return hashlib.sha256(self.name.encode()).digest()


def available_versions() -> dict[str, str]:
    """Version of Python and of every package the default corpus can draw from on this machine."""
    versions = {"stdlib": platform.python_version()}
    for module, distribution in PACKAGES.items():
        try:
            versions[module] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine_texts(limit_bytes: int) -> Iterator[tuple[SourceFile, str]]:
    """Texts of the default corpus in their final order, `limit_bytes` of UTF-8 less what did not fit."""
    chosen, used_bytes, seen = [], 0, set()
    for file in _candidates():
        text = _readable_text(file.path)
        if text is None:
            continue
        content = text.encode()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        if used_bytes + len(content) > limit_bytes:
            break
        seen.add(digest)
        used_bytes += len(content)
        chosen.append((file, text))
    yield from sorted(chosen, key=lambda pair: pair[0].order)


def _candidates() -> Iterator[SourceFile]:
    """The standard library's files, then those of all packages together, each part in hash order."""
    yield from sorted(_files("stdlib", Path(sysconfig.get_paths()["stdlib"])), key=lambda file: file.order)
    packages = []
    for module in PACKAGES:
        specification = importlib.util.find_spec(module)
        for location in (specification.submodule_search_locations or ()) if specification else ():
            packages += _files(module, Path(location))
    yield from sorted(packages, key=lambda file: file.order)


def _files(origin: str, root: Path) -> list[SourceFile]:
    files = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        name = path.name
        if path.suffix not in SUFFIXES or LEFT_OUT.intersection(relative.parts):
            continue
        if name.startswith("test_") or name.endswith(("_test.py", "_tests.py")):
            continue
        files.append(SourceFile(origin, f"{origin}/{relative.as_posix()}", path))
    return files


def _readable_text(path: Path) -> str | None:
    """The text of a file; None where it is empty, long, not UTF-8 or a table."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.strip() or len(content) > LONGEST_FILE_BYTES or "\0" in text:
        return None
    return None if len(text) / (text.count("\n") + 1) > LONGEST_MEAN_LINE else text

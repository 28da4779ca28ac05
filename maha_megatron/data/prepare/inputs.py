"""The files behind input paths: the one listing that both reading and "done already" go by. Standard library only."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from maha_megatron.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
UNSUPPORTED = (".csv", ".tsv", ".arrow", ".tar", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".lz4")
"""Endings of tables and archives that hold text which is not read."""


@dataclass(frozen=True)
class InputFile:
    """A file to read, or the lines of it that begin in [start, stop)."""

    path: Path
    argument: str
    """The input path that it was found under."""
    start: int = 0
    stop: int | None = None
    fault: str = ""
    """Why nothing of it can be read: a link without a target, or a folder that cannot be listed; stop is then 0."""

    @property
    def compression(self) -> str:
        """ ".gz", ".zst" or nothing."""
        ending = self.path.suffix.lower()
        return ending if ending in COMPRESSED else ""

    @property
    def kind(self) -> str:
        """The ending that decides how it is read, in small letters, that of its compression left out."""
        return (Path(self.path.stem) if self.compression else self.path).suffix.lower()

    @property
    def size_bytes(self) -> int:
        """On the disk; 0 where it is gone or closed to us, which reading it will tell."""
        try:
            return (self.path.stat().st_size if self.stop is None else self.stop) - self.start
        except OSError:
            return 0


def list_inputs(paths: Sequence[str], suffixes: Sequence[str] | None = None) -> list[InputFile]:
    """The files behind input paths, in the order in which they are read.

    Args:
        paths: Files, which are always taken, or folders, whose files are sorted; linked folders in them are read as
            well, each folder once; hidden files and folders are left out.
        suffixes: In folders, only files with one of these endings; None: all.

    Raises:
        DataError: A path does not exist or a folder has no such file.
    """
    return [file for name in paths for file in _files(Path(name), name, suffixes)]


def _files(path: Path, argument: str, suffixes: Sequence[str] | None) -> list[InputFile]:
    if not path.exists():
        raise DataError(f"input {path} does not exist")
    if path.is_file():
        return [InputFile(path, argument)]
    refused: list[OSError] = []
    files = []
    for folder, _, names in _folders(path, refused.append):
        for name in names:
            file = Path(folder, name)
            if name.startswith(".") or not (suffixes is None or name.endswith(tuple(suffixes))):
                continue
            if os.path.isfile(file):
                files.append(InputFile(file, argument))
            elif not os.path.exists(file):
                fault = "is a link without a target or cannot be reached: mend or remove it"
                files.append(InputFile(file, argument, stop=0, fault=fault))
    for error in refused:
        fault = f"is a folder that cannot be listed ({error.strerror}): change its permissions or leave it out"
        files.append(InputFile(Path(error.filename), argument, stop=0, fault=fault))
    if not files:
        raise DataError(f"folder {path} holds no file{f' ending in {suffixes}' if suffixes else ''} to read")
    return sorted(files, key=lambda file: file.path)


def _folders(path: Path, onerror: Callable[[OSError], object] | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """Of a folder and those in it that are read, linked ones too, each once: its path, its real path, its names."""
    seen = set()
    for folder, folders, names in os.walk(path, onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link may lead back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, real, names


def refuse_output_in_input(output: Path, paths: Sequence[str]) -> None:
    """Refuse an output that the next run would read as input.

    Raises:
        DataError: The output is one of the input paths, or lies under one or in a folder that is linked from there.
    """
    target, folder = output.resolve(), str(output.resolve().parent)
    for name in paths:
        under = Path(name).exists() and target.is_relative_to(Path(name).resolve())
        if under or any(real == folder for _, real, _ in _folders(Path(name))):
            raise DataError(
                f"the output {output} lies in the input {name} and would be read by the next run: write it elsewhere"
            )


def divide(files: Sequence[InputFile], parts: int) -> list[list[InputFile]]:
    """Cut the inputs into consecutive parts of about equal size; only uncompressed .jsonl is cut inside a file.

    Parts in which no file begins are left out, so there may be fewer than asked for.
    """
    sizes = [file.size_bytes for file in files]
    borders = [sum(sizes) * part // parts for part in range(1, parts)]
    divided: list[list[InputFile]] = [[] for _ in range(parts)]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        inner = [border for border in borders if before < border < before + size]
        part = sum(border <= before for border in borders)
        if file.kind not in JSON_LINES or file.compression or not inner:
            divided[part].append(file)
        else:
            cuts = [0, *(border - before for border in inner), None]
            for number, (start, stop) in enumerate(pairwise(cuts)):
                divided[part + number].append(replace(file, start=start, stop=stop))
        before += size
    return [part for part in divided if part]

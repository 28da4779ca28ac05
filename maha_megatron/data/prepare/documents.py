"""Reading documents from files of every supported kind, one at a time and unchanged."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from maha_megatron.errors import DataError

PIECE_CHARACTERS = 1 << 20
"""A plain text longer than this becomes several documents, cut at line ends, so that memory stays bounded."""
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    """One document and where it came from."""

    text: str
    source: str


def input_files(path: Path, suffixes: Sequence[str] | None = None) -> list[Path]:
    """The files behind an input path, sorted; hidden files and folders are left out.

    Args:
        path: A file, which is always taken, or a folder.
        suffixes: In a folder, only files with one of these endings; None: all.

    Raises:
        DataError: The path does not exist or the folder has no such file.
    """
    if not path.exists():
        raise DataError(f"input {path} does not exist")
    if path.is_file():
        return [path]
    files = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and (suffixes is None or file.name.endswith(tuple(suffixes))):
            files.append(file)
    if not files:
        raise DataError(f"folder {path} holds no file{f' ending in {suffixes}' if suffixes else ''} to read")
    return files


def read_documents(
    paths: Sequence[str], *, key: str = "text", suffixes: Sequence[str] | None = None
) -> Iterator[Document]:
    """Every document of the inputs, in order.

    Args:
        paths: Files or folders: .jsonl (.gz, .zst), .parquet; any other file is one plain text document, or several
            where it is long. In a folder, files that are not UTF-8 text are left out.
        key: The field of JSON lines, or the parquet column, that holds the text.
        suffixes: In folders, only files with one of these endings.

    Raises:
        DataError: A file is missing, damaged, not UTF-8, or lacks the key.
    """
    for name in paths:
        for file in input_files(Path(name), suffixes):
            yield from _read_file(file, key, from_folder=Path(name).is_dir())


def _read_file(file: Path, key: str, *, from_folder: bool) -> Iterator[Document]:
    kind = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    try:
        if kind in JSON_LINES:
            yield from _json_lines(file, key)
        elif kind == ".parquet":
            yield from _parquet(file, key)
        elif not from_folder or _is_text(file):
            yield from _plain_text(file)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}): repair it or leave it out") from error


def _open_binary(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    if file.suffix == ".zst":
        frames = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True)
        return io.BufferedReader(frames)
    return file.open("rb")


def _json_lines(file: Path, key: str) -> Iterator[Document]:
    with _open_binary(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                tree = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number} is no JSON ({error}): repair or remove the line") from error
            yield Document(_text_of(tree, key, f"{file}, line {number}"), f"{file}:{number}")


def _text_of(tree: Any, key: str, place: str) -> str:
    if not isinstance(tree, dict) or key not in tree:
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise DataError(f"{place} has no field {key!r} (it has: {found}): name the one with the text by --json-keys")
    text = tree[key]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {key!r} is no text but {type(text).__name__}; name another by --json-keys")
    return text


def _parquet(file: Path, key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet file ({error}): repair it or leave it out") from error
    if key not in table.schema_arrow.names:
        raise DataError(
            f"{file} has no column {key!r} (it has: {', '.join(table.schema_arrow.names)}):"
            " name the one with the text by --json-keys"
        )
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[key]):
        for text in batch.column(0).to_pylist():
            yield Document(_text_of({key: text}, key, f"{file}, row {number}"), f"{file}:{number}")
            number += 1


def _is_text(file: Path) -> bool:
    """Whether a file begins like UTF-8 text."""
    with _open_binary(file) as stream:
        head = stream.read(4096)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and b"\0" not in head  # a character cut at the end is no fault
    return b"\0" not in head


def _plain_text(file: Path) -> Iterator[Document]:
    with io.TextIOWrapper(_open_binary(file), encoding="utf-8", newline="") as stream:
        for number, piece in enumerate(_pieces(stream)):
            yield Document(piece, f"{file}:{number}" if number else str(file))


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    characters = 0
    for line in lines:
        if held and characters + len(line) > PIECE_CHARACTERS:
            yield "".join(held)
            held, characters = [], 0
        held.append(line)
        characters += len(line)
    if held:
        yield "".join(held)

"""Documents from blocks, one at a time and unchanged; what is none is told by line and reason."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maha_megatron.data.prepare.blocks import (
    BYTE_ORDER_MARK,
    CUT,
    LONGEST_BYTES,
    NO_UTF8,
    NOT_OPENED,
    NOT_READ,
    TOO_LONG,
    Block,
    TooLong,
    read_blocks,
)
from maha_megatron.data.prepare.inputs import list_inputs
from maha_megatron.errors import DataError

NO_TEXT_KINDS = (NOT_READ, NOT_OPENED, NO_UTF8)
"""Kinds of bad files that are no documents at all, rather than broken ones."""


@dataclass(frozen=True)
class Document:
    """One document and where it came from."""

    text: str
    source: str


@dataclass(frozen=True)
class BadLine:
    """A line, row or file that gives no document."""

    file: str
    line: int
    """Counted from 1; 0 stands for the file."""
    kind: str
    """What is wrong, in words that many lines can share."""
    detail: str

    def __str__(self) -> str:
        if self.line == 0:
            return self.detail
        return f"{self.file}, line {self.line} {self.detail}"


class LeftOut:
    """Files of folders that hold no text which is read, and long ones: how many of each kind, and the first."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.first = ""

    def add(self, bad: BadLine) -> None:
        """Count a file."""
        self.kinds[bad.kind] += 1
        self.first = self.first or str(bad)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.kinds.total()} files of the input were left out or cut ({kinds}), the first: {self.first}"


class BadLineError(DataError):
    """A strict reader met a bad line."""

    def __init__(self, bad: BadLine):
        super().__init__(bad)
        self.line = bad.line or math.inf  # a file's problem is told behind its lines


def read_documents(
    paths: Sequence[str],
    *,
    key: str = "text",
    suffixes: Sequence[str] | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Document]:
    """Every document of the inputs, in order.

    Args:
        paths: Files or folders, as for list_inputs and read_blocks.
        key: The field of JSON lines, or the parquet column, that holds the text.
        suffixes: In folders, only files with one of these endings.
        left_out: Hears of files of folders that hold no text which is read, and of texts that are cut; None: the first
            ends the reading.

    Raises:
        DataError: A file is missing, damaged, no text, or lacks the key.
    """

    def on_bad(bad: BadLine) -> None:
        found_in_folder = bad.kind in NO_TEXT_KINDS and not any(Path(bad.file) == Path(name) for name in paths)
        left_out.add(bad) if left_out is not None and (found_in_folder or bad.kind == CUT) else refuse(bad)

    for block in read_blocks(list_inputs(paths, suffixes), [key]):
        yield from documents_of(block, key, longest_bytes=LONGEST_BYTES, on_bad=on_bad)


def refuse(bad: BadLine) -> None:
    """What a strict reader does with a bad line.

    Raises:
        BadLineError: Always.
    """
    raise BadLineError(bad)


def documents_of(
    block: Block, key: str, *, longest_bytes: int, on_bad: Callable[[BadLine], object]
) -> Iterator[Document]:
    """The documents that a block holds under a key; `on_bad` hears of the rest, in order."""
    if block.problem is not None:
        if not block.problem_keys or key in block.problem_keys:
            on_bad(BadLine(block.file, 0, *block.problem))
    elif block.lines is not None:
        yield from _of_lines(block, key, longest_bytes, on_bad)
    elif block.names:
        yield from map(Document, block.texts, block.names)
    else:
        for number, text in enumerate(block.columns.get(key, ()), start=block.number + 1):
            if isinstance(text, TooLong) or (isinstance(text, str) and len(text) > longest_bytes):
                on_bad(_too_long(block, number))
            elif isinstance(text, str):
                yield Document(text, f"{block.file}:{number}")
            else:
                on_bad(BadLine(block.file, number, *_why_no_text(text, key)))


def _of_lines(block: Block, key: str, longest_bytes: int, on_bad: Callable[[BadLine], object]) -> Iterator[Document]:
    skipped = set(block.too_long)
    for number, line in enumerate(block.lines.split(b"\n"), start=block.number + 1):
        if number in skipped:
            continue
        if len(line) > longest_bytes:
            on_bad(_too_long(block, number))
        elif line.strip():
            found = _text_or_fault(line, key)
            if isinstance(found, str):
                yield Document(found, f"{block.file}:{number}")
            else:
                on_bad(BadLine(block.file, number, *found))
    for number in sorted(skipped):
        on_bad(_too_long(block, number))


def _too_long(block: Block, number: int) -> BadLine:
    return BadLine(block.file, number, TOO_LONG, f"is {TOO_LONG}; raise --longest-document")


def _text_or_fault(line: bytes, key: str) -> str | tuple[str, str]:
    """The text of a JSON line, or (kind, detail) of what is wrong."""
    try:
        tree = json.loads(line.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        return "not UTF-8", f"is not UTF-8 ({error}): repair or remove the line"
    except (ValueError, RecursionError) as error:
        return "no JSON", f"is no JSON ({error}): repair or remove the line"
    if not isinstance(tree, dict) or key not in tree:
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        return "missing field", f"has no field {key!r} (it has: {found}): name the one with the text by --json-keys"
    return tree[key] if isinstance(tree[key], str) else _why_no_text(tree[key], key)


def _why_no_text(value: Any, key: str) -> tuple[str, str]:
    return "wrong type", f"field {key!r} is no text but {type(value).__name__}; name another by --json-keys"

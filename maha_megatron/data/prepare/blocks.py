"""Reading inputs of every supported kind in blocks of bounded size, from any position on.

A block is cheap to make: lines are cut but not parsed, so that one process can read for many that tokenise. Where the
blocks end depends on the input alone. A position says where the next block begins; reading from it gives the same
blocks as reading on.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, BinaryIO

from maha_megatron.data.prepare.decompression import FAULTS, Decompressed, is_damage
from maha_megatron.data.prepare.inputs import JSON_LINES, UNSUPPORTED, InputFile

BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1000
ROWS_AT_ONCE = 8
"""Of parquet, that are decoded together; however long they are, memory stays bounded."""
LONGEST_BYTES = 16_000_000
"""Default limit of a JSON line, a parquet cell or a text."""
BYTE_ORDER_MARK = "\ufeff"
TOO_LONG = "longer than the limit"
UNREADABLE, NOT_READ, NO_UTF8, CUT = "unreadable file", "unsupported kind", "no UTF-8 text", "text cut into several"
NO_COLUMN, DAMAGED = "missing column", "damaged file whose documents may be wrong"
NOT_OPENED = "link or folder that cannot be opened"
NO_UTF8_ADVICE = "is no UTF-8 text: convert it (iconv) or leave it out"


class Unfit(Exception):
    """A file ends here, and not well: `kind` in words that many files can share, and what to do about it.

    It speaks of the given keys alone, or of all where none are given.
    """

    def __init__(self, kind: str, detail: str, keys: Sequence[str] = ()):
        super().__init__(detail)
        self.kind, self.keys = kind, tuple(keys)


@dataclass(frozen=True)
class TooLong:
    """Stands for a value of a column beyond the limit that was passed over while reading."""


@dataclass(frozen=True, order=True)
class Position:
    """Where reading goes on."""

    file: int = 0
    """Index in the list of files."""
    offset: int = 0
    """Bytes of the file's lines, once decompressed, that were read; 0 for other kinds."""
    number: int = 0
    """Lines, rows or pieces of the file that were read."""


BEGINNING = Position()


@dataclass(frozen=True)
class Block:
    """Some consecutive lines, rows or texts of one input."""

    argument: str
    file: str
    number: int
    """Lines or rows of the file before this block."""
    end: Position
    lines: bytes | None = None
    """JSON lines as they stand in the file."""
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """The rows' values, of any type, by key."""
    texts: tuple[str, ...] = ()
    """Whole texts."""
    names: tuple[str, ...] = ()
    """Where each of them comes from."""
    too_long: tuple[int, ...] = ()
    """Numbers of lines beyond the limit that were passed over while reading."""
    problem: tuple[str, str] | None = None
    """(kind, detail) of what is wrong with the rest of the file, of which nothing is read."""
    problem_keys: tuple[str, ...] = ()
    """Of which keys the problem speaks; none: of all."""
    read_bytes: int = 0
    """Bytes of all inputs, as they lie on the disk, that were read so far."""

    @property
    def content_bytes(self) -> int:
        """About what it holds."""
        texts = (value for values in (*self.columns.values(), self.texts) for value in values if isinstance(value, str))
        return len(self.lines or b"") + sum(map(len, texts))


def read_blocks(
    files: Sequence[InputFile], keys: Sequence[str], start: Position = BEGINNING, *, longest_bytes: int = LONGEST_BYTES
) -> Iterator[Block]:
    """The blocks of the inputs, in order.

    Args:
        files: .jsonl, or .json that holds lines of it (.gz, .zst), and .parquet; of UNSUPPORTED, and of
            files that do not begin like UTF-8 text, a block tells. Any other file is one plain text document; of one
            beyond longest_bytes, which becomes several, cut at line ends, a block tells as well.
        keys: The parquet columns that hold the texts.
        start: Where to begin.
        longest_bytes: A longer line that its block does not hold whole is passed over and told of in it; who reads the
            block measures the others.
    """
    held: list[Block] = []  # short texts, joined so that a folder of small files is no crowd of blocks
    characters = 0
    for block in _all_blocks(files, keys, start, longest_bytes):
        joins = block.problem is None and files[block.end.file].kind not in READERS
        more = sum(map(len, block.texts)) if joins else 0
        if held and not (joins and held[0].argument == block.argument and characters + more <= BLOCK_BYTES):
            yield _joined(held)
            held, characters = [], 0
        if joins:
            held.append(block)
            characters += more
        else:
            yield block
    if held:
        yield _joined(held)


def _joined(blocks: Sequence[Block]) -> Block:
    texts, names = [], []
    for block in blocks:
        texts += block.texts
        names += block.names
    return replace(blocks[-1], texts=tuple(texts), names=tuple(names))


def _all_blocks(
    files: Sequence[InputFile], keys: Sequence[str], start: Position, longest_bytes: int
) -> Iterator[Block]:
    before = sum(file.size_bytes for file in files[: start.file])
    for index in range(start.file, len(files)):
        file, place = files[index], start if index == start.file else Position(index)
        reader = READERS.get(file.kind, _plain_text)
        try:
            if file.fault:
                raise Unfit(NOT_OPENED, file.fault)
            for block in reader(file, keys, place, longest_bytes):
                place = block.end
                yield replace(block, read_bytes=before + block.read_bytes)
        except (Unfit, *READ_ERRORS) as error:
            if isinstance(error, Unfit):
                problem, of = (error.kind, f"{file.path} {error}"), error.keys
            elif place.number and is_damage(error):
                where = f"{file.path} is damaged, and the {place.number} lines or rows that it gave may be wrong"
                problem, of = (DAMAGED, f"{where} ({error}): replace it, or leave it out"), ()
            else:
                where = f"{file.path} cannot be read after {place.number} lines or rows"
                problem, of = (UNREADABLE, f"{where} ({error}): repair it or leave it out"), ()
            content = {"problem": problem, "problem_keys": of, "read_bytes": before + file.size_bytes}
            yield _block(file, place, Position(index + 1), **content)
        before += file.size_bytes


def _block(file: InputFile, place: Position, end: Position, **content: Any) -> Block:
    return Block(file.argument, str(file.path), place.number, end, **content)


# ------------------------------------------------------------------------------------------------------- JSON lines


def _json_lines(file: InputFile, keys: Sequence[str], start: Position, longest_bytes: int) -> Iterator[Block]:
    with _opened(file) as (raw, stream, fault):
        place = start
        if file.compression:
            place = replace(start, offset=0, number=0)
        elif start.offset or file.start:
            place = _seek(stream, file, start)
        while file.stop is None or place.offset < file.stop:
            room = BLOCK_BYTES if file.stop is None else min(BLOCK_BYTES, file.stop - place.offset)
            content = stream.read(room)
            if not content:
                break
            read, lines, too_long = _to_line_end(stream, content, place.number, longest_bytes)
            if fault():
                lines = lines[: lines.rfind(b"\n") + 1]  # the line that broke off
            if file.kind == ".json" and place.offset == 0 and not _begins_with_an_object(lines):
                raise Unfit(NOT_READ, "holds no JSON lines: write it as .jsonl, an object with the text in each line")
            end = Position(place.file, place.offset + read, place.number + lines.count(b"\n") + len(too_long))
            if place.offset >= start.offset:  # compressed files are read again from their beginning
                yield _block(file, place, end, lines=lines, too_long=too_long, read_bytes=raw.tell() - file.start)
            place = end
        if error := fault():
            raise error


def _begins_with_an_object(lines: bytes) -> bool:
    """Whether the first line is a JSON object; also where nothing is there to tell."""
    first = lines.strip().split(b"\n", 1)[0]
    try:
        return not first or isinstance(json.loads(first.decode("utf-8").removeprefix(BYTE_ORDER_MARK)), dict)
    except (ValueError, RecursionError):
        return False


def _to_line_end(
    stream: BinaryIO, content: bytes, number: int, longest_bytes: int
) -> tuple[int, bytes, tuple[int, ...]]:
    """Bytes read, whole lines, and the number of one beyond longest_bytes and the block that was passed over."""
    begin = content.rfind(b"\n") + 1
    if begin == len(content):
        return len(content), content, ()
    tail = len(content) - begin
    rest = stream.readline(max(longest_bytes - tail, 0) + 1)
    if rest.endswith(b"\n") or tail + len(rest) <= longest_bytes:
        return len(content) + len(rest), content + rest, ()
    read = len(content) + len(rest)
    while rest and not rest.endswith(b"\n"):
        rest = stream.readline(BLOCK_BYTES)
        read += len(rest)
    return read, content[:begin], (number + content.count(b"\n") + 1,)


def _seek(stream: BinaryIO, file: InputFile, start: Position) -> Position:
    """Go to a position of a plain file; a part begins with the first line that begins in it."""
    if start.offset:
        stream.seek(start.offset)
        return start
    lines, left = 0, file.start - 1
    while left:
        content = stream.read(min(left, BLOCK_BYTES))
        lines, left = lines + content.count(b"\n"), left - len(content)
    while not stream.readline(BLOCK_BYTES).endswith(b"\n") and stream.peek(1):
        pass
    return Position(start.file, stream.tell(), lines + 1)


@contextmanager
def _opened(file: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO, Callable[[], Exception | None]]]:
    """The file as it lies on the disk, its content, and what tells where that ended whether it broke off there."""
    with file.path.open("rb") as raw:
        if file.compression:
            content = Decompressed(raw, file.compression)
            with io.BufferedReader(content) as stream:
                yield raw, stream, lambda: content.fault
        else:
            yield raw, raw, lambda: None


# ------------------------------------------------------------------------------------------------- parquet and text


def _parquet(file: InputFile, keys: Sequence[str], start: Position, longest_bytes: int) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        # without buffer_size, and with pre_buffer, a whole column of a row group would be held
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=BLOCK_BYTES, pre_buffer=False) as table:
            there = table.schema_arrow.names
            found, missing = [key for key in keys if key in there], [key for key in keys if key not in there]
            number, held, size = start.number, [], 0
            for values, num_bytes in _rows(table, found, start.number, longest_bytes) if found else ():
                held.append(values)
                size += num_bytes
                if size >= BLOCK_BYTES or len(held) == BLOCK_ROWS:
                    yield _row_block(file, table, Position(start.file, 0, number), found, held)
                    number, held, size = number + len(held), [], 0
            if held:
                yield _row_block(file, table, Position(start.file, 0, number), found, held)
    except pyarrow.ArrowException as error:
        raise OSError(f"is no parquet file or damaged: {error}") from error
    if missing:
        names = " and ".join(map(repr, missing))
        raise Unfit(
            NO_COLUMN,
            f"has no column {names} (it has: {', '.join(there)}): name the one with the text by --json-keys",
            missing,
        )


def _row_block(
    file: InputFile, table: Any, place: Position, keys: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> Block:
    end = replace(place, number=place.number + len(rows))
    columns = dict(zip(keys, zip(*rows, strict=True), strict=True))
    return _block(file, place, end, columns=columns, read_bytes=file.size_bytes * end.number // table.metadata.num_rows)


def _rows(table: Any, keys: Sequence[str], first: int, longest_bytes: int) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Values of columns from a row on, with their bytes where they are text; few rows are decoded at a time."""
    before = 0
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        if before + about.num_rows > first:
            at_once = min(max(BLOCK_BYTES * about.num_rows // max(about.total_byte_size, 1), 1), ROWS_AT_ONCE)
            skipped = max(first - before, 0)
            for batch in table.iter_batches(at_once, row_groups=[group], columns=list(keys), use_threads=False):
                rows = zip(*(_values(batch.column(key), longest_bytes) for key in keys), strict=True)
                for row in islice(rows, min(skipped, batch.num_rows), None):
                    yield tuple(value for value, _ in row), sum(size for _, size in row)
                skipped = max(skipped - batch.num_rows, 0)
        before += about.num_rows


def _values(column: Any, longest_bytes: int) -> Iterator[tuple[Any, int]]:
    import pyarrow.compute

    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        yield from ((value, 0) for value in column.to_pylist())
        return
    sizes = pyarrow.compute.binary_length(column).to_pylist()
    if max(filter(None, sizes), default=0) <= longest_bytes:
        yield from zip(column.to_pylist(), (size or 0 for size in sizes), strict=True)
        return
    for value, size in zip(column, sizes, strict=True):
        long = size is not None and size > longest_bytes
        yield (TooLong(), 0) if long else (value.as_py(), size or 0)


def _plain_text(file: InputFile, keys: Sequence[str], start: Position, longest_bytes: int) -> Iterator[Block]:
    number = -1
    with _opened(file) as (raw, stream, fault):
        if not _is_text(stream.peek(4096)[:4096]):
            raise Unfit(NO_UTF8, NO_UTF8_ADVICE)
        for number, piece in enumerate(_pieces(stream, fault, longest_bytes)):
            if number >= start.number:
                place, end = Position(start.file, 0, number), Position(start.file, 0, number + 1)
                try:
                    text = piece.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise Unfit(NO_UTF8, f"{NO_UTF8_ADVICE} ({error})") from error
                name = f"{file.path}:{number}" if number else str(file.path)
                yield _block(file, place, end, texts=(text,), names=(name,), read_bytes=raw.tell())
    if number > 0:
        raise Unfit(
            CUT, f"is longer than {longest_bytes} bytes and became {number + 1} documents: raise --longest-document"
        )


def _is_text(head: bytes) -> bool:
    """Whether a file begins like UTF-8 text."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and b"\0" not in head  # a character cut at the end is no fault
    return b"\0" not in head


def _pieces(stream: BinaryIO, fault: Callable[[], Exception | None], longest_bytes: int) -> Iterator[bytes]:
    """A text in pieces of at most longest_bytes that end at line ends where there are any; none that broke off."""
    held = stream.read(longest_bytes + 1)
    while len(held) > longest_bytes:
        cut = held.rfind(b"\n", 0, longest_bytes) + 1
        if cut == 0:  # where a character begins
            cut = max(place for place in range(longest_bytes - 3, longest_bytes + 1) if held[place] & 0xC0 != 0x80)
        yield held[:cut]
        held = held[cut:]
        held += stream.read(longest_bytes + 1 - len(held))
    if error := fault():
        raise error
    if held:
        yield held


def _not_read(file: InputFile, keys: Sequence[str], start: Position, longest_bytes: int) -> Iterator[Block]:
    raise Unfit(
        NOT_READ, f"ends in {file.kind}, which is not read: turn it into .jsonl(.gz/.zst), .parquet or text files"
    )


READERS = {
    **dict.fromkeys((*JSON_LINES, ".json"), _json_lines),
    ".parquet": _parquet,
    **dict.fromkeys(UNSUPPORTED, _not_read),
}
READ_ERRORS = (*FAULTS, UnicodeDecodeError)

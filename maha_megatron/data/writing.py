"""Writing files so that a name never stands for half a content. Standard library only.

Every byte that data preparation and the sample index put on a disk passes through `write`; it is called by the name
of this module, so that a test can fill the disk in one place.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from maha_megatron.errors import DataError

COPIED_AT_ONCE = 1 << 22


def write(stream: BinaryIO, content: bytes | memoryview) -> None:
    """Write bytes; a full disk is an OSError here and nowhere else."""
    stream.write(content)


class WrittenThrough:
    """A file for those who ask for one to write to: everything passes through `write`."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def write(self, content: bytes) -> int:
        write(self._stream, content)
        return len(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends without an error, and is removed when it does not.

    Raises:
        DataError: The file cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Make `path` a file of exactly this content, on the disk before its name is.

    Raises:
        DataError: As whole_file.
    """
    with whole_file(path) as partial, partial.open("wb") as stream:
        write(stream, content)
        settle(stream)


def join_files(parts: Sequence[Path], path: Path) -> None:
    """Make `path` a file of the contents of others, one after the other, in constant memory.

    Raises:
        DataError: As whole_file.
    """
    with whole_file(path) as partial, partial.open("wb") as stream:
        for part in parts:
            with part.open("rb") as source:
                while content := source.read(COPIED_AT_ONCE):
                    write(stream, content)
        settle(stream)


def settle(stream: BinaryIO) -> None:
    """Return when what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def cannot_write(path: Path, error: OSError) -> DataError:
    """The error for a file that could not be written."""
    return DataError(f"cannot write {path}: {error.strerror or error}")

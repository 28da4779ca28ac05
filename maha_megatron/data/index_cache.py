"""Folders that several processes may want at once and that exist either whole or not at all."""

import fcntl
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maha_megatron.errors import DataError


def complete_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make sure that `folder` exists with the content that `fill` writes.

    The first process to come fills a folder of its own and renames it; those that come meanwhile wait for it. No
    process group is needed, and nodes with folders of their own each fill theirs. Where the file system has no
    locks, several processes fill and the first rename wins.

    Raises:
        DataError: The folder cannot be written.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return
            # process ids repeat on other nodes, and in other containers of this one
            partial = folder.with_name(f".{folder.name}.{socket.gethostname()}.{secrets.token_hex(8)}.partial")
            try:
                partial.mkdir()
                fill(partial)
                _rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the sample index {folder} ({error}): free space or set data.cache to another folder"
        ) from error


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # not because another process was first
            raise


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system drops it when the process ends, however it ends."""
    with path.open("w") as stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield

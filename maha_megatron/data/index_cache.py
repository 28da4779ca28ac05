"""Folders that several processes may want at once and that exist either whole or not at all."""

import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maha_megatron.errors import DataError

ABANDONED_S = 24 * 3600.0
"""Age from which on what another node was filling is taken for the rest of a process that was killed."""


def complete_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make sure that `folder` exists with the content that `fill` writes.

    The first process to come fills a folder of its own and renames it; those that come meanwhile wait for it. No
    process group is needed, and nodes with folders of their own each fill theirs. Where the file system has no
    locks, several processes fill and the first rename wins. What killed processes left beside it is removed first.

    Raises:
        DataError: The folder cannot be written.
    """
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        with _lock(_lock_path(folder)):
            if folder.is_dir():
                return
            # process ids repeat on other nodes, and in other containers of this one
            partial = folder.with_name(f".{folder.name}.{_host()}.{secrets.token_hex(8)}.partial")
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


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which is removed afterwards; the system drops it however the process ends.

    Yields:
        Whether it is held: not where the file system has no locks, nor where another process has it and wait is False.
    """
    while True:
        with path.open("w") as stream:
            held = False
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            if held and not _is_named(stream.fileno(), path):  # the process that had it removed the file
                continue
            try:
                yield held
            finally:
                if held:
                    path.unlink(missing_ok=True)
            return


def _is_named(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _remove_leftovers(cache: Path) -> None:
    """Remove locks that nobody holds and what was being filled under them: of this node at once, of others by age.

    Locks may not reach other nodes, and a process there may be filling what nobody has a lock on here.
    """
    for partial in cache.glob(".*.*.*.partial"):
        name, host, _, _ = partial.name.rsplit(".", 3)
        with suppress(OSError), _lock(partial.with_name(f"{name}.lock"), wait=False) as held:
            if (held and host == _host()) or time.time() - partial.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(partial)
    for path in cache.glob(".*.lock"):
        with suppress(OSError), _lock(path, wait=False):
            pass

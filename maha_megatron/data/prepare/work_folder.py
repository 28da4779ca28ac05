"""The folder in which a pair is made, <prefix>.partial, and the moment at which the pair gets its names.

Every file of a pair is written there before one of them gets its final name. So an old pair of that name stays whole
however the making of the new one ends, and goes when the new one is there.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import manifest_path
from maha_megatron.data.writing import cannot_write
from maha_megatron.errors import DataError

LOCK = "lock"
ENDINGS = ("bin", "idx", "checksums.npz", "bad_lines.jsonl", "manifest.json")
"""The files of a pair in the order in which they get their names."""


class WorkFolder:
    """One process at a time has the folder of a pair.

    Args:
        prefix: Path of the pair without its ending.

    Raises:
        DataError: Another process makes this pair, or the folder cannot be written.
    """

    def __init__(self, prefix: Path):
        self.prefix, self.path = prefix, _folder(prefix)
        self.pair = self.path / "pair"
        """Prefix under which the files of the new pair are written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _locked(self) -> Any:
        lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self.prefix} is being written by another process; wait for it or stop it") from error
        except OSError:  # a file system without locks
            pass
        return lock

    def clear(self) -> None:
        """Throw away what an earlier process left."""
        for path in self.path.iterdir():
            if path.name != LOCK:
                path.unlink()

    def publish(self) -> None:
        """Give the files of the new pair their final names, and remove those of an old pair and the folder.

        Killed in between, it leaves no manifest, so the pair is not taken for a finished one, and never an old index
        beside new tokens.

        Raises:
            OSError: A file cannot be renamed.
        """
        manifest_path(self.prefix).unlink(missing_ok=True)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for ending in ENDINGS:
            made, final = Path(f"{self.pair}.{ending}"), Path(f"{self.prefix}.{ending}")
            if made.exists():
                os.replace(made, final)
            else:
                final.unlink(missing_ok=True)
        self.discard()

    def discard(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let other processes have the folder, which stays."""
        self._lock.close()


@contextmanager
def new_pair(prefix: Path) -> Iterator[Path]:
    """A prefix to write a pair to, which becomes `prefix` when the block ends without an error and else is removed.

    Raises:
        DataError: As WorkFolder, or a file cannot be written.
    """
    folder = WorkFolder(prefix)
    try:
        folder.clear()
        yield folder.pair
        folder.publish()
    except OSError as error:
        raise cannot_write(prefix, error) from error
    finally:
        folder.discard()


def remove_leftover(prefix: Path) -> None:
    """Remove what killed runs left of a pair, those with another number of partitions too; only once it is finished."""
    if _is_held(_folder(prefix)):  # another process makes the pair anew
        return
    leftover = re.compile(rf"{re.escape(prefix.name)}(\.partition-\d+-of-\d+\..+|\.partial)")
    for path in prefix.parent.iterdir():
        if leftover.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_held(folder: Path) -> bool:
    """Whether a process has the folder."""
    try:
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no folder, or a file system without locks
        pass
    return False


def _folder(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.partial")

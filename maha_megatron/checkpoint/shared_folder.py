"""Whether every rank sees the run's folder, found out before anything depends on it."""

import secrets
import time
from pathlib import Path

from maha_megatron.checkpoint.agreement import Failures, from_first, own_rank
from maha_megatron.errors import CheckpointError

PATIENCE_S = 5.0
"""A network file system may show a new file to other nodes a little later."""


def check_shared(run_folder: str | Path, *, patience_s: float = PATIENCE_S) -> None:
    """Let rank 0 write a file into the run's folder and every rank look for it. Collective over all ranks.

    Raises:
        CheckpointError: on every rank; rank 0 cannot write there, or another rank does not see what it wrote.
    """
    folder, failures = Path(run_folder), Failures()
    token = folder / from_first(f".shared_{secrets.token_hex(8)}")
    with failures.kept():
        if own_rank() == 0:
            _write(token)
    failures.raise_together()
    with failures.kept():
        if not _seen(token, patience_s):
            raise CheckpointError(
                f"rank {own_rank()} does not see what rank 0 wrote into run.folder ({folder.absolute()}): "
                "run.folder must lie on a shared file system, under the same path on every node"
            )
    try:
        failures.raise_together()
    finally:
        if own_rank() == 0:
            token.unlink(missing_ok=True)


def _write(token: Path) -> None:
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise CheckpointError(f"run.folder ({token.parent}) cannot be written: {error.strerror}") from error


def _seen(token: Path, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not token.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

"""A program of this repository in a process of its own, its output in a file, ended with all that it started."""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from maha_megatron.errors import TrainingError


class ChildProcess:
    """Started when it is made.

    Args:
        words: what follows `python` on the command line.
        log: file that gets what it prints; what the file holds is kept. It stays locked while the program lives, also
            when whoever started it was killed.
        device: the one GPU that it may see, as CUDA_VISIBLE_DEVICES names it; None for all.

    Raises:
        TrainingError: a program that is still alive prints to the log.
    """

    def __init__(self, words: Sequence[str], log: Path, *, device: str | None = None) -> None:
        self.log = log
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with open(log, "a", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the program inherits it with the file
            except BlockingIOError as error:
                raise TrainingError(f"{log}: what prints here still runs; wait for its end, or end it") from error
            # a session of its own: Ctrl-C reaches it only through whoever started it
            self._process = subprocess.Popen(
                [sys.executable, *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """The exit code once it has ended; None if it still runs after so many seconds."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def end(self) -> None:
        """Kill it and everything below it, also ranks that a launcher put into sessions of their own."""
        below = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self._process.pid).children(recursive=True)
        for found in (self._process, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.kill()
        self._process.wait()

    def last_lines(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

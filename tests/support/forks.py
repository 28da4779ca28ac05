"""Processes that are forks of one which has imported the slow packages; as fresh as that, without waiting for imports.

Where there is CUDA, which no fork of a process that has looked for it can use, there are none.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

HAS_FORKS = not torch.cuda.is_available()
# what training and its tests need; importing them starts no thread
_PRELOADED = ["pytest", "maha_megatron.train.loop", "maha_megatron.checkpoint.trained", "tests.support.training"]


def fork_context() -> ForkServerContext:
    """The context whose processes are such forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_forked(words: list[str], environment: dict[str, str], output: Path, timeout_s: float) -> int:
    """Run a script of Python in a fork as `python WORDS` runs it; its exit code.

    Args:
        words: the script and its arguments.
        environment: as of the new process; PYTHONPATH is honoured.
        output: a file that gets what it prints, errors included.

    Raises:
        TimeoutError: it ran past timeout_s, and has been killed.
    """
    process = fork_context().Process(target=_main, args=(words, environment, str(output)))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{words} ran past {timeout_s} s")
    return process.exitcode


def _main(words: list[str], environment: dict[str, str], output: str) -> None:
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = words
    sys.path[:0] = [str(Path(words[0]).resolve().parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(words[0], run_name="__main__")

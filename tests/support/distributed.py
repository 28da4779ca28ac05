"""Run a function on several gloo ranks of this machine, each in a Python process of its own.

Importing megatron-core and DeepSpeed takes seconds, so every rank is a fork of a process that has imported them; where
there is CUDA it is spawned.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.support.forks import HAS_FORKS, fork_context


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(rank, *args)` on every rank and return what they returned, by rank.

    Each process finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (a free one) in its environment, as
    under a launcher, and computes on one thread. `function` must be importable (a module's top level) and
    what it returns must be tensors and plain containers.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message is its traceback, the others are ended.
        TimeoutError: not done after timeout_s; every rank has been killed.
    """
    from maha_megatron.parallel.compat import free_port  # here, so that the ranks import no more than they need

    start_method = fork_context().get_start_method() if HAS_FORKS else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _rank_main,
            args=(function, world_size, free_port(), folder, args),
            nprocs=world_size,
            join=False,
            start_method=start_method,
        )
        deadline = time.monotonic() + timeout_s
        try:
            while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{world_size} ranks of {function.__qualname__} ran past {timeout_s} s")
        finally:
            for process in ranks.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world_size)]


def _rank_main(
    rank: int, function: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork stays; DeepSpeed's collections need not look through it
    result = function(rank, *args)
    torch.save(result, Path(folder) / str(rank))

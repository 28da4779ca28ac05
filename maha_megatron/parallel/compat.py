"""What megatron-core needs to live without CUDA, and what DeepSpeed needs to live beside it.

`prepare()` is called first, before a process group or a model exists; with CUDA it changes nothing but the
`_extra_state` keys. This module and train/engine.py are the only importers of deepspeed.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import random as mcore_random

from maha_megatron.config.schema import Config


def prepare() -> None:
    """Make megatron-core and DeepSpeed fit for this machine. Idempotent; call it before anything else."""
    _drop_extra_state()
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce (30 s) that only inference uses, and whose buffers
    # (66 MiB a rank and port) stay in /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # megatron-core asks for the current CUDA device wherever it allocates: the answer is the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Recomputation saves and restores "the CUDA generator's state": there is none beside torch's own.
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: None
    mcore_random._set_cuda_rng_state = lambda *args, **kwargs: None


def compute_device() -> torch.device:
    """The device of this process: its own GPU (by LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def initialise_distributed(config: Config) -> None:
    """Join the process group: NCCL on GPUs, gloo without. Works under the deepspeed launcher, torchrun and alone.

    Args:
        config: its parallel.timeout_minutes bounds every collective; without a bound a dead peer is waited for
            for half an hour.
    """
    prepare()
    import deepspeed

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if config.parallel.tensor > 1:
        # megatron-core starts a collective and then the product it hides behind: one queue keeps that order
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(compute_device())
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=_timeout(config),
    )


def initialise_model_parallel(config: Config) -> None:
    """Cut the ranks of the process group into tensor- and data-parallel groups (tensor-parallel ranks adjacent).

    That parallel.tensor divides the number of ranks is check_topology's to say, before any process group exists.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.parallel.timeout_minutes,
    )


def initialise_dry_run(config: Config) -> None:
    """Stand in for a whole run inside one process: rank 0 of fake groups, on which nothing is ever sent.

    For building a model on the meta device at any parallel.tensor; a collective on these groups would return garbage.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    prepare()
    dist.init_process_group("fake", rank=0, world_size=config.parallel.tensor, store=FakeStore())
    initialise_model_parallel(config)


def seed_everything(seed: int) -> None:
    """Seed torch and megatron-core's named random streams. Call it once the groups exist.

    No part of the model draws from these streams (weights are drawn by logical name, there is no dropout), but
    megatron-core's recomputation wants them to exist.
    """
    torch.manual_seed(seed)
    if not torch.cuda.is_available():
        mcore_random._CUDA_RNG_STATE_TRACKER = _CpuRngTracker()
        mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the groups; a no-op where there are none."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.parallel.timeout_minutes)


def _drop_extra_state() -> None:
    """The linear layers save `_extra_state = None`, which DeepSpeed's universal checkpoint cannot read.

    Their `set_extra_state` stays: loading still offers them the key.
    """
    for layer in (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear):
        if "get_extra_state" in vars(layer):
            del layer.get_extra_state


class _CpuRngTracker(mcore_random.CudaRNGStatesTracker):
    """Named random streams on torch's CPU generator: entering one swaps its state in, leaving saves it."""

    def add(self, name: str, seed: int) -> None:
        assert name not in self.states_, name
        assert seed not in self.seeds_, seed
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

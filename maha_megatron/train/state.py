"""Where a run is, and how it gets there again: a new run, or the newest checkpoint of its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from maha_megatron.checkpoint import layout
from maha_megatron.checkpoint.agreement import Failures
from maha_megatron.checkpoint.load import checkpoint_to_continue, load_random_state
from maha_megatron.checkpoint.manifest import describe
from maha_megatron.checkpoint.save import save_checkpoint
from maha_megatron.config.schema import Config
from maha_megatron.train.engine import Engine


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Progress of a run. The data order is a function of `consumed_samples`, so nothing else of it needs saving.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples they used.
    """

    step: int = 0
    consumed_samples: int = 0

    def after_step(self, samples: int) -> "RunState":
        """The state one step later."""
        return RunState(step=self.step + 1, consumed_samples=self.consumed_samples + samples)


def start_or_resume(engine: Engine, config: Config, data: Mapping[str, Any]) -> RunState:
    """Put weights, optimizer and random generators where the run left off. Collective over all ranks.

    Args:
        engine: what is restored.
        config: the run's configuration.
        data: its training data's Loader.identity; another one than the checkpoint's is refused.

    Raises:
        CheckpointError: there is a checkpoint, but this run cannot continue from it.
    """
    found = checkpoint_to_continue(config, dist.get_world_size(), data)
    if found is None:
        return RunState()
    checkpoint, manifest = found
    engine.read_state(checkpoint / layout.ENGINE)
    failures = Failures()
    with failures.kept():
        load_random_state(checkpoint)
    failures.raise_together()
    return RunState(step=manifest.step, consumed_samples=manifest.consumed_samples)


def save(
    engine: Engine, config: Config, state: RunState, *, data: Mapping[str, Any], versions: Mapping[str, str]
) -> Path:
    """Write a checkpoint of `state` and remove old ones. Collective over all ranks.

    Raises:
        CheckpointError: on every rank, if any could not write; older checkpoints are untouched.
    """
    manifest = describe(
        config,
        step=state.step,
        consumed_samples=state.consumed_samples,
        world_size=dist.get_world_size(),
        data=data,
        versions=versions,
    )
    return save_checkpoint(engine, config.run.folder, manifest, keep=config.checkpoint.keep)

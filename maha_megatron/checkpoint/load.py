"""Reading a checkpoint: which one to continue from, and weights for a model of any topology."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from maha_megatron.checkpoint import layout
from maha_megatron.checkpoint import manifest as manifests
from maha_megatron.checkpoint.agreement import Failures, from_first, own_rank
from maha_megatron.checkpoint.weights import read_weights
from maha_megatron.config.schema import Config
from maha_megatron.errors import CheckpointError
from maha_megatron.model.names import logical_names


def checkpoint_to_continue(
    config: Config, world_size: int, data: Mapping[str, Any]
) -> tuple[Path, manifests.Manifest] | None:
    """The checkpoint that the run continues from, verified; None if the run starts anew. Collective over all ranks.

    Rank 0 chooses; every rank verifies what it sees of the choice.

    Args:
        config: the run's configuration.
        world_size: its ranks.
        data: its training data's Loader.identity.

    Raises:
        CheckpointError: on every rank; it is damaged, not seen by all ranks, belongs to another model, topology or
            data, or the run folder has checkpoints although `checkpoint.resume` is off.
    """
    folder, failures, chosen, manifest = layout.checkpoints_folder(config.run.folder), Failures(), None, None
    with failures.kept():
        chosen = _chosen_name(config, folder) if own_rank() == 0 else None
    failures.raise_together()
    chosen = from_first(chosen)
    if chosen is None:
        return None
    checkpoint = folder / chosen
    with failures.kept():
        if own_rank() != 0 and not checkpoint.is_dir():
            raise CheckpointError(
                f"rank {own_rank()} does not see {checkpoint.absolute()}, which rank 0 continues from: run.folder must "
                "lie on a shared file system, under the same path on every node"
            )
        manifest = manifests.read(checkpoint)
        manifests.check_same_model(manifest, config)
        manifests.check_same_data(manifest, data)
        manifests.check_same_topology(manifest, config, world_size)
    failures.raise_together()
    return checkpoint, manifest


def _chosen_name(config: Config, folder: Path) -> str | None:
    checkpoint = layout.latest_checkpoint(folder)
    if checkpoint is not None and not config.checkpoint.resume:
        raise CheckpointError(
            f"{folder} already holds checkpoints, up to {checkpoint.name}, and checkpoint.resume is false: "
            "set it to true, or use another run.folder"
        )
    return None if checkpoint is None else checkpoint.name


def find_checkpoint(run_folder: str | Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, or the newest one.

    Raises:
        CheckpointError: there is none; says which there are.
    """
    folder = layout.checkpoints_folder(run_folder)
    if step is None:
        checkpoint = layout.latest_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(f"{run_folder} has no checkpoint: nothing at {folder / layout.LATEST}")
        return checkpoint
    if step not in layout.complete_steps(folder):
        steps = ", ".join(str(known) for known in layout.complete_steps(folder)) or "none"
        raise CheckpointError(f"{run_folder} has no checkpoint of step {step}; there are: {steps}")
    return folder / layout.step_name(step)


@torch.no_grad()
def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Copy weights.safetensors into an unsharded model (one process); the dtype is the model's.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not a parameter of the model.
    """
    parameters = logical_names(model)
    for name, weight in read_weights(checkpoint / layout.WEIGHTS, parameters):
        if weight.shape != parameters[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(weight.shape)} in {checkpoint}, {tuple(parameters[name].shape)} in the model"
            )
        parameters[name].copy_(weight)


def load_random_state(checkpoint: Path) -> None:
    """Put this rank's random generators back to where they were when the checkpoint was written.

    Raises:
        CheckpointError: this rank's file is missing.
    """
    path = layout.random_state_file(checkpoint, own_rank())
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

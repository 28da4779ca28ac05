"""Reading a checkpoint: which one to continue from, and weights for a model of any topology."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from maha_megatron.checkpoint import layout
from maha_megatron.checkpoint import manifest as manifests
from maha_megatron.checkpoint.weights import read_weights
from maha_megatron.config.schema import Config
from maha_megatron.errors import CheckpointError
from maha_megatron.model.names import logical_names


def checkpoint_to_continue(config: Config, world_size: int) -> tuple[Path, manifests.Manifest] | None:
    """The checkpoint that the run continues from, verified; None if the run starts anew.

    Raises:
        CheckpointError: it is damaged, belongs to another model or another topology, or the run folder has
            checkpoints although `checkpoint.resume` is off.
    """
    folder = layout.checkpoints_folder(config.run.folder)
    checkpoint = layout.latest_checkpoint(folder)
    if checkpoint is None:
        return None
    if not config.checkpoint.resume:
        raise CheckpointError(
            f"{folder} already holds checkpoints, up to {checkpoint.name}, and checkpoint.resume is false: "
            "set it to true, or use another run.folder"
        )
    manifest = manifests.read(checkpoint)
    manifests.check_same_model(manifest, config)
    manifests.check_same_topology(manifest, config, world_size)
    return checkpoint, manifest


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
    rank = dist.get_rank() if dist.is_initialized() else 0
    path = layout.random_state_file(checkpoint, rank)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

"""Writing a checkpoint: complete and named by `latest`, or not there at all.

Every rank takes part in every collective even after its own disk has failed; then all ranks raise the same error.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from maha_megatron.checkpoint import layout
from maha_megatron.checkpoint import manifest as manifests
from maha_megatron.checkpoint.agreement import Failures, first_message, own_rank
from maha_megatron.checkpoint.weights import WeightsWriter
from maha_megatron.errors import CheckpointError
from maha_megatron.units import format_bytes

LOGGER = logging.getLogger(__name__)


class Source(Protocol):
    """What is saved: the training engine, seen from here."""

    weight_dtype: torch.dtype

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shape of every parameter by logical name, in the order of `full_weights`."""

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter, whole, one at a time; None on ranks other than 0. Collective."""

    def write_state(self, folder: Path) -> Exception | None:
        """Write master weights and optimizer state; return this rank's error instead of raising. Collective."""


def save_checkpoint(source: Source, run_folder: str | Path, manifest: manifests.Manifest, *, keep: int) -> Path:
    """Write the checkpoint of `manifest.step`, let `latest` name it, and remove old ones. Collective over all ranks.

    Args:
        source: what is saved.
        run_folder: the run's folder, on a file system that all ranks share.
        manifest: what the checkpoint says about itself; file sizes are filled in here.
        keep: complete checkpoints that stay.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if any rank could not write; older checkpoints and `latest` are untouched.
    """
    folder = layout.checkpoints_folder(run_folder)
    partial = layout.partial_folder(folder, manifest.step)
    first = own_rank() == 0
    failures = Failures()
    if first:
        with failures.kept():
            partial.parent.mkdir(parents=True, exist_ok=True)
            layout.remove_partial_folders(folder)
            for name in (layout.ENGINE, layout.RANDOM):
                (partial / name).mkdir(parents=True)
    _raise_together(failures, partial, manifest.step)
    failures.note(source.write_state(partial / layout.ENGINE))
    with failures.kept():
        _write_random_state(partial)
    _write_weights(source, partial, failures)
    _raise_together(failures, partial, manifest.step)
    checkpoint = folder / layout.step_name(manifest.step)
    if first:
        with failures.kept():
            manifests.write(manifest, partial)
            _publish(partial, checkpoint, keep)
    _raise_together(failures, partial, manifest.step)
    return checkpoint


def _write_weights(source: Source, partial: Path, failures: Failures) -> None:
    writer = None
    if own_rank() == 0:
        with failures.kept():
            writer = WeightsWriter(partial / layout.WEIGHTS, source.weight_shapes(), source.weight_dtype)
    for name, weight in source.full_weights():
        if writer is not None and failures.first is None:
            with failures.kept():
                writer.write(name, weight)
    if writer is not None:
        with failures.kept():
            writer.close()


def _write_random_state(partial: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, layout.random_state_file(partial, own_rank()))


def _publish(partial: Path, checkpoint: Path, keep: int) -> None:
    if checkpoint.exists():  # complete, but its process died before `latest` named it; or the run was started anew
        shutil.rmtree(checkpoint)
    os.replace(partial, checkpoint)
    try:
        layout.set_latest(checkpoint.parent, checkpoint)
    except OSError:
        shutil.rmtree(checkpoint)
        raise
    try:
        layout.remove_old_checkpoints(checkpoint.parent, keep)
    except OSError as error:  # the new checkpoint is complete and named all the same
        LOGGER.warning("%s is saved, but older checkpoints could not be removed: %s", checkpoint, error)


def _raise_together(failures: Failures, partial: Path, step: int) -> None:
    message = None if failures.first is None else _explain(failures.first, partial.parent)
    message = first_message(message)
    if message is None:
        return
    if own_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    last = layout.latest_checkpoint(partial.parent)
    kept = f"the last good checkpoint is {last.name}" if last else "there is no earlier checkpoint"
    raise CheckpointError(f"the checkpoint of step {step} was not saved: {message}; {kept}") from failures.first


def _explain(error: Exception, folder: Path) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = format_bytes(shutil.disk_usage(folder).free) if folder.is_dir() else "nothing"
        return (
            f"the disk of {folder} is full ({os.strerror(error.errno)}, {free} free): "
            "free some space, lower checkpoint.keep or move run.folder"
        )
    return f"{type(error).__name__}: {error}"

"""Names of everything inside a run's checkpoint folder, and which checkpoints are there.

run.folder/checkpoints/
  latest                        text: the name of the newest complete checkpoint, replaced atomically and last
  step_00000500/
    manifest.json               what the checkpoint is, and the size of every other file in it
    weights.safetensors         every parameter, whole, by its logical name, in the model's dtype
    engine/                     DeepSpeed's own state: master weights, optimizer; for the same topology only
    random/rank_00000.safetensors
  partial_step_00000600/        being written, or left behind by a process that died; never read
"""

import os
import shutil
from pathlib import Path

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ENGINE = "engine"
RANDOM = "random"
_STEP, _PARTIAL = "step_", "partial_step_"


def checkpoints_folder(run_folder: str | Path) -> Path:
    """The folder of a run that holds its checkpoints."""
    return Path(run_folder) / CHECKPOINTS


def step_name(step: int) -> str:
    """Folder name of the checkpoint written after optimizer step `step`."""
    return f"{_STEP}{step:08d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written until it is complete."""
    return folder / f"{_PARTIAL}{step:08d}"


def random_state_file(checkpoint: Path, rank: int) -> Path:
    """File with the random state of one rank."""
    return checkpoint / RANDOM / f"rank_{rank:05d}.safetensors"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints (those with a manifest) in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    names = (path.parent.name.removeprefix(_STEP) for path in folder.glob(f"{_STEP}*/{MANIFEST}"))
    return sorted(int(name) for name in names if name.isdigit())


def remove_partial_folders(folder: Path) -> None:
    """Remove what processes that died while saving left behind."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints, and in any case the one that `latest` names."""
    named = latest_checkpoint(folder)
    for step in complete_steps(folder)[:-keep]:
        path = folder / step_name(step)
        if path != named:
            shutil.rmtree(path)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, whether or not its folder is still there.

    Without a `latest` (it was lost, or the process died before it) the newest complete one; None if there is none.
    """
    pointer = folder / LATEST
    if pointer.is_file():
        return folder / pointer.read_text(encoding="utf-8").strip()
    steps = complete_steps(folder)
    return folder / step_name(steps[-1]) if steps else None


def set_latest(folder: Path, checkpoint: Path) -> None:
    """Let `latest` name `checkpoint`: a reader sees either the old or the new name, never half of one."""
    replace_text(folder / LATEST, checkpoint.name + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, meets either its old or its new content."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

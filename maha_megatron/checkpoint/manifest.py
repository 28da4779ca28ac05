"""What a checkpoint says about itself, and whether a run may continue from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maha_megatron.checkpoint import layout
from maha_megatron.config.fingerprint import model_fingerprint, shape_differences
from maha_megatron.config.load import config_to_dict
from maha_megatron.config.schema import Config
from maha_megatron.data.skipping import jumped
from maha_megatron.errors import CheckpointError

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of manifest.json.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples of the data order that those steps used; the next step starts there.
        model_fingerprint: hash of what determines the parameters' shapes and meaning.
        topology: what DeepSpeed's own state depends on (see `topology`).
        data: what the data order and the meaning of its tokens depend on, by key (Loader.identity).
        config: the whole resolved configuration of the run, as plain data.
        versions: package versions and code revision.
        files: size in bytes of every other file of the checkpoint, by its path inside it.
        format: version of this layout.
    """

    step: int
    consumed_samples: int
    model_fingerprint: str
    topology: Mapping[str, Any]
    data: Mapping[str, Any]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, int]
    format: int = FORMAT


def topology(config: Config, world_size: int) -> dict[str, Any]:
    """What DeepSpeed's optimizer files depend on: they can only be read by a run that has the same."""
    return {
        "ranks": world_size,
        "parallel.tensor": config.parallel.tensor,
        "zero.stage": config.zero.stage,
        "zero.accumulation_dtype": config.zero.accumulation_dtype,
        "train.precision": config.train.precision,
        "optimizer.name": config.optimizer.name,
    }


def describe(
    config: Config,
    *,
    step: int,
    consumed_samples: int,
    world_size: int,
    data: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Manifest:
    """Manifest of a checkpoint about to be written; its files are measured when it is complete."""
    return Manifest(
        step=step,
        consumed_samples=consumed_samples,
        model_fingerprint=model_fingerprint(config),
        topology=topology(config, world_size),
        data=dict(data),
        config=config_to_dict(config),
        versions=dict(versions),
        files={},
    )


def write(manifest: Manifest, checkpoint: Path) -> None:
    """Write manifest.json into `checkpoint`, with the sizes of the files that are there."""
    files = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != layout.MANIFEST
    }
    text = json.dumps(asdict(manifest) | {"files": files}, indent=2)
    layout.replace_text(checkpoint / layout.MANIFEST, text + "\n")


def read(checkpoint: Path) -> Manifest:
    """Read manifest.json and verify that every file it lists is there, whole.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged or of a newer layout.
    """
    path = checkpoint / layout.MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: it has no {layout.MANIFEST}")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or of another layout than {FORMAT}: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{checkpoint} has layout {manifest.format}; this version reads layout {FORMAT}")
    for name, size_bytes in manifest.files.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{checkpoint} is damaged: {name} is missing")
        if file.stat().st_size != size_bytes:
            raise CheckpointError(
                f"{checkpoint} is damaged: {name} has {file.stat().st_size} bytes, its manifest says {size_bytes}"
            )
    return manifest


def check_same_model(manifest: Manifest, config: Config) -> None:
    """Refuse a checkpoint whose parameters differ in shape or meaning from those of `config`.

    Raises:
        CheckpointError: names the configuration keys that differ.
    """
    if manifest.model_fingerprint == model_fingerprint(config):
        return
    differences = shape_differences(dict(manifest.config), config_to_dict(config))
    listed = "; ".join(differences) or "the fingerprints differ"
    raise CheckpointError(
        f"the checkpoint of step {manifest.step} belongs to another model than the configuration: {listed}. "
        "Use the configuration it was saved with, or another run.folder"
    )


def check_same_data(manifest: Manifest, data: Mapping[str, Any]) -> None:
    """Refuse to continue in another order of the data, or on tokens of another tokenizer.

    Args:
        manifest: the checkpoint's.
        data: this run's Loader.identity.

    Raises:
        CheckpointError: names what differs.
    """
    # ranges that lie ahead of the checkpoint may come and go
    saved, now = (
        {**known, "data.skip": jumped(known.get("data.skip", ()), manifest.consumed_samples)}
        for known in (manifest.data, data)
    )
    differences = [
        f"{key}: saved with {saved.get(key, 'none')}, now {now.get(key, 'none')}"
        for key in saved | now
        if saved.get(key) != now.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was trained on other data than this run would read: "
            f"{'; '.join(differences)}. The same sample numbers would mean other text: restore these, or start a new "
            "run.folder"
        )


def check_same_topology(manifest: Manifest, config: Config, world_size: int) -> None:
    """Refuse to continue on another set of ranks than the one that wrote DeepSpeed's state.

    Raises:
        CheckpointError: names what differs.
    """
    now = topology(config, world_size)
    differences = [
        f"{key}: saved with {manifest.topology.get(key)}, now {value}"
        for key, value in now.items()
        if manifest.topology.get(key) != value
    ]
    if differences:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} cannot be continued here: {'; '.join(differences)}. "
            "Optimizer state is read by the topology that wrote it only: start with the same settings"
        )

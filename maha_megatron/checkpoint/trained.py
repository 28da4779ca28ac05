"""A trained run, opened for use on one process: its configuration, its tokenizer, and its model with its weights."""

import dataclasses
from pathlib import Path

from maha_megatron.checkpoint import layout
from maha_megatron.checkpoint import manifest as manifests
from maha_megatron.checkpoint.load import find_checkpoint, load_weights
from maha_megatron.config.load import config_from_dict
from maha_megatron.config.schema import Config
from maha_megatron.data.tokenizer import Tokenizer, load_tokenizer
from maha_megatron.errors import CheckpointError, ConfigError, DataError
from maha_megatron.model.gpt import Gpt, build_gpt
from maha_megatron.model.operators import stated_program
from maha_megatron.parallel import compat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    checkpoint: Path
    config: Config
    tokenizer: Tokenizer
    model: Gpt


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: a run's folder its newest one, a checkpoint's folder itself.

    Raises:
        CheckpointError: it is neither.
    """
    if (path / layout.MANIFEST).is_file():
        return path
    if not layout.checkpoints_folder(path).is_dir():
        raise CheckpointError(
            f"{path} is neither a run's folder nor a checkpoint: it has no {layout.CHECKPOINTS}/ and no "
            f"{layout.MANIFEST}; give run.folder, or a folder in it like {layout.CHECKPOINTS}/{layout.step_name(500)}"
        )
    return find_checkpoint(path)


def open_trained(
    checkpoint: Path, tokenizer_path: str | Path | None = None, *, allow_program: str | None = None
) -> Trained:
    """Build the model of a checkpoint on this process's device, load its weights, and load its tokenizer.

    Starts the process groups of one rank; `compat.shutdown` ends them.

    Args:
        checkpoint: a checkpoint's folder.
        tokenizer_path: where the tokenizer is now; None: where the run's configuration says.
        allow_program: what the command line gave as --allow-program.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: no tokenizer is named, or the checkpoint's program is not allowed.
        DataError: the tokenizer is missing, or another than the run was trained with.
    """
    manifest = manifests.read(checkpoint)
    config = config_from_dict(dict(manifest.config))
    program = stated_program(config, allow_program)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=1, sequence=False))
    path = tokenizer_path or config.data.tokenizer
    if not path:
        raise ConfigError("the run's configuration names no tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocabulary != config.model.vocabulary:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.vocabulary} token ids, the model {config.model.vocabulary}: "
            "give the tokenizer that the run was trained with by --tokenizer"
        )
    if tokenizer.fingerprint != manifest.data["tokenizer"]:
        raise DataError(
            f"{path} is another tokenizer ({tokenizer.fingerprint[:36]}...) than the one that {checkpoint} was trained "
            f"with ({manifest.data['tokenizer'][:36]}...): give that one by --tokenizer"
        )
    compat.initialise_distributed(config)
    compat.initialise_model_parallel(config)
    compat.seed_everything(config.run.seed)
    model = build_gpt(config, device=compat.compute_device(), program=program).eval()
    load_weights(checkpoint, model)
    return Trained(checkpoint=checkpoint, config=config, tokenizer=tokenizer, model=model)

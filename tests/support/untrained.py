"""A run's folder with one checkpoint of random weights, made without training."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from maha_megatron.checkpoint import manifest as manifests
from maha_megatron.checkpoint.save import save_checkpoint
from maha_megatron.config.schema import Config
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.model.gpt import Gpt
from maha_megatron.model.names import logical_names
from tests.support.model import random_model
from tests.support.one_rank import groups_of_one_rank


class _Weights:
    """What save_checkpoint asks of an engine; there is no optimizer state."""

    weight_dtype = torch.float32

    def __init__(self, model: Gpt) -> None:
        self._parameters = logical_names(model)

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def write_state(self, folder: Path) -> None:
        (folder / "none").write_text("no optimizer ran")


def write_untrained_run(config: Config, folder: Path, *, step: int = 3) -> Path:
    """Write the folder; returns its checkpoint."""
    fingerprint = load_tokenizer(config.data.tokenizer).fingerprint
    manifest = manifests.describe(
        config, step=step, consumed_samples=0, world_size=1, data={"tokenizer": fingerprint}, versions={}
    )
    with groups_of_one_rank():
        return save_checkpoint(_Weights(random_model(config)), folder, manifest, keep=5)

"""What the manifests of the validation text's sources say of it, for figures that no model gives: bytes, entropy."""

import math

from maha_megatron.config.schema import Config
from maha_megatron.data.manifest import Manifest, read_manifest


def described_sources(config: Config) -> list[tuple[float, Manifest]]:
    """Weights and manifests of the validation text's sources; empty unless all of them know their text's size."""
    found = [(source, read_manifest(source.prefix)) for source in config.data.validation or config.data.train]
    if not all(manifest and manifest.bytes_per_token for _, manifest in found):
        return []
    return [(source.epochs * manifest.tokens or source.weight, manifest) for source, manifest in found]


def weighted_mean(data: list[tuple[float, Manifest]], name: str) -> float:
    """Mean of a number of the manifests, by the sources' weights."""
    return sum(weight * getattr(manifest, name) for weight, manifest in data) / sum(weight for weight, _ in data)


def bits_per_byte(data: list[tuple[float, Manifest]], loss_nats: float) -> float:
    """A loss per token in bits per UTF-8 byte of the text."""
    return loss_nats / math.log(2) / weighted_mean(data, "bytes_per_token")

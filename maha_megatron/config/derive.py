"""Values that follow from the configuration. They are computed here, in one place, and stored nowhere."""

from maha_megatron import scales
from maha_megatron.config.schema import Config


def layer_attention(config: Config) -> tuple[str, ...]:
    """The attention of each layer, "maha", "refined" or "dense": model.attention's pattern repeated over the layers."""
    pattern = config.model.attention
    return tuple(pattern[layer % len(pattern)] for layer in range(config.model.layers))


def scaled_kinds(config: Config) -> tuple[str, ...]:
    """The kinds of layers that read scales, of those that the model has: "maha", "refined", both or none."""
    return tuple(kind for kind in ("maha", "refined") if kind in config.model.attention)


def uses_maha(config: Config) -> bool:
    """Whether any layer reads scales, with section maha: a MAHA layer, or a refined one, which is MAHA and more."""
    return bool(scaled_kinds(config))


def windows_key(config: Config, kind: str) -> str:
    """The key that a layer of `kind` "maha" or "refined" has its windows from."""
    return "refine.windows" if kind == "refined" and config.refine.windows else "maha.windows"


def maha_windows(config: Config, kind: str) -> tuple[int, ...]:
    """Complete blocks visible at each scale of a layer of `kind` "maha" or "refined", finest first.

    What `windows_key` names; where that is empty, the default for data.sequence_tokens.
    """
    given = config.refine.windows if windows_key(config, kind) == "refine.windows" else config.maha.windows
    return given or scales.default_windows(config.data.sequence_tokens, config.maha.ratio)


def padded_vocabulary(config: Config) -> int:
    """Rows of the embedding: the vocabulary rounded up to model.vocabulary_multiple, the same at every topology."""
    multiple = config.model.vocabulary_multiple
    return -(-config.model.vocabulary // multiple) * multiple


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that hold the same weights and read different samples. check_topology vouches for the division."""
    return world_size // config.parallel.tensor


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches a rank processes in one optimizer step. check_topology vouches for the division."""
    samples_at_once = config.train.micro_batch_samples * data_parallel_size(config, world_size)
    return config.train.global_batch_samples // samples_at_once


def micro_batch_tokens(config: Config) -> int:
    """Rows t of the packed sequence that one rank processes at once, before sequence parallelism splits them."""
    return config.train.micro_batch_samples * config.data.sequence_tokens

"""Initial weights: the same full tensors at every topology, drawn by (seed, logical name)."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from maha_megatron.attention.spec import ParameterSpec, dense_parameter_specs, maha_parameter_specs
from maha_megatron.config.derive import layer_attention
from maha_megatron.config.schema import Config
from maha_megatron.model.names import cut_shard, full_shape, is_attention_parameter, logical_names
from maha_megatron.model.operators import dense_spec, maha_spec
from maha_megatron.parallel import groups

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]


def initialise_parameters(model: nn.Module, config: Config, *, gather: Gather | None = None) -> None:
    """Give every parameter of the model its initial value. One full fp32 tensor exists at a time, on the CPU.

    Args:
        model: as built by build_gpt, on any device but meta.
        config: of the model.
        gather: makes the context in which the whole shards of the given parameters may be written; for parameters that
            are already partitioned over data-parallel ranks (ZeRO 3).

    Sharding: every tensor-parallel rank draws the same full tensor and keeps its cut.
    """
    rank, size = groups.tensor_rank(), groups.tensor_size()
    for name, parameter in logical_names(model).items():
        with gather([parameter]) if gather else contextlib.nullcontext(), torch.no_grad():
            full = initial_value(name, full_shape(name, parameter.shape, size), config)
            parameter.copy_(cut_shard(name, full, rank, size))


def initial_value(name: str, shape: Sequence[int], config: Config) -> torch.Tensor:
    """The initial full tensor called `name`, fp32 on the CPU.

    Norms start at 1 and attention's own parameters at the start of their ParameterSpec. All else is normal with
    model.init_std; the two matrices that write to the residual stream get init_std / sqrt(2 layers); padding
    rows are 0. An embedding of its own (not tied) gets model.embedding_init_std: the first norm divides by the size
    of a row, so rows of 0.02 have gradients ten times those of rows of 0.2, and AdamW's first steps carry some of them
    past zero, where the gradients of bf16 runs are noise (arXiv 2312.16903 traces loss spikes to the same cause).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if is_attention_parameter(name):
        _, layer, _, field = name.split(".")
        spec = _attention_parameters(config, layer_attention(config)[int(layer)])[field]
        assert spec.shape == tuple(shape), (name, spec.shape, tuple(shape))
        return spec.initial()
    std = config.model.init_std
    if name == "embedding.weight" and not config.model.tied_embeddings:
        std = config.model.embedding_init_std
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.model.layers)
    value = torch.randn(tuple(shape), generator=named_generator(config.run.seed, name)) * std
    if name in ("embedding.weight", "output.weight"):
        value[config.model.vocabulary :] = 0
    return value


def _attention_parameters(config: Config, kind: str) -> dict[str, ParameterSpec]:
    """Whole learned tensors of an attention layer of `kind` by field."""
    sizes = {"n": config.model.heads, "g": config.model.kv_groups, "d": config.model.head_width}
    if kind == "dense":
        return dense_parameter_specs(dense_spec(config), **sizes)
    return maha_parameter_specs(maha_spec(config, kind), **sizes)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose stream is a function of the seed and the logical name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def decays_weight(name: str, full_dimensions: int) -> bool:
    """Whether weight decay applies: to matrices, but to no attention parameter and to nothing of one dimension."""
    return full_dimensions >= 2 and not is_attention_parameter(name)

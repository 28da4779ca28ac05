"""Logical parameter names: the key of initialisation, checkpoints, weight decay and conversion.

A name says what a tensor is, not where a library keeps it; README.md has the table. Every function here works from the
name alone, so that shards can be merged and cut where no model exists. A rename is a migration of checkpoints.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from maha_megatron.attention.spec import every_parameter_spec

_MODULES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.linear_qkv.weight": "attention.qkv.weight",
    "self_attention.linear_proj.weight": "attention.output.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up.weight",
    "mlp.linear_fc2.weight": "mlp.down.weight",
}
_LEARNED = every_parameter_spec()  # sharded dimensions do not depend on sizes
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Sharding:
    """How a tensor lies over the tensor axis.

    dim: the dimension that is cut, None where every rank holds the whole tensor.
    parts: equal blocks along dim that are cut one by one: 2 for gate|up, whose shards hold some gate and some up rows.
    """

    dim: int | None
    parts: int = 1


_SHARDINGS = {
    "embedding.weight": Sharding(0),
    "attention_norm.weight": Sharding(None),
    "attention.qkv.weight": Sharding(0),  # rows lie per KV group: its query heads, its key, its value
    "attention.output.weight": Sharding(1),
    "mlp_norm.weight": Sharding(None),
    "mlp.gate_up.weight": Sharding(0, parts=2),
    "mlp.down.weight": Sharding(1),
    "final_norm.weight": Sharding(None),
    "output.weight": Sharding(0),
} | {f"attention.{field}": Sharding(spec.sharded_dim) for field, spec in _LEARNED.items()}


def logical_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by logical name, in the modules' order; a tied output has no entry of its own.

    Sharding: the values are this rank's shards.
    """
    named = {_logical_name(path): parameter for path, parameter in model.named_parameters()}
    assert all(_kind(name) in _SHARDINGS for name in named), sorted(named)
    return named


def sharding(name: str) -> Sharding:
    """How the tensor called `name` lies over the tensor axis."""
    return _SHARDINGS[_kind(name)]


def is_attention_parameter(name: str) -> bool:
    """Whether `name` is one of an attention operator's own learned tensors (AttentionParameters)."""
    return _kind(name).removeprefix("attention.") in _LEARNED


def full_shape(name: str, local_shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Shape of the whole tensor, from the shape of one of its `size` shards."""
    dim = sharding(name).dim
    return tuple(extent * size if index == dim else extent for index, extent in enumerate(local_shape))


def cut_shard(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The shard of `full` that belongs to rank `rank` of `size` tensor-parallel ranks."""
    rule = sharding(name)
    if rule.dim is None:
        return full
    assert full.shape[rule.dim] % (rule.parts * size) == 0, (name, tuple(full.shape), size)
    parts = full.chunk(rule.parts, dim=rule.dim)
    return torch.cat([part.chunk(size, dim=rule.dim)[rank] for part in parts], dim=rule.dim)


def merge_shards(name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole tensor from the shards of all tensor-parallel ranks, in rank order."""
    rule = sharding(name)
    if rule.dim is None:
        return shards[0]
    split = [shard.chunk(rule.parts, dim=rule.dim) for shard in shards]
    return torch.cat([shard[part] for part in range(rule.parts) for shard in split], dim=rule.dim)


def mark_shards(model: nn.Module) -> None:
    """Set megatron-core's attributes of tensor-parallel parameters on every sharded parameter of the model.

    DeepSpeed's gradient norm counts a parameter without them once per tensor-parallel group instead of per rank.
    """
    for name, parameter in logical_names(model).items():
        rule = sharding(name)
        if rule.dim is not None:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = rule.dim
            parameter.partition_stride = rule.parts


def _logical_name(path: str) -> str:
    """The logical name of the parameter that the modules of Gpt keep at `path`."""
    layer = _LAYER_NAME.fullmatch(path)
    if layer is None:
        return path
    index, inner = layer.groups()
    inner = _MODULES.get(inner) or inner.replace("self_attention.core_attention.", "attention.")
    return f"layers.{index}.{inner}"


def _kind(name: str) -> str:
    """`name` without its layer."""
    layer = _LAYER_NAME.fullmatch(name)
    return layer.group(2) if layer else name

"""What a configuration amounts to, before anything is trained: parameters, memory, operations."""

import math

from maha_megatron.config.accounting import (
    attention_share,
    flops_per_token,
    memory_estimate,
    parameter_counts,
    total_parameters,
    training_flops_per_token,
)
from maha_megatron.config.derive import accumulation_steps, data_parallel_size, layer_attention
from maha_megatron.config.schema import Config
from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.names import full_shape, logical_names
from maha_megatron.parallel import compat
from maha_megatron.units import format_bytes, format_count


def dry_run(config: Config, world_size: int) -> str:
    """Build the model's shard on the meta device and describe the run.

    Args:
        config: a configuration that passed check_config and check_topology.
        world_size: ranks to plan for; they need not exist.

    Returns:
        The text to print.
    """
    compat.initialise_dry_run(config)
    model = build_gpt(config, device="meta")
    tensor = config.parallel.tensor
    built = {name: full_shape(name, parameter.shape, tensor) for name, parameter in logical_names(model).items()}
    compat.shutdown()
    total = sum(math.prod(shape) for shape in built.values())
    assert total == total_parameters(config), (total, total_parameters(config))
    kinds = layer_attention(config)
    forward = flops_per_token(config)
    batch_tokens = config.train.global_batch_samples * config.data.sequence_tokens
    sections = {
        f"model: {len(kinds)} layers, {_counted(kinds)}; parameters": {
            **{name: format_count(count) for name, count in parameter_counts(config).items()},
            "total": format_count(total),
        },
        f"forward operations a token at {config.data.sequence_tokens} tokens": {
            **{name: format_count(flops) for name, flops in forward.items()},
            "attention's share of the step": f"{100 * attention_share(config):.1f} %",
            "training, a token": format_count(training_flops_per_token(config)) + "FLOP",
            "training, a step": format_count(training_flops_per_token(config) * batch_tokens) + "FLOP",
        },
        f"memory of one of {world_size} ranks, activations not counted": {
            name: format_bytes(size) for name, size in memory_estimate(config, world_size).items()
        },
        "step": {
            "tokens": format_count(batch_tokens),
            "data-parallel ranks": str(data_parallel_size(config, world_size)),
            "accumulation steps": str(accumulation_steps(config, world_size)),
            "steps": str(config.train.steps),
            "tokens of the run": format_count(batch_tokens * config.train.steps),
        },
    }
    return "\n".join(_section(title, values) for title, values in sections.items())


def _counted(kinds: tuple[str, ...]) -> str:
    """How many layers of each kind: refined ones are named where there are some."""
    counts = [f"{kinds.count(kind)} {kind}" for kind in ("maha", "refined") if kind == "maha" or kind in kinds]
    return f"{', '.join(counts)} and {kinds.count('dense')} dense"


def _section(title: str, values: dict[str, str]) -> str:
    return "\n".join([title, *(f"  {name:<32}{value:>14}" for name, value in values.items())])

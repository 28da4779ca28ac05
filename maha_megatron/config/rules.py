"""What a configuration must satisfy beyond its types, one function per rule.

A rule returns None, or a message that says what is wrong and what to change. check_config applies the rules that need
no machine, check_topology those that need the number of ranks; both report every broken rule at once.

A key that would have no effect is refused as well: an option that is silently ignored misleads.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from maha_megatron import scales
from maha_megatron.config.data_rules import DATA_RULES
from maha_megatron.config.derive import (
    data_parallel_size,
    maha_windows,
    micro_batch_tokens,
    padded_vocabulary,
    scaled_kinds,
    uses_maha,
    windows_key,
)
from maha_megatron.config.refine_rules import REFINE_RULES
from maha_megatron.config.schema import Config, Maha, Model, Optimizer, Schedule, Zero
from maha_megatron.errors import ConfigError


def check_config(config: Config) -> None:
    """Apply every rule that does not need the number of ranks.

    Raises:
        ConfigError: one line per broken rule.
    """
    _raise_broken(rule(config) for rule in RULES)


def check_topology(config: Config, world_size: int) -> None:
    """Apply the rules that tie the configuration to a number of ranks.

    Raises:
        ConfigError: one line per broken rule.
    """
    if world_size % config.parallel.tensor:  # the other rules divide by what this one guarantees
        raise ConfigError(
            f"{world_size} ranks do not divide into groups of parallel.tensor = {config.parallel.tensor}; "
            f"start a multiple of {config.parallel.tensor} ranks or lower parallel.tensor"
        )
    _raise_broken(rule(config, world_size) for rule in TOPOLOGY_RULES)


def _raise_broken(messages: Iterable[str | None]) -> None:
    broken = [message for message in messages if message]
    if broken:
        raise ConfigError("\n".join(broken))


def _changed(section: Any, defaults: Any, keys: Iterable[str]) -> list[str]:
    """Those of `keys` that differ from their defaults."""
    return [key for key in keys if getattr(section, key) != getattr(defaults, key)]


# --------------------------------------------------------------------------------------------------- shape of model


def groups_divide_heads(config: Config) -> str | None:
    heads, groups = config.model.heads, config.model.kv_groups
    if heads % groups:
        divisors = [size for size in range(1, heads + 1) if heads % size == 0]
        return f"model.kv_groups = {groups} does not divide model.heads = {heads}; use one of {divisors}"
    return None


def head_width_is_even(config: Config) -> str | None:
    width = config.model.head_width
    if width % 2:
        return f"model.head_width = {width} is odd, but rotary embeddings turn pairs; use {width + 1}"
    return None


def pattern_fills_layers(config: Config) -> str | None:
    layers, pattern = config.model.layers, config.model.attention
    if not pattern:
        return "model.attention is empty; write a pattern such as [maha] or [maha, maha, maha, dense]"
    if layers % len(pattern):
        nearest = max(len(pattern), round(layers / len(pattern)) * len(pattern))
        return (
            f"model.layers = {layers} is not a multiple of the {len(pattern)} layers of model.attention; "
            f"use {nearest} layers or another pattern"
        )
    return None


def embedding_start_is_used(config: Config) -> str | None:
    if config.model.tied_embeddings and _changed(config.model, Model(), ("embedding_init_std",)):
        return (
            "model.embedding_init_std: no effect with model.tied_embeddings, whose one matrix starts with "
            "model.init_std; remove it, or untie the embeddings"
        )
    return None


# ---------------------------------------------------------------------------------------------------------- scales


def windows_are_possible(config: Config) -> str | None:
    """Ratio, number of scales and window sizes that the operator is defined for, and nothing out of reach."""
    ratio = config.maha.ratio
    if uses_maha(config) and ratio not in scales.RATIOS:
        return f"maha.ratio = {ratio} is not in {scales.RATIOS.start}..{scales.RATIOS.stop - 1}; 4 is the usual one"
    return _first_told(_impossible_windows, config)


def _first_told(rule: Callable[[Config, str], str | None], config: Config) -> str | None:
    """What `rule` says of the first kind of layers whose windows break it."""
    return next((told for kind in scaled_kinds(config) if (told := rule(config, kind))), None)


def _impossible_windows(config: Config, kind: str) -> str | None:
    key, windows = windows_key(config, kind), maha_windows(config, kind)
    ratio, tokens = config.maha.ratio, config.data.sequence_tokens
    if len(windows) > scales.MAX_SCALES:
        return (
            f"{key} has {len(windows)} scales, at most {scales.MAX_SCALES} are possible; raise maha.ratio = "
            f"{ratio} or use {_proposal(config, key)}"
        )
    for scale, window in enumerate(windows):
        last = scale == len(windows) - 1
        least = 1 if last else ratio - 1
        if window < least:
            why = "must see a block" if last else f"leaves holes below {least} = maha.ratio - 1"
            return f"{key}[{scale}] = {window}: scale {scale} {why}; use at least {least}"
    coarsest = len(windows) - 1
    if coarsest and not scales.complete_blocks(tokens, scales.stride(ratio, coarsest)):
        return (
            f"{key}: a block of scale {coarsest} has {scales.stride(ratio, coarsest)} rows and "
            f"data.sequence_tokens = {tokens} never completes one; use {_proposal(config, key)}"
        )
    return None


def windows_reach_sequence(config: Config) -> str | None:
    return _first_told(_short_windows, config) if config.maha.full_reach else None


def _short_windows(config: Config, kind: str) -> str | None:
    key, windows = windows_key(config, kind), maha_windows(config, kind)
    ratio, tokens = config.maha.ratio, config.data.sequence_tokens
    row = scales.first_unreached_row(tokens, ratio, windows)
    if row is not None:
        return (
            f"{key} = {list(windows)} cannot reach data.sequence_tokens = {tokens}: from row {row} on, the "
            f"document's start is out of sight; use {_proposal(config, key)}, or maha.full_reach: false if a bounded "
            "sight is meant"
        )
    return None


def _proposal(config: Config, key: str) -> str:
    """The default windows for `key`, at the configured ratio if it allows them."""
    tokens = config.data.sequence_tokens
    for ratio in (config.maha.ratio, 4, 8):
        default = scales.default_windows(tokens, ratio)
        if ratio in scales.RATIOS and len(default) <= scales.MAX_SCALES:
            break
    with_ratio = "" if ratio == config.maha.ratio else f" with maha.ratio: {ratio}"
    return f"{key}: {list(default)}{with_ratio}"


# -------------------------------------------------------------------------------------------------------- parallel


def tensor_within_groups(config: Config) -> str | None:
    tensor, groups = config.parallel.tensor, config.model.kv_groups
    if tensor > groups:
        return (
            f"parallel.tensor = {tensor} exceeds model.kv_groups = {groups}: a KV group and its pyramid cannot be "
            f"split; use parallel.tensor <= {groups} and data parallelism for the rest, or more groups"
        )
    return None


def tensor_divides_model(config: Config) -> str | None:
    tensor = config.parallel.tensor
    if tensor > config.model.kv_groups:
        return None  # said by tensor_within_groups
    sizes = {
        "model.heads": config.model.heads,
        "model.kv_groups": config.model.kv_groups,
        "model.ffn_hidden": config.model.ffn_hidden,
    }
    broken = [f"{key} = {size}" for key, size in sizes.items() if size % tensor]
    if broken:
        return f"parallel.tensor = {tensor} does not divide {', '.join(broken)}; change one of them"
    return None


def tensor_divides_vocabulary(config: Config) -> str | None:
    tensor, padded = config.parallel.tensor, padded_vocabulary(config)
    if padded % tensor:
        return (
            f"parallel.tensor = {tensor} does not divide the padded vocabulary of {padded} rows; make "
            f"model.vocabulary_multiple = {config.model.vocabulary_multiple} a multiple of {tensor}"
        )
    return None


def sequence_parallel_is_possible(config: Config) -> str | None:
    tensor, tokens = config.parallel.tensor, micro_batch_tokens(config)
    if not config.parallel.sequence:
        return None
    if tensor == 1:
        return (
            "parallel.sequence splits rows over the tensor ranks; set parallel.tensor > 1 or parallel.sequence: false"
        )
    if tokens % tensor:
        return (
            f"parallel.sequence needs the {tokens} rows of a micro-batch (train.micro_batch_samples x "
            f"data.sequence_tokens) to be a multiple of parallel.tensor = {tensor}; change one of the three"
        )
    return None


# ------------------------------------------------------------------------------------------------------------ ZeRO


def zero_stage_exists(config: Config) -> str | None:
    if config.zero.stage > 3:
        return f"zero.stage = {config.zero.stage} does not exist; use 0, 1, 2 or 3"
    return None


def bf16_needs_zero(config: Config) -> str | None:
    if config.train.precision == "bf16" and config.zero.stage == 0:
        return (
            "train.precision: bf16 with zero.stage: 0 runs on another DeepSpeed optimizer and converges differently; "
            "use zero.stage: 1 (it works on one rank too) or train.precision: fp32"
        )
    return None


def fp32_gradients_stay_fp32(config: Config) -> str | None:
    keys = _changed(config.zero, Zero(), ("accumulation_dtype", "communication_dtype"))
    if config.train.precision == "fp32" and keys:
        named = " and ".join(f"zero.{key}" for key in keys)
        return f"{named}: bf16 would round the gradients of an fp32 run; use fp32, or train.precision: bf16"
    return None


def zero_keys_have_effect(config: Config) -> str | None:
    """Overlap and buckets exist in DeepSpeed's ZeRO optimizers only."""
    zero, precision = config.zero, config.train.precision
    if zero.stage == 0:
        unused = _changed(zero, Zero(), ("overlap", "bucket_elements"))
        if unused:
            named = " and ".join(f"zero.{key}" for key in unused)
            return f"{named}: no effect with zero.stage: 0; remove it or use stage 1, 2 or 3"
    if zero.overlap and zero.stage == 1 and precision == "bf16" and zero.accumulation_dtype == "fp32":
        return (
            "zero.overlap: no effect with zero.stage: 1, bf16 and fp32 accumulation, where DeepSpeed reduces once per "
            "step; remove it, or use stage 2"
        )
    return None


def buckets_are_even(config: Config) -> str | None:
    if config.zero.bucket_elements % 2:
        return f"zero.bucket_elements = {config.zero.bucket_elements} must be even, as DeepSpeed aligns by pairs"
    return None


# ------------------------------------------------------------------------------------------------ batch and schedule


def micro_batch_divides_batch(config: Config) -> str | None:
    micro, batch = config.train.micro_batch_samples, config.train.global_batch_samples
    if batch % micro:
        return (
            f"train.global_batch_samples = {batch} is not a multiple of train.micro_batch_samples = {micro}; "
            f"use {max(1, batch // micro) * micro} samples or another micro-batch"
        )
    return None


def schedule_fits_run(config: Config) -> str | None:
    schedule, steps = config.schedule, config.train.steps
    if schedule.warmup_steps + schedule.decay_steps > steps:
        return (
            f"schedule.warmup_steps + schedule.decay_steps = {schedule.warmup_steps + schedule.decay_steps} exceed "
            f"train.steps = {steps}; shorten them or train longer"
        )
    if schedule.final > schedule.peak:
        return f"schedule.final = {schedule.final} exceeds schedule.peak = {schedule.peak}; lower it"
    return None


def schedule_keys_have_effect(config: Config) -> str | None:
    schedule = config.schedule
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        return "schedule.kind: wsd needs schedule.decay_steps > 0 (a tenth of train.steps is usual); or use constant"
    if schedule.kind != "wsd" and schedule.decay_steps:
        return f"schedule.decay_steps: no effect with schedule.kind: {schedule.kind}; remove it or use wsd"
    if schedule.kind == "constant" and schedule.final not in (Schedule().final, schedule.peak):
        return "schedule.final: no effect with schedule.kind: constant; remove it or use cosine or wsd"
    return None


def optimizer_keys_make_sense(config: Config) -> str | None:
    optimizer = config.optimizer
    if optimizer.name == "sgd":
        unused = _changed(optimizer, Optimizer(), ("beta1", "beta2", "epsilon", "weight_decay"))
        if optimizer.weight_decay == 0:  # what sgd does anyway
            unused = [key for key in unused if key != "weight_decay"]
        if unused:
            return f"{', '.join(f'optimizer.{key}' for key in unused)}: no effect with optimizer.name: sgd; remove"
    for key in ("beta1", "beta2"):
        if getattr(optimizer, key) >= 1:
            return f"optimizer.{key} = {getattr(optimizer, key)} must be below 1"
    return None


# ------------------------------------------------------------------------------------------------ keys without effect


_SEVERAL_SCALES_ONLY = (
    "downsampling",
    "key_map",
    "queries",
    "aggregation",
    "regularizer",
    "coupling",
    "program",
    "lse_utility",
    "rope_unit",
)
# aggregation -> what it does not read, and why
_NOT_READ = {
    "convex": (("program",), "only maha.aggregation: program runs it"),
    "nash": (("program",), "only maha.aggregation: program runs it"),
    "mean": (("regularizer", "coupling", "lse_utility", "program"), "equal weights depend on nothing"),
    "program": (("regularizer",), "the program states its own"),
}


def _one_scale(config: Config) -> bool:
    return all(len(maha_windows(config, kind)) == 1 for kind in scaled_kinds(config))


def attention_keys_have_effect(config: Config) -> str | None:
    """Settings of an attention that no layer uses. maha.backend is exempt: it also chooses that of dense layers."""
    kinds = set(config.model.attention)
    if not kinds:
        return None  # said by pattern_fills_layers
    unused = []
    if not uses_maha(config):
        keys = [field.name for field in dataclasses.fields(Maha) if field.name != "backend"]
        unused += [f"maha.{key}" for key in _changed(config.maha, Maha(), keys)]
    elif _one_scale(config):
        unused += [f"maha.{key}" for key in _changed(config.maha, Maha(), _SEVERAL_SCALES_ONLY)]
        if config.maha.windows:  # without given windows the ratio decides how many scales there are
            unused += [f"maha.{key}" for key in _changed(config.maha, Maha(), ("ratio",))]
    if "dense" not in kinds:
        unused += [f"dense.{key}" for key in _changed(config.dense, type(config.dense)(), ("qk_norm", "convolution"))]
    if unused:
        return f"{', '.join(unused)}: no effect with model.attention = {sorted(kinds)} and these windows; remove"
    return None


def aggregation_keys_have_effect(config: Config) -> str | None:
    """Settings of fusing the scales that the chosen aggregation does not read."""
    if not uses_maha(config) or _one_scale(config):
        return None  # said by attention_keys_have_effect
    aggregation = config.maha.aggregation
    keys, why = _NOT_READ[aggregation]
    unused = [f"maha.{key}" for key in _changed(config.maha, Maha(), keys)]
    if unused:
        return f"{', '.join(unused)}: no effect with maha.aggregation: {aggregation} ({why}); remove"
    return None


def layers_can_be_captured(config: Config) -> str | None:
    if not config.train.cuda_graphs:
        return None
    maha, wanted = config.maha, []
    if "maha" not in config.model.attention:
        return f"train.cuda_graphs: no effect with model.attention = {sorted(set(config.model.attention))}; remove"
    if maha.backend != "triton":
        wanted.append("maha.backend: triton")
    if maha.aggregation not in ("convex", "mean") or maha.coupling != "none":
        wanted.append("maha.aggregation: convex with maha.coupling: none (others report how well they were solved)")
    if maha.queries != "full" or maha.key_map:
        wanted.append("maha.queries: full with maha.key_map: false (no kernels serve others, and none was captured)")
    if config.train.recompute != "none":
        wanted.append("train.recompute: none")
    if config.zero.stage == 3:
        wanted.append("zero.stage: 2 (stage 3 moves the parameters)")
    return f"train.cuda_graphs needs {'; '.join(wanted)}; or set it to false" if wanted else None


def rope_unit_fits_queries(config: Config) -> str | None:
    if uses_maha(config) and (config.maha.queries, config.maha.rope_unit) == ("pooled", "token"):
        return "maha.rope_unit: token does not go with maha.queries: pooled, which stand for blocks; use block, or full"
    return None


def program_is_named(config: Config) -> str | None:
    if not uses_maha(config) or config.maha.aggregation != "program":
        return None
    module, _, function = config.maha.program.partition(":")
    if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return (
            f"maha.aggregation: program runs the code that maha.program names, and '{config.maha.program}' is no "
            "module:function; write for example maha.program: my_module:build"
        )
    return None


# --------------------------------------------------------------------------------------------------------- topology


def ranks_divide_batch(config: Config, world_size: int) -> str | None:
    ranks, batch = data_parallel_size(config, world_size), config.train.global_batch_samples
    at_once = config.train.micro_batch_samples * ranks
    if batch % at_once:
        return (
            f"train.global_batch_samples = {batch} is not a multiple of train.micro_batch_samples = "
            f"{config.train.micro_batch_samples} x {ranks} data-parallel ranks = {at_once}; "
            f"use {max(1, batch // at_once) * at_once} samples, another micro-batch or other ranks"
        )
    return None


RULES: tuple[Callable[[Config], str | None], ...] = (
    groups_divide_heads,
    head_width_is_even,
    pattern_fills_layers,
    embedding_start_is_used,
    windows_are_possible,
    windows_reach_sequence,
    tensor_within_groups,
    tensor_divides_model,
    tensor_divides_vocabulary,
    sequence_parallel_is_possible,
    zero_stage_exists,
    bf16_needs_zero,
    fp32_gradients_stay_fp32,
    zero_keys_have_effect,
    buckets_are_even,
    micro_batch_divides_batch,
    schedule_fits_run,
    schedule_keys_have_effect,
    optimizer_keys_make_sense,
    *DATA_RULES,
    attention_keys_have_effect,
    layers_can_be_captured,
    aggregation_keys_have_effect,
    rope_unit_fits_queries,
    program_is_named,
    *REFINE_RULES,
)
TOPOLOGY_RULES: tuple[Callable[[Config, int], str | None], ...] = (ranks_divide_batch,)

"""The rules of refined layers; rules.py applies them with the others and says what a rule is."""

from collections.abc import Callable

from maha_megatron import scales
from maha_megatron.config.derive import maha_windows, windows_key
from maha_megatron.config.schema import Config, Refine


def refine_keys_have_effect(config: Config) -> str | None:
    if "refined" in config.model.attention:
        return None
    unused = [key for key, default in vars(Refine()).items() if getattr(config.refine, key) != default]
    if unused:
        return (
            f"{', '.join(f'refine.{key}' for key in unused)}: no effect without a refined layer; remove, or write "
            "model.attention: [maha, maha, maha, refined]"
        )
    return None


def windows_have_effect(config: Config) -> str | None:
    if set(config.model.attention) == {"refined"} and config.maha.windows and config.refine.windows:
        return (
            "maha.windows: no effect where every layer is refined and refine.windows are given; remove refine.windows, "
            "and give maha.windows their place"
        )
    return None


def refinement_lies_between_scales(config: Config) -> str | None:
    if "refined" not in config.model.attention:
        return None
    refine, windows, key = config.refine, maha_windows(config, "refined"), windows_key(config, "refined")
    if len(windows) == 1:
        return (
            f"model.attention: a refined layer opens blocks of a coarse scale, and {key} has one scale; use two, or "
            "refine.windows for refined layers alone"
        )
    if refine.from_scale >= len(windows):
        return (
            f"refine.from_scale = {refine.from_scale}, but {key} = {list(windows)} has scales 0 to "
            f"{len(windows) - 1}; use refine.from_scale: {len(windows) - 1}, or more windows"
        )
    if refine.to_scale >= refine.from_scale:
        return (
            f"refine.to_scale = {refine.to_scale} is no finer than refine.from_scale = {refine.from_scale}; use "
            f"refine.to_scale: 0 for tokens, at most {refine.from_scale - 1}"
        )
    return _something_can_be_opened(config, windows)


def _something_can_be_opened(config: Config, windows: tuple[int, ...]) -> str | None:
    refine, tokens, ratio = config.refine, config.data.sequence_tokens, config.maha.ratio
    key = windows_key(config, "refined")
    spans = scales.openable_spans(tokens, ratio, windows, refine.from_scale, refine.to_scale)
    if any(blocks for _, blocks in spans):
        return None
    shown, seen = (windows[scale] * scales.stride(ratio, scale) for scale in (refine.to_scale, refine.from_scale))
    return (
        f"refine: nothing can ever be opened: scale {refine.to_scale} shows the last {shown} rows anyway, scale "
        f"{refine.from_scale} reaches {min(seen, tokens)}; narrow {key}[{refine.to_scale}], widen "
        f"{key}[{refine.from_scale}] or raise data.sequence_tokens"
    )


def refinement_goes_with_the_rest(config: Config) -> str | None:
    if "refined" not in config.model.attention:
        return None
    if config.maha.queries == "pooled":
        return "maha.queries: pooled opens no blocks; use full, or maha in place of refined in model.attention"
    if config.maha.aggregation == "program":
        return (
            "maha.aggregation: program counts on the finest scales being the feasible ones, and opened keys are none "
            "of them; use another aggregation, or maha in place of refined in model.attention"
        )
    return None


REFINE_RULES: tuple[Callable[[Config], str | None], ...] = (
    refine_keys_have_effect,
    windows_have_effect,
    refinement_lies_between_scales,
    refinement_goes_with_the_rest,
)

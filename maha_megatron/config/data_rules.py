"""The rules of the data section; rules.py applies them with the others and says what a rule is."""

from collections.abc import Callable

from maha_megatron.config.schema import Config, Data


def validation_share_is_a_share(config: Config) -> str | None:
    data = config.data
    if data.validation_frac >= 1:
        return f"data.validation_frac = {data.validation_frac} must be below 1; 0.02 is usual"
    if data.validation and data.validation_frac not in (0, Data().validation_frac):
        return "data.validation_frac: no effect beside data.validation; remove one of them"
    return None


def sources_are_used(config: Config) -> str | None:
    for source in (*config.data.train, *config.data.validation):
        if source.weight == 0 and not source.epochs:
            return f"data: source '{source.prefix}' has weight 0 and would never be read; remove it or give it weight"
    return None


def sources_are_named_once(config: Config) -> str | None:
    train, validation = ([source.prefix for source in part] for part in (config.data.train, config.data.validation))
    for key, prefixes in (("train", train), ("validation", validation)):
        for prefix in prefixes:
            if not prefix.strip():
                return f"data.{key} has a source without a prefix; give the path of a .bin/.idx pair, less its ending"
            if prefixes.count(prefix) > 1:
                return f"data.{key} names source '{prefix}' more than once; name it once, with the sum of the weights"
    both = [prefix for prefix in validation if prefix in train]
    if both:
        return (
            f"data.validation: '{both[0]}' is trained on too (data.train), so its loss would tell nothing; name "
            "another, or leave data.validation empty and set data.validation_frac"
        )
    return None


def sources_ask_in_one_way(config: Config) -> str | None:
    for key, sources in (("train", config.data.train), ("validation", config.data.validation)):
        by_epochs = [source for source in sources if source.epochs]
        if not by_epochs:
            continue
        for source in sources:
            if not source.epochs:
                return (
                    f"data.{key}: source '{by_epochs[0].prefix}' asks by epochs and '{source.prefix}' does not; give "
                    "every source of the list epochs, or none"
                )
            if source.weight != 1.0:
                return f"data.{key}: source '{source.prefix}' has both weight and epochs; remove one of them"
    return None


def skipped_ranges_ascend(config: Config) -> str | None:
    last = -1
    for number, skip in enumerate(config.data.skip):
        if skip.last < skip.first:
            return f"data.skip[{number}]: last = {skip.last} is before first = {skip.first}; exchange them"
        if skip.first <= last:
            return f"data.skip[{number}]: sample {skip.first} is skipped before; write the ranges ascending, apart"
        last = skip.last
    return None


DATA_RULES: tuple[Callable[[Config], str | None], ...] = (
    validation_share_is_a_share,
    sources_are_used,
    sources_are_named_once,
    sources_ask_in_one_way,
    skipped_ranges_ascend,
)

"""From YAML files and `--set` words to one frozen Config, and back to plain data.

A file may name fragments, `extends: [model/hybrid, size/125m]`, found below configs/. They are merged in order, then
the file itself, then the overrides: the later one wins. Lists are replaced, never joined. A fragment extends nothing.
"""

import dataclasses
import difflib
import math
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from maha_megatron.config.derive import maha_windows, scaled_kinds, windows_key
from maha_megatron.config.rules import check_config
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError

REPOSITORY_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OVERRIDE_ORIGIN = "--set"
Layer = tuple[str, Mapping[str, Any]]
"""Where keys come from, for messages; and the keys: section -> key -> value."""


class _Reader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as everybody means it, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key_node, deep=True) for key_node, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a run file or a model file.

    Args:
        path: YAML file. Its `extends` names are looked up below the folder `configs` that holds the file, or below the
            repository's configs/ when it lies elsewhere.
        overrides: words "section.key=value", the value in YAML; the last word of a key wins.

    Raises:
        ConfigError: a file, key, type or rule is wrong; the message names the file, the key and what to change.
    """
    path = Path(path)
    tree = read_mapping(path)
    names = fragment_names(tree, path)
    return resolve([*read_fragments(names, configs_of(path), path), (str(path), tree)], overrides)


def load_fragments(names: Sequence[str], overrides: Sequence[str] = (), folder: Path = REPOSITORY_CONFIGS) -> Config:
    """The checked configuration that a file with `extends: [names...]` and nothing else would give."""
    return resolve(read_fragments(names, folder, "extends"), overrides)


def config_from_dict(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Config:
    """A Config from plain data; every missing key takes its default. Types and simple bounds are checked, rules not.

    Args:
        tree: section -> key -> value, as YAML or JSON gives it.
        origins: dotted key -> where it came from, for messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of its bounds.
    """
    return build(Config, tree, "", origins or {})


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, strings) from which config_from_dict makes an equal Config."""
    return _plain(dataclasses.asdict(config))


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML for people; loads to an equal Config.

    Every key is written out with its sentence of help above it. Where layers with scales have maha.windows empty, a
    comment beside it tells which windows data.sequence_tokens gives.
    """
    tree, lines = config_to_dict(config), []
    by_default = [kind for kind in scaled_kinds(config) if windows_key(config, kind) == "maha.windows"]
    for section in dataclasses.fields(Config):
        lines += ["", f"{section.name}:"]
        for key in dataclasses.fields(section.default_factory):
            value = tree[section.name][key.name]
            # written as the only item of [..], whose brackets then go: scalars alone would end in a document mark
            text = yaml.safe_dump([value], sort_keys=False, default_flow_style=True, width=math.inf).strip()[1:-1]
            lines += textwrap.wrap(key.metadata["help"], width=110, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {key.name}: {text}")
            if (section.name, key.name) == ("maha", "windows") and not value and by_default:
                lines[-1] += f"  # here {list(maha_windows(config, by_default[0]))}"
    return "\n".join(lines[1:]) + "\n"


def dotted_keys() -> list[str]:
    """Every key of the schema, "section.key", in its order."""
    return [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(section.default_factory)
    ]


# ---------------------------------------------------------------------------------------------- files and merging


def resolve(layers: Sequence[Layer], overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of layers of keys, later ones over earlier ones, and overrides over them all."""
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in [*layers, *((OVERRIDE_ORIGIN, parse_override(word)) for word in overrides)]:
        _merge(tree, layer, origin, origins)
    config = config_from_dict(tree, origins)
    check_config(config)
    return config


def configs_of(path: Path) -> Path:
    """The folder that a file's fragments are looked up below."""
    return next((parent for parent in path.resolve().parents if parent.name == "configs"), REPOSITORY_CONFIGS)


def fragment_names(tree: dict[str, Any], origin: object) -> list[str]:
    """Take `extends` out of a tree."""
    names = tree.pop("extends", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{origin}: extends must be a list of fragment names, for example [model/hybrid, size/125m]")
    return names


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises:
        ConfigError: it cannot be read, or holds something else than a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold sections such as 'model:', but holds a {type(tree).__name__}")
    return tree


def read_fragments(names: Sequence[str], folder: Path, wanted_by: object) -> list[Layer]:
    """The layers of fragments below a folder, for whoever names them."""
    layers = []
    for name in names:
        path = folder / f"{name.removesuffix('.yaml')}.yaml"
        if not path.is_file():
            known = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
            raise ConfigError(f"{wanted_by}: there is no fragment '{name}' below {folder}{_nearest(name, known)}")
        tree = read_mapping(path)
        if "extends" in tree:
            raise ConfigError(f"{path}: a fragment extends nothing; name its parts in {wanted_by} instead")
        layers.append((str(path), tree))
    return layers


def parse_override(word: str) -> dict[str, Any]:
    """The keys that a word "section.key=value" gives."""
    key, equals, text = word.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"{OVERRIDE_ORIGIN} {word}: write section.key=value, for example train.steps=200")
    try:
        return {section: {name: yaml.load(text, Loader=_Reader)}}
    except yaml.YAMLError as error:
        raise ConfigError(f"{OVERRIDE_ORIGIN} {word}: the value is not valid YAML: {error}") from error


def _merge(tree: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str]) -> None:
    """Lay `layer` over `tree`, section by section, and note where each key came from."""
    for section, values in layer.items():
        origins[str(section)] = origin
        if values is None:  # a section whose keys are all commented out
            tree.setdefault(section, {})
        elif isinstance(values, dict) and isinstance(tree.get(section, {}), dict):
            tree[section] = {**tree.get(section, {}), **values}
            origins.update({f"{section}.{key}": origin for key in values})
        else:
            tree[section] = values


# ------------------------------------------------------------------------------------------------ typed conversion


def build(kind: type, tree: Any, place: str, origins: Mapping[str, str]) -> Any:
    """An instance of the dataclass `kind` from a mapping; `place` is its dotted name, "" for the root."""
    if not isinstance(tree, Mapping):
        raise _error(place, origins, f"expects a section of keys, not {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    for key in tree:
        if key not in fields:
            dotted = _join(place, str(key))
            raise _error(dotted, origins, f"unknown key{_nearest_key(dotted, place, list(fields))}")
    values = {
        name: _convert(tree[name], types[name], _join(place, name), field.metadata, origins)
        for name, field in fields.items()
        if name in tree
    }
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise _error(_join(place, missing[0]), origins, "is required")
    return kind(**values)


def _convert(value: Any, kind: Any, place: str, metadata: Mapping[str, Any], origins: Mapping[str, str]) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, place, origins)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise _error(place, origins, f"expects a list, not {value!r}; write [{value}]")
        element = typing.get_args(kind)[0]
        return tuple(_convert(item, element, f"{place}[{i}]", metadata, origins) for i, item in enumerate(value))
    return _scalar(value, kind, place, metadata, origins)


def _scalar(value: Any, kind: type, place: str, metadata: Mapping[str, Any], origins: Mapping[str, str]) -> Any:
    accepted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise _error(place, origins, f"expects {accepted}, not {value!r}")
    if kind is float and not math.isfinite(value):
        raise _error(place, origins, f"expects a finite number, not {value!r}")
    choices, minimum = metadata.get("choices"), metadata.get("minimum")
    if choices and value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise _error(place, origins, f"must be one of {', '.join(choices)}, not {value!r}{guess}")
    if minimum is not None and value < minimum:
        raise _error(place, origins, f"must be at least {minimum}, not {value!r}")
    return value


def _error(place: str, origins: Mapping[str, str], message: str) -> ConfigError:
    key = place.split("[")[0]
    origin = origins.get(key) or origins.get(key.partition(".")[0])
    return ConfigError(f"{origin}: {place}: {message}" if origin else f"{place or 'configuration'}: {message}")


def _nearest_key(dotted: str, place: str, siblings: Sequence[str]) -> str:
    """The best guess at what a misspelt key meant: a sibling, or a key of that or nearly that name elsewhere."""
    name = dotted.rpartition(".")[2]
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"; did you mean {_join(place, close[0])}?"
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(dotted_keys())}
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    return f"; did you mean {elsewhere[close[0]]}?" if close else f"; known: {', '.join(siblings)}"


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

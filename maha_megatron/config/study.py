"""A study: several architectures, its peers, each trained from several seeds under one protocol; read from one file.

    extends: [size/60m, cluster/1gpu]     # fragments of every run
    train: {steps: 1500}                  # and any section of a run
    peers:
      - {name: dense, extends: [model/dense]}
      - {name: window, extends: [model/window], schedule: {peak: 2.0e-3}}
    reference: dense                      # the others are set against it
    seeds: [1, 2, 3]
    evaluation: {needles: 64}

A run is a peer from a seed. Its layers, later ones over earlier ones: the peer's fragments, the study's, the study's
sections, the peer's, the overrides. Who runs the study says where runs, data and tokenizer are.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maha_megatron.config import programs
from maha_megatron.config.load import (
    OVERRIDE_ORIGIN,
    Layer,
    build,
    configs_of,
    fragment_names,
    parse_override,
    read_fragments,
    read_mapping,
    resolve,
)
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError

# key of a run -> who says it in a study
NOT_HERE = {
    "run.seed": "seeds of the study",
    "run.name": "the names of the study and its peers",
    "run.folder": "--folder",
    "data.train": "--data",
    "data.tokenizer": "--tokenizer",
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured of every trained run, as tools/evaluate.py measures it; no samples, needles or queries: not.

    Attributes:
        samples: of the validation split, for loss by position; as many as it has, where that is less.
        needles: at each distance.
        distances: of needles; empty: those that tools/evaluate.py takes by itself.
        queries: of associative recall.
        pairs: of keys and values in a row; 0: as many as tools/evaluate.py takes by itself.
    """

    samples: int = field(default=256, metadata={"minimum": 0})
    needles: int = field(default=32, metadata={"minimum": 0})
    distances: tuple[int, ...] = field(default=(), metadata={"minimum": 1})
    queries: int = field(default=512, metadata={"minimum": 0})
    pairs: int = field(default=0, metadata={"minimum": 0})

    @property
    def is_empty(self) -> bool:
        return not (self.samples or self.needles or self.queries)


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What a study's file has beside the sections of its runs and its peers."""

    reference: str
    seeds: tuple[int, ...] = field(metadata={"minimum": 0})
    evaluation: Evaluation = field(default_factory=Evaluation)


@dataclass(frozen=True, kw_only=True)
class _PeerHead:
    name: str


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file has it.

    Attributes:
        name: the file's, without its ending.
        reference: name of the peer that the others are set against.
        seeds: of weights and data order, one a run of each peer.
        evaluation: what is measured of trained runs.
        peers: name -> layers of its runs, in the order of the file.
    """

    name: str
    reference: str
    seeds: tuple[int, ...]
    evaluation: Evaluation
    peers: Mapping[str, tuple[Layer, ...]]

    def config(
        self, peer: str, seed: int, *, overrides: Sequence[str] = (), folder: Path, data: str, tokenizer: str
    ) -> Config:
        """The checked configuration of one run.

        Args:
            peer, seed: which run.
            overrides: words "section.key=value" over all that the study says.
            folder: of the run.
            data: prefix of the pair that it trains on.
            tokenizer: the pair's tokenizer.

        Raises:
            ConfigError: a key, type or rule is wrong; says which, of which peer, and what to change.
        """
        given = [(OVERRIDE_ORIGIN, parse_override(word)) for word in overrides]
        _refuse_keys_of_others(given)
        where = {
            "run": {"name": f"{self.name}_{peer}_{seed}", "folder": str(folder), "seed": seed},
            "data": {"train": [{"prefix": data}], "tokenizer": tokenizer},
        }
        try:
            config = resolve([*self.peers[peer], *given, ("the study", where)])
        except ConfigError as error:
            raise ConfigError(f"peer {peer}: {error}") from error
        if programs.states_program(config):
            raise ConfigError(f"peer {peer}: a study runs no stated programs; use another maha.aggregation")
        return config


def load_study(path: str | Path) -> Study:
    """Read a study's file; what its runs are is checked when their configurations are made.

    Raises:
        ConfigError: something of it is wrong; the message names the file, the key and what to change.
    """
    path = Path(path)
    tree = read_mapping(path)
    shared = read_fragments(fragment_names(tree, path), configs_of(path), path)
    peers = tree.pop("peers", None)
    names = [key.name for key in dataclasses.fields(_Head)]
    own = {key: tree.pop(key) for key in names if key in tree}
    head = build(_Head, own, "", {key: str(path) for key in (*names, "peers")})
    if not isinstance(peers, list) or not peers:
        raise ConfigError(f"{path}: peers must be a list, for example [{{name: dense, extends: [model/dense]}}]")
    layers: dict[str, tuple[Layer, ...]] = {}
    for number, peer in enumerate(peers, start=1):
        name, fragments, sections = _peer(path, number, peer)
        if name in layers:
            raise ConfigError(f"{path}: two peers are named {name}; rename one")
        layers[name] = (*fragments, *shared, (str(path), tree), (f"{path}, peer {name}", sections))
        _refuse_keys_of_others(layers[name])
    if head.reference not in layers:
        raise ConfigError(f"{path}: reference: {head.reference} is none of the peers: {', '.join(layers)}")
    if not head.seeds or len(set(head.seeds)) < len(head.seeds):
        raise ConfigError(f"{path}: seeds must be a list of different numbers, for example [1, 2, 3]")
    return Study(name=path.stem, reference=head.reference, seeds=head.seeds, evaluation=head.evaluation, peers=layers)


def _peer(path: Path, number: int, tree: Any) -> tuple[str, list[Layer], dict[str, Any]]:
    """Name, layers of the fragments and sections of one peer."""
    place = f"{path}, peer {number}"
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}: must be a mapping, for example {{name: dense, extends: [model/dense]}}")
    sections = dict(tree)
    name = build(_PeerHead, {"name": sections.pop("name")} if "name" in sections else {}, "", {"name": place}).name
    if not NAME.fullmatch(name):
        raise ConfigError(f"{place}: the name {name!r} names a folder too; use letters, digits, _ and -")
    return name, read_fragments(fragment_names(sections, place), configs_of(path), place), sections


def _refuse_keys_of_others(layers: Sequence[Layer]) -> None:
    """A key that somebody else says would have no effect here."""
    for origin, layer in layers:
        for dotted, owner in NOT_HERE.items():
            section, _, key = dotted.partition(".")
            if isinstance(layer.get(section), Mapping) and key in layer[section]:
                raise ConfigError(f"{origin}: {dotted}: has no effect in a study, where {owner} decides it; remove it")

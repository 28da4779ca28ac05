"""Files of studies: layers of a run, the repository's own, and what is refused."""

import dataclasses
import re
from pathlib import Path

import pytest

from maha_megatron.config.accounting import attention_savings, total_parameters
from maha_megatron.config.load import REPOSITORY_CONFIGS
from maha_megatron.config.schema import Config
from maha_megatron.config.study import Evaluation, Study, load_study
from maha_megatron.errors import ConfigError
from maha_megatron.scales import default_windows
from tests.support.fake_study import STUDY

WHERE = {"folder": Path("runs/x"), "data": "data/x", "tokenizer": "data/t.model"}
STUDIES = sorted((REPOSITORY_CONFIGS / "studies").glob("peers_*.yaml"))


def study(tmp_path: Path, old: str = "", new: str = "") -> Study:
    assert old in STUDY
    path = tmp_path / "small.yaml"
    path.write_text(STUDY.replace(old, new, 1), encoding="utf-8")
    return load_study(path)


def test_layers_of_a_run(tmp_path: Path) -> None:
    small = study(tmp_path)
    assert (small.name, small.reference, small.seeds, list(small.peers)) == (
        "small",
        "dense",
        (1, 2),
        ["dense", "window"],
    )
    assert small.evaluation == Evaluation(samples=4, needles=3, distances=(32, 20), queries=6, pairs=5)
    dense, window = (small.config(peer, 2, overrides=["train.steps=7"], **WHERE) for peer in small.peers)
    assert (dense.model.attention, window.maha.windows) == (("dense",), (8,))
    assert (dense.schedule.peak, window.schedule.peak) == (0.01, 0.02)
    assert (window.train.steps, window.run.seed, window.run.folder) == (7, 2, "runs/x")
    assert (window.data.train[0].prefix, window.data.tokenizer) == ("data/x", "data/t.model")


def test_fragments_of_peer_then_study_then_keys(tmp_path: Path) -> None:
    small = study(
        tmp_path, "peers:\n  - {name: dense,", "extends: [size/10m]\npeers:\n  - {name: dense, extends: [model/dense],"
    )
    config = small.config("dense", 1, **WHERE)
    assert (config.model.hidden, config.model.tied_embeddings, config.dense.qk_norm) == (32, True, True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reference: dense", "", "reference: is required"),
        ("reference: dense", "reference: maha", "maha is none of the peers: dense, window"),
        ("seeds: [1, 2]", "seeds: []", "seeds must be a list of different numbers"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds must be a list of different numbers"),
        ("seeds: [1, 2]", "seeds: [-1]", "must be at least 0"),
        ("name: window", "name: dense", "two peers are named dense"),
        ("name: window", "name: a/b", "the name 'a/b' names a folder too"),
        ("{name: window", "{nam: window", "peer 2: name: is required"),
        ("queries: 6", "querys: 6", "evaluation.querys: unknown key; did you mean evaluation.queries?"),
        ("data: {", "data: {tokenizer: t, ", "data.tokenizer: has no effect in a study, where --tokenizer decides it"),
        ("maha: {", "run: {seed: 3}, maha: {", "run.seed: has no effect in a study, where seeds of the study"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        study(tmp_path, old, new)
    assert message in str(error.value)
    assert "small.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "overrides", "message"),
    [
        ("maha: {", "maha: {windws: [3], ", (), "peer window: .*maha.windws: unknown key; did you mean maha.windows"),
        ("train: {", "trian: {", (), "trian: unknown key; did you mean train"),
        ("", "", ["run.folder=x"], "--set: run.folder: has no effect in a study"),
        (
            "windows: [8], full_reach: false",
            "ratio: 2, windows: [8, 8, 16], aggregation: program, program: 'a:b'",
            (),
            "runs no stated programs",
        ),
    ],
)
def test_what_a_run_cannot_be(tmp_path: Path, old: str, new: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, old, new).config("window", 1, overrides=overrides, **WHERE)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_repositorys_studies(path: Path) -> None:
    found = load_study(path)
    assert list(found.peers) == ["dense", "window", "window_hybrid", "maha", "hybrid", "refined"]
    configs = {peer: found.config(peer, 1, **WHERE) for peer in found.peers}
    assert {round(total_parameters(config) / 1e6) for config in configs.values()} == {34}
    assert {config.train.global_batch_samples * config.data.sequence_tokens for config in configs.values()} == {32768}
    keys = sum(default_windows(configs["maha"].data.sequence_tokens))
    for peer in ("window", "window_hybrid"):
        assert configs[peer].maha.windows == (keys,), "as many keys as maha has"
    assert sum(configs["refined"].maha.windows[:2]) == 128 + 112
    assert configs["refined"].maha.windows[2] * 16 == configs["refined"].data.sequence_tokens, "any block may open"
    saved = savings_as_told(path, configs)
    assert min(saved["maha"], saved["refined"]) >= 0.81


def savings_as_told(path: Path, configs: dict[str, Config]) -> dict[str, float]:
    told = dict(re.findall(r"(\w+) ([\d.]+) %", path.read_text().partition("extends")[0]))
    saved = {peer: attention_savings(config)["saved_frac_all_in"] for peer, config in configs.items()}
    assert told == {peer: f"{100 * saved[peer]:.1f}" for peer in saved if peer != "dense"}
    return saved


def test_turns_differ_from_the_peers_in_nothing_else() -> None:
    path = REPOSITORY_CONFIGS / "studies" / "turns_4k.yaml"
    found, peers = load_study(path), load_study(path.with_name("peers_4k.yaml"))
    configs = {peer: found.config(peer, 1, **WHERE) for peer in found.peers}
    savings_as_told(path, configs)
    for peer, config in configs.items():
        like = peers.config(peer.removesuffix("_tokens"), 1, **WHERE)
        unit = "token" if peer.endswith("_tokens") else "block"
        assert dataclasses.replace(like, run=config.run, maha=dataclasses.replace(like.maha, rope_unit=unit)) == config


def test_forms_save_what_they_must_and_train_as_the_peers_do() -> None:
    path = REPOSITORY_CONFIGS / "studies" / "forms_4k.yaml"
    found, peers = load_study(path), load_study(path.with_name("peers_4k.yaml"))
    configs = {peer: found.config(peer, 1, **WHERE) for peer in found.peers}
    saved = savings_as_told(path, configs)
    assert min(saved[peer] for peer in saved if peer != "dense") >= 0.81
    assert [peer for peer in configs if "dense" in configs[peer].model.attention] == ["dense", "eighth"]
    dense = peers.config("dense", 1, **WHERE)
    assert dataclasses.replace(configs["dense"], run=dense.run) == dense
    assert {(config.data, config.train) for config in configs.values()} == {(dense.data, dense.train)}
    schedules = {config.schedule for peer, config in configs.items() if peer != "dense"}
    assert schedules == {peers.config("refined", 1, **WHERE).schedule}

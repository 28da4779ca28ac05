"""Files, fragments and overrides become one typed tree; what is wrong with them is said by file and key."""

import dataclasses

import pytest
import yaml

from maha_megatron.config.load import (
    config_from_dict,
    config_to_dict,
    dotted_keys,
    dump_yaml,
    load_config,
    load_fragments,
)
from maha_megatron.config.schema import Config
from maha_megatron.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    """A small configs/ of its own: two fragments and a run file that extends them."""
    configs = tmp_path / "configs"
    for name, text in {
        "model/a": "model: {layers: 4, hidden: 64, attention: [maha, dense]}\ntrain: {steps: 10}",
        "size/b": "model: {layers: 8}\nschedule: {warmup_steps: 2}",
        "run/go": "extends: [model/a, size/b]\ntrain: {steps: 30}\ndata: {train: [{prefix: x/corpus}]}",
    }.items():
        path = configs / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return configs


def write(folder, text):
    path = folder / "run" / "other.yaml"
    path.write_text(text)
    return path


def test_later_layers_win_and_the_rest_takes_defaults(folder):
    config = load_config(folder / "run/go.yaml", ["train.steps=40", "train.steps=50"])
    assert config.model.layers == 8  # size/b over model/a
    assert config.model.hidden == 64  # only model/a says it
    assert config.train.steps == 50  # the last override over the file over model/a
    assert config.schedule.warmup_steps == 2
    assert config.model.attention == ("maha", "dense")
    assert config.data.train[0].prefix == "x/corpus"
    assert config.data.train[0].weight == 1.0
    assert config.model.heads == Config().model.heads


def test_fragments_alone_equal_a_file_that_extends_them(folder):
    path = write(folder, "extends: [model/a, size/b]")
    assert load_fragments(["model/a", "size/b"], folder=folder) == load_config(path)


def test_lists_are_replaced_not_joined(folder):
    assert load_config(folder / "run/go.yaml", ["model.attention=[dense]"]).model.attention == ("dense",)


@pytest.mark.parametrize("spelling", ["3e-4", "3E-4", "3.0e-4", "0.0003"])
def test_every_spelling_of_a_small_number_is_a_number(folder, spelling):
    assert load_config(folder / "run/go.yaml", [f"schedule.peak={spelling}"]).schedule.peak == 3e-4


def test_whole_numbers_pass_as_floats(folder):
    peak = load_config(folder / "run/go.yaml", ["schedule.peak=1"]).schedule.peak
    assert peak == 1.0
    assert isinstance(peak, float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {layres: 4}", ["other.yaml", "model.layres", "unknown key", "did you mean model.layers?"]),
        ("modle: {layers: 4}", ["other.yaml", "modle", "did you mean model?"]),
        ("model: {steps: 4}", ["model.steps", "did you mean train.steps?"]),
        ("model: {zzz: 4}", ["model.zzz", "known:", "layers"]),
        ("model: {layers: four}", ["other.yaml", "model.layers", "whole number", "'four'"]),
        ("model: {layers: 4.0}", ["model.layers", "whole number"]),
        ("model: {layers: true}", ["model.layers", "whole number"]),
        ("model: {layers: 0}", ["model.layers", "at least 1"]),
        ("model: {layers: }", ["model.layers", "whole number", "None"]),
        ("model: {attention: maha}", ["model.attention", "expects a list", "[maha]"]),
        ("model: {attention: [maha, dens]}", ["model.attention[1]", "maha, dense", "did you mean dense?"]),
        ("model: {tied_embeddings: 1}", ["model.tied_embeddings", "true or false"]),
        ("schedule: {peak: .nan}", ["schedule.peak", "finite"]),
        ("run: {name: 3}", ["run.name", "a text"]),
        ("train: {precision: fp16}", ["train.precision", "fp32, bf16", "did you mean"]),
        ("train: {precision: bf61}", ["did you mean bf16?"]),
        ("data: {train: [{weight: 1.0}]}", ["data.train[0].prefix", "is required"]),
        ("data: {train: [{prefix: a, wieght: 1.0}]}", ["data.train[0].wieght", "did you mean data.train[0].weight?"]),
        ("data: {train: [corpus]}", ["data.train[0]", "section"]),
        ("model: 3", ["other.yaml", "model", "section"]),
        ("- model", ["must hold sections"]),
        ("model: {layers: 4", ["not valid YAML"]),
        ("train: {steps: 4, steps: 5}", ["'steps' is given twice"]),
        ("extends: model/a", ["extends must be a list"]),
        ("extends: [model/aa]", ["no fragment 'model/aa'", "did you mean model/a?"]),
        ("extends: [run/go]", ["go.yaml", "a fragment extends nothing"]),
    ],
)
def test_what_is_wrong_is_named(folder, text, words):
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.stesp=4", ["--set", "train.stesp", "did you mean train.steps?"]),
        ("steps=4", ["write section.key=value"]),
        ("train.steps", ["write section.key=value"]),
        ("train.steps=[", ["not valid YAML"]),
        ("train.steps=many", ["--set: train.steps", "'many'"]),
    ],
)
def test_wrong_overrides_are_named(folder, word, words):
    with pytest.raises(ConfigError) as caught:
        load_config(folder / "run/go.yaml", [word])
    for text in words:
        assert text in str(caught.value)


def test_an_error_names_the_layer_that_brought_the_value(folder):
    (folder / "size/b.yaml").write_text("model: {hidden: wide}")
    with pytest.raises(ConfigError, match=r"b\.yaml: model\.hidden"):
        load_config(folder / "run/go.yaml")


def test_a_missing_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_rules_are_applied(folder):
    with pytest.raises(ConfigError, match="kv_groups"):
        load_config(folder / "run/go.yaml", ["model.kv_groups=5"])


def test_a_section_without_keys_is_empty(folder):
    assert load_config(write(folder, "model:\n  # layers: 4\n")) == Config()


def test_config_survives_dict_and_yaml(folder):
    config = load_config(folder / "run/go.yaml", ["maha.windows=[128, 112, 124, 64]", "optimizer.epsilon=1e-9"])
    assert config_from_dict(config_to_dict(config)) == config
    assert config_from_dict(yaml.safe_load(dump_yaml(config))) == config
    path = write(folder, dump_yaml(config))
    assert load_config(path) == config


def test_yaml_for_people_explains_every_key():
    sources = [{"prefix": "a # b: c", "weight": 0.25}, {"prefix": "d"}]
    trees = [
        {},
        {"data": {"train": sources, "sequence_tokens": 16384}},
        {"run": {"name": "yes", "folder": "3: #\n\n1e3"}},
    ]
    for tree in trees:
        config = config_from_dict(tree)
        text = dump_yaml(config)
        assert config_from_dict(yaml.safe_load(text)) == config
        words = " ".join(text.replace("#", " ").split())
        for section in vars(config).values():
            for key in dataclasses.fields(section):
                assert " ".join(key.metadata["help"].replace("#", " ").split()) in words
        assert max(map(len, text.splitlines())) <= 120


def test_yaml_for_people_tells_the_default_windows():
    assert "  windows: []  # here [128, 112, 124, 64]\n" in dump_yaml(Config())
    for tree in ({"maha": {"windows": [128, 112, 124, 64]}}, {"model": {"attention": ["dense"]}}):
        assert "# here" not in dump_yaml(config_from_dict(tree))


def test_dict_is_plain_data():
    tree = config_to_dict(config_from_dict({"data": {"train": [{"prefix": "a"}]}}))
    assert tree["data"]["train"] == [{"prefix": "a", "weight": 1.0, "epochs": 0.0}]
    assert tree["model"]["attention"] == ["maha"]


def test_dotted_keys_are_the_schema():
    keys = dotted_keys()
    assert len(keys) == len(set(keys)) == sum(len(dataclasses.fields(section)) for section in vars(Config()).values())
    assert "zero.stage" in keys

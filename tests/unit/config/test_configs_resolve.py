"""Every file below configs/ does what its folder promises."""

import contextlib
import dataclasses
from pathlib import Path

import pytest

from maha_megatron.config.accounting import memory_estimate, total_parameters
from maha_megatron.config.load import REPOSITORY_CONFIGS, load_config, load_fragments
from maha_megatron.config.render_deepspeed import deepspeed_config
from maha_megatron.config.render_mcore import transformer_config_fields
from maha_megatron.config.rules import check_topology
from maha_megatron.errors import ConfigError


def files(folder):
    found = sorted((REPOSITORY_CONFIGS / folder).glob("*.yaml"))
    assert found, folder
    return found


def names(folder):
    return [path.stem for path in files(folder)]


def render(config):
    """Both tables, for the smallest number of ranks that the configuration's parallelism allows."""
    world_size = config.parallel.tensor
    check_topology(config, world_size)
    assert transformer_config_fields(config)
    assert deepspeed_config(config, world_size)
    assert memory_estimate(config, world_size)["total"] > 0


@pytest.mark.parametrize("path", files("run") + files("model"), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_run_and_model_files_resolve_and_render(path: Path):
    render(load_config(path))


@pytest.mark.parametrize("model", names("model"))
@pytest.mark.parametrize("size", names("size"))
def test_every_size_fits_every_model(model, size):
    render(load_fragments([f"model/{model}", f"size/{size}"]))


@pytest.mark.parametrize("model", names("model"))
@pytest.mark.parametrize("cluster", names("cluster"))
def test_every_cluster_fits_every_model(model, cluster):
    render(load_fragments([f"model/{model}", f"cluster/{cluster}"]))


@pytest.mark.parametrize(
    ("cluster", "world_size"), [("1gpu", 1), ("2gpu", 2), ("8gpu", 8), ("multinode", 16), ("cpu", 2)]
)
def test_clusters_fit_the_ranks_they_are_named_after(cluster, world_size):
    check_topology(load_fragments(["model/hybrid", f"cluster/{cluster}"]), world_size)


def runs_at(tensor):
    """Sizes that a tensor-parallel size takes."""
    found = set()
    for size in names("size"):
        with contextlib.suppress(ConfigError):
            load_fragments(["model/hybrid", f"size/{size}", "cluster/multinode"], [f"parallel.tensor={tensor}"])
            found.add(size)
    return found


def test_tensor_sizes_are_what_the_comments_say():
    assert set(names("size")) - runs_at(4) == {"30m"}
    assert runs_at(8) == {"60m", "350m", "760m", "1b", "3b", "7b"}


@pytest.mark.parametrize("path", files("model"), ids=lambda path: path.stem)
def test_models_are_the_125m_size(path):
    """Each is complete by itself, and the size fragment changes nothing."""
    config = load_config(path)
    assert config == load_fragments([f"model/{path.stem}", "size/125m"])
    assert 123e6 < total_parameters(config) < 126e6


@pytest.mark.parametrize("size", names("size"))
def test_sizes_are_what_their_names_say(size):
    number, unit = float(size[:-1]), {"m": 1e6, "b": 1e9}[size[-1]]
    config = load_fragments(["model/maha", f"size/{size}"])
    assert total_parameters(config) == pytest.approx(number * unit, rel=0.09)
    assert config.model.layers % 4 == 0  # the hybrid's pattern
    assert config.model.kv_groups >= 4


@pytest.mark.parametrize("path", sorted(REPOSITORY_CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_explains_itself(path):
    assert path.read_text().startswith("# ")


def test_window_has_as_many_keys_as_maha():
    window = load_fragments(["model/window"])
    assert sum(window.maha.windows) == sum((128, 112, 124, 64))


def test_the_game_is_maha_fused_otherwise():
    game, maha = load_fragments(["model/maha_nash"]), load_fragments(["model/maha"])
    assert dataclasses.replace(game.maha, aggregation="convex", coupling="none") == maha.maha
    assert (game.maha.aggregation, game.maha.coupling, game.model) == ("nash", "gram", maha.model)


def test_quickstart_is_small():
    config = load_config(REPOSITORY_CONFIGS / "run" / "quickstart.yaml")
    assert 2.5e6 < total_parameters(config) < 4e6
    assert set(config.model.attention) == {"maha", "dense"}

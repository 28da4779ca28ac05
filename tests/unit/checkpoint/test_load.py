"""What a checkpoint is refused for, and that the message says what to change."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maha_megatron.checkpoint import layout, manifest
from maha_megatron.checkpoint.load import checkpoint_to_continue, find_checkpoint, load_random_state
from maha_megatron.checkpoint.save import save_checkpoint
from maha_megatron.checkpoint.weights import read_weights
from maha_megatron.config.schema import Config
from maha_megatron.errors import CheckpointError
from tests.unit.checkpoint.test_save import Source

DATA = {"tokenizer": "test:1", "run.seed": 7, "data.train[0] share": 1.0, "data.train[0] documents": 40}


def config(run: Path, **changes: object) -> Config:
    changed = {"run__folder": str(run)} | changes
    result = Config()
    for path, value in changed.items():
        section, key = path.split("__")
        part = dataclasses.replace(getattr(result, section), **{key: value})
        result = dataclasses.replace(result, **{section: part})
    return result


def save(run: Path, step: int = 3, world_size: int = 1) -> Path:
    described = manifest.describe(
        config(run), step=step, consumed_samples=8 * step, world_size=world_size, data=DATA, versions={}
    )
    return save_checkpoint(Source(), run, described, keep=2)


def test_nothing_to_continue_from(tmp_path: Path) -> None:
    assert checkpoint_to_continue(config(tmp_path), 1, DATA) is None


def test_the_newest_is_continued(tmp_path: Path) -> None:
    save(tmp_path, 3)
    newest = save(tmp_path, 4)
    found, read = checkpoint_to_continue(config(tmp_path), 1, DATA)
    assert (found, read.step, read.consumed_samples) == (newest, 4, 32)


def test_a_lost_latest_does_not_lose_the_run(tmp_path: Path) -> None:
    save(tmp_path, 3)
    newest = save(tmp_path, 20)
    (newest.parent / layout.LATEST).unlink()
    (newest.parent / layout.step_name(30)).mkdir()  # without a manifest: not complete
    found, read = checkpoint_to_continue(config(tmp_path), 1, DATA)
    assert (found, read.step) == (newest, 20)
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume is false"):
        checkpoint_to_continue(config(tmp_path, checkpoint__resume=False), 1, DATA)


def test_changed_training_settings_do_not_matter(tmp_path: Path) -> None:
    save(tmp_path)
    changed = config(tmp_path, train__steps=5000, schedule__peak=1e-5, train__micro_batch_samples=2)
    assert checkpoint_to_continue(changed, 1, DATA) is not None


def test_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.hidden: 768 .*512.*maha\.lse_utility: True.*False") as caught:
        checkpoint_to_continue(config(tmp_path, model__hidden=512, maha__lse_utility=False), 1, DATA)
    assert "model.layers" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({}, 2, "ranks: saved with 1, now 2"),
        ({"zero__stage": 3}, 1, "zero.stage: saved with 1, now 3"),
        ({"parallel__tensor": 2}, 2, "parallel.tensor: saved with 1, now 2"),
        ({"train__precision": "fp32"}, 1, "train.precision: saved with bf16, now fp32"),
    ],
)
def test_another_topology_is_refused(tmp_path: Path, changes: dict, ranks: int, said: str) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        checkpoint_to_continue(config(tmp_path, **changes), ranks, DATA)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "test:2"}, "tokenizer: saved with test:1, now test:2"),
        ({"run.seed": 8}, "run.seed: saved with 7, now 8"),
        ({"data.train[0] documents": 45}, r"data\.train\[0\] documents: saved with 40, now 45"),
        ({"data.train[1] share": 0.5}, r"data\.train\[1\] share: saved with none, now 0\.5"),
    ],
)
def test_other_data_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{said}\. The same sample.*start a new run\.folder"):
        checkpoint_to_continue(config(tmp_path), 1, DATA | changes)


def test_resume_off_refuses_a_used_folder(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume is false"):
        checkpoint_to_continue(config(tmp_path, checkpoint__resume=False), 1, DATA)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (save(tmp_path) / layout.ENGINE / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: engine/state\.pt is missing"):
        checkpoint_to_continue(config(tmp_path), 1, DATA)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path) / layout.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors has \d+ bytes, its manifest says \d+"):
        checkpoint_to_continue(config(tmp_path), 1, DATA)


def test_a_folder_that_latest_names_may_be_gone(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    checkpoint.rename(checkpoint.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"step_00000003 is not a complete checkpoint"):
        checkpoint_to_continue(config(tmp_path), 1, DATA)


def test_a_damaged_manifest_and_a_newer_layout(tmp_path: Path) -> None:
    path = save(tmp_path) / layout.MANIFEST
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format": 3}))
    with pytest.raises(CheckpointError, match="has layout 3; this version reads layout 2"):
        manifest.read(path.parent)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        manifest.read(path.parent)


def test_finding_a_step(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint: nothing at"):
        find_checkpoint(tmp_path)
    saved = save(tmp_path)
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, 3) == saved
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are: 3"):
        find_checkpoint(tmp_path, 7)


def test_missing_and_extra_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / layout.WEIGHTS
    with pytest.raises(CheckpointError, match="is missing"):
        list(read_weights(path, ["a"]))
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="missing c; not in the model b"):
        list(read_weights(path, ["a", "c"]))
    assert [name for name, _ in read_weights(path, ["b", "a"])] == ["b", "a"]
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="damaged"):
        list(read_weights(path, ["a"]))


def test_random_state_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(5)
    checkpoint = save(tmp_path)
    expected = torch.rand(3)
    load_random_state(checkpoint)
    assert torch.equal(torch.rand(3), expected)
    layout.random_state_file(checkpoint, 0).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_random_state(checkpoint)


def test_every_weight_comes_back(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    assert load_file(checkpoint / layout.WEIGHTS).keys() == Source().weights.keys()

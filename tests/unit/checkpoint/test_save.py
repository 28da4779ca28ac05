"""A checkpoint is complete and named by `latest`, or not there at all; a full disk costs nothing but itself."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maha_megatron.checkpoint import layout, manifest, save
from maha_megatron.checkpoint.save import save_checkpoint
from maha_megatron.checkpoint.weights import WeightsWriter
from maha_megatron.config.schema import Config
from maha_megatron.errors import CheckpointError

CONFIG = Config()


class Source:
    """What an engine offers, on one rank."""

    weight_dtype = torch.float32

    def __init__(self, value: float = 1.0, error: Exception | None = None) -> None:
        self.weights = {"a": torch.full((3, 2), value), "b": torch.arange(5.0) * value}
        self.error = error

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()

    def write_state(self, folder: Path) -> Exception | None:
        (folder / "state.pt").write_bytes(b"1234")
        return self.error


def described(step: int) -> manifest.Manifest:
    return manifest.describe(
        CONFIG, step=step, consumed_samples=8 * step, world_size=1, data={}, versions={"torch": "x"}
    )


def saved(run: Path, step: int, source: Source | None = None, keep: int = 2) -> Path:
    return save_checkpoint(source or Source(), run, described(step), keep=keep)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everything_is_in_its_place(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 5)
    assert checkpoint == tmp_path / "checkpoints" / "step_00000005"
    assert layout.latest_checkpoint(checkpoint.parent) == checkpoint
    names = {"manifest.json", "weights.safetensors", "engine/state.pt", "random/rank_00000.safetensors"}
    assert set(content(checkpoint)) == names
    read = manifest.read(checkpoint)
    assert (read.step, read.consumed_samples, read.versions) == (5, 40, {"torch": "x"})
    assert read.files["engine/state.pt"] == 4
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["latest", "step_00000005"]


def test_weights_are_what_the_public_reader_reads(tmp_path: Path) -> None:
    checkpoint, source = saved(tmp_path, 1, Source(2.5)), Source(2.5)
    read = load_file(checkpoint / layout.WEIGHTS)
    assert read.keys() == source.weights.keys()
    assert all(torch.equal(read[name], weight) for name, weight in source.weights.items())


def test_weights_keep_bf16_bits(tmp_path: Path) -> None:
    weight = torch.randn(4, 3).bfloat16()
    writer = WeightsWriter(tmp_path / "w", {"w": (4, 3)}, torch.bfloat16)
    writer.write("w", weight)
    writer.close()
    assert torch.equal(load_file(tmp_path / "w")["w"], weight)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        saved(tmp_path, step)
    folder = layout.checkpoints_folder(tmp_path)
    assert layout.complete_steps(folder) == [3, 10]
    assert layout.latest_checkpoint(folder).name == "step_00000010"


def test_retention_keeps_the_one_that_latest_names(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step, keep=3)
    folder = layout.checkpoints_folder(tmp_path)
    layout.set_latest(folder, folder / layout.step_name(1))
    layout.remove_old_checkpoints(folder, keep=1)
    assert layout.complete_steps(folder) == [1, 3]


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PLACES = {
    "the engine's state": lambda patch: None,
    "random state": lambda patch: patch.setattr(save, "save_file", full_disk),
    "weights, opening": lambda patch: patch.setattr(WeightsWriter, "__init__", full_disk),
    "weights, writing": lambda patch: patch.setattr(WeightsWriter, "write", full_disk),
    "weights, closing": lambda patch: patch.setattr(WeightsWriter, "close", full_disk),
    "manifest": lambda patch: patch.setattr(manifest, "write", full_disk),
    "rename": lambda patch: patch.setattr(os, "replace", full_disk),
    "latest": lambda patch: patch.setattr(layout, "set_latest", full_disk),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_anywhere_leaves_the_last_good_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = saved(tmp_path, 5)
    before = content(good)
    error = OSError(errno.ENOSPC, "No space left on device") if place == "the engine's state" else None
    PLACES[place](monkeypatch)
    with pytest.raises(CheckpointError, match=r"step 6 was not saved.*full.*last good checkpoint is step_00000005"):
        saved(tmp_path, 6, Source(2.0, error))
    monkeypatch.undo()
    assert layout.latest_checkpoint(good.parent) == good
    assert content(good) == before
    assert layout.complete_steps(good.parent) == [5]
    assert not list(good.parent.glob("partial*"))
    assert saved(tmp_path, 6).name == "step_00000006"  # once there is space again


def test_old_checkpoints_that_cannot_be_removed_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 5)

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(layout, "remove_old_checkpoints", denied)
    newest = saved(tmp_path, 6, keep=1)
    assert layout.latest_checkpoint(newest.parent) == newest
    assert "step_00000006 is saved, but older checkpoints could not be removed" in caplog.text


def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *rest, **more: real_open(
            "/dev/full" if str(path).endswith(layout.WEIGHTS) else path, *rest, **more
        ),
    )
    with pytest.raises(CheckpointError, match=r"full.*there is no earlier checkpoint"):
        saved(tmp_path, 1)
    assert not list(layout.checkpoints_folder(tmp_path).iterdir())


def test_another_error_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"PermissionError: .*denied"):
        saved(tmp_path, 1, Source(error=PermissionError(errno.EACCES, "Permission denied")))


def test_what_a_dead_process_left_is_removed_and_never_read(tmp_path: Path) -> None:
    folder = layout.checkpoints_folder(tmp_path)
    dead = layout.partial_folder(folder, 3)
    dead.mkdir(parents=True)
    (dead / layout.MANIFEST).write_text("{}")
    assert layout.complete_steps(folder) == []
    assert layout.latest_checkpoint(folder) is None
    saved(tmp_path, 4)
    assert not dead.exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    saved(tmp_path, 4, Source(1.0))
    again = saved(tmp_path, 4, Source(2.0))
    assert torch.equal(load_file(again / layout.WEIGHTS)["a"], torch.full((3, 2), 2.0))

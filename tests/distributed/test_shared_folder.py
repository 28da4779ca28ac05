"""Every rank continues from what rank 0 chose, or all ranks say that they do not see the same folder."""

from pathlib import Path

import pytest

from maha_megatron.checkpoint import layout, manifest
from maha_megatron.checkpoint.load import checkpoint_to_continue
from maha_megatron.checkpoint.shared_folder import check_shared
from maha_megatron.errors import CheckpointError
from tests.support.distributed import run_ranks
from tests.support.model import tiny_config
from tests.support.training import start_groups

WORLD = 2


def message(action: object) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def look(rank: int, folder: str) -> dict[str, str]:
    own, shared = f"{folder}/node{rank}", f"{folder}/shared"
    start_groups(tiny_config())
    found = []
    seen = {
        "shared": message(lambda: check_shared(shared)),
        "own": message(lambda: check_shared(own, patience_s=0.3)),
        "unwritable": message(lambda: check_shared("/dev/null/run")),
    }
    for name, run in (("nothing", f"{folder}/new"), ("resume shared", shared), ("resume own", own)):
        config = tiny_config(run__folder=run)
        described = manifest.describe(config, step=4, consumed_samples=32, world_size=WORLD, data={}, versions={})
        checkpoint = layout.checkpoints_folder(run) / layout.step_name(4)
        if rank == 0 and name != "nothing":
            checkpoint.mkdir(parents=True)
            manifest.write(described, checkpoint)
        seen[name] = message(lambda config=config: found.append(checkpoint_to_continue(config, WORLD, {})))
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_ranks(look, WORLD, str(tmp_path_factory.mktemp("folders")), timeout_s=120)


def test_a_shared_folder_passes(ranks: list[dict[str, str]], tmp_path: Path) -> None:
    for seen in ranks:
        assert seen["shared"] == seen["nothing"] == seen["resume shared"] == "nothing was raised"
    check_shared(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_folders_of_their_own_are_refused_by_all_ranks(ranks: list[dict[str, str]]) -> None:
    assert ranks[0]["own"] == ranks[1]["own"]
    assert "rank 1 does not see what rank 0 wrote into run.folder" in ranks[0]["own"]
    assert "shared file system" in ranks[0]["own"]


def test_a_checkpoint_that_one_rank_does_not_see_is_refused_by_all(ranks: list[dict[str, str]]) -> None:
    assert ranks[0]["resume own"] == ranks[1]["resume own"]
    assert "rank 1 does not see" in ranks[0]["resume own"]


def test_a_folder_that_cannot_be_written_is_said_by_all(ranks: list[dict[str, str]]) -> None:
    assert ranks[0]["unwritable"] == ranks[1]["unwritable"]
    assert "run.folder (/dev/null/run) cannot be written" in ranks[0]["unwritable"]

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from maha_megatron.data.epoch_index import NoTokenizer
from maha_megatron.data.index_cache import complete_folder
from maha_megatron.data.indexed import IndexedDataset
from maha_megatron.data.order import SourceOrder
from maha_megatron.errors import DataError
from tests.support.pairs import END, random_documents

S = 16


@pytest.fixture
def _stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sources too have their indexes in files."""
    monkeypatch.setattr("maha_megatron.data.order.STORED_ITEMS", 0)


def open_order(prefix: str, cache: Path, **overrides) -> SourceOrder:
    values = {"split": "train", "document_range": (0.0, 1.0), "seed": 7, "sequence_tokens": S, "cache": cache}
    values["packing"] = "concatenate"
    return SourceOrder(prefix, **(values | overrides))


def read(order: SourceOrder, samples: range | list[int]) -> np.ndarray:
    out = np.zeros((len(samples), S + 1), dtype=np.int64)
    for row, sample in zip(out, samples, strict=True):
        (row[:],) = order.read(sample)
    return out


def test_samples_are_those_of_a_single_epoch_gptdataset(write_pair: Callable[..., str], tmp_path: Path) -> None:
    prefix = write_pair("a", random_documents(40))
    order = open_order(prefix, tmp_path / "cache")
    for epoch in (0, 3):
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence((7, epoch)).generate_state(1)[0]),
            sequence_length=S,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=NoTokenizer(),
        )
        expected = GPTDataset(IndexedDataset(prefix), prefix, np.arange(40), None, Split.train, config)
        assert len(expected) == order.samples_per_epoch
        samples = read(order, range(epoch * len(expected), (epoch + 1) * len(expected)))
        for row, item in zip(samples, expected, strict=True):
            assert row[:-1].tolist() == item["tokens"].tolist()
            assert row[1:].tolist() == item["labels"].tolist()


def test_every_epoch_is_another_permutation(write_pair: Callable[..., str], tmp_path: Path) -> None:
    # Documents of exactly one sample: the first token of a sample names its document.
    prefix = write_pair("a", [[100 + i, *range(10, 10 + S - 2), END] for i in range(20)])
    order = open_order(prefix, tmp_path / "cache")
    assert order.samples_per_epoch == 19  # the last sample has no label for its last token
    epochs = [read(order, range(19 * epoch, 19 * (epoch + 1)))[:, 0].tolist() for epoch in range(3)]
    for first in epochs:
        assert len(set(first)) == 19
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_sample_does_not_depend_on_what_was_read_before(write_pair: Callable[..., str], tmp_path: Path) -> None:
    prefix = write_pair("a", random_documents(30))
    order = open_order(prefix, tmp_path / "cache")
    count = 4 * order.samples_per_epoch
    straight = read(order, range(count))
    backwards = read(open_order(prefix, tmp_path / "other"), list(reversed(range(count))))[::-1]
    assert np.array_equal(straight, backwards)
    other_seed = read(open_order(prefix, tmp_path / "cache", seed=8), range(count))
    assert not np.array_equal(straight, other_seed)


@pytest.mark.usefixtures("_stored")
def test_new_data_under_an_old_name_gets_a_new_index(write_pair: Callable[..., str], tmp_path: Path) -> None:
    read(open_order(write_pair("a", random_documents(30)), tmp_path / "cache"), range(5))
    changed = write_pair("a", random_documents(25, seed=1))
    assert np.array_equal(
        read(open_order(changed, tmp_path / "cache"), range(5)), read(open_order(changed, tmp_path / "new"), range(5))
    )


@pytest.mark.usefixtures("_stored")
def test_a_rank_other_than_0_builds_the_index_where_it_is_missing(
    write_pair: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_pair("a", random_documents(30))
    expected = read(open_order(prefix, tmp_path / "node0"), range(5))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert np.array_equal(read(open_order(prefix, tmp_path / "node1"), range(5)), expected)


@pytest.mark.usefixtures("_stored")
def test_the_index_is_opened_from_the_cache_the_second_time(
    write_pair: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_pair("a", random_documents(30))
    read(open_order(prefix, tmp_path / "cache"), range(5))
    monkeypatch.setattr(np, "save", lambda *_, **__: pytest.fail("built again"))
    read(open_order(prefix, tmp_path / "cache"), range(5))


def test_a_last_document_range_holds_the_last_documents(write_pair: Callable[..., str], tmp_path: Path) -> None:
    prefix = write_pair("a", [[100 + i] * (S - 1) + [END] for i in range(20)])
    order = open_order(prefix, tmp_path / "cache", document_range=(0.8, 1.0), split="validation")
    assert (order.documents, order.tokens, order.samples_per_epoch) == (4, 4 * S, 3)
    assert set(read(order, range(3))[:, 0]) <= {116, 117, 118, 119}
    assert list(order.last_tokens(10)) == [(number, END) for number in (16, 17, 18, 19)]
    assert [number for number, _ in order.last_tokens(2)] == [16, 18]


def test_too_few_tokens_says_how_many_there_are(write_pair: Callable[..., str], tmp_path: Path) -> None:
    prefix = write_pair("a", [[5, 6, END], [7, END]])
    with pytest.raises(DataError, match=r"holds 5 tokens in 2 of 2 documents.* = 16 needs 17.*best_fit"):
        open_order(prefix, tmp_path, split="validation")
    with pytest.raises(DataError, match=r"validation part holds 0 tokens.*raise data\.validation_frac"):
        open_order(prefix, tmp_path, split="validation", document_range=(0.98, 1.0))


def test_threads_that_want_one_folder_fill_it_once(tmp_path: Path) -> None:
    fills = []

    def fill(folder: Path) -> None:
        fills.append(folder)
        (folder / "content").write_text("whole")

    threads = [threading.Thread(target=complete_folder, args=(tmp_path / "x", fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(fills) == 1
    assert (tmp_path / "x" / "content").read_text() == "whole"


def test_processes_that_want_one_folder_fill_it_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from maha_megatron.data.index_cache import complete_folder\n"
        "def fill(folder):\n"
        "    (folder / 'content').write_text('half'); time.sleep(0.3); (folder / 'content').write_text('whole')\n"
        "    print('filled')\n"
        "complete_folder(Path(sys.argv[1]), fill); assert (Path(sys.argv[1]) / 'content').read_text() == 'whole'\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE) for _ in range(3)
    ]
    outputs = [rank.communicate(timeout=30)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert b"".join(outputs) == b"filled\n"


def test_a_failed_fill_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def full_disk(folder: Path) -> None:
        (folder / "content").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"No space left.*set data\.cache"):
        complete_folder(tmp_path / "x", full_disk)
    assert not (tmp_path / "x").exists()
    complete_folder(tmp_path / "x", lambda folder: (folder / "content").touch())
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["content"]


def test_partial_folders_of_different_processes_never_meet(tmp_path: Path) -> None:
    """Process ids repeat on other nodes, where no lock may hold either."""
    partial = []

    def full_disk(folder: Path) -> None:
        partial.append(folder)
        raise OSError(28, "No space left on device")

    for _ in range(2):
        with pytest.raises(DataError, match="No space left"):
            complete_folder(tmp_path / "x", full_disk)
    assert partial[0] != partial[1]
    assert all(socket.gethostname().replace(".", "-") in folder.name for folder in partial)
    assert list(tmp_path.iterdir()) == []


def start_filling(cache: Path, name: str) -> subprocess.Popen:
    """A process that has begun to fill a folder and does not end."""
    code = (
        "import sys, time; from pathlib import Path; from maha_megatron.data.index_cache import complete_folder\n"
        "def fill(folder):\n"
        "    (folder / 'content').write_text('half'); print('filling', flush=True); time.sleep(60)\n"
        "complete_folder(Path(sys.argv[1]), fill)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(cache / name)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"filling\n"
    return process


def test_what_killed_builds_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = [start_filling(tmp_path, name) for name in ("x", "other")]
    for process in killed:
        process.kill()
        process.wait()
    filling = start_filling(tmp_path, "live")  # removes what they left, and stays
    try:
        far = [tmp_path / f".{name}.another-node.0123.partial" for name in ("young", "old")]
        for folder in far:
            folder.mkdir()
        os.utime(far[1], (0, 0))
        complete_folder(tmp_path / "x", lambda folder: (folder / "content").write_text("whole"))
        left = {path.name for path in tmp_path.iterdir()}
        assert {name for name in left if ".live." not in name} == {"x", far[0].name}
        assert len(left) == 4  # the lock and the folder of the process that fills
        assert (tmp_path / "x" / "content").read_text() == "whole"
    finally:
        filling.kill()
        filling.wait()

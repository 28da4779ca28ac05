"""Best-fit packing against its definition, item by item, and as the order of a source."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from maha_megatron.data.best_fit import best_fit
from maha_megatron.data.order import SourceOrder
from tests.support.pairs import END, random_documents

S = 16


def by_definition(lengths: list[int], room: int) -> list[int]:
    """Rooms left in the samples when each length, longest first, goes where the least room is that suffices."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, free in enumerate(left) if free >= length]
        if fitting:
            left[min(fitting, key=lambda number: left[number])] -= length
        else:
            left.append(room - length)
    return sorted(left)


@pytest.mark.parametrize(("items", "room"), [(0, 5), (1, 1), (300, 7), (300, 64), (500, 100), (40, 1000)])
def test_rooms_left_are_those_of_the_definition(items: int, room: int) -> None:
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, room + 1, items)
        sample, samples = best_fit(lengths, room)
        filled = np.bincount(sample, weights=lengths, minlength=samples)
        assert filled.size == samples
        assert sorted(room - filled) == by_definition(lengths.tolist(), room)


def test_equal_items_follow_their_order() -> None:
    sample, _ = best_fit(np.array([3, 3, 3, 3, 5]), 6)
    assert sample.tolist() == [1, 1, 2, 2, 0]


def open_order(prefix: str, cache: Path, **overrides) -> SourceOrder:
    values = {"split": "train", "document_range": (0.0, 1.0), "seed": 7, "sequence_tokens": S, "cache": cache}
    return SourceOrder(prefix, **(values | {"packing": "best_fit"} | overrides))


def test_every_prediction_of_every_document_comes_once_an_epoch(write_pair: Callable[..., str], tmp_path: Path) -> None:
    documents = [*random_documents(60), [5], [], [7, END], [*range(10, 10 + 3 * S), END], [*range(10, 10 + S), END]]
    order = open_order(write_pair("a", documents), tmp_path)
    expected = sorted(pair for document in documents for pair in pairwise(document))
    seen = []
    for epoch in range(2):
        first = epoch * order.samples_per_epoch
        samples = [order.read(sample) for sample in range(first, first + order.samples_per_epoch)]
        assert max(sum(len(run) - 1 for run in runs) for runs in samples) == S
        pairs = [pair for runs in samples for run in runs for pair in pairwise(run.tolist())]
        assert sorted(pairs) == expected
        seen.append(pairs)
    assert seen[0] != seen[1]


def test_only_documents_longer_than_a_sample_are_cut(write_pair: Callable[..., str], tmp_path: Path) -> None:
    documents = [*random_documents(60, longest=S), [*range(10, 10 + 2 * S), END], [*range(10, 10 + S - 1), END]]
    order = open_order(write_pair("a", documents), tmp_path)
    assert order.cuts == 1  # 2 S rows: two pieces
    concatenated = open_order(write_pair("a", documents), tmp_path, packing="concatenate")
    assert concatenated.cuts > 20
    rows = sum(len(document) - 1 for document in documents)
    assert order.padding_frac == pytest.approx(1 - rows / (order.samples_per_epoch * S))
    assert 0 < order.padding_frac < 0.1
    assert concatenated.padding_frac == 0


def test_origins_name_what_was_read(write_pair: Callable[..., str], tmp_path: Path) -> None:
    documents = [[], *random_documents(40), [], [*range(10, 10 + 3 * S), END]]
    for packing in ("best_fit", "concatenate"):
        order = open_order(write_pair("a", documents), tmp_path, packing=packing)
        for sample in range(2 * order.samples_per_epoch):
            tokens = np.concatenate(order.read(sample)).tolist()
            named = [
                token
                for part in order.origins(sample)
                for token in documents[part.document][part.offset : part.offset + part.tokens]
            ]
            assert named == tokens


def test_a_source_shorter_than_a_sample_works(write_pair: Callable[..., str], tmp_path: Path) -> None:
    prefix = write_pair("a", [[5, 6, END], [7, END]])
    padded = open_order(prefix, tmp_path)
    assert (padded.samples_per_epoch, padded.cuts) == (1, 0)
    assert sorted(len(run) for run in padded.read(123)) == [2, 3]
    repeated = open_order(prefix, tmp_path, packing="concatenate")
    (run,) = repeated.read(10**6)
    assert len(run) == S + 1
    assert set(run.tolist()) == {5, 6, 7, END}
    assert not list(tmp_path.glob("a-*"))  # a million epochs of a tiny source leave no folders


def test_a_stored_index_is_mapped_and_checked(
    write_pair: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maha_megatron.errors import DataError

    prefix = write_pair("a", random_documents(30))
    in_memory = [[run.tolist() for run in open_order(prefix, tmp_path).read(sample)] for sample in range(5)]
    monkeypatch.setattr("maha_megatron.data.order.STORED_ITEMS", 0)
    for packing in ("best_fit", "concatenate"):
        order = open_order(prefix, tmp_path / packing, packing=packing)
        order.read(0)
        (folder,) = (path for path in (tmp_path / packing).iterdir() if path.is_dir())
        damaged = next(folder.glob("*.npy"))
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=r"index .* is damaged .* remove it, and it is built again"):
            open_order(prefix, tmp_path / packing, packing=packing).read(0)
    stored = open_order(prefix, tmp_path / "new")
    assert [[run.tolist() for run in stored.read(sample)] for sample in range(5)] == in_memory

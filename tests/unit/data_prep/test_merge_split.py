"""Merging, splitting and inspecting pairs; 64-bit offsets on a sparse pair of 60 G tokens."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maha_megatron.data.checksums import OLD_CHUNK_BYTES, TokenSums, checksums_path, file_sha256, read_checksums
from maha_megatron.data.indexed import IndexedDataset, IndexedDatasetBuilder
from maha_megatron.data.layout import HEADER, MAGIC, read_index
from maha_megatron.data.manifest import read_manifest, write_manifest
from maha_megatron.data.order import SourceOrder
from maha_megatron.data.pair import open_pair
from maha_megatron.data.prepare import pairs
from maha_megatron.data.prepare.index_file import write_index
from maha_megatron.data.prepare.inspection import exact_duplicates, measure_lengths, plot_lengths, sampled_documents
from maha_megatron.data.prepare.pairs import merge_pairs, split_pair
from maha_megatron.errors import DataError
from tests.support.corpora import odd_corpus, pair_bytes, sentencepiece_model, settings_for, write_inputs
from tests.support.pairs import END, random_documents

UINT16 = 8
Quiet = {"arguments": {"append_eod": True}, "advance": lambda num_bytes: None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sentencepiece_model(tmp_path_factory.mktemp("tokenizer") / "small.model")


def foreign_pair(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """A pair of another tool: documents of several sequences, no manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array([t for sequence in document for t in sequence]), [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_a_merge_of_partitions_is_the_whole(tmp_path: Path, model: str) -> None:
    odd_corpus(tmp_path / "a.jsonl", 200, long_bytes=0)
    odd_corpus(tmp_path / "b.jsonl", 100, seed=1, long_bytes=0)
    settings = settings_for(model)
    for name in "ab":
        write_inputs([tmp_path / f"{name}.jsonl"], tmp_path / name, settings)
    whole = write_inputs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "whole", settings)
    merged = merge_pairs([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", **Quiet)
    assert pair_bytes(tmp_path / "merged") == pair_bytes(tmp_path / "whole")
    assert merged == whole == read_manifest(tmp_path / "merged")
    open_pair(tmp_path / "merged").check_all()


def test_a_merge_is_what_megatrons_builder_merges(tmp_path: Path) -> None:
    parts = [[[[5, 6], [7]], [], [[8, END]]], [], [[[9] * 5, [1], [2, 3]]], [[], []]]
    prefixes = [foreign_pair(tmp_path / f"p{number}", part) for number, part in enumerate(parts)]
    builder = IndexedDatasetBuilder(f"{tmp_path}/megatron.bin", dtype=np.uint16)
    for prefix in (prefixes[0], prefixes[2], prefixes[3]):  # it cannot open an empty .bin
        if read_index(prefix).tokens:
            builder.add_index(str(prefix))
        else:
            for _ in range(2):
                builder.end_document()
    builder.finalize(f"{tmp_path}/megatron.idx")
    assert merge_pairs(prefixes, tmp_path / "merged", **Quiet) is None
    assert pair_bytes(tmp_path / "merged") == pair_bytes(tmp_path / "megatron")


def test_a_split_merges_back(tmp_path: Path, model: str) -> None:
    odd_corpus(tmp_path / "a.jsonl", 200, long_bytes=0)
    whole = write_inputs([tmp_path / "a.jsonl"], tmp_path / "a", settings_for(model))
    outputs = [(tmp_path / "s0", 120), (tmp_path / "s1", 1), (tmp_path / "s2", 79)]
    split_pair(tmp_path / "a", outputs, **Quiet)
    parts = [open_pair(prefix) if read_index(prefix).tokens else None for prefix, _ in outputs]
    for part in filter(None, parts):
        part.check_all()
    assert [read_manifest(prefix).documents for prefix, _ in outputs] == [120, 1, 79]
    assert len({read_manifest(prefix).text_digest for prefix, _ in outputs}) == 3
    merged = merge_pairs([prefix for prefix, _ in outputs], tmp_path / "m", **Quiet)
    assert pair_bytes(tmp_path / "m") == pair_bytes(tmp_path / "a")
    assert (merged.tokens, merged.unigram_entropy_nats) == (whole.tokens, whole.unigram_entropy_nats)
    assert merged.text_bytes is None  # a split does not know how its documents were spelt


def with_old_checksums(prefix: Path) -> Path:
    """The pair as it was written when checksums were of 64 KiB and did not say so."""
    manifest, sums = read_manifest(prefix), TokenSums(0, OLD_CHUNK_BYTES)
    _, counts, _ = read_checksums(prefix, manifest.checksums_sha256)
    sums.add_bytes(Path(f"{prefix}.bin").read_bytes())
    np.savez(checksums_path(prefix), crc32=sums.crc32, counts=counts)
    write_manifest(prefix, replace(manifest, checksums_sha256=file_sha256(checksums_path(prefix))))
    return prefix


def test_checksums_of_older_pairs_are_held_too(tmp_path: Path, model: str) -> None:
    odd_corpus(tmp_path / "a.jsonl", 300, long_bytes=200_000)
    whole = write_inputs([tmp_path / "a.jsonl"], tmp_path / "a", settings_for(model))
    expected, old = pair_bytes(tmp_path / "a"), with_old_checksums(tmp_path / "a")
    assert whole.tokens * 2 > 2 * OLD_CHUNK_BYTES
    open_pair(old).check_all()
    assert merge_pairs([old], tmp_path / "merged", **Quiet).checksums_sha256 == whole.checksums_sha256
    assert pair_bytes(tmp_path / "merged") == expected
    split_pair(old, [(tmp_path / "s0", 150), (tmp_path / "s1", 150)], **Quiet)
    open_pair(tmp_path / "s1").check_all()
    with Path(f"{old}.bin").open("r+b") as stream:
        stream.seek(OLD_CHUNK_BYTES + 20_000)
        stream.write(b"\0\1\2")
    damaged = f"between byte {OLD_CHUNK_BYTES} and {2 * OLD_CHUNK_BYTES}"
    with pytest.raises(DataError, match=damaged):
        open_pair(old).check_all()
    with pytest.raises(DataError, match=damaged):
        merge_pairs([old], tmp_path / "again", **Quiet)


def test_pairs_that_do_not_belong_together_are_refused(tmp_path: Path, model: str) -> None:
    narrow = foreign_pair(tmp_path / "narrow", [[[1, 2]]])
    wide = foreign_pair(tmp_path / "wide", [[[1, 2]]], dtype=np.int32)
    with pytest.raises(DataError, match=r"wide stores tokens as int32, .*narrow as uint16"):
        merge_pairs([narrow, wide], tmp_path / "m", **Quiet)
    with pytest.raises(DataError, match="is an input too"):
        merge_pairs([narrow, narrow], narrow, **Quiet)
    with pytest.raises(DataError, match="does not exist"):
        merge_pairs([narrow, tmp_path / "none"], tmp_path / "m", **Quiet)
    other = sentencepiece_model(tmp_path / "other.model")
    Path(other).write_bytes(Path(model).read_bytes() + b"\x22\x00")  # an empty field more: another fingerprint
    odd_corpus(tmp_path / "a.jsonl", 20, long_bytes=0)
    for name, path in (("a", model), ("b", other)):
        write_inputs([tmp_path / "a.jsonl"], tmp_path / name, settings_for(path))
    with pytest.raises(DataError, match=r"b was made with another tokenizer than .*a"):
        merge_pairs([tmp_path / "a", tmp_path / "b"], tmp_path / "m", **Quiet)
    write_inputs([tmp_path / "a.jsonl"], tmp_path / "endless", settings_for(model, append_end=False))
    for pairs_of_both in ([tmp_path / "a", tmp_path / "endless"], [tmp_path / "endless", tmp_path / "a"]):
        with pytest.raises(DataError, match=r"endless have no ends and those of .*a have: .*endless again with --app"):
            merge_pairs(pairs_of_both, tmp_path / "m", **Quiet)
    assert not list(tmp_path.glob("m*"))


def test_no_pair_is_written_over_itself(tmp_path: Path) -> None:
    prefix = foreign_pair(tmp_path / "p_0", [[[1, 2]], [[3]]])
    (tmp_path / "link_0.idx").symlink_to(f"{prefix}.idx")
    whole = pair_bytes(prefix)
    for name in ("p", "link"):
        outputs = [(tmp_path / f"{name}_{number}", 1) for number in range(2)]
        with pytest.raises(DataError, match=rf"{name}_0 is an input too: write to another name"):
            split_pair(prefix, outputs, **Quiet)
        with pytest.raises(DataError, match=rf"{name}_0 is an input too: write to another name"):
            merge_pairs([prefix, prefix], outputs[0][0], **Quiet)
    assert pair_bytes(prefix) == whole
    assert not list(tmp_path.glob("*_1.*"))


def test_a_failed_merge_or_split_leaves_the_old_outputs(tmp_path: Path, model: str) -> None:
    odd_corpus(tmp_path / "a.jsonl", 100, long_bytes=0)
    for name in ("a", "b", "old", "old_0", "old_1"):
        write_inputs([tmp_path / "a.jsonl"], tmp_path / name, settings_for(model))
    with open(tmp_path / "b.bin", "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"b\.bin is damaged"):
        merge_pairs([tmp_path / "a", tmp_path / "b"], tmp_path / "old", **Quiet)
    with pytest.raises(DataError, match=r"b\.bin is damaged"):
        split_pair(tmp_path / "b", [(tmp_path / "old_0", 50), (tmp_path / "old_1", 50)], **Quiet)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------------------ large, sparse

DOCUMENT_TOKENS = 1_000_000
TYPE_BYTES = 2


def sparse_pair(prefix: Path, documents: int, marked: dict[int, int]) -> Path:
    """A pair of documents of a million zeros, less a few; `marked` documents begin with a token of their own."""
    lengths = np.full(documents, DOCUMENT_TOKENS, dtype=np.int32)
    lengths[1::7] -= 3
    write_index(
        Path(f"{prefix}.idx"),
        code=UINT16,
        sequences=documents,
        bounds=documents + 1,
        lengths=lambda: [lengths],
        documents=lambda: [np.arange(documents + 1, dtype=np.int64)],
    )
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * TYPE_BYTES
    with open(f"{prefix}.bin", "wb") as stream:
        for document, token in marked.items():
            stream.seek(int(offsets[document]))
            stream.write(np.uint16(token).tobytes())
        stream.truncate(int(offsets[-1]))
    return prefix


def disk_bytes(prefix: Path) -> int:
    return os.stat(f"{prefix}.bin").st_blocks * 512


def check_large(folder: Path, documents: int, samples: int) -> None:
    """Halves with marked documents read, merge with their holes, and sample right."""
    half = documents // 2
    marks = {0: 11, half // 3: 12, half - 1: 13}
    first, second = (
        sparse_pair(folder / name, half, {n: token + 10 * number for n, token in marks.items()})
        for number, name in enumerate(("first", "second"))
    )
    merge_pairs([first, second], folder / "merged", **Quiet)
    expected = {**marks, **{half + n: token + 10 for n, token in marks.items()}}
    pair = open_pair(folder / "merged")
    assert pair.index.tokens == read_index(first).tokens * 2
    assert {n: int(pair.document(n)[0]) for n in expected} == expected
    assert not pair.document(half // 2).any()
    megatron = IndexedDataset(f"{folder}/merged")
    assert {n: int(megatron.get(n, 0, 1)[0]) for n in expected} == expected
    assert megatron.document_indices[-1] == 2 * half
    assert disk_bytes(folder / "merged") < 10_000_000
    order = SourceOrder(
        f"{folder}/merged",
        split="train",
        document_range=(0.0, 1.0),
        seed=1,
        sequence_tokens=4096,
        packing="concatenate",
        cache=folder / "cache",
    )
    assert order.samples_per_epoch == (pair.index.tokens - 1) // 4096
    random = np.random.default_rng(0)
    for sample in random.integers(order.samples_per_epoch, size=samples).tolist():
        (run,) = order.read(sample)
        parts = order.origins(sample)
        assert len(run) == sum(part.tokens for part in parts) == 4097
        expected_run = np.concatenate(
            [pair.document(part.document)[part.offset : part.offset + part.tokens] for part in parts]
        )
        assert np.array_equal(run, expected_run)
    index = order.epoch(0)
    places = {int(document): n for n, document in enumerate(index.arrays["document_index"])}
    starts = index.arrays["sample_index"]
    for document, token in expected.items():  # and the very samples with the marked documents
        place = int(np.searchsorted(starts[:, 0], places[document], side="right")) - 1
        while starts[place, 0] == places[document] and starts[place, 1] > 0:
            place -= 1
        sample = int(np.flatnonzero(index.arrays["shuffle_index"] == place)[0])
        assert token in order.read(sample)[0]


def test_offsets_beyond_32_bits_merge_and_sample(tmp_path: Path) -> None:
    check_large(tmp_path, documents=3_000, samples=20)  # 6 GB: past 2^32


@pytest.mark.full
def test_sixty_billion_tokens_merge_and_sample(tmp_path: Path) -> None:
    assert 60_000 * DOCUMENT_TOKENS * TYPE_BYTES > 2**36
    check_large(tmp_path, documents=60_000, samples=200)


def test_an_index_whose_offsets_overflowed_is_refused(tmp_path: Path) -> None:
    prefix = sparse_pair(tmp_path / "p", 3_000, {})
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    assert content.startswith(MAGIC)
    begin = HEADER.size + 4 * 3_000
    pointers = np.frombuffer(content, dtype=np.int64, count=3_000, offset=begin)
    content[begin : begin + 8 * 3_000] = pointers.astype(np.int32).astype(np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError, match="let offsets overflow"):
        open_pair(prefix)


def test_a_pair_that_becomes_shorter_is_not_taken_for_a_hole(tmp_path: Path) -> None:
    first, second = (sparse_pair(tmp_path / name, 2, {0: 7, 1: 8}) for name in ("first", "second"))

    def cut_the_second(num_bytes: int) -> None:
        os.truncate(f"{second}.bin", 1_000_000)

    with pytest.raises(DataError, match=r"second\.bin became shorter while it was read"):
        merge_pairs([first, second], tmp_path / "m", arguments={}, advance=cut_the_second)
    assert not list(tmp_path.glob("m*"))


def test_a_file_system_without_holes_merges_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = sparse_pair(tmp_path / "p", 3, {1: 7})

    def no_holes(*_: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pairs.os, "lseek", no_holes)
    merge_pairs([prefix, prefix], tmp_path / "m", **Quiet)
    assert Path(f"{tmp_path}/m.bin").read_bytes() == 2 * Path(f"{prefix}.bin").read_bytes()


# -------------------------------------------------------------------------------------------------------- inspection


def test_lengths_duplicates_and_samples(write_documents: Callable[..., str], tmp_path: Path) -> None:
    documents = [[5, END], [7, 8, 9, END], [], [5, END], [5, 5, END], [7, 8, 9, END], [5, END], []]
    pair = open_pair(write_documents(documents))
    lengths = measure_lengths(pair.index)
    assert (lengths.documents, lengths.empty, lengths.tokens) == (8, 2, 17)
    assert (lengths.least, lengths.most, lengths.by_power) == (2, 4, [0, 4, 2])
    assert exact_duplicates(pair) == [(0, 3), (1, 5), (0, 6)]
    assert exact_duplicates(open_pair(write_documents(random_documents(50)))) == []
    assert set(sampled_documents(pair, 20, 0)) == {0, 1, 3, 4, 5, 6}
    assert len(sampled_documents(pair, 2, 0)) == 2
    plot_lengths(lengths, "lengths", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def write_documents(tmp_path: Path) -> Callable[..., str]:
    def write(documents: list[list[int]]) -> str:
        shutil.rmtree(tmp_path / "pair", ignore_errors=True)
        (tmp_path / "pair").mkdir()
        return str(foreign_pair(tmp_path / "pair" / "p", [[document] if document else [] for document in documents]))

    return write

"""Preprocessing: byte identity with Megatron's builder, bad lines, partitions, bounds on what waits."""

import gzip
import json
import math
import queue
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from maha_megatron.data.indexed import DType
from maha_megatron.data.manifest import bad_lines_path, read_manifest
from maha_megatron.data.pair import open_pair
from maha_megatron.data.prepare import encode, partitions
from maha_megatron.data.prepare.blocks import read_blocks
from maha_megatron.data.prepare.digest import TextDigest, digest_of, parse_digest
from maha_megatron.data.prepare.encode import Output
from maha_megatron.data.prepare.index_file import token_code
from maha_megatron.data.prepare.inputs import list_inputs
from maha_megatron.data.prepare.partitions import write_in_partitions
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError
from tests.support.corpora import (
    BAD_LINES,
    byte_level_bpe,
    megatron_pair,
    odd_corpus,
    pair_bytes,
    sentencepiece_model,
    settings_for,
    write_inputs,
)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str | None]]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "SentencePiece": (sentencepiece_model(folder / "small.model"), None),
        "byte-level BPE": byte_level_bpe(folder / "bpe"),
    }


@pytest.fixture(params=["SentencePiece", "byte-level BPE"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict) -> tuple[str, str | None]:
    return tokenizers[request.param]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and batches, although there is little text."""
    monkeypatch.setattr("maha_megatron.data.prepare.blocks.BLOCK_BYTES", 5000)
    monkeypatch.setattr("maha_megatron.data.prepare.encoding.BATCH_CHARACTERS", 1000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("append_end", [True, False])
def test_the_pair_is_byte_for_byte_megatrons(
    tmp_path: Path, tokenizer: tuple[str, str | None], append_end: bool
) -> None:
    texts, bad = odd_corpus(tmp_path / "odd.jsonl", 1500, long_bytes=30_000)
    megatron_pair(tmp_path / "megatron", texts, *tokenizer, append_end=append_end)
    manifest = write_inputs(
        [tmp_path / "odd.jsonl"], tmp_path / "ours", settings_for(*tokenizer, append_end=append_end)
    )
    assert pair_bytes(tmp_path / "ours") == pair_bytes(tmp_path / "megatron")
    assert manifest.bad_lines == bad
    assert sum(bad.values()) > 5


@pytest.mark.parametrize(("workers", "partitions"), [(2, 1), (3, 1), (1, 2), (2, 5)])
def test_workers_and_partitions_change_no_byte(tmp_path: Path, tokenizers: dict, workers: int, partitions: int) -> None:
    tokenizer = tokenizers["SentencePiece"]
    odd_corpus(tmp_path / "a.jsonl", 1500, long_bytes=30_000)
    odd_corpus(tmp_path / "b.jsonl", 300, seed=1, long_bytes=0)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
    inputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz")]
    expected = write_inputs(inputs, tmp_path / "one", settings_for(*tokenizer))
    settings = settings_for(*tokenizer)
    if partitions == 1:
        found = write_inputs(inputs, tmp_path / "many", settings, workers=workers)
    else:
        (found,) = write_in_partitions(
            list_inputs(list(map(str, inputs))),
            [Output("text", tmp_path / "many", {"append_eod": True})],
            partitions=partitions,
            settings=settings,
            workers=workers,
            advance=lambda documents, text_bytes, read_bytes: None,
            say=lambda text: None,
            revisions={},
        )
    assert pair_bytes(tmp_path / "many") == pair_bytes(tmp_path / "one")
    assert found == expected
    assert bad_lines_path(tmp_path / "many").read_bytes() == bad_lines_path(tmp_path / "one").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("many*")) == [
        f"many.{ending}" for ending in ("bad_lines.jsonl", "bin", "checksums.npz", "idx", "manifest.json")
    ]


@pytest.mark.full
@pytest.mark.parametrize(("workers", "partitions"), [(2, 1), (2, 3)])
def test_fifty_thousand_odd_documents_are_byte_for_byte_megatrons(
    tmp_path: Path, tokenizer: tuple[str, str | None], workers: int, partitions: int
) -> None:
    texts, bad = odd_corpus(tmp_path / "odd.jsonl", 50_000)
    assert max(map(len, texts)) == 1_000_000
    megatron_pair(tmp_path / "megatron", texts, *tokenizer)
    (found,) = write_in_partitions(
        list_inputs([str(tmp_path / "odd.jsonl")]),
        [Output("text", tmp_path / "ours", {"append_eod": True})],
        partitions=partitions,
        settings=settings_for(*tokenizer),
        workers=workers,
        advance=lambda documents, text_bytes, read_bytes: None,
        say=lambda text: None,
        revisions={},
    )
    assert pair_bytes(tmp_path / "ours") == pair_bytes(tmp_path / "megatron")
    assert found.bad_lines == bad


def test_the_manifest_says_what_is_in_the_pair(tmp_path: Path, tokenizers: dict) -> None:
    path, merges = tokenizers["SentencePiece"]
    texts, bad = odd_corpus(tmp_path / "odd.jsonl", 400, long_bytes=0)
    revisions = {str(tmp_path / "odd.jsonl"): ("CC0-1.0", "v3")}
    write_inputs([tmp_path / "odd.jsonl"], tmp_path / "p", settings_for(path, merges), revisions=revisions)
    manifest, model = read_manifest(tmp_path / "p"), load_tokenizer(path)
    pair = open_pair(tmp_path / "p")
    tokens = [token for sequence in pair for token in sequence.tolist()]
    contents = [text.encode("utf-8", "replace") for text in texts]
    assert manifest.tokenizer_fingerprint == model.fingerprint
    assert (manifest.vocabulary, manifest.end_of_document, manifest.end_appended) == (500, 1, True)
    assert (manifest.documents, manifest.tokens) == (len(texts), len(tokens))
    assert manifest.text_bytes == sum(map(len, contents))
    assert manifest.bytes_per_token == manifest.text_bytes / len(tokens)
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    assert math.isclose(manifest.unigram_entropy_nats, -sum(share * math.log(share) for share in shares))
    assert manifest.text_digest == digest_of(contents).hex
    (source,) = manifest.sources
    assert (source.licence, source.revision, source.documents, source.tokens) == (
        *("CC0-1.0", "v3"),
        *(len(texts), len(tokens)),
    )
    listed = [json.loads(line) for line in bad_lines_path(tmp_path / "p").read_text().splitlines()]
    assert Counter(line["kind"] for line in listed) == bad == manifest.bad_lines
    lines = (tmp_path / "odd.jsonl").read_bytes().split(b"\n")
    known = dict(BAD_LINES)
    assert all(known[lines[line["line"] - 1]] == line["kind"] for line in listed)
    text = "".join(model.decode(sequence[:-1].tolist()) for sequence in pair)
    assert text == b"".join(contents).decode()


def test_no_text_becomes_a_control_token(tmp_path: Path, tokenizer: tuple[str, str | None]) -> None:
    odd_corpus(tmp_path / "odd.jsonl", 600, long_bytes=0)
    write_inputs([tmp_path / "odd.jsonl"], tmp_path / "p", settings_for(*tokenizer, append_end=False))
    assert b"endoftext" in (tmp_path / "odd.jsonl").read_bytes()
    end = load_tokenizer(*tokenizer).end_of_document
    assert not any(end in sequence for sequence in open_pair(tmp_path / "p"))


@pytest.mark.parametrize(("line", "kind"), BAD_LINES)
def test_strict_stops_at_the_first_bad_line_with_its_place(
    tmp_path: Path, tokenizers: dict, line: bytes, kind: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 7 + line + b'\n{"text": "fine"}\n' + line + b"\n")
    tokenizer = tokenizers["SentencePiece"]
    manifest = write_inputs([path], tmp_path / "p", settings_for(*tokenizer))
    assert (manifest.documents, manifest.bad_lines) == (8, {kind: 2})
    with pytest.raises(DataError, match=r"a\.jsonl, line 8 "):
        write_inputs([path], tmp_path / "s", settings_for(*tokenizer, strict=True))
    with pytest.raises(DataError, match=r"a\.jsonl, line 8 "):
        write_inputs([path], tmp_path / "s", settings_for(*tokenizer, strict=True), workers=2)
    assert not Path(f"{tmp_path}/s.bin").exists()


def test_strict_partitions_tell_the_first_bad_line_of_the_input(tmp_path: Path, tokenizers: dict) -> None:
    path, good = tmp_path / "a.jsonl", b'{"text": "some text of a line that is none"}\n'
    path.write_bytes(good * 400 + b"no json\n" * 2 + good * 200 + b"no json\n" + good * 300)
    with pytest.raises(DataError, match=r"a\.jsonl, line 401 is no JSON"):
        write_in_partitions(
            list_inputs([str(path)]),
            [Output("text", tmp_path / "p", {"append_eod": True})],
            partitions=2,
            settings=settings_for(*tokenizers["SentencePiece"], strict=True),
            workers=2,
            advance=lambda documents, text_bytes, read_bytes: None,
            say=lambda text: None,
            revisions={},
        )
    assert not Path(f"{tmp_path}/p.bin").exists()


@pytest.mark.parametrize(
    ("told", "expected", "stopped"),
    [
        ([(2, "bad line", "third"), (0, "done", None), (1, "bad line", "second")], "second", [False, True, True]),
        ([(1, "bad line", "second"), (2, "bad line", "third"), (0, "done", None)], "second", [False, True, True]),
        ([(2, "bad line", "third"), (1, "done", None), (0, "done", None)], "third", [False, False, True]),
    ],
)
def test_whatever_partition_is_first_the_first_bad_line_is_told(told: list, expected: str, stopped: list) -> None:
    messages, stops = queue.Queue(), [threading.Event() for _ in range(3)]
    for message in told:
        messages.put(message)
    with pytest.raises(DataError, match=expected):
        partitions._watch(dict.fromkeys(range(3)), messages, stops, advance=None, say=None)
    assert [stop.is_set() for stop in stops] == stopped
    assert messages.empty()


def test_a_line_beyond_the_limit_is_counted_and_memory_stays_bounded(tmp_path: Path, tokenizers: dict) -> None:
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 3_000_000}).encode()
    path.write_bytes(b'{"text": "before"}\n' + long + b'\n{"text": "after"}\n' + long)
    settings = settings_for(*tokenizers["SentencePiece"], longest_bytes=2_500_000)
    manifest = write_inputs([path], tmp_path / "p", settings)
    assert (manifest.documents, manifest.bad_lines) == (2, {"longer than the limit": 2})
    assert [json.loads(line)["line"] for line in bad_lines_path(tmp_path / "p").read_text().splitlines()] == [2, 4]
    whole = write_inputs([path], tmp_path / "q", settings_for(*tokenizers["SentencePiece"]))
    assert (whole.documents, whole.bad_lines) == (4, {})


def test_an_unreadable_file_among_many_is_counted_or_refused(tmp_path: Path, tokenizers: dict) -> None:
    line = b'{"text": "some text of this file"}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line * 1000)[:-20])
    (tmp_path / "c.jsonl.zst").write_bytes(b"no zstandard")
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(line))
    manifest = write_inputs([tmp_path], tmp_path.parent / "p", settings_for(*tokenizers["SentencePiece"]))
    assert manifest.bad_lines == {"unreadable file": 3}
    assert manifest.documents >= 2
    with pytest.raises(DataError, match=r"b\.jsonl\.gz cannot be read .*repair it or leave it out"):
        write_inputs([tmp_path], tmp_path.parent / "q", settings_for(*tokenizers["SentencePiece"], strict=True))


def test_a_folders_files_that_are_no_utf8_are_counted_or_refused(tmp_path: Path, tokenizers: dict) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "a.txt").write_text("a text")
    (inputs / "b.txt").write_bytes("na\u00efve".encode("latin-1"))
    (inputs / "c.txt").write_bytes("text".encode("utf-16"))
    manifest = write_inputs([inputs], tmp_path / "p", settings_for(*tokenizers["SentencePiece"]))
    assert (manifest.documents, manifest.bad_lines) == (1, {"no UTF-8 text": 2})
    listed = [json.loads(line)["file"] for line in bad_lines_path(tmp_path / "p").read_text().splitlines()]
    assert listed == [str(inputs / "b.txt"), str(inputs / "c.txt")]
    with pytest.raises(DataError, match=r"b\.txt is no UTF-8 text"):
        write_inputs([inputs], tmp_path / "q", settings_for(*tokenizers["SentencePiece"], strict=True))


def test_a_long_text_is_whole_or_told_of(tmp_path: Path, tokenizers: dict) -> None:
    (tmp_path / "a.txt").write_text("one line of it\n" * 10_000)
    tokenizer = tokenizers["SentencePiece"]
    manifest = write_inputs([tmp_path / "a.txt"], tmp_path / "p", settings_for(*tokenizer))
    assert (manifest.documents, manifest.bad_lines) == (1, {})
    limited = {"longest_bytes": 100_000}
    manifest = write_inputs([tmp_path / "a.txt"], tmp_path / "p", settings_for(*tokenizer, **limited))
    assert (manifest.documents, manifest.bad_lines) == (2, {"text cut into several": 1})
    with pytest.raises(DataError, match=r"a\.txt is longer than 100000 bytes and became 2 documents"):
        write_inputs([tmp_path / "a.txt"], tmp_path / "q", settings_for(*tokenizer, strict=True, **limited))


def test_a_parquet_file_without_the_column_is_a_counted_bad_file(tmp_path: Path, tokenizers: dict) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name, column in (("a", "text"), ("b", "body"), ("c", "text")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["a text"]}), inputs / f"{name}.parquet")
    manifest = write_inputs([inputs], tmp_path / "p", settings_for(*tokenizers["SentencePiece"]))
    assert (manifest.documents, manifest.bad_lines) == (2, {"missing column": 1})
    with pytest.raises(DataError, match=r"b\.parquet has no column 'text' \(it has: body\)"):
        write_inputs([inputs], tmp_path / "q", settings_for(*tokenizers["SentencePiece"], strict=True))


def test_tables_and_json_trees_are_counted_bad_files(tmp_path: Path, tokenizers: dict) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "b.csv").write_text("text\nno document\n")
    (inputs / "c.json").write_text('[\n{"text": "no line"}\n]\n')
    settings = settings_for(*tokenizers["SentencePiece"])
    with pytest.raises(DataError, match=r"no text: .*left out: 2 unsupported kind; --strict stops at the first"):
        write_inputs([inputs], tmp_path / "p", settings)
    (inputs / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    manifest = write_inputs([inputs], tmp_path / "p", settings)
    assert (manifest.documents, manifest.bad_lines) == (2, {"unsupported kind": 2})
    assert "c.json holds no JSON lines" in bad_lines_path(tmp_path / "p").read_text()
    with pytest.raises(DataError, match=r"b\.csv ends in"):
        write_inputs([inputs], tmp_path / "q", settings_for(*tokenizers["SentencePiece"], strict=True))


def test_a_failed_run_leaves_no_pair_and_an_old_one_as_it_was(tmp_path: Path, tokenizers: dict) -> None:
    settings = settings_for(*tokenizers["SentencePiece"], strict=True)
    empty, good, broken = (tmp_path / name for name in ("empty.jsonl", "good.jsonl", "broken.jsonl"))
    empty.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text"):
        write_inputs([empty], tmp_path / "p", settings)
    assert list(tmp_path.glob("p*")) == []
    good.write_text('{"text": "some text"}\n')
    write_inputs([good], tmp_path / "p", settings)
    old = files_of(tmp_path / "p")
    broken.write_text('{"text": "some text"}\n{"text": 5}\n')
    with pytest.raises(DataError, match="line 2"):
        write_inputs([broken], tmp_path / "p", settings)
    assert files_of(tmp_path / "p") == old
    with pytest.raises(DataError, match="holds no text"):
        write_in_partitions(
            list_inputs([str(empty)]),
            [Output("text", tmp_path / "p", {"append_eod": True})],
            partitions=1,
            settings=settings,
            workers=1,
            advance=lambda documents, text_bytes, read_bytes: None,
            say=lambda text: None,
            revisions={},
        )
    assert files_of(tmp_path / "p") == old


def files_of(prefix: Path) -> dict[str, bytes]:
    """What lies beside a prefix, work folders left out, by name."""
    return {path.name: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}.*") if path.is_file()}


@pytest.mark.parametrize("long", [False, True])
def test_what_waits_does_not_grow_with_the_input(
    tmp_path: Path, tokenizers: dict, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """Where blocks are longer than they are meant to be, one waits beside those that are worked on."""
    monkeypatch.setattr("maha_megatron.data.prepare.blocks.BLOCK_BYTES", 1)
    monkeypatch.setattr(encode, "BLOCK_BYTES", 1 if long else 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "one document"}\n' * 200)
    settings, read, ahead, written = settings_for(*tokenizers["SentencePiece"]), 0, 0, 0
    files = list_inputs([str(tmp_path / "a.jsonl")])

    def blocks(start):
        nonlocal read, ahead
        read = ahead = 0
        for block in read_blocks(files, ["text"], start):
            read += 1
            ahead = max(ahead, read - written)
            yield block

    def advance(spools) -> None:
        nonlocal written
        written = spools[0].documents

    encode.write_pairs(
        blocks,
        [Output("text", tmp_path / "p", {"append_eod": True})],
        settings=settings,
        workers=2,
        advance=advance,
        say=lambda text: None,
        revisions={},
    )
    assert written == 200
    assert ahead == (3 if long else 2 * encode.WAITING_BLOCKS_PER_WORKER)


def test_a_fast_way_that_gives_other_ids_is_not_taken(
    tmp_path: Path, tokenizers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maha_megatron.data.tokenizer import SentencePieceTokenizer

    odd_corpus(tmp_path / "odd.jsonl", 50, long_bytes=0)
    settings, said = settings_for(*tokenizers["SentencePiece"]), []
    write_inputs([tmp_path / "odd.jsonl"], tmp_path / "right", settings, say=said.append)
    assert said == []
    wrong = [np.array([7], dtype=np.int32)]
    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", lambda self, texts: wrong * len(texts))
    write_inputs([tmp_path / "odd.jsonl"], tmp_path / "kept", settings, say=said.append)
    assert pair_bytes(tmp_path / "kept") == pair_bytes(tmp_path / "right")
    assert "the plain one is used" in said[0]


@pytest.mark.parametrize("vocabulary", [2, 500, 65499, 65500, 65535, 65536, 200_000])
def test_the_dtype_is_megatrons_choice(vocabulary: int) -> None:
    assert token_code(vocabulary) == DType.code_from_dtype(DType.optimal_dtype(vocabulary))


def test_digests_join_and_tell_orders_apart() -> None:
    contents = [b"a", b"", b"ab", b"b", b""]
    whole = digest_of(contents)
    for cut in range(len(contents) + 1):
        assert digest_of(contents[:cut]).join(digest_of(contents[cut:])) == whole
    assert parse_digest(whole.hex) == whole
    assert TextDigest().join(whole) == whole
    others = [digest_of(contents[::-1]), digest_of([b"a", b"ab", b"b"]), digest_of([b"aab", b"b"])]
    assert len({whole, *others}) == 4

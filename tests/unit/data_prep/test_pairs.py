"""Tokenised pairs: byte identity, workers, bounds on what waits."""

import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from maha_megatron.data.indexed import IndexedDatasetBuilder, open_indexed
from maha_megatron.data.manifest import manifest_path, read_manifest
from maha_megatron.data.prepare.encode import write_pair
from maha_megatron.data.prepare.tokenizer_training import train_sentencepiece
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError

TEXTS = ["the cat sat on the mat\n" * n for n in range(1, 40)] + ["", "a\tb\r\n\0 😀 </s>", "x"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(train_sentencepiece(TEXTS, vocabulary=300, kind="bpe"))
    return str(path)


def write(prefix: Path, model: str, texts: list[str] = TEXTS, **overrides) -> None:
    options = {"append_end": True, "workers": 1, "arguments": {"a": 1}, "advance": lambda _: None}
    write_pair(iter(texts), prefix, tokenizer_path=model, **(options | overrides))


@pytest.mark.parametrize("append_end", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_pair_is_byte_for_byte_megatrons(
    tmp_path: Path, model: str, append_end: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maha_megatron.data.prepare.encode.BATCH_CHARACTERS", 1000)
    tokenizer = load_tokenizer(model)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=np.uint16)
    for text in TEXTS:  # as in Megatron's tools/preprocess_data.py
        ids = tokenizer.encode(text)
        lengths = [len(ids)] if ids else []
        if ids and append_end:
            ids.append(tokenizer.end_of_document)
            lengths[-1] += 1
        builder.add_document(np.array(ids), lengths)
    builder.finalize(str(tmp_path / "megatron.idx"))
    write(tmp_path / "ours", model, append_end=append_end, workers=workers)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"megatron.{ending}").read_bytes()


def test_the_manifest_says_what_is_in_the_pair(tmp_path: Path, model: str) -> None:
    write(tmp_path / "p", model)
    manifest, tokenizer = read_manifest(tmp_path / "p"), load_tokenizer(model)
    pair = open_indexed(str(tmp_path / "p"))
    tokens = [token for sequence in pair for token in sequence.tolist()]
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert (manifest.vocabulary, manifest.end_of_document, manifest.end_appended) == (300, 1, True)
    assert (manifest.documents, manifest.tokens) == (len(TEXTS), len(tokens))
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.bytes_per_token == manifest.text_bytes / len(tokens)
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    assert math.isclose(manifest.unigram_entropy_nats, -sum(share * math.log(share) for share in shares))
    expected = hashlib.sha256()
    for text in TEXTS:
        expected.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert manifest.sources_sha256 == expected.hexdigest()
    assert manifest.arguments == {"a": 1}
    assert "".join(tokenizer.decode(sequence[:-1].tolist()) for sequence in pair) == "".join(TEXTS)


def test_a_text_with_a_broken_character_is_kept(tmp_path: Path, model: str) -> None:
    write(tmp_path / "p", model, ["half \ud83d emoji"])
    pair = open_indexed(str(tmp_path / "p"))
    assert load_tokenizer(model).decode(pair[0][:-1].tolist()) == "half ? emoji"


def test_a_failed_run_leaves_no_pair_and_no_manifest(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataError, match="holds no text"):
        write(tmp_path / "p", model, ["", ""])
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "p", model)
    old = (tmp_path / "p.bin").read_bytes()

    def breaks() -> list[str]:
        yield "some text"
        raise DataError("the input is broken")

    with pytest.raises(DataError, match="the input is broken"):
        write(tmp_path / "p", model, breaks())
    assert (tmp_path / "p.bin").read_bytes() == old
    assert not manifest_path(tmp_path / "p").exists()  # so the next run does not take the old pair for the new


def test_readers_do_not_run_ahead_of_the_writer(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maha_megatron.data.prepare.encode.BATCH_CHARACTERS", 1)
    read = written = ahead = 0

    def texts() -> list[str]:
        nonlocal read, ahead
        for _ in range(200):
            read += 1
            ahead = max(ahead, read - written)
            yield "one document"

    def advance(_: int) -> None:
        nonlocal written
        written += 1

    write(tmp_path / "p", model, texts(), workers=2, advance=advance)
    assert written == 200
    assert ahead <= 2 * 4 + 3  # what may wait, and the ones in hand on both sides

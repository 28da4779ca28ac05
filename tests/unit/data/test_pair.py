import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from maha_megatron.data.checksums import file_sha256, read_checksums
from maha_megatron.data.manifest import manifest_path, read_manifest
from maha_megatron.data.pair import open_pair
from maha_megatron.data.prepare.pairs import merge_pairs, split_pair
from maha_megatron.errors import DataError
from tests.support.corpora import odd_corpus, sentencepiece_model, settings_for, write_inputs
from tests.support.pairs import random_documents

DOCUMENTS = 1500


@pytest.fixture
def prefix(write_pair: Callable[..., str]) -> str:
    return write_pair("corpus_text_document", random_documents(5), manifest=False)


def edit(path: str, change: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


def test_a_pair_of_other_tools_opens_unchanged(prefix: str) -> None:
    assert [document.tolist() for document in open_pair(prefix)] == random_documents(5)


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        ("bin", lambda content: content[:-2], r"bytes where its index .* expects .*cut off"),
        ("bin", lambda content: content + b"xx", r"bytes where its index .* expects .*belongs to another index"),
        ("bin", lambda content: b"", r"has 0 bytes where its index"),
        ("idx", lambda content: b"", r"empty or cut off \(0 bytes\)"),
        ("idx", lambda content: content[:20], r"empty or cut off \(20 bytes\)"),
        ("idx", lambda content: content[:-8], r"where its header announces .*cut off"),
        ("idx", lambda content: b"GARBAGE!!" + content[9:], r"is no Megatron index"),
        ("idx", lambda content: content[:17] + b"\x06" + content[18:], r"dtype code 6, which are no token ids"),
        ("idx", lambda content: content[:-8] + bytes(8), r"damaged"),
    ],
)
def test_a_damaged_pair_is_refused(prefix: str, ending: str, change: Callable[[bytes], bytes], message: str) -> None:
    edit(f"{prefix}.{ending}", change)
    with pytest.raises(DataError, match=message) as caught:
        open_pair(prefix)
    assert "data_prep/preprocess.py" in str(caught.value)


def test_a_pair_without_tokens_is_refused(write_pair: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="holds no tokens: the corpus it was made from was empty"):
        open_pair(write_pair("empty", []))


def test_a_pair_of_empty_documents_is_told_from_one_without(write_pair: Callable[..., str]) -> None:
    prefix = write_pair("empty", [[]] * 3, manifest=False)
    with pytest.raises(DataError, match=r"its 3 documents are empty, .*: leave the pair out$"):
        open_pair(prefix)


def test_a_missing_pair_says_what_is_near(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean .*corpus_text_document\?"):
        open_pair(str(tmp_path / "corpus"))
    with pytest.raises(DataError, match=r"without its ending; write .*corpus_text_document$"):
        open_pair(f"{prefix}.bin")
    with pytest.raises(DataError, match=r"make it with data_prep/preprocess\.py"):
        open_pair(str(tmp_path / "elsewhere"))
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"\.bin does not exist"):
        open_pair(prefix)


# ---------------------------------------------------------------------------------------------------------- checksums


@pytest.fixture
def described(tmp_path: Path) -> str:
    """A pair of some checksum chunks as data_prep/preprocess.py leaves it."""
    odd_corpus(tmp_path / "odd.jsonl", DOCUMENTS, long_bytes=120_000)
    write_inputs([tmp_path / "odd.jsonl"], tmp_path / "p", settings_for(sentencepiece_model(tmp_path / "small.model")))
    return str(tmp_path / "p")


def read_all(prefix: str) -> list[list[int]]:
    pair = open_pair(prefix)
    return [pair.document(number).tolist() for number in range(pair.documents)]


def merge_all(prefix: str) -> None:
    merge_pairs([Path(prefix)], Path(f"{prefix}-merged"), arguments={}, advance=lambda num_bytes: None)


def split_all(prefix: str) -> None:
    outputs = [(Path(f"{prefix}-first"), DOCUMENTS - 100), (Path(f"{prefix}-second"), 100)]
    split_pair(Path(prefix), outputs, arguments={}, advance=lambda num_bytes: None)


def corrupted(content: bytes, kind: int, random: np.random.Generator) -> bytes:
    """Flipped bits, overwritten stretches, cuts, additions and exchanged pieces."""
    changed, place = bytearray(content), int(random.integers(len(content)))
    match kind:
        case 0:
            changed[place] ^= 1 << int(random.integers(8))
        case 1:
            changed[place : place + 50] = random.bytes(len(changed[place : place + 50]))
        case 2:
            del changed[place:]
        case 3:
            changed += random.bytes(int(random.integers(1, 100)))
        case 4:
            other = int(random.integers(len(content)))
            changed[place], changed[other] = changed[other], changed[place]
    return bytes(changed)


@pytest.mark.parametrize("use", [read_all, merge_all, split_all])
def test_200_random_corruptions_none_of_which_is_used_silently(described: str, use: Callable[[str], object]) -> None:
    """Of every file but the manifest. A merge or split would give the damage a manifest of its own."""
    random = np.random.default_rng(0)
    whole = read_all(described)
    assert read_checksums(described, read_manifest(described).checksums_sha256)[0].size >= 3
    for number in range(200):
        path = Path(f"{described}.{('bin', 'idx', 'checksums.npz')[number % 3]}")
        content = path.read_bytes()
        changed = corrupted(content, number % 5, random)
        path.write_bytes(changed)
        try:
            use(described)
            refused = False
        except DataError:
            refused = True
        assert refused or changed == content, (number, path.suffix)
        path.write_bytes(content)
    assert read_all(described) == whole


def test_what_is_merged_or_split_has_a_manifest_and_checksums_of_its_own(described: str) -> None:
    merge_all(described)
    split_all(described)
    for name in ("merged", "first", "second"):
        pair, manifest = open_pair(f"{described}-{name}"), read_manifest(f"{described}-{name}")
        pair.check_all()
        tokens = pair.read(0, pair.index.tokens)
        counts = read_checksums(f"{described}-{name}", manifest.checksums_sha256)[1]
        assert np.array_equal(counts, np.bincount(tokens, minlength=manifest.vocabulary))
        assert (manifest.documents, manifest.tokens) == (pair.documents, tokens.size)


def test_foreign_ids_without_checksums_are_not_counted(described: str) -> None:
    tree = json.loads(manifest_path(described).read_text()) | {"checksums_sha256": ""}
    manifest_path(described).write_text(json.dumps(tree))
    edit(f"{described}.bin", lambda content: b"\xff\xff" + content[2:])
    for use in (merge_all, split_all):
        with pytest.raises(DataError, match="holds token ids that are none of the 500 of its manifest"):
            use(described)


def test_only_what_is_read_is_checked_and_every_read_is(described: str) -> None:
    whole, pair = read_all(described), open_pair(described)
    content = bytearray(Path(f"{described}.bin").read_bytes())
    content[-1] ^= 1
    Path(f"{described}.bin").write_bytes(content)
    pair = open_pair(described)
    last = pair.documents - 1
    assert pair.document(0).tolist() == whole[0]  # far from the damage
    while not whole[last]:
        last -= 1
    with pytest.raises(DataError, match=r"p\.bin is damaged between byte \d+ and \d+"):
        pair.document(last)
    with pytest.raises(DataError, match="is damaged between"):
        pair.check_all()


def test_checksums_of_the_first_kind_are_by_64_kib(described: str) -> None:
    manifest, content = read_manifest(described), Path(f"{described}.bin").read_bytes()
    _, counts, size = read_checksums(described, manifest.checksums_sha256)
    assert size == 1 << 14
    chunks = [content[at : at + (1 << 16)] for at in range(0, len(content), 1 << 16)]
    np.savez(f"{described}.checksums.npz", crc32=np.uint32([zlib.crc32(chunk) for chunk in chunks]), counts=counts)
    tree = json.loads(manifest_path(described).read_text())
    tree["checksums_sha256"] = file_sha256(Path(f"{described}.checksums.npz"))
    manifest_path(described).write_text(json.dumps(tree))
    open_pair(described).check_all()
    edit(f"{described}.bin", lambda content: content[:70_000] + b"~~" + content[70_002:])
    with pytest.raises(DataError, match="is damaged between byte 65536 and 131072"):
        open_pair(described).check_all()


def test_files_of_two_makings_are_refused(described: str, tmp_path: Path) -> None:
    odd_corpus(tmp_path / "other.jsonl", 1500, seed=5, long_bytes=120_000)
    write_inputs([tmp_path / "other.jsonl"], tmp_path / "q", settings_for(str(tmp_path / "small.model")))
    for ending in ("bin", "idx"):
        (tmp_path / f"p.{ending}").write_bytes((tmp_path / f"q.{ending}").read_bytes())
    with pytest.raises(DataError, match=r"not of one making|its content is not what its manifest says"):
        open_pair(described)
    Path(f"{described}.checksums.npz").unlink()
    with pytest.raises(DataError, match=r"not of one making|content is not what|copy it too"):
        open_pair(described)


def test_a_manifest_of_the_first_format_opens_unchecked(described: str) -> None:
    tree = json.loads(manifest_path(described).read_text())
    for key in ("sources", "bad_lines", "index_sha256", "checksums_sha256"):
        del tree[key]
    tree |= {"format": 1, "sources_sha256": "abc"}
    del tree["text_digest"]
    manifest_path(described).write_text(json.dumps(tree))
    Path(f"{described}.checksums.npz").unlink()
    assert read_manifest(described).text_digest == "abc"
    pair = open_pair(described)
    assert pair.document(0).size
    with pytest.raises(DataError, match="has no checksums"):
        pair.check_all()

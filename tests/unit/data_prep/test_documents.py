import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from maha_megatron.data.prepare.blocks import LONGEST_BYTES, read_blocks
from maha_megatron.data.prepare.documents import BadLine, Document, LeftOut, documents_of, read_documents
from maha_megatron.data.prepare.inputs import divide, list_inputs
from maha_megatron.data.prepare.stage import input_identity
from maha_megatron.errors import DataError

TEXTS = ["first\nwith lines\r\n", "", "ünï\tcödé 😀", "\0 </s>"]


def lines(key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in TEXTS).encode()


def texts_of(path: Path, **options) -> list[str]:
    return [document.text for document in read_documents([str(path)], **options)]


CONTAINERS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.json", "a.json.gz", "A.JSONL", "A.Parquet"]


@pytest.mark.parametrize("name", [*CONTAINERS, "A.JSONL.GZ", "a.ndjson.ZST", "a.NDJSON"])
def test_every_container_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(lines()))
    elif name.lower().endswith(".zst"):  # two frames, as parallel writers leave them
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines()[:30]) + compress(lines()[30:]))
    elif name.lower().endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3, 4]}), path)
    else:
        path.write_bytes(lines())
    assert texts_of(path) == TEXTS


def test_another_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("content"))
    assert texts_of(tmp_path / "a.jsonl", key="content") == TEXTS
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 has no field 'text' \(it has: content\).*--json-keys"):
        texts_of(tmp_path / "a.jsonl")


def test_a_folder_is_read_sorted_with_its_text_files_only(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "b.txt").write_text("bee\n", newline="")
    (tmp_path / "sub" / "a.c").write_text("int a;\r\n", newline="")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "nul.dat").write_bytes(b"text\0text")
    (tmp_path / "c.jsonl").write_bytes(lines())
    left_out = LeftOut()
    assert texts_of(tmp_path, left_out=left_out) == ["bee\n", *TEXTS, "int a;\r\n"]
    assert left_out.kinds == {"no UTF-8 text": 2}
    with pytest.raises(DataError, match=r"image\.png is no UTF-8 text"):
        texts_of(tmp_path)
    assert list(read_documents([str(tmp_path)], suffixes=[".c"])) == [
        Document("int a;\r\n", str(tmp_path / "sub" / "a.c"))
    ]
    with pytest.raises(DataError, match=r"holds no file ending in"):
        texts_of(tmp_path, suffixes=[".rs"])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_file_that_breaks_off_gives_its_whole_lines_and_is_told(tmp_path: Path, name: str) -> None:
    """However much of it is there; a text that broke off is no document."""
    random, path = np.random.default_rng(0), tmp_path / name
    texts = [random.bytes(60).hex() for _ in range(400)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    compress = gzip.compress if name.endswith("gz") else zstandard.ZstdCompressor().compress
    whole = compress(content[:30_000]) + compress(content[30_000:])
    first_part = len(compress(content[:30_000]))
    counts = []
    for size in (*range(1, len(whole), len(whole) // 20), first_part + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        found, bad = documents_in(path, LONGEST_BYTES)
        assert [line.kind for line in bad] == ["unreadable file"], size
        assert "cannot be read after" in bad[0].detail
        assert found == texts[: len(found)]
        counts.append(len(found))
    if ".jsonl" in name:
        assert counts[-1] >= (399 if name.endswith("gz") else 222)  # a block of .zst is there whole or not at all
        assert counts[-2] >= 30_000 // 135
    else:
        assert set(counts) == {0}


def test_a_failed_checksum_is_no_cut_off(tmp_path: Path) -> None:
    """What was decompressed before it showed is wrong, and is in the pair by then."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(), 0).replace(b"first", b"worst"))
    found, bad = documents_in(path, LONGEST_BYTES)
    assert found == [TEXTS[0].replace("first", "worst"), *TEXTS[1:]]
    assert [line.kind for line in bad] == ["damaged file whose documents may be wrong"]
    assert "is damaged, and the 4 lines or rows that it gave may be wrong (CRC check failed" in bad[0].detail
    with pytest.raises(DataError, match=r"is damaged.*: replace it"):
        texts_of(path, left_out=LeftOut())


def test_the_limit_of_a_line_does_not_depend_on_where_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sizes = tmp_path / "a.jsonl", [20, 99, 100, 101, 250, 100, 3, 101, 99, 500, 100, 101]
    written = [json.dumps({"text": "x" * (size - len('{"text": ""}'))}) if size > 20 else " " * size for size in sizes]
    written[2] = written[2][:-3] + '"}\r'
    written.insert(4, " " * 101)
    path.write_text("\n".join(written), newline="")
    seen = []
    for block_bytes in (1, 97, 100, 101, 350, 1 << 20):
        monkeypatch.setattr("maha_megatron.data.prepare.blocks.BLOCK_BYTES", block_bytes)
        found: list = []
        for block in read_blocks(list_inputs([str(path)]), ["text"], longest_bytes=100):
            found += documents_of(block, "text", longest_bytes=100, on_bad=found.append)
        seen.append(sorted(found, key=repr))
    assert seen.count(seen[0]) == len(seen)
    assert [line.line for line in seen[0] if isinstance(line, BadLine)] == [11, 13, 4, 5, 6, 9]
    assert len(seen[0]) == 6 + 5


def test_linked_folders_are_read_once_and_what_cannot_be_opened_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere, scan = tmp_path / "in", tmp_path / "elsewhere", os.scandir
    for path in (folder / "closed", elsewhere):
        path.mkdir(parents=True)
    (elsewhere / "a.txt").write_text("a text")
    (elsewhere / "back").symlink_to(folder)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "round").symlink_to(folder / "round")

    def scandir(path: str):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found, bad = documents_in(folder, LONGEST_BYTES)
    assert found == ["a text"]
    assert [(Path(line.file).name, line.kind) for line in bad] == [
        (name, "link or folder that cannot be opened") for name in ("closed", "gone.txt", "round")
    ]
    assert str(bad[0]).startswith(f"{folder / 'closed'} is a folder that cannot be listed (Permission denied)")
    left_out = LeftOut()
    assert texts_of(folder, left_out=left_out) == ["a text"]
    assert left_out.kinds.total() == 3
    assert [size for _, size, _ in input_identity([str(folder)])] == [0, 0, 6, 0]
    assert sum(map(len, divide(list_inputs([str(folder)]), 3))) == 4
    with pytest.raises(DataError, match=r"closed is a folder that cannot be listed"):
        texts_of(folder)


def test_tables_and_archives_in_a_folder_are_counted_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.csv").write_text("text\nno document\n")
    (tmp_path / "c.json").write_text('{\n  "name": "a package"\n}\n')
    left_out = LeftOut()
    assert texts_of(tmp_path, left_out=left_out) == ["a text"]
    assert left_out.kinds == {"unsupported kind": 2}
    assert "b.csv ends in .csv" in str(left_out)
    with pytest.raises(DataError, match=r"b\.csv ends in"):
        texts_of(tmp_path)
    with pytest.raises(DataError, match=r"b\.csv ends in"):
        texts_of(tmp_path / "b.csv", left_out=left_out)  # named by the user


@pytest.mark.parametrize("line", ["a line of text\n", "\u6f22\u5b57\n", "\u6f22", "x"])
def test_a_text_beyond_the_limit_is_cut_and_told(tmp_path: Path, line: str) -> None:
    text, limit = line * 1000, 500
    (tmp_path / "long.txt").write_text(text)
    pieces, bad = documents_in(tmp_path / "long.txt", limit)
    assert "".join(pieces) == text
    assert all(limit - 20 < len(piece.encode()) <= limit for piece in pieces[:-1])
    assert all(piece.endswith("\n") for piece in pieces if "\n" in line)
    assert [line.kind for line in bad] == ["text cut into several"]
    assert f"long.txt is longer than 500 bytes and became {len(pieces)} documents" in bad[0].detail
    assert documents_in(tmp_path / "long.txt", len(text.encode())) == ([text], [])
    left_out = LeftOut()
    assert texts_of(tmp_path / "long.txt", left_out=left_out) == [text]
    assert not left_out.kinds


def documents_in(path: Path, longest_bytes: int) -> tuple[list[str], list[BadLine]]:
    texts, bad = [], []
    for block in read_blocks(list_inputs([str(path)]), ["text"], longest_bytes=longest_bytes):
        texts += [d.text for d in documents_of(block, "text", longest_bytes=longest_bytes, on_bad=bad.append)]
    return texts, bad


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"line 2 is no JSON"),
        ("a.jsonl", b'["text"]\n', r"line 1 has no field 'text' \(it has: list\)"),
        ("a.jsonl", b'{"text": 5}\n', r"field 'text' is no text but int"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n')[:-9], r"cannot be read.*repair it"),
        ("a.jsonl.zst", b"no zstandard", r"cannot be read.*repair it"),
        ("a.txt", b"\xff\xfe latin", r"a\.txt is no UTF-8 text: .*leave it out"),
        ("a.txt", b"text " * 2000 + b"\xff", r"a\.txt is no UTF-8 text: .*byte 0xff in position"),
        ("a.parquet", b"no parquet", r"is no parquet file"),
        ("a.json", b'[\n{"text": "ok"}\n]\n', r"a\.json holds no JSON lines: write it as \.jsonl"),
        ("a.json", b'[{"text": "ok"}]', r"holds no JSON lines"),
        ("a.csv", b"text\nok\n", r"a\.csv ends in \.csv, which is not read: turn it into"),
        ("A.TSV.gz", gzip.compress(b"text\nok\n"), r"ends in \.tsv, which is not read"),
    ],
)
def test_damaged_inputs_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / name)


def test_a_parquet_file_without_the_column_lists_its_own(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' \(it has: body\)"):
        texts_of(tmp_path / "a.parquet")


def test_parquet_is_read_in_bounded_blocks_from_any_of_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maha_megatron.data.prepare.blocks.BLOCK_BYTES", 1000)
    texts = [
        *("x" * size for size in range(100)),
        None,
        "y" * 2000,
        "\u6f22" * 600,
        *("z" * size for size in range(400)),
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=150)
    files, bad = list_inputs([str(path)]), []
    blocks = list(read_blocks(files, ["text"], longest_bytes=1500))
    found = [d.text for b in blocks for d in documents_of(b, "text", longest_bytes=1500, on_bad=bad.append)]
    assert found.count("") == 2
    assert [text for text in found if text] == [text for text in texts if text and len(text.encode()) <= 1500]
    assert [(line.line, line.kind) for line in bad] == [
        (101, "wrong type"),
        (102, "longer than the limit"),
        (103, "longer than the limit"),
    ]
    assert len(blocks) > 50
    assert max(sum(len(text) for text in block.columns["text"] if isinstance(text, str)) for block in blocks) < 1400
    for number in range(0, len(blocks), 7):
        assert list(read_blocks(files, ["text"], blocks[number].end, longest_bytes=1500)) == blocks[number + 1 :]


def test_parquet_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = np.random.default_rng(0).bytes(400).hex()
    rows = pyarrow.table({"text": [f"{number} {text}" for number in range(30_000)]})  # 24 MB
    pyarrow.parquet.write_table(rows, path, row_group_size=30_000, compression="none", use_dictionary=False)
    del rows
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for block in read_blocks(list_inputs([str(path)]), ["text"]):
        assert block.columns
        most = max(most, pool.bytes_allocated() - before)
    assert most < 8_000_000


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input .*nothing does not exist"):
        texts_of(tmp_path / "nothing")

"""Several pairs from one reading: each is what its key gives alone, also where a run was killed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.data.prepare import spool
from maha_megatron.data.prepare.blocks import BEGINNING, Block, Position, read_blocks
from maha_megatron.data.prepare.encode import Output, write_pairs
from maha_megatron.data.prepare.inputs import list_inputs
from maha_megatron.data.prepare.partitions import write_in_partitions
from maha_megatron.data.prepare.spool import bad_lines_path
from maha_megatron.errors import DataError
from tests.support.corpora import pair_bytes, plain_text, sentencepiece_model, settings_for

QUIET = {"workers": 1, "advance": lambda *progress: None, "say": lambda text: None, "revisions": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sentencepiece_model(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JSON lines, a parquet file with both columns and one without the second, and a text; many blocks."""
    monkeypatch.setattr("maha_megatron.data.prepare.blocks.BLOCK_BYTES", 4000)
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [{"text": plain_text(20, n), "body": plain_text(9, n + 1)} for n in range(100)]
    del rows[7]["body"], rows[8]["text"]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {key: [row.get(key) for row in rows] for key in ("text", "body")}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": columns["text"]}), folder / "c.parquet")
    (folder / "d.txt").write_text("a text")
    return folder


def write(inputs: Path, folder: Path, model: str, *keys: str, **changes) -> tuple[list[Manifest], list[Position]]:
    """Manifests, and where reading began each time."""
    files, began = list_inputs([str(inputs)]), []

    def blocks(start: Position) -> Iterator[Block]:
        began.append(start)
        return read_blocks(files, keys, start)

    outputs = [Output(key, folder / key, {"append_eod": True, "key": key}) for key in keys]
    return write_pairs(blocks, outputs, **({"settings": settings_for(model)} | QUIET | changes)), began


def test_all_keys_are_read_at_once_and_each_pair_is_as_if_alone(tmp_path: Path, inputs: Path, model: str) -> None:
    alone = [write(inputs, tmp_path / "alone", model, key)[0][0] for key in ("text", "body")]
    together, began = write(inputs, tmp_path / "both", model, "text", "body")
    assert began == [BEGINNING, BEGINNING]  # to prove the fast way, and to read
    assert together == alone
    assert [manifest.bad_lines for manifest in together] == [
        {"missing field": 1, "wrong type": 2},
        {"missing field": 1, "wrong type": 1, "missing column": 1},
    ]
    for key in ("text", "body"):
        assert pair_bytes(tmp_path / "both" / key) == pair_bytes(tmp_path / "alone" / key)
        assert (
            bad_lines_path(tmp_path / "both" / key).read_bytes()
            == bad_lines_path(tmp_path / "alone" / key).read_bytes()
        )
    outputs = [Output(key, tmp_path / "parts" / key, {"append_eod": True, "key": key}) for key in ("text", "body")]
    parts = write_in_partitions(
        list_inputs([str(inputs)]), outputs, partitions=2, settings=settings_for(model), **QUIET
    )
    assert parts == together


def test_pairs_that_were_killed_at_different_places_go_on(
    tmp_path: Path, inputs: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "COMMIT_INTERVAL_S", -1.0)
    expected, _ = write(inputs, tmp_path / "straight", model, "text", "body")

    def die_after(documents: int):
        def die(spools) -> None:
            if spools[0].documents >= documents:
                raise KeyboardInterrupt

        return die

    lines = {"text": 90, "body": 40}  # of the first file, whose blocks end in the same places for all keys
    for key, documents in lines.items():
        with pytest.raises(KeyboardInterrupt):
            write(inputs, tmp_path / "p", model, key, advance=die_after(documents))
    found, began = write(inputs, tmp_path / "p", model, "text", "body")
    assert began[1] > BEGINNING
    assert found == expected
    with pytest.raises(KeyboardInterrupt):
        write(inputs, tmp_path / "q", model, "text", advance=die_after(180))  # in the second file, of rows
    with pytest.raises(DataError, match=r"text was begun with other --json-keys .* run the same command again"):
        write(inputs, tmp_path / "q", model, "text", "body")
    assert write(inputs, tmp_path / "q", model, "text", "body")[0] == expected


def test_partitions_too_write_what_has_text_and_name_what_has_none(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n' * 50)
    (tmp_path / "p").mkdir()
    outputs = [Output(key, tmp_path / "p" / key, {"append_eod": True}) for key in ("none", "text")]
    with pytest.raises(DataError, match=r"none: the input holds no text.*left out: 100 missing field"):
        write_in_partitions(
            list_inputs([str(tmp_path / "a.jsonl")]), outputs, partitions=2, settings=settings_for(model), **QUIET
        )
    assert read_manifest(tmp_path / "p" / "text").documents == 100
    assert sorted(path.name for path in (tmp_path / "p").iterdir() if not path.name.startswith("text.")) == []


def test_a_key_without_text_is_named_and_the_others_are_written(tmp_path: Path, inputs: Path, model: str) -> None:
    (inputs / "d.txt").unlink()
    with pytest.raises(
        DataError, match=r"none: the input holds no text.*\(left out: 2 missing column, 100 missing field"
    ):
        write(inputs, tmp_path / "p", model, "none", "text")
    assert read_manifest(tmp_path / "p" / "text").documents == 297
    assert not list((tmp_path / "p").glob("none*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_tells_the_first_bad_line_under_any_key(tmp_path: Path, model: str, workers: int) -> None:
    rows = [{"text": "a", "body": "b"}] * 3 + [{"text": "a"}, {"body": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl, line 4 has no field 'body'"):
        write(
            tmp_path, tmp_path / "p", model, "text", "body", workers=workers, settings=settings_for(model, strict=True)
        )

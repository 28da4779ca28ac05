"""Result files hold what it takes to read and repeat a measurement."""

import json
import sys
from pathlib import Path

import pytest

from maha_megatron.train.result_files import hardware, markdown_table, write_result


def test_a_table_rounds_floats_only() -> None:
    assert markdown_table(["a", "b"], [[1.23456, "x"], [123456, 2]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1.235 | x |",
        "| 123456 | 2 |",
    ]


def test_both_files_say_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/speed.py", "--set", "a b"])
    text_path, data_path = write_result(tmp_path / "results", "speed", text="\n| a |\n", data={"rows": [1, 2]})
    data, text = json.loads(data_path.read_text()), text_path.read_text()
    assert (data["tool"], data["rows"], data["hardware"]) == ("speed", [1, 2], hardware())
    assert data["command"] == "python tools/speed.py --set 'a b'"
    assert "torch" in data["versions"]
    assert text.startswith("# speed\n\n- date: ")
    assert "- again: `python tools/speed.py --set 'a b'`" in text
    assert text.endswith("\n| a |\n")
    assert text_path.stem == data_path.stem
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [".json", ".md"]


def test_a_second_result_of_a_day_stands_beside_the_first(tmp_path: Path) -> None:
    written = [write_result(tmp_path, "speed", text=f"run {run}", data={"run": run}) for run in (1, 2, 3)]
    stem = written[0][0].stem
    assert [path.stem for paths in written for path in paths] == [stem] * 2 + [f"{stem}-2"] * 2 + [f"{stem}-3"] * 2
    for run, (text_path, data_path) in enumerate(written, start=1):
        assert json.loads(data_path.read_text())["run"] == run
        assert text_path.read_text().endswith(f"run {run}\n")
    written[1][1].unlink()  # half of a result is one still
    assert write_result(tmp_path, "speed", text="", data={})[0].stem == f"{stem}-4"
    assert written[1][0].read_text().endswith("run 2\n")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_result(tmp_path, "speed", text="", data={"run": object()})
    assert list(tmp_path.iterdir()) == []

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

"""tools/evaluate.py on a run that was trained a little: its figures, its files, its errors."""

import json
from pathlib import Path

import pytest

from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.runs import corpus, forked, forked_pretrain, write_config  # noqa: F401 (corpus: a fixture)

SCRIPT = "tools/evaluate.py"
SHORT = ("--needles", 3, "--queries", 12, "--pairs", 6)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    forked_pretrain(write_config(corpus, folder / "tiny.yaml", folder / "run"), "train.steps=2")
    return folder / "run"


def record(folder: Path) -> dict:
    (path,) = folder.glob("evaluate_*.json")
    return json.loads(path.read_text())


def test_a_trained_run(trained: Path, tmp_path: Path) -> None:
    output = forked(SCRIPT, "--run", trained, *SHORT)
    first = record(trained / "evaluation" / "step_00000002")
    row = read_rows(trained / METRICS)[-1]
    assert first["position"]["overall"]["mean"] == pytest.approx(row["validation_loss_nats"], rel=1e-5)
    assert first["bits_per_byte"] == pytest.approx(row["validation_bits_per_byte"], rel=1e-5)
    assert f"{row['validation_loss_nats']:.4f} ± " in output
    assert first["settings"]["sequence_tokens"] == 64
    assert [needle["distance"] for needle in first["needle"]] == first["settings"]["distances"]
    assert (first["needle"][0]["whole_value"]["count"], first["needle_texts"]) == (3, 3)
    assert [pair["last_distance"] for pair in first["pairs"]] == [2, 4, 8, 12]
    assert all(f"{part}: 100%" in output for part in ("loss by position", "needles", "pairs"))
    (written,) = (trained / "evaluation" / "step_00000002").glob("evaluate_*.md")
    tables = [line for line in output.splitlines() if line.startswith("|")]
    assert tables
    assert set(tables) <= set(written.read_text().splitlines())

    forked(SCRIPT, "--run", trained, *SHORT, "--results", tmp_path)
    again = record(tmp_path)
    assert {key: again[key] for key in ("position", "needle", "pairs")} == {
        key: first[key] for key in ("position", "needle", "pairs")
    }


def test_parts_lengths_and_data_may_be_chosen(trained: Path, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    shape = ("--sequence", 150, "--needles", 2, "--distances", 100, 20, "--queries", 0, "--samples", 0)
    data = ("--data", corpus / "text_text_document")
    output = forked(SCRIPT, "--run", trained, *shape, *data, "--results", tmp_path)
    found = record(tmp_path)
    assert [needle["distance"] for needle in found["needle"]] == [20, 100]
    assert found["position"] is found["pairs"] is found["bits_per_byte"] is None
    assert found["settings"]["data"] == str(data[1])
    assert "## Loss by position" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", 7), "no checkpoint of step 7; there are: 2"),
        (("--distances", 64), "--distances 64 is beyond the sequence: with --sequence 64 at most"),
        (("--data", "nowhere", "--needles", 0), "nowhere.bin does not exist"),
        (("--samples", 0, "--needles", 0, "--queries", 0), "nothing would be measured"),
        (("--needles", -1), "--needles -1: needs at least 0"),
        (("--batch-tokens", 0), "--batch-tokens needs at least 1"),
        (("--needles", 0, "--distances", 128), "--distances has no effect with --needles 0: remove it"),
        (("--queries", 0, "--pairs", 8), "--pairs has no effect with --queries 0: remove it"),
        (("--needles", 0, "--queries", 0, "--seed", 1), "--seed has no effect with --needles 0 and --queries 0"),
    ],
)
def test_errors_are_one_line(trained: Path, arguments: tuple, message: str) -> None:
    output = forked(SCRIPT, "--run", trained, *arguments, expected=2)
    assert message in output
    assert "Traceback" not in output


def test_missing_runs_and_data_are_told(trained: Path, tmp_path: Path) -> None:
    output = forked(SCRIPT, "--run", tmp_path, expected=2)
    assert "has no checkpoint" in output
    output = forked(SCRIPT, "--run", trained, "--sequence", 1_000_000, expected=2)
    assert "name other validation data by --data PREFIX" in output
    assert "Traceback" not in output

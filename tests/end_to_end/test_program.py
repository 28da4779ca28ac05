"""A stated program from the command line: trained and sampled with --allow-program, refused without, never imported."""

from pathlib import Path

import pytest

from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.runs import (
    corpus,  # noqa: F401 (a fixture)
    launcher,
    tool,
    write_config,
)

NAME = "my_program:build"
PROGRAM = """
from pathlib import Path
Path({note!r}).write_text("imported")
from configs.programs.budget import build
"""


@pytest.fixture
def config(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """5 steps of one sample of 64 tokens, with a program of the user's own in a folder on PYTHONPATH."""
    (tmp_path / "my_program.py").write_text(PROGRAM.format(note=str(tmp_path / "note")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = write_config(corpus, tmp_path / "tiny.yaml", tmp_path / "run")
    text = path.read_text().replace("maha: {", f"maha: {{aggregation: program, program: '{NAME}', ")
    text = text.replace("steps: 10, global_batch_samples: 8, micro_batch_samples: 2", "steps: 5, ")
    text = text.replace("train: {steps: 5, ,", "train: {steps: 5, global_batch_samples: 1, micro_batch_samples: 1,")
    path.write_text(text)
    return path

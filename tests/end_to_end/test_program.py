"""A stated program from the command line: trained and sampled with --allow-program, refused without, never imported."""

import re
from pathlib import Path

import pytest

from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.runs import (
    ROOT,
    corpus,  # noqa: F401 (a fixture)
    forked,
    forked_pretrain,
    pretrain,
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


def run(config: Path, *words: str, kind: str = "python", ranks: int = 1) -> tuple[int, str]:
    return pretrain(config, *words, kind=kind, ranks=ranks, extra=("--allow-program", NAME))


@pytest.mark.full
def test_a_program_trains_and_samples_where_the_command_line_allows_it(config: Path, tmp_path: Path) -> None:
    code, output = run(config)
    assert code == 0, output
    rows = read_rows(tmp_path / "run" / METRICS)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss_nats"] < rows[0]["loss_nats"]
    assert rows[0]["missed_solves"] == 0
    assert "solver_steps_mean" not in rows[0]
    assert 0 < rows[0]["solver_residual_max"] < 1e-6
    weights = [rows[0][f"scale_weight/layer_00/scale_{scale}"] for scale in range(3)]
    assert weights[0] + weights[1] / 4 + weights[2] / 16 < 0.65, "the budget is 0.6 but for a document's first row"
    assert "warning" not in output
    (tmp_path / "note").unlink()
    command = ("tools/generate.py", "--run", tmp_path / "run", "--prompt", "def", "--tokens", 2)
    assert f"{NAME} is code that would run here" in forked(*command, expected=2)
    assert "is not what maha.program names" in forked(*command, "--allow-program", "other:build", expected=2)
    assert not (tmp_path / "note").exists(), "a checkpoint alone made it run"
    assert tool(*command, "--allow-program", NAME).startswith("def")


@pytest.mark.parametrize(("kind", "ranks"), [("python", 1), ("torchrun", 2)])
def test_without_permission_nothing_is_imported(kind: str, ranks: int, config: Path, tmp_path: Path) -> None:
    samples = f"train.global_batch_samples={ranks}"
    code, output = pretrain(config, samples, kind=kind, ranks=ranks)
    assert code != 0
    assert output.count("error: ") == 1
    assert f"error: maha.program: {NAME} is code that would run here" in output
    assert "Traceback" not in output.split("error: ")[0]
    assert not (tmp_path / "note").exists()
    assert not (tmp_path / "run").exists()


def test_looking_at_a_configuration_needs_no_permission_and_runs_nothing(config: Path, tmp_path: Path) -> None:
    assert f"program: '{NAME}'" in tool("launch/pretrain.py", "--config", config, "--print-config")
    assert "parameters" in forked("launch/pretrain.py", "--config", config, "--dry-run")
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize("look", ["--print-config", "--dry-run"])
def test_a_permission_without_effect_is_refused_where_nothing_runs_too(look: str, config: Path, tmp_path: Path) -> None:
    command = ("launch/pretrain.py", look, "--config")
    output = forked(*command, ROOT / "configs/model/maha.yaml", "--allow-program", "nowhere:build", expected=2)
    assert output.strip() == (
        "error: --allow-program nowhere:build: no effect, since no layer has maha.aggregation: program; remove it"
    )
    output = forked(*command, config, "--allow-program", "nowhere:build", expected=2)
    assert "is not what maha.program names" in output
    forked(*command, config, "--allow-program", NAME)
    assert not (tmp_path / "note").exists()


@pytest.mark.full
def test_a_program_that_one_rank_lacks_is_refused_by_all(config: Path, tmp_path: Path) -> None:
    (tmp_path / "my_program.py").write_text(
        "import os\n"
        "assert os.environ['RANK'] == '0', 'not on this machine'\n"
        "from configs.programs.budget import build\n"
    )
    code, output = run(config, "train.global_batch_samples=2", kind="torchrun", ranks=2)
    assert code != 0
    assert output.count("error: ") == 1
    assert "error: maha.program: my_program cannot be imported" in output
    assert "not on this machine" in output


def test_a_program_without_a_solution_ends_the_run_in_one_line(config: Path, tmp_path: Path) -> None:
    (tmp_path / "my_program.py").write_text(
        "from tests.support.stated_programs import bounded_above as build\n"  # the first utility is 2 at most
    )
    output = forked_pretrain(config, extra=("--allow-program", NAME), expected=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "error: layer 0, head " in line
    assert "of its document (row " in line
    assert re.search(f"{NAME} with [123] feasible scales is infeasible", line)
    assert "Traceback" not in output

"""Trials: what they run, what they leave behind, and that nothing of them runs on."""

import dataclasses
import os
import time
from pathlib import Path

import psutil
import pytest

from maha_megatron.errors import TrainingError
from maha_megatron.train.trials import Trial, column, run_side_by_side, run_trial, warmup_settings

SCRIPT = """
import json, os, subprocess, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv if "=" in word)
folder = Path(words["run.folder"])
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss_nats": float(words["loss"])}) + "\\n")
(folder / "words").write_text(" ".join(sys.argv[1:]))
(folder / "device").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if "child" in words:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    Path(words["child"]).write_text(str(child.pid))
    time.sleep(60)
print("said by", words["run.name"])
sys.exit(int(words.get("code", 0)))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(SCRIPT)
    return path


def trial(name: str, *settings: str, loss: float = 2.0) -> Trial:
    return Trial(name=name, config=Path("x.yaml"), settings=(f"loss={loss}", *settings))


def test_a_trial_gives_its_rows_and_can_be_run_again(script: Path, tmp_path: Path) -> None:
    for loss in (2.0, 1.5):
        rows = run_trial(trial("a", loss=loss), tmp_path / "runs", script, timeout_s=20)
        assert column(rows, "loss_nats") == {1: loss}
        assert not (tmp_path / "runs/a/left").exists()
        (tmp_path / "runs/a/left").write_text("of the trial before")
    assert (tmp_path / "runs/a/console.log").read_text() == "said by a\n"


def test_a_program_is_allowed_only_where_the_trial_says_so(script: Path, tmp_path: Path) -> None:
    for allowed in (None, "mine:build"):
        run_trial(dataclasses.replace(trial("a"), allow_program=allowed), tmp_path / "runs", script, timeout_s=20)
        words = (tmp_path / "runs/a/words").read_text()
        assert words.endswith("--allow-program mine:build") == bool(allowed)
        assert ("--allow-program" in words) == bool(allowed)


def test_a_folder_that_is_no_trials_is_never_removed(script: Path, tmp_path: Path) -> None:
    mine = tmp_path / "runs/a/thesis.txt"
    mine.parent.mkdir(parents=True)
    run_trial(trial("a"), tmp_path / "runs", script, timeout_s=20)  # empty: nothing to lose
    for path in mine.parent.iterdir():
        path.unlink()
    mine.write_text("years of work")
    with pytest.raises(TrainingError, match="is no folder of an earlier trial"):
        run_trial(trial("a"), tmp_path / "runs", script, timeout_s=20)
    assert mine.read_text() == "years of work"


def test_a_failure_shows_the_end_of_the_log(script: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"trial a failed \(3\)(.|\n)*said by a"):
        run_trial(trial("a", "code=3"), tmp_path / "runs", script, timeout_s=20)


def test_a_time_out_ends_processes_in_sessions_of_their_own(script: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(TrainingError, match="no end after 2 s"):
        run_trial(trial("a", f"child={note}"), tmp_path / "runs", script, timeout_s=2)
    child = int(note.read_text())
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = _runs(child)
    if left:
        os.kill(child, 9)
    assert not left


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_side_by_side_keeps_the_order_and_gives_devices(script: Path, tmp_path: Path) -> None:
    trials = [trial(name, loss=loss) for name, loss in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    results = run_side_by_side(trials, tmp_path / "runs", script, at_once=2, timeout_s=20, device_each=True)
    assert [rows[0]["loss_nats"] for rows in results] == [1.0, 2.0, 3.0]
    assert {(tmp_path / "runs" / one.name / "device").read_text() for one in trials} <= {"0", "1"}


def test_a_failure_side_by_side_is_raised(script: Path, tmp_path: Path) -> None:
    trials = [trial("a", "code=1"), trial("b")]
    with pytest.raises(TrainingError, match="trial a failed"):
        list(run_side_by_side(trials, tmp_path / "runs", script, at_once=1, timeout_s=20))


@pytest.mark.parametrize(
    ("configured", "given", "expected"),
    [
        (200, [], ("schedule.warmup_steps=10",)),
        (4, ["train.steps=3"], ("schedule.warmup_steps=4",)),
        (200, ["schedule.warmup_steps=30"], ()),
    ],
)
def test_the_warmup_of_a_short_run(configured: int, given: list[str], expected: tuple[str, ...]) -> None:
    assert warmup_settings(configured, 50, given) == expected

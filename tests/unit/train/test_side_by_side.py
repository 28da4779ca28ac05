"""Runs of a study: their order, their devices, stopping, resuming, failing."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest

from maha_megatron.config.study import Study
from maha_megatron.errors import ConfigError
from maha_megatron.train import side_by_side
from maha_megatron.train.child_process import ChildProcess
from maha_megatron.train.side_by_side import SideBySide
from maha_megatron.train.study_report import study_data, study_text
from maha_megatron.train.study_runs import Stage, StudyRun, study_runs
from tests.support.fake_study import scripts, study  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "POLL_S", 0.01)


def runs_of(study: Study, tmp_path: Path, *overrides: str) -> list[StudyRun]:  # noqa: F811
    where = {"folder": tmp_path / "runs", "data": "d", "tokenizer": "t"}
    made = study_runs(study, peers=list(study.peers), seeds=study.seeds, overrides=overrides, **where)
    for run in made:
        run.prepare()
    return made


def work(runs: list[StudyRun], scripts: dict, places=(None,), lines=None, **how) -> SideBySide:  # noqa: F811
    made = SideBySide(runs, places, **scripts, say=(lines if lines is not None else []).append, progress_s=0)
    made.go(**how)
    return made


def test_all_runs_are_trained_and_evaluated_once(study, scripts, tmp_path) -> None:  # noqa: F811
    runs, lines = runs_of(study, tmp_path), []
    assert [run.title for run in runs] == ["dense seed 1", "window seed 1", "dense seed 2", "window seed 2"]
    assert not work(runs, scripts, ["0", "1"], lines).failures
    assert {run.stage for run in runs} == {Stage.DONE}
    began = [line for line in lines if " on GPU " in line]
    assert [line.partition(":")[0] for line in began if "training" in line] == [run.title for run in runs]
    assert {line[-1] for line in began} == {"0", "1"}
    assert (runs[0].folder / "console.log").read_text() == "began on 0\n"
    assert [len(run.sessions()) for run in runs] == [1] * 4
    assert {session.beside for run in runs for session in run.sessions()} == {0}, "each has a GPU of its own"

    again = []
    work(runs_of(study, tmp_path), scripts, [None], again)
    assert again == []


def test_what_runs_beside_on_a_device_is_counted(study, scripts, tmp_path) -> None:  # noqa: F811
    hold = tmp_path / "runs" / "small" / "hold"
    runs = runs_of(study, tmp_path)
    hold.touch()
    work(runs, scripts, [None] * 4, stopped=lambda: all(run.steps_done() == 2 for run in runs))
    assert all(session.beside > 1 for run in runs for session in run.sessions())
    assert all(session.code == 75 for run in runs for session in run.sessions())


def test_a_run_that_was_cut_off_goes_on(study, scripts, tmp_path) -> None:  # noqa: F811
    hold = tmp_path / "runs" / "small" / "hold"
    runs, lines = runs_of(study, tmp_path), []
    hold.touch()
    began = time.monotonic()
    done = work(runs, scripts, [None] * 2, lines, stopped=lambda: runs[1].steps_done() == runs[0].steps_done() == 2)
    assert time.monotonic() - began < 20
    assert not done.failures
    assert [run.steps_done() for run in runs] == [3, 3, 0, 0]
    assert {run.stage for run in runs} == {Stage.TRAIN}
    assert "time to stop; training: 2, evaluating: 0, waiting: 2" in lines
    assert "dense seed 1: stopped while training" in lines
    assert any("step 2/4  loss 3.0100 nats  200 tokens/s" in line for line in lines)
    hold.unlink()
    work(runs, scripts)
    assert [[row["step"] for row in run.rows()] for run in runs] == [[1, 2, 3, 4]] * 4, "none was trained twice"
    assert [session.code for session in runs[0].sessions()] == [75, 0]


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.EVALUATE])
def test_what_will_not_stop_is_ended(study, scripts, tmp_path, monkeypatch, stage) -> None:  # noqa: F811
    monkeypatch.setattr(side_by_side, "GRACE_S", 0.1)
    scripts["pretrain" if stage is Stage.TRAIN else "evaluate"].write_text(DEAF)
    (run, *_) = runs_of(study, tmp_path)
    log, lines, began = run.log_of(stage), [], time.monotonic()
    assert not work([run], scripts, lines=lines, stopped=lambda: log.is_file() and "deaf" in log.read_text()).failures
    assert time.monotonic() - began < 20
    assert lines[-1] == f"dense seed 1: stopped while {stage.value}"
    assert [session.code for session in run.sessions()] == ([-9] if stage is Stage.TRAIN else [0])


def test_time_is_up_while_everything_starts(study, scripts, tmp_path) -> None:  # noqa: F811
    """Asked to stop before it can listen, a program just dies; nothing failed."""
    scripts["pretrain"].write_text("import time\ntime.sleep(5)")
    runs, lines = runs_of(study, tmp_path), []
    assert not work(runs, scripts, [None] * 2, lines, stopped=lambda: len(lines) >= 2).failures
    assert [session.code for run in runs for session in run.sessions()] == [-15, -15]
    assert "time to stop; training: 2, evaluating: 0, waiting: 2" in lines


def test_an_error_ends_all_processes_and_notes_them(study, scripts, tmp_path) -> None:  # noqa: F811
    scripts["pretrain"].write_text(DEAF)
    (run, *_) = runs_of(study, tmp_path)

    def second_interrupt() -> bool:
        if run.log_of(Stage.TRAIN).is_file():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        work([run], scripts, stopped=second_interrupt)
    assert [session.code for session in run.sessions()] == [-9]


def test_a_run_that_somebody_still_trains_is_left_alone(study, scripts, tmp_path) -> None:  # noqa: F811
    """As after the death of whoever started it."""
    hold = tmp_path / "runs" / "small" / "hold"
    run, other, *_ = runs_of(study, tmp_path)
    hold.touch()
    orphan = ChildProcess(run.words(Stage.TRAIN, **scripts), run.log_of(Stage.TRAIN))
    try:
        failures = work([run, other], scripts, until_s=2, stopped=lambda: other.steps_done() == 2).failures
        assert list(failures) == [run.title]
        assert other.steps_done() == 3, "it got the place"
        assert "console.log: what prints here still runs" in failures[run.title]
        assert not run.sessions()
    finally:
        orphan.end()
    hold.unlink()
    assert not work([run], scripts).failures


def test_a_failure_does_not_stop_the_others(study, scripts, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("FAKE_FAILS", "dense")
    runs, lines = runs_of(study, tmp_path), []
    failures = work(runs, scripts, [None], lines).failures
    assert list(failures) == ["dense seed 1", "dense seed 2"]
    assert failures["dense seed 1"].startswith("dense seed 1: training ended with 2, see ")
    assert failures["dense seed 1"].endswith("began on all")
    assert [run.stage for run in runs] == [Stage.TRAIN, Stage.DONE] * 2
    text = study_text(runs, study.reference)
    assert "Not trained to the end: dense seed 1 (0 of 4 steps), dense seed 2 (0 of 4 steps)." in text
    assert "| window | 1 2 | 2.1150 | 0.0071 | - | - |" in text, "no reference, no difference"


def test_an_evaluation_without_a_result_fails(study, scripts, tmp_path) -> None:  # noqa: F811
    scripts["evaluate"].write_text("print('nothing')")
    (run, *_) = runs_of(study, tmp_path)
    assert "evaluating ended without a result" in work([run], scripts).failures[run.title]
    text = study_text([run], study.reference)
    assert "| dense | 1 | 2.0100 |" in text
    assert "Trained, but not evaluated: dense seed 1." in text
    assert "## " not in text


def test_another_evaluation_is_made_anew(study, scripts, tmp_path) -> None:  # noqa: F811
    (run, *_) = runs_of(study, tmp_path)
    work([run], scripts)
    path = next((run.folder / "evaluation").rglob("evaluate_*.json"))
    for changed in ({"needles": 4}, {"distances": (20,)}, {"distances": ()}, {"pairs": 6}, {"pairs": 0}):
        other = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, **changed))
        assert other.stage is Stage.EVALUATE
    path.write_text("")  # killed while it was written
    assert run.stage is Stage.EVALUATE
    work([run], scripts)
    assert run.stage is Stage.DONE
    assert len(run.sessions()) == 1, "it was not trained again"


def test_an_evaluation_by_hand_is_not_taken_for_the_studys(study, scripts, tmp_path) -> None:  # noqa: F811
    (run, *_) = runs_of(study, tmp_path)
    work([run], scripts)
    record = run.found()
    record["command"] += " --data data/other"
    (run.folder / "evaluation" / "step_00000004" / "evaluate_by_hand.json").write_text(json.dumps(record))
    assert "--data" not in run.found()["command"]


def test_a_folder_of_other_settings_is_refused(study, scripts, tmp_path) -> None:  # noqa: F811
    runs_of(study, tmp_path)
    with pytest.raises(
        ConfigError, match=r"dense seed 1 with other settings \(train.steps was 4, is 5\): give the old"
    ):
        runs_of(study, tmp_path, "train.steps=5")


def test_a_folder_of_somebody_else_is_refused(study, scripts, tmp_path) -> None:  # noqa: F811
    folder = tmp_path / "runs" / "small" / "dense" / "seed_1"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is no run of a study"):
        runs_of(study, tmp_path)


def test_tables(study, scripts, tmp_path) -> None:  # noqa: F811
    runs = runs_of(study, tmp_path, "train.steps=5")
    work(runs, scripts, [None] * 2)
    text = study_text(runs, study.reference)
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert "5 steps of 128 tokens, 640 in all, in sequences of 64.\n" in text
    assert re.search(r"\| dense \| 1 2 \| 2.0150 \| 0.0071 \| - \| - \| 350 \([01]\.\d\) \|", text)
    assert "| window | 1 2 | 2.1150 | 0.0071 | +0.1000 | 0.0000 | 350 (" in text, "the first fifth is left out"
    assert "| position | 0-127 | 128-255 |" in text
    assert "| dense | 3.2500 | 2.1500 |" in text, "near positions together, by their tokens"
    assert "| window | 3.2500 (+0.0000) | 2.1500 (+0.0000) |" in text
    assert "| distance | 20 | 32 |" in text
    assert "| dense | 0.500 | 0.500 |" in text
    assert "| distance | 1-8 |" in text
    assert rows["noise"] == "| noise | 0.0000 |", "the last table's; both seeds answer alike"
    assert text.count("do to a difference to dense.\n") == 2, "below both headings of recall"
    assert "{" not in text, "every name is filled in"
    against = study_text(runs, "window")
    assert "| dense | 1 2 | 2.0150 | 0.0071 | -0.1000 | 0.0000 |" in against
    data = study_data(runs)
    assert list(data) == [run.title for run in runs]
    assert [row["step"] for row in data["dense seed 1"]["rows"]] == [1, 2, 3, 4, 5]
    assert "--samples 4" in data["window seed 2"]["evaluation"]["command"]

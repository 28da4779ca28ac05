"""Pretraining as a user runs it: three launchers, resume after SIGKILL and SIGTERM, errors that say what to change."""

import contextlib
import io
import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maha_megatron.train.metrics import METRICS, read_rows
from tests.support.distributed import run_ranks
from tests.support.runs import (
    ROOT,
    corpus,  # noqa: F401 (a fixture)
    finish,
    forked,
    forked_pretrain,
    kill,
    pretrain,
    rank_processes,
    started,
    tool,
    wait_for_step,
    write_config,
)


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:  # noqa: F811
    return write_config(corpus, tmp_path / "tiny.yaml", tmp_path / "run")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:  # noqa: F811
    """Configuration, run folder and output of a finished run on one process, accumulation 4."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(corpus, folder / "tiny.yaml", folder / "run")
    return path, folder / "run", forked_pretrain(path)


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss_nats"] for row in read_rows(run / METRICS)}


def check_the_same_run(alone: Path, run: Path, output: str) -> None:
    expected, found = losses(alone), losses(run)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert output.count("validation loss  ") == 1  # rank 0 alone speaks


def test_a_run_leaves_everything_it_promises(trained: tuple[Path, Path, str]) -> None:
    _, run, output = trained
    rows = read_rows(run / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss_nats"] < rows[0]["loss_nats"] - 0.3
    names = {"loss_nats", "learning_rate", "gradient_norm", "tokens_per_s", "tflops_per_device", "step_s"}
    names |= {"memory_bytes", *(f"scale_weight/layer_00/scale_{scale}" for scale in range(3))}
    assert all(names <= row.keys() for row in rows)
    weights = [rows[0][f"scale_weight/layer_00/scale_{scale}"] for scale in range(3)]
    assert sum(weights) == pytest.approx(1.0, abs=1e-5)
    assert "mfu_frac" not in rows[0]  # no peak is known for a CPU
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([0.005, 0.01, 0.01])
    assert [row["step"] for row in rows if "validation_loss_nats" in row] == [5, 10]
    assert 0 < rows[-1]["validation_bits_per_byte"] < rows[-1]["validation_loss_nats"] / 0.69
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000005", "step_00000010"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((run / "run.json").read_text())
    assert {"torch", "deepspeed", "megatron-core", "python", "maha_megatron"} <= record["versions"].keys()
    assert record["config"]["train"]["steps"] == 10
    manifest = json.loads((run / "checkpoints/step_00000010/manifest.json").read_text())
    assert manifest["config"] == record["config"]
    assert json.loads((run / "summary.json").read_text())["validation_loss_nats"] == rows[-1]["validation_loss_nats"]
    for promised in (f"run folder       {run}", "tensorboard --logdir", "loss.png", "validation loss", "unigram"):
        assert promised in output
    assert "DeepSpeedZeroOptimizer around AdamW" in output


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("deepspeed", ["zero.stage=3"]),
        ("torchrun", ["parallel.tensor=2", "parallel.sequence=true"]),
    ],
)
@pytest.mark.full
def test_launchers_and_topologies_give_the_same_run(
    kind: str,
    overrides: list[str],
    trained: tuple[Path, Path, str],
    config: Path,
) -> None:
    code, output = pretrain(config, *overrides, kind=kind, ranks=2)
    assert code == 0, output
    check_the_same_run(trained[1], config.parent / "run", output)


def trained_on_a_rank(rank: int, config: str, override: str) -> tuple[int, str]:
    """Exit code and output of launch/pretrain.py where a launcher has set the ranks' environment already."""
    main = runpy.run_path(str(ROOT / "launch/pretrain.py"))["main"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(["--config", config, "--set", override])
    return code, said.getvalue()


def test_two_ranks_give_the_same_run(trained: tuple[Path, Path, str], config: Path) -> None:
    """What the launchers' runs show, without the time in which launcher and ranks import."""
    (first, said), (second, more) = run_ranks(trained_on_a_rank, 2, str(config), "zero.stage=3")
    assert first == second == 0, said + more
    check_the_same_run(trained[1], config.parent / "run", said + more)


def test_killed_and_resumed_equals_straight_bitwise(config: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    forked_pretrain(config, "train.steps=40", f"run.folder={straight}")
    with started(config, "train.steps=40") as process:
        wait_for_step(process, run, 7)
        kill(process)
    assert not (run / "checkpoints/step_00000040").exists(), "it was not killed in time"
    assert "continuing after step" in forked_pretrain(config, "train.steps=40")
    assert losses(run) == losses(straight)
    assert [row["step"] for row in read_rows(run / METRICS)] == list(range(1, 41))
    one, other = (load_file(folder / "checkpoints/step_00000040/weights.safetensors") for folder in (run, straight))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize(("kind", "ranks"), [("python", 1), pytest.param("deepspeed", 2, marks=pytest.mark.full)])
def test_sigterm_saves_and_exits_with_75(kind: str, ranks: int, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(config, "train.steps=2000", kind=kind, ranks=ranks) as process:
        wait_for_step(process, run, 6)
        trainers = rank_processes(process)
        assert len(trainers) == ranks, trainers
        trainers[-1].terminate()  # one rank hears of it, all stop after the same step
        code, output = finish(process)
    assert code == 75, output
    saved = int((run / "checkpoints/latest").read_text().strip().removeprefix("step_"))
    assert f"stopped by a signal after step {saved}, saved" in output
    assert max(losses(run)) == saved
    more = f"train.steps={saved + 2}"
    code, output = pretrain(config, more, kind=kind, ranks=ranks) if ranks > 1 else (0, forked_pretrain(config, more))
    assert code == 0, output
    assert f"continuing after step {saved}" in output
    assert sorted(losses(run)) == list(range(1, saved + 3))


def test_a_signal_while_starting_saves_nothing_and_a_second_ctrl_c_ends_at_once(config: Path, tmp_path: Path) -> None:
    script = (
        "import os, runpy, signal, sys; from maha_megatron.train import loop\n"
        "build = loop.build_engine\n"
        "def interrupted(config, program):\n"
        "    for _ in range(int(sys.argv.pop())): os.kill(os.getpid(), signal.SIGINT)\n"
        "    return build(config, program)\n"
        "loop.build_engine = interrupted\n"
        f"m = runpy.run_path({str(ROOT / 'launch/pretrain.py')!r})\n"
        f"sys.exit(m['main'](['--config', {str(config)!r}]))\n"
    )
    (tmp_path / "run.py").write_text(script)
    output = forked(str(tmp_path / "run.py"), 1, expected=75)
    assert "stopped by a signal before the first step, nothing to save" in output
    assert not (tmp_path / "run/checkpoints").exists()
    output = forked(str(tmp_path / "run.py"), 2, expected=130)
    assert "stopped at once" in output
    assert "Traceback" not in output


def test_a_rank_that_dies_ends_the_others(config: Path, tmp_path: Path) -> None:
    with started(config, "train.steps=100000", kind="torchrun", ranks=2) as process:
        wait_for_step(process, tmp_path / "run", 2)
        rank_processes(process)[-1].kill()
        code, output = finish(process, timeout_s=90)
    assert code == 1, output


def test_a_finished_run_is_not_trained_again(trained: tuple[Path, Path, str]) -> None:
    path, run, _ = trained
    before = (run / METRICS).read_bytes()
    assert "validation loss" in forked_pretrain(path)
    assert (run / METRICS).read_bytes() == before


def test_a_loss_that_is_not_a_number_stops_the_run(config: Path, tmp_path: Path) -> None:
    output = forked_pretrain(config, "schedule.peak=1e30", "schedule.warmup_steps=0", "optimizer.name=sgd", expected=2)
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "of step 2 is " in error
    assert "samples 8 to 15 of the data order" in error
    assert "Traceback" not in output
    assert not (tmp_path / "run/checkpoints").exists()


def test_another_model_is_refused(trained: tuple[Path, Path, str]) -> None:
    output = forked_pretrain(trained[0], "model.hidden=64", expected=2)
    assert "model.hidden: 32 in the checkpoint, 64 in this run" in output


def test_another_data_order_is_refused(trained: tuple[Path, Path, str]) -> None:
    output = forked_pretrain(trained[0], "run.seed=77", "train.steps=12", expected=2)
    assert "run.seed: saved with 1234, now 77" in output
    assert "start a new run.folder" in output


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_missing_data_is_said_once_by_many_ranks(ranks: int, config: Path) -> None:
    setting = "data.train=[{prefix: nowhere}]"
    if ranks == 1:
        output = forked_pretrain(config, setting, expected=2)
    else:
        code, output = pretrain(config, setting, kind="deepspeed", ranks=ranks)
        assert code == 2, output
    assert output.count("error: ") == 1
    assert "nowhere" in output
    assert "Traceback" not in output


def test_a_misspelt_key_is_said_fast_and_without_torch(config: Path) -> None:
    script = (
        "import runpy, sys; sys.modules['torch'] = None; sys.modules['deepspeed'] = None;"
        f"sys.argv = ['pretrain.py', '--config', {str(config)!r}, *sys.argv[1:]];"
        f"sys.path.insert(0, {str(ROOT)!r});"
        f"m = runpy.run_path({str(ROOT / 'launch/pretrain.py')!r}); sys.exit(m['main']())"
    )
    (config.parent / "run.py").write_text(script)
    output = tool(str(config.parent / "run.py"), "--set", "train.stepz=3", expected=2)
    assert output == "error: --set: train.stepz: unknown key; did you mean train.steps?\n"
    assert "sequence_tokens: 64" in tool(str(config.parent / "run.py"), "--print-config")


def test_dry_run_counts_what_training_builds(trained: tuple[Path, Path, str]) -> None:
    path, run, _ = trained
    output = forked("launch/pretrain.py", "--config", path, "--dry-run", 4, "--set", "parallel.tensor=2")
    total = sum(weight.numel() for weight in load_file(run / "checkpoints/step_00000010/weights.safetensors").values())
    assert f"{total / 1e3:.4g} k" in output
    assert "memory of one of 4 ranks" in output


def test_generate(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, run, _ = trained
    command = ("tools/generate.py", "--run", run, "--prompt", "def main", "--tokens", 12)
    first = forked(*command, "--output", tmp_path / "sample.txt")
    text = (tmp_path / "sample.txt").read_text()
    assert text.startswith("def main")
    assert len(text) > len("def main")
    assert text in first
    assert text in forked(*command, "--checkpoint", 10), "the same seed draws the same text"
    assert "no checkpoint of step 7; there are: 5, 10" in forked(*command, "--checkpoint", 7, expected=2)
    assert "has no checkpoint" in forked("tools/generate.py", "--run", tmp_path, expected=2)
    other = tmp_path / "other.model"
    for vocabulary, said in ((512, "is another tokenizer"), (500, "has 500 token ids, the model 512")):
        forked(
            *("data_prep/train_tokenizer.py", "--input", ROOT / "README.md", "--output", other, "--force"),
            *("--vocabulary", vocabulary),
        )
        assert said in forked(*command, "--tokenizer", other, expected=2)

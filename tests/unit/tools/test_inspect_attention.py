"""tools/inspect_attention.py: masks without torch, and pictures with their data for a run of random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.model import tiny_config
from tests.support.runs import ROOT, corpus, forked  # noqa: F401 (corpus: a fixture)
from tests.support.untrained import write_untrained_run

SCRIPT = "tools/inspect_attention.py"
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "numpy", "megatron", "deepspeed", "matplotlib"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TEXT = "def attend(rows):\n    return [row for row in rows if row is not None]\n" * 3


def masks(*arguments):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, SCRIPT, "--masks", "--config", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_masks_of_the_default_model_need_no_torch():
    done = masks("configs/model/maha.yaml", "--rows", "4095", "--width", "120")
    assert done.returncode == 0, done.stderr
    assert "row 4095 of a sequence of 4096 rows, ratio 4, windows 128, 112, 124, 64" in done.stdout
    assert "blocks 132-255, rows 2112-4095" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert " row  scale 0" not in done.stdout


def test_a_short_sequence_is_drawn_row_by_block_too():
    small = ("--set", "maha.windows=[4,4]", "--set", "maha.ratio=2", "--set", "data.sequence_tokens=8")
    done = masks("configs/model/maha.yaml", *small, "--documents", "5", "3", "--rows", "6")
    assert done.returncode == 0, done.stderr
    assert "row 6 of a sequence of 8 rows (row 1 of the document in rows 5-7)" in done.stdout
    assert " row  scale 0  scale 1\n   0  x\n   1  xx       x\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/model/dense.yaml"], "no maha layer"),
        (["configs/model/maha.yaml", "--rows", "4096"], "rows 0 to 4095"),
        (["configs/model/maha.yaml", "--documents", "0"], "at least one row"),
        (["nowhere.yaml"], "cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, message):
    done = masks(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--allow-program", ["x:y"]),
        ("--tokens", ["0"]),
        ("--text", [""]),
        ("--output", ["x"]),
        ("--tokenizer", ["x"]),
    ],
)
def test_options_of_a_checkpoint_do_not_go_with_masks(option, values):
    done = masks("configs/model/maha.yaml", option, *values)
    assert done.returncode == 2
    assert f"{option} does not go with --config" in done.stderr


def configuration(corpus, **changes):  # noqa: F811
    settings = {"model__vocabulary": 512, "data__tokenizer": str(corpus / "tokenizer.model")}
    return tiny_config(**(settings | changes))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def game(corpus, tmp_path_factory):  # noqa: F811
    """A hybrid whose MAHA layers play a game, and its folder."""
    folder = tmp_path_factory.mktemp("game")
    config = configuration(corpus, maha__aggregation="nash", maha__coupling="gram", model__layers=4)
    write_untrained_run(config, folder)
    return folder


def read(path: Path):
    return json.loads(path.read_text())


def test_every_picture_has_its_data(game, text, tmp_path):
    output = forked(SCRIPT, "--checkpoint", game, "--text", text, "--output", tmp_path)
    assert "layer 0: scale weights" in output
    assert "layer 2 done" in output
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {
        *(f"{kind}_layer_{layer}" for kind in ("scale_weights", "receptive_field") for layer in ("00", "02")),
        "solver",
    }
    assert pictures == {path.stem for path in tmp_path.glob("*.json")} - {"summary"}
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    summary = read(tmp_path / "summary.json")
    tokens = len(summary["tokens"])
    assert tokens == 64  # the run's sequence; the text is longer
    assert TEXT.startswith("".join(summary["tokens"]).lstrip()[:20])
    weights = read(tmp_path / "scale_weights_layer_02.json")["scale_weights_tnl"]
    assert (len(weights), len(weights[0]), len(weights[0][0])) == (tokens, 8, 3)
    assert all(sum(head) == pytest.approx(1, abs=1e-4) for row in weights for head in row)
    reach = read(tmp_path / "receptive_field_layer_00.json")
    assert all(sum(head) == pytest.approx(1, abs=1e-3) for head in reach["mass_by_distance_nk"])
    assert all(
        1 <= half <= most <= row + 1 for row, heads in enumerate(reach["rows_within_tnf"]) for half, most in heads
    )
    solver = read(tmp_path / "solver.json")
    assert set(solver) == {"0", "2"}
    assert len(solver["0"]["residual_tn"]) == len(solver["0"]["steps_tn"]) == tokens
    assert max(map(max, solver["0"]["residual_tn"])) <= 1e-6


def test_a_closed_form_says_so_and_a_step_may_be_named(corpus, text, tmp_path):  # noqa: F811
    checkpoint = write_untrained_run(configuration(corpus), tmp_path)
    output = forked(SCRIPT, "--checkpoint", checkpoint, "--text", text, "--tokens", 20)
    assert "solver closed form" in output
    folder = tmp_path / "attention" / checkpoint.name
    assert not (folder / "solver.png").exists()
    assert read(folder / "summary.json")["layers"]["0"]["solver"] == "closed form"
    assert len(read(folder / "summary.json")["tokens"]) == 20


def test_nothing_to_look_at(corpus, text, tmp_path):  # noqa: F811
    write_untrained_run(configuration(corpus, model__attention=("dense",)), tmp_path / "dense")
    output = forked(SCRIPT, "--checkpoint", tmp_path / "dense", "--text", text, expected=2)
    assert "no layer of this model is a MAHA layer" in output


def test_short_texts_and_wrong_paths(game, text, tmp_path):
    (tmp_path / "empty").write_text("")
    for arguments, message in (
        (("--checkpoint", game, "--text", tmp_path / "empty"), "the text has 0 tokens"),
        (("--checkpoint", tmp_path, "--text", text), "neither a run's folder nor a checkpoint"),
        (("--checkpoint", game, "--text", tmp_path / "missing"), "cannot be read"),
        (("--checkpoint", game), "--checkpoint needs --text"),
        (("--checkpoint", game, "--text", text, "--rows", 3), "--rows does not go with --checkpoint"),
        (("--checkpoint", game, "--text", text, "--rows", 0), "--rows does not go with --checkpoint"),
        (("--checkpoint", game, "--text", text, "--width", 50), "--width does not go with --checkpoint"),
        (("--checkpoint", game, "--text", text, "--masks"), "--masks does not go with --checkpoint"),
        (("--checkpoint", game, "--text", text, "--set", "a.b=1"), "--set does not go with --checkpoint"),
        (("--checkpoint", game, "--text", text, "--tokens", 0), "--tokens needs at least 1"),
        (("--checkpoint", game, "--text", text, "--allow-program", "a:b"), "--allow-program a:b: no effect"),
    ):
        output = forked(SCRIPT, *arguments, expected=2)
        assert message in output
        assert "Traceback" not in output

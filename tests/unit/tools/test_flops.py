"""tools/flops.py: the promised figures, for people and for programs, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "numpy", "megatron", "deepspeed"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flops(*arguments):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "tools/flops.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def report(model, *arguments):
    done = flops("--config", f"configs/model/{model}.yaml", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("groups", [4, 12])
def test_maha_saves_what_is_claimed(head_width, groups):
    shape = ("--set", f"model.head_width={head_width}", "--set", f"model.kv_groups={groups}")
    found = report("maha", "--sequence", "4096", *shape)
    assert found["saved_frac_all_in"] >= 0.81
    assert found["windows"] == {"maha": [128, 112, 124, 64]}
    assert round(found["saved_frac_pairs"], 3) == 0.826
    assert round(found["saved_frac_loaded"], 3) == 0.765
    assert found["visible_pairs"]["maha"] == 1_462_828


@pytest.mark.parametrize(("head_width", "saved"), [(64, 0.812), (128, 0.814)])
def test_the_game_saves_a_little_less(head_width, saved):
    found = report("maha_nash", "--set", "model.kv_groups=12", "--set", f"model.head_width={head_width}")
    assert round(found["saved_frac_all_in"], 3) == saved


@pytest.mark.parametrize(
    ("options", "terms", "note"),
    [
        (["maha.coupling=gram"], ["gram", "solver"], "6 Newton steps"),
        (["maha.aggregation=nash", "maha.regularizer=quadratic"], ["solver"], "15 supports"),
        (
            ["maha.aggregation=nash", "maha.regularizer=quadratic", "data.sequence_tokens=65536"],
            ["solver"],
            "8 steps along the path",
        ),
        (["maha.regularizer=quadratic"], ["solver"], None),
        (["maha.key_map=true", "maha.queries=pooled"], ["key_map", "pooled_queries"], None),
        (["maha.aggregation=program", "maha.program=a:b"], [], "the solver of a:b is not counted"),
        (["maha.aggregation=mean"], [], None),
        ([], [], None),
    ],
    ids=str,
)
def test_terms_of_the_options_are_printed(options, terms, note):
    settings = [word for option in options for word in ("--set", option)]
    done = flops("--config", "configs/model/maha.yaml", *settings)
    assert done.returncode == 0, done.stderr
    printed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("  maha   ")}
    optional = {"key_map", "pooled_queries", "gram", "solver"}
    assert printed & optional == set(terms)
    assert ("utilities" in printed) == ("maha.aggregation=mean" not in options)
    notes = report("maha", *settings)["notes"]
    assert len(notes) == (note is not None)
    assert all(note in text and text in done.stdout for text in notes)


def test_shares_stand_beside_it():
    found = report("hybrid", "--sequence", "4096")
    others = found["attention_share_frac_of_others"]
    assert set(others) == {"maha", "hybrid", "window", "window_hybrid", "dense"}
    assert found["attention_share_frac"] == others["hybrid"]["125m"]
    for size in ("125m", "7b"):
        assert others["maha"][size] < others["hybrid"][size] < others["dense"][size] < 1


@pytest.mark.parametrize(("sequence", "keys"), [(512, 256), (4096, 428), (65536, 682)])
def test_windows_see_as_many_keys_as_maha_at_that_length(sequence, keys):
    found = report("maha", "--sequence", str(sequence))
    assert found["keys_of_windows"] == sum(found["windows"]["maha"]) == keys
    for model in ("window", "window_hybrid"):
        one = report(model, "--sequence", str(sequence), "--set", f"maha.windows=[{keys}]")
        assert found["attention_share_frac_of_others"][model]["125m"] == one["attention_share_frac"]
    assert f"{keys} keys" in flops("--config", "configs/model/maha.yaml", "--sequence", str(sequence)).stdout


def test_sequence_overrides_the_files():
    found = report("maha", "--sequence", "16384")
    assert found["sequence_tokens"] == 16384
    assert found["windows"] == {"maha": [128, 112, 124, 127, 64]}
    assert found["saved_frac_all_in"] > 0.93


def test_any_number_of_groups():
    savings = [report("maha", "--set", f"model.kv_groups={groups}")["saved_frac_all_in"] for groups in (1, 4, 12)]
    assert savings[0] > savings[1] > savings[2] >= 0.81


def test_table_for_people():
    done = flops("--config", "configs/model/maha.yaml")
    assert done.returncode == 0
    for text in ("124.8 M parameters", "82.6%", "76.5%", "82.0%", "pyramid", "attention's share of a step"):
        assert text in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--config", "nowhere.yaml"], ["--config", "configs/model/maha.yaml", "--sequence", "0"]]
)
def test_user_errors_are_one_line(arguments):
    done = flops(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

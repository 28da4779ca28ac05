"""What the torch-free tools say of refined layers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def said(*words: str) -> str:
    where = {"cwd": ROOT, "env": {"PYTHONPATH": str(ROOT)}}
    return subprocess.run(
        [sys.executable, *words], **where, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_flops_counts_refined_layers_beside_the_others():
    found = json.loads(said("tools/flops.py", "--config", "configs/model/refined.yaml", "--json"))
    assert found["layers"] == {"maha": 9, "refined": 3, "dense": 0}
    terms = found["attention_flops_per_sequence_and_layer"]
    assert set(terms) == {"maha", "refined", "dense"}
    assert set(terms["refined"]) - set(terms["maha"]) == {"selection"}
    assert 0.81 <= found["saved_frac_all_in"] < found["saved_frac_pairs"]


def test_masks_say_that_opened_blocks_are_not_drawn():
    small = ("--set", "data.sequence_tokens=64", "--set", "maha.windows=[4,4,4]", "--rows", "50")
    text = said("tools/inspect_attention.py", "--masks", "--config", "configs/model/refined.yaml", *small)
    assert "row 50 of a sequence of 64 rows" in text
    assert "not drawn: 4 blocks that rows of a refined layer open" in text
    assert "layers of kind" not in text


OWN = ("--set", "maha.windows=[8]", "--set", "maha.full_reach=false", "--set", "refine.windows=[4,4,4]")


def test_windows_of_refined_layers_are_told_and_drawn_beside_the_others():
    small = ("--config", "configs/model/refined.yaml", "--set", "data.sequence_tokens=64", *OWN)
    found = json.loads(said("tools/flops.py", *small, "--json"))
    assert found["windows"] == {"maha": [8], "refined": [4, 4, 4]}
    assert "windows of maha layers [8], windows of refined layers [4, 4, 4]" in said("tools/flops.py", *small)
    text = said("tools/inspect_attention.py", "--masks", *small, "--rows", "50")
    of_maha, of_refined = text.split("layers of kind refined")
    assert "layers of kind maha" in of_maha
    assert "scale 2" not in of_maha
    assert "scale 2" in of_refined

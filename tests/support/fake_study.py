"""A small study, and stand-ins for pretrain.py and evaluate.py that take milliseconds: nothing is trained."""

from pathlib import Path

import pytest

from maha_megatron.config.study import Study, load_study

STUDY = """
model: {layers: 2, hidden: 32, heads: 4, kv_groups: 2, head_width: 8, ffn_hidden: 64, vocabulary: 512}
data: {sequence_tokens: 64}
schedule: {kind: constant, peak: 1.0e-2, warmup_steps: 1}
train: {steps: 4, global_batch_samples: 2, precision: fp32, validation_samples: 5, log_interval_steps: 1}
peers:
  - {name: dense, model: {attention: [dense]}}
  - {name: window, maha: {windows: [8], full_reach: false}, schedule: {peak: 2.0e-2}}
reference: dense
seeds: [1, 2]
evaluation: {samples: 4, needles: 3, distances: [32, 20], queries: 6, pairs: 5}
"""

PRETRAIN = """
import json, os, signal, sys, time, yaml
from pathlib import Path

config = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder, steps, stop = Path(config["run"]["folder"]), config["train"]["steps"], []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("began on", os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
if os.environ.get("FAKE_FAILS", "none") in str(folder):
    sys.exit(2)
path = folder / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
loss = 2.0 + 0.1 * ("dense" not in config["model"]["attention"]) + 0.01 * config["run"]["seed"]
for step in range(done + 1, steps + 1):
    while not stop and (folder.parent.parent / "hold").exists() and step == 3:
        time.sleep(0.01)
    row = {"step": step, "loss_nats": loss + 1, "tokens_per_s": 100.0 * step, "step_s": 0.5}
    with open(path, "a") as file:
        file.write(json.dumps(row | ({"validation_loss_nats": loss} if step == steps else {})) + "\\n")
    if stop and step < steps:
        sys.exit(75)
(folder / "summary.json").write_text(json.dumps({"steps": steps}))
"""

EVALUATE = """
import argparse, json, shlex, sys
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--run", type=Path)
for name in ("checkpoint", "samples", "needles", "queries", "pairs"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--distances", type=int, nargs="+")
asked = parser.parse_args()

def mean(value, count=1):
    return {"mean": value, "standard_error": None, "count": count, "groups": count}

seed = int(asked.run.name.rpartition("_")[2])
buckets = [[0, 0, mean(4.0, 1)], [1, 1, mean(3.0, 3)], [128, 255, mean(2.0 + 0.1 * seed, 8)]]
needle = [
    {"distance": distance, "whole_value": mean(0.5), "gain_nats": mean(1.25)} for distance in sorted(asked.distances)
]
pairs = [{"first_distance": 1, "last_distance": 8, "right": mean(0.75)}]
folder = asked.run / "evaluation" / f"step_{asked.checkpoint:08d}"
folder.mkdir(parents=True, exist_ok=True)
number = len(list(folder.iterdir()))
command = shlex.join(["python", *sys.argv])
found = {"command": command, "position": {"buckets": buckets}, "needle": needle, "pairs": pairs}
(folder / f"evaluate_{number}.json").write_text(json.dumps(found))
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """The small study, from a file."""
    (tmp_path / "small.yaml").write_text(STUDY, encoding="utf-8")
    return load_study(tmp_path / "small.yaml")


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, Path]:
    """Paths of the stand-ins, as SideBySide takes them."""
    places = {"pretrain": tmp_path / "pretrain.py", "evaluate": tmp_path / "evaluate.py"}
    places["pretrain"].write_text(PRETRAIN, encoding="utf-8")
    places["evaluate"].write_text(EVALUATE, encoding="utf-8")
    return places

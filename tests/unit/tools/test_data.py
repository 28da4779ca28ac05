"""tools/data.py: indexes are built ahead, sources are described, the loader is measured."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maha_megatron.config.load import load_config
from maha_megatron.data.indexed import IndexedDatasetBuilder
from maha_megatron.data.loader import build_loader
from tests.support.corpora import sentencepiece_model
from tests.support.pairs import END, random_documents
from tests.support.runs import ROOT, forked, import_path


def write_pair(prefix: Path, documents: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source large enough for stored indexes, of which the run takes two epochs, and a small one."""
    folder = tmp_path_factory.mktemp("data")
    write_pair(folder / "large", [[5, 6, 7, 8, END]] * 70_000)
    write_pair(folder / "small", [[token % 500 for token in document] for document in random_documents(300)])
    model = sentencepiece_model(folder / "small.model")
    path = folder / "run.yaml"
    path.write_text(
        f"""
run: {{name: tiny, folder: {folder}/run}}
model: {{vocabulary: 500}}
maha: {{ratio: 2, windows: [8, 6, 16]}}
data: {{sequence_tokens: 64, train: [{{prefix: {folder}/large, weight: 4}}, {{prefix: {folder}/small}}],
        tokenizer: {model}, document_bounds: false}}
train: {{steps: 1000, global_batch_samples: 8}}
""",
        encoding="utf-8",
    )
    return path


def test_indexes_built_ahead_are_those_that_a_run_reads(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(forked("tools/data.py", "index", "--config", config, "--json"))
    train = {source["name"]: source for source in report["train"]}
    assert train["large"]["samples_per_epoch"] == (round(0.98 * 70_000) * 5 - 1) // 64
    assert train["large"]["epochs"] == pytest.approx(0.8 * 8000 / train["large"]["samples_per_epoch"], rel=1e-3)
    assert report["built"] == 2  # two epochs of the large source; the small ones are made in memory
    assert (train["large"]["asked_frac"], train["large"]["padding_frac"]) == (0.8, 0.0)
    assert train["large"]["cuts"] == pytest.approx(0.8 * train["large"]["samples_per_epoch"], rel=0.05)
    monkeypatch.setattr(np, "save", lambda *_, **__: pytest.fail("built again"))
    loader = build_loader(load_config(config), data_parallel_rank=0, data_parallel_size=1)
    for step in (0, 500, 999):
        loader.step_batches(8 * step)


def test_people_read_a_table(config: Path) -> None:
    shown = forked("tools/data.py", "index", "--config", config, "--set", "data.packing=best_fit")
    assert "asked, drawn, epochs" in shown
    assert "large: 68600" in shown


def test_the_loader_is_measured(config: Path) -> None:
    small = "data.train=[{prefix: " + str(config.parent / "large") + "}]"
    words = ("--config", config, "--set", small, "--seconds", 0.2, "--json")
    report = json.loads(forked("tools/data.py", "benchmark", *words))
    assert report["steps"] >= 1
    assert report["start_s"] > 0
    assert report["tokens_per_s"] > 10_000


def test_what_is_wrong_is_one_line(config: Path) -> None:
    words = ["--config", str(config), "--step", "0"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/data.py"), "explain", *words],
        env={"PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --step 0: steps are counted from 1"

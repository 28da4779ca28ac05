"""A traced run consumes what tools/data.py explains: on 1, 2 and 4 ranks, at accumulation 1 and 4, over two resumes,
extended on the way, and with either packing.
"""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maha_megatron.config.load import load_config
from maha_megatron.data import order as order_module
from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.prefetch import Prefetcher
from maha_megatron.parallel import groups
from maha_megatron.train import engine as engine_module
from maha_megatron.train import loop as loop_module
from tests.support.distributed import run_ranks
from tests.support.runs import (
    ROOT,
    corpus,  # noqa: F401 (a fixture)
    forked,
    write_config,
)

S, STEPS, BATCH = 64, 7, 8
RESUMED, WHOLE = [3, 5, STEPS], [STEPS]
"""Steps at which runs end: two resumes of runs that were planned shorter, or none."""
TOPOLOGIES = {
    "1 rank, accumulation 4": (1, RESUMED, ["train.micro_batch_samples=2"]),
    "1 rank, accumulation 1": (1, WHOLE, ["train.micro_batch_samples=8"]),
    "2 ranks, accumulation 4": (2, WHOLE, ["train.micro_batch_samples=1"]),
    "2 tensor ranks": (2, WHOLE, ["train.micro_batch_samples=4", "parallel.tensor=2", "parallel.sequence=true"]),
    "4 ranks, accumulation 1": (4, RESUMED, ["train.micro_batch_samples=2", "zero.stage=3"]),
}
EVERYDAY = ("1 rank, accumulation 4", "2 ranks, accumulation 4")


def trace(rank: int, config: str, overrides: list[str], stop: int) -> list[tuple[int, int, torch.Tensor]]:
    """Train to a step, as a new run would; (step, data rank, its rows) of every step.

    Every index is stored, and none is built after the first batch was asked for, although the run crosses epochs.
    """
    seen: list[tuple[int, int, torch.Tensor]] = []
    original = engine_module.Engine.step

    def step(self: Any, batches: list[MicroBatch], rate: float, place: Any, **more: Any) -> Any:
        rows = torch.stack([batch.input_ids_t.reshape(-1, S) for batch in batches])  # accumulation, micro, S
        seen.append((place.step, groups.data_rank(), rows))
        return original(self, batches, rate, place, **more)

    def build_late(*_: Any) -> None:
        raise AssertionError("an index was built between steps")

    def feed(*arguments: Any, **more: Any) -> Prefetcher:
        order_module.build_index = build_late
        return Prefetcher(*arguments, **more)

    engine_module.Engine.step, loop_module.Prefetcher, order_module.STORED_ITEMS = step, feed, 0
    loop_module.train(load_config(config, [*overrides, f"train.steps={stop}"]))
    return seen


def consumed(config: Path, world: int, overrides: list[str], stops: list[int]) -> dict[int, list[list[int]]]:
    """The samples of every step in their global order, over runs that stop after each of `stops`."""
    steps: dict[int, list[list[int]]] = {}
    for stop in stops:
        by_rank = run_ranks(trace, world, str(config), overrides, stop, timeout_s=240)
        by_step: dict[int, dict[int, torch.Tensor]] = {}
        for step, rank, rows in (entry for found in by_rank for entry in found):
            by_step.setdefault(step, {})[rank] = rows
        for step, ranks in by_step.items():
            assert step not in steps, "a step was consumed twice"
            ordered = torch.stack([ranks[rank] for rank in sorted(ranks)], dim=1)  # accumulation, rank, micro, S
            steps[step] = ordered.reshape(-1, S).tolist()
    return steps


@pytest.fixture(scope="module", params=["concatenate", pytest.param("best_fit", marks=pytest.mark.full)])
def config(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A mixture of two sources that crosses epochs, with a skipped range."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write_config(corpus, folder / "tiny.yaml", folder / "run")
    forked(
        *("data_prep/split.py", "--input", corpus / "text_text_document", "--output-prefix", folder / "part"),
        *("--shares", 30, 1),
    )
    sources = f"[{{prefix: {folder}/part_0, weight: 3}}, {{prefix: {folder}/part_1}}]"
    text = path.read_text(encoding="utf-8").replace(
        f"train: [{{prefix: {corpus}/text_text_document}}], validation_frac: 0.1,",
        f"train: {sources}, validation_frac: 0.1, packing: {request.param}, skip: [{{first: 13, last: 17}}],",
    )
    assert sources in text
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def explained(config: Path) -> dict[int, list[list[int]]]:
    """The inputs of every step's samples, by tools/data.py explain."""
    packing = load_config(config).data.packing
    explain, steps = runpy.run_path(str(ROOT / "tools/data.py"))["explain"], {}
    for step in range(1, STEPS + 1):
        said = json.loads(explain(load_config(config), argparse.Namespace(step=step, json=True)))
        rows = []
        for sample in said["samples"]:
            runs = [document["tokens"] for document in sample["documents"]]
            if packing == "best_fit":
                row = [token for run in runs for token in run[:-1]]
            else:
                row = [token for run in runs for token in run][:-1]
            rows.append(row)
        steps[step] = rows
    return steps


@pytest.mark.parametrize(
    "topology", [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.full) for name in TOPOLOGIES]
)
def test_a_traced_run_consumes_what_is_explained(
    topology: str, config: Path, explained: dict[int, list[list[int]]], tmp_path: Path
) -> None:
    world, stops, overrides = TOPOLOGIES[topology]
    steps = consumed(config, world, [*overrides, f"run.folder={tmp_path}/run"], stops)
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step, rows in steps.items():
        assert len(rows) == len(explained[step]) == BATCH
        for row, expected in zip(rows, explained[step], strict=True):
            assert row[: len(expected)] == expected  # what follows is padding
            assert len(set(row[len(expected) :])) <= 1


def test_explain_tells_source_place_and_text(config: Path) -> None:
    said = json.loads(forked("tools/data.py", "explain", "--config", config, "--step", 2, "--json").splitlines()[-1])
    assert [sample["number"] for sample in said["samples"]] == [8, 9, 10, 11, 12, 18, 19, 20]
    pairs = {Path(sample["source"]).name for sample in said["samples"]}
    assert pairs == {"part_0", "part_1"}
    from maha_megatron.data.pair import open_pair
    from maha_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(load_config(config).data.tokenizer)
    for sample in said["samples"]:
        pair = open_pair(sample["source"])
        for part in sample["documents"]:
            tokens = pair.document(part["document"])[part["offset"] :][: len(part["tokens"])]
            assert np.array_equal(tokens, part["tokens"])
            assert part["text"] == tokenizer.decode(tokens.tolist())
    shown = forked("tools/data.py", "explain", "--config", config, "--step", 2)
    assert "sample 18: " in shown
    assert "sample 13: " not in shown

"""A run that saves, dies and resumes goes on bitwise; what cannot be saved or trained stops on all ranks at once."""

import builtins
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maha_megatron.checkpoint import layout
from maha_megatron.checkpoint.load import load_weights
from maha_megatron.config.schema import Config
from maha_megatron.errors import CheckpointError, TrainingError
from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import build_gpt
from maha_megatron.train import engine as engine_module
from maha_megatron.train.engine import Engine
from maha_megatron.train.guards import StepPlace
from maha_megatron.train.state import RunState, save, start_or_resume
from tests.support.distributed import run_ranks
from tests.support.everyday import everyday
from tests.support.one_rank import one_rank  # noqa: F401 (a fixture)
from tests.support.training import engine_for, micro_batches, start_groups, training_config

WORLD, KILLED, LAST = 2, 7, 10
ADAMW = {"model__layers": 2, "optimizer__name": "adamw", "optimizer__clip_norm": 0.5, "train__micro_batch_samples": 2}
BF16 = {**ADAMW, "train__precision": "bf16"}
CASES = {
    "ZeRO 0": {**ADAMW, "zero__stage": 0},
    "ZeRO 1": {**ADAMW, "zero__stage": 1},
    "ZeRO 2": {**ADAMW, "zero__stage": 2},
    "ZeRO 3": {**ADAMW, "zero__stage": 3},
    "bf16, ZeRO 1": {**BF16, "zero__stage": 1},
    "bf16, ZeRO 2": {**BF16, "zero__stage": 2},
    "bf16, ZeRO 3": {**BF16, "zero__stage": 3},
    "TP 2 + SP, ZeRO 1": {**ADAMW, "zero__stage": 1, "parallel__tensor": 2, "parallel__sequence": True},
}
EVERYDAY = ("ZeRO 0", "ZeRO 1", "bf16, ZeRO 2", "ZeRO 3", "TP 2 + SP, ZeRO 1")
cases = pytest.mark.parametrize("case", everyday(CASES, lambda case: case in EVERYDAY))


def steps(engine: Engine, config: Config, state: RunState, last: int, *, rate: float = 1e-3) -> tuple[RunState, list]:
    """Train up to step `last`, a checkpoint after steps 5 and 7; the losses."""
    losses = []
    while state.step < last:
        samples = config.train.global_batch_samples
        place = StepPlace(step=state.step + 1, first_sample=state.consumed_samples, samples=samples)
        batches = micro_batches(config, state.consumed_samples, "random")
        losses.append(engine.step(batches, rate * 0.9**state.step, place).loss_nats)
        state = state.after_step(samples)
        if state.step in (5, KILLED):
            save(engine, config, state, data={}, versions={})
    return state, losses


def straight_and_resumed(config: Config) -> dict[str, Any]:
    """Ten steps at once, and the last three again by another engine from the checkpoint of step 7."""
    with engine_for(config, WORLD) as engine:
        state, losses = steps(engine, config, RunState(), KILLED)
        weights = whole(engine.full_weights())
        state, more = steps(engine, config, state, LAST)
        seen = {"losses": losses + more, "weights at 7": weights, "masters": whole(engine.full_masters())}
    with engine_for(config, WORLD) as engine:
        state = start_or_resume(engine, config, {})
        assert state == RunState(step=KILLED, consumed_samples=KILLED * config.train.global_batch_samples)
        _, seen["resumed losses"] = steps(engine, config, state, LAST)
        seen["resumed masters"] = whole(engine.full_masters())
    return seen


def whole(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors if tensor is not None}


def message(kind: type[Exception], action: Any) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "nothing was raised"


def fails_together(config: Config, rank: int) -> dict[str, Any]:
    """A disk that is full on one rank only, then a gradient that is not finite on rank 1 only."""
    full_rank = 0 if config.zero.stage == 0 else 1  # without ZeRO only data-parallel rank 0 writes engine files
    poison = [1.0]
    original = engine_module.sum_partial_gradients

    def poisoned(model: torch.nn.Module) -> None:
        original(model)
        model.layers[0].mlp.linear_fc1.weight.register_hook(lambda gradient: gradient * poison[0])

    engine_module.sum_partial_gradients = poisoned
    with engine_for(config, WORLD) as engine:
        state, _ = steps(engine, config, RunState(), 5)
        state = state.after_step(0)
        opened = builtins.open
        if rank == full_rank:
            builtins.open = lambda path, *rest, **more: opened(
                "/dev/full" if f"/{layout.ENGINE}/" in str(path) else path, *rest, **more
            )
        said = message(CheckpointError, lambda: save(engine, config, state, data={}, versions={}))
        builtins.open = opened
        left = sorted(path.name for path in layout.checkpoints_folder(config.run.folder).iterdir())
        before = whole(engine.full_masters())
        poison[0] = float("inf") if rank == 1 else 1.0
        nan = message(TrainingError, lambda: steps(engine, config, state, 7))
        after = whole(engine.full_masters())
        poison[0] = 1.0
        same = bool(before) and all(torch.equal(before[name], after[name]) for name in before)
    engine_module.sum_partial_gradients = original
    return {"disk": said, "left": left, "nan": nan, "weights as before": same}


def run_case(rank: int, case: str, folder: str) -> dict[str, Any]:
    start_groups(training_config(**CASES[case]))
    seen = straight_and_resumed(training_config(**CASES[case], run__folder=f"{folder}/{case}"))
    seen["fails"] = fails_together(training_config(**CASES[case], run__folder=f"{folder}/{case} fails"), rank)
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ranks_of(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What both ranks saw of a case, which runs when it is first asked for."""

    @functools.cache
    def of(case: str) -> list[dict[str, Any]]:
        return run_ranks(run_case, WORLD, case, str(folder), timeout_s=200)

    return of


@pytest.fixture
def ranks(case: str, ranks_of: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return ranks_of(case)


@cases
def test_resumed_equals_straight_bitwise(case: str, ranks: list[dict[str, Any]]) -> None:
    seen = ranks[0]
    assert seen["resumed losses"] == seen["losses"][KILLED:]
    assert seen["masters"].keys() == seen["resumed masters"].keys()
    for name, master in seen["masters"].items():
        assert torch.equal(seen["resumed masters"][name], master), name


@cases
def test_weights_file_is_whole_whatever_the_topology(case: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    stored = load_file(folder / case / "checkpoints" / "step_00000007" / layout.WEIGHTS)
    weights = ranks[0]["weights at 7"]
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        assert stored[name].dtype == weight.dtype
        assert torch.equal(stored[name], weight), name


@pytest.mark.usefixtures("one_rank", "ranks")
@pytest.mark.parametrize("case", ["ZeRO 3", "TP 2 + SP, ZeRO 1"])
def test_one_process_reads_the_weights(case: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    """The loss of step 8, before its update, is that of the weights of step 7 in an unsharded model."""
    alone = training_config(**{**CASES[case], "parallel__tensor": 1, "parallel__sequence": False})
    model = build_gpt(alone, device="cpu")
    load_weights(folder / case / "checkpoints" / "step_00000007", model)
    total, count = 0.0, 0
    for batch in micro_batches(alone, KILLED * alone.train.global_batch_samples, "random"):
        bounds = document_bounds(batch.document_start_t, "cpu")
        total += float(model(batch.input_ids_t, batch.labels_t, batch.loss_mask_t, bounds=bounds))
        count += batch.unmasked
    assert total / count == pytest.approx(ranks[0]["losses"][KILLED], rel=1e-5)


@cases
def test_a_disk_that_is_full_on_one_rank_fails_on_all(case: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["fails"] for rank in ranks)
    assert first["disk"] == second["disk"]
    assert "step 6 was not saved" in first["disk"]
    assert "is full" in first["disk"]
    assert first["left"] == ["latest", "step_00000005"]


@cases
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_update(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    assert ranks[0]["fails"]["weights as before"]
    for seen in (rank["fails"] for rank in ranks):
        assert "gradient norm of step 7" in seen["nan"]
        assert "samples 40 to 47" in seen["nan"]

"""What a step refuses, and steps by graphs, on one rank."""

import pytest
import torch

from maha_megatron.errors import TrainingError
from maha_megatron.train import engine as engine_module
from maha_megatron.train.engine import Engine
from maha_megatron.train.guards import StepPlace
from tests.support.graphs import graph_work  # noqa: F401 (a fixture)
from tests.support.one_rank import one_rank  # noqa: F401 (a fixture)
from tests.support.training import engine_for, micro_batches, training_config

PLACE = StepPlace(step=1, first_sample=0, samples=8)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.full_masters()}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights(
    stage: int, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = training_config(model__layers=2, zero__stage=stage, train__micro_batch_samples=4, optimizer__name="adamw")
    with engine_for(config, 1) as engine:
        before, original, calls = masters(engine), engine._loss_sum, []

        def poisoned(batch: object) -> torch.Tensor:
            calls.append(batch)
            return original(batch) * (factor if len(calls) == 2 else 1.0)

        batches = micro_batches(config, 0, "random")
        with monkeypatch.context() as patched:
            patched.setattr(engine, "_loss_sum", poisoned)
            with pytest.raises(TrainingError, match=r"the loss of step 1 is (nan|inf).*micro-batch 2 of 2"):
                engine.step(batches, 1e-2, PLACE)
        after = masters(engine)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    with engine_for(config, 1) as engine:  # the same step without the poison does change them
        engine.step(micro_batches(config, 0, "random"), 1e-2, PLACE)
        assert any(not torch.equal(before[name], now) for name, now in masters(engine).items())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_by_graphs_are_those_without(stage: int, graph_work: list[str]) -> None:  # noqa: F811
    """Of two micro-batches each; between them a validation, and a step that measures the scales' weights."""

    def trained(**changes: object) -> tuple[list, dict[str, torch.Tensor]]:
        config = training_config(
            model__layers=2, zero__stage=stage, train__micro_batch_samples=4, maha__backend="triton", **changes
        )
        with engine_for(config, 1) as engine:
            seen = []
            for number, weights in enumerate((False, True, False)):
                batches = micro_batches(config, 8 * number, "random")
                seen.append(engine.step(batches, 1e-2, PLACE, with_scale_weights=weights))
                seen.append(engine.evaluate([("a", batches[0])]))
            return seen, masters(engine)

    plain, expected = trained()
    assert graph_work == []
    seen, found = trained(train__cuda_graphs=True)
    assert graph_work == ["capture"] + 5 * ["forward", "backward"]  # of one layer; the sixth measured the weights
    assert seen == plain
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.usefixtures("one_rank", "graph_work")
@pytest.mark.parametrize("graphs", [False, True])
def test_norms_are_compiled_where_the_host_has_time(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(engine_module, "compile_pieces", lambda *_, norms: asked.append(norms))
    changes = {"maha__backend": "triton", "train__cuda_graphs": graphs}
    with engine_for(training_config(model__layers=2, train__compile=True, **changes), 1):
        assert asked == [not graphs]

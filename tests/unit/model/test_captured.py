"""Layers that replay graphs, of which tests/support/graphs.py is a stand-in, and what keeps them from it."""

import pytest
import torch

from maha_megatron.errors import EnvironmentMismatch, TrainingError
from maha_megatron.model import captured
from maha_megatron.model.maha_core_attention import MahaCoreAttention
from tests.support.model import random_batch, random_model, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")

BATCH = random_batch(tiny_config(), rows=64, starts=(0, 17, 40))
ONE = ["forward", "backward"]


def test_without_a_device_there_are_no_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentMismatch, match="finds no CUDA device; set"):
        captured.capture_attention(random_model(tiny_config()), 64)


@pytest.mark.usefixtures("graph_work")
def test_what_cannot_be_captured_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured, "_capture_in_order", fail)
    with pytest.raises(EnvironmentMismatch, match=r"be captured \(operation not permitted when .* is capturing\); set"):
        captured.capture_attention(random_model(tiny_config()), 64)


def capturable_model():
    """A tiny model, and its MAHA layer, of which one parameter is frozen."""
    model = random_model(tiny_config())
    layer = next(module for module in model.modules() if isinstance(module, MahaCoreAttention))
    layer.query_gain.requires_grad_(False)
    return model, layer


def loss_and_gradients(model) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss = model(**BATCH._asdict())
    loss.backward()
    return {"loss": loss.detach()} | {name: x.grad for name, x in model.named_parameters()}


def test_gradients_by_graphs_are_those_without(graph_work):
    model, _ = capturable_model()
    expected = loss_and_gradients(model)
    captured.capture_attention(model, 64)
    found = loss_and_gradients(model)
    assert graph_work == ["capture", *ONE]
    frozen = [name for name, x in expected.items() if x is None]
    assert len(frozen) == 1
    assert [name for name, x in found.items() if x is None] == frozen
    assert [name for name in expected.keys() - frozen if not torch.equal(found[name], expected[name])] == []


def test_a_pass_of_another_shape_dtype_or_without_gradients_has_no_graph(graph_work):
    model, layer = capturable_model()
    captured.capture_attention(model, 64)
    query = torch.zeros(64, *layer.query_gain.shape, requires_grad=True)
    assert layer.captured.serves(query)
    assert not layer.captured.serves(query[1:])
    assert not layer.captured.serves(query.double())
    assert not layer.captured.serves(query.detach())
    with torch.no_grad():
        assert not layer.captured.serves(query)
        model(**BATCH._asdict())
    model.collect_scale_weights = True
    loss_and_gradients(model)
    assert graph_work == ["capture"]


def test_buffers_that_another_pass_has_taken_are_an_error(graph_work):
    model, layer = capturable_model()
    captured.capture_attention(model, 64)
    (n, d), (g, _) = layer.query_gain.shape, layer.key_gain.shape
    qkv = [torch.randn(64, heads, d, requires_grad=True) for heads in (n, g, g)]
    first, second = (layer(*qkv, packed_seq_params=BATCH.bounds).sum() for _ in range(2))
    second.backward(retain_graph=True)
    for spent in (first, second):
        with pytest.raises(TrainingError, match="keep one forward pass for one backward pass"):
            spent.backward()
    assert graph_work == ["capture", "forward", *ONE]


def test_a_parameter_that_moved_is_an_error(graph_work):
    model, layer = capturable_model()
    captured.capture_attention(model, 64)
    layer.key_gain.data = layer.key_gain.data.clone()
    with pytest.raises(TrainingError, match="have moved since its CUDA graphs were captured"):
        loss_and_gradients(model)
    assert graph_work == ["capture"]

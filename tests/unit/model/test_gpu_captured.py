"""MAHA layers as CUDA graphs: the same loss and gradients, bit for bit, as without."""

import pytest
import torch

from maha_megatron.errors import TrainingError
from maha_megatron.model.captured import capture_attention
from maha_megatron.model.compiled import compile_pieces
from maha_megatron.model.gpt import Gpt
from maha_megatron.model.maha_core_attention import MahaCoreAttention
from tests.support.gpu import deterministic_algorithms
from tests.support.model import Batch, random_batch, random_model, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]

ROWS = 1024
STARTS = ((0, 512), (0, 300, 301, 777))
CONFIG = tiny_config(
    model__hidden=256,
    model__heads=4,
    model__kv_groups=2,
    model__head_width=64,
    model__ffn_hidden=512,
    model__vocabulary=1000,
    model__layers=3,
    model__attention=("maha", "dense", "maha"),
    model__loss_chunk_tokens=256,
    train__precision="bf16",
    maha__backend="triton",
)


def batches() -> list[Batch]:
    return [random_batch(CONFIG, rows=ROWS, starts=starts, device="cuda") for starts in STARTS]


def loss_and_gradients(model: Gpt, batch: Batch) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every parameter by name: copies, as a graph's own are overwritten."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch._asdict())
    loss.backward()
    return {"loss": loss.detach()} | {name: x.grad.clone() for name, x in model.named_parameters()}


def layers(model: Gpt) -> list[MahaCoreAttention]:
    return [module for module in model.modules() if isinstance(module, MahaCoreAttention)]


def different(model: Gpt, expected: list[dict[str, torch.Tensor]]) -> list[str]:
    found = [loss_and_gradients(model, batch) for batch in batches()]
    pairs = zip(found, expected, strict=True)
    return [name for mine, theirs in pairs for name in theirs if not torch.equal(mine[name], theirs[name])]


def refuse(*_) -> None:
    raise AssertionError("the operator was called, and not its graph")


def test_loss_and_gradients_are_bitwise_those_without_graphs():
    """Of several micro-batches in turn, and again once the parameters have changed in their place."""
    model = random_model(CONFIG, device="cuda")
    # as an optimizer's hooks hold them
    nodes = [x.expand_as(x).grad_fn.next_functions[0][0] for x in model.parameters()]
    with deterministic_algorithms():
        before = [loss_and_gradients(model, batch) for batch in batches()]
        capture_attention(model, ROWS)
        kept = {layer: layer.attend for layer in layers(model)}
        for layer in kept:
            layer.attend = refuse
        assert different(model, before) == []
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        changed = [loss_and_gradients(model, batch) for batch in batches()]
        for layer, attend in kept.items():
            layer.captured, layer.attend = None, attend
        assert different(model, changed) == []
    assert not torch.equal(changed[0]["loss"], before[0]["loss"])
    assert len(nodes) > 0


def test_between_compiled_pieces_too():
    model = random_model(CONFIG, device="cuda")
    compile_pieces(model, torch.device("cuda"))
    with deterministic_algorithms():
        before = [loss_and_gradients(model, batch) for batch in batches()]
        assert different(model, before) == []
        capture_attention(model, ROWS)
        for layer in layers(model):
            layer.attend = refuse
        assert different(model, before) == []


def test_gradients_of_several_micro_batches_add_up():
    model = random_model(CONFIG, device="cuda")

    def summed() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        for batch in batches():
            model(**batch._asdict()).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with deterministic_algorithms():
        expected = summed()
        capture_attention(model, ROWS)
        found = summed()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_other_passes_take_the_kernels_one_by_one():
    model, (batch, _) = random_model(CONFIG, device="cuda"), batches()
    capture_attention(model, ROWS)
    shorter = random_batch(CONFIG, rows=512, starts=(0,), device="cuda")
    assert loss_and_gradients(model, shorter)["loss"].isfinite()
    model.collect_scale_weights = True
    loss_and_gradients(model, batch)
    assert all(layer.scale_weights_l is not None for layer in layers(model))
    for layer in layers(model):
        layer.attend = refuse
    with pytest.raises(AssertionError, match="not its graph"), torch.no_grad():
        model(**batch._asdict())


def test_a_parameter_that_moved_is_an_error():
    model, (batch, _) = random_model(CONFIG, device="cuda"), batches()
    capture_attention(model, ROWS)
    moved = layers(model)[0].query_gain
    moved.data = moved.data.clone()
    with pytest.raises(TrainingError, match="have moved since its CUDA graphs were captured"):
        loss_and_gradients(model, batch)

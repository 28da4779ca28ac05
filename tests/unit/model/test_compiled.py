"""train.compile: the fused pieces compute what the plain ones do, inside the model."""

import pytest
import torch

from maha_megatron.errors import EnvironmentMismatch
from maha_megatron.model import compiled
from maha_megatron.model.gpt import Gpt
from maha_megatron.model.layer_specs import SwiGlu, gated
from maha_megatron.model.loss import PLAIN_PIECES
from tests.support.compiler import needs_compiler
from tests.support.model import random_batch, random_model, relative_difference, tiny_config
from tests.support.training import engine_for, micro_batches, training_config

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")


def results(model: Gpt, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(*batch[:3], bounds=batch.bounds)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@needs_compiler
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_loss_and_every_gradient_are_those_of_the_plain_model(recompute):
    """A padded vocabulary, masked rows, and a last chunk that is shorter than the others."""
    config = tiny_config(train__recompute=recompute)
    batch, model = random_batch(config, rows=64, starts=(0, 21)), random_model(config)
    plain_loss, plain = results(model, batch)
    with torch.no_grad():
        plain_evaluated = model(*batch[:3], bounds=batch.bounds)
    compiled.compile_pieces(model, CPU)
    loss, gradients = results(model, batch)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    differences = {name: relative_difference(gradient, plain[name]) for name, gradient in gradients.items()}
    assert max(differences.values()) < 1e-5, differences
    with torch.no_grad():
        assert model(*batch[:3], bounds=batch.bounds).item() == pytest.approx(plain_evaluated.item(), rel=1e-6)


@needs_compiler
def test_the_key_reaches_the_engine_and_what_it_trains_is_the_same():
    changes = {"model__layers": 2, "zero__stage": 1, "train__micro_batch_samples": 4}
    losses, norms = {}, {}
    for on in (False, True):
        config = training_config(**changes, train__compile=on)
        with engine_for(config, 1) as engine:
            activations = {module.activate for module in engine._inner.module.modules() if isinstance(module, SwiGlu)}
            assert (gated in activations) != on
            losses[on] = engine.accumulate(micro_batches(config, 0, "random"))
            norms[on] = dict(engine.full_gradients())
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert max(relative_difference(norms[True][name], norms[False][name]) for name in norms[True]) < 1e-5


def test_every_piece_is_put_in_place(monkeypatch):
    """Named, so that one which is left out, or put into another's place, is found without a compiler."""

    def named(piece):
        def fused(*arguments):
            return piece(*arguments)

        fused.of = piece
        return fused

    monkeypatch.setattr(compiled, "_fused", named)
    model = random_model(tiny_config())
    compiled.compile_pieces(model, CPU)
    assert {layer.mlp.activate.of for layer in model.layers} == {gated}
    found = model.output.pieces
    for name in ("peaks", "exponentials", "probabilities"):
        assert getattr(found, name).of == getattr(PLAIN_PIECES, name)


def test_a_machine_without_a_compiler_says_what_to_change(monkeypatch):
    def no_compiler(_):
        def failing(_):
            raise RuntimeError("no C++ compiler\nmore")

        return failing

    monkeypatch.setattr(compiled, "_fused", no_compiler)
    with pytest.raises(EnvironmentMismatch, match=r"RuntimeError: no C\+\+ compiler\).*set train.compile: false"):
        compiled.compile_pieces(random_model(tiny_config()), CPU)

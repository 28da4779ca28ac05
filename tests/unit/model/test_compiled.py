"""train.compile: the fused pieces compute what the plain ones do, inside the model."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from maha_megatron.errors import EnvironmentMismatch
from maha_megatron.model import compiled
from maha_megatron.model.gpt import Gpt
from maha_megatron.model.layer_specs import SwiGlu, gated
from maha_megatron.model.loss import PLAIN_PIECES
from maha_megatron.model.norms import RMSNorm, rms_norm, rms_norm_formula
from tests.support.compiler import needs_compiler
from tests.support.model import random_batch, random_model, relative_difference, tiny_config
from tests.support.training import engine_for, micro_batches, training_config

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")


def norms_of(model: torch.nn.Module) -> list[RMSNorm]:
    return [module for module in model.modules() if isinstance(module, RMSNorm)]


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
            activations = {module.activate for module in engine.module.modules() if isinstance(module, SwiGlu)}
            assert (gated in activations) != on
            assert (rms_norm in {norm.normalise for norm in norms_of(engine.module)}) != on
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
    assert [norm.normalise.args[0].of for norm in norms_of(model)] == [rms_norm_formula] * (2 * len(model.layers) + 1)
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


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_norm_is_as_exact_as_torchs(dtype):
    """Against fp64, relative: the rows, their gradient, and the weight's, a sum that bf16 would lose.

    In fp32 the compiler's loop over rows on a CPU sums them one after another, torch in a tree.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    hidden, weight, grad = (torch.randn(shape).to(dtype) for shape in ((1024, 1, 512), (512,), (1024, 1, 512)))

    def of(normalise, *tensors) -> list[torch.Tensor]:
        hidden, weight, grad = (tensor.clone().requires_grad_() for tensor in tensors)
        out = normalise(hidden, weight, 0.5)
        return [out.detach(), *torch.autograd.grad(out, (hidden, weight), grad)]

    exact = of(rms_norm, hidden.double(), weight.double(), grad.double())
    errors = {}
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 512, 0.5)
    compiled.compile_pieces(norm, CPU)
    for name, normalise in (("torch", rms_norm), ("fused", norm.normalise)):
        found = of(normalise, hidden, weight, grad)
        assert {tensor.dtype for tensor in found} == {dtype}
        errors[name] = [relative_difference(*pair) for pair in zip(found, exact, strict=True)]
    rows, of_hidden, of_weight = (fused / plain for fused, plain in zip(errors["fused"], errors["torch"], strict=True))
    assert max(rows, of_hidden) < 1.01, errors
    assert of_weight < 1.01 if dtype == torch.bfloat16 else errors["fused"][2] < 2e-6, errors


def test_training_recomputation_and_validation_stay_far_below_torchs_eight_forms_of_a_function(monkeypatch):
    """The ninth is an error: see compiled.py. Hidden rows as [t, 1, h] would make eight of a norm."""
    forms = Counter()

    def counted(piece):
        def form(graph, _):
            forms[piece] += 1
            return graph

        return torch.compile(piece, fullgraph=True, dynamic=False, backend=form)

    torch.compiler.reset()
    monkeypatch.setattr(compiled, "_fused", counted)
    config = tiny_config(train__recompute="full")
    model = random_model(config)
    compiled.compile_pieces(model, CPU)
    for _ in range(2):
        results(model, random_batch(config, rows=64))
    with torch.no_grad():
        for rows in (64, 48):
            model(**random_batch(config, rows=rows)._asdict())
    assert forms[rms_norm_formula] == 4
    assert forms[gated] == 3


def test_norms_may_stay_torchs_own():
    model = random_model(tiny_config())
    compiled.compile_pieces(model, CPU, norms=False)
    assert {norm.normalise for norm in norms_of(model)} == {rms_norm}
    assert all(module.activate is not gated for module in model.modules() if isinstance(module, SwiGlu))

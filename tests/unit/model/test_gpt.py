"""What a language model must keep: causality, independence of packed documents, the loss of its own logits."""

import pytest
import torch
from torch.nn import functional as F

from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import build_gpt
from maha_megatron.model.init import initialise_parameters
from maha_megatron.model.names import logical_names
from tests.support.model import random_batch, random_model, relative_difference, start_rows, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")
KINDS = {
    "maha": {"model__attention": ("maha",)},
    "hybrid": {"model__tied_embeddings": True},
    "dense": {"model__attention": ("dense",)},
}
ROWS, STARTS = 160, (0, 45, 64, 65)  # the last document spans more than one tile of 64


@pytest.fixture(params=KINDS, scope="module")
def case(request):
    config = tiny_config(**KINDS[request.param])
    return random_model(config), random_batch(config, rows=ROWS, starts=STARTS)


@torch.no_grad()
def leaking_rows(model, batch, rows) -> list[int]:
    """The rows whose token, changed, changes a bit of an earlier row's logits."""
    logits = model.logits(batch.input_ids_t, batch.bounds)
    leaking = []
    for row in rows:
        changed = batch.input_ids_t.clone()
        changed[row] = (changed[row] + 1) % 100
        after = model.logits(changed, batch.bounds)
        assert not torch.equal(after[row], logits[row]), "the change itself must show"
        if not torch.equal(after[:row], logits[:row]):
            leaking.append(row)
    return leaking


def test_no_token_reaches_an_earlier_logit(case):
    """Bitwise, for each row of two whole tiles off the tiles' borders, across documents and block borders."""
    assert leaking_rows(*case, range(16, 144)) == []


@pytest.mark.parametrize("leak", [1e-3, 1e-6])
def test_a_planted_leak_is_found(case, monkeypatch, leak):
    """One part in a million of one later row's values, in one layer, is enough."""
    model, batch = case
    attention = model.layers[0].self_attention.core_attention
    honest = attention.forward

    def leaky(query, key, value, *args, **kwargs):
        return honest(query, key, value, *args, **kwargs) + leak * value[100, 0, 0]

    monkeypatch.setattr(attention, "forward", leaky)
    assert leaking_rows(model, batch, [99, 100, 101]) == [100]


@torch.no_grad()
def test_packed_documents_equal_separate_ones(case):
    model, batch = case
    packed = model.logits(batch.input_ids_t, batch.bounds)
    for start, end in zip(STARTS, (*STARTS[1:], ROWS), strict=True):
        alone = document_bounds(start_rows(end - start, (0,)), "cpu")
        separate = model.logits(batch.input_ids_t[start:end], alone)
        torch.testing.assert_close(packed[start:end], separate, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_changing_a_document_leaves_the_others_bitwise_unchanged(case):
    model, batch = case
    logits = model.logits(batch.input_ids_t, batch.bounds)
    changed = batch.input_ids_t.clone()
    changed[45:64] = (changed[45:64] + 1) % 100
    after = model.logits(changed, batch.bounds)
    assert torch.equal(after[:45], logits[:45])
    assert torch.equal(after[64:], logits[64:])
    assert not torch.equal(after[45:64], logits[45:64])


@torch.no_grad()
def test_the_loss_is_that_of_the_logits(case):
    model, batch = case
    logits = model.logits(batch.input_ids_t, batch.bounds)
    assert logits.shape == (ROWS, 100)
    exact = F.cross_entropy(logits[batch.loss_mask_t], batch.labels_t[batch.loss_mask_t], reduction="sum")
    assert model(*batch).item() == pytest.approx(exact.item(), rel=1e-6)


def test_bf16_follows_fp32():
    batch = random_batch(tiny_config(), rows=ROWS, starts=STARTS)
    exact = initial_model(tiny_config())
    half = initial_model(tiny_config(train__precision="bf16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    exact_loss, half_loss = exact(*batch), half(*batch)
    assert half_loss.dtype == torch.float32
    assert half_loss.item() == pytest.approx(exact_loss.item(), rel=1e-3)
    exact_loss.backward()
    half_loss.backward()
    for (name, parameter), other in zip(logical_names(exact).items(), half.parameters(), strict=True):
        assert relative_difference(other.grad.float(), parameter.grad) < 0.05, name


def initial_model(config):
    model = build_gpt(config, device="cpu")
    initialise_parameters(model, config)
    return model


def test_scale_weights_are_collected_only_when_asked_for():
    config = tiny_config(model__layers=4)
    model, batch = random_model(config), random_batch(config, rows=64)
    model(*batch)
    assert model.scale_weights() == {}
    model.collect_scale_weights = True
    loss = model(*batch)
    collected = model.scale_weights()
    assert list(collected) == [0, 2]
    for mean_l in collected.values():
        assert mean_l.shape == (3,)
        assert not mean_l.requires_grad
        assert mean_l.sum().item() == pytest.approx(1, abs=1e-5)
    model.collect_scale_weights = False
    assert model.scale_weights() == {}
    assert model(*batch) == loss


def test_the_mlp_is_a_swiglu_whose_first_rows_are_the_gate():
    model = random_model(tiny_config())
    mlp, hidden = model.layers[0].mlp, torch.randn(5, 1, 32)
    gate, up = (hidden @ mlp.linear_fc1.weight.t()).split(48, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ mlp.linear_fc2.weight.t()
    out, bias = mlp(hidden)
    assert bias is None
    torch.testing.assert_close(out, expected)

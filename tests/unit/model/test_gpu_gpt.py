"""The model's loss and its gradients on a GPU: bitwise repetition, no waiting for the device."""

import pytest
import torch

from maha_megatron.config.schema import Config
from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import Gpt
from tests.support.gpu import deterministic_algorithms, no_host_synchronisation
from tests.support.model import Batch, random_batch, random_model, start_rows, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]

ROWS = 1024
STARTS = {"equal documents": (0, 512), "packed documents": (0, 300, 301, 777)}
PRECISIONS = ["fp32", "bf16"]


def config(precision: str, **changes: object) -> Config:
    """A hybrid of two layers at a head width that fast kernels take."""
    wide = {
        "model__hidden": 256,
        "model__heads": 4,
        "model__kv_groups": 2,
        "model__head_width": 64,
        "model__ffn_hidden": 512,
        "model__vocabulary": 1000,
        "model__loss_chunk_tokens": 256,
        "train__precision": precision,
    }
    return tiny_config(**(wide | changes))


def loss_and_gradients(model: Gpt, batch: Batch) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every parameter by name, on the device."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch._asdict())
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic_runs_are_bitwise_equal(precision, starts, tied):
    settings = config(precision, model__tied_embeddings=tied)
    model = random_model(settings, device="cuda")
    batch = random_batch(settings, rows=ROWS, starts=starts, device="cuda")
    with deterministic_algorithms():
        first, second = (loss_and_gradients(model, batch) for _ in range(2))
    assert first["loss"].isfinite()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("deterministic", [False, True], ids=["any kernel", "deterministic"])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_forward_and_backward_never_wait_for_the_device(precision, starts, deterministic):
    settings = config(precision)
    model = random_model(settings, device="cuda")
    batch = random_batch(settings, rows=ROWS, starts=starts, device="cuda")
    torch.use_deterministic_algorithms(deterministic)
    try:
        loss_and_gradients(model, batch)  # libraries may wait while they start
        with no_host_synchronisation():
            loss_and_gradients(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)


def test_sending_bounds_never_waits_for_the_device():
    start_t = start_rows(ROWS, STARTS["packed documents"])
    document_bounds(start_t, "cuda")  # the first pinned memory is allocated
    with no_host_synchronisation():
        bounds = document_bounds(start_t, "cuda")
    assert bounds.cu_seqlens_q.tolist() == [*STARTS["packed documents"], ROWS]
    assert torch.equal(bounds.document_start_t.cpu(), start_t)

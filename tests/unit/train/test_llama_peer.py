"""Llama as the peer of our dense model: the same shape, the same optimizer step."""

import pytest
import torch

from maha_megatron.config.accounting import total_parameters
from maha_megatron.errors import ConfigError
from maha_megatron.train.llama_peer import MasterOptimizer, _model, check_comparable, llama_step_s
from tests.support.training import training_config

pytest.importorskip("transformers")


def config(**changes):
    settings = {
        "model__attention": ("dense",),
        "dense__qk_norm": False,
        "dense__convolution": False,
        "data__document_bounds": False,
        "optimizer__name": "adamw",
        "optimizer__clip_norm": 1.0,
        "train__global_batch_samples": 4,
        "train__micro_batch_samples": 2,
    }
    return training_config(**(settings | changes))


@pytest.mark.parametrize("tied", [False, True])
def test_it_has_the_parameters_of_our_plain_model(tied):
    ours = config(model__tied_embeddings=tied)
    llama = _model(ours, torch.device("cpu"))
    assert sum(weight.numel() for weight in llama.parameters()) == total_parameters(ours)


def test_every_step_is_timed():
    taken = llama_step_s(config(), 3, compiled=False)
    assert len(taken) == 3
    assert min(taken) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_step_is_adamw_on_fp32_masters_with_clipping(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5, bias=False).to(dtype)
    settings = config(optimizer__clip_norm=0.1)
    start = model.weight.detach().float().clone()
    optimizer = MasterOptimizer(settings, model)
    gradients = [torch.randn(5, 6).to(dtype) for _ in range(2)]
    for gradient in gradients:
        model.weight.grad = gradient
        optimizer.accumulate()
        assert model.weight.grad is None
    optimizer.step()
    expected = torch.nn.Parameter(start.clone())
    expected.grad = sum(gradient.float() for gradient in gradients)
    torch.nn.utils.clip_grad_norm_([expected], 0.1)
    beta, decay = (settings.optimizer.beta1, settings.optimizer.beta2), settings.optimizer.weight_decay
    options = {"lr": settings.schedule.peak, "betas": beta, "eps": settings.optimizer.epsilon, "weight_decay": decay}
    torch.optim.AdamW([expected], **options).step()
    assert not torch.equal(expected, start)
    torch.testing.assert_close(model.weight, expected.detach().to(dtype), rtol=0, atol=0)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.accumulate()
    assert not any(master.grad.any() for master in optimizer._masters), "gradients start anew"


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"data__document_bounds": True}, 1, "data.document_bounds=false"),
        ({"train__recompute": "selective"}, 1, "train.recompute=none"),
        ({"optimizer__name": "sgd"}, 1, "optimizer.name=adamw"),
        ({}, 2, "one process"),
    ],
)
def test_work_that_differs_is_refused(changes, processes, message):
    check_comparable(config(), 1)
    with pytest.raises(ConfigError, match=message):
        check_comparable(config(**changes), processes)

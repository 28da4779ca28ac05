"""Which parameters decay, and that the configuration wins over a loaded optimizer state."""

import torch

from maha_megatron.config.schema import Optimizer
from maha_megatron.train.loop import due
from maha_megatron.train.optimizer import build_optimizer, set_hyperparameters

SHAPES = {
    "embedding.weight": (8, 4),
    "layers.0.attention_norm.weight": (4,),
    "layers.0.attention.qkv.weight": (8, 4),
    "layers.0.attention.gate_query": (1, 2, 1, 4),
    "layers.0.attention.pool_kernel": (1, 2, 1, 4, 2),
    "layers.0.attention.key_map": (1, 1, 4, 4),
    "layers.0.attention.coupling_raw": (2,),
    "layers.0.attention.skew": (2, 1),
    "layers.0.attention.convolution": (8, 3),
    "layers.0.attention.query_gain": (2, 4),
    "layers.0.mlp.down.weight": (4, 8),
    "final_norm.weight": (4,),
    "output.weight": (8, 4),
}


def parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def test_only_matrices_outside_the_operator_decay() -> None:
    named = parameters()
    names = {id(parameter): name for name, parameter in named.items()}
    optimizer = build_optimizer(Optimizer(weight_decay=0.25), named)
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {name for name in SHAPES if name.endswith(".weight") and "norm" not in name}
    assert decay == {name: 0.25 if name in matrices else 0.0 for name in SHAPES}


def test_a_partitioned_parameter_counts_the_dimensions_of_the_whole() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))  # what ZeRO 3 leaves on a rank
    parameter.ds_shape = torch.Size((8, 4))
    (group,) = build_optimizer(Optimizer(weight_decay=0.25), {"output.weight": parameter}).param_groups
    assert group["weight_decay"] == 0.25


def test_adamw_has_the_configured_settings() -> None:
    settings = Optimizer(beta1=0.8, beta2=0.9, epsilon=1e-6)
    optimizer = build_optimizer(settings, parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


def test_sgd_is_plain() -> None:
    optimizer = build_optimizer(Optimizer(name="sgd"), parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0, 0.0)}


def test_changed_settings_win_over_a_loaded_state() -> None:
    stored = build_optimizer(Optimizer(weight_decay=0.1), parameters()).state_dict()
    optimizer = build_optimizer(Optimizer(weight_decay=0.5, beta2=0.99), parameters())
    optimizer.load_state_dict(stored)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    set_hyperparameters(optimizer.param_groups, Optimizer(weight_decay=0.5, beta2=0.99))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}


def test_due_at_multiples_and_at_the_end() -> None:
    assert [step for step in range(1, 8) if due(step, 3, last_step=7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(step, 0, last_step=7)] == [7]

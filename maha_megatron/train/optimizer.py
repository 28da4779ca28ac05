"""The torch optimizer that DeepSpeed wraps, and which parameters decay."""

from collections.abc import Mapping
from typing import Any

import torch

from maha_megatron.config.schema import Optimizer
from maha_megatron.model.init import decays_weight


def hyperparameters(settings: Optimizer, *, decays: bool) -> dict[str, Any]:
    """What one parameter group is told, apart from the learning rate, which is set before every step."""
    if settings.name == "sgd":
        return {"weight_decay": 0.0}
    return {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay if decays else 0.0,
    }


def build_optimizer(settings: Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused on a GPU) or plain SGD with a decaying and a non-decaying group.

    Args:
        settings: the configuration's optimizer part.
        parameters: local parameters by logical name; the order of both groups follows it.
    """
    groups = []
    for decays in (True, False):
        members = [value for name, value in parameters.items() if decays_weight(name, _ndim(value)) == decays]
        groups.append({"params": members, "decays": decays, **hyperparameters(settings, decays=decays)})
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, fused=torch.cuda.is_available())


def set_hyperparameters(groups: list[dict[str, Any]], settings: Optimizer) -> None:
    """Let the configuration win over what a checkpoint's optimizer state brought along."""
    for group in groups:
        group.update(hyperparameters(settings, decays=group["decays"]))


def _ndim(parameter: torch.nn.Parameter) -> int:
    """Dimensions of the whole parameter, also while ZeRO 3 has it partitioned into a flat piece."""
    return len(getattr(parameter, "ds_shape", parameter.shape))

"""megatron-core's own configuration object, made from the project's."""

import dataclasses
import warnings

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from maha_megatron.config.render_mcore import transformer_config_fields
from maha_megatron.config.schema import Config
from maha_megatron.errors import EnvironmentMismatch


def build_transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's view of the configuration, from fields that the installed release knows."""
    fields = transformer_config_fields(config)
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(TransformerConfig)})
    if unknown:
        raise EnvironmentMismatch(
            f"the installed megatron-core has no TransformerConfig field {', '.join(unknown)}: "
            "install a release from 0.16.1 up to, not including, 0.20"
        )
    fields["params_dtype"] = getattr(torch, fields["params_dtype"])
    fields["activation_func"] = getattr(F, fields["activation_func"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="full scope is deprecated")  # of a default of its own, on every build
        # weights are drawn by logical name (init.py); megatron-core only allocates them
        return TransformerConfig(**fields, init_method=_leave_undrawn, output_layer_init_method=_leave_undrawn)


def _leave_undrawn(weight: torch.Tensor) -> torch.Tensor:
    return weight

"""What the operator needs beside its inputs: numbers (MahaSpec, DenseSpec) and learned tensors (AttentionParameters).

Nothing here knows a configuration file, a process group or a device. Letters: n query heads, g KV groups, d head width,
L scales, r ratio; under tensor parallelism n and g are the local ones, and every tensor below is a slice along them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class MahaSpec:
    ratio: int
    windows: tuple[int, ...]
    downsampling: str = "gated"
    lse_utility: bool = True
    convolution: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6

    @property
    def scales(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    qk_norm: bool = True
    convolution: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One learned tensor: its shape, the dimension that tensor parallelism slices, and its constant start value."""

    shape: tuple[int, ...]
    sharded_dim: int
    start: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionParameters:
    """Learned tensors of one attention layer; None where the spec has none.

    Shapes: gate_query [L-1, 2, g, d], gate_bias [L-1, 2, g, r] (axis of 2: 0 = K, 1 = V), utility_query rho [L, n, d],
    utility_bias beta [L, n], query_gain [n, d], key_gain [g, d], convolution [(n + 2g) d, 3] with channels per KV
    group in the order: its query heads, its key, its value.
    """

    gate_query: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    utility_query: torch.Tensor | None = None
    utility_bias: torch.Tensor | None = None
    query_gain: torch.Tensor | None = None
    key_gain: torch.Tensor | None = None
    convolution: torch.Tensor | None = None


def maha_parameter_specs(spec: MahaSpec, *, n: int, g: int, d: int) -> dict[str, ParameterSpec]:
    """Learned tensors of a MAHA layer by name, all inert at the start: gates pool to the mean, utilities are 0."""
    scales = spec.scales
    specs = {}
    if spec.downsampling == "gated" and scales > 1:
        specs["gate_query"] = ParameterSpec(shape=(scales - 1, 2, g, d), sharded_dim=2)
        specs["gate_bias"] = ParameterSpec(shape=(scales - 1, 2, g, spec.ratio), sharded_dim=2)
    if scales > 1:
        specs["utility_query"] = ParameterSpec(shape=(scales, n, d), sharded_dim=1)
        specs["utility_bias"] = ParameterSpec(shape=(scales, n), sharded_dim=1)
    return specs | _shared_parameter_specs(spec.convolution, qk_norm=True, n=n, g=g, d=d)


def dense_parameter_specs(spec: DenseSpec, *, n: int, g: int, d: int) -> dict[str, ParameterSpec]:
    """Learned tensors of a dense layer by name."""
    return _shared_parameter_specs(spec.convolution, qk_norm=spec.qk_norm, n=n, g=g, d=d)


def _shared_parameter_specs(convolution: bool, *, qk_norm: bool, n: int, g: int, d: int) -> dict[str, ParameterSpec]:
    specs = {}
    if qk_norm:
        specs["query_gain"] = ParameterSpec(shape=(n, d), sharded_dim=0, start=1.0)
        specs["key_gain"] = ParameterSpec(shape=(g, d), sharded_dim=0, start=1.0)
    if convolution:
        specs["convolution"] = ParameterSpec(shape=((n + 2 * g) * d, 3), sharded_dim=0)
    return specs

"""What the operator needs beside its inputs: numbers (MahaSpec, DenseSpec) and learned tensors (AttentionParameters).

Nothing here knows a configuration file, a process group or a device. Letters: n query heads, g KV groups, d head width,
L scales, r ratio; under tensor parallelism n and g are the local ones, and every tensor below is a slice along them.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields

import torch

from maha_megatron.errors import ConfigError, ProgramError
from maha_megatron.scales import stride

COUPLING_AT_START = 0.1

# The one table of choices of the operator; config/schema.py offers the same (a test holds the two equal).
CHOICES = {
    "downsampling": ("gated", "conv", "mean", "max"),
    "queries": ("full", "pooled"),
    "aggregation": ("convex", "nash", "mean", "program"),
    "regularizer": ("entropy", "quadratic"),
    "coupling": ("none", "gram"),
    "rope_unit": ("block", "token"),
}
# aggregation -> what it does not read, and why; config/rules.py refuses the same
NOT_READ = {
    "convex": (("program",), "only aggregation: program runs it"),
    "nash": (("program",), "only aggregation: program runs it"),
    "mean": (("regularizer", "coupling", "lse_utility", "program"), "equal weights depend on nothing"),
    "program": (("regularizer",), "the program states its own"),
}


def absent_program(*_, **__) -> None:
    """Stands for the program of a spec whose shapes alone matter (counts, initial values, a model on "meta")."""
    raise ProgramError(
        "this layer was built with absent_program, for its shapes alone: give its MahaSpec the program to run it"
    )


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Every row and KV group opens its `blocks` best blocks of `from_scale`, and reads their keys of `to_scale`."""

    from_scale: int
    to_scale: int
    blocks: int


@dataclass(frozen=True, kw_only=True)
class MahaSpec:
    """The numbers of a MAHA layer; README.md of this folder says what each means, CHOICES what a name may be.

    `program`, for aggregation "program", is a StatedProgram (aggregation/stated_program.py), a function that is called
    like one, or `absent_program` where nothing will be solved. `refine`: of a refined layer, None elsewhere.

    Raises:
        ConfigError: there is no such choice; an option without effect beside the aggregation; a program is missing; a
            refinement between scales that are not there, of pooled queries or beside a stated program.
    """

    ratio: int
    windows: tuple[int, ...]
    downsampling: str = "gated"
    key_map: bool = False
    queries: str = "full"
    aggregation: str = "convex"
    regularizer: str = "entropy"
    coupling: str = "none"
    program: Callable | None = None
    lse_utility: bool = True
    convolution: bool = True
    rope_base: float = 10000.0
    rope_unit: str = "block"
    norm_epsilon: float = 1e-6
    refine: Refinement | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                choices = ", ".join(f'"{choice}"' for choice in known)
                raise ConfigError(f"{name}={getattr(self, name)!r} is none of the choices; use one of {choices}")
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        names, why = NOT_READ[self.aggregation]
        unused = [name for name in names if getattr(self, name) != defaults[name]]
        if unused:
            raise ConfigError(
                f'{", ".join(unused)}: no effect with aggregation="{self.aggregation}" ({why}); remove, or use '
                "another aggregation"
            )
        if self.aggregation == "program" and self.program is None:
            raise ConfigError(
                'aggregation="program" needs program: a StatedProgram, or absent_program where only shapes matter'
            )
        if (self.queries, self.rope_unit) == ("pooled", "token"):
            raise ConfigError('rope_unit="token" does not go with pooled queries: use rope_unit="block"')
        if self.refine is not None:
            self._check_refinement(self.refine)

    def _check_refinement(self, refine: Refinement) -> None:
        if not (0 <= refine.to_scale < refine.from_scale < self.scales and refine.blocks > 0):
            raise ConfigError(
                f"{refine} of {self.scales} scales: it needs 0 <= to_scale < from_scale <= {self.scales - 1} and at "
                "least one block"
            )
        if self.queries == "pooled":
            raise ConfigError('pooled queries open no blocks: use queries="full", or no refine')
        if self.aggregation == "program":
            raise ConfigError(
                "a stated program counts on the finest scales being the feasible ones, and opened keys are none of "
                "them: use another aggregation, or no refine"
            )

    @property
    def scales(self) -> int:
        return len(self.windows)

    @property
    def rotary_ratio(self) -> int:
        """By how much rotary positions of a scale are coarser than the next finer one's; 1 where all count tokens."""
        return self.ratio if self.rope_unit == "block" else 1

    def rotary_stride(self, scale: int) -> int:
        """Rows that make one step of a scale's rotary positions; a block stands where its last row does."""
        return stride(self.rotary_ratio, scale)

    @property
    def branches(self) -> int:
        """What is fused: the scales and, last, opened keys where there are any."""
        return self.scales + (self.refine is not None)

    @property
    def held_entries(self) -> tuple[int, ...]:
        """Newest blocks of each scale that rows to come may read: its window, or all that they may still open."""
        held = list(self.windows)
        if self.refine is not None:
            children = self.ratio ** (self.refine.from_scale - self.refine.to_scale)
            openable = children * (self.windows[self.refine.from_scale] + 1) - 1
            held[self.refine.to_scale] = max(held[self.refine.to_scale], openable)
        return tuple(held)

    @property
    def joint_softmax(self) -> bool:
        """Whether the weights are a softmax of the utilities: entropy without coupling, where no O_l is ever needed."""
        return (self.aggregation, self.regularizer, self.coupling) == ("convex", "entropy", "none")


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    qk_norm: bool = True
    convolution: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """One learned tensor: its shape, the dimension that tensor parallelism slices, and how it starts.

    It starts as the constant `start`, or with `identity` as identity matrices over its last two dimensions.
    """

    shape: tuple[int, ...]
    sharded_dim: int
    start: float = 0.0
    identity: bool = False

    def initial(self) -> torch.Tensor:
        """The start value, fp32 on the CPU."""
        if self.identity:
            return torch.eye(self.shape[-1]).expand(self.shape).clone()
        return torch.full(self.shape, self.start)


@dataclass(frozen=True, kw_only=True)
class AttentionParameters:
    """Learned tensors of one attention layer; None where the spec has none.

    Shapes: gate_query [L-1, 2, g, d], gate_bias [L-1, 2, g, r] (axis of 2: 0 = K, 1 = V), pool_kernel
    [L-1, 2, g, d, r], key_map [L-1, g, d, d] (mapped = key_map @ key), utility_query rho [L, n, d], utility_bias beta
    [L, n], coupling_raw [n] (kappa = softplus), skew [n, L (L-1) / 2] (upper triangle in row order), query_gain [n, d],
    key_gain [g, d], convolution [(n + 2g) d, 3] with channels per KV group in the order: its query heads, its key, its
    value. In a refined layer rho, beta and skew count the opened keys as one more scale, the last.
    """

    gate_query: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    pool_kernel: torch.Tensor | None = None
    key_map: torch.Tensor | None = None
    utility_query: torch.Tensor | None = None
    utility_bias: torch.Tensor | None = None
    coupling_raw: torch.Tensor | None = None
    skew: torch.Tensor | None = None
    query_gain: torch.Tensor | None = None
    key_gain: torch.Tensor | None = None
    convolution: torch.Tensor | None = None


def maha_parameter_specs(spec: MahaSpec, *, n: int, g: int, d: int) -> dict[str, ParameterSpec]:
    """Learned tensors of a MAHA layer by name.

    Most start inert: blocks are means of their children, key maps the identity, utilities and the game 0. The coupling
    starts at COUPLING_AT_START.
    """
    scales = spec.scales
    shared = _shared_parameter_specs(spec.convolution, qk_norm=True, n=n, g=g, d=d)
    if scales == 1:
        return shared
    specs = {}
    if spec.downsampling == "gated":
        specs["gate_query"] = ParameterSpec(shape=(scales - 1, 2, g, d), sharded_dim=2)
        specs["gate_bias"] = ParameterSpec(shape=(scales - 1, 2, g, spec.ratio), sharded_dim=2)
    if spec.downsampling == "conv":
        kernel = (scales - 1, 2, g, d, spec.ratio)
        specs["pool_kernel"] = ParameterSpec(shape=kernel, sharded_dim=2, start=1 / spec.ratio)
    if spec.key_map:
        specs["key_map"] = ParameterSpec(shape=(scales - 1, g, d, d), sharded_dim=1, identity=True)
    branches = spec.branches
    if spec.aggregation != "mean":
        specs["utility_query"] = ParameterSpec(shape=(branches, n, d), sharded_dim=1)
        specs["utility_bias"] = ParameterSpec(shape=(branches, n), sharded_dim=1)
    if spec.coupling == "gram":
        raw = math.log(math.expm1(COUPLING_AT_START))
        specs["coupling_raw"] = ParameterSpec(shape=(n,), sharded_dim=0, start=raw)
    if spec.aggregation == "nash":
        specs["skew"] = ParameterSpec(shape=(n, branches * (branches - 1) // 2), sharded_dim=0)
    return specs | shared


def every_parameter_spec() -> dict[str, ParameterSpec]:
    """One ParameterSpec for every field of AttentionParameters, at the smallest sizes: for what no size decides."""
    every = {}
    for downsampling in ("gated", "conv"):
        spec = MahaSpec(
            ratio=2, windows=(1, 1), downsampling=downsampling, key_map=True, aggregation="nash", coupling="gram"
        )
        every |= maha_parameter_specs(spec, n=1, g=1, d=2)
    return every


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

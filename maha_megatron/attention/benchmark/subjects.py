"""What is measured: the operator, its peers, and the inputs that all of them read.

Every subject is one forward and backward pass from raw q, k, v to their gradients and those of its learned tensors.

    maha     convolution if asked for, normalisation, rotation, pyramid, attention, aggregation
    window   the same operator with one scale: a causal sliding window of as many keys as all windows of maha together
    sdpa     torch's scaled_dot_product_attention, causal, on bare q, k, v: less work than a dense layer does, so that
             the comparison favours it; with the convolution in front of it if that is asked for
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.dispatch import backend as backend_named
from maha_megatron.attention.spec import (
    AttentionParameters,
    DenseSpec,
    MahaSpec,
    ParameterSpec,
    dense_parameter_specs,
    maha_parameter_specs,
)
from maha_megatron.scales import default_windows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One benchmark: everything but the subject, the length and the dtype. Plain data, so that a process can get it.

    `spec_at` gives `operator` its windows: `windows`, or the default ones of each length.
    """

    operator: MahaSpec
    heads: int = 8
    groups: int = 8
    width: int = 64
    windows: tuple[int, ...] = ()
    backend: str = "eager"
    device: str = "cpu"
    threads: int = 0

    def spec_at(self, rows: int) -> MahaSpec:
        """The operator for one document of `rows` rows."""
        return replace(self.operator, windows=self.windows or default_windows(rows, self.operator.ratio))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Raw q [t, n, d], k and v [t, g, d] as leaves, and the gradient of the output [t, n, d]."""

    q_tnd: torch.Tensor
    k_tgd: torch.Tensor
    v_tgd: torch.Tensor
    grad_tnd: torch.Tensor
    document_start_t: torch.Tensor

    def leaves(self) -> dict[str, torch.Tensor]:
        return {"q": self.q_tnd, "k": self.k_tgd, "v": self.v_tgd}


def draw_inputs(setting: Setting, rows: int, dtype: torch.dtype, document_rows: int | None = None) -> Inputs:
    """Random inputs of `rows` rows in documents of `document_rows` (default: one); the same for every subject."""
    generator = torch.Generator().manual_seed(rows)
    shapes = {"q_tnd": setting.heads, "k_tgd": setting.groups, "v_tgd": setting.groups, "grad_tnd": setting.heads}
    drawn = {name: torch.randn(rows, heads, setting.width, generator=generator) for name, heads in shapes.items()}
    tensors = {
        name: value.to(setting.device, dtype).requires_grad_(name != "grad_tnd") for name, value in drawn.items()
    }
    row = torch.arange(rows, dtype=torch.int32, device=setting.device)
    return Inputs(**tensors, document_start_t=row - row % (document_rows or rows))


def draw_parameters(specs: dict[str, ParameterSpec], setting: Setting, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Learned tensors, all of them random: what starts inert would be measured and checked as if it were not there."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (spec.initial() + 0.3 * torch.randn(spec.shape, generator=generator))
        .to(setting.device, dtype)
        .requires_grad_()
        for name, spec in specs.items()
    }


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One subject on one set of inputs, ready to run."""

    forward: Callable[[], torch.Tensor]
    inputs: Inputs
    parameters: dict[str, torch.Tensor]

    def __call__(self) -> None:
        """Forward and backward; gradients are dropped, as an optimizer drops them after its step."""
        self.forward().backward(self.inputs.grad_tnd)
        for leaf in (*self.inputs.leaves().values(), *self.parameters.values()):
            leaf.grad = None

    def results(self) -> dict[str, torch.Tensor]:
        """Output and every gradient by name."""
        out = self.forward()
        leaves = self.inputs.leaves() | self.parameters
        grads = torch.autograd.grad(out, list(leaves.values()), self.inputs.grad_tnd, materialize_grads=True)
        return {"out": out.detach()} | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def maha(setting: Setting, inputs: Inputs, spec: MahaSpec | None = None) -> Pass:
    """The operator of the setting, or of another spec, on its backend."""
    spec = spec or setting.spec_at(len(inputs.q_tnd))
    shapes = maha_parameter_specs(spec, n=setting.heads, g=setting.groups, d=setting.width)
    parameters = draw_parameters(shapes, setting, inputs.q_tnd.dtype)

    def forward() -> torch.Tensor:
        tensors = (*inputs.leaves().values(), inputs.document_start_t)
        return maha_attention(*tensors, AttentionParameters(**parameters), spec, backend=setting.backend).out_tnd

    return Pass(forward=forward, inputs=inputs, parameters=parameters)


def window(setting: Setting, inputs: Inputs) -> Pass:
    """A sliding window of as many keys as the windows of `maha` have at this length."""
    spec = setting.spec_at(len(inputs.q_tnd))
    plain = MahaSpec(ratio=spec.ratio, windows=(sum(spec.windows),), convolution=spec.convolution)
    return maha(setting, inputs, plain)


def sdpa(setting: Setting, inputs: Inputs) -> Pass:
    """torch's causal attention over one document."""
    convolution = setting.operator.convolution
    spec = DenseSpec(qk_norm=False, convolution=convolution)
    shapes = dense_parameter_specs(spec, n=setting.heads, g=setting.groups, d=setting.width)
    parameters = draw_parameters(shapes, setting, inputs.q_tnd.dtype)

    def forward() -> torch.Tensor:
        q, k, v = inputs.leaves().values()
        if convolution:
            convolve = backend_named(setting.backend).convolve
            q, k, v = convolve(q, k, v, inputs.document_start_t, parameters["convolution"])
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=setting.heads != setting.groups)
        return out[0].transpose(0, 1)

    return Pass(forward=forward, inputs=inputs, parameters=parameters)


SUBJECTS: dict[str, Callable[[Setting, Inputs], Pass]] = {"maha": maha, "window": window, "sdpa": sdpa}
OURS, WINDOW, DENSE = SUBJECTS

"""What is measured: the operator, its peers, and the inputs that all of them read.

Every subject is one forward and backward pass from raw q, k, v to their gradients and those of its learned tensors.

    maha     convolution if asked for, normalisation, rotation, pyramid, attention, aggregation
    window   the same operator with one scale: a causal sliding window of as many keys as all windows of maha together
    sdpa     torch's scaled_dot_product_attention, causal, on bare q, k, v: less work than a dense layer does, so that
             the comparison favours it; with the convolution in front of it if that is asked for
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_SHORTEST_DOCUMENT = 64  # times shorter than the longest possible one


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One benchmark: everything but the subject, the length and the dtype. Plain data, so that a process can get it.

    `spec_at` gives `operator` its windows: `windows`, or the default ones of each length. A call has as many documents
    of a length as fit into `call_rows` rows, or one where it is longer; with `mixed`, documents of at most that length.
    """

    operator: MahaSpec
    heads: int = 8
    groups: int = 8
    width: int = 64
    windows: tuple[int, ...] = ()
    backend: str = "eager"
    device: str = "cpu"
    threads: int = 0
    call_rows: int = 0
    mixed: bool = False

    def spec_at(self, length: int) -> MahaSpec:
        """The operator for documents of up to `length` rows."""
        return replace(self.operator, windows=self.windows or default_windows(length, self.operator.ratio))

    def documents_at(self, length: int) -> tuple[int, ...]:
        """Rows of every document of a call."""
        if self.mixed:
            return mixed_lengths(max(length, self.call_rows), length)
        return (length,) * max(self.call_rows // length, 1)


def mixed_lengths(rows: int, longest: int) -> tuple[int, ...]:
    """Documents that fill `rows`: lengths from longest / 64 to `longest`, their logarithms uniform, the last one cut.

    The same for the same numbers.
    """
    generator = torch.Generator().manual_seed(longest)
    lengths: list[int] = []
    while (left := rows - sum(lengths)) > 0:
        drawn = longest * _SHORTEST_DOCUMENT ** -torch.rand((), generator=generator).item()
        lengths.append(min(max(round(drawn), 1), left))
    return tuple(lengths)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Raw q [t, n, d], k and v [t, g, d] as leaves, and the gradient of the output [t, n, d], of packed documents.

    length: the one whose windows the operator has; no document is longer.
    """

    q_tnd: torch.Tensor
    k_tgd: torch.Tensor
    v_tgd: torch.Tensor
    grad_tnd: torch.Tensor
    document_start_t: torch.Tensor
    document_lengths: tuple[int, ...]
    length: int

    def leaves(self) -> dict[str, torch.Tensor]:
        return {"q": self.q_tnd, "k": self.k_tgd, "v": self.v_tgd}

    def to(self, device: str, dtype: torch.dtype) -> "Inputs":
        """The same numbers elsewhere, as leaves of their own."""
        moved = {
            name: x.detach().to(device, dtype).requires_grad_()
            for name, x in zip(_NAMES, self.leaves().values(), strict=True)
        }
        grad = self.grad_tnd.to(device, dtype)
        return replace(self, **moved, grad_tnd=grad, document_start_t=self.document_start_t.to(device))


_NAMES = ("q_tnd", "k_tgd", "v_tgd")


def draw_inputs(
    setting: Setting, length: int, dtype: torch.dtype, document_lengths: Sequence[int] | None = None
) -> Inputs:
    """Random inputs of the documents of a call (default: the setting's), drawn on its device; every subject's alike."""
    lengths = tuple(document_lengths or setting.documents_at(length))
    rows, device = sum(lengths), setting.device
    generator = torch.Generator(device).manual_seed(rows)
    shapes = {"q_tnd": setting.heads, "k_tgd": setting.groups, "v_tgd": setting.groups, "grad_tnd": setting.heads}
    drawn = {
        name: torch.randn(rows, heads, setting.width, generator=generator, device=device).to(dtype)
        for name, heads in shapes.items()
    }
    for name in _NAMES:
        drawn[name].requires_grad_()
    rows_each = torch.tensor(lengths)
    starts = (rows_each.cumsum(0) - rows_each).repeat_interleave(rows_each).to(device, torch.int32)
    return Inputs(**drawn, document_start_t=starts, document_lengths=lengths, length=length)


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
        self.backward(self.forward())

    def backward(self, out: torch.Tensor) -> None:
        out.backward(self.inputs.grad_tnd)
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
    spec = spec or setting.spec_at(inputs.length)
    shapes = maha_parameter_specs(spec, n=setting.heads, g=setting.groups, d=setting.width)
    parameters = draw_parameters(shapes, setting, inputs.q_tnd.dtype)

    def forward() -> torch.Tensor:
        tensors = (*inputs.leaves().values(), inputs.document_start_t)
        return maha_attention(*tensors, AttentionParameters(**parameters), spec, backend=setting.backend).out_tnd

    return Pass(forward=forward, inputs=inputs, parameters=parameters)


def window(setting: Setting, inputs: Inputs, keys: int | None = None) -> Pass:
    """A sliding window of `keys` keys; default: as many as the windows of `maha` have at this length."""
    spec = setting.spec_at(inputs.length)
    plain = MahaSpec(ratio=spec.ratio, windows=(keys or sum(spec.windows),), convolution=spec.convolution)
    return maha(setting, inputs, plain)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(setting: Setting, inputs: Inputs, attend: Attend) -> Pass:
    """`attend` (q [t, n, d], k and v [t, g, d] to [t, n, d]) on bare inputs, behind the convolution if that is on."""
    convolution = setting.operator.convolution
    spec = DenseSpec(qk_norm=False, convolution=convolution)
    shapes = dense_parameter_specs(spec, n=setting.heads, g=setting.groups, d=setting.width)
    parameters = draw_parameters(shapes, setting, inputs.q_tnd.dtype)

    def forward() -> torch.Tensor:
        q, k, v = inputs.leaves().values()
        if convolution:
            convolve = backend_named(setting.backend).convolve
            q, k, v = convolve(q, k, v, inputs.document_start_t, parameters["convolution"])
        return attend(q, k, v)

    return Pass(forward=forward, inputs=inputs, parameters=parameters)


def causal(inputs: Inputs, q_tnd: torch.Tensor, k_tgd: torch.Tensor, v_tgd: torch.Tensor) -> torch.Tensor:
    """torch's causal attention over documents of one length."""
    assert len(set(inputs.document_lengths)) == 1, "documents of several lengths are no batch"
    batch = (len(inputs.document_lengths), inputs.document_lengths[0])
    q, k, v = (x.unflatten(0, batch).transpose(1, 2) for x in (q_tnd, k_tgd, v_tgd))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def sdpa(setting: Setting, inputs: Inputs) -> Pass:
    """torch's causal attention with the kernel of its own choice."""
    return dense(setting, inputs, partial(causal, inputs))


Subject = Callable[[Setting, Inputs], Pass]
SUBJECTS: dict[str, Subject] = {"maha": maha, "window": window, "sdpa": sdpa}
OURS, WINDOW, DENSE = SUBJECTS

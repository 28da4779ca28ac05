"""MAHA layers as CUDA graphs: what the host does for a layer is one replay a pass, in place of some forty launches.

A small model's layer runs for less time than the host takes to launch its kernels one by one. Forward and backward are
captured once, for the shape of a training micro-batch, after two passes that compile them. A graph reads and writes
buffers of its own: queries, keys, values and gradients are copied in. Parameters are read where they lie; should
something have moved them, that is an error and not a run on old weights.

Validation, generation and the pass that measures the scales' weights take the kernels one by one, as without graphs:
the same kernels on the same numbers.
"""

import contextlib
from collections.abc import Sequence

import torch

from maha_megatron.attention.spec import AttentionParameters
from maha_megatron.errors import EnvironmentMismatch, TrainingError
from maha_megatron.model.maha_core_attention import MahaCoreAttention

_PASSES_BEFORE = 2  # compile kernels, fill caches
# other threads go on: one sends batches, NCCL's looks at its events
_ONLY_THIS_THREAD = "thread_local"


class CapturedAttention:
    """One layer's graphs, called in place of the operator.

    Args:
        layer: its parameters are read where they lie.
        rows: of a training pass.
        grad_out: [rows, n, d], may be shared by layers: a graph reads it at once.
    """

    def __init__(self, layer: MahaCoreAttention, rows: int, grad_out: torch.Tensor) -> None:
        (n, d), (g, _) = layer.query_gain.shape, layer.key_gain.shape
        like = {"dtype": layer.query_gain.dtype, "device": layer.query_gain.device}
        self._layer, self._grad_out = layer, grad_out
        self._qkv = [torch.zeros(rows, heads, d, **like).requires_grad_() for heads in (n, g, g)]
        self._start_t = torch.zeros(rows, dtype=torch.int32, device=like["device"])
        named = dict(layer.named_parameters())
        self._parameters = list(named.values())
        # the same memory under leaves of the graphs' own: an optimizer's hooks hold the parameters' nodes to the
        # default stream, which must not be drawn into a capture
        self._leaves = {name: parameter.detach().requires_grad_() for name, parameter in named.items()}
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        self._graphs = (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
        self._out: torch.Tensor | None = None
        self._grads: Sequence[torch.Tensor] = ()
        self._passes = 0  # forward ones and backward ones, to tell whose numbers the buffers hold

    def forward(self) -> None:
        """The operator on the graphs' own buffers."""
        learned = AttentionParameters(**self._leaves)
        self._out = self._layer.attend(*self._qkv, self._start_t, learned).out_tnd

    def backward(self) -> None:
        """Its gradients, of queries, keys, values and parameters."""
        self._grads = torch.autograd.grad(self._out, [*self._qkv, *self._leaves.values()], self._grad_out)

    def capture(self, *, backward: bool, pool: tuple[int, int]) -> None:
        graph = self._graphs[backward]
        graph.capture_begin(pool=pool, capture_error_mode=_ONLY_THIS_THREAD)
        try:
            (self.backward if backward else self.forward)()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # says only that there was an error
                graph.capture_end()
            raise
        graph.capture_end()

    def serves(self, query: torch.Tensor) -> bool:
        """Whether this is a training pass of the shape that was captured."""
        same = (query.shape, query.dtype) == (self._grad_out.shape, self._grad_out.dtype)
        return same and query.requires_grad and torch.is_grad_enabled()

    def __call__(self, query, key, value, document_start_t) -> torch.Tensor:
        """[t, n, d] in query's dtype; overwritten by the layer's next pass.

        Raises:
            TrainingError: a parameter is no longer where it was when the graphs were captured.
        """
        if [parameter.data_ptr() for parameter in self._parameters] != self._addresses:
            raise TrainingError(
                "parameters of a MAHA layer have moved since its CUDA graphs were captured; set "
                "train.cuda_graphs: false"
            )
        return _Replay.apply(self, document_start_t, query, key, value, *self._parameters)

    def replay_forward(self, document_start_t: torch.Tensor, qkv: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The output, and which pass it is of."""
        for mine, given in zip((self._start_t, *self._qkv), (document_start_t, *qkv), strict=True):
            mine.copy_(given)
        self._graphs[0].replay()
        self._passes += 1
        return self._out.detach(), self._passes

    def replay_backward(self, grad_out: torch.Tensor, forward_pass: int) -> Sequence[torch.Tensor]:
        """Of queries, keys, values and parameters; overwritten by the layer's next pass.

        They stay referred to here, so that autograd copies a parameter's and does not take the buffer for its .grad.

        Raises:
            TrainingError: another pass has written over what `forward_pass` kept for this one.
        """
        if forward_pass != self._passes:
            raise TrainingError(
                "a MAHA layer's CUDA graphs keep one forward pass for one backward pass, and another came between; set "
                "train.cuda_graphs: false"
            )
        self._passes += 1
        self._grad_out.copy_(grad_out)
        self._graphs[1].replay()
        return self._grads


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured: CapturedAttention, document_start_t, *tensors):
        ctx.captured = captured
        out_tnd, ctx.forward_pass = captured.replay_forward(document_start_t, tensors[:3])
        return out_tnd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        return None, None, *ctx.captured.replay_backward(grad_out, ctx.forward_pass)


def capture_attention(model: torch.nn.Module, rows: int) -> None:
    """Let every MAHA layer of the model, refined ones aside, replay CUDA graphs in training passes of `rows` rows.

    Call it when the optimizer has given the parameters their place. A layer's buffers are its rows, which it would
    keep for backward anyway, and the gradients of queries, keys and values.

    Raises:
        EnvironmentMismatch: there is no CUDA device, or an operation of a layer cannot be captured.
    """
    maha = [module for module in model.modules() if isinstance(module, MahaCoreAttention)]
    layers = [layer for layer in maha if layer.spec.refine is None]
    if not torch.cuda.is_available():
        raise EnvironmentMismatch("train.cuda_graphs: torch finds no CUDA device; set train.cuda_graphs: false")
    grad_out = layers[0].query_gain.new_zeros(rows, *layers[0].query_gain.shape)
    captured = [CapturedAttention(layer, rows, grad_out) for layer in layers]
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            _capture_in_order(captured)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise EnvironmentMismatch(
            f"train.cuda_graphs: a MAHA layer cannot be captured ({reason}); set train.cuda_graphs: false"
        ) from error
    torch.cuda.synchronize()
    for layer, graphs in zip(layers, captured, strict=True):
        layer.captured = graphs


def _capture_in_order(captured: Sequence[CapturedAttention]) -> None:
    """As a training pass runs them, so that what one graph has done with is memory for the next."""
    for layer in captured:
        for _ in range(_PASSES_BEFORE):
            layer.forward()
            layer.backward()
    torch.cuda.synchronize()
    pool = torch.cuda.graph_pool_handle()
    for layer in captured:
        layer.capture(backward=False, pool=pool)
    for layer in reversed(captured):
        layer.capture(backward=True, pool=pool)

"""Decoding on a GPU: a CUDA graph of a step, no waiting for the device, and the plain form's results at real widths."""

import pytest
import torch

pytest.importorskip("triton")

from maha_megatron.attention.api import MahaOutput, maha_attention
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.state import MahaState
from tests.support.attention import Case, leaves, parameter_specs
from tests.support.gpu import no_host_synchronisation

pytestmark = pytest.mark.gpu
CASE = Case(lengths=(40,), n=8, g=2, d=128, spec=MahaSpec(ratio=4, windows=(128, 112, 124, 64)))
OFFSETS = (1023, 0, 700)


class Streams:
    """Streams that have read documents of random rows, and the tokens to come [tokens, B, heads, d]."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        values = leaves(CASE, dtype, "cuda")
        self.parameters = AttentionParameters(**{name: values[name].detach() for name in parameter_specs(CASE)})
        self.dtype, self.generator = dtype, generator
        sizes = {"n": CASE.n, "g": CASE.g, "d": CASE.d, "dtype": dtype, "device": "cuda"}
        states = [MahaState.initial(CASE.spec, streams=1, **sizes) for _ in OFFSETS]
        for stream, offset in enumerate(OFFSETS):
            if offset:
                states[stream] = self.read(states[stream], self.rows(offset), "eager").state
        self.state = MahaState.stack(states)
        self.tokens = [self.rows(len(OFFSETS)) for _ in range(12)]

    def rows(self, rows: int) -> list[torch.Tensor]:
        shapes = [(rows, heads, CASE.d) for heads in (CASE.n, CASE.g, CASE.g)]
        return [torch.randn(shape, generator=self.generator).to("cuda", self.dtype) for shape in shapes]

    def read(self, state: MahaState, rows, backend: str) -> MahaOutput:
        starts = state.document_start(len(rows[0]) // state.streams)
        with torch.no_grad():
            return maha_attention(*rows, starts, self.parameters, CASE.spec, backend=backend, state=state)

    def outs(self, backend: str) -> list[torch.Tensor]:
        state, outs = self.state, []
        for token in self.tokens:
            found = self.read(state, token, backend)
            state = found.state
            outs.append(found.out_tnd)
        return outs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=str)
def test_tokens_equal_the_plain_form(dtype, tolerance):
    streams = Streams(dtype)
    for found, expected in zip(streams.outs("triton"), streams.outs("eager"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_steps_never_wait_for_the_device():
    streams = Streams()
    streams.read(streams.state, streams.tokens[0], "triton")  # kernels are compiled, tables are made
    with no_host_synchronisation():
        streams.outs("triton")


def test_a_graph_of_a_step_replayed_equals_the_steps():
    """The graph writes the next state over the one that it read."""
    streams = Streams()
    expected = streams.outs("triton")
    state, token = streams.state._each(torch.clone), [torch.empty_like(x) for x in streams.tokens[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = streams.read(state, token, "triton")
        for name, kept in found.state._named().items():
            state._named()[name].copy_(kept)
    for rows, out in zip(streams.tokens, expected, strict=True):
        for to, x in zip(token, rows, strict=True):
            to.copy_(x)
        graph.replay()
        assert torch.equal(found.out_tnd, out)

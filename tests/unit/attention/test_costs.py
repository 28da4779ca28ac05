"""What the eager backend must never do: read a value back to the host, or hold anything quadratic in the rows."""

import itertools
import logging
import unittest.mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maha_megatron.attention import api, dispatch
from maha_megatron.attention.spec import AttentionParameters, DenseSpec, MahaSpec
from maha_megatron.attention.state import MahaState, piece_document_start
from maha_megatron.errors import ConfigError
from maha_megatron.scales import default_windows
from tests.support.attention import Case, attend, leaves, parameter_specs, start_rows

READS_BACK = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Watch(TorchDispatchMode):
    """Records the operators called, and the most elements that one of them returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function._schema.name)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def forward_and_backward(case: Case, backend: str = "eager") -> Watch:
    values = leaves(case, torch.float32)
    # on a CPU the document starts are looked at, since that costs nothing there; a GPU's are not
    with unittest.mock.patch.object(api, "check_document_start"), Watch() as watch:
        attend(case, values, backend)["out"].sum().backward()
    return watch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lse_utility": False},
        {"downsampling": "conv"},
        {"downsampling": "max"},
        {"downsampling": "mean", "key_map": True},
    ],
    ids=str,
)
def test_maha_reads_nothing_back_and_holds_nothing_quadratic(options):
    spec = MahaSpec(ratio=4, windows=default_windows(16384), **options)
    watch = forward_and_backward(Case(lengths=(5000, 11384), n=1, g=1, d=16, spec=spec))
    assert not watch.names & READS_BACK
    assert watch.largest <= 2**21, "logits of one chunk, or inputs by their size"


def test_pieces_read_nothing_back(monkeypatch):
    """On a CPU the starts of a piece are looked at, since that costs nothing there; a GPU's are not."""
    spec = MahaSpec(ratio=4, windows=(20, 9, 6))
    case = Case(lengths=(300, 10, 200), n=2, g=1, d=16, spec=spec)
    values, starts = leaves(case, torch.float32), start_rows(case.lengths)
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    for looked in (True, False):
        if not looked:
            monkeypatch.setattr(api, "check_document_start", lambda *_: None)
        state = MahaState.initial(spec, streams=1, n=2, g=1, d=16, dtype=torch.float32, rewind_rows=5)
        with Watch() as watch:
            for first, stop in itertools.pairwise((0, 100, 101, 305, 510)):
                inputs = [values[name][first:stop] for name in "qkv"]
                start_t = piece_document_start(starts, first, stop)
                result = api.maha_attention(*inputs, start_t, parameters, spec, state=state)
                state = result.state.reorder(torch.tensor([0]))
            (result.out_tnd.sum() + sum(entry.sum() for entry in state.entries)).backward()
            state.document_start(3, [(1,)])
        assert bool(watch.names & READS_BACK) == looked


@pytest.mark.parametrize(
    ("options", "solves"),
    [
        ({"regularizer": "quadratic"}, False),
        ({"aggregation": "mean"}, False),
        ({"queries": "pooled"}, False),
        ({"queries": "pooled", "aggregation": "mean"}, False),
        ({"aggregation": "nash", "coupling": "gram"}, True),
        ({"regularizer": "quadratic", "coupling": "gram"}, True),
    ],
    ids=str,
)
def test_other_aggregations_read_back_only_what_a_solver_asks(options, solves):
    """A solver asks whether programs are left (on a CPU after every step); nothing else asks anything."""
    spec = MahaSpec(ratio=4, windows=default_windows(16384), **options)
    watch = forward_and_backward(Case(lengths=(5000, 11384), n=1, g=1, d=16, spec=spec))
    assert bool(watch.names & READS_BACK) == solves
    assert watch.largest <= 2**21, "logits of one chunk, or outputs of every scale"


def test_dense_reads_nothing_back():
    for lengths in ((64, 64), (30, 70)):
        assert not forward_and_backward(Case(lengths=lengths, spec=DenseSpec())).names & READS_BACK


def test_the_watch_sees_what_the_reference_does():
    watch = forward_and_backward(Case(lengths=(20,), spec=MahaSpec(ratio=4, windows=(6, 5))), "naive")
    assert watch.names & READS_BACK


def kept_for_backward(case: Case) -> tuple[torch.Tensor, dict[int, int]]:
    """The output, and the numbers held for backward by storage."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(case, leaves(case, torch.float32), "eager")["out"]
    return out, kept


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("options", [{}, {"lse_utility": False}, {"aggregation": "mean"}], ids=str)
def test_kept_for_backward_is_of_the_size_of_the_inputs(options, convolution):
    """q, pyramid (4/3 of keys and values), output, an offset per scale, and what the convolution read: no logits."""
    rows, n, g, d, scales = 2048, 8, 2, 32, 3
    spec = MahaSpec(ratio=4, windows=(128, 112, 128), convolution=convolution, **options)
    out, kept = kept_for_backward(Case(lengths=(rows,), n=n, g=g, d=d, spec=spec))
    query, keys_and_values, output, offsets = rows * n * d, rows * 2 * g * d, rows * n * d, rows * n * scales
    raw = query + keys_and_values if convolution else 0
    bound = raw + query + keys_and_values * 4 / 3 + output + offsets
    assert out.untyped_storage().data_ptr() in kept
    assert 0.95 * bound < sum(kept.values()) <= 1.01 * bound


@pytest.mark.parametrize(
    ("options", "small"),
    [
        # numbers per row and head: log-sum-exp, mean square, utilities, weights
        ({"regularizer": "quadratic"}, 5 * 3 + 2),
        # and M, w and D of every program, the Gram matrix twice
        ({"aggregation": "nash", "coupling": "gram"}, 5 * 3 + 2 + 3 * 9 + 3 * 3),
        ({"aggregation": "nash", "regularizer": "quadratic", "coupling": "gram"}, 5 * 3 + 2 + 3 * 9 + 3 * 3),
    ],
    ids=str,
)
def test_each_scales_output_is_kept_once_where_it_is_needed(options, small):
    """q, the pyramid, O of every scale, and what is small: independent of the head width."""
    rows, n, g, d, scales = 2048, 4, 2, 128, 3
    spec = MahaSpec(ratio=4, windows=(128, 112, 128), convolution=False, **options)
    _, kept = kept_for_backward(Case(lengths=(rows,), n=n, g=g, d=d, spec=spec))
    query, keys_and_values, outputs = rows * n * d, rows * 2 * g * d, rows * n * scales * d
    bound = query + keys_and_values * 4 / 3 + outputs
    assert bound < sum(kept.values()) <= 1.01 * bound + small * rows * n


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ConfigError, match="unknown attention backend 'egaer': choose one of naive, eager"):
        dispatch.backend("egaer")


def test_the_backend_is_logged_once(caplog):
    dispatch.backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="maha_megatron.attention.dispatch"):
        for _ in range(3):
            dispatch.backend("eager")
    assert [record.message for record in caplog.records] == ["attention backend: eager"]


def test_dense_eager_insists_on_the_documents_lengths():
    from maha_megatron.attention.api import dense_attention

    q = torch.randn(4, 2, 8)
    spec = DenseSpec(qk_norm=False, convolution=False)
    with pytest.raises(AssertionError, match="document_lengths"):
        dense_attention(q, q, q, torch.zeros(4, dtype=torch.int32), AttentionParameters(), spec)

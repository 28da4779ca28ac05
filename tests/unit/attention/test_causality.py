"""Causality and document bounds as exact zeros and bitwise equality, and leaks planted to show that they are caught."""

import contextlib
import dataclasses
import functools
import itertools
from unittest import mock

import pytest
import torch

import maha_megatron.attention.dispatch as dispatch
import maha_megatron.attention.pyramid.eager as pyramid_eager
from maha_megatron.attention.scale_attention import bands, eager_joint, eager_scales
from maha_megatron.attention.slots import visible_slots
from maha_megatron.attention.spec import DenseSpec, MahaSpec
from maha_megatron.scales import stride
from tests.support.attention import FAST_BACKENDS, Case, assert_close, attend, leaves, results, start_rows
from tests.support.everyday import everyday

SPECS = {
    "lse": MahaSpec(ratio=4, windows=(6, 5, 12)),
    "no lse, mean": MahaSpec(ratio=4, windows=(6, 5, 12), lse_utility=False, downsampling="mean"),
    "ratio 3": MahaSpec(ratio=3, windows=(7, 4, 3, 2)),
    "conv": MahaSpec(ratio=4, windows=(6, 5, 12), downsampling="conv"),
    "max": MahaSpec(ratio=4, windows=(6, 5, 12), downsampling="max"),
    "key map": MahaSpec(ratio=3, windows=(7, 4, 3, 2), key_map=True),
    "conv, key map": MahaSpec(ratio=4, windows=(6, 5, 12), downsampling="conv", key_map=True),
    "dense": DenseSpec(),
}
LENGTHS = {"one document": (150,), "packed": (37, 1, 66, 9, 37)}


ALONE = ("lse", "ratio 3", "dense")  # one long document every day; packed ones with every operator
specs_and_lengths = pytest.mark.parametrize(
    ("spec", "lengths"),
    everyday(itertools.product(SPECS, LENGTHS), lambda spec, lengths: lengths == "packed" or spec in ALONE),
)


def a_case(spec: str, lengths: str) -> Case:
    return Case(lengths=LENGTHS[lengths], n=2, g=1, d=8, spec=SPECS[spec])


def check_jacobian(case: Case, backend: str, *, sparse: bool = False) -> None:
    """d out[row] / d (q, k, v)[other row] is exactly 0 unless other is in row's document and not after row.

    A row reads itself, unless weights are `sparse`: then scale 0 may weigh nothing.
    """
    values = leaves(case, torch.float64)
    out = attend(case, values, backend)["out"]
    starts = start_rows(case.lengths).tolist()
    inputs = [values[name] for name in "qkv"]
    for row in range(len(starts)):
        grads = torch.autograd.grad(out[row].sum(), inputs, retain_graph=True)
        influence = sum(grad.abs().sum((1, 2)) for grad in grads)
        assert influence.isfinite().all(), f"row {row} has gradients that are not numbers"
        assert sparse or influence[row] > 0
        seen = influence.nonzero().flatten()
        assert starts[row] <= seen.min(), f"row {row} of the document at {starts[row]} reads row {seen.min()}"
        assert seen.max() <= row, f"row {row} reads row {seen.max()}"


def check_changed_tokens(
    case: Case, backend: str, rows: list[int], *, sparse: bool = False, loud: bool = False, device: str = "cpu"
) -> None:
    """Changing one row leaves every row before it, and all other documents, bitwise as they were.

    `loud`: with logits and utilities so large that no finite value for -inf would hide what lies behind it: the first
    head has logits of size 1e5, the second nearly infinite preference for every scale but the finest.
    """
    values = {name: value.detach() for name, value in leaves(case, torch.float32, device).items()}
    if loud and "query_gain" in values:
        values["query_gain"][0] *= 3e4
    if loud and "utility_bias" in values:
        values["utility_bias"][1:, 1] += 3e4
    before = attend(case, values, backend)["out"]
    assert before.isfinite().all(), "outputs that are not numbers"
    starts = start_rows(case.lengths)
    for row in rows:
        changed = {name: value.clone() if name in "qkv" else value for name, value in values.items()}
        for name in "qkv":
            changed[name][row] = torch.randn_like(changed[name][row])
        same = (attend(case, changed, backend)["out"] == before).all(-1).all(-1).cpu()
        assert sparse or loud or not same[row]
        may_change = (starts == starts[row]) & (torch.arange(len(starts)) >= row)
        assert same[~may_change].all(), f"a change of row {row} reaches rows {(~same & ~may_change).nonzero().tolist()}"
    assert not same.all()


def check_infeasible_scales(case: Case, backend: str) -> None:
    """Weights of scales without a visible block are exactly 0, and so are their outputs; their LSE is exactly -inf."""
    values = {name: value.detach() for name, value in leaves(case, torch.float32).items()}
    looked = []
    with contextlib.ExitStack() as patches:
        for module in (eager_joint, eager_scales):
            look = functools.partial(_look_at_scale, module.attend_scale, looked)
            patches.enter_context(mock.patch.object(module, "attend_scale", look))
        weights = attend(case, values, backend)["weights"]
    assert (backend == "eager") == bool(looked)
    position = torch.arange(sum(case.lengths)) - start_rows(case.lengths)
    for scale in range(case.spec.scales):
        blocks = (position + 1) // stride(case.spec.ratio, scale)
        assert (weights[blocks == 0, :, scale] == 0).all(), f"scale {scale} has weight where it is infeasible"
    assert (weights.sum(-1) - 1).abs().max() <= 1e-5, "weights that do not sum to 1 where a scale is infeasible"


def _look_at_scale(attend_scale, looked, chunk, scale):
    output, lse = attend_scale(chunk, scale)
    nothing = (chunk.row + 1 - chunk.document) // chunk.call.bands[scale].stride_rows == 0
    looked.append(nothing)
    assert (lse[:, nothing] == -torch.inf).all(), "a finite LSE of an infeasible scale"
    assert (output[:, nothing] == 0).all(), "an output of an infeasible scale"
    assert lse[:, ~nothing].isfinite().all(), "no finite LSE of a feasible scale"
    return output, lse


@specs_and_lengths
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_no_row_reads_a_later_row_or_another_document(backend, spec, lengths):
    check_jacobian(a_case(spec, lengths), backend)


@specs_and_lengths
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_changed_token_leaves_earlier_rows_bitwise_unchanged(backend, spec, lengths):
    """Every token of two whole tiles, and of the block borders of every scale among them, up to the end."""
    lengths = {"one document": (200,), "packed": (61, 70, 5, 64)}[lengths]
    check_changed_tokens(Case(lengths=lengths, n=2, g=1, d=8, spec=SPECS[spec]), backend, list(range(60, 200)))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_loud_token_leaves_earlier_rows_bitwise_unchanged(backend, spec):
    case = Case(lengths=(61, 3, 70, 66), n=2, g=1, d=8, spec=SPECS[spec])
    check_changed_tokens(case, backend, list(range(0, 200, 3)), loud=True)


@pytest.mark.parametrize("spec", [name for name in SPECS if name != "dense"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_infeasible_scales_hold_exactly_nothing(backend, spec, lengths):
    check_infeasible_scales(a_case(spec, lengths), backend)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_packed_documents_equal_separate_ones(backend, spec):
    case = a_case(spec, "packed")
    packed, values = results(case, backend, torch.float64), leaves(case, torch.float64)
    start = 0
    for length in case.lengths:
        rows = slice(start, start + length)
        alone = dataclasses.replace(case, lengths=(length,))
        inputs = {name: values[name][rows].detach().requires_grad_() for name in "qkv"}
        out = attend(alone, values | inputs, backend)["out"]
        direction = torch.randn(packed["out"].shape, generator=torch.Generator().manual_seed(1)).double()[rows]
        grads = torch.autograd.grad(out, list(inputs.values()), direction)
        found = {"out": out} | {f"grad of {name}": grad for name, grad in zip("qkv", grads, strict=True)}
        assert_close(found, {name: packed[name][rows] for name in found}, 1e-12)
        start += length


def _shift_end(row, document, stride_rows, window, *, shift):
    first, end = visible_slots(row, document, stride_rows, window)
    return first, shift(row, document, stride_rows, end)


def _block_in_progress(row, document, stride_rows, end):
    """A row sees the summary of the block that it lies in."""
    return end + (stride_rows > 1)


def _ceil_of_blocks(row, document, stride_rows, end):
    """ceil instead of floor of the number of complete blocks."""
    return (row + 1 + (-document) % stride_rows + stride_rows - 1) // stride_rows


def _one_row_too_many(row, document, stride_rows, end):
    """The mask of the finest scale is off by one."""
    return end + (stride_rows == 1)


@pytest.mark.parametrize("shift", [_block_in_progress, _ceil_of_blocks, _one_row_too_many])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_leak_planted_in_the_mask_is_caught(monkeypatch, shift, lengths):
    monkeypatch.setattr(bands, "visible_slots", functools.partial(_shift_end, shift=shift))
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(a_case("lse", lengths), "eager")
    with pytest.raises(AssertionError, match="a change of row"):
        check_changed_tokens(a_case("lse", lengths), "eager", list(range(60, 100)))


def _next_children(family, *arguments):
    """A block pools rows one further than its own: its last child belongs to the next block."""
    children, complete, place = family(*arguments)
    return (children + 1).clamp(max=children.max()), complete, torch.cat((place[-1:], place[:-1]))


@pytest.mark.parametrize("spec", ["lse", "no lse, mean", "conv", "max", "key map"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_leak_planted_in_the_pyramid_is_caught(monkeypatch, spec, lengths):
    monkeypatch.setattr(pyramid_eager, "_family", functools.partial(_next_children, pyramid_eager._family))
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(a_case(spec, lengths), "eager")
    with pytest.raises(AssertionError, match="a change of row"):
        check_changed_tokens(a_case(spec, lengths), "eager", list(range(60, 100)))


def _forward_convolution(convolve, *arguments):
    """One more tap, two rows ahead."""
    return [mixed + 0.1 * x.roll(-2, 0) for mixed, x in zip(convolve(*arguments), arguments, strict=False)]


def _convolution_over_bounds(convolve, *arguments):
    q, k, v, document_start_t, weight = arguments
    return convolve(q, k, v, torch.zeros_like(document_start_t), weight)


@pytest.mark.parametrize("leak", [_forward_convolution, _convolution_over_bounds])
def test_a_leak_planted_in_the_convolution_is_caught(monkeypatch, leak):
    leaking = dataclasses.replace(
        dispatch.backend("eager"), convolve=functools.partial(leak, dispatch.backend("eager").convolve)
    )
    monkeypatch.setattr("maha_megatron.attention.api.backend_named", lambda name: leaking)
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(a_case("lse", "packed"), "eager")


def test_a_window_that_crosses_a_document_start_is_caught(monkeypatch):
    def ignoring_documents(row, document, stride_rows, window):
        return visible_slots(row, torch.zeros_like(document), stride_rows, window)

    monkeypatch.setattr(bands, "visible_slots", ignoring_documents)
    with pytest.raises(AssertionError, match="reads row"):
        check_jacobian(a_case("lse", "packed"), "eager")

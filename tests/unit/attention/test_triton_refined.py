"""Kernels of refined layers against the naive backend: outputs, weights and gradients, in Triton's interpreter.

Learned parameters are random, gains included. Tiles and runs are small, so that short sequences have many, and blocks
lie in several runs.
"""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.pyramid import eager as pyramid
from maha_megatron.attention.pyramid import triton as pyramid_kernels
from maha_megatron.attention.scale_attention import (
    naive,
    triton,
    triton_choice,
    triton_opened,
    triton_opened_forward,
    triton_opened_gradient,
    triton_opened_ops,
)
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.scale_attention.triton_arguments import Shape
from maha_megatron.attention.scale_attention.triton_tuning import Tiles, Tuning, numbers_of
from maha_megatron.attention.spec import AttentionParameters, MahaSpec, Refinement
from maha_megatron.scales import openable_blocks
from tests.support.attention import (
    Case,
    documents_of,
    errors,
    leaves,
    parameter_specs,
    reference,
    start_rows,
    wrong,
)
from tests.unit.attention.test_causality import check_changed_tokens
from tests.unit.attention.test_triton import exact, in_pieces, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")
full, gpu = pytest.mark.full, pytest.mark.gpu
TOKENS = Refinement(from_scale=2, to_scale=0, blocks=2)
FOUR = dataclasses.replace(TOKENS, blocks=4)
ONE = dataclasses.replace(TOKENS, blocks=1)
SUMMARIES = Refinement(from_scale=2, to_scale=1, blocks=3)
ROWS = Tiles(rows=32, keys=16)
OPENED = Tiles(rows=16)
SMALL = Tuning(
    keys=ROWS, forward=ROWS, query_gradient=ROWS, key_gradient=ROWS, choice=ROWS, opened=OPENED, opened_gradient=OPENED,
    run=24, span=40, programs=1,
)  # fmt: skip
HEADS_TOGETHER = dataclasses.replace(
    SMALL, forward=Tiles(rows=16, keys=16, heads=2), query_gradient=Tiles(rows=16, keys=16, heads=2)
)


def spec(refine=TOKENS, ratio=2, windows=(4, 3, 9), **options) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, refine=refine, convolution=False, **options)


def kernels(q, *others):
    """With tiles of the tests' own; it is an error if eager serves."""
    assert triton.what_no_kernel_serves(q, others[0][0][0].shape[1], others[-1]) is None
    return triton.attend(q, *others, tuning=SMALL)


DEEP = spec(Refinement(from_scale=3, to_scale=0, blocks=2), 3, (4, 3, 3, 9))
PACKED_CASE = Case(lengths=(26, 1, 7, 40), n=3, g=1, d=32, spec=spec())
BELOW = Refinement(from_scale=1, to_scale=0, blocks=1)
CASES = [
    pytest.param(PACKED_CASE, id="packed, three heads a group"),
    pytest.param(Case(lengths=(61,), n=2, g=2, d=32, spec=spec()), id="two groups"),
    pytest.param(Case(lengths=(9,), n=1, g=1, d=32, spec=spec()), id="nothing to open"),
    pytest.param(Case(lengths=(3, 58), n=2, g=1, d=32, spec=spec(SUMMARIES, 3, (4, 3, 5, 2))), id="summaries, ratio 3"),
    pytest.param(
        Case(lengths=(58,), n=2, g=1, d=32, spec=spec(SUMMARIES, 3, (4, 3, 5, 2), rope_unit="token")), id="in tokens"
    ),
    pytest.param(
        Case(lengths=(90, 31), n=4, g=2, d=32, spec=spec(BELOW, 4, (5, 9, 3))), marks=full, id="a finer scale"
    ),
    pytest.param(Case(lengths=(150, 9, 70), n=4, g=2, d=32, spec=spec(ratio=4)), marks=full, id="many tiles"),
    pytest.param(
        Case(lengths=(70,), n=5, g=1, d=32, spec=spec(dataclasses.replace(TOKENS, blocks=16))), marks=full, id="all"
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_every_output_and_gradient_in_fp32_equals_the_reference(case):
    found = run(case, leaves(case, torch.float32, DEVICE), kernels)
    assert wrong(found, exact(case, torch.float32), 3e-6) == {}


def many_children(q, *others):
    """As `kernels`, also of more children than fp32 may have on a card, whose shared memory is no matter here."""
    out, weights = triton_opened_ops.attend_opening(q, *others, (0,) * others[-1].scales, True, SMALL)
    return Attended(out_tnd=out, weights_tnl=weights, report=None)


def heads_together(q, *others):
    """Two query heads share a tile of rows, with the scales and in the queries' gradient."""
    return triton.attend(q, *others, tuning=HEADS_TOGETHER)


def heads_apart(q, levels, *others):
    """With q, keys and values that lie in memory head after head."""
    q, *flat = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, *itertools.chain(*levels)))
    assert not q.is_contiguous()
    return kernels(q, list(zip(flat[::2], flat[1::2], strict=True)), *others)


@pytest.mark.parametrize(
    ("case", "attention"),
    [
        pytest.param(Case(lengths=(3, 80), n=2, g=1, d=32, spec=spec(ONE, 8)), many_children, id="64 children"),
        pytest.param(Case(lengths=(70,), n=1, g=1, d=32, spec=spec(ratio=5)), many_children, id="25 children"),
        pytest.param(Case(lengths=(9, 90), n=2, g=1, d=32, spec=DEEP), many_children, marks=full, id="27 children"),
        pytest.param(Case(lengths=(150, 300), n=4, g=2, d=32, spec=spec(ratio=8)), many_children, marks=full, id="two"),
        pytest.param(Case(lengths=(13,), n=16, g=1, d=32, spec=spec()), kernels, id="16 heads a group"),
        pytest.param(Case(lengths=(5, 21), n=4, g=2, d=32, spec=spec()), heads_together, id="two heads a tile"),
        pytest.param(Case(lengths=(5, 21), n=4, g=2, d=32, spec=spec()), heads_apart, id="head after head"),
        pytest.param(
            Case(lengths=(5, 21), n=4, g=2, d=32, spec=spec(rope_unit="token")),
            heads_together,
            id="two heads a tile, in tokens",
        ),
    ],
)
def test_other_sizes_and_layouts_equal_the_reference_in_fp32(case, attention):
    found = run(case, leaves(case, torch.float32, DEVICE), attention)
    assert wrong(found, exact(case, torch.float32), 3e-6) == {}


class Nothing:
    def run(self) -> None:
        pass


@pytest.mark.parametrize("fault", ["runs are not added up", "documents are not respected"])
def test_a_fault_is_seen(monkeypatch, fault):
    if fault == "runs are not added up":
        monkeypatch.setattr(triton_opened.Call, "added_runs", lambda *_: Nothing())
        expected = {"grad of k", "grad of v"}
    else:
        honest = triton_choice.visible
        monkeypatch.setattr(triton_choice, "visible", lambda row, document, *rest: honest(row, document * 0, *rest))
        expected = {"out", "weights"}
    found = run(PACKED_CASE, leaves(PACKED_CASE, torch.float32, DEVICE), kernels)
    assert wrong(found, exact(PACKED_CASE, torch.float32), 3e-6).keys() >= expected


@pytest.mark.parametrize("heads", [1, 3])
def test_at_a_tie_the_earlier_blocks_are_opened(heads):
    """All keys are 0, so all blocks are alike."""
    case = Case(lengths=(50, 33), n=heads, g=1, d=32, spec=spec())
    values = {name: value.detach() for name, value in leaves(case, torch.float32, DEVICE).items()}
    values["k"] = torch.zeros_like(values["k"])
    chosen = chosen_by_kernels(case, values)[0].tolist()
    for row, (start, found) in enumerate(zip(start_rows(case.lengths).tolist(), chosen, strict=True)):
        blocks = list(openable_blocks(row - start, 2, case.spec.windows, 2, 0))[:2]
        first = -(-start // 4)
        assert sorted(found) == sorted([first + block for block in blocks] + [-1] * (2 - len(blocks)))


@pytest.mark.skipif(DEVICE != "cpu", reason="counts what the interpreter calls")
@pytest.mark.parametrize(("rows", "tiles"), [(7, 0), (8, 1)])
def test_rows_that_open_nothing_cost_no_products(monkeypatch, rows, tiles):
    """The eighth row is the first that may open a block: a tile of rows for each head, and way."""
    read, honest = [], triton_opened_forward.load_opening

    def counted(*arguments):
        read.append(1)
        return honest(*arguments)

    for module in (triton_opened_forward, triton_opened_gradient):
        monkeypatch.setattr(module, "load_opening", counted)
    case = Case(lengths=(rows,), n=2, g=1, d=32, spec=spec())
    run(case, leaves(case, torch.float32, DEVICE), kernels)
    assert len(read) == 2 * 2 * tiles


def test_utilities_do_not_change_what_is_chosen():
    """Probabilities within a scale do not depend on them, even where another scale leaves this one no weight."""
    values = {name: value.detach() for name, value in leaves(PACKED_CASE, torch.float32, DEVICE).items()}
    expected = chosen_by_kernels(PACKED_CASE, values)
    values["utility_bias"][0] += 150
    assert torch.equal(chosen_by_kernels(PACKED_CASE, values), expected)


@pytest.mark.parametrize("with_weights", [True, False])
def test_the_log_sum_exps_of_scales_are_written_where_weights_are_asked_for(monkeypatch, with_weights):
    values = {name: value.detach() for name, value in leaves(SMALL_CASE, torch.float32, DEVICE).items()}
    written, honest = [], triton_opened.Call.attention

    def attention(call, keys, out, lse, scale_lse, own_lse):
        written.append(scale_lse is not None)
        return honest(call, keys, out, lse, scale_lse, own_lse)

    monkeypatch.setattr(triton_opened.Call, "attention", attention)
    _, _, weights, _ = triton_opened_ops.refined_attention(*operator_inputs(SMALL_CASE, values, with_weights))
    assert written == [with_weights]
    assert weights.shape == ((25, 2, 4) if with_weights else (0,))


def chosen_by_kernels(case: Case, values: dict[str, torch.Tensor]) -> torch.Tensor:
    return triton_opened_ops.refined_attention(*operator_inputs(case, values))[-1]


def operator_inputs(case: Case, values: dict[str, torch.Tensor], with_weights: bool = True) -> tuple:
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    start_t = documents_of(case, DEVICE).start_t
    levels = pyramid.build_pyramid((values["k"], values["v"]), start_t, parameters, case.spec)
    wanted = values["q"].requires_grad
    keys, level_values = ([level[kind].detach().requires_grad_(wanted) for level in levels] for kind in (0, 1))
    learned = [values[name] for name in ("query_gain", "key_gain", "utility_query", "utility_bias")]
    refine, spec = case.spec.refine, case.spec
    numbers = (spec.ratio, list(spec.windows), [0] * spec.scales, [refine.from_scale, refine.to_scale, refine.blocks])
    others = (spec.rope_base, spec.rope_unit, spec.norm_epsilon, with_weights, numbers_of(SMALL))
    return values["q"], *learned, start_t, keys, level_values, *numbers, *others


WIDE_CASES = [
    Case(lengths=(300, 1, 211), n=4, g=4, d=64, spec=spec(ratio=4, windows=(32, 28, 64))),
    Case(lengths=(450,), n=4, g=1, d=128, spec=spec(SUMMARIES, ratio=4, windows=(32, 28, 64))),
    Case(lengths=(450, 62), n=6, g=2, d=64, spec=spec(FOUR, ratio=4, windows=(16, 12, 64))),
    Case(lengths=(450, 62), n=4, g=2, d=128, spec=spec(SUMMARIES, ratio=4, windows=(32, 28, 64), rope_unit="token")),
]

MANY_CHILDREN = [  # 64, which kernels serve in 16 bits
    Case(lengths=(700, 1, 323), n=4, g=2, d=64, spec=spec(ratio=8, windows=(64, 56, 64))),
    Case(lengths=(900, 124), n=16, g=1, d=128, spec=spec(FOUR, ratio=8, windows=(64, 56, 64))),
]


@pytest.mark.parametrize(
    ("case", "attention"),
    [
        pytest.param(PACKED_CASE, kernels, id=str(PACKED_CASE)),
        *(pytest.param(case, triton.attend, marks=gpu, id=str(case)) for case in (*WIDE_CASES, *MANY_CHILDREN)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=full)], ids=str)
def test_in_16_bit_at_most_twice_as_far_from_exact_as_plain_torch(case, attention, dtype):
    """Plain torch in bf16: on a CPU it is not to be trusted in fp16. Where two blocks have nearly the same score,
    rounding decides which is opened, here or there: so it is the norm of all differences that is compared.
    """
    plain = errors(run(case, leaves(case, torch.bfloat16), naive.attend), exact(case, torch.bfloat16))
    found = errors(run(case, leaves(case, dtype, DEVICE), attention), exact(case, dtype))
    assert {name: error for name, error in found.items() if not error <= 2 * plain[name]} == {}, plain


@gpu
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_in_fp32_on_a_gpu_at_most_twice_as_far_from_exact_as_plain_torch(case):
    plain = errors(run(case, leaves(case, torch.float32), naive.attend), exact(case, torch.float32))
    found = errors(run(case, leaves(case, torch.float32, DEVICE), triton.attend), exact(case, torch.float32))
    assert {name: error for name, error in found.items() if not error <= max(2 * plain[name], 3e-6)} == {}, plain


@gpu
@pytest.mark.parametrize(("ratio", "dtype"), [(4, torch.float32), (4, torch.bfloat16), (8, torch.bfloat16)], ids=str)
def test_on_a_gpu_three_runs_are_bitwise_equal_at_the_tables_tiles(ratio, dtype):
    case = Case(lengths=(1500, 1, 700, 1895), n=4, g=4, d=64, spec=spec(ratio=ratio, windows=(128, 112, 256)))
    first, *others = (run(case, leaves(case, dtype, DEVICE), triton.attend) for _ in range(3))
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@gpu
def test_two_runs_are_bitwise_equal():
    case = dataclasses.replace(PACKED_CASE, lengths=(5, 40), n=2)
    first, second = (run(case, leaves(case, torch.float32, DEVICE), kernels) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


MIXED = dataclasses.replace(spec(), convolution=True)
MIXED_CASE = Case(lengths=(26, 1, 20), n=2, g=1, d=32, spec=MIXED)


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        pytest.param(MIXED_CASE, [20, 33], id="few"),
        pytest.param(MIXED_CASE, list(range(0, 47, 3)), marks=full, id="many"),
        *(pytest.param(case, list(range(1, 450, 40)), marks=gpu, id=str(case)) for case in WIDE_CASES),
    ],
)
def test_a_changed_token_leaves_earlier_rows_bitwise_unchanged(case, tokens):
    check_changed_tokens(case, "triton", tokens, device=DEVICE)


@pytest.mark.parametrize("cuts", [(0, 31, 32, 53), pytest.param((0, 5, 17, 40, 53), marks=full)], ids=str)
@pytest.mark.parametrize("rope_unit", ["block", pytest.param("token", marks=full)])
def test_pieces_equal_one_pass_and_gradients_cross_their_borders(cuts, rope_unit):
    case = Case(lengths=(39, 14), n=2, g=1, d=32, spec=dataclasses.replace(MIXED, rope_unit=rope_unit))
    assert wrong(in_pieces(case, cuts), reference(case), 3e-6) == {}


SMALL_CASE = Case(lengths=(4, 21), n=2, g=1, d=32, spec=spec())


@pytest.mark.parametrize("with_weights", [True, pytest.param(False, marks=full)])
def test_it_is_a_well_formed_operator(with_weights):
    inputs = operator_inputs(SMALL_CASE, leaves(SMALL_CASE, torch.float32, DEVICE), with_weights)
    torch.library.opcheck(triton_opened_ops.refined_attention, inputs)


def test_its_backward_is_a_well_formed_operator():
    values = {name: value.detach() for name, value in leaves(SMALL_CASE, torch.float32, DEVICE).items()}
    *inputs, _, tiles = operator_inputs(SMALL_CASE, values)
    out, lse, _, chosen = triton_opened_ops.refined_attention(*inputs, True, tiles)
    given = (torch.ones_like(out), out, lse, chosen, *inputs, tiles)
    torch.library.opcheck(triton_opened_ops.refined_attention_backward, given)


def whole(values: dict[str, torch.Tensor], start_t: torch.Tensor) -> torch.Tensor:
    case = SMALL_CASE
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    levels = pyramid_kernels.build_pyramid((values["k"], values["v"]), start_t, parameters, case.spec)
    return triton.attend(values["q"], levels, start_t, parameters, case.spec, with_weights=False).out_tnd


@pytest.mark.parametrize("how", ["recomputed", pytest.param("compiled", marks=full)])
def test_recomputed_and_compiled_as_one_graph_it_is_the_same(how):
    values, start_t = leaves(SMALL_CASE, torch.float32, DEVICE), documents_of(SMALL_CASE, DEVICE).start_t
    if how == "compiled":
        out = torch.compile(whole, backend="aot_eager", fullgraph=True)(values, start_t)
    else:
        out = checkpoint(whole, values, start_t, use_reentrant=False)
    expected = whole(values, start_t)
    assert torch.equal(out, expected)
    wrt = list(values.values())
    grads, wanted = (torch.autograd.grad(x.sum(), wrt, materialize_grads=True) for x in (out, expected))
    assert all(torch.equal(x, y) for x, y in zip(grads, wanted, strict=True))


def test_backward_keeps_inputs_output_one_number_per_row_and_head_and_what_was_chosen():
    inputs = operator_inputs(SMALL_CASE, leaves(SMALL_CASE, torch.bfloat16, DEVICE), with_weights=True)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, lse, _, chosen = triton_opened_ops.refined_attention(*inputs)
    given = [x for one in inputs for x in (one if isinstance(one, list) else [one]) if isinstance(x, torch.Tensor)]
    assert sum(kept.values()) == sum(x.nbytes for x in (*given, out, lse, chosen))
    assert (lse.shape, chosen.shape, chosen.dtype) == ((2, 25), (1, 25, 2), torch.int32)


def test_scales_apart_have_no_opened_keys():
    numbers = {"ratio": 2, "windows": (4, 3), "past_slots": (0, 0), "half": 16, "epsilon": 1e-6, "precision": "tf32"}
    with pytest.raises(AssertionError, match="one softmax"):
        Shape(**numbers, fast=False, utilities=True, apart=True, one_turn=False, blocks=1, from_scale=1)


@pytest.mark.parametrize(
    ("options", "heads", "dtype", "missing"),
    [
        ({"refine": dataclasses.replace(TOKENS, blocks=17)}, 2, torch.float32, "17 blocks, at most 16"),
        ({"refine": Refinement(from_scale=6, to_scale=0, blocks=1), "windows": (9,) * 7}, 2, torch.bfloat16, None),
        ({"ratio": 4, "refine": ONE}, 2, torch.float32, None),
        ({"ratio": 5, "refine": ONE}, 2, torch.float32, "25 children, at most 16"),
        ({"ratio": 5, "refine": ONE}, 2, torch.float16, None),
        (
            {"ratio": 5, "refine": Refinement(from_scale=3, to_scale=0, blocks=1), "windows": (9,) * 4},
            2,
            torch.bfloat16,
            "125 children, at most 64",
        ),
        ({}, 17, torch.float32, "17 heads"),
        ({"windows": (4,) * 8, "refine": TOKENS}, 2, torch.float32, "9 branches"),
    ],
)
def test_sizes_that_no_kernel_serves_are_named(options, heads, dtype, missing):
    said = triton.what_no_kernel_serves(torch.zeros(1, heads, 64, dtype=dtype), 1, spec(**options))
    assert (said is None) if missing is None else said.startswith(f"opened blocks (a refined layer) of {missing}"), said

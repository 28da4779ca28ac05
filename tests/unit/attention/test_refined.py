"""Refined layers: eager is naive, the opened keys are those of the definition, ties and counts are exact."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maha_megatron.attention.aggregation import naive
from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.dispatch import backend as backend_named
from maha_megatron.attention.reach import Probabilities, layer_reach, row_mass
from maha_megatron.attention.scale_attention import opened
from maha_megatron.attention.spec import AttentionParameters, MahaSpec, Refinement
from maha_megatron.config import accounting
from maha_megatron.config.load import config_from_dict
from maha_megatron.errors import ConfigError
from maha_megatron.scales import openable_blocks, openable_spans, stride, visible_blocks
from tests.support.attention import (
    Case,
    assert_equals_reference,
    assert_within_twice_of_plain,
    attend,
    every_aggregation,
    leaves,
    parameter_specs,
    results,
    start_rows,
)

PACKED = (30, 1, 7, 45, 3)
TOKENS = Refinement(from_scale=2, to_scale=0, blocks=2)
SUMMARIES = Refinement(from_scale=2, to_scale=1, blocks=2)


def refined(refine=TOKENS, ratio=2, windows=(4, 3, 9), **options) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, refine=refine, **options)


def a_case(spec: MahaSpec, lengths=PACKED, **sizes) -> Case:
    return Case(lengths=lengths, spec=spec, **({"n": 4, "g": 2, "d": 8} | sizes))


EVERYDAY = {
    "tokens": a_case(refined()),
    "summaries": a_case(refined(SUMMARIES, downsampling="conv", key_map=True)),
    "below the coarsest scale": a_case(
        refined(Refinement(from_scale=1, to_scale=0, blocks=3), windows=(5, 12, 3), convolution=False), (67,)
    ),
    "nash, gram": a_case(refined(aggregation="nash", coupling="gram"), (41, 5)),
    "mean": a_case(refined(aggregation="mean", downsampling="max"), (43,)),
    "no lse": a_case(refined(ratio=3, windows=(4, 3, 6), lse_utility=False), (59,)),
    "positions in tokens": a_case(refined(SUMMARIES, rope_unit="token"), (61,)),
}
EVERYDAY_CASES = pytest.mark.parametrize("case", EVERYDAY.values(), ids=EVERYDAY)
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)


@EVERYDAY_CASES
@DTYPES
def test_forward_and_every_gradient_equal_the_reference(case, dtype, tolerance):
    assert_equals_reference(case, "eager", dtype, tolerance)


def wide_matrix() -> Iterator[Case]:
    """Every aggregation; every pyramid; lengths around strides and tiles; ratios, groups and numbers of blocks."""
    for options in every_aggregation():
        if options["queries"] == "full":
            yield a_case(refined(**options), (37, 2, 50))
            yield a_case(refined(Refinement(from_scale=1, to_scale=0, blocks=2), windows=(3, 9, 4), **options), (47,))
    for downsampling, key_map in itertools.product(("gated", "conv", "mean", "max"), (False, True)):
        yield a_case(refined(SUMMARIES, downsampling=downsampling, key_map=key_map), (53, 30))
    for length in (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129, 257):
        yield a_case(refined(ratio=4, windows=(6, 5, 12)), (length,), n=2, g=1)
    for ratio, (to_scale, from_scale), blocks in itertools.product((2, 3, 5), ((0, 1), (1, 2), (0, 3)), (1, 4)):
        refine = Refinement(from_scale=from_scale, to_scale=to_scale, blocks=blocks)
        yield a_case(refined(refine, ratio=ratio, windows=(5, 4, 9, 3)), (150, 9), d=4)
    for n, g in ((1, 1), (4, 1), (4, 4), (6, 2)):
        yield a_case(refined(), (2, 1, 1, 3, 66, 20), n=n, g=g, d=32)


@pytest.mark.full
@pytest.mark.parametrize("case", list(wide_matrix()), ids=str)
@DTYPES
def test_the_wide_matrix_equals_the_reference(case, dtype, tolerance):
    assert_equals_reference(case, "eager", dtype, tolerance)


@pytest.mark.full
@EVERYDAY_CASES
def test_at_most_twice_as_far_from_exact_as_plain_torch(case):
    assert_within_twice_of_plain(case, "eager", torch.float32)


@pytest.mark.full
@EVERYDAY_CASES
def test_in_bf16_it_is_on_average_at_most_twice_as_far_from_exact_as_plain_torch(case):
    """On average: where two blocks have nearly the same score, rounding decides which is opened, here or there."""
    exact = results(case, "naive", torch.float64)
    plain, found = (results(case, backend, torch.bfloat16) for backend in ("naive", "eager"))
    for name in ("out", "grad of q", "grad of k", "grad of v"):
        error, plain_error = ((x[name].double() - exact[name]).abs().mean() for x in (found, plain))
        assert error <= 2 * plain_error, name


@pytest.mark.gpu
@EVERYDAY_CASES
def test_on_a_gpu(case):
    assert_equals_reference(case, "eager", torch.float64, 1e-10, "cuda")
    assert_equals_reference(case, "eager", torch.float32, 1e-5, "cuda")
    first, second = (results(case, "eager", torch.float32, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{}, {"regularizer": "quadratic"}], ids=["joint", "general"])
def test_gradcheck(options):
    case = a_case(refined(TOKENS, windows=(2, 2, 4), **options), (21, 5), n=2, g=1, d=4)
    values = leaves(case, torch.float64)

    def out(*tensors):
        return attend(case, dict(zip(values, tensors, strict=True)), "eager")["out"]

    assert torch.autograd.gradcheck(out, list(values.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["tokens", "nash, gram"])
def test_many_chunks_equal_one_and_two_runs_are_bitwise_equal(monkeypatch, name):
    case = dataclasses.replace(EVERYDAY[name], lengths=(70, 9, 131))
    first, second = (results(case, "eager", torch.float64) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.setitem(opened._GATHERED_PER_CHUNK, "cpu", 1)
    in_chunks = results(case, "eager", torch.float64)
    for name, value in first.items():
        torch.testing.assert_close(in_chunks[name], value, rtol=1e-11, atol=1e-11)


def softmax_over(q, k, v, gains, rows: range, row: int) -> torch.Tensor:
    """Attention of one row [n, d] to other rows of its document, written down once more."""
    angle = torch.outer(
        torch.arange(len(q), dtype=q.dtype), 10000.0 ** (-torch.arange(0, 8, 2, dtype=q.dtype) / 8)
    ).repeat(1, 2)[:, None]

    def turned(x, gain):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        return x * angle.cos() + torch.cat((-x[..., 4:], x[..., :4]), -1) * angle.sin()

    query, key = turned(q, gains[0])[row], turned(k, gains[1])[rows].repeat_interleave(len(gains[0]) // k.shape[1], 1)
    p = (torch.einsum("nd,mnd->nm", query, key) / 8**0.5).softmax(-1)
    return torch.einsum("nm,mnd->nd", p, v[rows].repeat_interleave(len(gains[0]) // k.shape[1], 1))


@pytest.mark.parametrize("backend", ["naive", "eager"])
def test_rows_that_open_everything_attend_to_every_row_beyond_the_window(backend):
    """As many blocks as there are: what is read is then known without choosing, by plain attention. With equal weights
    the opened keys' part of the output is what opening adds.
    """
    spec = MahaSpec(ratio=2, windows=(5, 99), aggregation="mean", convolution=False)
    every = dataclasses.replace(spec, refine=Refinement(from_scale=1, to_scale=0, blocks=99))
    case = a_case(every, (40,))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    found = attend(case, values, backend)
    without = attend(dataclasses.replace(case, spec=spec), values, backend)["out"]
    gains = values["query_gain"], values["key_gain"]
    for row in range(40):
        beyond = max(row + 1 - 5, 0) // 2 * 2
        if not beyond:
            assert (found["weights"][row, :, -1] == 0).all()
            assert torch.equal(found["out"][row], without[row])
            continue
        opened_part = softmax_over(*(values[name] for name in "qkv"), gains, range(beyond), row)
        expected = (2 * without[row] + opened_part) / 3
        torch.testing.assert_close(found["out"][row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("refine", [TOKENS, SUMMARIES])
def test_probabilities_of_what_is_opened_give_the_output_back(refine):
    """Chosen over whole tensors; no row reads a key of the finer scale twice, nor more of them than it may open."""
    case = a_case(refined(refine), (31, 2, 40))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    arguments = (*(values[name] for name in "qkv"), start_rows(case.lengths), parameters, case.spec)
    output = maha_attention(*arguments, with_weights=True)
    probabilities, found = Probabilities(backend_named("eager"), *arguments), 0
    for branch in range(4):
        value = probabilities.levels[probabilities.scale_of(branch)][1].repeat_interleave(2, dim=1)
        p = probabilities.of(branch, range(73)) * output.scale_weights_tnl[:, :, branch, None]
        found = found + torch.einsum("tns,snd->tnd", p, value)
    torch.testing.assert_close(found, output.out_tnd, rtol=0, atol=1e-12)
    opened_keys = probabilities.of(3, range(73)) > 0
    assert not (opened_keys & (probabilities.of(refine.to_scale, range(73)) > 0)).any()
    children = 2 ** (refine.from_scale - refine.to_scale)
    for row, start in enumerate(arguments[3].tolist()):
        openable = openable_blocks(row - start, 2, case.spec.windows, refine.from_scale, refine.to_scale)
        count = min(len(openable), refine.blocks) * children
        assert (opened_keys[row].sum(-1) == count).all()
    mass = row_mass(probabilities, output.scale_weights_tnl, range(73))
    torch.testing.assert_close(mass.sum(-1), torch.ones(73, 4, dtype=torch.float64))
    assert layer_reach(*arguments).names_l == ("scale 0", "scale 1", "scale 2", "opened")


@pytest.mark.parametrize("backend", ["naive", "eager"])
def test_at_a_tie_the_earlier_blocks_are_opened(backend):
    """All keys are 0, so all blocks are alike: rows open the first that they may; values tell which."""
    spec = refined(windows=(4, 3, 7), convolution=False, aggregation="mean")
    case = a_case(spec, (60, 33), n=2, g=1)
    values = {name: value.detach() for name, value in leaves(case, torch.float32).items()}
    values["k"] = torch.zeros_like(values["k"])
    values["v"] = torch.arange(93.0).view(93, 1, 1).expand(93, 1, 8).contiguous()
    plain = dataclasses.replace(case, spec=dataclasses.replace(spec, refine=None))
    found, without = attend(case, values, backend), attend(plain, values, backend)
    for row, start in enumerate(start_rows(case.lengths).tolist()):
        openable = openable_blocks(row - start, 2, spec.windows, 2, 0)
        if not openable:
            continue
        rows = [start + 4 * block + child for block in openable[:2] for child in range(4)]
        feasible = sum(bool(visible_blocks(row - start, 2**scale, spec.windows[scale])) for scale in range(3))
        expected = (without["out"][row, :, 0] * feasible + sum(rows) / len(rows)) / (feasible + 1)
        torch.testing.assert_close(found["out"][row, :, 0], expected, rtol=1e-5, atol=1e-4)


def test_best_blocks_are_the_highest_and_at_a_tie_the_first():
    generator = torch.Generator().manual_seed(0)
    for blocks in (1, 2, 5, 40):
        scores = torch.randint(4, (50, 3, 30), generator=generator).float()
        openable = torch.rand(50, 1, 30, generator=generator) > 0.6
        place, found = opened.best_blocks(scores, openable, blocks)
        assert place.shape[-1] == min(blocks, 30)
        for row, group in itertools.product(range(50), range(3)):
            order = sorted(openable[row, 0].nonzero().flatten().tolist(), key=lambda b: (-scores[row, group, b], b))
            assert place[row, group][found[row, group]].tolist() == order[:blocks]


@pytest.mark.parametrize("rows", [1, 11, 12, 13, 40, 77])
def test_rows_without_anything_to_open_give_that_branch_nothing(rows):
    case = a_case(refined(), (rows,))
    found = results(case, "eager", torch.float64)
    for row in range(rows):
        some = bool(openable_blocks(row, 2, case.spec.windows, 2, 0))
        assert (found["weights"][row, :, -1] > 0).all() == some
        assert (found["weights"][row, :, -1] == 0).all() != some
    nothing_opened = not any(blocks for _, blocks in openable_spans(rows, 2, case.spec.windows, 2, 0))
    assert (found["grad of utility_bias"][-1] == 0).all() == nothing_opened
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": Refinement(from_scale=3, to_scale=0, blocks=1)}, "from_scale <= 2"),
        ({"refine": Refinement(from_scale=1, to_scale=1, blocks=1)}, "to_scale < from_scale"),
        ({"refine": Refinement(from_scale=1, to_scale=-1, blocks=1)}, "0 <= to_scale"),
        ({"refine": Refinement(from_scale=1, to_scale=0, blocks=0)}, "at least one block"),
        ({"queries": "pooled"}, 'use queries="full", or no refine'),
        ({"aggregation": "program", "program": print}, "use another aggregation, or no refine"),
    ],
    ids=str,
)
def test_what_cannot_be_refined_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        refined(**options)


@pytest.mark.parametrize("name", ["tokens", "summaries"])
def test_matrix_products_of_the_accounting_are_those_that_torch_counts(monkeypatch, name):
    """As test_flop_counts.py has them for MAHA: what opening adds to the products of the naive form."""
    monkeypatch.setattr(naive, "equilibrium", lambda matrix, payoff, *_: (payoff.softmax(-1), payoff[:, 0]))
    case = EVERYDAY[name]
    spec, rows = case.spec, 35
    case, refine = dataclasses.replace(case, lengths=(rows,)), spec.refine
    plain = dataclasses.replace(case, spec=dataclasses.replace(spec, refine=None))
    added = counted(case) - counted(plain)
    config = config_from_dict(
        {
            "model": {"heads": case.n, "kv_groups": case.g, "head_width": case.d, "attention": ["maha", "refined"]},
            "maha": {"ratio": spec.ratio, "windows": list(spec.windows)},
            "refine": dataclasses.asdict(refine),
        }
    )
    terms = accounting.attention_flops(config, rows)
    more = {term: flops - terms["maha"].get(term, 0) for term, flops in terms["refined"].items()}
    selection, elementwise = more.pop("selection"), 2 * rows * case.n  # of the utilities: beta and LSE
    assert added == sum(more.values()) - elementwise
    assert more["scores_and_values"] > 0
    openable = sum(
        len(openable_blocks(row, spec.ratio, spec.windows, refine.from_scale, refine.to_scale)) for row in range(rows)
    )
    assert selection == openable * (4 + 2 + 2 * refine.blocks)  # 4 heads in 2 groups


def counted(case: Case) -> int:
    values = leaves(case, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attend(case, values, "naive")
    return counter.get_total_flops()


def test_spans_count_the_blocks_that_every_row_may_open():
    for (ratio, windows), (from_scale, to_scale) in itertools.product(
        ((2, (4, 3, 9)), (3, (1, 5, 2)), (4, (6, 5, 12))), ((1, 0), (2, 0), (2, 1))
    ):
        numbers = (ratio, windows, from_scale, to_scale)
        by_row = [len(openable_blocks(row, *numbers)) for row in range(200)]
        assert [blocks for rows, blocks in openable_spans(200, *numbers) for _ in range(rows)] == by_row
        for row in range(200):
            shown = visible_blocks(row, stride(ratio, to_scale), windows[to_scale])
            seen = visible_blocks(row, stride(ratio, from_scale), windows[from_scale])
            children = ratio ** (from_scale - to_scale)
            expected = [block for block in seen if (block + 1) * children <= shown.start]
            assert list(openable_blocks(row, *numbers)) == expected

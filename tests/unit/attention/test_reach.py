"""The receptive field is that of the operator: its masses give the operator's output back and follow the definition."""

import dataclasses
import itertools

import pytest
import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.dispatch import backend
from maha_megatron.attention.reach import SHARES, Probabilities, distance_edges, layer_reach, row_mass
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import stride, visible_blocks
from tests.support.attention import Case, leaves, parameter_specs, start_rows

SPEC = MahaSpec(ratio=3, windows=(6, 4, 3))
SPECS = {
    "joint": SPEC,
    "nash": dataclasses.replace(SPEC, aggregation="nash", coupling="gram", key_map=True),
    "pooled": dataclasses.replace(SPEC, queries="pooled", regularizer="quadratic", downsampling="max"),
    "window": MahaSpec(ratio=4, windows=(9,), convolution=False),
}
LENGTHS = (31, 2, 40)


def given(spec, lengths=LENGTHS):
    case = Case(lengths=lengths, spec=spec, n=4, g=2, d=8)
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    parameters = AttentionParameters(**{name: values[name] for name in parameter_specs(case)})
    return (values["q"], values["k"], values["v"], start_rows(lengths), parameters, spec)


@pytest.mark.parametrize("name", SPECS)
def test_weights_times_probabilities_times_values_is_the_output(name):
    arguments = given(SPECS[name])
    output = maha_attention(*arguments, with_weights=True)
    probabilities = Probabilities(backend("eager"), *arguments)
    rows, found = range(len(arguments[0])), 0
    for scale, (_, values) in enumerate(probabilities.levels):
        values = values.repeat_interleave(2, dim=1)
        p = probabilities.of(scale, rows) * output.scale_weights_tnl[:, :, scale, None]
        found = found + torch.einsum("tns,snd->tnd", p, values)
    torch.testing.assert_close(found, output.out_tnd, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_mass_is_one_a_row_and_lies_on_rows_of_visible_blocks_only(name):
    spec = SPECS[name]
    arguments = given(spec)
    weights = maha_attention(*arguments, with_weights=True).scale_weights_tnl
    probabilities = Probabilities(backend("eager"), *arguments)
    rows = len(arguments[0])
    mass = torch.cat([row_mass(probabilities, weights, range(at, min(at + 10, rows))) for at in range(0, rows, 10)])
    torch.testing.assert_close(mass.sum(-1), torch.ones(rows, 4, dtype=torch.float64))
    for row, start in enumerate(arguments[3].tolist()):
        reached = set()
        for scale, window in enumerate(spec.windows):
            step = stride(spec.ratio, scale)
            for block in visible_blocks(row - start, step, window):
                reached |= set(range(start + block * step, start + (block + 1) * step))
        reached = torch.tensor([other in reached for other in range(rows)])
        assert (mass[row, :, ~reached] == 0).all()
        if spec.regularizer == "entropy":
            assert (mass[row, :, reached] > 0).all()


def test_mass_of_a_block_is_spread_evenly():
    arguments = given(SPEC, (27,))
    weights = maha_attention(*arguments, with_weights=True).scale_weights_tnl
    probabilities = Probabilities(backend("eager"), *arguments)
    mass = row_mass(probabilities, weights, range(26, 27))[0]
    coarse = probabilities.of(2, range(26, 27))[0] * weights[26, :, 2, None]  # row 0 is seen by scale 2 alone
    torch.testing.assert_close(mass[:, :9], (coarse[:, :1] / 9).expand(-1, 9))


def test_reach_counts_by_distance():
    arguments = given(SPEC)
    found = layer_reach(*arguments)
    probabilities, rows = Probabilities(backend("eager"), *arguments), len(arguments[0])
    mass = row_mass(probabilities, found.scale_weights_tnl, range(rows))
    edges = [*distance_edges(rows), rows]
    assert edges[:5] == [0, 1, 2, 4, 8]
    assert edges[-2] < rows
    expected = torch.zeros_like(found.mass_by_distance_nk)
    for row, head in itertools.product(range(rows), range(4)):
        back = mass[row, head, : row + 1].flip(0)  # by distance
        for number, (first, end) in enumerate(itertools.pairwise(edges)):
            expected[head, number] += back[first:end].sum() / rows
        for number, share in enumerate(SHARES):
            within = int(found.within_tnf[row, head, number])
            assert back[:within].sum() >= share - 1e-9
            assert back[: within - 1].sum() < share + 1e-9
    torch.testing.assert_close(found.mass_by_distance_nk, expected)


def test_solver_reports_are_passed_on():
    assert layer_reach(*given(SPECS["joint"])).solves is None
    solves = layer_reach(*given(SPECS["nash"])).solves
    assert isinstance(solves, SolveReport)
    assert solves.residual_tn.shape == (sum(LENGTHS), 4)
    assert solves.residual_tn.max() <= 1e-10

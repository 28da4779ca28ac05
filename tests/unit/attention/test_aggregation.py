"""Every aggregation, with full and with pooled queries, against the naive form: forward and every gradient by name."""

import itertools

import pytest
import torch

from maha_megatron.attention import row_blocks
from maha_megatron.attention.aggregation import solvers
from maha_megatron.attention.aggregation.cvxpy_oracle import oracle_weights
from maha_megatron.attention.aggregation.naive import equilibrium
from maha_megatron.attention.scale_attention import chunks, eager_pooled
from maha_megatron.attention.slots import slots_of
from maha_megatron.attention.spec import MahaSpec
from maha_megatron.scales import complete_blocks, first_slot
from tests.support.attention import (
    FAST_BACKENDS,
    PACKED,
    Case,
    assert_close,
    assert_equals_reference,
    assert_within_twice_of_plain,
    attend,
    every_aggregation,
    is_path_of_its_own,
    leaves,
    reference,
    results,
    solves,
    start_rows,
)
from tests.support.everyday import everyday
from tests.support.small_programs import complementarity, random_programs

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
OPTIONS = every_aggregation()
NASH = {"aggregation": "nash", "regularizer": "quadratic", "coupling": "gram"}
GRAM = {"coupling": "gram", "lse_utility": False}
QUADRATIC = {"regularizer": "quadratic"}
POOLED = {"queries": "pooled", "aggregation": "nash", "coupling": "gram"}


def maha(ratio=4, windows=(24, 9, 6), **options) -> MahaSpec:
    return MahaSpec(ratio=ratio, windows=windows, **options)


# n and g for 1, 2 and 8 query heads a group
GROUPS = ((2, 2), (4, 2), (8, 1))
ROWS = (1, 3, 4, 5, 63, 257, 1000)


def _shapes(options_in_turn, rows=ROWS):
    """Every length with every option, group size and width taking turns."""
    turns = itertools.count()
    for options in options_in_turn:
        for length in rows:
            turn = next(turns)
            n, g = GROUPS[turn % 3]
            d = (32, 64, 128)[turn // 3 % 3]
            yield Case(lengths=(length,), n=n, g=g, d=d, spec=maha(**options))


PACKED_CASES = [Case(lengths=PACKED, n=4, g=2, spec=maha(**options)) for options in OPTIONS]
SHAPE_CASES = list(_shapes((NASH, GRAM, QUADRATIC, POOLED), rows=ROWS[:-1]))
OTHER_CASES = [
    # the active set and the path beyond four scales; strides longer than a tile
    Case(lengths=(150, 40), n=2, g=1, d=8, spec=maha(ratio=2, windows=(5, 4, 3, 3, 3, 3, 2, 1), **NASH)),
    Case(lengths=(9, 180), n=2, g=1, d=8, spec=maha(ratio=3, windows=(9, 5, 4, 3, 2), **GRAM)),
    Case(lengths=(40, 150), n=2, g=1, d=8, spec=maha(ratio=3, windows=(9, 5, 4, 3, 2), **POOLED)),
    Case(lengths=(170,), n=2, g=2, d=8, spec=maha(ratio=7, windows=(20, 8, 3), **QUADRATIC)),
    # no convolution, plain means
    Case(lengths=PACKED, spec=maha(convolution=False, downsampling="mean", **NASH)),
    Case(lengths=PACKED, spec=maha(convolution=False, downsampling="mean", **POOLED)),
    # one scale weighs 1, whatever the aggregation is
    Case(lengths=PACKED, spec=maha(windows=(17,), **NASH)),
    Case(lengths=PACKED, spec=maha(windows=(17,), **POOLED)),
    Case(lengths=(1000,), n=2, g=1, spec=maha(windows=(33, 17, 9, 12), **NASH)),
]


def is_short(case: Case) -> bool:
    """The reference takes its time over many rows: of the long cases one game."""
    rows = sum(case.lengths)
    return rows < 257 or (rows == 257 and (case.spec.aggregation, case.spec.queries) == ("nash", "full"))


@pytest.mark.parametrize("case", everyday(PACKED_CASES + SHAPE_CASES + OTHER_CASES, is_short), ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@DTYPES
def test_forward_and_every_gradient_equal_the_reference(case, backend, dtype, tolerance):
    assert_equals_reference(case, backend, dtype, tolerance)


@pytest.mark.full
@pytest.mark.parametrize("case", list(_shapes(OPTIONS)), ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_every_option_at_every_length_equals_the_reference(case, backend):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        assert_equals_reference(case, backend, dtype, tolerance)


@pytest.mark.parametrize("options", [NASH, GRAM, QUADRATIC, POOLED], ids=str)
def test_eager_in_many_chunks_and_blocks_equals_the_reference(monkeypatch, options):
    case = Case(lengths=(150, 9, 100), n=2, g=1, d=8, spec=maha(windows=(20, 9, 6, 3), **options))
    expected = reference(case)
    monkeypatch.setitem(chunks._LOGITS_PER_CHUNK, "cpu", 1)
    monkeypatch.setitem(row_blocks._BLOCK_ELEMENTS, "cpu", 200)
    assert_close(results(case, "eager", torch.float64), expected, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "options"),
    everyday(
        itertools.product(
            (torch.float32, torch.bfloat16), (GRAM, POOLED, {"aggregation": "nash"}, {"aggregation": "mean"})
        ),
        lambda dtype, options: dtype == torch.bfloat16 or options is GRAM,
    ),
    ids=str,
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_at_most_twice_as_far_from_exact_as_plain_torch_in_the_dtype(options, backend, dtype):
    assert_within_twice_of_plain(Case(lengths=PACKED, spec=maha(**options)), backend, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", PACKED_CASES + OTHER_CASES, ids=str)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@DTYPES
def test_on_a_gpu(case, backend, dtype, tolerance):
    assert_equals_reference(case, backend, dtype, tolerance, "cuda")


@pytest.mark.parametrize(
    "options", everyday(OPTIONS, is_path_of_its_own), ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_gradcheck(backend, options):
    """Every learned parameter and input; a kink within the step of the difference quotient would fail."""
    spec = MahaSpec(ratio=2, windows=(3, 2, 2), **options)
    case = Case(lengths=(7, 5), n=2, g=1, d=4, spec=spec)
    values = leaves(case, torch.float64)

    def out(*tensors):
        return attend(case, dict(zip(values, tensors, strict=True)), backend)["out"]

    assert torch.autograd.gradcheck(out, list(values.values()), fast_mode=True)


@pytest.mark.parametrize("case", [PACKED_CASES[3], PACKED_CASES[14], PACKED_CASES[-2], PACKED_CASES[-4]], ids=str)
def test_two_runs_are_bitwise_equal(case):
    first, second = (results(case, "eager", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("backend", "options"),
    everyday(
        itertools.product(("naive", *FAST_BACKENDS), OPTIONS),
        lambda backend, options: backend != "naive" or is_path_of_its_own(options),
    ),
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_solves_are_reported_where_an_equilibrium_is_sought(backend, options):
    case = Case(lengths=(30, 9), n=2, g=1, d=8, spec=maha(**options))
    for dtype in (torch.float32, torch.float64):
        report = solves(case, backend, dtype)
        if options["aggregation"] != "nash" and options.get("coupling", "none") == "none":
            assert report is None
            continue
        assert report.residual_tn.shape == (39, 2)
        assert report.residual_tn.max() <= solvers.TOLERANCE[dtype]
        assert report.missed.shape == ()
        assert report.missed == 0
        assert not report.residual_tn.requires_grad
        if backend != "naive":
            assert report.steps_tn.shape == (39, 2)
            assert report.steps_tn.dtype == torch.int32
            assert report.steps_tn.max() >= 1


@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_a_missed_solve_is_counted(backend):
    case = Case(lengths=(30, 9), n=2, g=1, d=8, spec=maha(coupling="gram"))
    values = {name: value.detach() for name, value in leaves(case, torch.float64).items()}
    values["coupling_raw"][1] = torch.nan
    report = solves(case, backend, torch.float64, values)
    assert report.residual_tn[:, 0].max() <= 1e-10
    assert report.missed == 39, "every row of the head whose coupling is not a number"


@pytest.mark.parametrize("largest", [3.0, 100.0])
@pytest.mark.parametrize("scales", [2, 4, 6])
@pytest.mark.parametrize("regularizer", solvers.REGULARIZERS)
def test_the_references_solver_agrees_with_the_solvers(regularizer, scales, largest):
    """On random programs, infeasible scales and near ties among them; gradients where complementarity is strict."""
    matrix, payoff, feasible = random_programs(300, scales, largest=largest, seed=scales)
    matrix, payoff = (part.nan_to_num().requires_grad_() for part in (matrix, payoff))
    found, residual = equilibrium(matrix, payoff, feasible, regularizer)
    expected = solvers.solve(matrix, payoff, feasible, regularizer).weights
    assert residual.max() <= 1e-11
    assert (found[~feasible] == 0).all()
    assert (found - expected).abs().max() <= 1e-9
    strict = complementarity(matrix.detach(), payoff.detach(), feasible, expected.detach(), regularizer) > 1e-6
    assert strict.sum() > 60
    incoming = torch.randn(300, scales, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad(weights, (matrix, payoff), incoming) for weights in (found, expected)), strict=True
    ):
        assert (ours - theirs)[strict].abs().max() <= 1e-8


def test_at_a_tie_the_references_smallest_support_gives_the_gradient():
    """c = (1, 0, -9) + o: scale 1 has no weight and no slack. On {0} the weights are fixed; on {0, 1} they are not."""
    offset = torch.linspace(-3, 3, 200, dtype=torch.float64)[:, None]  # rounding then favours one support or the other
    payoff = (torch.tensor([[1.0, 0.0, -9.0]], dtype=torch.float64) + offset).requires_grad_()
    every = torch.ones(200, 3, dtype=torch.bool)
    weights, _ = equilibrium(torch.zeros(200, 3, 3, dtype=torch.float64), payoff, every, "quadratic")
    (grad,) = torch.autograd.grad(weights, payoff, torch.randn_like(weights))
    assert (weights[:, 0] - 1).abs().max() <= 1e-14
    assert (grad == 0).all()


@pytest.mark.parametrize("lengths", [PACKED, (40, 9, 2, 66), (3,)], ids=str)
def test_reading_a_block_is_a_gather_and_its_gradient_the_transpose(lengths):
    """Whatever gradient comes in, also where a row has nothing to read."""
    start_t = start_rows(lengths).long()
    for stride_rows in (1, 4, 16):
        slots = slots_of(start_t, stride_rows)
        read = eager_pooled._readers(start_t, slots, stride_rows)
        x = torch.randn(len(slots.complete), 2, 3, dtype=torch.float64, requires_grad=True)
        found = eager_pooled._Read.apply(x, -7.0, *read)
        rows = []
        for row, start in enumerate(start_t.tolist()):
            block = complete_blocks(row - start + 1, stride_rows) - 1
            slot = first_slot(start, stride_rows) + block
            rows.append(x[slot] if block >= 0 else torch.full_like(x[0], -7.0).detach())
        expected = torch.stack(rows)
        assert torch.equal(found, expected)
        incoming = torch.randn_like(expected)
        if expected.requires_grad:
            grads = [torch.autograd.grad(one, x, incoming)[0] for one in (found, expected)]
            torch.testing.assert_close(*grads, rtol=0, atol=1e-13)


def _entropy_program(payoff, gram_factor, feasible):
    """Stands for a stated program: the exact solver on what a program is given."""
    assert (payoff[~feasible] == 0).all()
    matrix = torch.zeros_like(payoff)[..., None] * payoff[..., None, :]
    if gram_factor is not None:
        matrix = gram_factor.mT @ gram_factor
    return solvers.solve(matrix.double(), payoff.double(), feasible, "entropy").weights


def _cvxpy_program(payoff, gram_factor, feasible):
    """The gap program by cvxpylayers, group by group of feasible scales."""
    weights = payoff.new_zeros(payoff.shape)
    count = feasible.sum(-1)
    for m in count.unique().tolist():
        chosen = (count == m).nonzero()[:, 0]
        factor = gram_factor[chosen, :m, :m] if gram_factor is not None else payoff.new_zeros(len(chosen), m, m)
        skew = payoff.new_zeros(len(chosen), m, m)
        found = oracle_weights(factor, skew, payoff[chosen, :m], "entropy").to(payoff.dtype)
        weights = weights.index_put((chosen[:, None], torch.arange(m)), found)
    return weights


def _against_the_exact_solver(backend, program, coupling, values_to, gradients_to):
    stated, exact = (
        Case(lengths=(40, 24), n=2, g=1, d=8, spec=maha(windows=(12, 5, 3), coupling=coupling, **options))
        for options in ({"aggregation": "program", "program": program}, {"aggregation": "convex"})
    )
    assert solves(stated, backend, torch.float64) is None
    found, expected = results(stated, backend, torch.float64), reference(exact)
    for name in ("out", "weights"):
        assert_close({name: found[name]}, {name: expected[name]}, values_to)
    assert_close(found, expected, gradients_to)


@pytest.mark.parametrize("coupling", ["none", "gram"])
@pytest.mark.parametrize("backend", ["naive", *FAST_BACKENDS])
def test_a_program_gets_its_utilities_factor_and_feasible_scales_row_by_row(backend, coupling):
    _against_the_exact_solver(backend, _entropy_program, coupling, 1e-10, 1e-10)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in cvxpylayers
@pytest.mark.parametrize("coupling", ["none", "gram"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_cvxpy_program_equals_the_exact_solver(backend, coupling):
    pytest.importorskip("cvxpylayers")
    _against_the_exact_solver(backend, _cvxpy_program, coupling, 1e-6, 1e-5)

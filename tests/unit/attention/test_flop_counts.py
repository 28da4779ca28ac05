"""The accounting's matrix products are those that torch counts while the naive form runs, which visits no masked pair.

torch's FlopCounterMode counts matrix products and nothing elementwise. Compared are, of the terms of the accounting:
    scores_and_values   whole, less the value products of rows that see one key: with nothing to sum, torch multiplies
    pyramid             gated: the score of each gate, 2d of its 4d + 1; conv: whole; mean and max have none
    key_map             whole
    utilities           <rho, q>, 2d of 2d + 1 or 2d + 2
    combination         whole
    gram                2d of a pair; the naive form multiplies (i, j) and (j, i), so L^2 products, not L (L + 1) / 2
RoPE and convolution are elementwise in the naive form, so nothing of them is counted there.
"""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maha_megatron.attention.aggregation import naive
from maha_megatron.attention.spec import MahaSpec
from maha_megatron.config import accounting
from maha_megatron.config.load import config_from_dict
from maha_megatron.scales import stride, visible_blocks
from tests.support.attention import Case, attend, leaves
from tests.support.everyday import everyday

OPTIONS = [
    {"downsampling": downsampling, "key_map": key_map}
    for downsampling, key_map in itertools.product(("gated", "conv", "mean", "max"), (False, True))
]
SHAPES = {"three scales": (61, 3, (7, 4, 5)), "ratio 2": (50, 2, (6, 3, 2, 5)), "one scale": (40, 4, (9,))}
CASES = [
    *itertools.product(
        ("three scales", "ratio 2"), [*OPTIONS, {"lse_utility": False}, {"aggregation": "mean"}, {"coupling": "gram"}]
    ),
    ("one scale", {}),
]


def is_short(shape: str, options: dict[str, object]) -> bool:
    """Every option at one shape, and every shape."""
    return shape != "ratio 2" or options in (OPTIONS[0], {"coupling": "gram"})


def accounted(case: Case, options: dict[str, object]) -> dict[str, int]:
    """Terms of the accounting for the case's one document, as far as they are matrix products."""
    spec, n, d, rows = case.spec, case.n, case.d, case.lengths[0]
    config = config_from_dict(
        {
            "model": {"heads": n, "kv_groups": case.g, "head_width": d},
            "maha": {"ratio": spec.ratio, "windows": list(spec.windows), **options},
        }
    )
    terms = accounting.attention_flops(config, rows)["maha"]
    one_key = sum(
        len(visible_blocks(row, stride(spec.ratio, scale), window)) == 1
        for row, (scale, window) in itertools.product(range(rows), enumerate(spec.windows))
    )
    pairs = spec.scales * (spec.scales + 1) // 2
    gram = max(terms["gram"] - rows * n * (2 * pairs + spec.scales), 0)
    return {
        "scores_and_values": terms["scores_and_values"] - 2 * d * n * one_key,
        "pyramid": {
            "gated": terms["pyramid"] * 2 * d // (4 * d + 1),
            "conv": terms["pyramid"],
            "mean": 0,
            "max": 0,
        }[spec.downsampling],
        "key_map": terms["key_map"],
        "gram": gram * spec.scales**2 // pairs,
        "utilities": terms["utilities"] * 2 * d // (2 * d + 1 + spec.lse_utility),
        "combination": terms["combination"],
    }


def counted(case: Case, monkeypatch) -> int:
    """Without the solver, whose steps are a property of the input."""
    monkeypatch.setattr(naive, "equilibrium", lambda matrix, payoff, *_: (payoff.softmax(-1), payoff[:, 0]))
    values = leaves(case, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        attend(case, values, "naive")
    return counter.get_total_flops()


@pytest.mark.parametrize(("shape", "options"), everyday(CASES, is_short), ids=str)
def test_matrix_products_of_the_accounting_are_those_that_torch_counts(monkeypatch, shape, options):
    rows, ratio, windows = SHAPES[shape]
    case = Case(lengths=(rows,), n=4, g=2, d=8, spec=MahaSpec(ratio=ratio, windows=windows, **options))
    terms = accounted(case, options)
    assert counted(case, monkeypatch) == sum(terms.values()), terms

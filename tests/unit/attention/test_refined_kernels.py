"""Refined layers of one softmax take kernels; the attention of all others is eager's, which is said once."""

import dataclasses

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.decode import triton as decode
from maha_megatron.attention.scale_attention import triton as scale_attention
from maha_megatron.attention.spec import MahaSpec, Refinement
from tests.support.attention import Case, assert_close, attend, leaves, reference, results
from tests.unit.attention.test_triton import in_pieces

SPEC = MahaSpec(ratio=2, windows=(4, 3, 6), refine=Refinement(from_scale=2, to_scale=0, blocks=2))
GAME = dataclasses.replace(SPEC, aggregation="nash", coupling="gram")
CASE, GAME_CASE = (Case(lengths=(21, 4), spec=spec, n=2, g=1, d=32) for spec in (SPEC, GAME))
UNSERVED = "opened blocks (a refined layer) with this aggregation"


def test_kernels_serve_one_softmax_and_no_piece_of_a_few_rows_in_one_step():
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    assert scale_attention.what_no_kernel_serves(q, 1, SPEC) is None
    for options in (
        {"lse_utility": False},
        {"regularizer": "quadratic"},
        {"aggregation": "mean"},
        {"coupling": "gram"},
    ):
        assert scale_attention.what_no_kernel_serves(q, 1, dataclasses.replace(SPEC, **options)) == UNSERVED
    assert not decode.serves(torch.zeros(1, 2, 32), 1, SPEC, streams=1)


@pytest.mark.full
@pytest.mark.parametrize("case", [CASE, GAME_CASE], ids=["one softmax", "a game"])
def test_gradients_and_pieces_pass_through_the_kernels_around_it(case):
    assert_close(results(case, "triton", torch.float32, DEVICE), reference(case), 1e-5)
    assert_close(in_pieces(case, (0, 12, 14, 25)), reference(case), 1e-5)


@pytest.mark.usefixtures("poisoned_memory")
def test_eager_serves_the_others_and_says_so_once(caplog):
    scale_attention._say_once.cache_clear()
    with caplog.at_level("INFO"):
        values = {name: value.detach() for name, value in leaves(GAME_CASE, torch.float32, DEVICE).items()}
        whole = attend(GAME_CASE, values, "triton")
        attend(GAME_CASE, values, "triton")
    expected = {name: reference(GAME_CASE)[name] for name in whole}
    assert_close({name: value.cpu() for name, value in whole.items()}, expected, 1e-5)
    said = [record.message for record in caplog.records if "no kernel serves opened blocks" in record.message]
    assert said == [f"scale attention: no kernel serves {UNSERVED}; eager does"]

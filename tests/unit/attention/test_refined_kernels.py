"""Kernels serve what lies around a refined layer's attention; that attention is eager's, which is said once."""

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.decode import triton as decode
from maha_megatron.attention.scale_attention import triton as scale_attention
from maha_megatron.attention.scale_attention.triton_ops import is_one_softmax
from maha_megatron.attention.spec import MahaSpec, Refinement
from tests.support.attention import Case, assert_close, attend, leaves, reference, results
from tests.unit.attention.test_state import in_pieces

SPEC = MahaSpec(ratio=2, windows=(4, 3, 6), refine=Refinement(from_scale=2, to_scale=0, blocks=2))
CASE = Case(lengths=(21, 4), spec=SPEC, n=2, g=1, d=32)


def test_no_kernel_claims_to_serve_it():
    assert scale_attention.what_no_kernel_serves(64, torch.bfloat16, SPEC) == "opened blocks (a refined layer)"
    assert not is_one_softmax(SPEC)
    assert not decode.serves(torch.zeros(1, 2, 32), 1, SPEC, streams=1)


@pytest.mark.full
def test_gradients_and_pieces_pass_through_the_kernels_around_it():
    assert_close(results(CASE, "triton", torch.float32, DEVICE), reference(CASE), 1e-5)
    values = {name: value.detach() for name, value in leaves(CASE, torch.float32).items()}
    pieces, _ = in_pieces(CASE, values, (12, 14), "triton")
    assert_close(pieces, {name: reference(CASE)[name] for name in pieces}, 1e-5)


@pytest.mark.usefixtures("poisoned_memory")
def test_eager_serves_it_and_says_so_once(caplog):
    scale_attention._say_once.cache_clear()
    with caplog.at_level("INFO"):
        values = {name: value.detach() for name, value in leaves(CASE, torch.float32, DEVICE).items()}
        whole = attend(CASE, values, "triton")
        attend(CASE, values, "triton")
    assert_close(
        {name: value.cpu() for name, value in whole.items()}, {name: reference(CASE)[name] for name in whole}, 1e-5
    )
    said = [record.message for record in caplog.records if "no kernel serves opened blocks" in record.message]
    assert said == ["scale attention: no kernel serves opened blocks (a refined layer); eager does"]

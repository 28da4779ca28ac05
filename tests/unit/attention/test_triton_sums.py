"""Sums over parts, several in one launch, of which none is a whole number of tiles."""

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

from maha_megatron.attention.triton_sums import adding_up

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [
    pytest.param([(3, 5)], id="one"),
    pytest.param([(65, 33), (1, 1), (64, 2, 32), (2, 4, 25)], id="four"),
    pytest.param([(7, 40)] * 9, id="nine alike"),
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_sum_is_that_of_its_own_parts(shapes):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(-9, 9, shape, generator=generator).float().to(DEVICE) for shape in shapes]
    sums = [torch.empty(shape[1:], device=DEVICE) for shape in shapes]
    adding_up(zip(parts, sums, strict=True)).run()
    assert [torch.equal(found, part.sum(0)) for found, part in zip(sums, parts, strict=True)] == [True] * len(shapes)

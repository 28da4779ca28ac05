"""Sequences so long that places, or the way from head to head, take more than 32 bits."""

import pytest
import torch

from tests.support.interpreter import DEVICE  # isort: split

import triton
import triton.language as tl

from maha_megatron.attention.scale_attention.triton_arguments import Lists, Shape
from maha_megatron.attention.scale_attention.triton_opened_forward import listed_rows
from maha_megatron.attention.triton_launch import lined_up


@triton.jit
def rows_kernel(lists, found, SHAPE: tl.constexpr, LINES: tl.constexpr):
    key = tl.load(lists.keys)
    _place, row, _own = listed_rows(lists, tl.program_id(1), 0, LINES, key, LINES, SHAPE)
    tl.store(found + tl.arange(0, LINES), row)


def test_rows_of_a_list_are_found_behind_places_of_more_than_32_bits():
    length, blocks = 3000, 2
    shape = Shape(
        ratio=2, windows=(4,), past_slots=(0,), half=16, epsilon=1e-6, fast=False, utilities=True, apart=False,
        one_turn=False, precision="tf32", blocks=blocks,
    )  # fmt: skip
    places = torch.arange(16) * 7
    order = places + length * (2**31 // length + 5)
    keys = torch.ones(16, dtype=torch.int32)
    found = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    lists = Lists(found, keys.to(DEVICE), order.to(DEVICE), length, 9)
    rows_kernel[(1, 1)](lists, found, SHAPE=shape, LINES=16)
    assert found.tolist() == (places // blocks).tolist()


@pytest.mark.parametrize(("rows", "copied"), [(2**20 - 1, False), (2**20, True)])
def test_heads_that_lie_far_from_each_other_are_copied(rows, copied):
    """16 heads of 128 channels, whose rows follow one another."""
    x = torch.empty_strided((rows, 16, 128), (128, rows * 128, 1), device="meta")
    assert (lined_up(x) is not x) == copied
    assert lined_up(x).stride() == ((16 * 128, 128, 1) if copied else x.stride())

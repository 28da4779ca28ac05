"""Sums over the parts that programs of other kernels have written, always in the same order."""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from maha_megatron.attention.triton_launch import Launch
from maha_megatron.attention.triton_slots import pick

_TILE = {"PARTS": 64, "COLUMNS": 32}


@triton.jit
def add_up_kernel(parts, sums, counts, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of several sums, each a tuple's entry: a program takes some columns of one of them."""
    block, of = tl.program_id(0), 0
    for i in tl.static_range(len(parts) - 1):
        before = tl.cdiv(columns[i], COLUMNS)
        behind = (of == i) & (block >= before)
        block, of = tl.where(behind, block - before, block), tl.where(behind, i + 1, of)
    these, count, width = pick(parts, of), pick(counts, of), pick(columns, of)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in tl.range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        at = these + part.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(at, mask=(part < count)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(pick(sums, of) + column, tl.sum(total, 0), mask=column < width)


def adding_up(sums: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Launch:
    """Of fp32 parts [parts, ...], contiguous, each into its fp32 sum [...], contiguous."""
    parts, wholes = zip(*sums, strict=True)
    for part, whole in zip(parts, wholes, strict=True):
        assert part.shape[1:] == whole.shape, (part.shape, whole.shape)
        assert part.is_contiguous()
        assert whole.is_contiguous()
    columns = tuple(whole.numel() for whole in wholes)
    counts = tuple(len(part) for part in parts)
    arguments = {"parts": parts, "sums": wholes, "counts": counts, "columns": columns} | _TILE
    grid = (sum(triton.cdiv(width, _TILE["COLUMNS"]) for width in columns),)
    device = wholes[0].device
    return Launch(kernel=add_up_kernel, grid=grid, arguments=arguments, options={"num_warps": 4}, device=device)

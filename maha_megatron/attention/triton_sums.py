"""Sums over the parts that programs of other kernels have written, always in the same order."""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from maha_megatron.attention.triton_launch import Launch
from maha_megatron.attention.triton_slots import pick

_TILE = {"PARTS": 64, "COLUMNS": 32}


@triton.jit
def add_up_kernel(parts, sums, lots, counts, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of several lots of sums, each a tuple's entry: a program takes some columns of one sum."""
    block, of = tl.program_id(0), 0
    for i in tl.static_range(len(parts) - 1):
        before = lots[i] * tl.cdiv(columns[i], COLUMNS)
        behind = (of == i) & (block >= before)
        block, of = tl.where(behind, block - before, block), tl.where(behind, i + 1, of)
    count, width = pick(counts, of), pick(columns, of)
    lot, block = block // tl.cdiv(width, COLUMNS), block % tl.cdiv(width, COLUMNS)
    these = pick(parts, of) + lot.to(tl.int64) * count * width
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in tl.range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        at = these + part.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(at, mask=(part < count)[:, None] & (column < width)[None, :], other=0.0)
    tl.store(pick(sums, of) + lot * width + column, tl.sum(total, 0), mask=column < width)


def adding_up(sums: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Launch:
    """Of fp32 parts [lots, parts, ...], contiguous, each into its fp32 sums [lots, ...], contiguous."""
    parts, wholes = zip(*sums, strict=True)
    for part, whole in zip(parts, wholes, strict=True):
        assert (len(part), *part.shape[2:]) == whole.shape, (part.shape, whole.shape)
        assert part.is_contiguous()
        assert whole.is_contiguous()
    lots, counts = tuple(len(part) for part in parts), tuple(part.shape[1] for part in parts)
    columns = tuple(whole[0].numel() for whole in wholes)
    arguments = {"parts": parts, "sums": wholes, "lots": lots, "counts": counts, "columns": columns} | _TILE
    grid = (sum(lot * triton.cdiv(width, _TILE["COLUMNS"]) for lot, width in zip(lots, columns, strict=True)),)
    device = wholes[0].device
    return Launch(kernel=add_up_kernel, grid=grid, arguments=arguments, options={"num_warps": 4}, device=device)

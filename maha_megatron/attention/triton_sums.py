"""Sums over the parts that programs of other kernels have written, always in the same order."""

import triton
import triton.language as tl

from maha_megatron.attention.triton_launch import Launch

_TILE = {"PARTS": 64, "COLUMNS": 32}


@triton.jit
def add_up_kernel(parts, sums, count, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in tl.range(0, count, PARTS):
        part = first + tl.arange(0, PARTS)
        at = parts + part.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(part < count)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < columns)


def adding_up(parts, sums) -> Launch:
    """Of fp32 parts [parts, ...], contiguous, into fp32 `sums` [...], contiguous."""
    assert parts.shape[1:] == sums.shape, (parts.shape, sums.shape)
    assert parts.is_contiguous()
    assert sums.is_contiguous()
    columns = sums.numel()
    arguments = {"parts": parts, "sums": sums, "count": len(parts), "columns": columns} | _TILE
    grid, options = (triton.cdiv(columns, _TILE["COLUMNS"]),), {"num_warps": 4}
    return Launch(kernel=add_up_kernel, grid=grid, arguments=arguments, options=options, device=sums.device)

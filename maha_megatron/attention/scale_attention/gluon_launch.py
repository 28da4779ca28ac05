"""Launches of the kernels of warp groups (gluon_forward.py, gluon_key_gradient.py), and which calls they serve."""

import functools
import math
from collections.abc import Sequence

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from maha_megatron.attention.scale_attention.gluon_forward import attend_by_groups_kernel
from maha_megatron.attention.scale_attention.gluon_key_gradient import key_gradient_by_groups_kernel
from maha_megatron.attention.scale_attention.gluon_loading import GROUP_ROWS, KEYS
from maha_megatron.attention.scale_attention.triton_arguments import GroupSizes, KeyGroupSizes
from maha_megatron.attention.scale_attention.triton_key_work import GROUP_KEYS, ROWS
from maha_megatron.attention.scale_attention.triton_tuning import GroupTiles, KeyGroupTiles
from maha_megatron.attention.triton_launch import Launch
from maha_megatron.scales import MAX_SCALES

_REGISTERS = 168  # of each of 384 threads at the start; consumers then get what the loader leaves
_KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def unserved(rows: torch.Tensor, values: Sequence[torch.Tensor]) -> str | None:
    """What keeps a kernel from a call, in words; None where it serves it on a Hopper card.

    rows: what it reads as it is given, [rows, heads, d]: the forward queries, the keys' gradients dO.
    """
    if rows.dtype not in _KINDS or rows.shape[-1] not in (64, 128):
        return f"{rows.dtype}, heads of {rows.shape[-1]} channels"
    if len(values) > MAX_SCALES:
        return f"{len(values)} scales"
    read = (rows, *values)
    if any(x.dtype != rows.dtype for x in read):
        return "values of another dtype than rows"
    if any(x.stride(0) < _row_length(x) for x in read):
        return "rows that overlap in memory"
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 for x in read)
    return None if aligned else "rows or heads that do not begin at multiples of 16 bytes"


def launch(
    arguments: dict[str, object], keys: torch.Tensor, q: torch.Tensor, values, tiles: GroupTiles, each: bool
) -> Launch:
    """With `arguments` as of attend_kernel, SHAPE included: the prepared keys, queries and values once more.

    `each`: whether outputs of every scale are asked for.
    """
    rows, n, width = q.shape
    described = {
        "query_rows": _described(q, GROUP_ROWS.value, width // 2),
        "key_entries": _described(keys.view(-1, 1, width), KEYS.value, width // 2),
        **_described_values(values, KEYS.value),
    }
    heads = math.gcd(tiles.heads, n // keys.shape[0])
    sizes = GroupSizes(heads=heads, stages=tiles.stages, each=each)
    works = -(-rows // sizes.rows) * (n // heads)
    return _launch(attend_by_groups_kernel, works, described | arguments | {"SIZES": sizes}, q.device)


def launch_key_gradients(
    arguments: dict[str, object], keys: torch.Tensor, grad_out: torch.Tensor, values, works: int, tiles: KeyGroupTiles
) -> Launch:
    """With `arguments` as of key_gradient_kernel: the prepared keys, dO [rows, heads, d] and values once more.

    works: pairs of tiles of 64 keys of every scale, times their parts, times KV groups.
    """
    width = grad_out.shape[-1]
    turned = arguments["found"].turned
    described = {
        "turned_rows": _described(turned.view(-1, 1, width), ROWS.value, width),
        "grad_rows": _described(grad_out, ROWS.value, width),
        "key_entries": _described(keys.view(-1, 1, width), GROUP_KEYS.value, width),
        **_described_values(values, GROUP_KEYS.value),
    }
    sizes = KeyGroupSizes(stages=tiles.stages, shared=max(arguments["parts"]) > 1)
    of_kernel = described | arguments | {"works": works, "SIZES": sizes}
    return _launch(key_gradient_by_groups_kernel, works, of_kernel, grad_out.device)


def _launch(kernel, works: int, arguments: dict[str, object], device: torch.device) -> Launch:
    """A program for each multiprocessor, which does one work after another."""
    grid, options = (min(works, _multiprocessors(device)),), {"num_warps": 4, "maxnreg": _REGISTERS}
    return Launch(kernel=kernel, grid=grid, arguments=arguments, options=options, device=device)


def _described_values(values: Sequence[torch.Tensor], keys: int) -> dict[str, TensorDescriptor | None]:
    """Of every scale that there may be."""
    described = [_described(x, keys, x.shape[-1]) for x in values] + [None] * (MAX_SCALES - len(values))
    return {f"value_{scale}": of_scale for scale, of_scale in enumerate(described)}


def _described(x: torch.Tensor, rows: int, channels: int) -> TensorDescriptor:
    """A tensor [rows, heads, d] as rows of numbers, of which tiles [rows, channels] are copied."""
    layout = _layout(rows, channels, x.dtype)
    return TensorDescriptor(x, [x.shape[0], _row_length(x)], [x.stride(0), 1], [rows, channels], layout)


@functools.cache
def _layout(rows: int, channels: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory; kept, as working it out takes longer than the rest of a description."""
    return gl.NVMMASharedLayout.get_default_for([rows, channels], _KINDS[dtype])


def _row_length(x: torch.Tensor) -> int:
    """From a row's first number to its last, other tensors' in between included."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132

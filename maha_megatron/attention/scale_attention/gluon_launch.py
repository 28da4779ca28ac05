"""Launches of the kernels of warp groups (gluon_forward.py, gluon_query_gradient.py), and which calls they serve."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from maha_megatron.attention.scale_attention.gluon_forward import attend_by_groups_kernel
from maha_megatron.attention.scale_attention.gluon_query_gradient import query_gradient_by_groups_kernel
from maha_megatron.attention.scale_attention.triton_arguments import GroupSizes
from maha_megatron.attention.scale_attention.triton_tuning import GroupTiles
from maha_megatron.attention.triton_launch import Launch

_GROUP_ROWS = _KEYS = 64
_MOST_SCALES = 8
_REGISTERS = {2: 168, 3: 128, 4: 96}  # of each thread at the start, by groups; these then get what the loader leaves
_KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def unserved(q: torch.Tensor, values: Sequence[torch.Tensor], *others: torch.Tensor) -> str | None:
    """What keeps these kernels from a call, in words; None where they serve it on a Hopper card.

    `others`: [t, n, d], which are copied in tiles as q and values are.
    """
    if q.dtype not in _KINDS or q.shape[-1] not in (64, 128):
        return f"{q.dtype}, heads of {q.shape[-1]} channels"
    if len(values) > _MOST_SCALES:
        return f"{len(values)} scales"
    copied = (q, *values, *others)
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) > 0 for x in copied)
    return None if aligned else "rows that do not begin at multiples of 16 bytes"


def launch(arguments: dict[str, object], keys: torch.Tensor, q: torch.Tensor, values, tiles: GroupTiles) -> Launch:
    """With `arguments` as of attend_kernel, SHAPE included: the prepared keys, queries and values once more."""
    return _launch(attend_by_groups_kernel, arguments, keys, q, values, _sizes(tiles, q, keys))


def launch_query_gradients(arguments, keys, q, values, grad_out, tiles: GroupTiles) -> Launch:
    """With `arguments` as of query_gradient_kernel, SHAPE included."""
    described = {"grad_rows": _described(grad_out, _GROUP_ROWS, q.shape[2])}
    sizes = _sizes(dataclasses.replace(tiles, stages=3, groups=2, heads=1), q, keys)
    return _launch(query_gradient_by_groups_kernel, arguments | described, keys, q, values, sizes)


def _sizes(tiles: GroupTiles, q: torch.Tensor, keys: torch.Tensor) -> GroupSizes:
    """As the table says, with as many heads as share keys and divide the groups."""
    heads = math.gcd(tiles.heads, tiles.groups, q.shape[1] // keys.shape[0])
    return GroupSizes(groups=tiles.groups, heads=heads, stages=tiles.stages, shared=tiles.shared)


def _launch(kernel, arguments, keys, q, values, sizes: GroupSizes) -> Launch:
    rows, n, width = q.shape
    of_values = [_described(x, _KEYS, width) for x in values] + [None] * (_MOST_SCALES - len(values))
    described = {
        "query_rows": _described(q, _GROUP_ROWS, width // 2),
        "key_entries": _described(keys.view(-1, 1, width), _KEYS, width // 2),
        **{f"value_{scale}": of_scale for scale, of_scale in enumerate(of_values)},
    }
    work = -(-rows // sizes.rows) * (n // sizes.heads)
    return Launch(
        kernel=kernel,
        grid=(min(work, _multiprocessors(q.device)),),
        arguments=described | arguments | {"SIZES": sizes},
        options={"num_warps": 4, "maxnreg": _REGISTERS[sizes.groups]},
        device=q.device,
    )


def _described(x: torch.Tensor, rows: int, channels: int) -> TensorDescriptor:
    """A tensor [rows, heads, d] as rows of numbers, of which tiles [rows, channels] are copied."""
    length = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    layout = gl.NVMMASharedLayout.get_default_for([rows, channels], _KINDS[x.dtype])
    return TensorDescriptor(x, [x.shape[0], length], [x.stride(0), 1], [rows, channels], layout)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132

"""Launches of the kernels of warp groups (gluon_forward.py, gluon_query_gradient.py), and which calls they serve."""

import functools
from collections.abc import Sequence

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from maha_megatron.attention.scale_attention.gluon_forward import attend_by_groups_kernel
from maha_megatron.attention.scale_attention.gluon_query_gradient import query_gradient_by_groups_kernel
from maha_megatron.attention.scale_attention.triton_tuning import GroupTiles
from maha_megatron.attention.triton_launch import Launch

_GROUP_ROWS = 64
_MOST_SCALES = 8
_REGISTERS = 168  # of each of 384 threads at the start; consumers then get what the loader leaves
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
    described = {"OVERLAP": tiles.overlap}
    return _launch(attend_by_groups_kernel, arguments | described, keys, q, values, tiles)


def launch_query_gradients(arguments, keys, q, values, grad_out, tiles: GroupTiles) -> Launch:
    """With `arguments` as of query_gradient_kernel, SHAPE included."""
    described = {"grad_rows": _described(grad_out, _GROUP_ROWS, q.shape[2])}
    return _launch(query_gradient_by_groups_kernel, arguments | described, keys, q, values, tiles)


def _launch(kernel, arguments, keys, q, values, tiles: GroupTiles) -> Launch:
    rows, n, width = q.shape
    heads = tiles.heads if n // keys.shape[0] % tiles.heads == 0 else 1
    of_values = [_described(x, tiles.keys, width) for x in values] + [None] * (_MOST_SCALES - len(values))
    described = {
        "query_rows": _described(q, _GROUP_ROWS, width // 2),
        "key_entries": _described(keys.view(-1, 1, width), tiles.keys, width // 2),
        **{f"value_{scale}": of_scale for scale, of_scale in enumerate(of_values)},
    }
    sizes = {"HEADS": heads, "KEYS": tiles.keys, "STAGES": tiles.stages}
    work = -(-rows * heads // (2 * _GROUP_ROWS)) * (n // heads)
    programs = min(work, _multiprocessors(q.device)) if tiles.persistent else work
    return Launch(
        kernel=kernel,
        grid=(programs,),
        arguments=described | arguments | sizes,
        options={"num_warps": 4, "maxnreg": _REGISTERS},
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

"""Backends by name: each offers the same four operators, so that one can be swapped for another and compared."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

import maha_megatron.attention.convolution.eager as convolution_eager
import maha_megatron.attention.convolution.naive as convolution_naive
import maha_megatron.attention.dense.eager as dense_eager
import maha_megatron.attention.dense.naive as dense_naive
import maha_megatron.attention.pyramid.eager as pyramid_eager
import maha_megatron.attention.pyramid.naive as pyramid_naive
import maha_megatron.attention.scale_attention.eager as scale_attention_eager
import maha_megatron.attention.scale_attention.naive as scale_attention_naive
from maha_megatron.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The operators of one implementation; signatures as in the naive one of each.

    Where a backend has them and they can: `attend_sequence` (triton_sequence.py) does build_pyramid and attend at once
    for a sequence without a state, `advance` (decode/triton.py) everything for the next few rows of a state's streams.
    """

    convolve: Callable
    build_pyramid: Callable
    attend: Callable
    attend_dense: Callable
    attend_sequence: Callable | None = None
    advance: Callable | None = None


_BACKENDS = {
    "naive": Backend(
        convolve=convolution_naive.convolve,
        build_pyramid=pyramid_naive.build_pyramid,
        attend=scale_attention_naive.attend,
        attend_dense=dense_naive.attend_dense,
    ),
    "eager": Backend(
        convolve=convolution_eager.convolve,
        build_pyramid=pyramid_eager.build_pyramid,
        attend=scale_attention_eager.attend,
        attend_dense=dense_eager.attend_dense,
    ),
}
BACKEND_NAMES = (*_BACKENDS, "triton")


@functools.cache
def backend(name: str) -> Backend:
    """The backend called `name`; its choice is logged the first time.

    Raises:
        ConfigError: there is no such backend, or nothing here runs its kernels.
    """
    if name not in BACKEND_NAMES:
        raise ConfigError(f"unknown attention backend {name!r}: choose one of {', '.join(BACKEND_NAMES)}")
    chosen = _kernels() if name == "triton" else _BACKENDS[name]
    _log.info("attention backend: %s", name)
    return chosen


def _kernels() -> Backend:
    """Triton's kernels, and eager where there are none; triton is imported here only: a CPU needs no such package."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "the attention backend is triton, and the package is not installed: run pip install 'triton>=3.6,<3.8' "
            "(on a GPU it comes with torch), or set maha.backend to eager"
        )
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "the attention backend is triton, and torch finds no CUDA device: set maha.backend to eager "
            "(or TRITON_INTERPRET=1 in the environment, to run kernels step by step on the CPU: a test's way)"
        )
    import maha_megatron.attention.convolution.triton as convolution_triton
    import maha_megatron.attention.decode.triton as decode_triton
    import maha_megatron.attention.dense.triton as dense_triton
    import maha_megatron.attention.pyramid.triton as pyramid_triton
    import maha_megatron.attention.scale_attention.triton as scale_attention_triton
    import maha_megatron.attention.triton_sequence as triton_sequence

    return Backend(
        convolve=convolution_triton.convolve,
        build_pyramid=pyramid_triton.build_pyramid,
        attend=scale_attention_triton.attend,
        attend_dense=dense_triton.attend_dense,
        attend_sequence=triton_sequence.attend_sequence,
        advance=decode_triton.advance,
    )

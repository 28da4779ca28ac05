"""Backends by name: each offers the same four operators, so that one can be swapped for another and compared."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

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
    """The operators of one implementation; signatures as in the naive one of each."""

    convolve: Callable
    build_pyramid: Callable
    attend: Callable
    attend_dense: Callable


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
BACKEND_NAMES = tuple(_BACKENDS)


@functools.cache
def backend(name: str) -> Backend:
    """The backend called `name`; its choice is logged the first time.

    Raises:
        ConfigError: there is no such backend.
    """
    if name not in _BACKENDS:
        raise ConfigError(f"unknown attention backend {name!r}: choose one of {', '.join(_BACKENDS)}")
    _log.info("attention backend: %s", name)
    return _BACKENDS[name]

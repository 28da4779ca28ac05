"""Pooled queries: their pyramid is that of plain means, whatever downsamples keys and values."""

import dataclasses
from collections.abc import Callable

import torch

from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def pool_queries(
    build_pyramid: Callable, q_tnd: torch.Tensor, document_start_t: torch.Tensor, spec: MahaSpec
) -> list[torch.Tensor]:
    """Mean query of every block by scale: L tensors [ceil(t / R_l), n, d], scale 0 the rows themselves.

    Args:
        build_pyramid: of a backend.
        q_tnd: queries [t, n, d] after the convolution, not normalised.
    """
    plain_mean = dataclasses.replace(spec, downsampling="mean", key_map=False)
    levels = build_pyramid((q_tnd,), document_start_t, AttentionParameters(), plain_mean)
    return [queries for (queries,) in levels]

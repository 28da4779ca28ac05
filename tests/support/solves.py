"""Planted reports of solves, as if every MAHA layer had needed a solver."""

import dataclasses
from collections.abc import Callable

import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.attention.api import MahaOutput
from maha_megatron.model import maha_core_attention

STEPS = 3


def planted(missed_a_call: int, residual: float, *, calls: list[int] | None = None) -> Callable[..., MahaOutput]:
    """`maha_attention` whose every call reports so many misses, 3 steps a program and one large residual."""
    honest = maha_core_attention.maha_attention

    def attend(q_tnd: torch.Tensor, *args: object, **kwargs: object) -> MahaOutput:
        t, n, _ = q_tnd.shape
        residual_tn = torch.zeros(t, n)
        residual_tn[0, 0] = residual
        if calls is not None:
            calls.append(t * n)
        report = SolveReport(
            residual_tn=residual_tn,
            steps_tn=torch.full((t, n), STEPS, dtype=torch.int32),
            missed=torch.tensor(missed_a_call),
        )
        return dataclasses.replace(honest(q_tnd, *args, **kwargs), solves=report)

    return attend

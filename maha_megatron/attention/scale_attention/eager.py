"""Attention per scale and aggregation in plain torch: which of the paths an operator takes.

    eager_joint.py    one softmax over all scales; no scale's output is ever formed
    eager_scales.py   each scale's output and log-sum-exp, then aggregation/eager.py fuses them
    eager_pooled.py   the same for queries that are pooled with their scale

The choice is made by the spec, never by a value at run time.
"""

import dataclasses

import torch

from maha_megatron.attention.aggregation.eager import aggregate
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.scale_attention.eager_joint import attend_jointly
from maha_megatron.attention.scale_attention.eager_pooled import attend_pooled
from maha_megatron.attention.scale_attention.eager_scales import attend_scales
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def attend(
    q_tnd: torch.Tensor,
    levels: list[torch.Tensor],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
) -> Attended:
    """Output, scale weights and what solving them left; `levels` are the packed keys and values of every scale.

    Raises:
        UnsolvedProgram: the stated program has no solution for a row and head.
    """
    document_start_t = document_start_t.long()
    if spec.scales == 1:  # one scale weighs 1, and a block of one row is that row
        joint = spec
    elif spec.queries == "full" and spec.aggregation == "mean":
        joint = dataclasses.replace(spec, lse_utility=False)  # without any utility the softmax is 1 / |F|
    else:
        joint = spec if spec.queries == "full" and spec.joint_softmax else None
    if joint is not None:
        out_tnd, weights_tnl = attend_jointly(q_tnd, levels, document_start_t, parameters, joint)
        return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl, report=None)
    per_scale = attend_pooled if spec.queries == "pooled" else attend_scales
    outputs_tnld, lse_tnl = per_scale(q_tnd, levels, document_start_t, parameters, spec)
    out_tnd, weights_tnl, report = aggregate(q_tnd, outputs_tnld, lse_tnl, parameters, spec)
    return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl.detach(), report=report)

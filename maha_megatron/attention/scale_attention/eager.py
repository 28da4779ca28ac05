"""Attention per scale and aggregation in plain torch: which of the paths an operator takes.

    eager_joint.py    one softmax over all scales; no scale's output is ever formed
    eager_scales.py   each scale's output and log-sum-exp, then aggregation/eager.py fuses them
    eager_pooled.py   the same for queries that are pooled with their scale

The choice is made by the spec, never by a value at run time.
"""

import dataclasses
from collections.abc import Sequence

import torch

from maha_megatron.attention.aggregation.eager import aggregate
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.scale_attention.eager_joint import attend_jointly
from maha_megatron.attention.scale_attention.eager_pooled import attend_pooled
from maha_megatron.attention.scale_attention.eager_scales import attend_scales
from maha_megatron.attention.spec import AttentionParameters, MahaSpec


def attend(
    q_tnd: torch.Tensor,
    levels: list[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int] | None = None,
    with_weights: bool = True,
) -> Attended:
    """Output, scale weights and what solving them left; `levels` are the packed keys and values of every scale.

    `past_slots`: how many slots of each level lie in front of slot 0, at most its window; none where it is not given.
    The weights are returned whether asked for or not: the output needs them.

    Raises:
        UnsolvedProgram: the stated program has no solution for a row and head.
    """
    document_start_t = document_start_t.long()
    past_slots = tuple(past_slots or (0,) * spec.scales)
    if spec.scales == 1:  # one scale weighs 1, and a block of one row is that row
        joint = spec
    elif spec.queries == "full" and spec.aggregation == "mean":
        # without any utility the softmax is 1 / |F|
        joint = dataclasses.replace(spec, aggregation="convex", lse_utility=False)
    else:
        joint = spec if spec.queries == "full" and spec.joint_softmax else None
    if joint is not None:
        out_tnd, weights_tnl = attend_jointly(q_tnd, levels, document_start_t, parameters, joint, past_slots)
        return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl, report=None)
    if spec.queries == "pooled":
        assert not any(past_slots), "pooled queries have no past"
        outputs_tnld, lse_tnl = attend_pooled(q_tnd, levels, document_start_t, parameters, spec)
    else:
        outputs_tnld, lse_tnl = attend_scales(q_tnd, levels, document_start_t, parameters, spec, past_slots)
    out_tnd, weights_tnl, report = aggregate(q_tnd, outputs_tnld, lse_tnl, parameters, spec)
    return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl.detach(), report=report)

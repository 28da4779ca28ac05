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

    `past_slots`: how many slots of each level lie in front of slot 0, at most its held entries; none if not given.
    The weights are returned whether asked for or not: the output needs them.

    Raises:
        UnsolvedProgram: the stated program has no solution for a row and head.
    """
    document_start_t = document_start_t.long()
    past_slots = tuple(past_slots or (0,) * spec.scales)
    opened = ()
    if spec.refine is not None:
        opened = levels[spec.refine.to_scale]
        levels, past_slots = _within_windows(levels, past_slots, spec)
    if spec.scales == 1:  # one scale weighs 1, and a block of one row is that row
        joint = spec
    elif spec.queries == "full" and spec.aggregation == "mean":
        # without any utility the softmax is 1 / |F|
        joint = dataclasses.replace(spec, aggregation="convex", lse_utility=False)
    else:
        joint = spec if spec.queries == "full" and spec.joint_softmax else None
    if joint is not None:
        out_tnd, weights_tnl = attend_jointly(q_tnd, levels, document_start_t, parameters, joint, past_slots, opened)
        return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl, report=None)
    if spec.queries == "pooled":
        assert not any(past_slots), "pooled queries have no past"
        outputs_tnld, lse_tnl = attend_pooled(q_tnd, levels, document_start_t, parameters, spec)
    else:
        inputs = (q_tnd, levels, document_start_t, parameters, spec, past_slots, opened)
        outputs_tnld, lse_tnl = attend_scales(*inputs)
    out_tnd, weights_tnl, report = aggregate(q_tnd, outputs_tnld, lse_tnl, parameters, spec)
    return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl.detach(), report=report)


def _within_windows(levels, past_slots, spec):
    """Levels and past_slots without what lies in front of slot 0 and out of every window: blocks that may be opened."""
    spare = [max(past - window, 0) for past, window in zip(past_slots, spec.windows, strict=True)]
    levels = [tuple(x[count:] for x in level) for count, level in zip(spare, levels, strict=True)]
    return levels, tuple(past - count for past, count in zip(past_slots, spare, strict=True))

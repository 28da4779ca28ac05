"""Attention per scale and aggregation by kernels, where there are some; everything else by eager.py.

    triton_joint.py    entropy without coupling, equal weights and a single scale: no scale's output is ever needed
    triton_opened.py   one softmax over all scales and over what a refined layer opens
    triton_scales.py   each scale's output and log-sum-exp, which every other aggregation fuses (aggregation/triton.py)

Kernels serve bf16, fp16 and fp32, with heads of 32, 64 or 128 channels and queries at full rate; refined layers of
one softmax within `most_of_refined`.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import torch

import maha_megatron.attention.scale_attention.eager as eager
from maha_megatron.attention.aggregation.eager import aggregate as eager_aggregate
from maha_megatron.attention.aggregation.triton import aggregate
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.scale_attention.triton_opened_ops import attend_opening
from maha_megatron.attention.scale_attention.triton_ops import attend_jointly, is_joint
from maha_megatron.attention.scale_attention.triton_scales_ops import attend_scales
from maha_megatron.attention.scale_attention.triton_tuning import Tuning
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.attention.triton_launch import unserved_heads
from maha_megatron.scales import stride

_log = logging.getLogger(__name__)


def attend(
    q_tnd: torch.Tensor,
    levels: list[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int] | None = None,
    with_weights: bool = True,
    tuning: Tuning | None = None,
) -> Attended:
    """As `attend` of eager.py; without `with_weights`, weights_tnl is None where a kernel would have to write them.

    `tuning`: other tiles than the table's.
    """
    missing = what_no_kernel_serves(q_tnd, levels[0][0].shape[1], spec)
    if missing:
        _say_once(missing)
        return eager.attend(q_tnd, levels, document_start_t, parameters, spec, past_slots)
    past_slots = tuple(past_slots or (0,) * spec.scales)
    inputs = (q_tnd, levels, document_start_t, parameters, spec, past_slots)
    if is_joint(spec) or spec.refine is not None:
        attend_by = attend_jointly if spec.refine is None else attend_opening
        out_tnd, weights_tnl = attend_by(*inputs, with_weights, tuning)
        return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl, report=None)
    if spec.aggregation == "program":
        without = dataclasses.replace(parameters, utility_query=None, utility_bias=None)
        outputs_tnld, lse_tnl, _ = attend_scales(q_tnd, levels, document_start_t, without, spec, past_slots, tuning)
        out_tnd, weights_tnl, report = eager_aggregate(q_tnd, outputs_tnld.float(), lse_tnl, parameters, spec)
    else:
        out_tnd, weights_tnl, report = aggregate(*attend_scales(*inputs, tuning), parameters, spec)
    return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl.detach(), report=report)


def what_no_kernel_serves(q_tnd: torch.Tensor, groups: int, spec: MahaSpec) -> str | None:
    """What of a call keeps the kernels from serving it, in words; None where they do."""
    unserved = unserved_heads(q_tnd.shape[-1], q_tnd.dtype)
    if unserved:
        return unserved
    if spec.refine is not None:
        return _unserved_refinement(q_tnd, groups, spec)
    return "pooled queries" if spec.scales > 1 and spec.queries == "pooled" else None


def most_of_refined(dtype: torch.dtype) -> dict[str, int]:
    """Of a refined layer: blocks that a row opens, entries of each, query heads of a KV group, scales and opened keys.

    In fp32 a tile of more entries would not fit into the shared memory of the smallest cards.
    """
    return {"blocks": 16, "children": 16 if dtype.itemsize == 4 else 64, "heads": 16, "branches": 8}


def _unserved_refinement(q_tnd: torch.Tensor, groups: int, spec: MahaSpec) -> str | None:
    if not (spec.joint_softmax and spec.lse_utility):
        return "opened blocks (a refined layer) with this aggregation"
    sizes = {
        "blocks": spec.refine.blocks,
        "children": stride(spec.ratio, spec.refine.from_scale - spec.refine.to_scale),
        "heads": q_tnd.shape[1] // groups,
        "branches": spec.branches,
    }
    most = most_of_refined(q_tnd.dtype)
    beyond = [f"{size} {name}, at most {most[name]}" for name, size in sizes.items() if size > most[name]]
    return f"opened blocks (a refined layer) of {beyond[0]}" if beyond else None


@functools.cache
def _say_once(missing: str) -> None:
    _log.info("scale attention: no kernel serves %s; eager does", missing)

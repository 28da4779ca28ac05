"""Attention per scale by its definition: row by row, scale by scale, over the visible blocks only.

A row of a refined layer then opens blocks, and reads their keys as one more scale, the last.
"""

from collections.abc import Sequence

import torch

from maha_megatron.attention.aggregation.naive import aggregate
from maha_megatron.attention.normalise_rotate import normalise, rotate, rotation
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import complete_blocks, first_slot, openable_blocks, stride, visible_blocks


def attend(
    q_tnd: torch.Tensor,
    levels: list[tuple[torch.Tensor, torch.Tensor]],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int] | None = None,
    with_weights: bool = True,
) -> Attended:
    """Output, scale weights and the solver's report; `levels` are the packed keys and values of every scale.

    `past_slots`: how many slots of each level lie in front of slot 0; none where it is not given. The weights are
    returned whether asked for or not: the output needs them.
    """
    past_slots = past_slots or (0,) * spec.scales
    keys = [normalise(keys, parameters.key_gain, spec.norm_epsilon) for keys, _ in levels]
    values = [values for _, values in levels]
    width, groups, outputs, lses = q_tnd.shape[-1], keys[0].shape[1], [], []
    for row, start in enumerate(document_start_t.tolist()):
        queries, probabilities = [], []
        for scale, window in enumerate(spec.windows):
            step = stride(spec.ratio, scale)
            # pooled: the row reads what its last complete block found, whose query stands at the block's last row
            last = complete_blocks(row - start + 1, step) * step - 1 if spec.queries == "pooled" else row - start
            first = last - step + 1 if spec.queries == "pooled" else last
            blocks = visible_blocks(last, step, window)
            slot = past_slots[scale] + first_slot(start, step)
            slots = slice(slot + blocks.start, slot + blocks.stop)
            query = q_tnd[start + first : start + last + 1].mean(0) if blocks else torch.zeros_like(q_tnd[row])
            query = normalise(query, parameters.query_gain, spec.norm_epsilon)
            turn = spec.rotary_stride(scale)
            query_at = torch.tensor(last / turn, dtype=torch.float64, device=q_tnd.device)
            key_at = query_at.new_tensor([(step * (block + 1) - 1) / turn for block in blocks])[:, None]
            query = rotate(query, *rotation(query_at, width, spec.rope_base, q_tnd.dtype))
            key = rotate(keys[scale][slots], *rotation(key_at, width, spec.rope_base, q_tnd.dtype))
            output, lse, probability = attend_blocks(query, key, values[scale][slots])
            outputs.append(output)
            lses.append(lse)
            queries.append(query)
            probabilities.append(probability)
        if spec.refine is not None:
            scale = spec.refine.to_scale
            step = stride(spec.ratio, scale)
            opened = opened_blocks(probabilities[spec.refine.from_scale], row - start, groups, spec)
            slots = past_slots[scale] + first_slot(start, step) + opened.T, torch.arange(groups, device=opened.device)
            key_at = (step * (opened.T.double() + 1) - 1) / spec.rotary_stride(scale)
            key = rotate(keys[scale][slots], *rotation(key_at, width, spec.rope_base, q_tnd.dtype))
            output, lse, _ = attend_blocks(queries[scale], key, values[scale][slots])
            outputs.append(output)
            lses.append(lse)
    out_tnld, lse_tnl = (torch.stack(x).unflatten(0, (-1, spec.branches)).transpose(1, 2) for x in (outputs, lses))
    q_tnd = normalise(q_tnd, parameters.query_gain, spec.norm_epsilon)
    out_tnd, weights_tnl, report = aggregate(q_tnd, out_tnld, lse_tnl, parameters, spec)
    return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl.detach(), report=report)


def opened_blocks(p_nm: torch.Tensor, row: int, groups: int, spec: MahaSpec) -> torch.Tensor:
    """The blocks of refine.to_scale that a row of a document opens, by KV group: int64 [g, number of them].

    Of the blocks of refine.from_scale that the row may open, each group takes the `blocks` best, all where there are
    fewer: those with the most probability, summed over the group's query heads; at a tie the earlier ones.

    Args:
        p_nm: probabilities of the blocks of refine.from_scale that the row sees, by query head. What is opened is no
            differentiable function of them, and has no gradient.
    """
    refine = spec.refine
    seen = visible_blocks(row, stride(spec.ratio, refine.from_scale), spec.windows[refine.from_scale])
    openable = openable_blocks(row, spec.ratio, spec.windows, refine.from_scale, refine.to_scale)
    children = stride(spec.ratio, refine.from_scale - refine.to_scale)
    opened = []
    for score_m in p_nm.detach().unflatten(0, (groups, -1)).sum(1).tolist():
        best = sorted(openable, key=lambda block, score_m=score_m: (-score_m[block - seen.start], block))
        opened.append([block * children + child for block in best[: refine.blocks] for child in range(children)])
    return torch.tensor(opened, dtype=torch.long, device=p_nm.device)


def attend_blocks(
    q_nd: torch.Tensor, k_mgd: torch.Tensor, v_mgd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention of one row to m blocks: output [n, d], LSE [n] and probabilities [n, m]; nothing visible is
    output 0, LSE -inf.
    """
    heads, (blocks, groups, width) = q_nd.shape[0], k_mgd.shape
    if blocks == 0:
        return torch.zeros_like(q_nd), q_nd.new_full((heads,), -torch.inf), q_nd.new_zeros(heads, 0)
    k_mnd = k_mgd.repeat_interleave(heads // groups, dim=1)
    v_mnd = v_mgd.repeat_interleave(heads // groups, dim=1)
    logits = torch.einsum("nd,mnd->nm", q_nd, k_mnd) / width**0.5
    p_nm = logits.softmax(-1)
    return torch.einsum("nm,mnd->nd", p_nm, v_mnd), logits.logsumexp(-1), p_nm

"""Attention per scale by its definition: row by row, scale by scale, over the visible blocks only."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.aggregation.naive import aggregate
from maha_megatron.attention.normalise_rotate import normalise, rotate, rotation
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import complete_blocks, first_slot, stride, visible_blocks


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
    width, outputs, lses = q_tnd.shape[-1], [], []
    for row, start in enumerate(document_start_t.tolist()):
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
            query_at = torch.tensor(last / step, dtype=torch.float64, device=q_tnd.device)
            key_at = query_at.new_tensor([block + (step - 1) / step for block in blocks])[:, None]
            query = rotate(query, *rotation(query_at, width, spec.rope_base, q_tnd.dtype))
            key = rotate(keys[scale][slots], *rotation(key_at, width, spec.rope_base, q_tnd.dtype))
            output, lse = attend_blocks(query, key, values[scale][slots])
            outputs.append(output)
            lses.append(lse)
    out_tnld, lse_tnl = (torch.stack(x).unflatten(0, (-1, spec.scales)).transpose(1, 2) for x in (outputs, lses))
    q_tnd = normalise(q_tnd, parameters.query_gain, spec.norm_epsilon)
    out_tnd, weights_tnl, report = aggregate(q_tnd, out_tnld, lse_tnl, parameters, spec)
    return Attended(out_tnd=out_tnd, weights_tnl=weights_tnl.detach(), report=report)


def attend_blocks(q_nd: torch.Tensor, k_mgd: torch.Tensor, v_mgd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one row to m blocks: output [n, d] and LSE [n]; nothing visible is output 0, LSE -inf."""
    heads, (blocks, groups, width) = q_nd.shape[0], k_mgd.shape
    if blocks == 0:
        return torch.zeros_like(q_nd), q_nd.new_full((heads,), -torch.inf)
    k_mnd = k_mgd.repeat_interleave(heads // groups, dim=1)
    v_mnd = v_mgd.repeat_interleave(heads // groups, dim=1)
    logits = torch.einsum("nd,mnd->nm", q_nd, k_mnd) / width**0.5
    return torch.einsum("nm,mnd->nd", logits.softmax(-1), v_mnd), logits.logsumexp(-1)

"""Attention per scale by its definition: row by row, scale by scale, over the visible blocks only."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.aggregation.naive import aggregate
from maha_megatron.attention.normalise_rotate import normalise, rotate, rotation
from maha_megatron.attention.spec import AttentionParameters, MahaSpec
from maha_megatron.scales import first_slot, stride, visible_blocks


def attend(
    q_tnd: torch.Tensor,
    levels: list[torch.Tensor],
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    past_slots: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [t, n, d] and scale weights [t, n, L]; `levels` are the packed keys and values of every scale.

    `past_slots`: how many slots of each level lie in front of slot 0; none where it is not given.
    """
    past_slots = past_slots or (0,) * spec.scales
    q_tnd = normalise(q_tnd, parameters.query_gain, spec.norm_epsilon)
    keys = [normalise(level[:, 0], parameters.key_gain, spec.norm_epsilon) for level in levels]
    values = [level[:, 1] for level in levels]
    width, rows = q_tnd.shape[-1], []
    for row, start in enumerate(document_start_t.tolist()):
        outputs, lses = [], []
        for scale, window in enumerate(spec.windows):
            step = stride(spec.ratio, scale)
            blocks = visible_blocks(row - start, step, window)
            first = past_slots[scale] + first_slot(start, step)
            slots = slice(first + blocks.start, first + blocks.stop)
            query_at = torch.tensor((row - start) / step, dtype=torch.float64, device=q_tnd.device)
            key_at = query_at.new_tensor([block + (step - 1) / step for block in blocks])[:, None]
            query = rotate(q_tnd[row], *rotation(query_at, width, spec.rope_base, q_tnd.dtype))
            key = rotate(keys[scale][slots], *rotation(key_at, width, spec.rope_base, q_tnd.dtype))
            output, lse = attend_blocks(query, key, values[scale][slots])
            outputs.append(output)
            lses.append(lse)
        rows.append(aggregate(q_tnd[row], torch.stack(outputs), torch.stack(lses), parameters, spec.lse_utility))
    out, weights = zip(*rows, strict=True)
    return torch.stack(out), torch.stack(weights)


def attend_blocks(q_nd: torch.Tensor, k_mgd: torch.Tensor, v_mgd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of one row to m blocks: output [n, d] and LSE [n]; nothing visible is output 0, LSE -inf."""
    heads, (blocks, groups, width) = q_nd.shape[0], k_mgd.shape
    if blocks == 0:
        return torch.zeros_like(q_nd), q_nd.new_full((heads,), -torch.inf)
    k_mnd = k_mgd.repeat_interleave(heads // groups, dim=1)
    v_mnd = v_mgd.repeat_interleave(heads // groups, dim=1)
    logits = torch.einsum("nd,mnd->nm", q_nd, k_mnd) / width**0.5
    return torch.einsum("nm,mnd->nd", logits.softmax(-1), v_mnd), logits.logsumexp(-1)

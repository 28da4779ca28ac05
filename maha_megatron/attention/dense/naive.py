"""Dense attention by its definition: every row attends to all rows of its document up to itself."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.normalise_rotate import normalise, rotate, rotation
from maha_megatron.attention.scale_attention.naive import attend_blocks
from maha_megatron.attention.spec import AttentionParameters, DenseSpec


def attend_dense(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: DenseSpec,
    document_lengths: Sequence[int] | None,
    document_bounds: torch.Tensor | None,
    longest_document: int | None,
) -> torch.Tensor:
    """Output [t, n, d]. The last three arguments repeat what `document_start_t` says and are not needed here."""
    position = torch.arange(len(q_tnd), device=q_tnd.device) - document_start_t
    turn = rotation(position.double()[:, None], q_tnd.shape[-1], spec.rope_base, q_tnd.dtype)
    q_tnd = rotate(normalise(q_tnd, parameters.query_gain, spec.norm_epsilon), *turn)
    k_tgd = rotate(normalise(k_tgd, parameters.key_gain, spec.norm_epsilon), *turn)
    rows = []
    for row, start in enumerate(document_start_t.tolist()):
        rows.append(attend_blocks(q_tnd[row], k_tgd[start : row + 1], v_tgd[start : row + 1])[0])
    return torch.stack(rows)

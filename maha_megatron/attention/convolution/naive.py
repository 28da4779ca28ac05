"""The convolution by its definition, row by row.

row t of a document reads      t-4   t-2    t
with the taps                   0     1     2         out = x + silu(sum of tap * row)
rows before the document's start count as zero
"""

import torch
import torch.nn.functional as F

KERNEL, DILATION = 3, 2


def convolve(q_tnd, k_tgd, v_tgd, document_start_t, weight):
    """x + silu(conv(x)) on every channel of q, k and v; see `maha_attention` for shapes and the order of channels."""
    g, heads_per_group = k_tgd.shape[1], q_tnd.shape[1] // k_tgd.shape[1]
    x = torch.cat((q_tnd.unflatten(1, (g, heads_per_group)), k_tgd[:, :, None], v_tgd[:, :, None]), dim=2)
    taps = weight.view(g, heads_per_group + 2, -1, KERNEL)
    rows = []
    for row, start in enumerate(document_start_t.tolist()):
        mixed = taps[..., KERNEL - 1] * x[row]
        for tap in range(KERNEL - 1):
            source = row - DILATION * (KERNEL - 1 - tap)
            if source >= start:
                mixed = mixed + taps[..., tap] * x[source]
        rows.append(x[row] + F.silu(mixed))
    q, k, v = torch.stack(rows).split((heads_per_group, 1, 1), dim=2)
    return q.flatten(1, 2), k.squeeze(2), v.squeeze(2)

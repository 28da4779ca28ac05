"""The convolution by its definition, row by row.

row t of a document reads      t-4   t-2    t
with the taps                   0     1     2         out = x + silu(sum of tap * row)
rows before the document's start count as zero
"""

import torch
import torch.nn.functional as F

KERNEL, DILATION = 3, 2
CONVOLUTION_REACH = DILATION * (KERNEL - 1)


def convolve(q_tnd, k_tgd, v_tgd, document_start_t, weight, past_rows=None):
    """x + silu(conv(x)) on every channel of q, k and v.

    Args:
        q_tnd, k_tgd, v_tgd, document_start_t: as for `maha_attention`.
        weight: [(n + 2g) d, 3] taps, for every KV group those of its query heads, its key and its value.
        past_rows: of a piece, the raw rows -4 ... -1 in front of it [4, n + 2g, d]: queries, keys, values.

    Returns:
        q, k and v of the same shapes and dtype.
    """
    if past_rows is not None:
        return convolve_after(convolve, past_rows, q_tnd, k_tgd, v_tgd, document_start_t, weight)
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


def convolve_after(convolve, past_rows, q_tnd, k_tgd, v_tgd, document_start_t, weight):
    """`convolve` of a piece by that of one sequence: with the rows in front, each of which is a document of its own:
    what is computed for it is dropped.
    """
    n, g, reach = q_tnd.shape[1], k_tgd.shape[1], len(past_rows)
    earlier = past_rows.split((n, g, g), dim=1)
    joined = [torch.cat(pair) for pair in zip(earlier, (q_tnd, k_tgd, v_tgd), strict=True)]
    front = torch.arange(reach, device=document_start_t.device)
    mixed = convolve(*joined, torch.cat((front, document_start_t + reach)), weight)
    return [x[reach:] for x in mixed]

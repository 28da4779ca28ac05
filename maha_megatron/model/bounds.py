"""Where documents start in a packed micro-batch, in the form that megatron-core hands down to attention."""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class DocumentBounds(PackedSeqParams):
    """megatron-core's packed-sequence parameters with the project's canonical form of the same bounds.

    document_start_t: int32 [t] on the compute device, the row where each row's document starts.
    document_lengths: rows of each document in order, host integers that sum to t (so that nothing asks the device).
    """

    document_start_t: torch.Tensor | None = None
    document_lengths: tuple[int, ...] = ()


def document_bounds(document_start_t: torch.Tensor, device: torch.device | str) -> DocumentBounds:
    """Build the bounds of a micro-batch on the host and send them to `device`.

    Args:
        document_start_t: integer [t] on the CPU; row t's entry is the row where its document starts.
    """
    assert document_start_t.device.type == "cpu", "bounds are made on the host, before the micro-batch is sent"
    rows = document_start_t.numel()
    starts = torch.nonzero(document_start_t == torch.arange(rows)).flatten()
    assert rows > 0, "an empty micro-batch"
    assert starts[0] == 0, "row 0 must start a document"
    ends = torch.cat([starts[1:], torch.tensor([rows])])
    lengths = ends - starts
    cumulative = torch.cat([starts, torch.tensor([rows])]).to(torch.int32).to(device)
    longest = int(lengths.max())
    return DocumentBounds(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        document_start_t=document_start_t.to(torch.int32).to(device, non_blocking=True),
        document_lengths=tuple(lengths.tolist()),
    )

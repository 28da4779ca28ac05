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
    """Build the bounds of a micro-batch on the host and send them to `device`, once for all layers and without waiting.

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
    cumulative = _sent(torch.cat([starts, torch.tensor([rows])]), device)
    longest = int(lengths.max())
    return DocumentBounds(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        document_start_t=_sent(document_start_t, device),
        document_lengths=tuple(lengths.tolist()),
    )


def _sent(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`values` as int32 on `device`; to CUDA from pinned memory, the only kind of copy that the host need not await."""
    values = values.to(torch.int32)
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)

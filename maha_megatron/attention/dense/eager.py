"""Dense attention on the best scaled-dot-product kernel that torch has for the device and the documents.

all documents equally long     one batched causal call (on CUDA cuDNN first: on Hopper it is about 1.8x FA2)
otherwise, CUDA                variable-length flash attention, if this torch has it and the dtype is 16 bits wide
otherwise                      one causal call for every document
"""

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_megatron.attention.normalise_rotate import NormaliseRotate, rotation
from maha_megatron.attention.spec import AttentionParameters, DenseSpec

_log = logging.getLogger(__name__)
_CUDA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attend_dense(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: DenseSpec,
    document_lengths: Sequence[int] | None,
) -> torch.Tensor:
    """Output [t, n, d]; `document_lengths` must be given, as host integers that sum to t."""
    assert document_lengths is not None, (
        "the eager backend needs document_lengths: it never reads document_start_t back"
    )
    assert sum(document_lengths) == len(q_tnd), "document_lengths must sum to the rows of the packed sequence"
    position = torch.arange(len(q_tnd), device=q_tnd.device) - document_start_t
    dtype = torch.promote_types(q_tnd.dtype, torch.float32)
    turn = rotation(position.double()[:, None], q_tnd.shape[-1], spec.rope_base, dtype)
    q_tnd = NormaliseRotate.apply(q_tnd, parameters.query_gain, *turn, spec.norm_epsilon)
    k_tgd = NormaliseRotate.apply(k_tgd, parameters.key_gain, *turn, spec.norm_epsilon)
    if len(set(document_lengths)) == 1:
        batch = (len(document_lengths), document_lengths[0])
        q, k, v = (x.unflatten(0, batch) for x in (q_tnd, k_tgd, v_tgd))
        return _causal(q, k, v).flatten(0, 1)
    varlen = _varlen_attention() if q_tnd.is_cuda and q_tnd.dtype.itemsize == 2 else None
    if varlen is not None:
        return varlen(q_tnd, k_tgd, v_tgd, document_lengths)
    documents = zip(*(x.split(list(document_lengths)) for x in (q_tnd, k_tgd, v_tgd)), strict=True)
    return torch.cat([_causal(q[None], k[None], v[None])[0] for q, k, v in documents])


def _causal(q_bsnd: torch.Tensor, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor) -> torch.Tensor:
    """Batched causal attention [b, s, n, d]; KV heads are shared, not repeated."""
    q, k, v = (x.transpose(1, 2) for x in (q_bsnd, k_bsgd, v_bsgd))
    kernels = sdpa_kernel(_CUDA_PRIORITY, set_priority=True) if q.is_cuda else contextlib.nullcontext()
    with kernels:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


@functools.cache
def _varlen_attention() -> Callable | None:
    """Variable-length causal attention over packed rows, or None where this torch has none (said once)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        _log.warning("torch %s has no variable-length attention: dense layers loop over documents", torch.__version__)
        return None
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def attend(q_tnd, k_tgd, v_tgd, document_lengths):
        options = dict(causal)
        if q_tnd.shape[1] != k_tgd.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                repeats = q_tnd.shape[1] // k_tgd.shape[1]
                k_tgd, v_tgd = (x.repeat_interleave(repeats, dim=1) for x in (k_tgd, v_tgd))
        bounds = torch.tensor([0, *itertools.accumulate(document_lengths)], dtype=torch.int32)
        bounds = bounds.pin_memory().to(q_tnd.device, non_blocking=True)
        longest = max(document_lengths)
        return varlen_attn(q_tnd, k_tgd, v_tgd, bounds, bounds, longest, longest, **options)

    return attend

"""Dense attention on the best scaled-dot-product kernel that torch has for the device and the documents.

all documents equally long     one batched causal call (on CUDA cuDNN first: on Hopper it is about 1.8x FA2)
otherwise, CUDA                variable-length flash attention, if this torch has it and the dtype is 16 bits wide
otherwise                      one causal call for every document

Under torch.use_deterministic_algorithms cuDNN, whose backward is not deterministic, is left out; the backward passes of
torch's flash and memory-efficient kernels then take their deterministic form by themselves.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_megatron.attention.normalise_rotate import NormaliseRotate, rotation
from maha_megatron.attention.spec import AttentionParameters, DenseSpec
from maha_megatron.errors import ConfigError

_log = logging.getLogger(__name__)
_CUDA_PRIORITY = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


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
    """Output [t, n, d]; what it needs to know of the documents must be given: nothing here asks the device."""
    position = torch.arange(len(q_tnd), device=q_tnd.device) - document_start_t
    dtype = torch.promote_types(q_tnd.dtype, torch.float32)
    turn = rotation(position.double()[:, None], q_tnd.shape[-1], spec.rope_base, dtype)
    q_tnd = NormaliseRotate.apply(q_tnd, parameters.query_gain, *turn, spec.norm_epsilon)
    k_tgd = NormaliseRotate.apply(k_tgd, parameters.key_gain, *turn, spec.norm_epsilon)
    return attend_prepared(q_tnd, k_tgd, v_tgd, document_lengths, document_bounds, longest_document)


def attend_prepared(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_lengths: Sequence[int] | None,
    document_bounds: torch.Tensor | None,
    longest_document: int | None,
) -> torch.Tensor:
    """Causal attention [t, n, d] within documents of queries and keys that are normalised and rotated."""
    assert document_lengths is not None, (
        "the eager backend needs document_lengths: it never reads document_start_t back"
    )
    assert sum(document_lengths) == len(q_tnd), "document_lengths must sum to the rows of the packed sequence"
    if len(set(document_lengths)) == 1:
        batch = (len(document_lengths), document_lengths[0])
        q, k, v = (x.unflatten(0, batch) for x in (q_tnd, k_tgd, v_tgd))
        return _causal(q, k, v, "all documents at once").flatten(0, 1)
    varlen = variable_length_attention() if q_tnd.is_cuda and q_tnd.dtype.itemsize == 2 else None
    if varlen is not None:
        assert document_bounds is not None, "documents of several lengths on CUDA need document_bounds on the device"
        assert longest_document is not None, "documents of several lengths on CUDA need longest_document"
        return varlen(q_tnd, k_tgd, v_tgd, document_bounds, longest_document)
    documents = zip(*(x.split(list(document_lengths)) for x in (q_tnd, k_tgd, v_tgd)), strict=True)
    return torch.cat([_causal(q[None], k[None], v[None], "document by document")[0] for q, k, v in documents])


def _causal(q_bsnd: torch.Tensor, k_bsgd: torch.Tensor, v_bsgd: torch.Tensor, manner: str) -> torch.Tensor:
    """Batched causal attention [b, s, n, d]; KV heads are shared where a fast kernel can read them so."""
    if q_bsnd.is_cuda and q_bsnd.dtype == torch.float32:
        # the one fast kernel of this width, the memory-efficient one, takes no grouped heads
        k_bsgd, v_bsgd = _repeated(q_bsnd, k_bsgd, v_bsgd)
    q, k, v = (x.transpose(1, 2) for x in (q_bsnd, k_bsgd, v_bsgd))
    options = {"is_causal": True, "enable_gqa": q.shape[1] != k.shape[1]}
    with sdpa_kernel(_cuda_kernels(), set_priority=True) if q.is_cuda else contextlib.nullcontext():
        kernel = SDPBackend(torch._fused_sdp_choice(q, k, v, **options)).name if q.is_cuda else "torch's CPU kernel"
        _say_once(f"{kernel}, {manner}")
        out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2)


def _cuda_kernels() -> list[SDPBackend]:
    """Kernels allowed now, best first."""
    exact = torch.are_deterministic_algorithms_enabled()
    return [kernel for kernel in _CUDA_PRIORITY if not (exact and kernel == SDPBackend.CUDNN_ATTENTION)]


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with a head for every query head; heads are the last dimension but one."""
    repeats = q.shape[-2] // k.shape[-2]
    return (k, v) if repeats == 1 else tuple(x.repeat_interleave(repeats, dim=-2) for x in (k, v))


@functools.cache
def _say_once(kernel: str) -> None:
    _log.info("dense attention kernel: %s", kernel)


@functools.cache
def variable_length_attention() -> Callable | None:
    """Causal flash attention over packed documents, or None where this torch has none (said once).

    It takes q [t, n, d], k and v [t, g, d], the documents' bounds (int32 [documents + 1], on the device), the longest
    document's rows, and `window_keys`, how many keys a row sees at most (None: all; ConfigError where this torch's
    kernel has no such option).
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        _log.warning("torch %s has no variable-length attention: dense layers loop over documents", torch.__version__)
        return None
    known = inspect.signature(varlen_attn).parameters

    def attend(q_tnd, k_tgd, v_tgd, document_bounds, longest_document, window_keys=None):
        if window_keys is not None and "window_size" not in known:
            raise ConfigError(
                f"the variable-length attention of torch {torch.__version__} has no window; use torch 2.12"
            )
        before = -1 if window_keys is None else window_keys - 1
        options = {"window_size": (before, 0)} if "window_size" in known else {"is_causal": True}
        if q_tnd.shape[1] != k_tgd.shape[1] and "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k_tgd, v_tgd = _repeated(q_tnd, k_tgd, v_tgd)
        _say_once("variable-length flash attention")
        bounds, longest = (document_bounds, document_bounds), (longest_document, longest_document)
        return varlen_attn(q_tnd, k_tgd, v_tgd, *bounds, *longest, **options)

    return attend

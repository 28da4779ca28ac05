"""What MAHA's kernels are measured against on a GPU, each kernel by itself; the operator and the inputs: subjects.py.

    maha           the operator, as on the CPU
    window         the same operator with one scale, a causal sliding window that loads as many keys
    flash_window   that window by FlashAttention 2, on bare q, k, v
    cudnn          dense causal attention of cuDNN, on bare q, k, v
    flash          that of FlashAttention 2
    varlen         FlashAttention 2 over packed documents of several lengths
    flex           FlexAttention, compiled: causal within documents

What a card or a version of torch does not have raises at its first pass; who measures names it with the reason.
"""

import functools
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_megatron.attention.benchmark.subjects import OURS, WINDOW, Inputs, Pass, Setting, Subject, causal, dense, maha
from maha_megatron.attention.benchmark.subjects import window as window_of_keys
from maha_megatron.attention.dense.eager import variable_length_attention
from maha_megatron.errors import ConfigError
from maha_megatron.scales import loaded_pairs


def equal_window(setting: Setting, length: int) -> int:
    """The widest window that loads no more keys than the operator does, over one document, in tiles of 64."""
    spec = setting.spec_at(length)
    ours = sum(loaded_pairs(length, spec.ratio, spec.windows))
    fits, too_wide = 1, length + 1
    while too_wide - fits > 1:
        keys = (fits + too_wide) // 2
        if loaded_pairs(length, spec.ratio, (keys,))[0] <= ours:
            fits = keys
        else:
            too_wide = keys
    return fits


def window(setting: Setting, inputs: Inputs) -> Pass:
    """The operator with one scale."""
    return window_of_keys(setting, inputs, equal_window(setting, inputs.length))


def by_kernel(kernel: SDPBackend) -> Subject:
    """Dense attention by one kernel of scaled_dot_product_attention and no other."""

    def subject(setting: Setting, inputs: Inputs) -> Pass:
        def attend(q, k, v):
            with sdpa_kernel([kernel]):
                return causal(inputs, q, k, v)

        return dense(setting, inputs, attend)

    return subject


def varlen(setting: Setting, inputs: Inputs, window_keys: int | None = None) -> Pass:
    """FlashAttention 2 over packed documents."""
    kernel = variable_length_attention()
    if kernel is None:
        raise ConfigError(f"torch {torch.__version__} has no variable-length attention; use torch 2.10 or newer")
    lengths = inputs.document_lengths
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=setting.device)
    options = {"document_bounds": bounds, "longest_document": max(lengths), "window_keys": window_keys}
    return dense(setting, inputs, partial(kernel, **options))


def flash_window(setting: Setting, inputs: Inputs) -> Pass:
    """The window of equal loaded keys by FlashAttention 2."""
    return varlen(setting, inputs, equal_window(setting, inputs.length))


def flex(setting: Setting, inputs: Inputs) -> Pass:
    """FlexAttention; the mask's blocks are found once, outside of what is timed."""
    attend, blocks_of = _compiled_flex()
    starts, rows = inputs.document_start_t, len(inputs.q_tnd)

    def seen(_batch, _head, row, key):
        return (key <= row) & (key >= starts[row])

    blocks = blocks_of(seen, None, None, rows, rows, device=setting.device)
    grouped = setting.heads != setting.groups

    def packed(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(q, k, v, block_mask=blocks, enable_gqa=grouped)[0].transpose(0, 1)

    return dense(setting, inputs, packed)


@functools.cache
def _compiled_flex() -> tuple[Callable, Callable]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


cudnn, flash = by_kernel(SDPBackend.CUDNN_ATTENTION), by_kernel(SDPBackend.FLASH_ATTENTION)
# the kernels of which the best is the dense side, by whether documents have several lengths
DENSE_KERNELS: dict[bool, dict[str, Subject]] = {False: {"cudnn": cudnn, "flash": flash}, True: {"varlen": varlen}}
WINDOWS: dict[str, Subject] = {WINDOW: window, "flash_window": flash_window}
EVERY_DENSE = tuple(name for kernels in DENSE_KERNELS.values() for name in kernels)


def subjects_of(setting: Setting, with_flex: bool = False) -> dict[str, Subject]:
    """Everything that is measured side by side in a setting."""
    named = {OURS: maha} | WINDOWS | DENSE_KERNELS[setting.mixed]
    return named | ({"flex": flex} if with_flex else {})

"""What every MAHA layer of a model does with a text: its inputs are read where megatron-core hands them over."""

from collections.abc import Callable, Sequence

import torch

from maha_megatron.attention.reach import LayerReach, layer_reach
from maha_megatron.errors import ConfigError, DataError
from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import Gpt
from maha_megatron.model.maha_core_attention import MahaCoreAttention

LEAST_TOKENS = 2


@torch.no_grad()
def inspect_layers(
    model: Gpt, tokens: Sequence[int], progress: Callable[[int], None] = lambda layer: None
) -> dict[int, LayerReach]:
    """One forward pass over one document, and what each MAHA layer did in it.

    Args:
        model: on one process, in evaluation mode.
        tokens: token ids of the document.
        progress: called with the index of every MAHA layer that is done.

    Returns:
        {layer index: LayerReach}, in the model's order.

    Raises:
        ConfigError: no layer of the model is a MAHA layer.
        DataError: fewer than LEAST_TOKENS tokens.
    """
    layers = {index: layer.self_attention.core_attention for index, layer in enumerate(model.layers)}
    layers = {index: module for index, module in layers.items() if isinstance(module, MahaCoreAttention)}
    if not layers:
        raise ConfigError("no layer of this model is a MAHA layer (model.attention): there is nothing to look at")
    if len(tokens) < LEAST_TOKENS:
        raise DataError(f"the text has {len(tokens)} tokens; give at least {LEAST_TOKENS}")
    device = next(model.parameters()).device
    found: dict[int, LayerReach] = {}
    handles = [
        module.register_forward_pre_hook(_Look(index, found, progress), with_kwargs=True)
        for index, module in layers.items()
    ]
    try:
        input_ids_t = torch.tensor(tokens)
        model.logits(input_ids_t.to(device), document_bounds(torch.zeros_like(input_ids_t), device))
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Look:
    """A forward hook that looks at what its layer is given, and keeps the findings, not the inputs."""

    def __init__(self, index: int, found: dict[int, LayerReach], progress: Callable[[int], None]) -> None:
        self._index, self._found, self._progress = index, found, progress

    def __call__(self, module: MahaCoreAttention, given: tuple, named: dict) -> None:
        query, key, value = (*given, *(named[name] for name in ("query", "key", "value")[len(given) :]))[:3]
        start_t = named["packed_seq_params"].document_start_t
        self._found[self._index] = layer_reach(
            query, key, value, start_t, module.learned(), module.spec, backend=module.backend
        )
        self._progress(self._index)

"""What a checkpoint's weights mean: everything that decides their shapes or the function they compute."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from maha_megatron.config.derive import layer_attention, maha_windows, padded_vocabulary, scaled_kinds, uses_maha
from maha_megatron.config.load import config_from_dict
from maha_megatron.config.schema import Config

_MODEL_KEYS = (
    "layers",
    "hidden",
    "heads",
    "kv_groups",
    "head_width",
    "ffn_hidden",
    "norm_epsilon",
    "vocabulary",
    "tied_embeddings",
    "rope_base",
)
_MAHA_KEYS = (
    "ratio",
    "downsampling",
    "key_map",
    "queries",
    "aggregation",
    "regularizer",
    "coupling",
    "program",
    "lse_utility",
    "convolution",
    "rope_unit",
)
_REFINE_KEYS = ("from_scale", "to_scale", "blocks")
_DENSE_KEYS = ("qk_norm", "convolution")
# Keys younger than the first checkpoints, and what every model was before they existed. A model that is still that has
# the fingerprint it always had, so checkpoints without the key continue.
_BEFORE_THE_KEY = {
    "maha.key_map": False,
    "maha.queries": "full",
    "maha.aggregation": "convex",
    "maha.regularizer": "entropy",
    "maha.coupling": "none",
    "maha.program": "",
    "maha.rope_unit": "block",
}


def model_description(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value of what determines shapes and meaning of the weights, derived values resolved.

    Keys of an attention that no layer uses are left out: they do not change the model. Windows of a model whose layers
    are all refined stand under maha.windows, whichever key gave them.
    """
    kinds = layer_attention(config)
    description = {f"model.{key}": getattr(config.model, key) for key in _MODEL_KEYS}
    description["model.vocabulary (padded)"] = padded_vocabulary(config)
    description["model.attention"] = list(kinds)
    if uses_maha(config):
        description |= {f"maha.{key}": getattr(config.maha, key) for key in _MAHA_KEYS}
        description["maha.windows"] = list(maha_windows(config, scaled_kinds(config)[0]))
    if "refined" in kinds:
        description |= {f"refine.{key}": getattr(config.refine, key) for key in _REFINE_KEYS}
        if maha_windows(config, "refined") != tuple(description["maha.windows"]):
            description["refine.windows"] = list(maha_windows(config, "refined"))
    if "dense" in kinds:
        description |= {f"dense.{key}": getattr(config.dense, key) for key in _DENSE_KEYS}
    return description


def model_fingerprint(config: Config) -> str:
    """SHA-256 of the model's description: equal if and only if weights of one configuration fit and mean the other."""
    description = model_description(config)
    told = {
        key: value for key, value in description.items() if key not in _BEFORE_THE_KEY or _BEFORE_THE_KEY[key] != value
    }
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shape_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Where two models differ, one readable line per key.

    Args:
        saved: the configuration of the checkpoint, as config_to_dict gives it.
        current: the configuration of this run, likewise.

    Returns:
        Lines "model.hidden: 512 in the checkpoint, 768 in this run"; empty if the fingerprints are equal.
    """
    there, here = (model_description(config_from_dict(tree)) for tree in (saved, current))
    return [
        f"{key}: {there.get(key, 'absent')} in the checkpoint, {here.get(key, 'absent')} in this run"
        for key in there | here
        if there.get(key) != here.get(key)
    ]

"""Which operator sits in a layer's core_attention slot, and what it needs to know."""

from megatron.core.transformer.spec_utils import ModuleSpec

from maha_megatron.attention.spec import DenseSpec, MahaSpec
from maha_megatron.config.derive import maha_windows
from maha_megatron.config.schema import Config
from maha_megatron.model.dense_core_attention import DenseCoreAttention
from maha_megatron.model.maha_core_attention import MahaCoreAttention


def core_attention_spec(config: Config, kind: str) -> ModuleSpec:
    """The core-attention submodule of a layer of `kind` "maha" or "dense"."""
    if kind == "maha":
        return ModuleSpec(module=MahaCoreAttention, params=_params(config, maha_spec(config)))
    assert kind == "dense", kind
    return ModuleSpec(module=DenseCoreAttention, params=_params(config, dense_spec(config)))


def maha_spec(config: Config) -> MahaSpec:
    """The numbers of a MAHA layer."""
    return MahaSpec(
        ratio=config.maha.ratio,
        windows=maha_windows(config),
        downsampling=config.maha.downsampling,
        key_map=config.maha.key_map,
        queries=config.maha.queries,
        aggregation=config.maha.aggregation,
        regularizer=config.maha.regularizer,
        coupling=config.maha.coupling,
        lse_utility=config.maha.lse_utility,
        convolution=config.maha.convolution,
        rope_base=config.model.rope_base,
    )


def dense_spec(config: Config) -> DenseSpec:
    """The numbers of a dense layer."""
    return DenseSpec(
        qk_norm=config.dense.qk_norm, convolution=config.dense.convolution, rope_base=config.model.rope_base
    )


def _params(config: Config, spec: MahaSpec | DenseSpec) -> dict:
    return {"spec": spec, "backend": config.maha.backend}

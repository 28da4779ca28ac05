"""Which operator sits in a layer's core_attention slot, and what it needs to know."""

from collections.abc import Callable

from megatron.core.transformer.spec_utils import ModuleSpec

from maha_megatron.attention.aggregation.stated_program import load_program
from maha_megatron.attention.spec import DenseSpec, MahaSpec, Refinement, absent_program
from maha_megatron.config.derive import maha_windows
from maha_megatron.config.programs import allowed_program
from maha_megatron.config.schema import Config
from maha_megatron.model.dense_core_attention import DenseCoreAttention
from maha_megatron.model.maha_core_attention import MahaCoreAttention


def core_attention_spec(config: Config, kind: str, program: Callable | None = None) -> ModuleSpec:
    """The core-attention submodule of a layer of `kind` "maha", "refined" or "dense"; `program` as of
    `stated_program`.
    """
    if kind in ("maha", "refined"):
        return ModuleSpec(module=MahaCoreAttention, params=_params(config, maha_spec(config, kind, program)))
    assert kind == "dense", kind
    return ModuleSpec(module=DenseCoreAttention, params=_params(config, dense_spec(config)))


def stated_program(config: Config, allowed: str | None) -> Callable | None:
    """The program that a configuration with maha.aggregation: program names, imported and tried; else None.

    Args:
        config: of a file or of a checkpoint.
        allowed: what the command line gave as --allow-program.

    Raises:
        ConfigError: the command line does not allow exactly this program; nothing was imported.
        ProgramError: it cannot be imported or used.
    """
    name = allowed_program(config, allowed)
    if name is None:
        return None
    return load_program(name, scales=len(maha_windows(config, "maha")), coupling=config.maha.coupling)


def maha_spec(config: Config, kind: str, program: Callable | None = None) -> MahaSpec:
    """The numbers of a layer of `kind` "maha" or "refined", with the program that `stated_program` loaded.

    Without it, where the configuration states one, the spec is good for shapes only (`absent_program`).
    """
    if program is None and config.maha.aggregation == "program":
        program = absent_program
    return MahaSpec(
        ratio=config.maha.ratio,
        windows=maha_windows(config, kind),
        downsampling=config.maha.downsampling,
        key_map=config.maha.key_map,
        queries=config.maha.queries,
        aggregation=config.maha.aggregation,
        regularizer=config.maha.regularizer,
        coupling=config.maha.coupling,
        program=program,
        lse_utility=config.maha.lse_utility,
        convolution=config.maha.convolution,
        rope_base=config.model.rope_base,
        rope_unit=config.maha.rope_unit,
        refine=_refinement(config) if kind == "refined" else None,
    )


def _refinement(config: Config) -> Refinement:
    refine = config.refine
    return Refinement(from_scale=refine.from_scale, to_scale=refine.to_scale, blocks=refine.blocks)


def dense_spec(config: Config) -> DenseSpec:
    """The numbers of a dense layer."""
    return DenseSpec(
        qk_norm=config.dense.qk_norm, convolution=config.dense.convolution, rope_base=config.model.rope_base
    )


def _params(config: Config, spec: MahaSpec | DenseSpec) -> dict:
    return {"spec": spec, "backend": config.maha.backend}

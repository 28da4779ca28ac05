"""The cases of the GPU benchmark: a setting, what is measured side by side in it, and the lengths.

kv16       16 heads x 128, a KV group for each: the setting of the goals
kv8        the same with 8 KV groups
d64        16 heads x 64
packed     16 heads x 128, packed documents of mixed length; dense is FlashAttention 2 for variable lengths
general    aggregations that need each scale's output, as a ratio to the default one
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from maha_megatron.attention.benchmark.peers import subjects_of
from maha_megatron.attention.benchmark.subjects import OURS, Inputs, Pass, Setting, Subject, maha
from maha_megatron.attention.spec import MahaSpec

CALL_ROWS = 32768
LENGTHS = tuple(2**power for power in range(10, 18))
GENERAL_LENGTHS = (4096, 32768)
DEFAULT = "default"  # the operator that the general ones are set against
_OPERATOR = MahaSpec(ratio=4, windows=(), convolution=False)
GPU_SETTING = Setting(
    operator=_OPERATOR, heads=16, groups=16, width=128, backend="triton", device="cuda", call_rows=CALL_ROWS
)
SETTINGS = {
    "kv16": GPU_SETTING,
    "kv8": replace(GPU_SETTING, groups=8),
    "d64": replace(GPU_SETTING, width=64),
    "packed": replace(GPU_SETTING, mixed=True),
}
GENERAL = "general"
VARIANTS: Mapping[str, MahaSpec] = {
    DEFAULT: _OPERATOR,
    "no LSE": replace(_OPERATOR, lse_utility=False),
    "quadratic": replace(_OPERATOR, regularizer="quadratic"),
    "gram": replace(_OPERATOR, coupling="gram"),
    "nash": replace(_OPERATOR, aggregation="nash"),
    "nash, gram": replace(_OPERATOR, aggregation="nash", coupling="gram"),
}
CASES = (*SETTINGS, GENERAL)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one table of the benchmark shows.

    ours: the subjects that run kernels of ours, each with its setting, so that they can be checked and compiled ahead;
    subjects: all of them, `reference` first, without which the case is nothing.
    """

    name: str
    setting: Setting
    lengths: tuple[int, ...]
    subjects: Mapping[str, Subject]
    ours: Mapping[str, Setting]
    reference: str


def case_of(setting: Setting, name: str, lengths: Sequence[int], with_flex: bool = False) -> Case:
    """MAHA beside its peers in one setting."""
    return Case(
        name=name,
        setting=setting,
        lengths=tuple(sorted(lengths)),
        subjects=subjects_of(setting, with_flex),
        ours={OURS: setting},
        reference=OURS,
    )


def general_case(setting: Setting, lengths: Sequence[int]) -> Case:
    """The default operator beside those that need the output of each scale."""
    settings = {name: replace(setting, operator=operator) for name, operator in VARIANTS.items()}
    return Case(
        name=GENERAL,
        setting=setting,
        lengths=tuple(sorted(lengths)),
        subjects={name: _at(own) for name, own in settings.items()},
        ours=settings,
        reference=DEFAULT,
    )


def _at(own: Setting) -> Subject:
    """The operator of a setting of its own, on the inputs of another one."""

    def subject(_: Setting, inputs: Inputs) -> Pass:
        return maha(own, inputs)

    return subject


def preset_case(name: str, lengths: Sequence[int] = (), backend: str = "triton", with_flex: bool = False) -> Case:
    """The case called `name` (CASES), at its own lengths or at others."""
    if name == GENERAL:
        return general_case(replace(GPU_SETTING, backend=backend), lengths or GENERAL_LENGTHS)
    return case_of(replace(SETTINGS[name], backend=backend), name, lengths or LENGTHS, with_flex)

"""What a state says of the operator that made it, so that another one does not go on with it.

Entries and raw rows mean something only under the operator that wrote them: with another ratio positions would be
wrong, with another downsampling the straddling block, and shapes do not tell. So a state knows these whole numbers, and
saves them:

    (ratio, one digest for each of FIELDS, w_0, ..., w_{L-1}), then for a refined layer (-from_scale, -to_scale - 1),
    and last 0 where rotary positions count tokens

Aggregation, utilities and coupling are not among them, nor how many blocks are opened: they read a state and leave
nothing in it.
"""

import zlib
from collections.abc import Sequence

from maha_megatron.attention.spec import MahaSpec

FIELDS = ("downsampling", "key_map", "convolution", "rope_base", "norm_epsilon")
_FIRST_WINDOW = 1 + len(FIELDS)


def identity(spec: MahaSpec) -> tuple[int, ...]:
    """The numbers of an operator, the same in every process and on every machine."""
    refine = () if spec.refine is None else (-spec.refine.from_scale, -spec.refine.to_scale - 1)
    tokens = (0,) if spec.rope_unit == "token" else ()
    return (spec.ratio, *(_digest(name, getattr(spec, name)) for name in FIELDS), *spec.windows, *refine, *tokens)


def differences(saved: Sequence[int], spec: MahaSpec) -> str:
    """Where the operator of these numbers is another than `spec`, for people; "" where it is the same."""
    saved, own = tuple(saved), identity(spec)
    if len(saved) < _FIRST_WINDOW:
        return f"it says {saved} of its operator, which is not enough"
    found = [f"its ratio is {saved[0]}, the layer's {spec.ratio}"] if saved[0] != spec.ratio else []
    changed = [name for place, name in enumerate(FIELDS, start=1) if saved[place] != own[place]]
    found += [f"its {name} is not the layer's, {getattr(spec, name)}" for name in changed]
    numbers = saved[_FIRST_WINDOW:]
    windows = tuple(number for number in numbers if number > 0)
    if (0 in numbers) != (spec.rope_unit == "token"):
        found.append(f"its rope_unit is not the layer's, {spec.rope_unit}")
    if windows != spec.windows:
        found.append(f"its windows are {windows}, the layer's {spec.windows}")
    if [number for number in numbers if number < 0] != [number for number in own[_FIRST_WINDOW:] if number < 0]:
        found.append(f"its refinement is not the layer's, {spec.refine}")
    return "; ".join(found)


def _digest(name: str, value: str | bool | float) -> int:
    word = repr(value if isinstance(value, str | bool) else float(value))
    return zlib.crc32(f"{name}={word}".encode())

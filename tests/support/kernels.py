"""Kernels compiled ahead, for a card that is not there.

python -m tests.support.kernels CAPABILITY WIDTH DTYPE WHICH     prints what `Compiled` has, without PTX, as JSON
WHICH: as `chosen` has it, or "by warp groups" or "refined"
"""

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from maha_megatron.attention import triton_sums
from maha_megatron.attention.aggregation import triton_fusion
from maha_megatron.attention.aggregation import triton_outputs as kernels
from maha_megatron.attention.convolution import triton as convolution
from maha_megatron.attention.decode import triton as decode
from maha_megatron.attention.decode.triton_step import Learned, Streams
from maha_megatron.attention.dense import triton as dense
from maha_megatron.attention.pyramid import triton_levels
from maha_megatron.attention.scale_attention import triton_joint, triton_opened, triton_scales
from maha_megatron.attention.scale_attention.triton import most_of_refined
from maha_megatron.attention.scale_attention.triton_arguments import Lists
from maha_megatron.attention.scale_attention.triton_tuning import Tuning, tuning_for
from maha_megatron.attention.spec import MahaSpec, Refinement
from maha_megatron.attention.triton_launch import Launch
from maha_megatron.scales import slot_count, stride

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of one launch, for one program and thread.

    tiles: of every buffer of a pipelined loop that products by warp groups read while it goes on, how many it holds.
    They have to be as many as the loop's stages, or the loop writes over a tile that a product still reads.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    stages: int
    tiles: list[int]
    counters: tuple[int, ...]  # of every loop over a program's work: how many whole numbers it carries along
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch whose tensors may be on the meta device, as a first call on a card would."""
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if kernel.params[index].is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = _signature(value)
            _describe(value, (index,), attributes, constants)
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, stack = _resources(made.asm["cubin"])
    return Compiled(
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=made.metadata.shared,
        stages=made.metadata.num_stages,
        tiles=[] if kernel.is_gluon() else _tiles_read_unfinished(str(made.asm["ttgir"])),
        counters=_counters(str(made.asm["ttgir"])),
        ptx=str(made.asm["ptx"]),
    )


def _tiles_read_unfinished(ttgir: str) -> list[int]:
    """Compiled.tiles. Loads of a pipelined loop lie in memory allocated without content; views of it lead there."""
    buffer_of, read, tiles = {}, set(), {}
    for line in ttgir.splitlines():
        if made := re.search(r"(%\S+) = ttg\.local_alloc\s*: \(\) -> !ttg\.memdesc<(\d+)x", line):
            buffer_of[made[1]], tiles[made[1]] = made[1], int(made[2])
        elif view := re.search(r"(%\S+) = ttg\.memdesc_\w+ (%\w+)", line):
            buffer_of[view[1]] = buffer_of.get(view[2])
        elif product := re.search(r"ttng\.warp_group_dot (%\w+), (%\w+),.* isAsync = true", line):
            read |= {buffer_of.get(product[1]), buffer_of.get(product[2])} - {None}
    return [tiles[name] for name in sorted(read)]


def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=kind, device="meta")


def launches(
    width: int, dtype: torch.dtype, tuning: Tuning, *, n: int = 16, g: int = 16, rope_unit: str = "block"
) -> dict[str, Launch]:
    """Every launch of forward and backward at 4,096 tokens and their default windows, on the meta device."""
    windows, rows = (128, 112, 124, 64), 4096
    spec = MahaSpec(ratio=4, windows=windows, convolution=False, rope_unit=rope_unit)
    q, start = empty(rows, n, width, kind=dtype), empty(rows, kind=torch.int64)
    level_keys, level_values = (
        [empty(rows // 4**scale, g, width, kind=dtype) for scale in range(len(windows))] for _ in range(2)
    )
    levels = list(zip(level_keys, level_values, strict=True))
    learned = (empty(n, width), empty(g, width), empty(len(windows), n, width), empty(len(windows), n))
    of_call = (q, *learned, start, spec, (0,) * len(windows))
    portable = dataclasses.replace(tuning, groups=None, key_groups=None)
    call, in_portable = (triton_joint.Call(*of_call, tiles, levels) for tiles in (tuning, portable))
    keys, lse, found = empty(g, sum(call.entries), width, kind=dtype), empty(n, rows), call.made_by_query_gradients()
    made = call.made_by_key_gradients(level_keys, level_values)
    pyramids = {}
    for method, learned_here in {
        "gated": (empty(3, 2, g, width), empty(3, 2, g, 4)),
        "conv": (empty(3, 2, g, width, 4),),
        "mean": (),
        "max": (),
    }.items():
        pyramid = triton_levels.Call(method, 4, start, learned_here, levels[0][0], (0,) * len(windows))
        pyramids[f"pooling, {method}"] = pyramid.pooling(1, levels[0], levels[1])
        pyramids[f"pooling gradients, {method}"] = pyramid.gradient(1, levels[0], levels[1], levels[0], levels[0])[0]
    of_rows, past, taps = (q, *levels[0]), empty(4, n + 2 * g, width, kind=dtype), empty((n + 2 * g) * width, 3)
    mixed = convolution.Call(of_rows, past, start, taps, convolution.STEPS)
    parts = empty(mixed.blocks, *taps.shape)
    turned = dense.Call(*of_rows[:2], *learned[:2], start, spec.rope_base, spec.norm_epsilon)
    parts_of = (found.learned_parts, made.gain_parts)
    sums_of = [x[0] for x in parts_of]
    outs, lses = empty(rows, n, len(windows), width, kind=dtype), empty(rows, n, len(windows))
    return (
        pyramids
        | _fusions(outs, lses, q)
        | {
            "turning": turned.turning(of_rows[:2]),
            "turning's gradients": turned.gradients(of_rows[:2], of_rows[:2], empty(turned.tiles, n + g, width)),
            "convolution": mixed.mixing(of_rows),
            "convolution gradients": mixed.gradients(of_rows, of_rows, past, parts),
            "preparation": call.preparation(keys),
            "attention": in_portable.attention(keys, q, lse, None, None),
            "attention, as the table has it": call.attention(keys, q, lse, None, None),
            "query gradients": call.query_gradients(keys, q, lse, None, q, found),
            "key gradients": in_portable.key_gradients(keys, q, found, made),
            "key gradients, as the table has it": call.key_gradients(keys, q, found, made),
            "key gradients, parts added": call.added_parts(made),
            "parts added up": triton_sums.adding_up(zip(parts_of, sums_of, strict=True)),
        }
        | _apart(of_call, tuning, levels)
    )


def refined_launches(
    width: int,
    dtype: torch.dtype,
    tuning: Tuning,
    *,
    n: int = 16,
    g: int = 16,
    ratio: int = 4,
    blocks: int = 4,
    **options,
) -> dict[str, Launch]:
    """What a refined layer launches that others do not, or not like that, at 4,096 tokens, on the meta device.

    A block has ratio**2 children. `options`: more of the spec.
    """
    rows, refine = 4096, Refinement(from_scale=2, to_scale=0, blocks=blocks)
    spec = MahaSpec(ratio=ratio, windows=(128, 112, 256), convolution=False, refine=refine, **options)
    q, start = empty(rows, n, width, kind=dtype), empty(rows, kind=torch.int64)
    counts = [slot_count(rows, stride(ratio, scale)) for scale in range(spec.scales)]
    levels = [tuple(empty(count, g, width, kind=dtype) for _ in range(2)) for count in counts]
    learned = (empty(n, width), empty(g, width), empty(spec.branches, n, width), empty(spec.branches, n))
    call = triton_opened.Call(q, *learned, start, spec, (0, 0, 0), tuning, levels)
    keys, lse, chosen = empty(g, sum(call.entries), width, kind=dtype), empty(n, rows), empty(g, rows, blocks)
    choices = (empty(g, rows * blocks, kind=torch.int32), empty(g, rows * blocks, kind=torch.int64))
    lists = Lists(chosen.to(torch.int32), *choices, rows * blocks, call.entries[2] + 1)
    opening, outputs = call.empty_opening(backward=True), call.empty_outputs()
    of_queries, of_keys = call.empty_gradients(lists.chosen)
    found = call.made_by_query_gradients()._replace(opened=of_queries)
    made = call.made_by_key_gradients(*zip(*levels, strict=True))._replace(opened=of_keys)
    return {
        "choice": call.choice(keys, lists.chosen),
        "opening": call.opening(None, opening),
        "opening, backward": call.opening((q, lse, q), opening),
        "opened keys": call.opened_attention(opening, keys, lists, outputs),
        "opened keys joined": call.joining(lists.chosen, outputs, q, lse, lse),
        "opened keys' gradients": call.opened_gradients(opening, keys, lists, q, of_queries, of_keys),
        "runs added": call.added_runs(lists, of_keys),
        "query gradients, refined": call.query_gradients(keys, q, lse, None, q, found),
        "key gradients, refined": call.key_gradients(keys, q, found, made),
    }


def refined_launches_at_the_ends(width: int, dtype: torch.dtype, tuning: Tuning) -> dict[str, Launch]:
    """`refined_launches` of the most blocks, of the most entries each, and heads that kernels serve."""
    most = most_of_refined(dtype)
    sizes = {"n": most["heads"], "g": 1, "ratio": math.isqrt(most["children"]), "blocks": most["blocks"]}
    return refined_launches(width, dtype, tuning, **sizes)


_IN_TOKENS = (
    "attention",
    "attention, as the table has it",
    "attention, weighed",
    "attention, weighed, as the table has it",
    "attention, scale by scale",
    "attention, scale by scale, as the table has it",
    "query gradients",
    "query gradients, weighed",
    "query gradients, scale by scale",
    "query gradients, refined",
    "key gradients",
    "key gradients, as the table has it",
)


def launches_in_tokens(width: int, dtype: torch.dtype, tuning: Tuning) -> dict[str, Launch]:
    """Where all scales count tokens, so that queries turn once: some of the launches that are others then."""
    found = launches(width, dtype, tuning, rope_unit="token") | refined_launches(
        width, dtype, tuning, rope_unit="token"
    )
    return {f"in tokens: {name}": found[name] for name in _IN_TOKENS}


def _apart(of_call: tuple, tuning: Tuning, levels: list) -> dict[str, Launch]:
    """Launches of calls whose scales have a softmax each."""
    q, portable = of_call[0], dataclasses.replace(tuning, groups=None, key_groups=None)
    kinds = (triton_scales.Call, triton_joint.WeighedCall)
    single, weighed = (kind(*of_call, portable, levels) for kind in kinds)
    single_by_groups, weighed_by_groups = (kind(*of_call, tuning, levels) for kind in kinds)
    rows, n, scales, width = len(q), single.n, len(levels), single.d
    keys, lse = empty(single.g, sum(single.entries), width, kind=q.dtype), empty(n, rows)
    outs, lses, own_lse = empty(rows, n, scales, width, kind=q.dtype), empty(rows, n, scales), empty(n, scales, rows)
    made = single.made_by_key_gradients(*zip(*levels, strict=True))
    given = triton_scales.Given(outs, lses, outs, lses, lses)
    of_scales, of_weighed = single.found_by_query_gradients(given), weighed.made_by_query_gradients()
    return {
        "attention, scale by scale": single.attention(keys, outs, lses, lses),
        "attention, scale by scale, as the table has it": single_by_groups.attention(keys, outs, lses, lses),
        "query gradients, scale by scale": single.query_gradients(keys, given, of_scales),
        "key gradients, scale by scale": single.key_gradients(keys, outs, of_scales, made),
        "key gradients, scale by scale, as the table has it": single_by_groups.key_gradients(
            keys, outs, of_scales, made
        ),
        "attention, weighed": weighed.attention(keys, q, lse, None, own_lse),
        "attention, weighed, as the table has it": weighed_by_groups.attention(keys, q, lse, None, own_lse),
        "query gradients, weighed": weighed.query_gradients(keys, q, lse, own_lse, q, of_weighed),
        "key gradients, weighed": weighed.key_gradients(keys, q, of_weighed, made),
        "key gradients, weighed, as the table has it": weighed_by_groups.key_gradients(keys, q, of_weighed, made),
    }


def _fusions(outs: torch.Tensor, lses: torch.Tensor, out: torch.Tensor) -> dict[str, Launch]:
    """Launches of aggregation; the game's of as many scales as the others have, and of the most."""
    rows, n, own_scales = lses.shape
    found = {}
    for name, scales, gram, game, regularizer in (
        ("a game, 8 scales", 8, True, True, "entropy"),
        ("a game", own_scales, True, True, "entropy"),
        ("gram", own_scales, True, False, "entropy"),
        ("nash", own_scales, False, True, "entropy"),
        ("sparsemax", own_scales, False, False, "quadratic"),
    ):
        outs, numbers = outs.new_empty(rows, n, scales, outs.shape[-1]), lses.new_empty(rows, n, scales)
        kappa, skew = lses.new_empty(n), lses.new_empty(n, scales * (scales - 1) // 2)
        given = (kappa if gram else None, skew if game else None, regularizer, True)
        fusion = triton_fusion.Fusion(outs, numbers, numbers, *given)
        products, one = (lses.new_empty(rows, n, scales, scales) if gram else None), lses.new_empty(rows, n)
        made = (numbers, one.new_empty(rows, n, 2), one) if gram else (numbers, None, None)
        solved = (one, one.to(torch.int32)) if gram or game else (None, None)
        grads = (numbers, out, *made[:2], outs)
        found |= {
            f"equilibrium, {name}": fusion.equilibrium(products, numbers, *solved),
            f"equilibrium's gradients, {name}": fusion.equilibrium_gradient(products, numbers, numbers, *made),
            f"outputs' gradients, {name}": fusion.over_outputs(kernels.outputs_gradient_kernel, outs, out, *grads),
        }
        if gram or game:
            found[f"continuation, {name}"] = fusion.continuation(products, numbers, *solved)
    return found | {
        "products": fusion.products(lses.new_empty(rows, n, scales, scales)),
        "combination": fusion.over_outputs(kernels.combine_kernel, outs, numbers, out),
        "weights' gradients": fusion.over_outputs(kernels.weights_gradient_kernel, outs, out, numbers),
    }


def warp_group_launches(width: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The kernels by warp groups at the ends of what they serve, on the meta device."""
    found, tuning = {}, tuning_for(dtype.itemsize, (9, 0))
    joint, weighed, each = triton_joint.Call, triton_joint.WeighedCall, triton_scales.Call
    tokens = "in tokens"
    for name, kind, rows, n, g, ratio, windows, past, with_weights in (
        ("one row and head", joint, 1, 1, 1, 4, (128, 112, 124, 64), False, False),
        ("one scale, one head at a time", joint, 4096, 6, 2, 2, (100,), False, True),
        ("ratio 3, after a past", joint, 100, 4, 2, 3, (100, 30, 20), True, True),
        ("8 scales", joint, 4096, 16, 8, 4, (64,) * 8, False, True),
        (f"{tokens}, one row and head", joint, 1, 1, 1, 4, (128, 112, 124, 64), False, False),
        (f"{tokens}, ratio 3, after a past", joint, 100, 4, 2, 3, (100, 30, 20), True, True),
        (f"{tokens}, 8 scales", joint, 4096, 16, 8, 4, (64,) * 8, False, True),
        ("weighed, one row and head", weighed, 1, 1, 1, 4, (128, 112, 124, 64), False, False),
        ("weighed, ratio 3, after a past", weighed, 100, 4, 2, 3, (100, 30, 20), True, True),
        ("weighed, 8 scales", weighed, 4096, 16, 8, 4, (64,) * 8, False, True),
        (f"weighed, {tokens}, one row and head", weighed, 1, 1, 1, 4, (128, 112, 124, 64), False, False),
        (f"weighed, {tokens}, 8 scales", weighed, 4096, 16, 8, 4, (64,) * 8, False, True),
        ("scale by scale, one row and head", each, 1, 1, 1, 4, (128, 112, 124, 64), False, False),
        ("scale by scale, ratio 3, after a past", each, 100, 4, 2, 3, (100, 30, 20), True, True),
        ("scale by scale, 8 scales", each, 4096, 16, 8, 4, (64,) * 8, False, True),
        (f"scale by scale, {tokens}, one row and head", each, 1, 1, 1, 4, (128, 112, 124, 64), False, False),
        (f"scale by scale, {tokens}, 8 scales", each, 4096, 16, 8, 4, (64,) * 8, False, True),
        (f"scale by scale, {tokens}, ratio 3, after a past", each, 100, 4, 2, 3, (100, 30, 20), True, True),
    ):
        pasts = windows if past else (0,) * len(windows)
        entries = [before + slot_count(rows, stride(ratio, scale)) for scale, before in enumerate(pasts)]
        levels = [tuple(empty(count, g, width, kind=dtype) for _ in range(2)) for count in entries]
        learned = (empty(n, width), empty(g, width))
        learned += (empty(len(windows), n, width), empty(len(windows), n)) if with_weights else (None, None)
        unit, q = "token" if tokens in name else "block", empty(rows, n, width, kind=dtype)
        spec = MahaSpec(ratio=ratio, windows=windows, convolution=False, rope_unit=unit)
        call = kind(q, *learned, empty(rows, kind=torch.int64), spec, pasts, tuning, levels)
        keys, of_scales = empty(g, sum(entries), width, kind=dtype), empty(rows, n, len(windows))
        given = (keys, q, empty(n, rows), of_scales if with_weights else None)
        outs = empty(rows, n, len(windows), width, kind=dtype) if kind is each else q
        if kind is each:
            given = (keys, outs, of_scales, given[-1])
        else:
            given += (empty(n, len(windows), rows) if kind is weighed else None,)
        found[name] = call.attention(*given)
        if unit == "token":
            continue  # of keys' gradients, where one turn moves an offset alone, the table's sizes have to do
        for_keys = (call.made_by_query_gradients(), call.made_by_key_gradients(*zip(*levels, strict=True)))
        found[f"{name}, keys' gradients"] = call.key_gradients(keys, outs, *for_keys)
    assert all(launch.kernel.is_gluon() for launch in found.values())
    return found


def decoding_launches(
    width: int, dtype: torch.dtype, *, rows: int = 1, n: int = 16, g: int = 16, downsampling: str = "gated"
) -> dict[str, Launch]:
    """Every launch of a step of 32 streams at the default windows of 4,096 tokens, on the meta device."""
    spec, streams = MahaSpec(ratio=4, windows=(128, 112, 124, 64), downsampling=downsampling), 32

    x = [empty(streams * rows, heads, width, kind=dtype) for heads in (n, g, g)]
    entries = tuple(empty(streams, window, 2, g, width, kind=dtype) for window in spec.windows)
    counts = [empty(streams, kind=torch.int64) for _ in range(2)]
    old = Streams(entries, empty(streams, 4, n + 2 * g, width, kind=dtype), *counts)
    gates = {"gated": (empty(3, 2, g, width), empty(3, 2, g, 4)), "conv": (empty(3, 2, g, width, 4),)}[downsampling]
    frequency = empty(4, 4, width // 2, kind=torch.int32)
    learned = Learned(empty(n, width), empty(g, width), empty(4, n, width), empty(4, n), frequency)
    start, taps = empty(streams * rows, kind=torch.int64), empty((n + 2 * g) * width, 3)
    call = decode.Call(x, start, old, taps, gates, learned, spec)
    new, parts = call.empty_state(), call.empty_parts()
    fresh = empty(streams, call.step.slots_before[-1], 2, g, width, kind=dtype)
    return {
        "decoding, rows": call.rows(new, fresh, x[0]),
        "decoding, entries": call.attention(new, fresh, x[0], parts),
        "decoding, joining": call.joining(parts, x[0], empty(streams * rows, n, 4)),
    }


def _signature(value):
    if isinstance(value, tuple):
        items = [_signature(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    return "constexpr" if value is None or value == 1 else "i32"


def _describe(value, path, attributes, constants) -> None:
    """What a call tells the compiler of its arguments: numbers that 16 divides, and those that are 1."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _describe(item, (*path, index), attributes, constants)
    elif isinstance(value, TensorDescriptor):
        return
    elif value is None or (not isinstance(value, torch.Tensor) and value == 1):
        constants[path] = value
    elif isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread: what a kernel without arrays of its own has there was spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK"))
    return int(registers[1]), int(stack[1])


def _counters(ttgir: str) -> tuple[int, ...]:
    """Compiled.counters. A loop over a program's work goes on by the number of programs."""
    step = "|".join(set(re.findall(r"(%\w+) = tt\.get_num_programs", ttgir)))
    loops = re.findall(rf"scf\.for .* step (?:{step}) (?:iter_args\(.*\) -> \((.*)\) )? ?: i32", ttgir) if step else []
    return tuple(carried.split(", ").count("i32") for carried in loops)


def chosen(launches: dict[str, Launch], which: str) -> dict[str, Launch]:
    """Some of the launches, which are given by name.

    Args:
        which: "all"; "of four scales", without the game of 8, which takes longer than all others together; "first", of
            these the first of every kernel.
    """
    if which == "all":
        return launches
    kept = {name: launch for name, launch in launches.items() if not name.endswith("8 scales")}
    if which == "of four scales":
        return kept
    assert which == "first", which
    return {name: launch for name, launch in kept.items() if launch is _first_of(kept, launch.kernel)}


def _first_of(launches: dict[str, Launch], kernel: object) -> Launch:
    return next(launch for launch in launches.values() if launch.kernel is kernel)


def main() -> None:
    capability, width, dtype, which = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
    found, tuning = {}, tuning_for(dtype.itemsize, divmod(capability, 10))
    if which == "by warp groups":
        asked = warp_group_launches(width, dtype)
    elif which == "refined":
        asked = refined_launches_at_the_ends(width, dtype, tuning)
    else:
        asked = launches(width, dtype, tuning) | decoding_launches(width, dtype)
        asked |= refined_launches(width, dtype, tuning) | launches_in_tokens(width, dtype, tuning)
        if which == "all":
            of_three_heads = refined_launches(width, dtype, tuning, n=12, g=4)
            asked |= {f"{name}, 3 heads a group": launch for name, launch in of_three_heads.items()}
        asked = chosen(asked, which)
    for name, launch in asked.items():
        compiled = dataclasses.asdict(compile_launch(launch, capability))
        found[name] = {key: value for key, value in compiled.items() if key != "ptx"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

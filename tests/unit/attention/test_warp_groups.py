"""Kernels of warp groups without a card: which calls they serve, what takes the others, and how they are launched."""

import dataclasses
import logging
import re
import sys

import pytest
import torch

from maha_megatron.attention import scale_attention
from maha_megatron.attention.scale_attention.triton_arguments import GroupSizes, KeyGroupSizes
from maha_megatron.attention.scale_attention.triton_tuning import GroupTiles, Tiles, tuning_for
from maha_megatron.attention.spec import MahaSpec, Refinement
from maha_megatron.scales import slot_count, stride

triton_joint = pytest.importorskip("maha_megatron.attention.scale_attention.triton_joint")
triton_opened = pytest.importorskip("maha_megatron.attention.scale_attention.triton_opened")
triton_scales = pytest.importorskip("maha_megatron.attention.scale_attention.triton_scales")
gluon_launch = pytest.importorskip("maha_megatron.attention.scale_attention.gluon_launch")
attend_kernel, key_gradient_kernel = triton_joint.attend_kernel, triton_joint.key_gradient_kernel
KINDS = {
    "one softmax": (triton_joint.Call, attend_kernel),
    "weighed": (triton_joint.WeighedCall, attend_kernel),
    "scale by scale": (triton_scales.Call, triton_scales.attend_scales_kernel),
}

TUNING = tuning_for(2, (9, 0))
WINDOWS = (128, 112, 124, 64)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def projected(rows: int, *heads: int, width: int = 64, gap: int = 0, dtype: torch.dtype = torch.bfloat16):
    """What one projection writes, in parts of so many heads, views of its rows; `gap`: numbers behind each row."""
    whole = empty(rows, sum(heads) * width + gap, dtype=dtype)[:, : sum(heads) * width]
    return whole.unflatten(1, (-1, width)).split(heads, dim=1)


def call_of(q, k, v, *, kind=triton_joint.Call, tuning=TUNING, windows=WINDOWS, ratio=4, past_slots=None, **options):
    past_slots, g, width = past_slots or (0,) * len(windows), k.shape[1], k.shape[2]
    levels = [(k, v)]
    for scale in range(1, len(windows)):
        entries = past_slots[scale] + slot_count(len(q), stride(ratio, scale))
        levels.append(tuple(empty(entries, g, width, dtype=q.dtype) for _ in range(2)))
    scales, n = len(windows), q.shape[1]
    learned = (empty(n, width), empty(g, width), empty(scales, n, width), empty(scales, n))
    spec = MahaSpec(ratio=ratio, windows=windows, convolution=False, **options)
    return kind(q, *learned, empty(len(q), dtype=torch.int64), spec, past_slots, tuning, levels)


def launch_of(call, *, with_weights: bool = False):
    keys = empty(call.g, sum(call.entries), call.d, dtype=call.q.dtype)
    out, lse = empty(*call.q.shape, dtype=call.q.dtype), empty(call.n, call.rows, dtype=torch.float32)
    of_scales = empty(call.rows, call.n, call.spec.scales, dtype=torch.float32)
    if call.each:
        outs = empty(call.rows, call.n, call.spec.scales, call.d, dtype=call.q.dtype)
        return call.attention(keys, outs, of_scales, of_scales)
    own_lse = of_scales.permute(1, 2, 0).contiguous() if call.apart else None
    return call.attention(keys, out, lse, of_scales if with_weights else None, own_lse)


def key_launch_of(call, grad_out=None):
    keys = empty(call.g, sum(call.entries), call.d, dtype=call.q.dtype)
    if grad_out is None:
        of_scales = [call.spec.scales] * call.each
        grad_out = empty(call.rows, call.n, *of_scales, call.d, dtype=call.q.dtype)
    made = call.made_by_key_gradients(call.raw_keys, call.values)
    return call.key_gradients(keys, grad_out, call.made_by_query_gradients(), made)


@pytest.fixture
def as_compiled(monkeypatch):
    """As where kernels are compiled; Gluon is looked for again, now and afterwards."""
    monkeypatch.setattr(triton_joint, "compiled", lambda: True)
    triton_joint._gluon_launch.cache_clear()
    yield
    triton_joint._gluon_launch.cache_clear()


ROWS_AND_VALUES = {
    "as one projection writes them": (projected(100, 4, 2), None),
    "fp16, 128 channels": (projected(100, 4, 2, width=128, dtype=torch.float16), None),
    "one row and head": (projected(1, 1, 1), None),
    "values of all groups the same": ((empty(9, 2, 64), empty(9, 1, 64).expand(-1, 2, -1)), None),
    "fp32": ((empty(9, 2, 64, dtype=torch.float32),) * 2, "torch.float32, heads of 64 channels"),
    "32 channels": ((empty(9, 2, 32),) * 2, "torch.bfloat16, heads of 32 channels"),
    "9 scales": ((empty(9, 2, 64),) * 10, "9 scales"),
    "two dtypes": ((empty(9, 2, 64), empty(9, 2, 64, dtype=torch.float16)), "values of another dtype"),
    "all rows the same": ((empty(9, 2, 64), empty(1, 2, 64).expand(9, -1, -1)), "rows that overlap"),
    "head by head": ((empty(2, 9, 64).transpose(0, 1), empty(9, 2, 64)), "rows that overlap"),
    "rows 4 numbers apart": (projected(100, 4, 2, gap=4), "multiples of 16 bytes"),
    "heads 4 numbers apart": ((empty(9, 2, 68)[..., :64], empty(9, 2, 64)), "multiples of 16 bytes"),
}


@pytest.mark.parametrize(("given", "expected"), ROWS_AND_VALUES.values(), ids=ROWS_AND_VALUES)
def test_what_keeps_the_kernel_from_a_call_is_said(given, expected):
    q, *values = given
    found = gluon_launch.unserved(q, values)
    assert found is None if expected is None else expected in found


def test_rows_that_begin_between_multiples_of_16_bytes_are_not_served():
    """On a device that has addresses."""
    numbers = torch.zeros(9 * 128 + 4, dtype=torch.bfloat16)
    aligned, moved = (numbers[first : first + 9 * 128].view(9, 2, 64) for first in (0, 4))
    assert gluon_launch.unserved(aligned, [aligned]) is None
    assert "multiples of 16 bytes" in gluon_launch.unserved(aligned, [moved])


@pytest.mark.usefixtures("as_compiled")
def test_the_table_has_warp_groups_for_hopper_in_16_bits_only():
    cards = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert [card for card in cards if tuning_for(2, card).groups is not None] == [(9, 0)]
    assert (tuning_for(4, (9, 0)).groups, tuning_for(4, (9, 0)).key_groups) == (None, None)
    for card in cards:
        call = call_of(*projected(100, 4, 2, 2), tuning=tuning_for(2, card))
        assert (launch_of(call).kernel is not attend_kernel) == (card == (9, 0))
        assert (key_launch_of(call).kernel is not key_gradient_kernel) == (card == (9, 0))


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize(("kind", "portable"), KINDS.values(), ids=KINDS)
def test_what_the_kernel_does_not_serve_goes_to_the_portable_one(kind, portable):
    q, k, v = projected(100, 4, 2, 2)
    launch = launch_of(call_of(q, k, v, kind=kind))
    assert launch.kernel is gluon_launch.attend_by_groups_kernel
    assert launch.arguments["SIZES"].each == (kind is triton_scales.Call)
    assert launch.arguments["SHAPE"].apart == (kind is not triton_joint.Call)
    for given in (
        (q.transpose(0, 1).contiguous().transpose(0, 1), k, v),
        (q, k, empty(1, 2, 64).expand(100, -1, -1)),
        projected(100, 4, 2, 2, width=32),
    ):
        assert launch_of(call_of(*given, kind=kind)).kernel is portable


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=KINDS)
def test_keys_gradients_that_the_kernel_does_not_serve_go_to_the_portable_one(kind):
    """Queries may lie as they will: it reads turned ones."""
    q, k, v = projected(100, 4, 2, 2)
    by_heads = q.transpose(0, 1).contiguous().transpose(0, 1)
    by_groups = gluon_launch.key_gradient_by_groups_kernel
    assert key_launch_of(call_of(q, k, v, kind=kind)).kernel is by_groups
    assert key_launch_of(call_of(by_heads, k, v, kind=kind)).kernel is by_groups
    if kind is not triton_scales.Call:
        assert key_launch_of(call_of(q, k, v, kind=kind), by_heads).kernel is key_gradient_kernel
    other_tiles = dataclasses.replace(TUNING, key_gradient=Tiles(keys=32))
    for call in (
        call_of(q, k, empty(1, 2, 64).expand(100, -1, -1), kind=kind),
        call_of(*projected(100, 4, 2, 2, width=32), kind=kind),
        call_of(q, k, v, kind=kind, tuning=other_tiles),
    ):
        assert key_launch_of(call).kernel is key_gradient_kernel


@pytest.mark.usefixtures("as_compiled")
def test_keys_gradients_of_refined_layers_go_to_the_portable_kernel_with_what_opened_blocks_found():
    """And its forward over the scales to warp groups."""
    q, k, v = projected(100, 4, 2, 2)
    plain = call_of(q, k, v)
    spec = dataclasses.replace(plain.spec, refine=Refinement(from_scale=2, to_scale=0, blocks=2))
    learned = (plain.query_gain, plain.key_gain, empty(spec.branches, 4, 64), empty(spec.branches, 4))
    levels = list(zip(plain.raw_keys, plain.values, strict=True))
    call = triton_opened.Call(q, *learned, plain.document_start, spec, plain.past_slots, TUNING, levels)
    assert launch_of(call, with_weights=True).kernel is gluon_launch.attend_by_groups_kernel
    of_queries, of_keys = call.empty_gradients(empty(2, 100, 2, dtype=torch.int32))
    found = call.made_by_query_gradients()._replace(opened=of_queries)
    made = call.made_by_key_gradients(call.raw_keys, call.values)._replace(opened=of_keys)
    launch = call.key_gradients(empty(2, sum(call.entries), 64), q, found, made)
    assert launch.kernel is key_gradient_kernel
    assert launch.arguments["made"].opened is of_keys
    assert launch.arguments["SHAPE"].blocks == 2


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=KINDS)
def test_queries_turn_once_for_every_scale_where_all_count_tokens_or_there_is_one(kind):
    given = projected(100, 4, 2, 2)
    for expected, options in ((False, {}), (True, {"rope_unit": "token"}), (True, {"windows": (100,)})):
        launch = launch_of(call_of(*given, kind=kind, **options))
        assert launch.kernel is gluon_launch.attend_by_groups_kernel
        assert launch.arguments["SHAPE"].one_turn == expected


def test_interpreted_kernels_are_the_portable_ones(monkeypatch):
    monkeypatch.setattr(triton_joint, "compiled", lambda: False)
    call = call_of(*projected(100, 4, 2, 2))
    assert (launch_of(call).kernel, key_launch_of(call).kernel) == (attend_kernel, key_gradient_kernel)


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize(
    ("version", "importable", "reason"),
    [
        ("3.7.1", True, "it ran with 3.6 only"),
        ("3.60.1+git5", True, "it ran with 3.6 only"),
        ("3.6.1", False, "import of .* halted"),
    ],
)
def test_without_the_gluon_that_it_needs_the_portable_kernel_serves_and_that_is_said_once(
    monkeypatch, caplog, version, importable, reason
):
    caplog.set_level(logging.WARNING, logger=triton_joint.__name__)
    monkeypatch.setattr(triton_joint.triton, "__version__", version)
    if not importable:
        monkeypatch.delattr(scale_attention, "gluon_launch")
        monkeypatch.setitem(sys.modules, gluon_launch.__name__, None)
    call = call_of(*projected(100, 4, 2, 2))
    assert [launch_of(call).kernel for _ in range(2)] == [attend_kernel] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(rf"triton {re.escape(version)} cannot have the kernels by warp groups \({reason}", said)


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize(
    ("n", "g", "wanted", "heads"), [(4, 4, 2, 1), (4, 2, 2, 2), (4, 2, 1, 1), (6, 2, 2, 1), (12, 2, 2, 2), (1, 1, 2, 1)]
)
def test_rows_and_heads_of_a_program_cover_all_once(n, g, wanted, heads):
    """Two heads where an even number of them shares a KV group; each program's rows and heads, as the kernel counts."""
    tuning = dataclasses.replace(TUNING, groups=GroupTiles(heads=wanted))
    launch = launch_of(call_of(*projected(200, n, g, g), tuning=tuning))
    sizes = launch.arguments["SIZES"]
    assert sizes == GroupSizes(heads=heads, stages=4, each=False)
    tiles, seen = -(-200 // sizes.rows), []
    work = tiles * (n // sizes.heads)
    for number in range(work):
        of_program = [
            (number % tiles * sizes.rows + group // heads * 64, number // tiles * heads + group % heads)
            for group in range(2)
        ]
        assert len({head // (n // g) for _, head in of_program}) == 1
        seen += of_program
    rows = range(0, tiles * sizes.rows, 64)
    assert sorted(seen) == [(row, head) for row in rows for head in range(n)]
    assert launch.grid == (min(work, 132),)


def test_a_program_has_128_rows_of_one_head_or_64_of_two():
    assert [GroupSizes(heads=heads, stages=4, each=False).rows for heads in (1, 2)] == [128, 64]
    with pytest.raises(AssertionError):
        GroupTiles(heads=4)


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=KINDS)
@pytest.mark.parametrize("scales", [1, 8])
@pytest.mark.parametrize("with_weights", [False, True])
def test_the_kernel_is_given_every_argument_and_a_descriptor_of_every_scale(scales, with_weights, kind):
    past_slots = (16,) * scales
    q, (k, v) = projected(40, 4, 2, 2)[0], projected(56, 2, 2, width=64)
    launch = launch_of(
        call_of(q, k, v, kind=kind, windows=(16,) * scales, ratio=3, past_slots=past_slots), with_weights=with_weights
    )
    assert launch.arguments.keys() == set(launch.kernel.arg_names)
    assert (launch.arguments["scale_lse"] is not None) == (with_weights or kind is triton_scales.Call)
    assert (launch.arguments["own_lse"] is not None) == (kind is triton_joint.WeighedCall)
    values = [launch.arguments[f"value_{scale}"] for scale in range(8)]
    assert [x is None for x in values] == [scale >= scales for scale in range(8)]
    for scale, described in enumerate(values[:scales]):
        entries = 16 + slot_count(40, 3**scale)
        assert (described.shape, described.block_shape) == ([entries, 2 * 64], [64, 64])
    assert values[0].strides == [4 * 64, 1]
    queries, keys = launch.arguments["query_rows"], launch.arguments["key_entries"]
    assert (queries.shape, queries.strides, queries.block_shape) == ([40, 4 * 64], [8 * 64, 1], [64, 32])
    total = sum(16 + slot_count(40, 3**scale) for scale in range(scales))
    assert (keys.shape, keys.strides, keys.block_shape) == ([2 * total, 64], [64, 1], [64, 32])


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=KINDS)
@pytest.mark.parametrize(("rows", "parts"), [(300, (1, 1, 1)), (9000, (1, 2, 5))])
def test_keys_gradients_are_given_every_argument_and_as_many_programs_as_there_is_work(kind, rows, parts):
    """Tiles of 128 keys of every scale, by the parts of rows that see them, by KV groups; no more than a card has."""
    windows = (64, 512, 512)
    call = call_of(*projected(rows, 4, 2, 2), windows=windows, kind=kind)
    launch = key_launch_of(call)
    assert launch.arguments.keys() == set(launch.kernel.arg_names)
    assert launch.arguments["parts"] == parts
    assert launch.arguments["SIZES"] == KeyGroupSizes(stages=4, shared=max(parts) > 1)
    assert launch.arguments["EACH"] == (kind is triton_scales.Call)
    assert launch.arguments["SHAPE"].apart == (kind is not triton_joint.Call)
    assert launch.arguments["found"].delta.shape == ((4, rows) if kind is triton_joint.Call else (4, 3, rows))
    tiles = [-(-slot_count(rows, 4**scale) // 128) for scale in range(3)]
    works = 2 * sum(count * part for count, part in zip(tiles, parts, strict=True))
    assert (launch.arguments["works"], launch.grid) == (works, (min(works, 132),))
    turned, grads = launch.arguments["turned_rows"], launch.arguments["grad_rows"]
    assert (turned.shape, turned.strides, turned.block_shape) == ([4 * 3 * rows, 64], [64, 1], [64, 64])
    length = 4 * 64 * (3 if kind is triton_scales.Call else 1)
    assert (grads.shape, grads.strides, grads.block_shape) == ([rows, length], [length, 1], [64, 64])
    assert [launch.arguments[f"value_{scale}"] is None for scale in range(8)] == [False] * 3 + [True] * 5


@pytest.mark.usefixtures("as_compiled")
@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=KINDS)
@pytest.mark.parametrize(
    ("options", "turns"),
    [({}, 4), ({"rope_unit": "token"}, 1), ({"windows": (64,)}, 1), ({"windows": (64,), "rope_unit": "token"}, 1)],
    ids=str,
)
def test_queries_that_turn_alike_at_every_scale_are_kept_once_for_the_keys_gradients(kind, options, turns):
    launch = key_launch_of(call_of(*projected(300, 4, 2, 2), kind=kind, **options))
    assert launch.kernel is gluon_launch.key_gradient_by_groups_kernel
    assert launch.arguments["SHAPE"].one_turn == (turns == 1)
    assert launch.arguments["found"].turned.shape == (4, turns, 300, 64)
    assert launch.arguments["turned_rows"].shape == [4 * turns * 300, 64]


@pytest.mark.usefixtures("as_compiled")
def test_a_described_row_ends_with_its_last_head():
    """Of a projection that writes queries, keys and values of a KV group side by side."""
    q, k, v = empty(100, 2, 3 * 64).split(64, dim=2)
    given = launch_of(call_of(q, k, v)).arguments
    assert (given["query_rows"].shape, given["query_rows"].strides) == ([100, 4 * 64], [6 * 64, 1])
    assert (given["value_0"].shape, given["value_0"].strides) == ([100, 4 * 64], [6 * 64, 1])

"""What a pass of the GPU benchmark has to do, counted a second time row by row."""

import dataclasses

import pytest
import torch

from maha_megatron import scales
from maha_megatron.attention.benchmark import work
from maha_megatron.attention.benchmark.cases import SETTINGS, VARIANTS
from maha_megatron.attention.benchmark.peers import equal_window
from maha_megatron.attention.benchmark.subjects import Setting, draw_inputs, mixed_lengths
from maha_megatron.attention.benchmark.work import Card, bytes_of, floor_s, loaded_keys, visible_keys, work_of
from maha_megatron.attention.spec import MahaSpec

SMALL = Setting(operator=MahaSpec(ratio=4, windows=(), convolution=False), heads=4, groups=2, width=16)


def slots_seen(document_lengths, ratio, windows):
    """For each row and scale the range of slots that it sees."""
    rows = [(start, row) for start, length in starts_of(document_lengths) for row in range(length)]
    seen = []
    for scale, window in enumerate(windows):
        step = scales.stride(ratio, scale)
        for start, row in rows:
            first, blocks = scales.first_slot(start, step), scales.visible_blocks(row, step, window)
            seen.append((scale, range(first + blocks.start, first + blocks.stop)))
    return [[slots for of, slots in seen if of == scale] for scale in range(len(windows))]


def starts_of(document_lengths):
    return [(sum(document_lengths[:i]), length) for i, length in enumerate(document_lengths)]


@pytest.mark.parametrize("lengths", [(100,), (40, 40, 20), (7, 50, 1, 30)])
@pytest.mark.parametrize("tiles", [(16, 16), (32, 8)])
def test_loaded_keys_are_those_of_whole_tiles(lengths, tiles):
    tile_rows, tile_keys = tiles
    loaded = 0
    for slots in slots_seen(lengths, 2, (12, 9, 6)):
        for at in range(0, len(slots), tile_rows):
            of_tile = slots[at : at + tile_rows]
            span = of_tile[-1].stop - of_tile[0].start
            loaded += -(-span // tile_keys) * tile_keys * tile_rows
    assert loaded_keys(lengths, 2, (12, 9, 6), *tiles) == loaded / sum(lengths)


def test_loaded_keys_of_one_document_are_those_of_the_accounting():
    found = loaded_keys((4096,), 4, scales.default_windows(4096), 64, 64)
    assert found == sum(scales.loaded_pairs(4096, 4, scales.default_windows(4096))) / 4096 == pytest.approx(489, abs=1)


def test_visible_keys_are_those_of_the_rows():
    lengths, windows = (7, 50, 1, 30), (12, 9, 6)
    seen = sum(len(slots) for of_scale in slots_seen(lengths, 2, windows) for slots in of_scale)
    assert visible_keys(lengths, 2, windows) == seen / sum(lengths)


def test_bytes_of_the_issue_s_example():
    """4 k, 16 heads x 128 in 16 bits, 32 k rows: q, k, v, out are 0.54 GB, and a third as many coarser entries."""
    rows, one = 32768, 32768 * 16 * 128 * 2
    forward, backward = bytes_of(SETTINGS["kv16"], rows, (128, 112, 124, 64), 2)
    coarser = 1 / 4 + 1 / 16 + 1 / 64
    assert forward == pytest.approx((4 + 2 * (1 + coarser) + 2 * coarser) * one)
    assert backward == pytest.approx((8 + 2 * (1 + coarser) + 6 * coarser) * one)
    fewer = bytes_of(SETTINGS["kv8"], rows, (128, 112, 124, 64), 2)
    assert fewer[0] == pytest.approx(3 * one + (forward - 4 * one) / 2)


def test_the_floor_is_what_is_made_and_then_the_slower_of_bytes_and_products():
    card = Card(bytes_per_s=4.0, flops_per_s=100.0)
    assert floor_s(own_bytes=8.0, made_bytes=2.0, flops=100.0, card=card) == 0.5 + 2.0
    assert floor_s(own_bytes=8.0, made_bytes=2.0, flops=500.0, card=card) == 0.5 + 5.0


def test_work_at_4k_is_that_of_the_arithmetic_on_paper(monkeypatch):
    """357 visible and, in tiles of 64, 489 loaded keys a row: 1.3e11 operations of loaded pairs in forward."""
    monkeypatch.setattr(work, "forward_tiles", lambda *_: (64, 64))
    card = Card(bytes_per_s=1e30, flops_per_s=450e12)
    found = work_of(SETTINGS["kv16"], 4096, 2, card)
    assert (found.visible_keys, found.loaded_keys) == (pytest.approx(357, abs=1), pytest.approx(489, abs=1))
    assert found.forward_floor_s * card.flops_per_s == pytest.approx(1.31e11, rel=0.01)
    assert found.backward_floor_s == pytest.approx(2.5 * found.forward_floor_s)
    assert found.forward_flops / found.visible_keys == pytest.approx(1.31e11 / 489, rel=0.01)


def test_tiles_are_the_table_s_where_its_kernels_run(monkeypatch):
    assert work.forward_tiles(SMALL, 2) == (64, 64)
    monkeypatch.setattr(work.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(work.torch.cuda, "get_device_capability", lambda: (9, 0))
    tiles = work.tuning_for(2, (9, 0)).forward
    assert work.forward_tiles(SETTINGS["kv16"], 2) == (tiles.rows, tiles.keys)
    assert work.forward_tiles(dataclasses.replace(SETTINGS["kv16"], backend="eager"), 2) == (64, 64)


@pytest.mark.parametrize("length", [64, 1024, 4096, 32768])
def test_the_window_loads_as_much_and_not_more(length):
    setting = SETTINGS["kv16"]
    ours = sum(scales.loaded_pairs(length, 4, setting.spec_at(length).windows))
    keys = equal_window(setting, length)
    assert scales.loaded_pairs(length, 4, (keys,))[0] <= ours
    assert keys == length or scales.loaded_pairs(length, 4, (keys + 1,))[0] > ours


def test_mixed_documents_fill_a_call_and_are_the_same_again():
    lengths = mixed_lengths(32768, 4096)
    assert lengths == mixed_lengths(32768, 4096)
    assert sum(lengths) == 32768
    assert 4096 / 64 <= min(lengths[:-1]) < 512 < 2048 < max(lengths) <= 4096
    assert len(set(lengths)) > 5


def test_a_call_holds_as_many_documents_as_fit():
    setting = SETTINGS["kv16"]
    assert setting.documents_at(4096) == (4096,) * 8
    assert setting.documents_at(131072) == (131072,)
    assert SMALL.documents_at(100) == (100,)


def test_inputs_start_their_documents_and_move_with_their_numbers():
    inputs = draw_inputs(SMALL, 20, torch.float32, (20, 7, 1))
    assert inputs.document_start_t.tolist() == [0] * 20 + [20] * 7 + [27]
    moved = inputs.to("cpu", torch.float64)
    assert torch.equal(moved.k_tgd.float(), inputs.k_tgd)
    assert torch.equal(moved.grad_tnd.float(), inputs.grad_tnd)
    assert moved.q_tnd.is_leaf
    assert moved.q_tnd.requires_grad
    assert not moved.grad_tnd.requires_grad


def test_general_operators_are_ones_that_a_layer_takes():
    assert [spec.joint_softmax and spec.lse_utility for spec in VARIANTS.values()] == [True] + [False] * 5

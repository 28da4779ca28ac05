"""data.skip leaves out sample numbers, leaves the rest in order, and may change ahead of a checkpoint only."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from maha_megatron.checkpoint.manifest import Manifest, check_same_data
from maha_megatron.config.schema import Config, SkipRange
from maha_megatron.data.loader import build_loader
from maha_megatron.data.skipping import SampleNumbers, jumped
from maha_megatron.errors import CheckpointError
from tests.support.pairs import random_documents


def test_positions_jump_over_the_ranges() -> None:
    skips = [SkipRange(first=0, last=1), SkipRange(first=4, last=4), SkipRange(first=5, last=7)]
    numbers = SampleNumbers(skips)
    assert [numbers[position] for position in range(6)] == [2, 3, 8, 9, 10, 11]
    assert [SampleNumbers(())[position] for position in (0, 5)] == [0, 5]


def test_a_range_is_jumped_once_a_sample_behind_it_was_consumed() -> None:
    ranges = [[2, 3], [10, 19]]
    assert jumped(ranges, 2) == []
    assert jumped(ranges, 3) == [[2, 3]]
    assert jumped(ranges, 8) == [[2, 3]]
    assert jumped(ranges, 9) == ranges


@pytest.fixture
def mixed(write_pair: Callable[..., str], make_config: Callable[..., Config]) -> Config:
    pairs = [write_pair("a", random_documents(20)), write_pair("b", random_documents(12, seed=1))]
    return make_config(*pairs, weights=(3, 1))


def with_skip(config: Config, *ranges: tuple[int, int]) -> Config:
    skips = tuple(SkipRange(first=first, last=last) for first, last in ranges)
    return replace(config, data=replace(config.data, skip=skips))


def samples(config: Config, steps: int) -> list[list[int]]:
    loader = build_loader(config, data_parallel_rank=0, data_parallel_size=1)
    return [batch.input_ids_t.tolist() for step in range(steps) for batch in loader.step_batches(8 * step)]


def test_the_loader_leaves_out_those_samples_and_no_other(mixed: Config) -> None:
    straight = samples(mixed, 6)
    skipped = samples(with_skip(mixed, (3, 5), (20, 20)), 5)
    assert skipped == [row for number, row in enumerate(straight) if number not in (3, 4, 5, 20)][:40]
    loader = build_loader(with_skip(mixed, (3, 5)), data_parallel_rank=0, data_parallel_size=1)
    assert loader.sample_range(0) == range(0, 11)
    assert [origin.number for origin in loader.origins(0)] == [0, 1, 2, 6, 7, 8, 9, 10]
    assert sum(share.drawn_samples for share in loader.shares(8)) == 8


def check(saved: Config, now: Config, consumed_samples: int) -> None:
    of_saved, of_now = (
        build_loader(config, data_parallel_rank=0, data_parallel_size=1).identity for config in (saved, now)
    )
    manifest = Manifest(
        step=1,
        consumed_samples=consumed_samples,
        model_fingerprint="",
        topology={},
        data=of_saved,
        config={},
        versions={},
        files={},
    )
    check_same_data(manifest, of_now)


def test_a_run_may_skip_what_lies_ahead_and_only_that(mixed: Config) -> None:
    check(mixed, with_skip(mixed, (16, 20)), 16)
    check(with_skip(mixed, (16, 20)), mixed, 16)
    check(with_skip(mixed, (2, 3)), with_skip(mixed, (2, 3), (30, 31)), 16)
    for saved, now in [
        (mixed, with_skip(mixed, (15, 20))),
        (with_skip(mixed, (2, 3)), mixed),
        (with_skip(mixed, (2, 3)), with_skip(mixed, (2, 4))),
    ]:
        with pytest.raises(CheckpointError, match=r"data\.skip: saved with .*, now "):
            check(saved, now, 16)

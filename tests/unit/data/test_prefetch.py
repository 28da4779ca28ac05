"""Prefetching gives what reading in place gives, in order, tells of waiting, and hands errors over."""

import threading
import time
from collections.abc import Callable

import pytest

from maha_megatron.config.schema import Config
from maha_megatron.data.loader import build_loader
from maha_megatron.data.prefetch import Prefetcher
from maha_megatron.errors import DataError
from tests.support.pairs import random_documents


def feed(step_batches: Callable, depth: int, *, first: int = 0, last: int = 80) -> Prefetcher:
    return Prefetcher(step_batches, consumed_samples=first, step_samples=8, last_sample=last, depth=depth)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_steps_are_those_of_the_loader(
    depth: int, write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    config = make_config(write_pair("a", random_documents(30)))
    loader, other = (build_loader(config, data_parallel_rank=0, data_parallel_size=1) for _ in range(2))
    prefetcher = feed(loader.step_batches, depth, first=16)
    for consumed in range(16, 80, 8):
        found, expected = prefetcher.take(consumed), other.step_batches(consumed)
        assert [batch.input_ids_t.tolist() for batch in found] == [batch.input_ids_t.tolist() for batch in expected]
    prefetcher.close()


def test_no_more_than_the_depth_is_prepared_and_nothing_beyond_the_end() -> None:
    asked = []
    prefetcher = feed(lambda consumed: asked.append(consumed) or [], 2)
    deadline = time.monotonic() + 10
    while len(asked) < 3 and time.monotonic() < deadline:  # two wait, and one is in hand
        time.sleep(0.01)
    time.sleep(0.1)
    assert asked == [0, 8, 16]
    for consumed in range(0, 80, 8):
        prefetcher.take(consumed)
    time.sleep(0.1)
    assert asked == list(range(0, 80, 8))
    prefetcher.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_out_at_its_step(depth: int) -> None:
    def step_batches(consumed: int) -> list:
        if consumed == 16:
            raise DataError("a.bin is damaged")
        return []

    prefetcher = feed(step_batches, depth)
    prefetcher.take(0)
    prefetcher.take(8)
    with pytest.raises(DataError, match="is damaged"):
        prefetcher.take(16)
    prefetcher.close()


def test_waiting_is_measured() -> None:
    def slow(consumed: int) -> list:
        time.sleep(0.05)
        return []

    for depth in (0, 2):
        prefetcher = feed(slow, depth)
        prefetcher.take(0)
        assert 0.03 < prefetcher.take_wait_s() < 5
        assert prefetcher.take_wait_s() == 0
        prefetcher.close()
    prefetcher = feed(slow, 2)
    time.sleep(0.5)
    prefetcher.take(0)
    assert prefetcher.take_wait_s() < 0.03  # it was ready
    prefetcher.close()


def test_closing_ends_the_thread_although_its_steps_were_not_taken() -> None:
    before = threading.active_count()
    prefetcher = feed(lambda consumed: [], 1)
    assert threading.active_count() == before + 1
    prefetcher.close()
    assert threading.active_count() == before

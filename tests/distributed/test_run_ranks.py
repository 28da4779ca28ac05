"""The helper that other distributed tests stand on: it must never hide a failure or outlive its time."""

import os
import time

import pytest
import torch

from tests.support.distributed import run_ranks


def test_results_come_back_by_rank():
    first, second = run_ranks(_place_times, 2, 10)
    assert first == {"place": 0, "ranks": "2"}
    assert second == {"place": 10, "ranks": "2"}


def test_a_failing_rank_is_reported_and_the_others_are_ended():
    before = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 gives up"):
        run_ranks(_fail_on_rank_1, 2)
    assert time.monotonic() - before < 60


def test_a_hang_ends_at_the_time_out():
    with pytest.raises(TimeoutError, match=r"1 ranks of _hang ran past 0\.5 s"):
        run_ranks(_hang, 1, timeout_s=0.5)


def _place_times(rank: int, factor: int) -> dict:
    assert os.environ["RANK"] == str(rank)
    return {"place": rank * factor, "ranks": os.environ["WORLD_SIZE"]}


def _fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 gives up")
    time.sleep(300)


def _hang(rank: int) -> None:
    time.sleep(300)

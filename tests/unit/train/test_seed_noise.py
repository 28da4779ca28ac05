"""Differences between peers, and their noise."""

import math

import pytest

from maha_megatron.train.seed_noise import compared


def test_differences_are_taken_seed_by_seed():
    """A seed that is hard for everybody is no noise: both differences are 0.1."""
    found = compared({"dense": {1: 1.0, 2: 3.0}, "maha": {2: 3.1, 1: 1.1}}, "dense")
    assert found["maha"].mean == pytest.approx(2.1)
    assert found["maha"].spread == pytest.approx(math.sqrt(2))
    assert found["maha"].difference == pytest.approx(0.1)
    assert found["maha"].noise == pytest.approx(0, abs=1e-12)
    assert (found["dense"].difference, found["dense"].noise) == (None, None)


def test_noise_is_estimated_from_all_peers():
    """Differences of a: 0.1 and 0.3, of c: 0, 0.1 and 0.2, around their means; b has one seed and claims none."""
    dense = {1: 1.0, 2: 1.0, 3: 1.0}
    found = compared({"dense": dense, "a": {1: 1.1, 2: 1.3}, "b": {1: 1.5}, "c": {1: 1.0, 2: 1.1, 3: 1.2}}, "dense")
    deviation = math.sqrt((0.02 + 0.02) / (1 + 2))
    assert found["a"].noise == pytest.approx(deviation / math.sqrt(2))
    assert found["c"].noise == pytest.approx(deviation / math.sqrt(3))
    assert (found["b"].spread, found["b"].noise, found["b"].difference) == (None, None, pytest.approx(0.5))


def test_one_seed_has_no_noise_and_no_reference_no_difference():
    assert compared({"dense": {1: 1.0}, "a": {1: 1.1}}, "dense")["a"].noise is None
    alone = compared({"a": {1: 1.1, 2: 1.2}, "b": {3: 1.0}}, "dense")["a"]
    assert (alone.difference, alone.noise) == (None, None)
    assert compared({"dense": {1: 1.0}, "a": {2: 1.1}}, "dense")["a"].difference is None

import math
import random

import pytest

from maha_megatron.data.mixture import Mixture, check_weights, floor_sum
from maha_megatron.errors import DataError


def test_floor_sum_equals_the_sum() -> None:
    generator = random.Random(0)
    for _ in range(300):
        terms, modulus = generator.randrange(0, 60), generator.randrange(1, 50)
        factor, offset = generator.randrange(0, 99), generator.randrange(-200, 200)
        expected = sum((factor * i + offset) // modulus for i in range(terms))
        assert floor_sum(terms, modulus, factor, offset) == expected


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (5, 0, 5), (1e-3, 1), (1,)])
def test_sources_take_turns_in_proportion_and_in_order(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights, seed=3)
    taken = [0] * len(weights)
    for sample in range(4000):
        source, index = mixture.locate(sample)
        assert index == taken[source]  # each source's own samples come one after another, none left out
        taken[source] += 1
        for count, weight in zip(taken, weights, strict=True):
            assert abs(count - (sample + 1) * weight / sum(weights)) < 5
    assert [count > 0 for count in taken] == [weight > 0 for weight in weights]


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (1.0, 0.0, 2.5)])
def test_what_is_taken_is_what_is_located(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights, seed=5)
    located = [mixture.locate(sample)[0] for sample in range(200)]
    for samples in (0, 1, 57, 200):
        assert mixture.taken(samples) == [located[:samples].count(source) for source in range(len(weights))]


def test_far_samples_are_found_without_the_ones_before() -> None:
    mixture = Mixture((2, 1), seed=5)
    expected = [None, None]
    for sample in range(10**12, 10**12 + 200):
        source, index = mixture.locate(sample)
        assert abs(index - sample * (2, 1)[source] / 3) < 50
        assert index == expected[source] or expected[source] is None
        expected[source] = index + 1


def test_the_seed_changes_the_turns_and_nothing_else_does() -> None:
    def turns(mixture: Mixture) -> list[int]:
        return [mixture.locate(i)[0] for i in range(200)]

    assert turns(Mixture((2, 1), seed=5)) == turns(Mixture((4.0, 2.0), seed=5))
    assert turns(Mixture((2, 1), seed=5)) != turns(Mixture((2, 1), seed=6))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.0, 0.0), r"data sources a, b sum to 0\.0: give numbers around 1"),
        ((1e308, 1e308), r"data sources a, b sum to inf: give numbers around 1"),
        ((1.0, -1.0), r"data source b asks for -1\.0"),
        ((math.inf, 1.0), r"data source a asks for inf"),
        ((1.0, math.nan), r"data source b asks for nan"),
        ((1.0, 1e-13), r"data source b has a share of 1\.0e-13, less than 9\.1e-13"),
    ],
)
def test_weights_that_cannot_be_drawn_are_refused_by_name(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_weights(("a", "b"), weights)


def test_extreme_weights_are_drawn_as_asked() -> None:
    mixture = Mixture((1e-9, 1.0, 1e-5), seed=3)
    taken = mixture.taken(10**11)
    for count, share in zip(taken, mixture.shares, strict=True):
        assert abs(count - share * 10**11) <= max(5, 0.02 * share * 10**11)
    assert mixture.taken(10**5)[0] <= 1
    assert mixture.taken(10**6)[2] in (9, 10, 11)

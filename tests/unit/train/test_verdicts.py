"""A run that does not learn, holds a NaN or has wild gradients is told from one that does well."""

import math

import pytest

from maha_megatron.train.verdicts import VERDICTS, verdicts


def rows(losses: list[float], norms: list[float] | None = None) -> list[dict[str, float]]:
    norms = norms or [1.0] * len(losses)
    logged = zip(losses, norms, strict=True)
    return [{"step": step, "loss_nats": loss, "gradient_norm": norm} for step, (loss, norm) in enumerate(logged, 1)]


def missed(found: dict[str, bool]) -> list[str]:
    assert tuple(found) == VERDICTS
    return [name for name, met in found.items() if not met]


FALLING = [4.0 - step / 100 for step in range(100)]


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        (FALLING, True),
        (FALLING[::-1], False),
        ([3.0] * 100, False),
        ([4.0] * 99 + [1.0], False),  # one lucky last step
        ([9.0] + [4.0] * 99, False),  # one bad first step
        ([4.0] * 10 + [9.0] * 80 + [3.0] * 10, True),
        ([4.0, 9.0, 9.0, 9.0, 3.9], True),
        ([4.0, 1.0, 1.0, 1.0, 4.0], False),
        ([4.0], False),
    ],
)
def test_the_loss_falls_from_the_first_tenth_to_the_last(losses: list[float], falls: bool) -> None:
    assert missed(verdicts(rows(losses), rows(losses))) == ([] if falls else ["loss falls"])


@pytest.mark.parametrize(("norm", "within"), [(1.0, True), (2.9, True), (3.1, False), (0.34, True), (0.33, False)])
def test_the_median_norm_is_within_three_times_the_firsts(norm: float, within: bool) -> None:
    norms = [norm] * 90 + [100.0] * 10  # the median takes no notice of a spike
    found = missed(verdicts(rows(FALLING, norms), rows(FALLING)))
    assert found == ([] if within else ["norm within 3 x"])


@pytest.mark.parametrize("place", [0, 50, 99])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_a_miss(place: int, value: float) -> None:
    run = rows(FALLING)
    run.append({"step": 101, "validation_loss_nats": 3.0})
    assert missed(verdicts(run, rows(FALLING))) == []
    run[place]["solver_residual_max"] = value
    assert missed(verdicts(run, rows(FALLING))) == ["no NaN"]
    del run[place]["solver_residual_max"]
    run[-1]["validation_loss_nats"] = value
    assert missed(verdicts(run, rows(FALLING))) == ["no NaN"]


def test_norms_that_are_no_numbers_are_not_within_anything() -> None:
    norms = [math.nan] * 100
    assert missed(verdicts(rows(FALLING, norms), rows(FALLING))) == ["no NaN", "norm within 3 x"]

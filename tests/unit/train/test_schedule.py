"""Learning rates against values worked out by hand."""

import pytest

from maha_megatron.config.schema import Schedule
from maha_megatron.train.schedule import learning_rate


def rate(step: int, total: int = 12, **changes: object) -> float:
    return learning_rate(Schedule(**({"peak": 1.0, "final": 0.1, "warmup_steps": 2} | changes)), step, total)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.5),  # half of the warm-up
        (2, 1.0),  # its end
        (7, 0.55),  # half of the way down: (1 + 0.1) / 2
        (12, 0.1),  # the last step
        (13, 0.1),  # a run that goes on stays there
    ],
)
def test_cosine(step: int, expected: float) -> None:
    assert rate(step, kind="cosine") == pytest.approx(expected)


def test_cosine_quarter_of_the_way() -> None:
    # cos(pi / 4) = 0.7071: 0.1 + 0.45 * 1.7071
    assert rate(3, total=6, kind="cosine") == pytest.approx(0.1 + 0.45 * 1.70710678)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.5), (2, 1.0), (8, 1.0), (9, 0.775), (10, 0.55), (11, 0.325), (12, 0.1), (20, 0.1)]
)
def test_wsd_is_flat_then_falls_linearly(step: int, expected: float) -> None:
    assert rate(step, kind="wsd", decay_steps=4) == pytest.approx(expected)


def test_wsd_without_decay_stays_at_its_peak() -> None:
    assert rate(12, kind="wsd", decay_steps=0) == pytest.approx(1.0)


def test_constant_ignores_the_end() -> None:
    assert [rate(step, kind="constant") for step in (1, 2, 12)] == pytest.approx([0.5, 1.0, 1.0])


def test_without_warmup_the_first_step_has_the_peak_of_a_constant() -> None:
    assert rate(1, kind="constant", warmup_steps=0) == 1.0


def test_warmup_longer_than_the_run_never_reaches_the_peak() -> None:
    assert rate(5, total=5, warmup_steps=10, kind="cosine") == pytest.approx(0.5)

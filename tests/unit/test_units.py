"""Quantities for people, above all where rounding carries into the next unit."""

import pytest

from maha_megatron.units import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.96, "1 k"),
        (1000, "1 k"),
        (999_949, "999.9 k"),
        (999_999, "1 M"),
        (-999_999, "-1 M"),
        (124_400_000, "124.4 M"),
        (7.24e9, "7.24 G"),
        (999_999_999_999, "1 T"),
        (3e15, "3 P"),
        (2.5e20, "250 E"),
    ],
)
def test_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (2**20 - 2**10, "1023.00 KiB"),
        (6_442_450_944, "6.00 GiB"),
        (2**40 - 1, "1.00 TiB"),
    ],
)
def test_bytes(value_bytes, text):
    assert format_bytes(value_bytes) == text


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (3.2, "3.2 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.5, "59 min 59 s"),
        (3599.97, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_duration(value_s, text):
    assert format_duration(value_s) == text

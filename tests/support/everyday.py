"""Which of many cases the everyday run keeps; the others are marked `full`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def everyday(cases: Iterable[Any], keep: Callable[..., bool]) -> list[Any]:
    """The cases as pytest's parameters, marked `full` where `keep` is false; a tuple is given to it as arguments."""
    kept = ((case, keep(*case) if isinstance(case, tuple) else keep(case)) for case in cases)
    return [case if often else _full(case) for case, often in kept]


def _full(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.full)

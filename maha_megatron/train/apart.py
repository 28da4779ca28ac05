"""Measurements in a process of their own: nothing of one is left for the next, and its memory is given back."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from maha_megatron.errors import TrainingError

Result = TypeVar("Result")


def in_a_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` in a new process; what it raises is raised here.

    Raises:
        TrainingError: the process died.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise TrainingError(f"the process of {function.__name__} died, perhaps out of memory") from error

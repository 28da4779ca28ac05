"""All ranks go on, or all ranks raise: an error on one rank must not leave the others waiting in a collective."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist

from maha_megatron.errors import CheckpointError, MahaError

Value = TypeVar("Value")


class Failures:
    """Keeps this rank's first error while the rank goes on taking part in collectives."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    def note(self, error: Exception | None) -> None:
        """Keep `error` if it is the first."""
        self.first = self.first or error

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Run a block without collectives; its error is kept instead of raised."""
        try:
            yield
        except Exception as error:
            self.note(error)

    def raise_together(self) -> None:
        """Raise on every rank if any rank kept an error. Collective over all ranks.

        Raises:
            CheckpointError: with the message of the lowest rank that has one.
        """
        error = self.first
        own = str(error) if isinstance(error, MahaError) else f"{type(error).__name__}: {error}"
        message = first_message(None if error is None else own)
        if message is not None:
            raise CheckpointError(message) from error


def first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, the same on every rank; None if none has.

    Collective over all ranks, if there are any.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return message
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((text for text in messages if text is not None), None)


def from_first(value: Value) -> Value:
    """Rank 0's value, on every rank. Collective over all ranks, if there are any."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def own_rank() -> int:
    """This process's rank; 0 where there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

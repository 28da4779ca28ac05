"""All ranks go on, or all ranks raise: an error on one rank must not leave the others waiting in a collective."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


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


def first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, the same on every rank; None if none has.

    Collective over all ranks, if there are any.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return message
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((text for text in messages if text is not None), None)

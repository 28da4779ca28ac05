"""The program that a configuration states, loaded on every rank or on none."""

from collections.abc import Callable

from maha_megatron.checkpoint.agreement import first_message
from maha_megatron.config.schema import Config
from maha_megatron.errors import MahaError, ProgramError
from maha_megatron.model.operators import stated_program


def program_on_every_rank(config: Config, allowed: str | None) -> Callable | None:
    """`operators.stated_program`; where one rank fails (a file that one machine lacks), all raise. Collective.

    Raises:
        ProgramError: with the message of the lowest rank that has one.
    """
    program, error = None, None
    try:
        program = stated_program(config, allowed)
    except MahaError as found:
        error = found
    message = first_message(None if error is None else str(error))
    if message is not None:
        raise ProgramError(message) from error
    return program

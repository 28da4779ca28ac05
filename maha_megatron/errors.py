"""The errors a user of maha-megatron can meet. Each message says what to change.

Programmers' mistakes are `assert`s; these are for what a config, a file or a machine brought in.
"""

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2


class MahaError(Exception):
    """Base of every error that is meant to be read by a user; command lines print it without a traceback."""


class ConfigError(MahaError, ValueError):
    """A configuration that cannot be loaded or run as written."""


class DataError(MahaError, ValueError):
    """A corpus, index or tokenizer that is missing, damaged or does not fit the run."""


class CheckpointError(MahaError, RuntimeError):
    """A checkpoint that is missing, damaged, could not be written or belongs to another model."""


class StateError(MahaError, ValueError):
    """A state of attention, or the document starts beside it, that does not fit the rows or the request it meets."""


class TrainingError(MahaError, RuntimeError):
    """Training cannot go on safely, for example because the loss is not a number."""


class EnvironmentMismatch(MahaError, RuntimeError):
    """The machine or an installed package does not offer what the run needs."""


class ProgramError(MahaError, RuntimeError):
    """A stated program over the scales that cannot be used as it is, or has no solution where one is needed."""


def exit_code_of(run: Callable[[], int | None]) -> int:
    """Run a command: the exit code that it returns, or EXIT_USER_ERROR after one line on standard error."""
    try:
        return run() or 0
    except MahaError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR

"""Stages of data preparation: skipped when done, all or nothing, errors in one line. Standard library only.

A stage's record is a JSON file beside its output with the arguments it ran with (inputs by size and time included)
and what it found. The same arguments and a whole output need no second run.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maha_megatron.data.prepare.inputs import list_inputs
from maha_megatron.data.writing import write_whole
from maha_megatron.errors import exit_code_of

EXIT_INTERRUPTED_BY_USER = 130
SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def record_path(output: Path) -> Path:
    """Where the record of a stage's output lies."""
    return output.with_name(f"{output.name}.record.json")


def finished_record(record: Path, outputs: Sequence[Path], arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a stage that ran with these arguments and whose outputs are there; otherwise None."""
    if not record.is_file() or not all(path.is_file() for path in outputs):
        return None
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        return None
    as_stored = json.loads(json.dumps(arguments))
    return tree if isinstance(tree, dict) and tree.get("arguments") == as_stored else None


def write_record(record: Path, arguments: dict[str, Any], results: dict[str, Any]) -> None:
    """Write a stage's record, which makes it finished."""
    write_whole(record, (json.dumps({"arguments": arguments, **results}, indent=1) + "\n").encode())


def input_identity(paths: Sequence[str], suffixes: Sequence[str] | None = None) -> list[list[Any]]:
    """Names, sizes and times of the files behind input paths: what tells one input from another without reading it.

    Raises:
        DataError: As list_inputs, whose files these are.
    """
    identity = []
    for file in list_inputs(paths, suffixes):
        status = None if file.fault else file.path.stat()
        identity.append([str(file.path), status.st_size, status.st_mtime_ns] if status else [str(file.path), 0, 0])
    return identity


def dataset_identity(name: str, *more: str | None) -> list[Any]:
    """What tells one data set of the `datasets` package from another: its names, and the files of a local folder."""
    return [name, *more, *([input_identity([name])] if Path(name).exists() else [])]


def parse_bytes(text: str) -> int:
    """A size in decimal units: "24MB" -> 24_000_000, "1.5 GB", "800k", "1000".

    Raises:
        ValueError: Not a size; argparse turns it into its usual message.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)b?\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size such as 24MB")
    return int(float(match.group(1)) * SIZES[match.group(2).lower()])


@contextmanager
def progress_bar(total: int | None, description: str, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """A progress bar, over bytes by default; yields what to call with each advance. In a log file it is a few lines."""
    from tqdm import tqdm

    interval_s = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit=unit, unit_scale=True, desc=description, mininterval=interval_s) as bar:
        yield bar.update
        if total is not None:
            bar.update(total - bar.n)


@contextmanager
def document_progress(total_bytes: int | None, description: str) -> Iterator[Callable[[int, int, int], object]]:
    """Progress over inputs in MB/s and documents/s, with the time left.

    Yields what to call with the documents, the bytes of text and the bytes of input that were done, from the start on.
    What the first call tells was done before, and does not count in the speed.
    """
    from tqdm import tqdm

    interval_s = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=description, mininterval=interval_s) as bar:
        start: list[int] = []

        def update(documents: int, text_bytes: int, read_bytes: int) -> None:
            done_bytes = read_bytes if total_bytes else text_bytes
            if not start:
                start.append(documents)
                bar.initial = bar.n = bar.last_print_n = done_bytes
            speed = (documents - start[0]) / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix_str(f"{speed:.0f} documents/s", refresh=False)
            bar.update(done_bytes - bar.n)

        yield update


def run_command(main: Callable[[], None]) -> None:
    """Run a command line; an error meant for the user is one line on stderr and exit code 2."""
    try:
        code = exit_code_of(main)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        code = EXIT_INTERRUPTED_BY_USER
    if code:
        sys.exit(code)

"""Preprocessing in partitions: consecutive parts of the input, each made a pair on its own, and then merged.

One process that reads serves some hundred that tokenise; partitions are for more cores than that.
"""

import multiprocessing
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.data.prepare.blocks import read_blocks
from maha_megatron.data.prepare.documents import BadLineError
from maha_megatron.data.prepare.encode import Output, no_text, progress_of, write_pairs
from maha_megatron.data.prepare.encoding import EncodingSettings, end_with_parent, leave_interrupts_to_parent
from maha_megatron.data.prepare.finished import finished_pair
from maha_megatron.data.prepare.inputs import InputFile, divide
from maha_megatron.data.prepare.pairs import merge_pairs, merged_manifest
from maha_megatron.data.prepare.spool import Spool
from maha_megatron.data.prepare.work_folder import WorkFolder, remove_leftover
from maha_megatron.errors import DataError, MahaError

QUEUE_WAIT_S = 0.2


class Stopped(Exception):
    """What this partition would still do is not wanted any more."""


def write_in_partitions(
    files: Sequence[InputFile],
    outputs: Sequence[Output],
    *,
    partitions: int,
    settings: EncodingSettings,
    workers: int,
    advance: Callable[[int, int, int], object],
    say: Callable[[str], object],
    revisions: dict[str, tuple[str, str]],
) -> list[Manifest]:
    """As encode.write_pairs, by several processes that read.

    Args:
        files: The input.
        outputs: The pairs.
        partitions: How many processes read; fewer where the files cannot be cut so often.
        workers: Tokenising processes, shared among the partitions.
        advance: Called with documents, text bytes and input bytes done so far.

    Raises:
        DataError: As encode.write_pairs; what other partitions did stays for the next run.
    """
    parts = divide(files, partitions)
    shares = [[_share(output, number, len(parts)) for output in outputs] for number in range(len(parts))]
    with ExitStack() as held:  # so that no other command makes these pairs meanwhile
        for output in outputs:
            held.callback(WorkFolder(output.prefix).close)
        _write_shares(parts, shares, settings, workers, advance, say, revisions)
    merged = [_merge(output, [share[place].prefix for share in shares]) for place, output in enumerate(outputs)]
    for output, manifest in zip(outputs, merged, strict=True):
        if manifest.tokens == 0:
            raise no_text(output.prefix, manifest.bad_lines)
    return merged


def _write_shares(
    parts: Sequence[Sequence[InputFile]],
    shares: Sequence[Sequence[Output]],
    settings: EncodingSettings,
    workers: int,
    advance: Callable[[int, int, int], object],
    say: Callable[[str], object],
    revisions: dict[str, tuple[str, str]],
) -> None:
    """Run the process of every partition to its end."""
    context = multiprocessing.get_context("spawn")
    messages, stops, running = context.Queue(), [context.Event() for _ in parts], {}
    for number, part in enumerate(parts):
        own_workers = max(1, workers // len(parts) + (number < workers % len(parts)))
        job = (number, part, shares[number], settings, own_workers, revisions, messages, stops[number])
        running[number] = context.Process(target=_write_partition, args=job)
        running[number].start()
    try:
        _watch(running, messages, stops, advance, say)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _share(output: Output, number: int, parts: int) -> Output:
    """The pair that a partition writes for the one that is asked for."""
    prefix = output.prefix.with_name(f"{output.prefix.name}.partition-{number}-of-{parts}")
    return replace(output, prefix=prefix, arguments={**output.arguments, "partition": [number, parts]})


def _merge(output: Output, names: Sequence[Path]) -> Manifest:
    """Make one pair of the partitions'; without text, what its manifest would say, and no pair."""
    manifests = [read_manifest(name) for name in names]
    if any(manifest.tokens for manifest in manifests):
        manifest = merge_pairs(names, output.prefix, arguments=output.arguments, advance=lambda num_bytes: None)
    else:
        manifest = merged_manifest(manifests, output.arguments)
    remove_leftover(output.prefix)
    return manifest


def _watch(
    running: dict[int, Any],
    messages: Any,
    stops: Sequence[Any],
    advance: Callable[[int, int, int], object],
    say: Callable[[str], object],
) -> None:
    """Wait for all partitions; after a bad line stop those behind it, since only lines before it can come first.

    Raises:
        DataError: A partition failed; of several bad lines the first of the input is told.
    """
    done: dict[int, tuple[int, int, int]] = {}
    left, bad_line = set(running), ""
    while left:
        try:
            number, kind, content = messages.get(timeout=QUEUE_WAIT_S)
        except queue.Empty:
            dead = [number for number in left if running[number].exitcode not in (None, 0)]
            if dead:
                raise DataError(
                    f"the process of partition {dead[0]} was killed, most likely because memory ran out: use fewer"
                    " --workers, and run the same command again; it continues"
                ) from None
            continue
        if kind == "error":
            raise DataError(content)
        if kind == "bad line" and number in left:
            bad_line = content
            for later in [later for later in left if later >= number]:
                stops[later].set()
                left.remove(later)
        elif kind == "say":
            say(content)
        elif kind == "progress":
            done[number] = content
            advance(*map(sum, zip(*done.values(), strict=True)))
        elif kind == "done":
            left.discard(number)
    if bad_line:
        raise DataError(bad_line)


def _write_partition(
    number: int,
    files: Sequence[InputFile],
    outputs: Sequence[Output],
    settings: EncodingSettings,
    workers: int,
    revisions: dict[str, tuple[str, str]],
    messages: Any,
    stop: Any,
) -> None:
    """What the process of a partition runs; it tells of everything by messages, and ends when it is told to stop."""
    leave_interrupts_to_parent()
    threading.Thread(target=end_with_parent, daemon=True).start()

    def tell(kind: str, content: Any = None) -> None:
        messages.put((number, kind, content))

    def advance(spools: Sequence[Spool]) -> None:
        if stop.is_set():
            raise Stopped
        tell("progress", progress_of(spools))

    try:
        written = partial(finished_pair, advance=lambda num_bytes: None, say=lambda text: tell("say", text))
        left = [output for output in outputs if written(output.prefix, output.arguments) is None]
        if left:
            write_pairs(
                partial(read_blocks, files, [output.key for output in left], longest_bytes=settings.longest_bytes),
                left,
                settings=settings,
                workers=workers,
                advance=advance,
                say=lambda text: tell("say", text),
                revisions=revisions,
                allow_empty=True,
            )
        manifests = [read_manifest(output.prefix) for output in outputs]
        documents, text_bytes = sum(m.documents for m in manifests), sum(m.text_bytes for m in manifests)
        tell("progress", (documents, text_bytes, sum(file.size_bytes for file in files)))
        tell("done")
    except Stopped:
        pass
    except BadLineError as error:
        tell("bad line", str(error))
    except MahaError as error:
        tell("error", str(error))

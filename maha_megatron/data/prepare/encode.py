"""Tokenising documents into a Megatron pair, in order, with several processes, in bounded memory.

The pair is byte for byte what Megatron's own preprocessing writes: documents in order, one sequence each, the smallest
dtype that holds the vocabulary. Neither workers nor partitions change a byte.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import Manifest
from maha_megatron.data.prepare.blocks import BEGINNING, BLOCK_BYTES, Block, Position
from maha_megatron.data.prepare.documents import BadLine, documents_of
from maha_megatron.data.prepare.encoding import (
    PROVED_BLOCKS,
    PROVED_CHARACTERS,
    EncodedBlock,
    Encoder,
    EncodingSettings,
    encode_block,
    fast_way_agrees,
    leave_interrupts_to_parent,
    return_large_memory,
    start_worker,
)
from maha_megatron.data.prepare.spool import Spool
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError

WAITING_BLOCKS_PER_WORKER = 3


@dataclass(frozen=True)
class Output:
    """A pair to write: the texts under one key."""

    key: str
    prefix: Path
    """Path of the pair without its ending."""
    arguments: dict[str, Any]
    """What the pair depends on; kept in the manifest."""


def no_text(prefix: Path, bad_lines: dict[str, int]) -> DataError:
    """The error for an input without documents, or with empty ones only."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(bad_lines.items()))
    return DataError(
        f"{prefix}: the input holds no text: nothing to preprocess"
        + (f" (left out: {kinds}; --strict stops at the first and names it)" if kinds else "")
    )


def write_pairs(
    blocks: Callable[[Position], Iterator[Block]],
    outputs: Sequence[Output],
    *,
    settings: EncodingSettings,
    workers: int,
    advance: Callable[[Sequence[Spool]], object],
    say: Callable[[str], object],
    revisions: dict[str, tuple[str, str]],
    allow_empty: bool = False,
) -> list[Manifest]:
    """Tokenise documents and write .bin, .idx, .checksums.npz and the manifest of each pair, all or nothing.

    The input is read once for all pairs. A run that was killed is continued by the next one with the same arguments.

    Args:
        blocks: The input from a position on.
        outputs: The pairs.
        settings: Tokenizer, and what to do with bad lines.
        workers: Tokenising processes; 1 tokenises in this one.
        advance: Called after every block that was written, with what every pair has come to.
        say: Called with what is worth a line.
        revisions: Licence and revision of inputs by name, where given.
        allow_empty: Write a pair without tokens too, for the merge of partitions.

    Raises:
        DataError: The tokenizer is unusable, there is no text, a line is bad and the settings are strict, or a file
            cannot be written.
    """
    leave_interrupts_to_parent()  # where this is a partition
    return_large_memory()
    tokenizer = load_tokenizer(settings.tokenizer, settings.merges)
    keys, spools = [output.key for output in outputs], []
    try:
        for output in outputs:
            spools.append(Spool(output.prefix, tokenizer, output.arguments))
            if spools[-1].position != BEGINNING:
                say(f"continuing {output.prefix} after {spools[-1].documents} documents")
        batched = _fast_way(tokenizer, blocks(BEGINNING), settings, keys, say)
        advance(spools)
        done = min(spool.position for spool in spools)
        for encoded in _encoded(blocks(done), Encoder(tokenizer, settings, keys, batched), workers):
            for spool, part in zip(spools, encoded, strict=True):
                if done < spool.position < part.end:  # other keys may end a block elsewhere
                    spool.discard()
                    raise DataError(
                        f"{spool.prefix} was begun with other --json-keys and cannot go on with these: what it had is"
                        " removed, run the same command again"
                    )
                if spool.position < part.end:
                    spool.add(part)
            done = encoded[0].end
            advance(spools)
        empty = [] if allow_empty else [spool for spool in spools if spool.tokens == 0]
        manifests = [spool.finish(revisions) for spool in spools if spool not in empty]
        for spool in empty:
            spool.discard()
        if empty:
            raise no_text(empty[0].prefix, empty[0].bad_lines)
        return manifests
    finally:
        for spool in spools:
            spool.close()


def progress_of(spools: Sequence[Spool]) -> tuple[int, int, int]:
    """Documents, bytes of text, and bytes of the input read so far."""
    return (
        sum(spool.documents for spool in spools),
        sum(spool.text_bytes for spool in spools),
        min(spool.read_bytes for spool in spools),
    )


def _fast_way(
    tokenizer: Any,
    blocks: Iterator[Block],
    settings: EncodingSettings,
    keys: Sequence[str],
    say: Callable[[str], object],
) -> bool:
    """Whether the tokenizer's fast way gives the ids of its plain one on the first texts of the input."""
    texts, characters = [], 0
    for block, key in product(islice(blocks, PROVED_BLOCKS), keys):
        for document in documents_of(block, key, longest_bytes=settings.longest_bytes, on_bad=_ignore):
            text = document.text[: PROVED_CHARACTERS - characters].encode("utf-8", "replace").decode()
            texts.append(text)
            characters += len(text)
    agrees = fast_way_agrees(tokenizer, texts)
    if not agrees:
        say("the tokenizer's batch encoding gives other ids than its plain one on this text: the plain one is used")
    return agrees


def _ignore(bad: BadLine) -> None:
    """Bad lines are counted when they are encoded."""


def _encoded(blocks: Iterator[Block], encoder: Encoder, workers: int) -> Iterator[list[EncodedBlock]]:
    """Encode blocks in order; WAITING_BLOCKS_PER_WORKER per worker are held at a time, of long documents fewer."""
    if workers == 1:
        yield from map(encoder.encode, blocks)
        return
    # Fresh processes: a fork of one that runs torch's threads may hang.
    context, most = multiprocessing.get_context("spawn"), WAITING_BLOCKS_PER_WORKER * workers
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(encoder,)) as pool:
        waiting: deque = deque()
        waiting_bytes = 0
        try:
            for block in blocks:
                waiting.append((pool.submit(encode_block, block), block.content_bytes))
                waiting_bytes += block.content_bytes
                while len(waiting) >= most or (len(waiting) > workers and waiting_bytes > most * BLOCK_BYTES):
                    future, num_bytes = waiting.popleft()
                    waiting_bytes -= num_bytes
                    yield future.result()
            while waiting:
                yield waiting.popleft()[0].result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process was killed, most likely because memory ran out: use fewer --workers or a smaller"
                " --longest-document, and run the same command again; it continues"
            ) from error
        finally:
            for future, _ in waiting:
                future.cancel()

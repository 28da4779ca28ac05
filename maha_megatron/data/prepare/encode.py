"""Tokenising documents into a Megatron pair, in order, with several processes, in bounded memory.

The pair is byte for byte what Megatron's own preprocessing writes: documents in order, one sequence each, the smallest
dtype that holds the vocabulary. Neither workers nor partitions change a byte.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

from maha_megatron.data.manifest import Manifest
from maha_megatron.data.prepare.blocks import BEGINNING, Block, Position
from maha_megatron.data.prepare.documents import BadLine, documents_of
from maha_megatron.data.prepare.encoding import (
    PROVED_BLOCKS,
    PROVED_CHARACTERS,
    EncodedBlock,
    Encoder,
    EncodingSettings,
    encode_block,
    fast_way_agrees,
    start_worker,
)
from maha_megatron.data.prepare.spool import Spool
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError

WAITING_BLOCKS_PER_WORKER = 3


def no_text(bad_lines: dict[str, int]) -> DataError:
    """The error for an input without documents, or with empty ones only."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(bad_lines.items()))
    return DataError(
        "the input holds no text: nothing to preprocess"
        + (f" (left out: {kinds}; --strict stops at the first and names it)" if kinds else "")
    )


def write_pair(
    blocks: Callable[[Position], Iterator[Block]],
    prefix: Path,
    *,
    settings: EncodingSettings,
    workers: int,
    arguments: dict[str, Any],
    advance: Callable[[Spool], object],
    say: Callable[[str], object],
    revisions: dict[str, tuple[str, str]],
    allow_empty: bool = False,
) -> Manifest:
    """Tokenise documents and write `prefix`.bin, .idx, .checksums.npz and the manifest, all or nothing.

    A run that was killed is continued by the next one with the same arguments.

    Args:
        blocks: The input from a position on.
        prefix: Path of the pair without its ending.
        settings: Tokenizer, key and what to do with bad lines.
        workers: Tokenising processes; 1 tokenises in this one.
        arguments: What the pair depends on; kept in the manifest.
        advance: Called after every block that was written.
        say: Called with what is worth a line.
        revisions: Licence and revision of inputs by name, where given.
        allow_empty: Write a pair without tokens too, for the merge of partitions.

    Raises:
        DataError: The tokenizer is unusable, there is no text, a line is bad and the settings are strict, or a file
            cannot be written.
    """
    tokenizer = load_tokenizer(settings.tokenizer, settings.merges)
    spool = Spool(prefix, tokenizer, arguments)
    try:
        if spool.position != BEGINNING:
            say(f"continuing {prefix} after {spool.documents} documents")
        batched = _fast_way(tokenizer, blocks(BEGINNING), settings, say)
        advance(spool)
        for encoded in _encoded(blocks(spool.position), Encoder(tokenizer, settings, batched), workers):
            spool.add(encoded)
            advance(spool)
        if spool.tokens == 0 and not allow_empty:
            spool.discard()
            raise no_text(spool.bad_lines)
        return spool.finish(revisions)
    finally:
        spool.close()


def _fast_way(
    tokenizer: Any, blocks: Iterator[Block], settings: EncodingSettings, say: Callable[[str], object]
) -> bool:
    """Whether the tokenizer's fast way gives the ids of its plain one on the first texts of the input."""
    texts, characters = [], 0
    for block in islice(blocks, PROVED_BLOCKS):
        for document in documents_of(block, settings.key, longest_bytes=settings.longest_bytes, on_bad=_ignore):
            text = document.text[: PROVED_CHARACTERS - characters].encode("utf-8", "replace").decode()
            texts.append(text)
            characters += len(text)
    agrees = fast_way_agrees(tokenizer, texts)
    if not agrees:
        say("the tokenizer's batch encoding gives other ids than its plain one on this text: the plain one is used")
    return agrees


def _ignore(bad: BadLine) -> None:
    """Bad lines are counted when they are encoded."""


def _encoded(blocks: Iterator[Block], encoder: Encoder, workers: int) -> Iterator[EncodedBlock]:
    """Encode blocks in order; at most WAITING_BLOCKS_PER_WORKER blocks per worker are held at a time."""
    if workers == 1:
        yield from map(encoder.encode, blocks)
        return
    # Fresh processes: a fork of one that runs torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(encoder,)) as pool:
        waiting: deque = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(encode_block, block))
                if len(waiting) >= WAITING_BLOCKS_PER_WORKER * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenising process was killed, most likely because memory ran out: use fewer --workers or a smaller"
                " --longest-document, and run the same command again; it continues"
            ) from error
        finally:
            for future in waiting:
                future.cancel()

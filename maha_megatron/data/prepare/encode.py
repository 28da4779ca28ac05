"""Documents to a Megatron .bin/.idx pair, by several processes and in bounded memory.

The pair is byte for byte what Megatron's own preprocessing writes: documents in order, one sequence each, the
smallest dtype that holds the vocabulary.
"""

import hashlib
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maha_megatron.data.indexed import DType, IndexedDatasetBuilder
from maha_megatron.data.manifest import Manifest, manifest_path, write_manifest
from maha_megatron.data.prepare.stage import whole_file
from maha_megatron.data.prepare.token_batches import EncodedBatch, Encoder, encode_batch, start_worker
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError

BATCH_CHARACTERS = 1 << 18
WAITING_BATCHES_PER_WORKER = 4


@dataclass
class Totals:
    """What accumulates while documents pass by."""

    counts: np.ndarray
    documents: int = 0
    text_bytes: int = 0

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def unigram_entropy_nats(self) -> float:
        shares = self.counts[self.counts > 0] / self.tokens
        return float(-(shares * np.log(shares)).sum())


def write_pair(
    texts: Iterable[str],
    prefix: Path,
    *,
    tokenizer_path: str,
    append_end: bool,
    workers: int,
    arguments: dict[str, Any],
    advance: Callable[[int], object],
) -> Manifest:
    """Tokenise documents and write `prefix`.bin, `prefix`.idx and their manifest, all or nothing.

    Args:
        texts: The documents.
        prefix: Path of the pair without its ending.
        tokenizer_path: As for load_tokenizer.
        append_end: Whether every document gets the end-of-document token.
        workers: Tokenising processes; 1 tokenises in this one.
        arguments: Kept in the manifest.
        advance: Called with the UTF-8 bytes of every batch of documents that was written.

    Raises:
        DataError: The tokenizer is unusable, there is no text, or a file cannot be written.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = Encoder(tokenizer, append_end)
    digest = hashlib.sha256()
    totals = Totals(np.zeros(tokenizer.vocabulary, dtype=np.int64))
    manifest_path(prefix).unlink(missing_ok=True)
    with whole_file(Path(f"{prefix}.bin")) as bin_file, whole_file(Path(f"{prefix}.idx")) as idx_file:
        builder = IndexedDatasetBuilder(str(bin_file), dtype=DType.optimal_dtype(tokenizer.vocabulary))
        for batch in _encoded(text_batches(texts, digest), encoder, tokenizer_path, workers):
            _add(builder, batch, totals)
            advance(batch.text_bytes)
        if totals.tokens == 0:
            raise DataError("the input holds no text: nothing to preprocess")
        builder.finalize(str(idx_file))
    manifest = Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocabulary=tokenizer.vocabulary,
        end_of_document=tokenizer.end_of_document,
        end_appended=append_end,
        documents=totals.documents,
        tokens=totals.tokens,
        text_bytes=totals.text_bytes,
        unigram_entropy_nats=totals.unigram_entropy_nats,
        sources_sha256=digest.hexdigest(),
        arguments=arguments,
    )
    write_manifest(prefix, manifest)
    return manifest


def text_batches(texts: Iterable[str], digest: Any) -> Iterator[list[str]]:
    """Documents in batches of about BATCH_CHARACTERS, hashed as they pass; lone surrogates become question marks."""
    held: list[str] = []
    characters = 0
    for text in texts:
        content = text.encode("utf-8", "replace")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
        held.append(content.decode())
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _add(builder: IndexedDatasetBuilder, batch: EncodedBatch, totals: Totals) -> None:
    start = 0
    for length in batch.lengths.tolist():
        builder.add_document(batch.ids[start : start + length], [length] if length else [])
        start += length
    totals.counts += np.bincount(batch.ids, minlength=totals.counts.size)
    totals.documents += len(batch.lengths)
    totals.text_bytes += batch.text_bytes


def _encoded(
    batches: Iterable[list[str]], encoder: Encoder, tokenizer_path: str, workers: int
) -> Iterator[EncodedBatch]:
    """Encode batches in order; at most WAITING_BATCHES_PER_WORKER batches per worker are held at a time."""
    if workers == 1:
        yield from map(encoder.encode, batches)
        return
    room = threading.Semaphore(WAITING_BATCHES_PER_WORKER * workers)

    def admitted() -> Iterator[list[str]]:
        for batch in batches:
            room.acquire()
            yield batch

    # Fresh processes: a fork of one that runs torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=start_worker, initargs=(tokenizer_path, encoder.append_end)) as pool:
        for encoded in pool.imap(encode_batch, admitted()):
            room.release()
            yield encoded

"""What a tokenising process runs. Imports neither torch nor megatron, so that processes start fast and stay small."""

import ctypes
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np

from maha_megatron.data.layout import ITEM_TYPES
from maha_megatron.data.prepare.blocks import Block, Position
from maha_megatron.data.prepare.digest import TextDigest, digest_of
from maha_megatron.data.prepare.documents import BadLine, BadLineError, documents_of, refuse
from maha_megatron.data.prepare.index_file import token_code
from maha_megatron.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 18
"""Texts that are encoded in one call; what a tokenizer keeps beside the ids would grow with more."""
PIECE_CHARACTERS = 1 << 19
"""A document longer than this is encoded in pieces, if cuts can be found: a tokenizer takes 60 to 150 times a text."""
CUT = re.compile(r"\S(?= \S)")
"""Where tokenizers begin a new word. Behind a line's end many have pieces that go on."""
CUTS_TRIED, SEARCHED_CHARACTERS, PROVED_AROUND = 8, 1 << 14, 1 << 11
LARGE_BYTES, M_MMAP_THRESHOLD = 1 << 21, -3
PROVED_CHARACTERS = 200_000
PROVED_BLOCKS = 4
"""Text at the start of a corpus on which the fast way is held against the plain one."""


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What decides the ids and which documents are taken."""

    tokenizer: str
    merges: str | None
    append_end: bool
    prepend_begin: bool = False
    """As Megatron's Llama2Tokenizer does, also before a document without text; for SentencePiece models with one."""
    strict: bool
    longest_bytes: int


@dataclass(frozen=True)
class EncodedBlock:
    """The documents that a block holds under one key, as tokens."""

    ids: np.ndarray
    """[tokens], in the dtype of the .bin: the documents end to end."""
    lengths: np.ndarray
    """int32 [documents]."""
    text_bytes: int
    digest: TextDigest
    bad: tuple[BadLine, ...]
    argument: str
    end: Position
    read_bytes: int


class Encoder:
    """Encodes blocks; one lives in each process.

    Args:
        tokenizer: Encodes. It travels to other processes, which so need not import what loaded it.
        settings: Of the run.
        keys: Under which the texts of a pair each are found.
        batched: Use the tokenizer's fast way, which `fast_way_agrees` vouches for.
    """

    def __init__(self, tokenizer: Tokenizer, settings: EncodingSettings, keys: Sequence[str], batched: bool):
        self._tokenizer, self._settings, self._keys, self._batched = tokenizer, settings, keys, batched
        self._item_type = np.dtype(ITEM_TYPES[token_code(tokenizer.vocabulary)])
        none = np.zeros(0, dtype=np.int32)
        self._begin = np.int32([tokenizer.begin_of_document]) if settings.prepend_begin else none
        self._end = np.int32([tokenizer.end_of_document]) if settings.append_end else none

    def encode(self, block: Block) -> list[EncodedBlock]:
        """Encode a block's documents, key by key; one without text gets no tokens and no end, as in Megatron.

        Raises:
            DataError: A line is bad and the settings are strict; the first one under any key is told.
        """
        encoded, refused = [], []
        for key in self._keys:
            try:
                encoded.append(self._encode(block, key))
            except BadLineError as error:
                refused.append(error)
        if refused:
            raise min(refused, key=lambda error: error.line)
        return encoded

    def _encode(self, block: Block, key: str) -> EncodedBlock:
        bad: list[BadLine] = []
        contents, parts, held, characters = [], [], [], 0
        for document in documents_of(
            block,
            key,
            longest_bytes=self._settings.longest_bytes,
            on_bad=refuse if self._settings.strict else bad.append,
        ):
            content = document.text.encode("utf-8", "replace")  # a lone surrogate becomes a question mark
            contents.append(content)
            held.append(content.decode())
            characters += len(held[-1])
            if len(held[-1]) > PIECE_CHARACTERS and self._tokenizer.is_local(held[-1]):
                long, characters = held.pop(), 0
                parts += [*self._ids(held), self._finished(self._in_pieces(long))]
                held = []
            elif characters >= BATCH_CHARACTERS:
                parts += self._ids(held)
                held, characters = [], 0
        parts += self._ids(held)
        return EncodedBlock(
            np.concatenate(parts) if parts else np.zeros(0, dtype=self._item_type),
            np.array([part.size for part in parts], dtype=np.int32),
            sum(map(len, contents)),
            digest_of(contents),
            tuple(bad),
            block.argument,
            block.end,
            block.read_bytes,
        )

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._batched and texts:
            encoded = self._tokenizer.encode_batch(texts)
        else:
            encoded = [np.array(self._tokenizer.encode(text), dtype=np.int32) for text in texts]
        return [self._finished(ids) for ids in encoded]

    def _finished(self, ids: np.ndarray) -> np.ndarray:
        begun = np.concatenate([self._begin, ids])
        return (np.concatenate([begun, self._end]) if begun.size else begun).astype(self._item_type)

    def _in_pieces(self, text: str) -> np.ndarray:
        """The ids of a long text, a piece at a time, in the type of the file."""
        parts, begin = [], 0
        while begin < len(text):
            end = self._end_of_piece(text, begin)
            piece = text[begin:end]
            ids = self._tokenizer.encode_on(piece) if begin else np.int32(self._tokenizer.encode(piece))
            parts.append(ids.astype(self._item_type))
            begin = end
        return np.concatenate(parts)

    def _end_of_piece(self, text: str, begin: int) -> int:
        """Where cutting changes no id: both sides, for PROVED_AROUND characters, give together what each gives."""
        for last in range(begin + PIECE_CHARACTERS, len(text), PIECE_CHARACTERS):
            found = [match.end() for match in CUT.finditer(text, last - SEARCHED_CHARACTERS, last)]
            for cut in found[: -CUTS_TRIED - 1 : -1]:
                before, after = text[max(cut - PROVED_AROUND, begin) : cut], text[cut : cut + PROVED_AROUND]
                whole, *parts = map(self._tokenizer.encode_on, (before + after, before, after))
                if np.array_equal(whole, np.concatenate(parts)):
                    return cut
        return len(text)


def fast_way_agrees(tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Whether the tokenizer's fast way gives the ids of its plain one on these texts."""
    return all(
        fast.tolist() == tokenizer.encode(text) for fast, text in zip(tokenizer.encode_batch(texts), texts, strict=True)
    )


def return_large_memory() -> None:
    """Let large pieces of memory go back to the system when they are freed; glibc would keep ever larger ones."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


_encoder: Encoder | None = None
"""The process's encoder: a process pool offers no other place for what an initialiser makes."""


def leave_interrupts_to_parent() -> None:
    """Ignore Ctrl-C in a process that this program started: the terminal sends it to all, and the first ends all."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_worker(encoder: Encoder) -> None:
    """Initialise a tokenising process; it ends when the one that started it does, however that ends."""
    global _encoder
    leave_interrupts_to_parent()
    return_large_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    threading.Thread(target=end_with_parent, daemon=True).start()
    _encoder = encoder


def end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def encode_block(block: Block) -> list[EncodedBlock]:
    """Encode a block in a process that was initialised."""
    assert _encoder is not None
    return _encoder.encode(block)

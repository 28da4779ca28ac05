"""Writing the .idx of a Megatron pair in bounded memory, with 64-bit offsets; indexed.py draws its layout.

Torch-free, unlike megatron-core's own writer, which keeps every length and offset in Python lists.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from maha_megatron.data import writing
from maha_megatron.data.layout import HEADER, ITEM_TYPES, MAGIC, VERSION
from maha_megatron.data.writing import settle, whole_file

CHUNK_ITEMS = 1 << 20
Chunks = Callable[[], Iterable[np.ndarray]]
"""Gives an array in pieces, anew at every call."""


def token_code(vocabulary: int) -> int:
    """The dtype code in which Megatron stores ids below `vocabulary`: uint16 where they fit, else int32."""
    return 8 if vocabulary < 65500 else 4


def write_index(path: Path, *, code: int, sequences: int, bounds: int, lengths: Chunks, documents: Chunks) -> None:
    """Write an index whose sequences lie one after another in the .bin.

    Args:
        path: The .idx file.
        code: Dtype code of the tokens.
        sequences: How many lengths follow.
        bounds: How many document bounds follow, the leading 0 included.
        lengths: int32, tokens of each sequence.
        documents: int64, the sequence where each document ends, after a leading 0.

    Raises:
        DataError: The file cannot be written.
    """
    with whole_file(path) as partial, partial.open("wb") as stream:
        writing.write(stream, HEADER.pack(MAGIC, VERSION, code, sequences, bounds))
        for chunk in lengths():
            writing.write(stream, chunk.astype("<i4").tobytes())
        for chunk in _offsets(lengths(), np.dtype(ITEM_TYPES[code]).itemsize):
            writing.write(stream, chunk.astype("<i8").tobytes())
        for chunk in documents():
            writing.write(stream, chunk.astype("<i8").tobytes())
        settle(stream)


def _offsets(lengths: Iterable[np.ndarray], item_bytes: int) -> Iterator[np.ndarray]:
    """Where each sequence begins in the .bin, in bytes."""
    end = 0
    for chunk in lengths:
        ends = end + np.cumsum(chunk, dtype=np.int64) * item_bytes
        yield ends - chunk.astype(np.int64) * item_bytes
        end = int(ends[-1]) if ends.size else end


def in_chunks(array: np.ndarray, items: int = CHUNK_ITEMS) -> Iterator[np.ndarray]:
    """An array, usually memory-mapped, in pieces."""
    for start in range(0, len(array), items):
        yield array[start : start + items]

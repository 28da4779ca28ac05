"""Opening a Megatron .bin/.idx pair, after checks whose messages say what to do, and reading its tokens. Torch-free."""

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maha_megatron.data.checksums import file_sha256, read_checksums
from maha_megatron.data.layout import REBUILD, PairIndex, map_tokens, read_index
from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.errors import DataError


class Pair:
    """The tokens of a pair, memory-mapped. Where a manifest has checksums, no token is given out unchecked.

    Args:
        prefix: Path of the pair without its ending.
        index: Its index.
        checksums: uint32 [chunks of the .bin], or None: unchecked.
        chunk_bytes: Of the .bin that a checksum stands for.
    """

    def __init__(self, prefix: str, index: PairIndex, checksums: np.ndarray | None, chunk_bytes: int = 1):
        self.prefix, self.index = prefix, index
        self._tokens = map_tokens(prefix, index)
        self._stream = Path(f"{prefix}.bin").open("rb", buffering=0)  # noqa: SIM115 (closed with this object)
        _expect_random_access(self._stream.fileno(), self._tokens)
        self._tokens = np.asarray(self._tokens)
        self._checksums, self._chunk_bytes = checksums, chunk_bytes
        self._unchecked = None if checksums is None else np.ones(len(checksums), dtype=bool)

    def __len__(self) -> int:
        """Sequences; where no tool cut documents into sentences, the documents that are not empty."""
        return len(self.index.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """The tokens of a sequence, in the type of the file."""
        begin = int(self.index.pointers[sequence]) // self._tokens.itemsize
        return self.read(begin, begin + int(self.index.lengths[sequence]))

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[sequence] for sequence in range(len(self)))

    @property
    def documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.index.documents) - 1

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, in the type of the file."""
        return self.read(*self.index.document_tokens(number))

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the .bin, in the type of the file; a view of the map.

        Raises:
            DataError: They are not what was written.
        """
        if self._unchecked is not None:
            self._check(begin * self._tokens.itemsize, end * self._tokens.itemsize)
        return self._tokens[begin:end]

    def check_all(self) -> None:
        """Check every token.

        Raises:
            DataError: One is not what was written, or the pair has no checksums.
        """
        if self._unchecked is None:
            raise DataError(f"{self.prefix} has no checksums to check its tokens by: it was made by another tool")
        self._check(0, self.index.bin_bytes)

    def _check(self, begin: int, end: int) -> None:
        """Check the chunks that hold bytes [begin, end) and were not checked before."""
        size = self._chunk_bytes
        for chunk in range(begin // size, -(-end // size)):
            if self._unchecked[chunk]:
                at = chunk * size
                if zlib.crc32(os.pread(self._stream.fileno(), size, at)) != self._checksums[chunk]:
                    raise DataError(
                        f"{self.prefix}.bin is damaged between byte {at} and {at + size}: its content is not"
                        f" what the manifest's checksums say; {REBUILD}"
                    )
                self._unchecked[chunk] = False


def _expect_random_access(file: int, tokens: np.memmap) -> None:
    """Ask the system not to read ahead: samples lie anywhere, and what surrounds one would be read for nothing."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    if hasattr(mmap, "MADV_RANDOM"):
        tokens._mmap.madvise(mmap.MADV_RANDOM)


def open_pair(prefix: str | Path) -> Pair:
    """Open `prefix`.bin and `prefix`.idx.

    Raises:
        DataError: The pair is missing, without tokens, damaged, or not the one that its manifest describes.
    """
    index = read_index(prefix)
    if index.tokens == 0:
        raise DataError(f"{index.path} holds no tokens: the corpus it was made from was empty; {REBUILD}")
    manifest = read_manifest(prefix)
    if manifest:
        _check_against(manifest, index)
        if manifest.checksums_sha256:
            checksums, _, chunk_bytes = read_checksums(prefix, manifest.checksums_sha256)
            return Pair(str(prefix), index, checksums, chunk_bytes)
    return Pair(str(prefix), index, None)


def _check_against(manifest: Manifest, index: PairIndex) -> None:
    """Refuse an index that is not the manifest's."""
    documents = len(index.documents) - 1
    if (manifest.documents, manifest.tokens) != (documents, index.tokens):
        raise DataError(
            f"{index.path} holds {documents} documents with {index.tokens} tokens, its manifest says"
            f" {manifest.documents} with {manifest.tokens}: they are not of one making; {REBUILD}"
        )
    if manifest.index_sha256 and file_sha256(index.path) != manifest.index_sha256:
        raise DataError(f"{index.path} is damaged: its content is not what its manifest says; {REBUILD}")

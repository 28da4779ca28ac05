"""Opening a Megatron .bin/.idx pair, after checks whose messages say what to do, and reading its tokens. Torch-free."""

import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maha_megatron.data.checksums import CHUNK_BYTES, file_sha256, read_checksums
from maha_megatron.data.layout import REBUILD, PairIndex, map_tokens, read_index
from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.errors import DataError

CHECKED_AT_ONCE = 1 << 22


class Pair:
    """The tokens of a pair, memory-mapped. Where a manifest has checksums, no token is given out unchecked.

    Args:
        prefix: Path of the pair without its ending.
        index: Its index.
        checksums: uint32 [chunks of the .bin], or None: unchecked.
        chunk_bytes: Of the .bin that a checksum stands for.
    """

    def __init__(self, prefix: str, index: PairIndex, checksums: np.ndarray | None, chunk_bytes: int = CHUNK_BYTES):
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

    def check_all(self, advance: Callable[[int], object] = lambda num_bytes: None) -> None:
        """Check every token.

        Args:
            advance: Called with bytes of the .bin that were checked.

        Raises:
            DataError: One is not what was written, or the pair has no checksums.
        """
        if self._unchecked is None:
            raise DataError(f"{self.prefix} has no checksums to check its tokens by: it was made by another tool")
        for begin in range(0, self.index.bin_bytes, CHECKED_AT_ONCE):
            end = min(begin + CHECKED_AT_ONCE, self.index.bin_bytes)
            _expect_all(self._stream.fileno(), begin, end)
            self._check(begin, end)
            advance(end - begin)

    def _check(self, begin: int, end: int) -> None:
        """Check the chunks that hold bytes [begin, end) and were not checked before."""
        size = self._chunk_bytes
        for chunk in range(begin // size, -(-end // size)):
            if self._unchecked[chunk]:
                at = chunk * size
                if zlib.crc32(os.pread(self._stream.fileno(), size, at)) != self._checksums[chunk]:
                    raise damaged(self.prefix, at, size)
                self._unchecked[chunk] = False


def _expect_all(file: int, begin: int, end: int) -> None:
    """Ask the system to read bytes [begin, end) ahead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_WILLNEED)


def _expect_random_access(file: int, tokens: np.memmap) -> None:
    """Ask the system not to read ahead: samples lie anywhere, and what surrounds one would be read for nothing."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    if hasattr(mmap, "MADV_RANDOM"):
        tokens._mmap.madvise(mmap.MADV_RANDOM)


@dataclass(frozen=True)
class PairFiles:
    """What lies beside the tokens of a pair, checked against each other."""

    index: PairIndex
    manifest: Manifest | None
    """None: the pair was made by another tool, and nothing but its index speaks of its tokens."""
    checksums: np.ndarray | None
    """uint32 [chunks of the .bin]; None where the manifest names none."""
    counts: np.ndarray | None
    """int64 [vocabulary]: how often each token occurs; there where the checksums are."""
    chunk_bytes: int = CHUNK_BYTES
    """Of which each checksum is."""


def read_pair_files(prefix: str | Path) -> PairFiles:
    """Read all files of a pair but its .bin, of which the size is checked. It may hold no tokens.

    Raises:
        DataError: The pair is missing, damaged, or not the one that its manifest describes.
    """
    index, manifest = read_index(prefix), read_manifest(prefix)
    if manifest is None:
        return PairFiles(index, None, None, None)
    _check_against(manifest, index)
    if not manifest.checksums_sha256:
        return PairFiles(index, manifest, None, None)
    return PairFiles(index, manifest, *read_checksums(prefix, manifest.checksums_sha256))


def open_pair(prefix: str | Path) -> Pair:
    """Open `prefix`.bin and `prefix`.idx.

    Raises:
        DataError: As read_pair_files, or the pair holds no tokens.
    """
    files = read_pair_files(prefix)
    if files.index.tokens == 0:
        documents = len(files.index.documents) - 1
        empty = f"its {documents} documents are empty, as they were in its input: leave the pair out"
        raise DataError(
            f"{files.index.path} holds no tokens: "
            + (empty if documents else f"the corpus it was made from was empty; {REBUILD}")
        )
    return Pair(str(prefix), files.index, files.checksums, files.chunk_bytes)


def check_pair(prefix: str | Path, advance: Callable[[int], object]) -> None:
    """Check all that the manifest of a pair vouches for. The pair may hold no tokens.

    Args:
        prefix: Path of the pair without its ending.
        advance: Called with bytes of the .bin that were checked.

    Raises:
        DataError: As read_pair_files, or a token is not what was written.
    """
    files = read_pair_files(prefix)
    if files.checksums is not None and files.index.tokens:
        Pair(str(prefix), files.index, files.checksums, files.chunk_bytes).check_all(advance)


def damaged(prefix: str | Path, begin: int, num_bytes: int) -> DataError:
    """The error for a part of a .bin that is not what was written."""
    return DataError(
        f"{prefix}.bin is damaged between byte {begin} and {begin + num_bytes}: its content is not what the manifest's"
        f" checksums say; {REBUILD}"
    )


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

"""Checksums of a pair's tokens, by chunk, so that what training reads can be checked when it is first read.

They lie in <prefix>.checksums.npz, whose own hash is in the manifest. A whole corpus need not be read to start, and a
flipped bit is found before a sample with it is trained on. Torch-free.
"""

import hashlib
import io
import zlib
from array import array
from itertools import repeat
from pathlib import Path

import numpy as np

from maha_megatron.data.writing import write_whole
from maha_megatron.errors import DataError

CHUNK_BYTES = 1 << 14
"""Small, since the first pass over short documents checks a chunk for each of them."""
OLD_CHUNK_BYTES = 1 << 16
"""Of files that do not tell."""
HASHED_AT_ONCE = 1 << 24


def checksums_path(prefix: str | Path) -> Path:
    """Where the checksums of a pair lie."""
    return Path(f"{prefix}.checksums.npz")


class TokenSums:
    """Checksums and token counts of a .bin that is being written.

    Args:
        vocabulary: Token ids run below it.
        chunk_bytes: Of which checksums are.
    """

    def __init__(self, vocabulary: int, chunk_bytes: int = CHUNK_BYTES):
        self._chunk_bytes = chunk_bytes
        self.counts = np.zeros(vocabulary, dtype=np.int64)
        self._done = array("I")
        self._open_crc = self._open_bytes = 0

    def add(self, tokens: np.ndarray) -> None:
        """Count the next tokens, in the dtype of the file."""
        if tokens.size:
            self.counts += np.bincount(tokens, minlength=self.counts.size)
        self.add_bytes(memoryview(np.ascontiguousarray(tokens)).cast("B"))

    def add_bytes(self, content: bytes | memoryview) -> None:
        """Take the next bytes into the checksums alone."""
        content = memoryview(content)
        while len(content):
            piece = content[: self._chunk_bytes - self._open_bytes]
            self._open_crc = zlib.crc32(piece, self._open_crc)
            self._open_bytes += len(piece)
            if self._open_bytes == self._chunk_bytes:
                self._done.append(self._open_crc)
                self._open_crc = self._open_bytes = 0
            content = content[len(piece) :]

    def add_zeros(self, num_bytes: int) -> None:
        """As add_bytes of so many zeros, but fast where whole chunks are nothing else: the holes of a sparse file."""
        while num_bytes:
            piece = min(num_bytes, self._chunk_bytes - self._open_bytes)
            if piece == self._chunk_bytes:
                chunks = num_bytes // piece
                self._done.extend(repeat(zlib.crc32(bytes(piece)), chunks))
                piece *= chunks
            else:
                self.add_bytes(bytes(piece))
            num_bytes -= piece

    @property
    def crc32(self) -> np.ndarray:
        """The checksums so far, uint32 [chunks]; the last chunk may be short."""
        last = [self._open_crc] if self._open_bytes else []
        return np.concatenate([np.array(self._done, dtype=np.uint32), np.array(last, dtype=np.uint32)])

    def save(self, prefix: str | Path) -> str:
        """Write the pair's checksums; their hash, for the manifest.

        Raises:
            DataError: The file cannot be written.
        """
        stream = io.BytesIO()
        np.savez(stream, crc32=self.crc32, counts=self.counts, chunk_bytes=self._chunk_bytes)
        write_whole(checksums_path(prefix), stream.getvalue())
        return hashlib.sha256(stream.getvalue()).hexdigest()


def read_checksums(prefix: str | Path, expected_sha256: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Checksums (uint32 [chunks]) and token counts (int64 [vocabulary]) of a pair, and the bytes of a chunk.

    Raises:
        DataError: The file is missing or not the one of the manifest.
    """
    path = checksums_path(prefix)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): it belongs to the pair, copy it too") from error
    if hashlib.sha256(content).hexdigest() != expected_sha256:
        raise DataError(f"{path} is not the one that the manifest names: copy all files of the pair again")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        chunk_bytes = int(arrays["chunk_bytes"]) if "chunk_bytes" in arrays else OLD_CHUNK_BYTES
        return arrays["crc32"], arrays["counts"], chunk_bytes


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while content := stream.read(HASHED_AT_ONCE):
            digest.update(content)
    return digest.hexdigest()


def entropy_nats(counts: np.ndarray) -> float:
    """Entropy of tokens that occur so often: the loss of a model that knows nothing else."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())

"""Reading .gz and .zst up to where they break: what can be had is given out, and what went wrong is kept.

The packages' own readers lose what they had decompressed when they meet a fault, or take a cut-off file for whole.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

ZST_READ_BYTES = 1 << 10
"""Small, since a step's output is not bounded: zeros take a 30,000th of their size."""
GZ_STEP_BYTES = 1 << 16
FAULTS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


def is_damage(fault: Exception) -> bool:
    """Whether content before a fault may be wrong: a checksum failed, or bytes that cannot be decompressed came."""
    if isinstance(fault, gzip.BadGzipFile):
        return not str(fault).startswith("Not a gzipped file")  # behind a part whose checksum holds
    return isinstance(fault, (zlib.error, zstandard.ZstdError))


class Decompressed(io.RawIOBase):
    """The content of a compressed file; ends where it ends or breaks.

    Args:
        raw: The file.
        compression: ".gz" or ".zst".
    """

    def __init__(self, raw: BinaryIO, compression: str):
        self._steps = {".gz": _gz_steps, ".zst": _zst_steps}[compression](raw)
        self._held = memoryview(b"")
        self.fault: Exception | None = None
        """Known once the end was reached: one of FAULTS where the content broke off there, None where it is whole."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held and self.fault is None:
            try:
                step = next(self._steps, None)
            except FAULTS as fault:
                self.fault = fault
                break
            if step is None:
                break
            self._held = memoryview(step)
        size = min(len(self._held), len(buffer))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size


def _gz_steps(raw: BinaryIO) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=raw)
    while content := stream.read1(GZ_STEP_BYTES):
        yield content


def _zst_steps(raw: BinaryIO) -> Iterator[bytes]:
    """All frames of a file, one after another."""
    compressed = raw.read(ZST_READ_BYTES)
    while compressed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not compressed:
                raise EOFError("it is cut off: its last frame has no end")
            yield frame.decompress(compressed)
            compressed = frame.unused_data if frame.eof else raw.read(ZST_READ_BYTES)
        compressed = compressed or raw.read(ZST_READ_BYTES)

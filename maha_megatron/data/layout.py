"""The files of a Megatron pair as bytes. Torch-free.

Layout of an .idx: magic, version (u64), token dtype code (u8), sequences (u64), document bounds (u64), then the
sequences' lengths (i32), their byte offsets (i64) and, per document bound, the sequence where it lies (i64). The .bin
holds the tokens alone.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maha_megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
ITEM_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Type of a token by dtype code; 6 and 7 are floating point and hold no tokens."""
CHECKED_AT_ONCE = 1 << 20
REBUILD = "make the pair again (data_prep/preprocess.py, which finds the damage too), or copy all its files again"


@dataclass(frozen=True)
class PairIndex:
    """The arrays of an .idx, memory-mapped."""

    path: Path
    code: int
    lengths: np.ndarray
    """int32 [sequences]: tokens of each."""
    pointers: np.ndarray
    """int64 [sequences]: where each begins in the .bin, in bytes."""
    documents: np.ndarray
    """int64 [documents + 1]: the sequence where each document begins; the last is the number of sequences."""

    @property
    def item_type(self) -> np.dtype:
        return np.dtype(ITEM_TYPES[self.code])

    @property
    def bin_bytes(self) -> int:
        """Size of the .bin that belongs to it."""
        if not len(self.lengths):
            return 0
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.item_type.itemsize

    @property
    def tokens(self) -> int:
        return self.bin_bytes // self.item_type.itemsize

    def document_tokens(self, document: int) -> tuple[int, int]:
        """The tokens [first, last) of the .bin that belong to a document."""
        first, last = int(self.documents[document]), int(self.documents[document + 1])
        if first == last:
            return 0, 0
        begin = int(self.pointers[first]) // self.item_type.itemsize
        end = int(self.pointers[last - 1]) // self.item_type.itemsize + int(self.lengths[last - 1])
        return begin, end


def read_index(prefix: str | Path) -> PairIndex:
    """Map the .idx of a pair and check it as a whole, and the size of the .bin against it. It may hold no tokens.

    Raises:
        DataError: A file is missing, cut off, foreign or inconsistent.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(_missing(str(prefix), path))
    sequences, bounds, code = _check_header(idx_path)
    index = _mapped(idx_path, sequences, bounds, code)
    _check_arrays(index)
    if bin_path.stat().st_size != index.bin_bytes:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes where its index {idx_path.name} expects"
            f" {index.bin_bytes}: it was cut off or belongs to another index; {REBUILD}"
        )
    return index


def map_tokens(prefix: str | Path, index: PairIndex) -> np.ndarray:
    """All tokens of a pair, end to end, memory-mapped."""
    if index.bin_bytes == 0:
        return np.zeros(0, dtype=index.item_type)
    return np.memmap(f"{prefix}.bin", dtype=index.item_type, mode="r")


def _missing(prefix: str, path: Path) -> str:
    message = f"{path} does not exist: data sources are named by the path of a .bin/.idx pair without its ending"
    if prefix.endswith((".bin", ".idx")):
        return f"{message}; write {prefix[:-4]}"
    nearby = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.idx"))
    if nearby:
        return f"{message}; did you mean {str(nearby[0])[:-4]}?"
    return f"{message}; make it with data_prep/preprocess.py"


def _check_header(path: Path) -> tuple[int, int, int]:
    """Sequences, document bounds and dtype code of an index whose size is what its header says."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path} is empty or cut off ({size} bytes); {REBUILD}")
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{path} is no Megatron index (it begins with {magic!r}, version {version}); {REBUILD}")
    if code not in ITEM_TYPES:
        raise DataError(f"{path} stores items of dtype code {code}, which are no token ids; {REBUILD}")
    expected = HEADER.size + sequences * (4 + 8) + bounds * 8
    if size not in (expected, expected + sequences):  # the longer form carries Megatron's multimodal modes
        raise DataError(f"{path} has {size} bytes where its header announces {expected}: it was cut off; {REBUILD}")
    return sequences, bounds, code


def _mapped(path: Path, sequences: int, bounds: int, code: int) -> PairIndex:
    content = np.memmap(path, mode="r")
    lengths_end = HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    return PairIndex(
        path,
        code,
        content[HEADER.size : lengths_end].view("<i4"),
        content[lengths_end:pointers_end].view("<i8"),
        content[pointers_end : pointers_end + 8 * bounds].view("<i8"),
    )


def _check_arrays(index: PairIndex) -> None:
    """Refuse lengths, offsets and documents that no writer leaves: negative, overlapping, out of order, overflown."""
    sequences, item_bytes = len(index.lengths), index.item_type.itemsize
    bounds, end = index.documents, 0
    if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != sequences:
        raise DataError(f"{index.path} is damaged (its documents do not cover its sequences); {REBUILD}")
    for first in range(0, sequences, CHECKED_AT_ONCE):
        lengths = index.lengths[first : first + CHECKED_AT_ONCE]
        ends = end + np.cumsum(lengths, dtype=np.int64) * item_bytes
        begins = ends - lengths.astype(np.int64) * item_bytes
        if lengths.min() < 0 or not np.array_equal(begins, index.pointers[first : first + CHECKED_AT_ONCE]):
            raise DataError(
                f"{index.path} is damaged (a sequence does not begin where the one before ends; old writers let offsets"
                f" overflow); {REBUILD}"
            )
        end = int(ends[-1])
    for first in range(0, len(bounds) - 1, CHECKED_AT_ONCE):
        part = bounds[first : first + CHECKED_AT_ONCE + 1]
        if (part[1:] < part[:-1]).any():
            raise DataError(f"{index.path} is damaged (its documents are out of order); {REBUILD}")

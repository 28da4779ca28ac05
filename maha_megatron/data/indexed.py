"""Opening a Megatron .bin/.idx pair, after checks whose messages say what to do.

Layout of an .idx: magic, version (u64), token dtype code (u8), sequences (u64), document bounds (u64), then the
sequences' lengths (i32), their byte offsets (i64) and, per document bound, the sequence where it lies (i64).
"""

import struct
import warnings
from pathlib import Path

import numpy as np

from maha_megatron.errors import DataError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder", "open_indexed"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes of a token by dtype code; 6 and 7 are floating point and hold no tokens."""
REBUILD = "make the pair again with data_prep/preprocess.py, or copy both files again"


def open_indexed(prefix: str) -> IndexedDataset:
    """Open `prefix`.bin and `prefix`.idx, memory-mapped.

    Keep the returned object as long as any array that came from it: it closes its map when it goes, and such an
    array then points nowhere.

    Raises:
        DataError: The pair is missing, empty, truncated or no Megatron index.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(_missing(prefix, path))
    sequences, bounds, code = _check_index(idx_path)
    lengths, pointers, documents = _index_arrays(idx_path, sequences, bounds)
    if sequences == 0 or int(lengths.sum(dtype=np.int64)) == 0:
        raise DataError(f"{idx_path} holds no tokens: the corpus it was made from was empty; {REBUILD}")
    expected_bytes = int(pointers[-1]) + int(lengths[-1]) * ITEM_BYTES[code]
    if bin_path.stat().st_size != expected_bytes:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes where its index {idx_path.name} expects"
            f" {expected_bytes}: it was cut off or belongs to another index; {REBUILD}"
        )
    if bounds < 2 or documents[0] != 0 or documents[-1] != sequences or int(lengths.min()) < 0:
        raise DataError(f"{idx_path} is damaged (its documents do not cover its sequences); {REBUILD}")
    return IndexedDataset(prefix)


def _missing(prefix: str, path: Path) -> str:
    message = f"{path} does not exist: data sources are named by the path of a .bin/.idx pair without its ending"
    if prefix.endswith((".bin", ".idx")):
        return f"{message}; write {prefix[:-4]}"
    nearby = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}*.idx"))
    if nearby:
        return f"{message}; did you mean {str(nearby[0])[:-4]}?"
    return f"{message}; make it with data_prep/preprocess.py"


def _check_index(path: Path) -> tuple[int, int, int]:
    """Sequences, document bounds and dtype code of an index whose size is what its header says."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path} is empty or cut off ({size} bytes); {REBUILD}")
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC or version != 1:
        raise DataError(f"{path} is no Megatron index (it begins with {magic!r}, version {version}); {REBUILD}")
    if code not in ITEM_BYTES:
        raise DataError(f"{path} stores items of dtype code {code}, which are no token ids; {REBUILD}")
    expected = HEADER.size + sequences * (4 + 8) + bounds * 8
    if size not in (expected, expected + sequences):  # the longer form carries Megatron's multimodal modes
        raise DataError(f"{path} has {size} bytes where its header announces {expected}: it was cut off; {REBUILD}")
    return sequences, bounds, code


def _index_arrays(path: Path, sequences: int, bounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The index's lengths, byte offsets and document bounds, memory-mapped."""
    content = np.memmap(path, mode="r")
    lengths_end = HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    return (
        content[HEADER.size : lengths_end].view(np.int32),
        content[lengths_end:pointers_end].view(np.int64),
        content[pointers_end : pointers_end + 8 * bounds].view(np.int64),
    )

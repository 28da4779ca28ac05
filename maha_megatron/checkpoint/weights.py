"""The safetensors file of whole weights, written one parameter at a time.

The format: 8 bytes little-endian length of the header, the header as JSON (name -> dtype, shape, offsets), then the
tensors' bytes back to back. Knowing the shapes before, the header is written first and no second tensor is ever held.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from maha_megatron.errors import CheckpointError

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}


class WeightsWriter:
    """Writes tensors, in the order of `shapes`, into a safetensors file.

    Args:
        path: the file.
        shapes: whole shape of each parameter by logical name.
        dtype: dtype of all of them.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._expected = iter(shapes.items())
        self._dtype = dtype
        header, offset = {}, 0
        for name, shape in shapes.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, weight: torch.Tensor) -> None:
        """Append one whole parameter."""
        assert (name, tuple(weight.shape)) == next(self._expected), name
        plain = weight.detach().to("cpu", self._dtype).contiguous().reshape(-1)
        self._file.write(plain.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Push everything to the device and close: what could not be written is raised here at the latest."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def read_weights(path: Path, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the parameters `names`, whole, one at a time, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, lacks one of `names`, or has others.
    """
    names = list(names)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = set(file.keys())
            missing, extra = sorted(set(names) - stored), sorted(stored - set(names))
            if missing or extra:
                unfit = f"missing {_shortened(missing)}; not in the model {_shortened(extra)}"
                raise CheckpointError(f"{path} does not fit the model: {unfit}")
            for name in names:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _shortened(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "nothing") + more

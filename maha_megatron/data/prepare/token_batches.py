"""What a tokenising process runs. Imports neither torch nor megatron, so that processes start fast."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maha_megatron.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of several documents, end to end."""

    ids: np.ndarray
    """int32 [sum of lengths]."""
    lengths: np.ndarray
    """int64 [documents]."""
    text_bytes: int


class Encoder:
    """Encodes batches of documents; one lives in each process."""

    def __init__(self, tokenizer: Tokenizer, append_end: bool):
        self.tokenizer, self.append_end = tokenizer, append_end

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """Encode documents; one without text stays without tokens and gets no end, as in Megatron."""
        parts = []
        for text in texts:
            ids = self.tokenizer.encode(text)
            if ids and self.append_end:
                ids.append(self.tokenizer.end_of_document)
            parts.append(np.array(ids, dtype=np.int32))
        lengths = np.array([part.size for part in parts], dtype=np.int64)
        return EncodedBatch(np.concatenate(parts), lengths, sum(len(text.encode()) for text in texts))


_encoder: Encoder | None = None
"""The process's encoder: multiprocessing offers no other place for what an initialiser makes."""


def start_worker(tokenizer_path: str, append_end: bool) -> None:
    """Initialise a tokenising process."""
    global _encoder
    _encoder = Encoder(load_tokenizer(tokenizer_path), append_end)


def encode_batch(texts: Sequence[str]) -> EncodedBatch:
    """Encode documents in a process that was initialised."""
    assert _encoder is not None
    return _encoder.encode(texts)

"""What one epoch of one source is: which tokens each of its samples holds. Built once, stored, mapped.

Two kinds, by data.packing:

- concatenate: megatron-core's GPTDataset of one epoch. Documents are shuffled, laid end to end and cut every s tokens,
  and the samples are shuffled.
- best_fit: documents are shuffled, those longer than a sample are cut into pieces of s rows, and the rest goes, longest
  first, each into the fullest sample that still has room (best_fit.py); the samples are shuffled.

A stored index is a folder of .npy files and index.json, which names what it was built from and the hash of each file.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maha_megatron.data.best_fit import best_fit
from maha_megatron.data.checksums import file_sha256
from maha_megatron.data.indexed import IndexedDataset
from maha_megatron.data.pair import Pair
from maha_megatron.data.writing import WrittenThrough, write_whole
from maha_megatron.errors import DataError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

DESCRIPTION = "index.json"


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of the .bin in a sample."""

    begin: int
    """Place of its first token among all tokens of the .bin."""
    tokens: int
    joins: bool
    """Whether its first token is predicted from the run before it, as where a text was laid end to end."""


class EpochIndex(Protocol):
    """The samples of an epoch."""

    arrays: Mapping[str, np.ndarray]
    """What is stored, by name."""

    def __len__(self) -> int: ...

    def runs(self, sample: int) -> list[Run]: ...


class ConcatenateIndex:
    """Documents laid end to end and cut: the s + 1 tokens of a sample, the last of them only a label.

    Args:
        pair: The source.
        arrays: document_index int32 [sequences in order], sample_index int [samples + 1, 2] (where a sample begins:
            place in document_index, token of that sequence), shuffle_index [samples].
    """

    NAMES = ("document_index", "sample_index", "shuffle_index")

    def __init__(self, pair: Pair, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        self._sequences, self._samples, self._shuffle = (arrays[name] for name in self.NAMES)
        self._lengths, self._pointers = pair.index.lengths, pair.index.pointers
        self._item_bytes = pair.index.item_type.itemsize

    def __len__(self) -> int:
        return len(self._shuffle)

    def runs(self, sample: int) -> list[Run]:
        sample = int(self._shuffle[sample])
        (first, offset), (last, end) = self._samples[sample].tolist(), self._samples[sample + 1].tolist()
        runs: list[Run] = []
        for sequence in self._sequences[first : last + 1].tolist():
            stop = end + 1 if first == last else int(self._lengths[sequence])
            if stop > offset:
                begin = int(self._pointers[sequence]) // self._item_bytes
                runs.append(Run(begin + offset, stop - offset, joins=bool(runs)))
            first, offset = first + 1, 0
        return runs


class BestFitIndex:
    """Pieces of documents in samples: a piece of m rows reads m + 1 tokens, the last of them only as a label.

    Args:
        arrays: piece_begin int64 and piece_rows int32 [pieces], in the order of the samples, and sample_pieces int64
            [samples + 1], where each sample's pieces begin.
    """

    NAMES = ("piece_begin", "piece_rows", "sample_pieces")

    def __init__(self, pair: Pair, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        self._begin, self._rows, self._pieces = (arrays[name] for name in self.NAMES)

    def __len__(self) -> int:
        return len(self._pieces) - 1

    def runs(self, sample: int) -> list[Run]:
        first, last = self._pieces[sample : sample + 2].tolist()
        pieces = zip(self._begin[first:last].tolist(), self._rows[first:last].tolist(), strict=True)
        return [Run(begin, rows + 1, joins=False) for begin, rows in pieces]


KINDS = {"concatenate": ConcatenateIndex, "best_fit": BestFitIndex}


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """What an epoch's index is built from; equal plans give equal indexes."""

    packing: str
    first_document: int
    documents: int
    passes: int
    """How often the documents stand in it: once, unless they hold too few tokens for one sample."""
    sequence_tokens: int
    seed: int
    """Seed of this epoch."""


def build_index(pair: Pair, plan: EpochPlan) -> EpochIndex:
    """The index of an epoch, in memory. A pure function of the pair's lengths and the plan."""
    build = _concatenate if plan.packing == "concatenate" else _best_fit
    return KINDS[plan.packing](pair, build(pair, plan))


def save_index(index: EpochIndex, folder: Path, description: Mapping[str, Any]) -> None:
    """Write an index into an empty folder."""
    hashes = {}
    for name, array in index.arrays.items():
        with (folder / f"{name}.npy").open("wb") as stream:
            np.save(WrittenThrough(stream), array, allow_pickle=False)
        hashes[name] = file_sha256(folder / f"{name}.npy")
    write_whole(folder / DESCRIPTION, json.dumps({"built from": description, "sha256": hashes}, indent=2).encode())


def open_index(pair: Pair, packing: str, folder: Path) -> EpochIndex:
    """Map a stored index, after checking that it is what was written.

    Raises:
        DataError: It is damaged.
    """
    kind = KINDS[packing]
    try:
        hashes = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["sha256"]
        for name in kind.NAMES:
            if file_sha256(folder / f"{name}.npy") != hashes[name]:
                raise ValueError(f"{name}.npy is not what was written")
        # never a pickle: a cache may come from elsewhere
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in kind.NAMES}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the sample index {folder} is damaged ({error}): remove it, and it is built again") from error
    return kind(pair, {name: np.asarray(array) for name, array in arrays.items()})


# ------------------------------------------------------------------------------------------------------ concatenate


@dataclass(frozen=True)
class NoTokenizer:
    """Stands where GPTDataset asks for a tokenizer; nothing is tokenised and no token is padding."""

    vocab_size: None = None
    eod: int = -1
    pad: int = int(np.iinfo(np.int64).min)
    unique_identifiers: str = "none"


def _concatenate(pair: Pair, plan: EpochPlan) -> dict[str, np.ndarray]:
    bounds = pair.index.documents
    first, last = int(bounds[plan.first_document]), int(bounds[plan.first_document + plan.documents])
    config = GPTDatasetConfig(
        random_seed=plan.seed,
        sequence_length=plan.sequence_tokens,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=True,
        tokenizer=NoTokenizer(),
        path_to_cache=None,
    )
    with _quiet_megatron():
        dataset = GPTDataset(
            indexed_dataset=IndexedDataset(pair.prefix),
            dataset_path=Path(pair.prefix).name,
            indexed_indices=np.tile(np.arange(first, last, dtype=np.int32), plan.passes),
            num_samples=None,
            index_split=Split.train,
            config=config,
        )
    return {name: np.asarray(getattr(dataset, name)) for name in ConcatenateIndex.NAMES}


# --------------------------------------------------------------------------------------------------------- best fit


def _best_fit(pair: Pair, plan: EpochPlan) -> dict[str, np.ndarray]:
    random, room = np.random.RandomState(plan.seed), plan.sequence_tokens
    edges = document_edges(pair, plan.first_document, plan.documents)
    order = random.permutation(plan.documents)
    begins, rows = edges[:-1][order], np.maximum(np.diff(edges) - 1, 0)[order]  # no row predicts a first token
    pieces = -(-rows // room)
    document = np.repeat(np.arange(plan.documents), pieces)
    done = (np.arange(document.size) - (np.cumsum(pieces) - pieces)[document]) * room  # rows of its earlier pieces
    piece_begin, piece_rows = begins[document] + done, np.minimum(rows[document] - done, room)
    sample, samples = best_fit(piece_rows, room)
    sample = random.permutation(samples)[sample]
    by_sample = np.argsort(sample, kind="stable")
    return {
        "piece_begin": piece_begin[by_sample],
        "piece_rows": piece_rows[by_sample].astype(np.int32),
        "sample_pieces": np.concatenate([[0], np.cumsum(np.bincount(sample, minlength=samples))]),
    }


def document_edges(pair: Pair, first: int, documents: int) -> np.ndarray:
    """int64 [documents + 1]: where consecutive documents begin among all tokens, and where the last one ends."""
    index = pair.index
    sequences = index.documents[first : first + documents + 1]
    edges = np.full(len(sequences), index.tokens, dtype=np.int64)
    inside = sequences < len(index.lengths)
    edges[inside] = index.pointers[sequences[inside]] // index.item_type.itemsize
    return edges


@contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Keep GPTDataset's remark that it was given no cache out of the log: that is how an index is built here."""
    logger = logging.getLogger("megatron.core.datasets.gpt_dataset")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

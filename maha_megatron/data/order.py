"""The order of one source's samples: a pure function of (seed, sample number).

Every epoch has an index of its own (epoch_index.py), seeded by (seed, epoch). A longer run therefore begins like a
shorter one, which a GPTDataset over several epochs does not promise.
"""

import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from maha_megatron.data.epoch_index import (
    EpochIndex,
    EpochPlan,
    Run,
    build_index,
    document_edges,
    open_index,
    save_index,
)
from maha_megatron.data.index_cache import complete_folder
from maha_megatron.data.pair import open_pair
from maha_megatron.errors import DataError

LOGGER = logging.getLogger(__name__)
STORED_ITEMS = 1 << 16
"""Documents and samples from which on an epoch's index is stored; a smaller one is built in milliseconds, and a tiny
source with many epochs would leave as many folders."""
MOST_SEQUENCES = 2**31 - 1
OPEN_EPOCHS = 2


@dataclass(frozen=True)
class Origin:
    """Consecutive tokens of one document in a sample."""

    document: int
    """Number in the pair."""
    offset: int
    """Place of the first token in the document."""
    tokens: int


class SourceOrder:
    """The samples of one .bin/.idx pair's documents [first, last), epoch after epoch."""

    def __init__(
        self,
        prefix: str,
        *,
        split: str,
        document_range: tuple[float, float],
        seed: int,
        sequence_tokens: int,
        packing: str,
        cache: Path,
    ):
        """
        Args:
            prefix: Path of the pair without its ending.
            split: "train" or "validation"; for messages and file names.
            document_range: The share of the documents to use: (0, 1) is all, (0.98, 1) the last 2 %.
            seed: Seed of the run.
            sequence_tokens: Rows s of a sample.
            packing: "concatenate" or "best_fit".
            cache: Folder of the index files, created when missing.

        Raises:
            DataError: The pair is unusable, or its documents hold too few tokens.
        """
        self.prefix = prefix
        self.pair = open_pair(prefix)
        if len(self.pair) > MOST_SEQUENCES:
            raise DataError(
                f"{prefix} holds {len(self.pair)} sequences; an order counts them in 32 bits, at most {MOST_SEQUENCES}:"
                " split it with data_prep/split.py and name the parts as sources"
            )
        self._split, self._seed, self._sequence_tokens, self._cache = split, seed, sequence_tokens, cache
        self._packing = packing
        first, last = (round_documents(share, self.pair.documents) for share in document_range)
        self._first_document, self.documents = first, last - first
        bounds = self.pair.index.documents
        lengths = self.pair.index.lengths[bounds[first] : bounds[last]]
        self.tokens = int(lengths.sum(dtype=np.int64))
        self._passes = self._needed_passes()
        self._lengths_digest = hashlib.blake2b(np.ascontiguousarray(lengths).data).hexdigest()
        self._epochs: dict[int, EpochIndex] = {}
        if not self._holds_a_row():
            raise DataError(self._too_few())

    def _needed_passes(self) -> int:
        """How often the documents stand in an epoch: more than once only where one sample needs more tokens."""
        if self._packing != "concatenate":
            return 1
        needed = self._sequence_tokens + 1
        if self.tokens == 0 or (self.tokens < needed and self._split == "validation"):
            raise DataError(self._too_few())
        return -(-needed // self.tokens)

    def _holds_a_row(self) -> bool:
        """Whether a document has two tokens, the second to be predicted from the first."""
        if self._packing == "concatenate" or self.tokens > self.documents:
            return True
        return bool((np.diff(document_edges(self.pair, self._first_document, self.documents)) > 1).any())

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch. With best_fit its index tells, which is built if this node has none."""
        return self.expected_samples if self._packing == "concatenate" else len(self.epoch(0))

    @property
    def expected_samples(self) -> int:
        """samples_per_epoch, as far as it is known without an index: with best_fit, about."""
        return max(1, (self.tokens * self._passes - 1) // self._sequence_tokens)

    def _too_few(self) -> str:
        advice = "use more data or a smaller data.sequence_tokens"
        if self._split == "validation":
            advice = (
                "raise data.validation_frac, name sources in data.validation, set data.packing: best_fit, or " + advice
            )
        return (
            f"{self.prefix}: the {self._split} part holds {self.tokens} tokens in {self.documents} of"
            f" {self.pair.documents} documents; one sample of data.sequence_tokens"
            f" = {self._sequence_tokens} needs {self._sequence_tokens + 1}: {advice}"
        )

    @property
    def identity(self) -> dict[str, str | int]:
        """What the order of this source's samples depends on, beside the seed and the sample's length."""
        return {
            "first document": self._first_document,
            "documents": self.documents,
            "tokens": self.tokens,
            "lengths": self._lengths_digest[:16],
        }

    @property
    def padding_frac(self) -> float:
        """Share of an epoch's rows that hold no token."""
        if self._packing == "concatenate":
            return 0.0
        rows = int(self.epoch(0).arrays["piece_rows"].sum(dtype=np.int64))
        return 1.0 - rows / (self.samples_per_epoch * self._sequence_tokens)

    @property
    def cuts(self) -> int:
        """Borders between two samples, of an epoch, that fall inside a document."""
        if self._packing == "best_fit":
            pieces = len(self.epoch(0).arrays["piece_rows"])
            lengths = np.diff(document_edges(self.pair, self._first_document, self.documents))
            return pieces - int(np.count_nonzero(lengths > 1))
        starts = self.epoch(0).arrays["sample_index"][1:-1]
        return int(np.count_nonzero(starts[:, 1]))

    def last_tokens(self, documents: int) -> Iterator[tuple[int, int]]:
        """Number and last token of so many documents, evenly spaced, or of all; empty ones are passed over."""
        for place in range(min(documents, self.documents)):
            number = self._first_document + place * self.documents // min(documents, self.documents)
            begin, end = self.pair.index.document_tokens(number)
            if end > begin:
                yield number, int(self.pair.read(end - 1, end)[0])

    def read(self, sample: int) -> list[np.ndarray]:
        """The runs of tokens of one sample.

        Args:
            sample: Number of the sample since the run's start; any size, epochs follow one another.

        Returns:
            Each run of n + 1 tokens, in the type of the file, makes n rows: its last token is only predicted. Together
            they make at most sequence_tokens rows.
        """
        parts: list[list[np.ndarray]] = []
        for run in self._runs(sample):
            if not run.joins:
                parts.append([])
            parts[-1].append(self.pair.read(run.begin, run.begin + run.tokens))
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def origins(self, sample: int) -> list[Origin]:
        """Where the tokens of a sample come from, in its order."""
        index = self.pair.index
        found = []
        for run in self._runs(sample):
            sequence = bisect_right(index.pointers, run.begin * index.item_type.itemsize) - 1
            document = int(np.searchsorted(index.documents, sequence, side="right")) - 1
            found.append(Origin(document, run.begin - index.document_tokens(document)[0], run.tokens))
        return found

    def _runs(self, sample: int) -> list[Run]:
        epoch, index = divmod(sample, self.samples_per_epoch)
        return self.epoch(epoch).runs(index)

    # ---------------------------------------------------------------------------------------------------- epochs

    def epoch(self, epoch: int) -> EpochIndex:
        """The index of an epoch, built if this node has none."""
        if epoch in self._epochs:
            self._epochs[epoch] = self._epochs.pop(epoch)  # the last one is the one used last
        else:
            while len(self._epochs) >= OPEN_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._open_epoch(epoch)
        return self._epochs[epoch]

    @property
    def is_stored(self) -> bool:
        """Whether its indexes are files."""
        return self.documents + self.tokens // self._sequence_tokens >= STORED_ITEMS

    def store_epoch(self, epoch: int) -> Path:
        """The folder with the index of an epoch, built if this node has none. Only where indexes are stored."""
        plan = self._plan(epoch)
        description = {
            "plan": asdict(plan),
            "lengths": self._lengths_digest,
            "megatron-core": version("megatron-core"),
            "epoch": epoch,
        }
        folder = self._cache / f"{Path(self.prefix).name}-{self._split}-epoch{epoch}-{_key(description)}"

        def fill(partial: Path) -> None:
            LOGGER.info("building the index of epoch %d of %s (%s)", epoch, self.prefix, self._split)
            save_index(build_index(self.pair, plan), partial, description)

        complete_folder(folder, fill)
        return folder

    def _open_epoch(self, epoch: int) -> EpochIndex:
        if not self.is_stored:
            return build_index(self.pair, self._plan(epoch))
        return open_index(self.pair, self._packing, self.store_epoch(epoch))

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(
            packing=self._packing,
            first_document=self._first_document,
            documents=self.documents,
            passes=self._passes,
            sequence_tokens=self._sequence_tokens,
            seed=int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]),
        )


def _key(description: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(description).encode(), digest_size=8).hexdigest()


def round_documents(share: float, documents: int) -> int:
    """The document where a share of the documents ends; one rounding for both sides of a border."""
    return round(share * documents)

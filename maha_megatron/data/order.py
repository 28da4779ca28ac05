"""The order of one source's samples: a pure function of (seed, sample number).

Every epoch is a GPTDataset of megatron-core that knows of this epoch only, seeded by (seed, epoch): documents are
shuffled, laid end to end, cut into samples, and the samples shuffled. A longer run therefore begins like a shorter
one, which a GPTDataset over several epochs does not promise.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maha_megatron.data.index_cache import complete_folder
from maha_megatron.data.indexed import open_indexed
from maha_megatron.errors import DataError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    import megatron.core
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

LOGGER = logging.getLogger(__name__)
INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class NoTokenizer:
    """Stands where GPTDataset asks for a tokenizer; nothing is tokenised and no token is padding."""

    vocab_size: None = None
    eod: int = -1
    pad: int = int(np.iinfo(np.int64).min)
    unique_identifiers: str = "none"


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
        cache: Path,
    ):
        """
        Args:
            prefix: Path of the pair without its ending.
            split: "train" or "validation"; for messages and file names.
            document_range: The share of the documents to use: (0, 1) is all, (0.98, 1) the last 2 %.
            seed: Seed of the run.
            sequence_tokens: Tokens s of a sample; s + 1 are read, since the last is only a label.
            cache: Folder of the index files, created when missing.

        Raises:
            DataError: The pair is unusable, or its documents hold too few tokens for one sample.
        """
        self.prefix = prefix
        self.indexed = open_indexed(prefix)
        self._split, self._seed, self._sequence_tokens, self._cache = split, seed, sequence_tokens, cache
        bounds = self.indexed.document_indices
        first, last = (round_documents(share, len(bounds) - 1) for share in document_range)
        self._first_document, self.documents = first, last - first
        self._sequences = np.arange(bounds[first], bounds[last], dtype=np.int32)
        lengths = self.indexed.sequence_lengths[bounds[first] : bounds[last]]
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.samples_per_epoch = max(self.tokens - 1, 0) // sequence_tokens
        if self.samples_per_epoch == 0:
            raise DataError(self._too_few())
        self._lengths_digest = hashlib.blake2b(np.ascontiguousarray(lengths).data).hexdigest()
        self._epochs: dict[int, GPTDataset] = {}

    def _too_few(self) -> str:
        advice = "use more data or a smaller data.sequence_tokens"
        if self._split == "validation":
            advice = "raise data.validation_frac, name sources in data.validation, or " + advice
        return (
            f"{self.prefix}: the {self._split} part holds {self.tokens} tokens in {self.documents} of"
            f" {len(self.indexed.document_indices) - 1} documents; one sample of data.sequence_tokens"
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

    def last_tokens(self, documents: int) -> list[int]:
        """The last token of each of the first so many documents that are not empty."""
        lengths = self.indexed.sequence_lengths
        ends = self.indexed.document_indices[self._first_document + 1 :][: self.documents] - 1
        ends = [int(end) for end in ends[:documents] if end >= 0 and lengths[end] > 0]
        return [int(self.indexed.get(end, offset=int(lengths[end]) - 1, length=1)[0]) for end in ends]

    def read(self, sample: int, out: np.ndarray) -> None:
        """Read one sample.

        Args:
            sample: Number of the sample since the run's start; any size, epochs follow one another.
            out: int64 [sequence_tokens + 1], filled.
        """
        epoch, index = divmod(sample, self.samples_per_epoch)
        item = self._epoch(epoch)[index]
        out[:-1] = item["tokens"].numpy()
        out[-1] = item["labels"][-1]

    def _epoch(self, epoch: int) -> GPTDataset:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:  # a step may straddle two epochs, never three
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._open_epoch(epoch)
        return self._epochs[epoch]

    def _open_epoch(self, epoch: int) -> GPTDataset:
        identity = [
            megatron.core.__version__,
            self._lengths_digest,
            int(self._sequences[0]),
            self._sequence_tokens,
            self._seed,
            epoch,
        ]
        key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
        folder = self._cache / f"{Path(self.prefix).name}-{self._split}-epoch{epoch}-{key}"
        complete_folder(folder, lambda partial: self._save_index(partial, epoch))
        dataset = self._dataset(epoch, str(folder))
        assert len(dataset) == self.samples_per_epoch
        return dataset

    def _save_index(self, folder: Path, epoch: int) -> None:
        """Build an epoch's index in this process, whatever its rank, and store it where GPTDataset looks for it."""
        LOGGER.info("building the index of epoch %d of %s (%s)", epoch, self.prefix, self._split)
        dataset = self._dataset(epoch, None)
        base = f"{dataset.unique_description_hash}-GPTDataset-{dataset.index_split.name}"
        for name in INDEX_NAMES:
            np.save(folder / f"{base}-{name}.npy", getattr(dataset, name), allow_pickle=False)
        (folder / f"{base}-description.txt").write_text(dataset.unique_description, encoding="utf-8")

    def _dataset(self, epoch: int, path_to_cache: str | None) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]),
            sequence_length=self._sequence_tokens,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            add_extra_token_to_sequence=True,
            tokenizer=NoTokenizer(),
            path_to_cache=path_to_cache,
        )
        with _quiet_megatron():
            return GPTDataset(
                indexed_dataset=self.indexed,
                dataset_path=Path(self.prefix).name,
                indexed_indices=self._sequences,
                num_samples=None,
                index_split=Split.train,
                config=config,
            )


def round_documents(share: float, documents: int) -> int:
    """The document where a share of the documents ends; one rounding for both sides of a border."""
    return round(share * documents)


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

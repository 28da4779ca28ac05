"""The samples of a step for one data-parallel rank.

Sample numbers are global: a step that starts at `consumed` uses consumed .. consumed + global_batch_samples - 1,
whatever the topology. Accumulation step a of data-parallel rank r takes, for j = 0 .. micro_batch_samples - 1,

    consumed + (a * data_parallel_size + r) * micro_batch_samples + j.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maha_megatron.config.derive import accumulation_steps
from maha_megatron.config.schema import Config, Source
from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.data.mixture import Mixture
from maha_megatron.data.order import SourceOrder
from maha_megatron.data.packing import pack
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError

SPLITS = ("train", "validation")
ENDS_CHECKED = 64
"""Documents whose last token is looked at when a source is opened."""


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """What the loader knows of the tokenizer, which itself need not be there."""

    fingerprint: str
    end_of_document: int


def build_loader(config: Config, *, data_parallel_rank: int, data_parallel_size: int, split: str = "train") -> "Loader":
    """Open the sources of a split, check them against the run, and return their loader. Needs no process group.

    Args:
        config: The run; `data`, `run.seed`, `run.folder`, `model.vocabulary` and the batch sizes are read.
        data_parallel_rank: This rank's place among the data-parallel ranks.
        data_parallel_size: How many there are.
        split: "train" or "validation".

    Raises:
        DataError: A source, the tokenizer or the pair of them is unusable; the message says what to change.

    Sharding: ranks of one tensor-parallel group pass the same data-parallel rank and get the same batches.
    """
    assert split in SPLITS, split
    assert 0 <= data_parallel_rank < data_parallel_size
    sources, document_range = _sources(config, split)
    manifests = {source.prefix: read_manifest(source.prefix) for source in sources}
    tokenizer = _checked_tokenizer(config, manifests)
    orders = [
        SourceOrder(
            source.prefix,
            split=split,
            document_range=document_range,
            seed=config.run.seed,
            sequence_tokens=config.data.sequence_tokens,
            cache=Path(config.data.cache or Path(config.run.folder) / "index"),
        )
        for source in sources
    ]
    if config.data.document_bounds:
        for order in orders:
            _check_document_ends(order, tokenizer.end_of_document)
    return Loader(
        config,
        orders,
        Mixture([source.weight for source in sources], config.run.seed),
        tokenizer=tokenizer,
        texts={prefix: manifest and manifest.sources_sha256[:16] for prefix, manifest in manifests.items()},
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )


class Loader:
    """Micro-batches of one data-parallel rank; see the module's text for which samples. Built by build_loader."""

    def __init__(
        self,
        config: Config,
        orders: list[SourceOrder],
        mixture: Mixture,
        *,
        tokenizer: TokenizerIdentity,
        texts: dict[str, str | None],
        data_parallel_rank: int,
        data_parallel_size: int,
    ):
        self.end_of_document, self.tokenizer_fingerprint = tokenizer.end_of_document, tokenizer.fingerprint
        self._texts, self._seed = texts, config.run.seed
        self._orders, self._mixture = orders, mixture
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._vocabulary = config.model.vocabulary
        self._sequence_tokens = config.data.sequence_tokens
        self._document_bounds = config.data.document_bounds
        self._micro = config.train.micro_batch_samples
        self._validation_samples = config.train.validation_samples
        self._accumulation = accumulation_steps(config, data_parallel_size * config.parallel.tensor)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch of every source together."""
        return sum(order.samples_per_epoch for order in self._orders)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of the split in all sources, the cut-off tails included."""
        return sum(order.tokens for order in self._orders)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which tokens a sample number stands for, as plain data by name.

        Equal for runs whose samples are the same, wherever their files lie and however they are batched.
        """
        found = {"tokenizer": self.tokenizer_fingerprint, "run.seed": self._seed}
        found |= {"data.sequence_tokens": self._sequence_tokens}
        for number, (order, share) in enumerate(zip(self._orders, self._mixture.shares, strict=True)):
            known = {"share": share, **order.identity, "text": self._texts[order.prefix]}
            found |= {f"data.train[{number}] {name}": value for name, value in known.items()}
        return found

    def step_batches(self, consumed_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that starts after `consumed_samples`, one per accumulation step.

        Raises:
            DataError: A token id is outside the model's vocabulary.
        """
        return [self._micro_batch(self._numbers(consumed_samples, a)) for a in range(self._accumulation)]

    def validation_batches(self) -> Iterator[MicroBatch]:
        """This rank's part of the fixed validation samples 0, 1, 2, ...

        Every rank yields equally many micro-batches: what is missing at the end is filled with samples whose loss is
        masked. They are fewer than train.validation_samples where a source would have to give one twice.
        """
        samples = self._samples_without_repeat(self._validation_samples)
        rounds = -(-samples // (self._micro * self._size))
        for number in range(rounds):
            numbers = self._numbers(0, number)
            counted = max(0, min(self._micro, samples - numbers.start))
            yield self._micro_batch(numbers, counted)

    def _samples_without_repeat(self, limit: int) -> int:
        """Most samples, at most `limit`, that take no source beyond its first epoch."""

        def repeats(samples: int) -> bool:
            taken = self._mixture.taken(samples)
            return any(count > order.samples_per_epoch for count, order in zip(taken, self._orders, strict=True))

        return bisect_left(range(1, limit + 1), True, key=repeats)  # counts only grow with the samples

    def _numbers(self, consumed_samples: int, accumulation_step: int) -> range:
        first = consumed_samples + (accumulation_step * self._size + self._rank) * self._micro
        return range(first, first + self._micro)

    def _micro_batch(self, numbers: range, counted_samples: int | None = None) -> MicroBatch:
        samples = np.empty((len(numbers), self._sequence_tokens + 1), dtype=np.int64)
        for row, number in zip(samples, numbers, strict=True):
            source, index = self._mixture.locate(number)
            self._orders[source].read(index, row)
            if row.max() >= self._vocabulary or row.min() < 0:
                raise DataError(self._foreign_token(self._orders[source].prefix, row))
        return pack(
            samples,
            end_of_document=self.end_of_document,
            document_bounds=self._document_bounds,
            counted_samples=counted_samples,
        )

    def _foreign_token(self, prefix: str, row: np.ndarray) -> str:
        foreign = row[(row >= self._vocabulary) | (row < 0)][0]
        return (
            f"{prefix}.bin holds the token id {foreign}, but model.vocabulary = {self._vocabulary}: the data was made"
            " with another tokenizer; preprocess it with data.tokenizer or set model.vocabulary to that tokenizer's"
        )


def _sources(config: Config, split: str) -> tuple[tuple[Source, ...], tuple[float, float]]:
    """The sources of a split and the share of their documents that belongs to it."""
    data = config.data
    if not data.train:
        raise DataError("data.train names no source: give a list of {prefix, weight}")
    if data.validation:
        return (data.train if split == "train" else data.validation), (0.0, 1.0)
    border = 1.0 - data.validation_frac
    if split == "train":
        return data.train, (0.0, border)
    if data.validation_frac == 0:
        raise DataError("there is nothing to validate on: set data.validation or data.validation_frac")
    return data.train, (border, 1.0)


def _checked_tokenizer(config: Config, manifests: dict[str, Manifest | None]) -> TokenizerIdentity:
    """What is known of the tokenizer, from itself or else the manifests, after checking them against each other."""
    if config.data.tokenizer:
        tokenizer = load_tokenizer(config.data.tokenizer)
        vocabulary, end_of_document = tokenizer.vocabulary, tokenizer.end_of_document
        fingerprint, origin = tokenizer.fingerprint, f"the tokenizer {config.data.tokenizer}"
    else:
        prefix, first = next(((p, m) for p, m in manifests.items() if m), (None, None))
        if first is None:
            raise DataError(
                "data.tokenizer is empty and no data source has a manifest that names its end-of-document token:"
                " set data.tokenizer to the tokenizer that the data was made with"
            )
        vocabulary, end_of_document = first.vocabulary, first.end_of_document
        fingerprint, origin = first.tokenizer_fingerprint, f"the tokenizer that {prefix} was made with"
    if vocabulary != config.model.vocabulary:
        raise DataError(
            f"{origin} has {vocabulary} token ids, but model.vocabulary = {config.model.vocabulary}:"
            f" set model.vocabulary={vocabulary}"
        )
    for prefix, manifest in manifests.items():
        if manifest and manifest.tokenizer_fingerprint != fingerprint:
            raise DataError(
                f"{prefix} was made with another tokenizer ({manifest.tokenizer_fingerprint[:28]}...,"
                f" {manifest.vocabulary} ids) than {origin} ({fingerprint[:28]}..., {vocabulary} ids):"
                " preprocess it again or set data.tokenizer to its own"
            )
    return TokenizerIdentity(fingerprint=fingerprint, end_of_document=end_of_document)


def _check_document_ends(order: SourceOrder, end_of_document: int) -> None:
    """Refuse a source none of whose documents ends where the run believes documents to end."""
    if not any(last == end_of_document for last in order.last_tokens(ENDS_CHECKED)):
        raise DataError(
            f"no document of {order.prefix} ends with the end-of-document token {end_of_document}: it was preprocessed"
            " without --append-eod or with another tokenizer; preprocess it again, or set data.document_bounds=false"
            " to let attention run over documents"
        )

"""The samples of a step for one data-parallel rank.

Samples are numbered in the order of the mixture; a run's position p stands for the p-th number that data.skip does not
leave out. A step that starts at `consumed` uses positions consumed .. consumed + global_batch_samples - 1, whatever the
topology. Accumulation step a of data-parallel rank r takes, for j = 0 .. micro_batch_samples - 1,

    consumed + (a * data_parallel_size + r) * micro_batch_samples + j.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maha_megatron.config.derive import accumulation_steps
from maha_megatron.config.schema import Config
from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.mixture import Mixture
from maha_megatron.data.order import Origin
from maha_megatron.data.packing import pack
from maha_megatron.data.skipping import SampleNumbers, jumped
from maha_megatron.data.sources import OpenSources, open_sources
from maha_megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SampleOrigin:
    """Where a sample of the order comes from."""

    number: int
    """In the order of the mixture; what data.skip counts."""
    source: str
    """Prefix of the pair."""
    epoch: int
    """Passes over the source that were complete before."""
    documents: Sequence[Origin]
    """What it holds, in order."""
    runs: Sequence[np.ndarray]
    """Its tokens, as SourceOrder.read gives them."""


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What the first samples of a run take from one source."""

    name: str
    asked_frac: float
    drawn_frac: float
    drawn_samples: int
    epochs: float
    """Passes over the source."""


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
    assert 0 <= data_parallel_rank < data_parallel_size
    sources = open_sources(config, split)
    return Loader(config, sources, data_parallel_rank=data_parallel_rank, data_parallel_size=data_parallel_size)


class Loader:
    """Micro-batches of one data-parallel rank; see the module's text for which samples. Built by build_loader."""

    def __init__(self, config: Config, sources: OpenSources, *, data_parallel_rank: int, data_parallel_size: int):
        self._sources, self._orders = sources, sources.orders
        self.end_of_document = sources.tokenizer.end_of_document
        self._data, self._seed = config.data, config.run.seed
        self._skip = config.data.skip if sources.split == "train" else ()
        self._numbers = SampleNumbers(self._skip)
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._vocabulary = config.model.vocabulary
        self._micro, self._step_samples = config.train.micro_batch_samples, config.train.global_batch_samples
        self._validation_samples = config.train.validation_samples
        self._accumulation = accumulation_steps(config, data_parallel_size * config.parallel.tensor)

    @cached_property
    def _mixture(self) -> Mixture:
        return Mixture(self._sources.weights, self._seed)

    # ------------------------------------------------------------------------------------------------- what it is

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
        found = {"tokenizer": self._sources.tokenizer.fingerprint, "run.seed": self._seed}
        found |= {"data.sequence_tokens": self._data.sequence_tokens, **self._sources.identity}
        # keys younger than the first checkpoints are there only where they change the order
        if self._data.packing != "concatenate":
            found["data.packing"] = self._data.packing
        if self._data.skip:
            found["data.skip"] = [[skip.first, skip.last] for skip in self._data.skip]
        return found

    def shares(self, consumed_samples: int) -> list[SourceShare]:
        """What was asked of each source, and what a run that consumed so many samples was given."""
        last = self._numbers[consumed_samples - 1] + 1 if consumed_samples else 0
        taken = np.array(self._mixture.taken(last))
        for first, end in jumped([(skip.first, skip.last) for skip in self._skip], consumed_samples):
            taken -= np.array(self._mixture.taken(end + 1)) - np.array(self._mixture.taken(first))
        return [
            SourceShare(
                name=name,
                asked_frac=share,
                drawn_frac=count / max(consumed_samples, 1),
                drawn_samples=count,
                epochs=count / order.samples_per_epoch,
            )
            for name, order, share, count in zip(
                self._sources.names, self._orders, self._mixture.shares, taken.tolist(), strict=True
            )
        ]

    def build_indexes(self, first: int, last: int) -> int:
        """Build what this node lacks of the indexes that a run reads from `first` to `last` consumed samples.

        At least the index of each source at `first`. Small sources have none stored.

        Returns:
            How many stored indexes the run reads.
        """
        begin = end = self._mixture.taken(self._numbers[first])
        if last > first:
            end = self._mixture.taken(self._numbers[last - 1] + 1)
        stored = 0
        for order, taken, taken_last in zip(self._orders, begin, end, strict=True):
            if order.is_stored:
                epoch = taken // order.samples_per_epoch
                epochs = range(epoch, max(epoch, (taken_last - 1) // order.samples_per_epoch) + 1)
                for number in epochs:
                    order.store_epoch(number)
                stored += len(epochs)
        return stored

    def describe_sources(self, consumed_samples: int) -> list[dict[str, Any]]:
        """What each source holds, and what a run that consumes so many samples takes of it, as plain data."""
        return [
            {
                **asdict(share),
                "documents": order.documents,
                "tokens": order.tokens,
                "samples_per_epoch": order.samples_per_epoch,
                "cuts": order.cuts,
                "padding_frac": order.padding_frac,
            }
            for order, share in zip(self._orders, self.shares(consumed_samples), strict=True)
        ]

    def sample_range(self, consumed_samples: int) -> range:
        """From the first to the last number in the order of the step that starts after `consumed_samples`.

        Numbers that data.skip leaves out may lie between.
        """
        return range(self._numbers[consumed_samples], self._numbers[consumed_samples + self._step_samples - 1] + 1)

    def origins(self, consumed_samples: int) -> Iterator[SampleOrigin]:
        """Where the samples of all ranks in the step that starts after `consumed_samples` come from."""
        return (self._origin(self._numbers[consumed_samples + sample]) for sample in range(self._step_samples))

    def _origin(self, number: int) -> SampleOrigin:
        source, index = self._mixture.locate(number)
        order = self._orders[source]
        return SampleOrigin(
            number=number,
            source=order.prefix,
            epoch=index // order.samples_per_epoch,
            documents=order.origins(index),
            runs=order.read(index),
        )

    # ---------------------------------------------------------------------------------------------- what it gives

    def step_batches(self, consumed_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that starts after `consumed_samples`, one per accumulation step.

        Raises:
            DataError: A token id is outside the model's vocabulary, or the pair is damaged.
        """
        return [self._step_batch(consumed_samples, a) for a in range(self._accumulation)]

    def _step_batch(self, consumed_samples: int, accumulation_step: int) -> MicroBatch:
        first = consumed_samples + (accumulation_step * self._size + self._rank) * self._micro
        numbers = [self._numbers[position] for position in range(first, first + self._micro)]
        return self._micro_batch([self._mixture.locate(number) for number in numbers])

    def validation_batches(self) -> Iterator[tuple[str, MicroBatch]]:
        """This rank's part of the fixed validation samples, source after source, with the source's name.

        They are the first train.validation_samples of the mixture, or fewer where a source would have to give one
        twice. Every rank yields equally many micro-batches: what is missing at the end of a source is filled with
        samples whose loss is masked.
        """
        taken = self._mixture.taken(self.validation_samples())
        for source, (name, samples) in enumerate(zip(self._sources.names, taken, strict=True)):
            for first in range(0, samples, self._micro * self._size):
                own = first + self._rank * self._micro
                counted = max(0, min(self._micro, samples - own))
                places = [(source, min(index, samples - 1)) for index in range(own, own + self._micro)]
                yield name, self._micro_batch(places, counted)

    def validation_samples(self) -> int:
        """How many samples validation reads: train.validation_samples, or fewer, so that no source repeats one."""

        def repeats(samples: int) -> bool:
            taken = self._mixture.taken(samples)
            return any(count > order.samples_per_epoch for count, order in zip(taken, self._orders, strict=True))

        # counts only grow with the samples
        return bisect_left(range(1, self._validation_samples + 1), True, key=repeats)

    def _micro_batch(self, places: Sequence[tuple[int, int]], counted_samples: int | None = None) -> MicroBatch:
        samples = []
        for source, index in places:
            runs = self._orders[source].read(index)
            for run in runs:
                if run.max() >= self._vocabulary or run.min() < 0:
                    raise DataError(self._foreign_token(self._orders[source].prefix, run))
            samples.append(runs)
        return pack(
            samples,
            sequence_tokens=self._data.sequence_tokens,
            end_of_document=self.end_of_document,
            document_bounds=self._data.document_bounds,
            counted_samples=counted_samples,
        )

    def _foreign_token(self, prefix: str, run: np.ndarray) -> str:
        foreign = run[(run >= self._vocabulary) | (run < 0)][0]
        return (
            f"{prefix}.bin holds the token id {foreign}, but model.vocabulary = {self._vocabulary}: the data was made"
            " with another tokenizer; preprocess it with data.tokenizer or set model.vocabulary to that tokenizer's"
        )

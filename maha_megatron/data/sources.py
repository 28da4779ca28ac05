"""Opening the sources of a run and checking them against it and against each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maha_megatron.config.schema import Config, Source
from maha_megatron.data.manifest import Manifest, read_manifest
from maha_megatron.data.mixture import check_weights
from maha_megatron.data.order import SourceOrder
from maha_megatron.data.tokenizer import load_tokenizer
from maha_megatron.errors import DataError

SPLITS = ("train", "validation")
ENDS_CHECKED = 1 << 14
"""Documents, evenly spaced, whose last token is looked at when a source without a manifest is opened."""


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """What training knows of the tokenizer, which itself need not be there."""

    fingerprint: str
    end_of_document: int


@dataclass(frozen=True, kw_only=True)
class OpenSources:
    """The sources of one split."""

    split: str
    tokenizer: TokenizerIdentity
    asked: Sequence[Source]
    """Each as it stands in the configuration."""
    orders: Sequence[SourceOrder]
    texts: Sequence[str | None]
    """What stands for the text of each; None where no manifest tells."""

    @cached_property
    def weights(self) -> list[float]:
        """Relative share of the samples of each: as given, or in proportion to what so many epochs of each hold.

        Raises:
            DataError: They cannot be drawn.
        """
        return _weights(self.asked, self.orders, lambda order: order.samples_per_epoch)

    @property
    def names(self) -> list[str]:
        """A short name of each: the last part of its path, with its number where that is not its own."""
        last = [Path(order.prefix).name for order in self.orders]
        return [name if last.count(name) == 1 else f"{name}.{number}" for number, name in enumerate(last)]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the samples of each source, as plain data by name."""
        total = sum(self.weights)
        found: dict[str, Any] = {}
        for number, (order, weight, text) in enumerate(zip(self.orders, self.weights, self.texts, strict=True)):
            known = {"share": weight / total, **order.identity, "text": text}
            found |= {f"data.train[{number}] {name}": value for name, value in known.items()}
        return found


def open_sources(config: Config, split: str) -> OpenSources:
    """Open the sources of a split and check all that can be refused of them. No index is built.

    Args:
        config: The run; `data`, `run.seed`, `run.folder` and `model.vocabulary` are read.
        split: "train" or "validation".

    Raises:
        DataError: A source, the tokenizer or the pair of them is unusable; the message says what to change.
    """
    assert split in SPLITS, split
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
            packing=config.data.packing,
            cache=Path(config.data.cache or Path(config.run.folder) / "index"),
        )
        for source in sources
    ]
    if config.data.document_bounds:
        for order in orders:
            _check_document_ends(order, manifests[order.prefix], tokenizer.end_of_document)
    _weights(sources, orders, lambda order: order.expected_samples)  # refuses those that cannot be drawn
    texts = [manifests[source.prefix] and manifests[source.prefix].text_digest[:16] for source in sources]
    return OpenSources(split=split, tokenizer=tokenizer, asked=sources, orders=orders, texts=texts)


def _weights(
    sources: Sequence[Source], orders: Sequence[SourceOrder], samples: Callable[[SourceOrder], int]
) -> list[float]:
    """Weights as given; where epochs are, in proportion to what so many epochs of each source hold."""
    weights = [
        source.epochs * samples(order) if source.epochs else source.weight
        for source, order in zip(sources, orders, strict=True)
    ]
    check_weights([source.prefix for source in sources], weights)
    return weights


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


def _checked_tokenizer(config: Config, manifests: Mapping[str, Manifest | None]) -> TokenizerIdentity:
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


def _check_document_ends(order: SourceOrder, manifest: Manifest | None, end_of_document: int) -> None:
    """Refuse a source with documents that have no end: by its manifest, or else by the documents themselves."""
    advice = (
        "preprocess it again with --append-eod and the tokenizer of the run, or set data.document_bounds=false to let"
        " attention run over documents"
    )
    if manifest and not manifest.end_appended:
        raise DataError(
            f"{order.prefix} was preprocessed without --append-eod, so nothing tells where its documents end: {advice}"
        )
    if manifest is None:
        for document, last in order.last_tokens(ENDS_CHECKED):
            if last != end_of_document:
                raise DataError(
                    f"document {document} of {order.prefix} ends with token {last}, not with the end-of-document token"
                    f" {end_of_document}: {advice}"
                )

"""What a pair holds, in numbers and pictures. Torch-free."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maha_megatron.data.layout import PairIndex
from maha_megatron.data.pair import Pair

SCANNED_DOCUMENTS = 1 << 16
PERCENTILES = (1, 10, 50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a pair's documents."""

    documents: int
    empty: int
    tokens: int
    least: int
    most: int
    percentiles: dict[int, int]
    by_power: list[int]
    """Documents of 2^n to 2^(n+1) - 1 tokens, n = 0, 1, ..."""


def document_lengths(index: PairIndex) -> Iterator[np.ndarray]:
    """int64, tokens of each document, in pieces."""
    item_bytes = index.item_type.itemsize
    for first in range(0, len(index.documents) - 1, SCANNED_DOCUMENTS):
        bounds = index.documents[first : first + SCANNED_DOCUMENTS + 1]
        edges = np.full(len(bounds), index.tokens, dtype=np.int64)
        inside = bounds < len(index.lengths)
        edges[inside] = index.pointers[bounds[inside]] // item_bytes
        yield np.diff(edges)


def measure_lengths(index: PairIndex) -> Lengths:
    """How long a pair's documents are."""
    lengths = np.concatenate(list(document_lengths(index)) or [np.zeros(0, dtype=np.int64)])
    filled = lengths[lengths > 0]
    powers = np.floor(np.log2(filled)).astype(int) if filled.size else np.zeros(0, dtype=int)
    ranks = np.percentile(filled, PERCENTILES, method="nearest").astype(int).tolist() if filled.size else []
    return Lengths(
        documents=lengths.size,
        empty=int((lengths == 0).sum()),
        tokens=int(lengths.sum()),
        least=int(filled.min(initial=index.tokens)),
        most=int(filled.max(initial=0)),
        percentiles=dict(zip(PERCENTILES, ranks, strict=False)),
        by_power=np.bincount(powers).tolist(),
    )


def plot_lengths(lengths: Lengths, title: str, path: Path) -> None:
    """Draw the lengths' histogram as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120)  # without pyplot: no display, no global state
    axes = figure.add_subplot()
    axes.bar(range(len(lengths.by_power)), lengths.by_power, width=1.0, align="edge", edgecolor="white")
    axes.set(xlabel="tokens of a document", ylabel="documents", title=title)
    axes.set_xticks(
        range(len(lengths.by_power) + 1), [str(2**n) for n in range(len(lengths.by_power) + 1)], rotation=45
    )
    figure.savefig(path, format="png", bbox_inches="tight")


def exact_duplicates(pair: Pair) -> list[tuple[int, int]]:
    """Documents that repeat an earlier one token for token: (first of its kind, repetition), in order.

    Takes 32 bytes of memory a document. Empty documents are left out.
    """
    hashes = np.empty(pair.documents, dtype=[("low", "<u8"), ("high", "<u8")])
    filled = np.zeros(pair.documents, dtype=bool)
    for number in range(pair.documents):
        tokens = pair.document(number)
        filled[number] = tokens.size > 0
        digest = hashlib.blake2b(np.ascontiguousarray(tokens).data, digest_size=16).digest()
        hashes[number] = np.frombuffer(digest, dtype=hashes.dtype)[0]
    order = np.argsort(hashes, order=("low", "high"), kind="stable")
    order = order[filled[order]]
    ordered = hashes[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: ordered.size])
    firsts = np.repeat(order[begins], np.diff([*begins, ordered.size]))
    repeats = firsts != order
    return sorted(zip(firsts[repeats].tolist(), order[repeats].tolist(), strict=True), key=lambda found: found[1])


def sampled_documents(pair: Pair, count: int, seed: int) -> list[int]:
    """Numbers of so many documents with text, spread over the pair by chance, ascending."""
    chosen: set[int] = set()
    random = np.random.default_rng(seed)
    for number in random.integers(pair.documents, size=20 * count).tolist():
        begin, end = pair.index.document_tokens(number)
        if len(chosen) < count and end > begin:
            chosen.add(number)
    return sorted(chosen)

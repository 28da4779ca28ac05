"""Recall by distance: can a model copy what it read so many tokens ago? One forward pass, the answer teacher-forced.

A needle, in real text (ends of documents are left out of it: to the model it is one document):

    planted   text text MARK k k k k v v v v text text text text MARK k k k k [v v v v]
                                     |<------- distance ------------------>|
    control   the same, with the text where the needle was: what the value costs who has not read it

Key and value are random ordinary tokens. Every token of the value stands `distance` tokens after its planted copy. A
text's control is the same for all its distances.

Associative recall: pairs k v k v ... k v of distinct ordinary tokens, then one key again [v]; by its pair's distance.

All tokens of an answer are right in one teacher-forced pass exactly when greedy decoding would write that answer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from maha_megatron.errors import ConfigError, DataError
from maha_megatron.model.scoring import RowScores, Scorer
from maha_megatron.train.grouped_mean import Mean, grouped_mean

KEY_TOKENS = 4
VALUE_TOKENS = 4
DISTANCES = (128, 512, 2048, 4096, 8192, 16384)
PAIRS = 64

Advance = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class NeedleRecall:
    """What is recalled at one distance; a group of a mean is one needle."""

    distance: int
    whole_value: Mean
    """Share of needles whose value is predicted whole."""
    first_token: Mean
    """Share of needles whose value's first token is predicted."""
    loss_nats: Mean
    """Nats a token of the value."""
    control_nats: Mean
    """The same, without the needle."""
    gain_nats: Mean
    """control_nats - loss_nats, needle by needle."""


@dataclass(frozen=True, kw_only=True)
class PairRecall:
    """What is recalled of pairs whose values lie first_distance to last_distance tokens before their prediction."""

    first_distance: int
    last_distance: int
    right: Mean
    loss_nats: Mean


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """Real text and what is planted in it.

    Attributes:
        text_t: int64 [any], text without ends of documents.
        marker: token ids in front of a key.
        pieces: int64 [any], ids of ordinary tokens, of which keys and values are drawn.
    """

    text_t: np.ndarray
    marker: tuple[int, ...]
    pieces: np.ndarray

    def texts(self, sequence_tokens: int) -> int:
        """Whole sequences of the text, the token behind each included, which is only predicted."""
        return len(self.text_t) // (sequence_tokens + 1)


def needle_length(marker: Sequence[int]) -> int:
    """Tokens of marker, key and value."""
    return len(marker) + KEY_TOKENS + VALUE_TOKENS


def needle_distances(asked: Sequence[int] | None, sequence_tokens: int, needle_tokens: int) -> tuple[int, ...]:
    """The distances to measure, ascending.

    Args:
        asked: what the user wants; None: those of DISTANCES that fit, and the farthest that does.
        sequence_tokens: rows of the sequence.
        needle_tokens: length of marker, key and value.

    Raises:
        ConfigError: one does not fit.
    """
    farthest = sequence_tokens + 1 - needle_tokens
    if farthest < needle_tokens:
        raise ConfigError(
            f"--sequence {sequence_tokens}: too short for a needle of {needle_tokens} tokens and its question; give at "
            f"least {2 * needle_tokens - 1}, or --needles 0"
        )
    if asked is None:
        return tuple(sorted({farthest, *(d for d in DISTANCES if needle_tokens <= d <= farthest)}))
    for distance in asked:
        if distance > farthest:
            raise ConfigError(
                f"--distances {distance} is beyond the sequence: with --sequence {sequence_tokens} at most {farthest}; "
                f"give --sequence {distance + needle_tokens - 1} or more, or smaller distances"
            )
        if distance < needle_tokens:
            raise ConfigError(
                f"--distances {distance}: the needle alone has {needle_tokens} tokens; give at least that"
            )
    return tuple(sorted(set(asked)))


def needle_recall(
    score: Scorer,
    haystack: Haystack,
    *,
    needles: int,
    distances: Sequence[int],
    sequence_tokens: int,
    batch_tokens: int,
    seed: int,
    advance: Advance = lambda tokens: None,
) -> tuple[NeedleRecall, ...]:
    """Plant needles at every distance and ask for them at the sequence's end.

    Args:
        score: the model.
        haystack: its text is cut into sequences; where there are fewer than needles, they take turns.
        needles: how many at each distance, each with a key and a value of its own.
        distances: as needle_distances gives them.
        sequence_tokens: rows of every sequence.
        batch_tokens: rows of one forward pass, more only where one sequence has more.
        seed: of keys and values.
        advance: called with the rows that are done.

    Raises:
        DataError: the text is shorter than a sequence, or has too few ordinary tokens.
    """
    length = sequence_tokens + 1
    texts = haystack.texts(sequence_tokens)
    if texts == 0:
        raise DataError(
            f"the validation data has {len(haystack.text_t)} tokens of text, a needle's sequence needs {length}: "
            "give a smaller --sequence, or more text by --data"
        )
    if len(haystack.pieces) < KEY_TOKENS + VALUE_TOKENS:
        raise DataError(_too_few_pieces(haystack, KEY_TOKENS + VALUE_TOKENS, "a needle"))

    def sequences() -> Iterator[np.ndarray]:
        for number in range(needles):
            text_t = haystack.text_t[number % texts * length :][:length]
            drawn = np.random.default_rng((seed, number)).choice(
                haystack.pieces, KEY_TOKENS + VALUE_TOKENS, replace=False
            )
            yield from _planted(text_t, np.concatenate([haystack.marker, drawn]), distances)

    scores = score_answers(score, sequences(), VALUE_TOKENS, batch_tokens, advance)
    shape = (needles, 1 + len(distances), VALUE_TOKENS)
    loss_nd, right_ndv = scores.loss_r.double().view(shape).mean(2), scores.right_r.double().view(shape)
    return tuple(
        NeedleRecall(
            distance=distance,
            whole_value=grouped_mean(right_ndv[:, column].amin(1)),
            first_token=grouped_mean(right_ndv[:, column, 0]),
            loss_nats=grouped_mean(loss_nd[:, column]),
            control_nats=grouped_mean(loss_nd[:, 0]),
            gain_nats=grouped_mean(loss_nd[:, 0] - loss_nd[:, column]),
        )
        for column, distance in enumerate(distances, start=1)
    )


def _planted(text_t: np.ndarray, needle: np.ndarray, distances: Sequence[int]) -> Iterator[np.ndarray]:
    """The control, then a sequence for each distance."""
    asked_t = text_t.copy()
    asked_t[-len(needle) :] = needle
    yield asked_t
    for distance in distances:
        planted_t, end = asked_t.copy(), len(asked_t) - distance
        planted_t[end - len(needle) : end] = needle
        yield planted_t


def pairs_in_a_row(asked: int | None, sequence_tokens: int) -> int:
    """How many pairs a sequence holds beside the question; None: PAIRS, or as many as fit.

    Raises:
        ConfigError: they do not fit.
    """
    most = (sequence_tokens - 1) // 2
    if most == 0 or (asked or 0) > most:
        raise ConfigError(
            f"--pairs {asked or 1} makes {2 * (asked or 1) + 1} tokens, the sequence has {sequence_tokens}: give "
            f"--pairs {most} or less, a longer --sequence, or --queries 0"
        )
    return asked or min(PAIRS, most)


def pair_recall(
    score: Scorer,
    haystack: Haystack,
    *,
    queries: int,
    pairs: int,
    batch_tokens: int,
    seed: int,
    advance: Advance = lambda tokens: None,
) -> tuple[PairRecall, ...]:
    """Ask for one of so many pairs, each time others, by the distance of the one asked for.

    Args:
        score: the model.
        haystack: only its ordinary tokens are used.
        queries: how many; the buckets of distances take turns.
        pairs: key-value pairs in a row.
        batch_tokens: rows of one forward pass.
        seed: of keys and values.
        advance: called with the rows that are done.

    Returns:
        Buckets of the pairs counted back from the question: 1, 2, 3-4, 5-8, ...; those that hold a query.

    Raises:
        DataError: the text has too few ordinary tokens.
    """
    if len(haystack.pieces) < 2 * pairs:
        raise DataError(_too_few_pieces(haystack, 2 * pairs, f"--pairs {pairs}"))
    backs = [(1, 1)] + [(2**b + 1, min(2 ** (b + 1), pairs)) for b in range((pairs - 1).bit_length())]

    def sequences() -> Iterator[np.ndarray]:
        for number in range(queries):
            random = np.random.default_rng((seed, number))
            drawn = random.choice(haystack.pieces, 2 * pairs, replace=False)
            first, last = backs[number % len(backs)]
            asked = 2 * (pairs - random.integers(first, last + 1))
            yield np.concatenate([drawn, drawn[asked : asked + 2]])

    scores = score_answers(score, sequences(), 1, batch_tokens, advance)
    return tuple(
        PairRecall(
            first_distance=2 * first,
            last_distance=2 * last,
            right=grouped_mean(scores.right_r[bucket :: len(backs)]),
            loss_nats=grouped_mean(scores.loss_r[bucket :: len(backs)]),
        )
        for bucket, (first, last) in enumerate(backs[:queries])
    )


def score_answers(
    score: Scorer,
    sequences: Iterable[np.ndarray],
    answer_tokens: int,
    batch_tokens: int,
    advance: Advance = lambda tokens: None,
) -> RowScores:
    """Score the last tokens of sequences, several in a forward pass, each a document of its own.

    Args:
        score: the model.
        sequences: int [n + 1] each, of any lengths.
        answer_tokens: how many tokens at the end of each are scored.
        batch_tokens: rows of one forward pass, more only where one sequence has more.
        advance: called with the rows that are done.

    Returns:
        Scores [sequences * answer_tokens], sequence by sequence.
    """
    scored, batch, rows = [], [], 0

    def finish() -> None:
        scored.append(score(*_packed(batch, answer_tokens)))
        advance(rows)

    for sequence in sequences:
        if batch and rows + len(sequence) - 1 > batch_tokens:
            finish()
            batch, rows = [], 0
        batch.append(sequence)
        rows += len(sequence) - 1
    finish()
    return RowScores(torch.cat([part.loss_r for part in scored]), torch.cat([part.right_r for part in scored]))


def _packed(batch: Sequence[np.ndarray], answer_tokens: int) -> tuple[torch.Tensor, ...]:
    """Inputs, labels, document starts and scored rows of sequences laid end to end."""
    lengths = torch.tensor([len(sequence) - 1 for sequence in batch])
    end_n = lengths.cumsum(0)
    inputs = torch.from_numpy(np.concatenate([sequence[:-1] for sequence in batch]).astype(np.int64))
    labels = torch.from_numpy(np.concatenate([sequence[1:] for sequence in batch]).astype(np.int64))
    rows_r = (end_n[:, None] + torch.arange(-answer_tokens, 0)).flatten()
    return inputs, labels, (end_n - lengths).repeat_interleave(lengths), rows_r


def _too_few_pieces(haystack: Haystack, needed: int, what: str) -> str:
    return (
        f"{what} needs {needed} different tokens, and the validation data holds {len(haystack.pieces)} that are made "
        "of letters: give fewer --pairs, or more text by --data"
    )

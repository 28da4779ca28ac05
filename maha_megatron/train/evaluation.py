"""What a trained run can do, measured on one process: loss by position and recall by distance."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maha_megatron.checkpoint.trained import Trained
from maha_megatron.config.schema import Config, Source
from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.loader import build_loader
from maha_megatron.data.prepare.stage import progress_bar
from maha_megatron.data.tokenizer import Tokenizer
from maha_megatron.errors import DataError
from maha_megatron.model.scoring import Scorer, score_rows
from maha_megatron.train.loss_by_position import PositionLoss, loss_by_position
from maha_megatron.train.recall import (
    Haystack,
    NeedleRecall,
    PairRecall,
    needle_distances,
    needle_length,
    needle_recall,
    pair_recall,
    pairs_in_a_row,
)
from maha_megatron.train.validation_text import bits_per_byte, described_sources

MARKER = "\nneedle "
"""Stands in front of a needle's key."""
TOKENS = "tok"
TEXT_TOKENS = 1 << 20
"""So much of the validation text is read, or more where the needles need more: keys and values are tokens of it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; each part is left out where its number is 0.

    Attributes:
        sequence_tokens: rows of a sequence; None: the run's.
        data: prefix of a pair in place of the run's validation split.
        samples: validation samples that loss by position reads; None: as many as the run's validation.
        needles: how many at each distance.
        distances: None: recall.DISTANCES as far as they fit, and the farthest that does.
        queries: how many of associative recall.
        pairs: key-value pairs in a row; None: recall.PAIRS, or as many as fit.
        batch_tokens: rows of a forward pass, more only where one sequence has more.
        seed: of keys and values.
    """

    sequence_tokens: int | None = None
    data: str | None = None
    samples: int | None = None
    needles: int = 32
    distances: tuple[int, ...] | None = None
    queries: int = 512
    pairs: int | None = None
    batch_tokens: int = 16384
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured; None for what was left out.

    Attributes:
        settings: as they were used: defaults of what was measured are filled in.
        position: loss by position.
        bits_per_byte: of position's overall loss; None also where no manifest knows the text's bytes.
        needle: by distance.
        needle_texts: different texts that the needles lie in; where there are fewer than needles, they take turns.
        pairs: by distance.
    """

    settings: Settings
    position: PositionLoss | None
    bits_per_byte: float | None
    needle: tuple[NeedleRecall, ...] | None
    needle_texts: int | None
    pairs: tuple[PairRecall, ...] | None

    def as_data(self) -> dict[str, Any]:
        """Plain data for a result file."""
        return dataclasses.asdict(self)


def evaluate(trained: Trained, settings: Settings, *, run_folder: Path, tokenizer_path: str | None = None) -> Findings:
    """Measure everything that the settings ask for, with progress on standard error.

    Args:
        trained: a run's checkpoint.
        settings: what to measure.
        run_folder: where the run lies now; the indexes of large data are kept there, as training keeps them.
        tokenizer_path: where its tokenizer is now; None: where the configuration says.

    Raises:
        ConfigError: a distance or the pairs do not fit into the sequence.
        DataError: validation data is missing, damaged or too short.
    """
    settings = dataclasses.replace(
        settings,
        sequence_tokens=settings.sequence_tokens or trained.config.data.sequence_tokens,
        samples=trained.config.train.validation_samples if settings.samples is None else settings.samples,
    )
    marker, rows = tuple(trained.tokenizer.encode(MARKER)), settings.sequence_tokens
    if settings.needles:
        distances = needle_distances(settings.distances, rows, needle_length(marker))
        settings = dataclasses.replace(settings, distances=distances)
    if settings.queries:
        settings = dataclasses.replace(settings, pairs=pairs_in_a_row(settings.pairs, rows))
    config = data_config(trained.config, settings, run_folder, tokenizer_path)
    score = partial(score_rows, trained.model)
    position = needle = needle_texts = pairs = None
    if settings.samples:
        position = _position(score, config, settings)
    if settings.needles or settings.queries:
        text_t = read_text(config, settings)
        haystack = Haystack(text_t=text_t, marker=marker, pieces=ordinary_pieces(text_t, trained.tokenizer))
        pairs = _pairs(score, haystack, settings) if settings.queries else None
        if settings.needles:
            needle = _needle(score, haystack, settings)
            needle_texts = min(settings.needles, haystack.texts(rows))
    described = described_sources(config)
    return Findings(
        settings=settings,
        position=position,
        bits_per_byte=bits_per_byte(described, position.overall.mean) if position and described else None,
        needle=needle,
        needle_texts=needle_texts,
        pairs=pairs,
    )


def _position(score: Scorer, config: Config, settings: Settings) -> PositionLoss:
    total = settings.samples * settings.sequence_tokens
    with progress_bar(total, "loss by position", TOKENS) as advance:
        return loss_by_position(score, _batches(config, settings), settings.sequence_tokens, advance)


def _needle(score: Scorer, haystack: Haystack, settings: Settings) -> tuple[NeedleRecall, ...]:
    total = settings.needles * (1 + len(settings.distances)) * settings.sequence_tokens
    with progress_bar(total, "needles", TOKENS) as advance:
        return needle_recall(
            score,
            haystack,
            needles=settings.needles,
            distances=settings.distances,
            sequence_tokens=settings.sequence_tokens,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            advance=advance,
        )


def _pairs(score: Scorer, haystack: Haystack, settings: Settings) -> tuple[PairRecall, ...]:
    with progress_bar(settings.queries * (2 * settings.pairs + 1), "pairs", TOKENS) as advance:
        return pair_recall(
            score,
            haystack,
            queries=settings.queries,
            pairs=settings.pairs,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
            advance=advance,
        )


def data_config(config: Config, settings: Settings, run_folder: Path, tokenizer_path: str | None) -> Config:
    """The run's configuration with the data, lengths and batches of an evaluation; the model is not built from it."""
    samples = max(1, min(settings.samples, settings.batch_tokens // settings.sequence_tokens))
    data = dataclasses.replace(
        config.data, sequence_tokens=settings.sequence_tokens, tokenizer=tokenizer_path or config.data.tokenizer
    )
    if settings.data:
        data = dataclasses.replace(data, validation=(Source(prefix=settings.data),))
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder=str(run_folder)),
        data=data,
        train=dataclasses.replace(config.train, micro_batch_samples=samples, global_batch_samples=samples),
    )


def _batches(config: Config, settings: Settings, samples: int | None = None) -> Iterator[MicroBatch]:
    """The first samples of the validation split, in the trainer's order.

    Raises:
        DataError: they cannot be read.
    """
    train = dataclasses.replace(config.train, validation_samples=samples or settings.samples)
    try:
        loader = build_loader(
            dataclasses.replace(config, train=train), data_parallel_rank=0, data_parallel_size=1, split="validation"
        )
    except DataError as error:
        other = "" if settings.data else "; or name other validation data by --data PREFIX"
        raise DataError(f"{error}{other}") from error
    for _source, batch in loader.validation_batches():
        yield batch


def read_text(config: Config, settings: Settings) -> np.ndarray:
    """Tokens of the validation split without ends of documents, int64: TEXT_TOKENS or what the needles need."""
    wanted = max(TEXT_TOKENS, settings.needles * (settings.sequence_tokens + 1))
    samples = -(-wanted // settings.sequence_tokens)
    parts = [batch.input_ids_t[batch.loss_mask_t].numpy() for batch in _batches(config, settings, samples)]
    return np.concatenate(parts)


def ordinary_pieces(text_t: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Ids, ascending, that occur in the text and are letters only, beside space around them."""
    found = [token for token in np.unique(text_t).tolist() if tokenizer.decode([token]).strip().isalpha()]
    return np.array(found, dtype=np.int64)

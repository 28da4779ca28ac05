"""Recall by distance of planted models: one that copies, one whose window is bounded, one that cannot copy."""

import numpy as np
import pytest
import torch

from maha_megatron.errors import ConfigError, DataError
from maha_megatron.model.scoring import RowScores
from maha_megatron.train.recall import (
    KEY_TOKENS,
    VALUE_TOKENS,
    Haystack,
    needle_distances,
    needle_recall,
    pair_recall,
    pairs_in_a_row,
)

SEQUENCE, MARKER, UNKNOWN_NATS = 2500, (7, 8), 6.0
NEEDLE = len(MARKER) + KEY_TOKENS + VALUE_TOKENS
TEXT_T = np.random.default_rng(1).integers(10, 200, 3 * (SEQUENCE + 1) + 5)
HAYSTACK = Haystack(text_t=TEXT_T, marker=MARKER, pieces=np.arange(200, 1000))


class Copier:
    """Continues as after the last earlier place in the document with the same tokens before; else it knows nothing.

    Args:
        context_tokens: how many tokens have to be the same.
        window: how far back it looks.
    """

    def __init__(self, context_tokens: int, window: int = 10**6) -> None:
        self.context_tokens, self.window, self.passes = context_tokens, window, []

    def __call__(self, inputs_t, labels_t, starts_t, rows_r) -> RowScores:
        self.passes.append(len(inputs_t))
        rights, losses = [], []
        for row in rows_r.tolist():
            first = max(int(starts_t[row]), row - self.window + 1)
            seen = inputs_t[first : row + 1].unfold(0, self.context_tokens, 1)
            same = (seen[:-1] == seen[-1]).all(1).nonzero().flatten()
            copied = int(inputs_t[first + int(same[-1]) + self.context_tokens]) if len(same) else None
            rights.append(copied == int(labels_t[row]))
            losses.append(UNKNOWN_NATS if copied is None else 0.0 if rights[-1] else 2 * UNKNOWN_NATS)
        return RowScores(torch.tensor(losses), torch.tensor(rights))


def reads_little(inputs_t, labels_t, _starts_t, rows_r) -> RowScores:
    """Losses that depend on the row's own token and label alone."""
    loss_r = (inputs_t[rows_r] * 31 + labels_t[rows_r] * 17) % 11 / 2.0
    return RowScores(loss_r, loss_r < 0)


def needles(score, **changes):
    settings = {
        "needles": 5,
        "distances": needle_distances(None, SEQUENCE, NEEDLE),
        "sequence_tokens": SEQUENCE,
        "batch_tokens": 6000,
        "seed": 3,
    }
    return needle_recall(score, HAYSTACK, **(settings | changes))


def pairs(score, **changes):
    return pair_recall(score, HAYSTACK, **({"queries": 60, "pairs": 20, "batch_tokens": 300, "seed": 3} | changes))


def test_a_copier_recalls_all_at_every_distance() -> None:
    copier, advanced = Copier(2), []
    found = needles(copier, advance=advanced.append)
    assert [row.distance for row in found] == [128, 512, 2048, SEQUENCE + 1 - NEEDLE]
    for row in found:
        assert (row.whole_value.mean, row.first_token.mean, row.loss_nats.mean) == (1, 1, 0)
        assert (row.control_nats.mean, row.gain_nats.mean) == (UNKNOWN_NATS, UNKNOWN_NATS)
        assert (row.whole_value.count, row.whole_value.standard_error) == (5, 0)
    assert max(copier.passes) == 2 * SEQUENCE  # no batch above its bound
    assert sum(advanced) == 5 * (1 + 4) * SEQUENCE
    for row in pairs(Copier(1)):
        assert (row.right.mean, row.loss_nats.mean, row.right.count) == (1, 0, 10)


def test_a_bounded_window_recalls_up_to_its_length() -> None:
    """The value's first token is predicted by a row that sees the key's last two tokens and the copy of all."""
    window = 512 + KEY_TOKENS
    found = needles(Copier(2, window))
    assert [row.whole_value.mean for row in found] == [1, 1, 0, 0]
    assert [row.loss_nats.mean for row in found[2:]] == [UNKNOWN_NATS] * 2
    assert [row.gain_nats.mean for row in found[2:]] == [0, 0]
    by_pairs = pairs(Copier(1, 17))
    spans = [(row.first_distance, row.last_distance) for row in by_pairs]
    assert spans == [(2, 2), (4, 4), (6, 8), (10, 16), (18, 32), (34, 40)]
    assert [row.right.mean for row in by_pairs] == [1, 1, 1, 1, 0, 0]


def test_who_cannot_copy_gets_the_controls_loss() -> None:
    for row in needles(reads_little):
        assert row.loss_nats == row.control_nats
        assert row.gain_nats.mean == row.gain_nats.standard_error == 0
        assert row.whole_value.mean == row.first_token.mean == 0
        assert row.loss_nats.standard_error > 0


def test_the_same_seed_asks_the_same() -> None:
    assert needles(reads_little) == needles(reads_little, batch_tokens=1)
    assert pairs(reads_little) == pairs(reads_little, batch_tokens=1)
    assert needles(reads_little) != needles(reads_little, seed=4)
    assert pairs(reads_little) != pairs(reads_little, seed=4)


def test_a_half_recalled_value_counts_its_first_token_only() -> None:
    def knows_first(inputs_t, labels_t, starts_t, rows_r) -> RowScores:
        right_r = torch.arange(len(rows_r)) % VALUE_TOKENS == 0
        return RowScores(torch.ones(len(rows_r)), right_r)

    assert all((row.first_token.mean, row.whole_value.mean) == (1, 0) for row in needles(knows_first))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: needle_distances((4096,), 4096, NEEDLE), ConfigError, "at most 4087; give --sequence 4105 or more"),
        (lambda: needle_distances((9,), 4096, NEEDLE), ConfigError, "the needle alone has 10 tokens"),
        (lambda: needle_distances(None, 18, NEEDLE), ConfigError, "too short.*give at least 19, or --needles 0"),
        (lambda: pairs_in_a_row(32, 64), ConfigError, "makes 65 tokens, the sequence has 64: give --pairs 31"),
        (lambda: pairs_in_a_row(None, 2), ConfigError, "makes 3 tokens"),
        (lambda: needles(reads_little, sequence_tokens=10**5), DataError, "give a smaller --sequence, or more text"),
        (lambda: pairs(reads_little, pairs=401), DataError, "--pairs 401 needs 802 different tokens.*holds 800"),
    ],
)
def test_what_does_not_fit_says_what_would(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_what_is_said_to_fit_fits() -> None:
    assert needle_distances((4096, 10, 10), 4105, NEEDLE) == (10, 4096)
    assert needle_distances(None, 19, NEEDLE) == (10,)
    assert needle_distances(None, 4105, NEEDLE) == (128, 512, 2048, 4096)
    assert (pairs_in_a_row(31, 64), pairs_in_a_row(None, 64), pairs_in_a_row(None, 999)) == (31, 31, 64)
    assert all(row.whole_value.mean == 1 for row in needles(Copier(2), distances=(NEEDLE, SEQUENCE + 1 - NEEDLE)))

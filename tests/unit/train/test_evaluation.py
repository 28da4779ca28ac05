"""What an evaluation draws keys and values from, and what its tables say."""

from types import SimpleNamespace

import numpy as np
import torch

from maha_megatron.train.evaluation import Findings, Settings, ordinary_pieces
from maha_megatron.train.evaluation_report import findings_text
from maha_megatron.train.grouped_mean import grouped_mean
from maha_megatron.train.loss_by_position import PositionLoss
from maha_megatron.train.recall import PairRecall

PIECES = ["", "the", " of ", "a1", "=", "\n", "\ufffd", "é", "漢", "never"]


def test_ordinary_tokens_are_words_of_the_text() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids: PIECES[ids[0]])
    found = ordinary_pieces(np.array([8, 7, 6, 5, 4, 3, 2, 1, 0, 1]), tokenizer)
    assert found.tolist() == [1, 2, 7, 8]
    assert ordinary_pieces(np.array([0]), tokenizer).dtype == np.int64


def test_tables_show_counts_and_errors_and_only_what_was_measured() -> None:
    mean = grouped_mean(torch.tensor([1.0, 2.0, 3.0]))
    position = PositionLoss(overall=mean, buckets=((0, 0, mean), (2, 3, mean)))
    pairs = (PairRecall(first_distance=2, last_distance=2, right=grouped_mean(torch.tensor([1.0])), loss_nats=mean),)
    settings = Settings(sequence_tokens=64, pairs=4)
    text = findings_text(
        Findings(settings=settings, position=position, bits_per_byte=1.5, needle=None, needle_texts=None, pairs=pairs)
    )
    assert "2.0000 ± 0.5774 nats a token, 3 tokens of 3 samples, 1.5000 bits a byte." in text
    assert "| 2-3 | 3 | 2.0000 ± 0.5774 |" in text
    assert "| 2 | 1 | 1.0000 | 2.0000 ± 0.5774 |" in text
    assert "right in 0.2500" in text
    assert "Needle" not in text

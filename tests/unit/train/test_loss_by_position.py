"""Loss by position: buckets, what a group is, and that the whole is the trainer's validation loss."""

from functools import partial

import pytest
import torch

from maha_megatron.data.batch import MicroBatch
from maha_megatron.errors import DataError
from maha_megatron.model.scoring import RowScores, score_rows
from maha_megatron.train.grouped_mean import grouped_mean
from maha_megatron.train.loss_by_position import loss_by_position
from tests.support.one_rank import one_rank  # noqa: F401 (a fixture)
from tests.support.training import engine_for, micro_batches, training_config

ROWS = 65


def batch(*starts: int, samples: int = 1, masked: bool = False) -> MicroBatch:
    """Samples of ROWS rows whose documents begin at the same rows of each."""
    rows_t = torch.arange(ROWS)
    start_t = torch.stack([(rows_t >= start) * start for start in starts]).amax(0)
    start_t = torch.cat([start_t + sample * ROWS for sample in range(samples)]).int()
    tokens_t = torch.zeros(samples * ROWS, dtype=torch.int64)
    mask_t = torch.full((samples * ROWS,), not masked)
    return MicroBatch(input_ids_t=tokens_t, labels_t=tokens_t, loss_mask_t=mask_t, document_start_t=start_t)


def position_as_loss(_inputs, _labels, starts_t, rows_r) -> RowScores:
    return RowScores((rows_r - starts_t[rows_r]).float(), torch.zeros(len(rows_r), dtype=torch.bool))


def test_every_position_is_in_its_bucket() -> None:
    found = loss_by_position(position_as_loss, [batch(0, 40, samples=2), batch(0)], ROWS)
    assert found.overall.count == 3 * ROWS
    seen = [(first, last, mean.count, mean.mean) for first, last, mean in found.buckets]
    of_two = [(2**b, 2 ** (b + 1) - 1) for b in range(7)]
    expected_counts = [5, 5, 10, 20, 40, 16 + 16 + 16 + 9 + 9, 8 + 8 + 32, 1]
    assert [(first, last) for first, last, *_ in seen] == [(0, 0), *of_two]
    assert [count for *_, count, _ in seen] == expected_counts
    assert [mean for *_, mean in seen][:3] == [0, 1, 2.5]
    assert seen[-1][-1] == 64
    assert sum(count * mean for *_, count, mean in seen) / (3 * ROWS) == pytest.approx(found.overall.mean)


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(DataError, match="no token that may be predicted"):
        loss_by_position(position_as_loss, [batch(0, masked=True)], ROWS)


def test_members_of_a_group_are_one_draw() -> None:
    value_k = torch.randn(9, generator=torch.Generator().manual_seed(1))
    single = grouped_mean(value_k)
    assert single.standard_error == pytest.approx(float(value_k.std() / 3), rel=1e-6)
    repeated = grouped_mean(4 * value_k, torch.full((9,), 4))
    assert (repeated.mean, repeated.standard_error) == pytest.approx((single.mean, single.standard_error))
    assert repeated.count == 36
    with_empty = grouped_mean(torch.cat([value_k, torch.zeros(3)]), torch.tensor([1] * 9 + [0] * 3))
    assert with_empty == single
    assert grouped_mean(value_k[:1]).standard_error is None


@pytest.mark.usefixtures("one_rank")
def test_the_whole_is_the_trainers_validation_loss() -> None:
    config = training_config(model__layers=2, train__micro_batch_samples=2)
    batches = micro_batches(config, 0, "random")
    with engine_for(config, 1) as engine:
        trainers = engine.evaluate(("text", part) for part in batches)
        found = loss_by_position(partial(score_rows, engine.module), batches, config.data.sequence_tokens)
    assert found.overall.mean == pytest.approx(trainers.loss_nats, rel=1e-6)
    assert found.overall.count == sum(part.unmasked for part in batches)
    assert found.overall.groups == 8
    total = sum(mean.count * mean.mean for *_, mean in found.buckets)
    assert total / found.overall.count == pytest.approx(trainers.loss_nats, rel=1e-6)

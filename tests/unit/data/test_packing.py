import numpy as np
import torch

from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.packing import pack

END = 9
SAMPLES = np.array([[1, 2, END, 3, 4, 5], [6, END, END, 7, 8, 1]])


def packed(samples: np.ndarray, **options) -> MicroBatch:
    """Samples of one run each."""
    return pack([[sample] for sample in samples], sequence_tokens=samples.shape[1] - 1, end_of_document=END, **options)


def test_the_example_of_the_module() -> None:
    batch = packed(SAMPLES, document_bounds=True)
    assert batch.input_ids_t.tolist() == [1, 2, END, 3, 4, 6, END, END, 7, 8]
    assert batch.labels_t.tolist() == [2, END, 3, 4, 5, END, END, 7, 8, 1]
    assert batch.loss_mask_t.tolist() == [True, True, False, True, True, True, False, False, True, True]
    assert batch.document_start_t.tolist() == [0, 0, 0, 3, 3, 5, 5, 7, 8, 8]
    assert batch.positions_t.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0, 1]
    assert batch.unmasked == 7


def test_predicting_the_end_counts_and_predicting_from_it_does_not() -> None:
    batch = packed(SAMPLES, document_bounds=True)
    predicts_end = batch.labels_t == END
    reads_end = batch.input_ids_t == END
    assert batch.loss_mask_t[predicts_end & ~reads_end].all()
    assert not batch.loss_mask_t[reads_end].any()


def test_without_document_bounds_only_samples_start_and_the_mask_stays() -> None:
    bounded = packed(SAMPLES, document_bounds=True)
    free = packed(SAMPLES, document_bounds=False)
    assert free.document_start_t.tolist() == [0] * 5 + [5] * 5
    assert torch.equal(free.loss_mask_t, bounded.loss_mask_t)


def test_an_end_in_the_label_only_column_opens_nothing() -> None:
    batch = packed(np.array([[1, 2, END], [3, 4, 5]]), document_bounds=True)
    assert batch.document_start_t.tolist() == [0, 0, 2, 2]
    assert batch.loss_mask_t.all()


def test_samples_that_only_fill_the_batch_do_not_count() -> None:
    batch = packed(SAMPLES, document_bounds=True, counted_samples=1)
    assert batch.loss_mask_t.tolist() == [True, True, False, True, True] + [False] * 5


def test_types_and_own_memory() -> None:
    samples = SAMPLES.copy()
    batch = packed(samples, document_bounds=True)
    samples[:] = 0
    assert batch.input_ids_t[0] == 1
    assert batch.labels_t[0] == 2
    assert batch.input_ids_t.dtype == batch.labels_t.dtype == torch.int64
    assert batch.loss_mask_t.dtype == torch.bool
    assert batch.document_start_t.dtype == torch.int32

"""Labels, loss mask and document starts, from the tokens alone.

With E the end-of-document token and two samples of five rows (six tokens each: the last is only a label):

    tokens            a  b  E  c  d | e      f  E  E  g  h | i
    input             a  b  E  c  d          f  E  E  g  h
    label             b  E  c  d  e          E  E  g  h  i
    loss counts       1  1  0  1  1          1  0  0  1  1      what follows a document's end is no prediction of it
    document start    0  0  0  3  3          5  5  7  8  8      the row after an E opens a document, a sample opens one
"""

import numpy as np
import torch

from maha_megatron.data.batch import MicroBatch


def pack(
    samples: np.ndarray, *, end_of_document: int, document_bounds: bool, counted_samples: int | None = None
) -> MicroBatch:
    """Flatten samples into a micro-batch.

    Args:
        samples: int64 [micro_batch_samples, sequence_tokens + 1].
        end_of_document: The token that ends a document.
        document_bounds: Whether a document's end starts a new document; otherwise only a sample does.
        counted_samples: The first so many samples count in the loss, the others fill the batch; None: all.

    Returns:
        The micro-batch; its tensors share no memory with `samples`.
    """
    inputs = samples[:, :-1].copy()
    ends_document = inputs == end_of_document
    opens_document = np.zeros_like(ends_document)
    opens_document[:, 0] = True
    if document_bounds:
        opens_document[:, 1:] |= ends_document[:, :-1]
    rows = np.arange(inputs.size, dtype=np.int32)
    document_start = np.maximum.accumulate(np.where(opens_document.reshape(-1), rows, 0).astype(np.int32))
    loss_mask = ~ends_document
    if counted_samples is not None:
        loss_mask[counted_samples:] = False
    return MicroBatch(
        input_ids_t=torch.from_numpy(inputs.reshape(-1)),
        labels_t=torch.from_numpy(samples[:, 1:].reshape(-1).copy()),
        loss_mask_t=torch.from_numpy(loss_mask.reshape(-1)),
        document_start_t=torch.from_numpy(document_start),
    )

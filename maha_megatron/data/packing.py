"""Labels, loss mask and document starts, from the tokens alone.

A sample is one or more runs of tokens. A run of n + 1 tokens makes n rows; its last token is only a label. With E the
end-of-document token, a sample of one run, as data.packing: concatenate gives them, and one of two runs and padding:

    tokens            a  b  E  c  d | e      f  g  h | E      i | E      -
    input             a  b  E  c  d          f  g  h          i          E
    label             b  E  c  d  e          g  h  E          E          E
    loss counts       1  1  0  1  1          1  1  1          1          0      what follows an E is no prediction of it
    document start    0  0  0  3  3          5  5  5          8          9      a run, or the row after an E, opens one

So no row predicts a token of another document than its own, and with document bounds none attends to one.
"""

from collections.abc import Sequence

import numpy as np
import torch

from maha_megatron.data.batch import MicroBatch


def pack(
    samples: Sequence[Sequence[np.ndarray]],
    *,
    sequence_tokens: int,
    end_of_document: int,
    document_bounds: bool,
    counted_samples: int | None = None,
) -> MicroBatch:
    """Flatten samples into a micro-batch.

    Args:
        samples: The runs of each sample, of any integer type; a sample's rows are at most sequence_tokens, and the rest
            is padding.
        sequence_tokens: Rows of a sample.
        end_of_document: The token that ends a document; padding reads and would predict it too.
        document_bounds: Whether runs and documents' ends start new documents; otherwise only a sample does.
        counted_samples: The first so many samples count in the loss, the others fill the batch; None: all.

    Returns:
        The micro-batch; its tensors share no memory with `samples`.
    """
    shape = (len(samples), sequence_tokens)
    inputs = np.full(shape, end_of_document, dtype=np.int64)
    labels = np.full(shape, end_of_document, dtype=np.int64)
    opens_document = np.zeros(shape, dtype=bool)
    opens_document[:, 0] = True
    is_padding = np.zeros(shape, dtype=bool)
    for number, runs in enumerate(samples):
        row = 0
        for run in runs:
            end = row + len(run) - 1
            inputs[number, row:end], labels[number, row:end] = run[:-1], run[1:]
            if document_bounds and end < sequence_tokens:
                opens_document[number, end] = True
            row = end
        is_padding[number, row:] = True
    loss_mask = inputs != end_of_document
    if document_bounds:
        opens_document[:, 1:] |= ~loss_mask[:, :-1] & ~is_padding[:, :-1]  # padding is one document
    rows = np.arange(inputs.size, dtype=np.int32)
    document_start = np.maximum.accumulate(np.where(opens_document.reshape(-1), rows, 0).astype(np.int32))
    if counted_samples is not None:
        loss_mask[counted_samples:] = False
    return MicroBatch(
        input_ids_t=torch.from_numpy(inputs.reshape(-1)),
        labels_t=torch.from_numpy(labels.reshape(-1)),
        loss_mask_t=torch.from_numpy(loss_mask.reshape(-1)),
        document_start_t=torch.from_numpy(document_start),
    )

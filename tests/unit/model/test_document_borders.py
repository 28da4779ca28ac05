"""No token attends or predicts across a document's border, whatever the packing: measured on gradients.

The embedding's output is the handle: the gradient of one row's loss with respect to every row's embedding is exactly
zero outside that row's own document.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.indexed import IndexedDatasetBuilder
from maha_megatron.data.order import SourceOrder
from maha_megatron.data.packing import pack
from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import Gpt
from tests.support.model import random_model, tiny_config
from tests.support.pairs import END

S, SAMPLES = 64, 2
ATTENTIONS = {"maha": ("maha",), "dense": ("dense",), "hybrid": ("maha", "dense")}
Place = tuple[int, int] | None
"""Document and token of a row; None for padding."""


def documents() -> list[list[int]]:
    """Short ones, and one longer than a sample."""
    random = np.random.default_rng(3)
    sizes = [*random.integers(1, 40, 12).tolist(), 90]
    return [[*random.integers(3, 100, size).tolist(), END] for size in sizes]


def packed(folder: Path, packing: str, *, document_bounds: bool = True) -> tuple[MicroBatch, list[Place]]:
    """A micro-batch, and where each of its rows comes from."""
    builder = IndexedDatasetBuilder(f"{folder}/a.bin", dtype=np.uint16)
    for document in documents():
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{folder}/a.idx")
    order = SourceOrder(
        f"{folder}/a",
        split="train",
        document_range=(0.0, 1.0),
        seed=1,
        sequence_tokens=S,
        packing=packing,
        cache=folder,
    )
    batch = pack(
        [order.read(sample) for sample in range(SAMPLES)],
        sequence_tokens=S,
        end_of_document=END,
        document_bounds=document_bounds,
    )
    rows: list[Place] = []
    for sample in range(SAMPLES):
        filled: list[Place] = []
        for part in order.origins(sample):
            places = [(part.document, part.offset + token) for token in range(part.tokens)]
            filled += places[:-1] if packing == "best_fit" else places  # the last token of a piece is only a label
        rows += [*filled[:S], *[None] * (S - len(filled))]
    return batch, rows


def reach(model: Gpt, batch: MicroBatch, row: int) -> list[int]:
    """The rows whose embedding the loss of one row depends on."""
    held: list[torch.Tensor] = []

    def hold(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    handle = model.embedding.register_forward_hook(hold)
    only_row_t = torch.zeros_like(batch.loss_mask_t)
    only_row_t[row] = True
    bounds = document_bounds(batch.document_start_t, "cpu")
    loss = model(batch.input_ids_t, batch.labels_t, only_row_t, bounds=bounds)
    (gradient,) = torch.autograd.grad(loss, held)
    handle.remove()
    return torch.nonzero(gradient.reshape(S * SAMPLES, -1).abs().amax(1)).flatten().tolist()


def crossings(model: Gpt, batch: MicroBatch, rows: list[Place]) -> tuple[int, int]:
    """How often a row's loss depends on a row of another document, and on another row of its own."""
    crossed = inside = 0
    for row in range(0, len(rows), 3):
        if not batch.loss_mask_t[row]:
            continue
        for other in reach(model, batch, row):
            same = rows[other] is not None and rows[other][0] == rows[row][0] and other // S == row // S
            crossed += not same
            inside += same and other < row
    return crossed, inside


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_stay_inside_the_document(packing: str, attention: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(model__attention=ATTENTIONS[attention], data__sequence_tokens=S))
    crossed, inside = crossings(model, *packed(tmp_path, packing))
    assert crossed == 0
    assert inside > 300


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_without_bounds_gradients_cross(packing: str, tmp_path: Path) -> None:
    """The measure above can fail."""
    model = random_model(tiny_config(data__sequence_tokens=S))
    assert crossings(model, *packed(tmp_path, packing, document_bounds=False))[0] > 100


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_label_that_counts_is_the_next_token_of_the_document(packing: str, tmp_path: Path) -> None:
    batch, rows = packed(tmp_path, packing)
    texts, counted = documents(), 0
    for row, place in enumerate(rows):
        if not batch.loss_mask_t[row]:
            assert place is None or texts[place[0]][place[1]] == END
            continue
        document, token = place
        assert int(batch.input_ids_t[row]) == texts[document][token]
        assert int(batch.labels_t[row]) == texts[document][token + 1]
        counted += 1
    assert counted > S

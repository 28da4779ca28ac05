"""Scores of chosen rows are those of all logits, for every kind of layer, and a chunk of logits is all there is."""

import pytest
import torch

from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.scoring import score_rows
from tests.support.model import random_batch, random_model, start_rows, tiny_config
from tests.support.one_rank import one_rank  # noqa: F401 (a fixture)

ROWS, STARTS = 60, (0, 17)
KINDS = {
    "dense": {"model__attention": ("dense",)},
    "window": {"model__attention": ("maha",), "maha__windows": (8,)},
    "hybrid": {},
    "maha": {"model__attention": ("maha",)},
    "refined": {"model__attention": ("maha", "refined")},
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_all_logits(kind: str) -> None:
    model = random_model(tiny_config(**KINDS[kind])).eval()
    batch, starts_t = random_batch(tiny_config(), rows=ROWS, starts=STARTS), start_rows(ROWS, STARTS)
    with torch.no_grad():
        logits_tv = model.logits(batch.input_ids_t, document_bounds(starts_t, "cpu"))
    rows_r = torch.arange(59, 2, -1)
    expected_r = torch.nn.functional.cross_entropy(logits_tv, batch.labels_t, reduction="none")[rows_r]
    held = []
    model.output.register_forward_hook(lambda _module, _given, result: held.append(result.shape))
    labels_t = batch.labels_t.clone()
    labels_t[40:] = logits_tv.argmax(1)[40:]
    scores = score_rows(model, batch.input_ids_t, batch.labels_t, starts_t, rows_r)
    assert torch.allclose(scores.loss_r, expected_r, atol=1e-5)
    assert held == [(24, 100), (24, 100), (9, 100)]  # model.loss_chunk_tokens
    right_r = score_rows(model, batch.input_ids_t, labels_t, starts_t, rows_r).right_r
    assert torch.equal(right_r, (logits_tv.argmax(1) == labels_t)[rows_r])
    assert right_r[:20].all()

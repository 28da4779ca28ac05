"""Choosing the next token, and generating with a whole recompute."""

import pytest
import torch

from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.generation import Sampling, choose, generate
from tests.support.model import random_model, tiny_config
from tests.support.one_rank import one_rank  # noqa: F401 (a fixture)

LOGITS_V = torch.tensor([0.5, 0.2, 0.25, 0.05]).log()


def drawn(sampling: Sampling, draws: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(3)
    return {choose(LOGITS_V, sampling, generator) for _ in range(draws)}


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(temperature=0), {0}),
        (Sampling(top_k=2), {0, 2}),
        (Sampling(top_p=0.74), {0, 2}),  # 0.5 is not enough, 0.75 is
        (Sampling(top_p=0.5), {0}),
        (Sampling(top_p=1e-9), {0}),  # the likeliest always stays
        (Sampling(temperature=0.01), {0}),
    ],
)
def test_restrictions(sampling: Sampling, possible: set[int]) -> None:
    assert drawn(sampling) == possible


def test_frequencies_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(3)
    draws = torch.tensor([choose(LOGITS_V, Sampling(), generator) for _ in range(4000)])
    assert torch.allclose(draws.bincount(minlength=4) / 4000, LOGITS_V.exp(), atol=0.03)


@pytest.mark.usefixtures("one_rank")
def test_greedy_text_is_what_the_logits_say_and_the_context_is_bounded() -> None:
    config = tiny_config()
    model = random_model(config)
    greedy = Sampling(temperature=0)
    ids = list(generate(model, [5, 6], tokens=5, context_tokens=4, sampling=greedy, seed=1, end=-1))
    text = [5, 6]
    for chosen in ids:
        seen = torch.tensor(text[-4:])
        with torch.no_grad():
            logits_tv = model.logits(seen, document_bounds(torch.zeros_like(seen), "cpu"))
        assert int(logits_tv[-1].argmax()) == chosen
        text.append(chosen)
    assert len(ids) == 5


@pytest.mark.usefixtures("one_rank")
def test_the_end_of_document_ends_it() -> None:
    model = random_model(tiny_config())
    greedy = Sampling(temperature=0)
    first, *_ = generate(model, [5], tokens=1, context_tokens=64, sampling=greedy, seed=1, end=-1)
    assert list(generate(model, [5], tokens=9, context_tokens=64, sampling=greedy, seed=1, end=first)) == []

"""Sampling text from a model, the whole sequence recomputed for every token: slow, and true to training by design."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from maha_megatron.model.bounds import document_bounds
from maha_megatron.model.gpt import Gpt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability; 1: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def choose(logits_v: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token id.

    Args:
        logits_v: fp32 [v].
        sampling: the restrictions; temperature applies first, then top_k, then top_p.
        generator: source of randomness, on the CPU.
    """
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    ordered_v, ids_v = (logits_v.double().cpu() / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered_v = ordered_v[: sampling.top_k]
    probabilities = ordered_v.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= sampling.top_p] = 0  # the likeliest token always stays
    return int(ids_v[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Gpt, prompt: Sequence[int], *, tokens: int, context_tokens: int, sampling: Sampling, seed: int, end: int
) -> Iterator[int]:
    """Yield up to `tokens` new token ids; ends early when the model ends the document.

    Args:
        model: on one process.
        prompt: token ids of the document so far, at least one.
        tokens: how many at most.
        context_tokens: the model sees this many last tokens, the length it was trained with.
        sampling: how each is chosen.
        seed: of the draws.
        end: the end-of-document token; not yielded.
    """
    assert prompt, "a prompt needs at least one token"
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(tokens):
        seen_t = torch.tensor(ids[-context_tokens:])
        bounds = document_bounds(torch.zeros_like(seen_t), device)
        chosen = choose(model.logits(seen_t.to(device), bounds)[-1], sampling, generator)
        if chosen == end:
            return
        ids.append(chosen)
        yield chosen

"""Micro-batches of random tokens: for measurements of a step that need no data."""

import torch

from maha_megatron.config.derive import accumulation_steps
from maha_megatron.config.schema import Config
from maha_megatron.data.batch import MicroBatch


def random_batches(config: Config, *, seed: int = 0) -> list[MicroBatch]:
    """One process's micro-batches of a step: every sample one document, every label counts; the same again by seed."""
    generator = torch.Generator().manual_seed(seed)
    samples, length = config.train.micro_batch_samples, config.data.sequence_tokens
    starts = torch.arange(samples, dtype=torch.int32).repeat_interleave(length) * length
    batches = []
    for _ in range(accumulation_steps(config, 1)):
        tokens = torch.randint(config.model.vocabulary, (samples, length + 1), generator=generator)
        batches.append(
            MicroBatch(
                input_ids_t=tokens[:, :-1].flatten(),
                labels_t=tokens[:, 1:].flatten(),
                loss_mask_t=torch.ones(samples * length, dtype=torch.bool),
                document_start_t=starts,
            )
        )
    return batches

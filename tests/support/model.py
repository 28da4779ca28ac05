"""A small model, packed batches, and every gradient by logical name."""

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist

from maha_megatron.config.schema import Config, Data, Maha, Model, Parallel, Train
from maha_megatron.model.bounds import DocumentBounds, document_bounds
from maha_megatron.model.gpt import Gpt, build_gpt
from maha_megatron.model.init import initialise_parameters, named_generator
from maha_megatron.model.names import cut_shard, full_shape, logical_names, merge_shards
from maha_megatron.parallel import groups


class Batch(NamedTuple):
    """One packed micro-batch, as Gpt.forward takes it."""

    input_ids_t: torch.Tensor
    labels_t: torch.Tensor
    loss_mask_t: torch.Tensor
    bounds: DocumentBounds


def tiny_config(**changes: object) -> Config:
    """A hybrid of two fp32 layers with grouped heads and a padded vocabulary.

    Args:
        changes: section__key=value, for example model__tied_embeddings=True.
    """
    config = Config(
        model=Model(
            layers=2,
            hidden=32,
            heads=8,
            kv_groups=4,
            head_width=8,
            ffn_hidden=48,
            attention=("maha", "dense"),
            vocabulary=100,
            loss_chunk_tokens=24,
        ),
        maha=Maha(ratio=2, windows=(8, 6, 16)),
        data=Data(sequence_tokens=64),
        train=Train(precision="fp32"),
        parallel=Parallel(timeout_minutes=2.0),
    )
    for path, value in changes.items():
        section, key = path.split("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def random_batch(
    config: Config, *, rows: int, starts: tuple[int, ...] = (0,), seed: int = 5, device: str = "cpu"
) -> Batch:
    """Random tokens and labels in documents that begin at `starts`; about a fifth of the labels is masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocabulary, (rows + 1,), generator=generator)
    mask = torch.rand(rows, generator=generator) > 0.2
    rows_t = (part.clone().to(device) for part in (tokens[:-1], tokens[1:], mask))
    return Batch(*rows_t, document_bounds(start_rows(rows, starts), device))


def start_rows(rows: int, starts: tuple[int, ...]) -> torch.Tensor:
    """document_start_t of documents that begin at `starts`."""
    start_t = torch.zeros(rows, dtype=torch.int32)
    for start in starts:
        start_t[start:] = start
    return start_t


def random_model(config: Config, *, seed: int = 7, device: str = "cpu") -> Gpt:
    """The model with every learned parameter at a random value."""
    model = build_gpt(config, device=device)
    initialise_parameters(model, config)
    randomise_learned(model, seed)
    return model


def randomise_learned(model: Gpt, seed: int) -> None:
    """Give EVERY parameter a random value, keyed by its logical name: the same full tensors at every topology.

    Gains vary around 1, all else around 0 at a size that makes it matter. Many parameters start inert, so an equality
    test on initial weights would prove little.
    """
    rank, size = groups.tensor_rank(), groups.tensor_size()
    for name, parameter in logical_names(model).items():
        shape = full_shape(name, parameter.shape, size)
        noise = torch.randn(shape, generator=named_generator(seed, name))
        full = 1 + 0.3 * noise if "norm" in name or name.endswith("gain") else 0.3 * noise
        with torch.no_grad():
            parameter.copy_(cut_shard(name, full, rank, size))


def full_gradients(model: Gpt) -> dict[str, torch.Tensor]:
    """Every gradient by logical name, whole on every rank."""
    return {name: _gathered(name, parameter.grad) for name, parameter in logical_names(model).items()}


def full_parameters(model: Gpt) -> dict[str, torch.Tensor]:
    """Every parameter by logical name, whole on every rank."""
    return {name: _gathered(name, parameter.detach()) for name, parameter in logical_names(model).items()}


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|."""
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def _gathered(name: str, shard: torch.Tensor) -> torch.Tensor:
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(groups.tensor_size())]
    dist.all_gather(shards, shard.contiguous(), group=groups.tensor_group())
    return merge_shards(name, shards)

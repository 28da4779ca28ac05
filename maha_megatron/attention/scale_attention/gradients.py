"""Gradients of banded scale attention, whatever the scales' outputs are made into: the transposes of chunks.py."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.normalise_rotate import normalise_backward, normalise_rotate_backward, quarter_turn
from maha_megatron.attention.scale_attention.bands import add_tiles
from maha_megatron.attention.scale_attention.chunks import Call, Chunk, product


class Gradients:
    """Gradients of one backward, accumulated chunk by chunk in the dtype of the arithmetic, in a fixed order."""

    def __init__(self, call: Call):
        self.call = call
        self.q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        self.query_gain, self.rho, self.beta = 0, 0, 0
        self.keys = [torch.zeros_like(keys, dtype=call.dtype) for keys in call.keys]
        self.values = [torch.zeros_like(values, dtype=call.dtype) for values in call.values]

    def through_values(self, chunk: Chunk, scale: int, p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """out = P V of one scale: adds the gradient of V and returns that of P [g, rows, n/g, width of the band]."""
        grad_tiles = chunk.to_tiles(grad, scale)
        grad_p = chunk.from_tiles(product(grad_tiles, chunk.tiles(self.call.values, scale).mT))
        grad_values = product(chunk.to_tiles(p, scale).mT, grad_tiles)
        add_tiles(self.values[scale], grad_values, self.call.bands[scale], chunk.start, chunk.rows)
        return grad_p

    def through_logits(
        self, chunk: Chunk, scale: int, rotated: torch.Tensor, grad_logits: torch.Tensor
    ) -> torch.Tensor:
        """S = Q K' of one scale: adds the gradient of K and returns that of the rotated queries [g, rows, n/g, d]."""
        tiles = chunk.to_tiles(grad_logits, scale)
        grad_keys = product(tiles.mT, chunk.to_tiles(rotated, scale))
        add_tiles(self.keys[scale], grad_keys, self.call.bands[scale], chunk.start, chunk.rows)
        return chunk.from_tiles(product(tiles, chunk.tiles(self.call.keys, scale)))

    def add_queries(
        self,
        chunk: Chunk,
        rotated: Sequence[torch.Tensor],
        utility: Sequence[torch.Tensor] = (),
        weight: Sequence[torch.Tensor] = (),
    ) -> None:
        """From every scale: gradients of rotated queries [g, rows, n/g, d] and utilities, weights [g, rows, n/g].

        The last two where the call has rho.
        """
        straight, turned = torch.zeros_like(chunk.normal), torch.zeros_like(chunk.normal)
        for scale, grad in enumerate(rotated):
            cos, sin = chunk.turns[scale]
            straight.addcmul_(grad, cos)
            turned.addcmul_(grad, sin)
        grad = straight.sub_(quarter_turn(turned))
        if self.call.rho is not None:
            grad_utility = torch.stack(utility, dim=-1)
            # a change of all utilities alike changes nothing: take out what rounding left in that direction
            grad_utility -= torch.stack(weight, dim=-1) * grad_utility.sum(-1, keepdim=True)
            grad += torch.einsum("grml,lgmd->grmd", grad_utility, chunk.rho)
            self.rho += torch.einsum("grml,grmd->lgmd", grad_utility, chunk.normal)
            self.beta += grad_utility.sum(1)
        grad, grad_gain = normalise_backward(grad, chunk.raw, chunk.gain, self.call.spec.norm_epsilon)
        self.query_gain += grad_gain.sum(1)
        chunk.write(self.q, grad)

    def learned(self) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query gain, rho and beta."""
        call = self.call
        query_gain = self.query_gain.flatten(0, 1).to(call.query_gain.dtype)
        if call.rho is None:
            return query_gain, None, None
        return (
            query_gain,
            self.rho.flatten(1, 2).to(call.rho.dtype),
            self.beta.flatten(0, 1).T.to(call.beta.dtype),
        )

    def level(self, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of a level [slots, 2, g, d], through the keys' rotation and normalisation, and of the key gain."""
        call, level = self.call, self.call.levels[scale]
        grad = torch.empty_like(level)
        grad_keys = call.slots_view(self.keys, scale)
        turn, epsilon = call.key_rotation(scale), call.spec.norm_epsilon
        grad_gain = normalise_rotate_backward(grad_keys, level[:, 0], call.key_gain, *turn, epsilon, grad[:, 0])
        grad[:, 1] = call.slots_view(self.values, scale)
        return grad, grad_gain

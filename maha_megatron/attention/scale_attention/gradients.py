"""Gradients of banded scale attention, whatever the scales' outputs are made into: the transposes of chunks.py."""

from collections.abc import Sequence

import torch

from maha_megatron.attention.normalise_rotate import normalise_backward, normalise_rotate_backward, quarter_turn
from maha_megatron.attention.scale_attention.bands import add_tiles
from maha_megatron.attention.scale_attention.chunks import Call, Chunk, product


class Gradients:
    """Gradients of one backward, accumulated chunk by chunk in the dtype of the arithmetic, in a fixed order.

    Of keys and values only the chunk's own span is held: what the next chunk no longer reads is finished, and goes
    through the keys' rotation and normalisation into the gradient of its level.

        chunk i       [lookback | rows i]                 `start_chunk` adds what it shares with chunk i-1
        chunk i+1            [lookback | rows i+1]
                      [ done ]
    """

    def __init__(self, call: Call):
        self.call = call
        self.q = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        self.query_gain, self.rho, self.beta = 0, 0, 0
        contiguous = {"memory_format": torch.contiguous_format}
        self.levels = [
            (torch.empty_like(keys, **contiguous), torch.empty_like(values, **contiguous))
            for keys, values in zip(call.keys, call.values, strict=True)
        ]
        self.key_gain = torch.zeros_like(call.key_gain, dtype=call.dtype)
        self.spans = [range(0)] * call.spec.scales
        self.keys, self.values = ([None] * call.spec.scales for _ in range(2))
        if call.opened is not None:
            self.opened = [torch.zeros_like(x, dtype=call.dtype) for x in call.opened.operands]

    def start_chunk(self, chunk: Chunk) -> None:
        """Move every scale's span to that of `chunk`, and begin the sums over scales for its queries."""
        self._straight, self._turned = torch.zeros_like(chunk.normal), torch.zeros_like(chunk.normal)
        self._move([band.span(chunk.start, chunk.rows) for band in self.call.bands])

    def finish(self) -> None:
        """After the last chunk: `levels` and `key_gain` are then whole; the last of `levels` is what was opened."""
        self._move([range(span.stop, span.stop) for span in self.spans])
        if self.call.opened is not None:
            opened, key_gain = self.call.opened.finished(self.call, self.opened)
            self.levels.append(opened)
            self.key_gain += key_gain

    def _move(self, spans: list[range]) -> None:
        if self.keys[0] is not None:
            self._write([range(held.start, span.start) for held, span in zip(self.spans, spans, strict=True)])
        for scale, (held, span) in enumerate(zip(self.spans, spans, strict=True)):
            for grads in (self.keys, self.values):
                grads[scale] = self.call.moved(grads[scale], held, span, self.call.dtype)
        self.spans = spans

    def _write(self, done: list[range]) -> None:
        """The held gradients of the first slots of every scale, into its level."""
        call = self.call
        entries = [call.real(scale, slots) for scale, slots in enumerate(done)]
        if not any(here.stop - here.start for here in entries):
            return
        inside = [call.inside(scale, slots, entries[scale]) for scale, slots in enumerate(done)]
        grad_keys = torch.cat([keys[:, here] for keys, here in zip(self.keys, inside, strict=True)], dim=1)
        raw = torch.cat([keys[here] for keys, here in zip(call.keys, entries, strict=True)])
        made, turn, epsilon = torch.empty_like(raw), call.rotation_of(entries), call.spec.norm_epsilon
        self.key_gain += normalise_rotate_backward(grad_keys.transpose(0, 1), raw, call.key_gain, *turn, epsilon, made)
        for scale, grads in enumerate(made.split([here.stop - here.start for here in entries])):
            keys, values = self.levels[scale]
            keys[entries[scale]] = grads
            values[entries[scale]] = self.values[scale][:, inside[scale]].transpose(0, 1)

    def through_values(self, chunk: Chunk, scale: int, p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """out = P V of one scale: adds the gradient of V and returns that of P [g, rows, n/g, width of the band]."""
        grad_tiles = chunk.to_tiles(grad, scale, self.call.fast)
        grad_values = product(chunk.to_tiles(p, scale, self.call.fast).mT, grad_tiles)
        self._add(1, scale, grad_values, chunk)
        del grad_values  # as large as the next product
        return chunk.from_tiles(product(grad_tiles, chunk.tiles(scale)[1].mT))

    def through_logits(self, chunk: Chunk, scale: int, rotated: torch.Tensor, grad_logits: torch.Tensor) -> None:
        """S = Q K' of one scale: adds the gradients of K and, through their rotation, of the chunk's queries."""
        tiles = chunk.to_tiles(grad_logits, scale, self.call.fast)
        grad_keys = product(tiles.mT, chunk.to_tiles(rotated, scale, self.call.fast))
        self._add(0, scale, grad_keys, chunk)
        grad = chunk.from_tiles(product(tiles, chunk.tiles(scale)[0].to(self.call.fast)))
        cos, sin = chunk.turns[scale]
        self._straight.addcmul_(grad, cos)
        self._turned.addcmul_(grad, sin)

    def _add(self, kind: int, scale: int, grad: torch.Tensor, chunk: Chunk) -> None:
        """Adds the gradient of the tiles of a scale's keys (kind 0) or values (1) where they came from."""
        if scale == self.call.spec.scales:
            self.call.opened.add(self.opened[kind], grad, chunk)
        else:
            add_tiles((self.keys, self.values)[kind][scale], grad, self.call.bands[scale], chunk.rows)

    def add_queries(
        self, chunk: Chunk, utility: Sequence[torch.Tensor] = (), weight: Sequence[torch.Tensor] = ()
    ) -> None:
        """After all scales: writes the queries' gradient. Given where the call has rho: gradients of every scale's
        utility, and its weight, [g, rows, n/g] each.
        """
        grad = self._straight.sub_(quarter_turn(self._turned))
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
        """Gradients of query gain, key gain, rho and beta."""
        call = self.call
        query_gain = self.query_gain.flatten(0, 1).to(call.query_gain.dtype)
        key_gain = self.key_gain.to(call.key_gain.dtype)
        if call.rho is None:
            return query_gain, key_gain, None, None
        return (
            query_gain,
            key_gain,
            self.rho.flatten(1, 2).to(call.rho.dtype),
            self.beta.flatten(0, 1).T.to(call.beta.dtype),
        )

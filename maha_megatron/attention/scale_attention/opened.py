"""What a row opens: its best blocks of a coarse scale, and their keys of a finer one as one more scale of attention.

    scale from_scale    [  0  ][  1  ][  2  ][  3  ][  4  ][  5  ][  6  ]    those that a row sees have a score
    may be opened          o      o      o      o      o                     wholly beyond the window of to_scale
    2 are opened                  x                    x                     by each row and KV group
    keys of to_scale           |||||||              |||||||                  read as one more scale, the last

A block's score is its probability within its scale, summed over the group's query heads: the share of the attention to
that scale that falls on it. Every head has one vote to split, whatever the size of its logits; of logits, which have no
common zero, the sum would be decided by the loudest head. Scores choose and have no gradient; what they chose has.

Each row is a tile of its own: keys are gathered, [g * rows, blocks * children, d], for a chunk of rows. Gradients go
back to the keys in a fixed order: by index_add on a CPU, one row after another; by index_put on CUDA, which sorts.
"""

import torch

from maha_megatron.attention.normalise_rotate import normalise_rotate, normalise_rotate_backward, rotation
from maha_megatron.attention.slots import first_slot_of, openable_slots, slots_of
from maha_megatron.attention.spec import MahaSpec
from maha_megatron.scales import slot_count, stride

# numbers of opened keys that exist at once, and as many of values
_GATHERED_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}


def chunk_rows(groups: int, q_tnd: torch.Tensor, spec: MahaSpec) -> int:
    """Rows of a chunk whose opened keys may exist at once."""
    keys = spec.refine.blocks * stride(spec.ratio, spec.refine.from_scale - spec.refine.to_scale)
    return max(_GATHERED_PER_CHUNK["cuda" if q_tnd.is_cuda else "cpu"] // (groups * keys * q_tnd.shape[-1]), 1)


def best_blocks(scores: torch.Tensor, openable: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the `blocks` highest scores among the openable, at a tie the first: int64 [..., m].

    Args:
        scores, openable: floating and bool [..., slots].

    Returns:
        The places, m = min(blocks, slots) of them, best first; and whether each is openable, bool, since there may be
        fewer.
    """
    hidden = scores.masked_fill(~openable, -torch.inf)
    score, place = hidden.sort(dim=-1, descending=True, stable=True)  # topk leaves open which of equals it takes
    return place[..., :blocks], score[..., :blocks] != -torch.inf


class Opened:
    """The keys and values of refine.to_scale that the rows of one call may open, and what each has opened.

    first_child: int32 [g, rows of all chunks, blocks], where the first key of an opened block lies; -1 for none. Made
    by `choose`, chunk by chunk, and kept for backward.
    """

    def __init__(self, call, keys: torch.Tensor, values: torch.Tensor, first_child: torch.Tensor | None):
        """Of a Call (chunks.py); keys, values [past + ceil(t / R), g, d]."""
        spec, rows = call.spec, len(call.q)
        refine = self.refine = spec.refine
        self.children = stride(spec.ratio, refine.from_scale - refine.to_scale)
        self.strides = stride(spec.ratio, refine.from_scale), stride(spec.ratio, refine.to_scale)
        self.past = len(keys) - slot_count(rows, self.strides[1])
        self.keys, self.values = keys, values
        slots = slots_of(call.document[:rows], self.strides[1], self.past)
        position = (slots.last_row - slots.document).double() / spec.rotary_stride(refine.to_scale)
        self.turn = rotation(position[:, None], keys.shape[-1], spec.rope_base, call.dtype)
        made = torch.empty(keys.shape, dtype=call.operand, device=keys.device)
        normalise_rotate(keys, call.key_gain, *self.turn, spec.norm_epsilon, made)
        self.operands = [x.transpose(0, 1).flatten(0, 1) for x in (made, values.to(call.fast))]
        if first_child is None:
            shape = (call.groups, call.plan.padded_rows, refine.blocks)
            first_child = torch.full(shape, -1, dtype=torch.int32, device=keys.device)
        self.first_child = first_child

    def choose(self, chunk, p: torch.Tensor) -> None:
        """Open the best blocks of a chunk's rows, from the probabilities p [g, rows, n/g, width of the band] of the
        slots of refine.from_scale.
        """
        spec, row, document = chunk.call.spec, chunk.row, chunk.document
        slot = torch.arange(p.shape[-1], device=row.device)
        slot = slot + chunk.call.bands[self.refine.from_scale].first_slot(row, chunk.start)[:, None]
        numbers = (spec.ratio, spec.windows, self.refine.from_scale, self.refine.to_scale)
        first, end = (edge[:, None] for edge in openable_slots(row, document, *numbers))
        real = row[:, None] < len(chunk.call.q)
        place, found = best_blocks(p.sum(2), (first <= slot) & (slot < end) & real, self.refine.blocks)
        slot = slot.expand(len(p), -1, -1).gather(2, place)
        coarse, fine = (first_slot_of(document, step)[:, None] for step in self.strides)
        child = self.past + fine + (slot - coarse) * self.children
        self.of(chunk)[..., : child.shape[-1]] = child.masked_fill(~found, -1)

    def of(self, chunk) -> torch.Tensor:
        """first_child of a chunk's rows."""
        return self.first_child[:, chunk.start : chunk.start + chunk.rows]

    def bias(self, chunk) -> torch.Tensor:
        """What to add to the logits of a chunk: -inf where nothing was opened; [g, rows, 1, blocks * children]."""
        nothing = (self.of(chunk) < 0).repeat_interleave(self.children, dim=-1)
        return chunk.normal.new_zeros(nothing.shape).masked_fill_(nothing, -torch.inf)[:, :, None]

    def gather(self, chunk) -> list[torch.Tensor]:
        """Operands of a chunk's rows: keys (normalised, rotated) and values [g * rows, blocks * children, d]."""
        index = self._index(chunk)
        return [x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in self.operands]

    def add(self, total: torch.Tensor, grad: torch.Tensor, chunk) -> None:
        """The transpose of `gather` for one of the operands: adds grad to the total [g * entries, d], in a fixed order.

        What is gathered for nothing, where a row has opened less, has gradient 0.
        """
        index, grad = self._index(chunk).flatten(), grad.flatten(0, 1).to(total.dtype)
        if total.is_cuda:
            total.index_put_((index,), grad, accumulate=True)
        else:
            total.index_add_(0, index, grad)

    def _index(self, chunk) -> torch.Tensor:
        """Where the operands of a chunk's rows lie: [g * rows, blocks * children]."""
        entries, first = len(self.keys), self.of(chunk).long()
        child = first[..., None] + torch.arange(self.children, device=first.device)
        group = torch.arange(len(first), device=first.device)[:, None, None, None]
        return (child.clamp_(0, entries - 1) + group * entries).flatten(0, 1).flatten(1)

    def finished(self, call, totals: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Gradients of keys and values from those of the operands, [g * entries, d] each, and that of the key gain."""
        grad_keys, grad_values = (total.unflatten(0, (call.groups, -1)).transpose(0, 1) for total in totals)
        made = torch.empty_like(self.keys, memory_format=torch.contiguous_format)
        epsilon = call.spec.norm_epsilon
        grad_gain = normalise_rotate_backward(grad_keys, self.keys, call.key_gain, *self.turn, epsilon, made)
        return [made, grad_values.to(self.values.dtype)], grad_gain

"""The pyramid's kernels: which buffers they read and write (triton.py calls them)."""

from collections.abc import Sequence

import torch
import triton

from maha_megatron.attention.pyramid.triton_pool import Pair, Pieces, Walk, pool_gradient_kernel, pool_kernel
from maha_megatron.attention.scale_attention.triton_arguments import of_scales
from maha_megatron.attention.triton_launch import Launch
from maha_megatron.attention.triton_sums import adding_up
from maha_megatron.scales import slot_count, stride

_NUMBERS_PER_TILE = 8192
_ENTRIES = 64  # of 128 channels in a program; a launch makes all scales of which a block has no more
Level = tuple[torch.Tensor, torch.Tensor]


class Call:
    """One call's tensors and numbers, as the kernels take them."""

    def __init__(
        self,
        downsampling: str,
        ratio: int,
        document_start: torch.Tensor,
        learned: Sequence[torch.Tensor],
        like: torch.Tensor,
        past_slots: Sequence[int],
    ):
        self.downsampling, self.ratio, self.scales = downsampling, ratio, len(past_slots)
        self.document_start, self.like = document_start.contiguous(), like
        self.learned, self.past_slots = [x.contiguous() for x in learned], tuple(past_slots)
        self.g, self.d = like.shape[1:]
        self.slots = [slot_count(len(document_start), stride(ratio, scale)) for scale in range(self.scales)]

    def empty(self, scale: int) -> Level:
        """Room for one level."""
        shape, like = (self.past_slots[scale] + self.slots[scale], self.g, self.d), self.like
        return tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def walks(self) -> list[Walk]:
        """Of every launch, fine to coarse."""
        found, finest, children = [], 0, triton.next_power_of_2(self.ratio)
        depth = max(depth for depth in range(1, 7) if depth == 1 or stride(self.ratio, depth) <= _ENTRIES)
        while finest < self.scales - 1:
            coarsest = min(finest + depth, self.scales - 1)
            block = stride(self.ratio, coarsest - finest)
            entries = max(1, _ENTRIES * 128 // self.d // block) * block
            most = max(1, _NUMBERS_PER_TILE // (children * self.d))
            pooled = [entries // stride(self.ratio, max(scale - finest, 0)) for scale in range(coarsest + 1)]
            found.append(
                Walk(
                    method=self.downsampling,
                    ratio=self.ratio,
                    width=self.d,
                    past_slots=self.past_slots,
                    finest=finest,
                    coarsest=coarsest,
                    entries=entries,
                    tiles=tuple(min(triton.next_power_of_2(slots), most) for slots in pooled),
                    children=children,
                )
            )
            finest = coarsest
        return found

    def _programs(self, walk: Walk) -> int:
        """Along the sequence."""
        return triton.cdiv(self.slots[walk.finest], walk.entries)

    def _launch(self, kernel: triton.JITFunction, walk: Walk, arguments: dict[str, object], **options: int) -> Launch:
        pieces = Pieces(self.document_start, len(self.document_start), self.g, self.g)
        arguments |= {"learned": tuple(self.learned), "pieces": pieces, "WALK": walk}
        grid, device = (self._programs(walk) * 2 * self.g,), self.like.device
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options=options, device=device)

    def pooling(self, walk: Walk, levels: Sequence[Level]) -> Launch:
        """The launch that writes the levels of a walk but its finest."""
        return self._launch(pool_kernel, walk, {"levels": _pair(levels)}, num_warps=4)

    def empty_parts(self, walk: Walk) -> list[torch.Tensor]:
        """Room for the learned tensors' gradients in parts, fp32 [scales of a launch, programs, ...]."""
        shape, wide = (walk.coarsest - walk.finest, self._programs(walk)), {"dtype": torch.float32}
        return [torch.empty((*shape, *x.shape[1:]), device=x.device, **wide) for x in self.learned]

    def gradient(
        self,
        walk: Walk,
        levels: Sequence[Level],
        grads: Sequence[Level],
        totals: Sequence[Level],
        parts: Sequence[torch.Tensor],
    ) -> Launch:
        """The launch that adds what the levels of a walk ask of the finer ones; `totals` may be `grads`."""
        arguments = {
            "levels": _pair(levels),
            "grads": _pair(grads),
            "totals": _pair(totals),
            "parts": tuple(parts),
            "IN_PLACE": totals is grads,
        }
        # two programs of gates fit on a multiprocessor with so many registers; left alone, Triton's compiler takes 165
        registers = {"maxnreg": 128} if self.downsampling == "gated" else {}
        return self._launch(pool_gradient_kernel, walk, arguments, num_warps=8, **registers)

    def forward(self, rows: Level, older: Sequence[Level]) -> list[Level]:
        """All levels; `rows` and `older` are what the caller has of scale 0 and in front of the coarser ones."""
        levels = [rows, *(self.empty(scale) for scale in range(1, self.scales))]
        for pooled, entries in zip(levels[1:], older, strict=False):
            for to, those in zip(pooled, entries, strict=True):
                to[: len(those)] = those
        for walk in self.walks():
            self.pooling(walk, levels).run()
        return levels

    def backward(
        self, levels: Sequence[Level], grads: Sequence[Level], *, in_place: bool = False
    ) -> tuple[list[Level], list[torch.Tensor]]:
        """Whole gradients of all levels, and those of the learned tensors; `grads`: what is given of each level.

        With `in_place`, the former are written over the latter.
        """
        totals = grads if in_place else [*(self.empty(scale) for scale in range(self.scales - 1)), grads[-1]]
        learned = [torch.empty_like(x, dtype=torch.float32) for x in self.learned]
        sums = []
        for walk in reversed(self.walks()):
            parts = self.empty_parts(walk)
            self.gradient(walk, levels, grads, totals, parts).run()
            sums += [(part, whole[walk.finest : walk.coarsest]) for part, whole in zip(parts, learned, strict=True)]
        if sums:
            adding_up(sums).run()
        return totals, [whole.to(x.dtype) for whole, x in zip(learned, self.learned, strict=True)]


def pairs(tensors: Sequence[torch.Tensor]) -> list[Level]:
    """Keys and values that come in turn, level by level."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _pair(levels: Sequence[Level]) -> Pair:
    return Pair(*(of_scales(tensors) for tensors in zip(*levels, strict=True)))

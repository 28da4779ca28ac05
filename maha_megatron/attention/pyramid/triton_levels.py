"""The pyramid's kernels: which buffers they read and write (triton.py and ../triton_sequence.py call them)."""

import copy
from collections.abc import Sequence

import torch
import triton

from maha_megatron.attention.pyramid.triton_pool import Pair, Pieces, Walk, pool_gradient_kernel, pool_kernel
from maha_megatron.attention.scale_attention.triton_arguments import Preparation, Shape, of_scales
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
        self.learned_g = self.g
        self.slots = [slot_count(len(document_start), stride(ratio, scale)) for scale in range(self.scales)]
        self.walks = self._walks()

    def of_groups(self, groups: slice) -> "Call":
        """The call of some KV groups."""
        part = copy.copy(self)
        part.like, part.learned = self.like[:, groups], [x[:, :, groups] for x in self.learned]
        part.g = part.like.shape[1]
        return part

    def empty(self, scale: int) -> Level:
        """Room for one level."""
        shape, like = (self.past_slots[scale] + self.slots[scale], self.g, self.d), self.like
        return tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def _walks(self) -> list[Walk]:
        """Of every launch, fine to coarse."""
        found, finest, children = [], 0, triton.next_power_of_2(self.ratio)
        depth = max(depth for depth in range(1, 7) if depth == 1 or stride(self.ratio, depth) <= _ENTRIES)
        while finest < self.scales - 1:
            coarsest = min(finest + depth, self.scales - 1)
            block = stride(self.ratio, coarsest - finest)
            entries = max(1, _ENTRIES * 128 // self.d // block) * block
            most = max(1, _NUMBERS_PER_TILE // (children * self.d))
            here = [triton.next_power_of_2(entries // stride(self.ratio, i)) for i in range(coarsest - finest + 1)]
            found.append(
                Walk(
                    method=self.downsampling,
                    ratio=self.ratio,
                    width=self.d,
                    past_slots=self.past_slots,
                    finest=finest,
                    coarsest=coarsest,
                    entries=entries,
                    tiles=(here[0] // 2,) * (finest + 1) + tuple(min(slots, most) for slots in here[1:]),
                    children=children,
                )
            )
            finest = coarsest
        return found

    def _programs(self, walk: Walk) -> int:
        """Along the sequence."""
        return triton.cdiv(self.slots[walk.finest], walk.entries)

    def _launch(self, kernel: triton.JITFunction, walk: Walk, arguments: dict[str, object], **options: int) -> Launch:
        pieces = Pieces(self.document_start, len(self.document_start), self.g, self.learned_g)
        arguments |= {"learned": tuple(self.learned), "pieces": pieces, "WALK": walk}
        grid, device = (self._programs(walk) * 2 * self.g,), self.like.device
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options=options, device=device)

    def pooling(
        self, walk: Walk, levels: Sequence[Level], to: Preparation | None = None, shape: Shape | None = None
    ) -> Launch:
        """The launch that writes the levels of a walk but its finest; with `to`, prepared keys too, of all its levels
        that no finer walk has made. `shape`: as of the kernels that prepare keys.
        """
        arguments = {"levels": _pair(levels), "to": to, "SHAPE": shape}
        return self._launch(pool_kernel, walk, arguments, num_warps=4)

    def empty_parts(self, portions: int = 1) -> list[torch.Tensor]:
        """Room for the learned tensors' gradients in parts, by walk, then by tensor.

        Each fp32 [portions of KV groups, scales of a launch, programs, 2, groups of a portion, ...].
        """
        return [
            torch.empty(
                (portions, walk.coarsest - walk.finest, self._programs(walk), 2, self.g // portions, *x.shape[3:]),
                dtype=torch.float32,
                device=x.device,
            )
            for walk in self.walks
            for x in self.learned
        ]

    def of_learned(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The learned tensors' gradients from sums over the programs of `empty_parts`, the first two dimensions one."""
        found = []
        for at, x in enumerate(self.learned):
            of_walks = []
            for walk, whole in zip(self.walks, sums[at :: len(self.learned)], strict=True):
                of_portions = whole.unflatten(0, (-1, walk.coarsest - walk.finest)).movedim(0, 2)
                of_walks.append(of_portions.flatten(2, 3))
            found.append(torch.cat(of_walks).to(x.dtype))
        return found

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
        self.pool(levels)
        return levels

    def pool(self, levels: Sequence[Level], to: Preparation | None = None, shape: Shape | None = None) -> None:
        """Writes all levels but the finest, with `to` also prepared keys; see `pooling`."""
        for walk in self.walks:
            self.pooling(walk, levels, to, shape).run()

    def add_gradients(
        self,
        levels: Sequence[Level],
        grads: Sequence[Level],
        totals: Sequence[Level],
        parts: Sequence[torch.Tensor],
    ) -> None:
        """Writes whole gradients of all levels but the coarsest, where `grads` are given, and the learned tensors' in
        parts, those of `empty_parts` of one portion. `totals` may be `grads`.
        """
        count = len(self.learned)
        for at in range(len(self.walks) - 1, -1, -1):
            these = parts[at * count : (at + 1) * count]
            self.gradient(self.walks[at], levels, grads, totals, these).run()

    def backward(self, levels: Sequence[Level], grads: Sequence[Level]) -> tuple[list[Level], list[torch.Tensor]]:
        """Whole gradients of all levels, and those of the learned tensors; `grads`: what is given of each level."""
        totals, parts = [*(self.empty(scale) for scale in range(self.scales - 1)), grads[-1]], self.empty_parts()
        self.add_gradients(levels, grads, totals, [part[0] for part in parts])
        lots = [part.flatten(0, 1) for part in parts]
        sums = [part.new_empty(len(part), *part.shape[2:]) for part in lots]
        if sums:
            adding_up(zip(lots, sums, strict=True)).run()
        return totals, self.of_learned(sums)


def pairs(tensors: Sequence[torch.Tensor]) -> list[Level]:
    """Keys and values that come in turn, level by level."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _pair(levels: Sequence[Level]) -> Pair:
    return Pair(*(of_scales(tensors) for tensors in zip(*levels, strict=True)))

"""The pyramid's kernels level by level: which buffers they read and write (triton.py calls them)."""

from collections.abc import Sequence

import torch
import triton

from maha_megatron.attention.pyramid.triton_pool import Pair, Pieces, pool_gradient_kernel, pool_kernel
from maha_megatron.attention.triton_launch import Launch
from maha_megatron.attention.triton_sums import adding_up
from maha_megatron.scales import slot_count, stride

_NUMBERS_PER_TILE = 4096  # 32 a thread
_GROUPS = 4  # of one program: they share the slot arithmetic
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
        self.learned, self.past_slots = [x.contiguous() for x in learned], past_slots
        self.g, self.d = like.shape[1:]
        self.slots = [slot_count(len(document_start), stride(ratio, scale)) for scale in range(self.scales)]
        self.children = triton.next_power_of_2(ratio)
        self.tile = max(1, _NUMBERS_PER_TILE // (self.children * self.d))

    def empty(self, scale: int) -> Level:
        """Room for one level."""
        shape, like = (self.past_slots[scale] + self.slots[scale], self.g, self.d), self.like
        return tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def _launch(self, kernel: triton.JITFunction, scale: int, slots: int, arguments: dict[str, object]) -> Launch:
        """Of a kernel that makes `scale` from the finer scale, or its gradient."""
        arguments |= {
            "learned": tuple(x[scale - 1] for x in self.learned),
            "pieces": Pieces(
                self.document_start,
                len(self.document_start),
                scale,
                self.past_slots[scale - 1],
                self.past_slots[scale],
            ),
            "g": self.g,
            "METHOD": self.downsampling,
            "RATIO": self.ratio,
            "CHILDREN": self.children,
            "WIDTH": self.d,
            "TILE": self.tile,
            "GROUPS": _GROUPS,
        }
        grid = (triton.cdiv(slots, self.tile), triton.cdiv(self.g, _GROUPS), 2)
        options, device = {"num_warps": 4}, self.like.device
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options=options, device=device)

    def pooling(self, scale: int, finer: Level, pooled: Level) -> Launch:
        arguments = {"finer": _pair(finer), "pooled": _pair(pooled)}
        return self._launch(pool_kernel, scale, self.slots[scale], arguments)

    def gradient(self, scale: int, finer: Level, grad_pooled: Level, grad_finer: Level, grad_total: Level):
        """The launch that adds what `scale` asks of the finer level, and the learned tensors' gradients in parts."""
        before = triton.cdiv(self.past_slots[scale - 1], self.ratio)
        slots = before + self.slots[scale]
        parts = [
            torch.empty((triton.cdiv(slots, self.tile), *x.shape[1:]), dtype=torch.float32, device=x.device)
            for x in self.learned
        ]
        arguments = {
            "finer": _pair(finer),
            "grad_pooled": _pair(grad_pooled),
            "grad_finer": _pair(grad_finer),
            "grad_total": _pair(grad_total),
            "parts": tuple(parts),
            "slots_in_front": before,
        }
        return self._launch(pool_gradient_kernel, scale, slots, arguments), parts

    def forward(self, rows: Level, older: Sequence[Level]) -> list[Level]:
        """All levels; `rows` and `older` are what the caller has of scale 0 and in front of the coarser ones."""
        levels = [rows]
        for scale in range(1, self.scales):
            pooled = self.empty(scale)
            for to, entries in zip(pooled, older[scale - 1] if older else (), strict=False):
                to[: len(entries)] = entries
            self.pooling(scale, levels[-1], pooled).run()
            levels.append(pooled)
        return levels

    def backward(
        self, levels: Sequence[Level], grads: Sequence[Level], *, in_place: bool = False
    ) -> tuple[list[Level], list[torch.Tensor]]:
        """Whole gradients of all levels, and those of the learned tensors; `grads`: what is given of each level.

        With `in_place`, the former are written over the latter.
        """
        totals, learned = [grads[-1]], [torch.empty_like(x, dtype=torch.float32) for x in self.learned]
        sums = []
        for scale in range(self.scales - 1, 0, -1):
            total = grads[scale - 1] if in_place else self.empty(scale - 1)
            launch, parts = self.gradient(scale, levels[scale - 1], totals[0], grads[scale - 1], total)
            launch.run()
            totals.insert(0, total)
            sums += [(part, whole[scale - 1]) for part, whole in zip(parts, learned, strict=True)]
        if sums:
            adding_up(sums).run()
        return totals, [whole.to(x.dtype) for whole, x in zip(learned, self.learned, strict=True)]


def pairs(tensors: Sequence[torch.Tensor]) -> list[Level]:
    """Keys and values that come in turn, level by level."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _pair(level: Level) -> Pair:
    keys, values = level
    return Pair(level, (keys.stride(0), values.stride(0)), (keys.stride(1), values.stride(1)))

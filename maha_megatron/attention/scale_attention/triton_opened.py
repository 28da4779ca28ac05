"""A refined layer by kernels: the joint attention over the scales, and opened keys as one more part of its softmax.

    forward     prepare_keys -> attend_kernel -> choose_kernel -> a sort;
                turn_opening_kernel -> attend_opened_kernel -> join_kernel
    backward    a sort; prepare_keys -> turn_opening_kernel -> opened_gradient_kernel -> add_runs_kernel
                -> query_gradient_kernel -> key_gradient_kernel (-> add_parts_kernel) -> add_up_kernel

What stands behind a semicolon goes by a few KV groups. A softmax over more keys is one
over the scales, joined with that over the others; for backward the output and log-sum-exp of all are enough, so that
the scales' own kernels serve, and take what opened keys ask of queries and of keys of to_scale from buffers.

Kept for backward: q, the levels, out, one number per row and head, and what was chosen. Every sum has a fixed order.
"""

from typing import NamedTuple

import torch

import maha_megatron.attention.scale_attention.triton_joint as joint
from maha_megatron.attention.scale_attention.triton_arguments import (
    Lists,
    OpenedKeys,
    OpenedOutputs,
    OpenedQueries,
    OpeningQueries,
)
from maha_megatron.attention.scale_attention.triton_choice import choose_kernel
from maha_megatron.attention.scale_attention.triton_opened_forward import (
    attend_opened_kernel,
    join_kernel,
    turn_opening_kernel,
)
from maha_megatron.attention.scale_attention.triton_opened_gradient import add_runs_kernel, opened_gradient_kernel
from maha_megatron.attention.scale_attention.triton_tuning import Tiles
from maha_megatron.attention.triton_launch import Launch, lined_up
from maha_megatron.scales import stride

_ROWS = Tiles(rows=32)


class Forward(NamedTuple):
    """out [t, n, d]; lse [n, t] of the whole softmax, scale_lse [t, n, L], None unless weights are asked for, and
    opened_lse [n, t] of its parts, in units of log 2; chosen as in Lists.
    """

    out: torch.Tensor
    lse: torch.Tensor
    scale_lse: torch.Tensor | None
    opened_lse: torch.Tensor
    chosen: torch.Tensor


class Call(joint.Call):
    """One call's tensors and numbers."""

    @property
    def _children(self) -> int:
        """Lines of a tile of children: a power of 2, as products want them."""
        refine = self.spec.refine
        return max(_power_of_2(stride(self.spec.ratio, refine.from_scale - refine.to_scale)), 16)

    @property
    def _choices(self) -> int:
        return self.rows * self.spec.refine.blocks

    def _run_grid(self) -> tuple[int, int]:
        return -(-self._choices // self.tuning.run), self.g

    def choice(self, keys: torch.Tensor, chosen: torch.Tensor) -> Launch:
        tiles, heads = self.tuning.choice, _power_of_2(self.n // self.g)
        rows = max(tiles.rows // heads, 1)
        tensors = (self._queries(), self._keys(keys), self._places(), chosen)
        sizes = {"ROWS": rows, "HEADS": heads, "KEYS": tiles.keys, "PLACES": _power_of_2(self.spec.refine.blocks)}
        return self._launch(choose_kernel, (-(-self.rows // rows), self.g), tiles, *tensors, **sizes)

    def lists(self, chosen: torch.Tensor) -> Lists:
        length, entries = self._choices, self.entries[self.spec.refine.from_scale] + 1
        first = torch.arange(1, self.g * entries, entries, dtype=torch.int32, device=chosen.device)
        keys, order = torch.sort((chosen.view(self.g, -1) + first[:, None]).flatten(), stable=True)
        return Lists(chosen, keys.view(self.g, -1), order.view(self.g, -1), length, entries)

    def opening(self, rows_of: tuple[torch.Tensor, ...] | None, made: OpeningQueries) -> Launch:
        """`rows_of`: in backward out, log-sum-exp and dO."""
        if rows_of is not None:
            rows_of = (joint.of_rows(rows_of[0]), rows_of[1], joint.of_rows(rows_of[2]))
        grid = (-(-self.rows // _ROWS.rows), self.n)
        tensors = (self._queries(), self._places(), rows_of, made)
        return self._launch(turn_opening_kernel, grid, _ROWS, *tensors, ROWS=_ROWS.rows)

    def opened_attention(self, opening: OpeningQueries, keys, lists: Lists, made: OpenedOutputs) -> Launch:
        tiles = self.tuning.opened
        tensors = (opening, self.n // self.g, self._keys(keys), self._places(), lists, made)
        return self._launch(attend_opened_kernel, self._run_grid(), tiles, *tensors, **self._run_sizes(tiles))

    def joining(self, chosen: torch.Tensor, made: OpenedOutputs, out, lse, opened_lse) -> Launch:
        tensors = (self._places(), chosen, made, joint.of_rows(out), lse, opened_lse, self.n // self.g)
        grid = (-(-self.rows // _ROWS.rows), self.n)
        return self._launch(join_kernel, grid, _ROWS, *tensors, ROWS=_ROWS.rows)

    def forward_opened(self, with_weights: bool) -> Forward:
        out = self._empty(self.rows, self.n, self.d, dtype=self.q.dtype)
        lse, opened_lse = self._empty(self.n, self.rows), self._empty(self.n, self.rows)
        scale_lse = self._empty(self.rows, self.n, self.spec.scales) if with_weights else None
        keys = self.prepared_keys()
        self.attention(keys, out, lse, scale_lse, None).run()
        chosen = self._empty(self.g, self.rows, self.spec.refine.blocks, dtype=torch.int32)
        self.choice(keys, chosen).run()
        lists = self.lists(chosen)
        for groups in self._portions():
            heads = self._heads_of(groups)
            portion, of_groups = self._portion(heads, groups), _of_groups(lists, groups)
            opening, made = portion.empty_opening(), portion.empty_outputs()
            portion.opening(None, opening).run()
            portion.opened_attention(opening, keys[groups], of_groups, made).run()
            portion.joining(of_groups.chosen, made, out[:, heads], lse[heads], opened_lse[heads]).run()
        return Forward(out, lse, scale_lse, opened_lse, chosen)

    def empty_opening(self, *, backward: bool = False) -> OpeningQueries:
        turned, numbers = self._empty(self.n, self.rows, self.d, dtype=self.q.dtype), (self.n, self.rows)
        return OpeningQueries(turned, self._empty(*numbers), self._empty(*numbers) if backward else None)

    def empty_outputs(self) -> OpenedOutputs:
        shape = (self.n, self.rows, self.spec.refine.blocks)
        return OpenedOutputs(self._empty(*shape, self.d, dtype=self.q.dtype), self._empty(*shape))

    def empty_gradients(self, chosen: torch.Tensor) -> tuple[OpenedQueries, OpenedKeys]:
        shape, runs = (self.n, self.rows, self.spec.refine.blocks), self._run_grid()[0]
        numbers = (self._empty(*shape), self._empty(*shape))
        entries = self.entries[self.spec.refine.to_scale]
        grads = torch.zeros(self.g, entries, 2, self.d, dtype=torch.float32, device=self.q.device)
        sums = self._empty(self.g, runs, 2, self._children, 2, self.d)
        return OpenedQueries(chosen, self._empty(*shape, self.d, dtype=self.q.dtype), *numbers), OpenedKeys(grads, sums)

    def opened_gradients(
        self, opening: OpeningQueries, keys, lists: Lists, grad_out, made: OpenedQueries, opened: OpenedKeys
    ) -> Launch:
        tiles = self.tuning.opened_gradient
        of_keys = (self._keys(keys), self._places(), lists)
        tensors = (opening, self.n // self.g, *of_keys, joint.of_rows(grad_out), made, opened)
        return self._launch(opened_gradient_kernel, self._run_grid(), tiles, *tensors, **self._run_sizes(tiles))

    def added_runs(self, lists: Lists, opened: OpenedKeys) -> Launch:
        sizes = {"CHILDREN": self._children, "RUN": self.tuning.run}
        return self._launch(add_runs_kernel, self._run_grid(), Tiles(), self._places(), lists, opened, **sizes)

    def _run_sizes(self, tiles: Tiles) -> dict[str, int]:
        return {"LINES": tiles.rows, "CHILDREN": self._children, "RUN": self.tuning.run}

    def backward_opened(self, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, chosen: torch.Tensor):
        """Gradients of q; of query gain, key gain, rho and beta; and of every scale's keys and values."""
        grad_out, lists = lined_up(grad_out), self.lists(chosen)

        def given(heads: slice) -> tuple:
            groups = slice(heads.start * self.g // self.n, heads.stop * self.g // self.n)
            return grad_out[:, heads], out[:, heads], lse[heads], _of_groups(lists, groups)

        return self._in_portions(given)

    def _gradients(self, grad_out, out, lse, lists, grad_q, grad_keys, grad_values, sums) -> None:
        """Writes the latter four."""
        keys = self.prepared_keys()
        opening, (of_queries, of_keys) = self.empty_opening(backward=True), self.empty_gradients(lists.chosen)
        self.opening((out, lse, grad_out), opening).run()
        self.opened_gradients(opening, keys, lists, grad_out, of_queries, of_keys).run()
        self.added_runs(lists, of_keys).run()
        found = self.made_by_query_gradients()._replace(grad_q=joint.of_rows(grad_q), opened=of_queries)
        self.query_gradients(keys, out, lse, None, grad_out, found).run()
        self._through_keys(keys, grad_out, found, grad_keys, grad_values, sums, of_keys)


def _of_groups(lists: Lists, groups: slice) -> Lists:
    return lists._replace(chosen=lists.chosen[groups], keys=lists.keys[groups], order=lists.order[groups])


def _power_of_2(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()

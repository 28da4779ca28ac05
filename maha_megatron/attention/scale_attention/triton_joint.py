"""Joint attention by kernels: which buffers they read and write, and in which order (triton_ops.py calls them).

    forward     prepare_keys -> attend_kernel
    backward    prepare_keys -> query_gradient_kernel -> key_gradient_kernel (-> add_parts_kernel) -> add_up_kernel,
                by a few KV groups

On Hopper cards kernels by warp groups take the place of attend_kernel and key_gradient_kernel (gluon_launch.py).

Kept for backward: q, the levels, out, and one number per row and head; where utilities alone weigh the scales, one more
for each scale. Backward's own buffers, turned queries (of every scale, or once where they turn alike for all) and
prepared keys, are those of a few groups. Every sum has a fixed order, so results are bitwise reproducible.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import triton

from maha_megatron.attention.scale_attention.triton_arguments import (
    KeyGradients,
    Keys,
    OpenedKeys,
    Places,
    Queries,
    QueryGradients,
    Rows,
    Scales,
    Shape,
)
from maha_megatron.attention.scale_attention.triton_forward import attend_kernel
from maha_megatron.attention.scale_attention.triton_geometry import frequency_table
from maha_megatron.attention.scale_attention.triton_key_gradient import add_parts_kernel, key_gradient_kernel
from maha_megatron.attention.scale_attention.triton_key_work import GROUP_KEYS
from maha_megatron.attention.scale_attention.triton_keys import prepare_keys
from maha_megatron.attention.scale_attention.triton_query_gradient import query_gradient_kernel
from maha_megatron.attention.scale_attention.triton_tuning import Tiles
from maha_megatron.attention.triton_launch import Launch, compiled, lined_up
from maha_megatron.attention.triton_sums import adding_up
from maha_megatron.scales import slot_count, stride

_GLUON_VERSIONS = ("3.6",)  # of Triton, that ran on a card: Gluon is experimental and may change with each
_log = logging.getLogger(__name__)


class Call:
    """One call's tensors and numbers, as the kernels take them."""

    apart = False  # whether every scale has a softmax of its own
    each = False  # whether every scale has an output of its own

    def __init__(self, q, query_gain, key_gain, rho, beta, document_start, spec, past_slots, tuning, levels):
        self.q, self.query_gain, self.key_gain = lined_up(q), query_gain.contiguous(), key_gain.contiguous()
        self.rho, self.beta = (None, None) if rho is None else (rho.contiguous(), beta.contiguous())
        self.raw_keys, self.values = ([lined_up(level[kind]) for level in levels] for kind in (0, 1))
        self.spec, self.tuning, self.past_slots = spec, tuning, past_slots
        self.rows, self.n, self.d = q.shape
        self.g = self.raw_keys[0].shape[1]
        self.document_start = document_start.contiguous()
        self.entries = tuple(
            past + slot_count(self.rows, stride(spec.ratio, scale)) for scale, past in enumerate(past_slots)
        )
        assert self.entries == tuple(len(keys) for keys in self.raw_keys), (self.entries, [len(x) for x, _ in levels])

    def _places(self) -> Places:
        spec = self.spec
        frequency = frequency_table(self.d, spec.rope_base, spec.rotary_ratio, spec.scales, self.q.device)
        return Places(self.document_start, frequency, self.rows)

    def _queries(self) -> Queries:
        return Queries(of_rows(self.q), self.query_gain, self.rho, self.beta, self.n, self.n // self.g)

    def _keys(self, prepared: torch.Tensor) -> Keys:
        return Keys(prepared, sum(self.entries), of_scales(self.values))

    @property
    def _one_turn(self) -> bool:
        """Whether queries turn alike for every scale."""
        return self.spec.scales == 1 or self.spec.rotary_ratio == 1

    def _shape(self) -> Shape:
        return Shape(
            ratio=self.spec.ratio,
            windows=self.spec.windows,
            past_slots=self.past_slots,
            half=self.d // 2,
            epsilon=self.spec.norm_epsilon,
            fast=self.q.dtype.itemsize == 2 and compiled(),
            utilities=self.rho is not None,
            apart=self.apart,
            one_turn=self._one_turn,
            precision="tf32x3" if self.q.dtype.itemsize == 4 else "tf32",
            **({} if self.spec.refine is None else vars(self.spec.refine)),
        )

    def _row_grid(self, tiles: Tiles) -> tuple[int, int]:
        return -(-self.rows // tiles.rows), self.n // tiles.heads

    def _key_grid(self, tiles: Tiles) -> tuple[int, int]:
        return sum(-(-entries // tiles.keys) for entries in self.entries), self.g

    def _launch(self, kernel, grid: tuple[int, int], tiles: Tiles, *tensors, **sizes: int) -> Launch:
        """Of a kernel that takes `tensors`, then a Shape, then sizes of its tiles."""
        arguments = dict(zip(kernel.arg_names, (*tensors, self._shape()), strict=False)) | sizes
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options=options, device=self.q.device)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def preparation(self, prepared: torch.Tensor) -> Launch:
        tiles = self.tuning.keys
        tensors = (of_scales(self.raw_keys), self._places(), self.key_gain, prepared, sum(self.entries))
        return self._launch(prepare_keys, self._key_grid(tiles), tiles, *tensors, TILE=tiles.keys)

    def prepared_keys(self) -> torch.Tensor:
        """[g, entries of all scales, d] in q's dtype; behind it lies a tile that forward may read."""
        total = self.g * sum(self.entries)
        prepared = self._empty(total + self.tuning.forward.keys, self.d, dtype=self.q.dtype)[:total]
        prepared = prepared.view(self.g, -1, self.d)
        self.preparation(prepared).run()
        return prepared

    def rows_of(self, outputs: torch.Tensor) -> Rows:
        """Outputs or their gradients, as the kernels take them."""
        return of_rows(outputs)

    def attention(self, keys, out, lse, scale_lse, own_lse) -> Launch:
        tensors = (self._queries(), self._keys(keys), self._places(), self.rows_of(out), lse, scale_lse, own_lse)
        return self._by_groups(keys, *tensors) or self._portable(attend_kernel, *tensors)

    def _by_groups(self, keys, *tensors) -> Launch | None:
        """The forward by warp groups, of attend_kernel's tensors; None where it does not serve the call."""
        by_groups = _by_groups_if(self.tuning.groups)
        if by_groups is None or by_groups.unserved(self.q, self.values) is not None:
            return None
        arguments = dict(zip(attend_kernel.arg_names, (*tensors, self._shape()), strict=False))
        return by_groups.launch(arguments, keys, self.q, self.values, self.tuning.groups, self.each)

    def _portable(self, kernel, *tensors) -> Launch:
        """The forward by a kernel of rows, heads and keys."""
        tiles = self.tuning.forward
        sizes = {"ROWS": tiles.rows, "HEADS": tiles.heads, "KEYS": tiles.keys}
        return self._launch(kernel, self._row_grid(tiles), tiles, *tensors, **sizes)

    def forward(self, with_weights: bool) -> tuple[torch.Tensor | None, ...]:
        """Output [t, n, d], lse [n, t], scale_lse [t, n, L] if weights are asked for, else None, and own_lse [n, L, t]
        where scales are apart, else None; all as attend_kernel writes them.
        """
        out = self._empty(self.rows, self.n, self.d, dtype=self.q.dtype)
        lse = self._empty(self.n, self.rows)
        scale_lse = self._empty(self.rows, self.n, self.spec.scales) if with_weights else None
        own_lse = self._empty(self.n, self.spec.scales, self.rows) if self.apart else None
        self.attention(self.prepared_keys(), out, lse, scale_lse, own_lse).run()
        return out, lse, scale_lse, own_lse

    def query_gradients(self, keys, out, lse, own_lse, grad_out, made: QueryGradients) -> Launch:
        tiles = self.tuning.query_gradient
        tensors = (
            self._queries(),
            self._keys(keys),
            self._places(),
            self.rows_of(out),
            lse,
            own_lse,
            self.rows_of(grad_out),
            made,
        )
        sizes = {"ROWS": tiles.rows, "HEADS": tiles.heads, "KEYS": tiles.keys}
        return self._launch(query_gradient_kernel, self._row_grid(tiles), tiles, *tensors, **sizes)

    def key_gradients(self, keys, grad_out, found: QueryGradients, made: KeyGradients) -> Launch:
        tiles, parts = self.tuning.key_gradient, self._parts()
        of_keys = (self._keys(keys), of_scales(self.raw_keys), self.key_gain)
        tensors = (self._queries(), *of_keys, self._places(), self.rows_of(grad_out), found, made, parts)
        by_groups = self._key_gradients_by_groups(keys, grad_out, *tensors)
        if by_groups is not None:
            return by_groups
        grid = (sum(tiles_here * part for tiles_here, part in zip(self._key_tiles(tiles), parts, strict=True)), self.g)
        sizes = {"ROWS": tiles.rows, "KEYS": tiles.keys, "EACH": self.each}
        return self._launch(key_gradient_kernel, grid, tiles, *tensors, **sizes)

    def _key_gradients_by_groups(self, keys, grad_out, *tensors) -> Launch | None:
        """By warp groups, of key_gradient_kernel's tensors; None where they do not serve the call.

        They begin sums with 0, so a refined layer's, which begin with what opened blocks found, are not served; and
        parts, sums and gains are counted by tiles of the table, which have to be a warp group's.
        """
        by_groups, tiles = _by_groups_if(self.tuning.key_groups), self.tuning.key_gradient
        if by_groups is None or self.spec.refine is not None or tiles.keys != GROUP_KEYS.value:
            return None
        rows = grad_out.view(self.rows, -1, self.d)  # a head and scale is a head of its own where each has an output
        if by_groups.unserved(rows, self.values) is not None:
            return None
        arguments = dict(zip(key_gradient_kernel.arg_names, (*tensors, self._shape()), strict=False))
        arguments["EACH"] = self.each
        pairs = [-(-count // 2) * part for count, part in zip(self._key_tiles(tiles), self._parts(), strict=True)]
        works = self.g * sum(pairs)
        return by_groups.launch_key_gradients(arguments, keys, rows, self.values, works, self.tuning.key_groups)

    def added_parts(self, made: KeyGradients) -> Launch:
        tiles = self.tuning.key_gradient
        tensors = (of_scales(self.raw_keys), self.key_gain, self._places(), made, self._parts())
        return self._launch(add_parts_kernel, self._key_grid(tiles), tiles, *tensors, KEYS=tiles.keys)

    def _key_tiles(self, tiles: Tiles) -> list[int]:
        return [-(-entries // tiles.keys) for entries in self.entries]

    def _parts(self) -> tuple[int, ...]:
        """Of every scale, how many programs share the rows that see a tile of keys."""
        tile, span, ratio = self.tuning.key_gradient.keys, self.tuning.span, self.spec.ratio
        seen_by = [min((tile + w) * stride(ratio, scale), self.rows) for scale, w in enumerate(self.spec.windows)]
        return tuple(-(-rows // span) for rows in seen_by)

    def made_by_query_gradients(self) -> QueryGradients:
        n, scales, branches, width, dtype = self.n, self.spec.scales, self.spec.branches, self.d, self.q.dtype
        tiles = self._row_grid(self.tuning.query_gradient)[0]
        with_utilities = self.rho is not None
        return QueryGradients(
            grad_q=of_rows(self._empty(self.rows, n, width, dtype=dtype)),
            delta=self._empty(n, *([scales] if self.apart else []), self.rows),
            norms=self._empty(n, self.rows),
            offsets=self._empty(n, scales, self.rows),
            turned=self._empty(n, 1 if self._one_turn else scales, self.rows, width, dtype=dtype),
            utility_gradients=self._empty(n * with_utilities, branches, self.rows),
            shares=self._empty(n * with_utilities, branches, self.rows),
            learned_parts=self._empty(tiles, n, self._learned_kinds(), width),
        )

    def made_by_key_gradients(self, grad_keys, grad_values) -> KeyGradients:
        tiles, parts = self.tuning.key_gradient, self._parts()
        here = self._key_tiles(tiles)
        finest = min((scale for scale, part in enumerate(parts) if part > 1), default=len(parts))
        programs = sum(count * part for count, part in zip(here[finest:], parts[finest:], strict=True))
        return KeyGradients(
            grad_keys=of_scales(grad_keys),
            grad_values=of_scales(grad_values),
            gain_parts=self._empty(sum(here), self.g, self.d),
            sums=self._empty(programs, self.g, 2, tiles.keys, self.d),
        )

    def backward(self, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, own_lse: torch.Tensor | None):
        """Gradients of q; of query gain, key gain, rho and beta; and of every scale's keys and values."""
        grad_out = lined_up(grad_out)

        def of_heads(heads: slice) -> tuple[torch.Tensor | None, ...]:
            return grad_out[:, heads], out[:, heads], lse[heads], None if own_lse is None else own_lse[heads]

        return self._in_portions(of_heads)

    def _in_portions(self, given: Callable[[slice], tuple]):
        """What `backward` returns, by a few KV groups at a time: `_gradients` takes what is `given` for their heads."""
        grad_q = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        grad_keys, grad_values = (
            [torch.empty_like(x, memory_format=torch.contiguous_format) for x in of]
            for of in (self.raw_keys, self.values)
        )
        sums = (self._empty(self.n, self._learned_kinds(), self.d), self._empty(self.g, self.d))
        for groups in self._portions():
            heads = self._heads_of(groups)
            into = (grad_q[:, heads], [x[:, groups] for x in grad_keys], [x[:, groups] for x in grad_values])
            self._portion(heads, groups)._gradients(*given(heads), *into, (sums[0][heads], sums[1][groups]))
        return grad_q, self._learned_gradients(*sums), grad_keys, grad_values

    def _learned_kinds(self) -> int:
        """The gain, and with utilities rho of every scale, opened keys included, and beta."""
        return 1 if self.rho is None else 2 + self.spec.branches

    def _portions(self) -> list[slice]:
        """Of KV groups: as few at a time as still fill a card, since buffers are as large as their number."""
        programs = self._row_grid(self.tuning.query_gradient)[0] * (self.n // self.g)
        sizes = [size for size in range(1, self.g) if self.g % size == 0 and size * programs >= self.tuning.programs]
        size = min(sizes, default=self.g)
        return [slice(first, first + size) for first in range(0, self.g, size)]

    def _heads_of(self, groups: slice) -> slice:
        return slice(groups.start * self.n // self.g, groups.stop * self.n // self.g)

    def _portion(self, heads: slice, groups: slice) -> "Call":
        """The call of some KV groups and their heads."""
        gains = (self.query_gain[heads], self.key_gain[groups])
        of_utilities = (None, None) if self.rho is None else (self.rho[:, heads], self.beta[:, heads])
        levels = [(k[:, groups], v[:, groups]) for k, v in zip(self.raw_keys, self.values, strict=True)]
        numbers = (self.spec, self.past_slots, self.tuning, levels)
        return type(self)(self.q[:, heads], *gains, *of_utilities, self.document_start, *numbers)

    def _gradients(self, grad_out, out, lse, own_lse, grad_q, grad_keys, grad_values, sums) -> None:
        """Writes the latter four; `sums`: as `_learned_gradients` takes them."""
        keys = self.prepared_keys()
        found = self.made_by_query_gradients()._replace(grad_q=of_rows(grad_q))
        self.query_gradients(keys, out, lse, own_lse, grad_out, found).run()
        self._through_keys(keys, grad_out, found, grad_keys, grad_values, sums)

    def _through_keys(
        self, keys, grad_out, found: QueryGradients, grad_keys, grad_values, sums, opened: OpenedKeys | None = None
    ) -> None:
        """Runs what follows the first kernel; writes grad_keys, grad_values and sums."""
        made = self.made_by_key_gradients(grad_keys, grad_values)._replace(opened=opened)
        self.key_gradients(keys, grad_out, found, made).run()
        if max(self._parts()) > 1:
            self.added_parts(made).run()
        adding_up(zip((found.learned_parts, made.gain_parts), sums, strict=True)).run()

    def _learned_gradients(self, of_queries: torch.Tensor, of_keys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of query gain, key gain, rho and beta: from the sums of `learned_parts` and of the keys' `gain_parts`."""
        copied = {"copy": True, "memory_format": torch.contiguous_format}  # as results of an operator have to be
        of_gains = (of_queries[:, 0].to(self.query_gain.dtype, **copied), of_keys.to(self.key_gain.dtype))
        if self.rho is None:
            return *of_gains, None, None
        grad_rho = of_queries[:, 1:-1].transpose(0, 1) * self.query_gain
        grad_beta = of_queries[:, -1, : self.spec.branches].T
        return *of_gains, grad_rho.to(self.rho.dtype, **copied), grad_beta.to(self.beta.dtype, **copied)


class WeighedCall(Call):
    """One call of scales that have a softmax each, whose outputs utilities alone weigh: equally, without any."""

    apart = True


def _by_groups_if(tiles: object | None) -> ModuleType | None:
    """gluon_launch.py, where the table has these tiles of warp groups, kernels are compiled, and Gluon is there."""
    return _gluon_launch() if tiles is not None and compiled() else None


@functools.cache
def _gluon_launch() -> ModuleType | None:
    """gluon_launch.py; None, which is said once, where there is not the Gluon that its kernels were written for."""
    try:
        if ".".join(triton.__version__.split(".")[:2]) not in _GLUON_VERSIONS:
            raise ImportError(f"it ran with {' and '.join(_GLUON_VERSIONS)} only")
        from maha_megatron.attention.scale_attention import gluon_launch
    except (ImportError, AttributeError) as error:
        _log.warning(
            "joint attention: triton %s cannot have the kernels by warp groups (%s); the portable ones, which are "
            "slower, take their place",
            triton.__version__,
            error,
        )
        return None
    return gluon_launch


def of_rows(x: torch.Tensor) -> Rows:
    return Rows(x, x.stride(0), x.stride(1))


def of_scales(tensors: Sequence[torch.Tensor]) -> Scales:
    return Scales(tuple(tensors), tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors))

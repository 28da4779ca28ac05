"""Joint attention by kernels: which buffers they read and write, and in which order (triton_ops.py calls them).

    forward    prepare_keys -> attend_kernel
    backward   prepare_keys -> query_gradient_kernel -> key_gradient_kernel

Kept for backward: q, the levels, out, and one number per row and head. Every sum has a fixed order, so results are
bitwise reproducible.
"""

from collections.abc import Sequence

import torch
import triton

from maha_megatron.attention.scale_attention.triton_arguments import (
    Keys,
    Places,
    Queries,
    QueryGradients,
    Rows,
    Scales,
    Shape,
)
from maha_megatron.attention.scale_attention.triton_forward import attend_kernel
from maha_megatron.attention.scale_attention.triton_geometry import frequency_table
from maha_megatron.attention.scale_attention.triton_key_gradient import key_gradient_kernel
from maha_megatron.attention.scale_attention.triton_keys import prepare_keys
from maha_megatron.attention.scale_attention.triton_query_gradient import query_gradient_kernel
from maha_megatron.attention.scale_attention.triton_tuning import Tiles
from maha_megatron.attention.triton_launch import Launch, lined_up
from maha_megatron.scales import slot_count, stride


class Call:
    """One call's tensors and numbers, as the kernels take them."""

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
        frequency = frequency_table(self.d, spec.rope_base, spec.ratio, spec.scales, self.q.device)
        return Places(self.document_start, frequency, self.rows)

    def _queries(self) -> Queries:
        return Queries(_rows(self.q), self.query_gain, self.rho, self.beta, self.n, self.n // self.g)

    def _keys(self, prepared: torch.Tensor) -> Keys:
        return Keys(prepared, sum(self.entries), _scales(self.values))

    def _shape(self) -> Shape:
        return Shape(
            ratio=self.spec.ratio,
            windows=self.spec.windows,
            past_slots=self.past_slots,
            half=self.d // 2,
            epsilon=self.spec.norm_epsilon,
            fast=self.q.dtype.itemsize == 2 and _compiled(),
            utilities=self.rho is not None,
            precision="tf32x3" if self.q.dtype.itemsize == 4 else "tf32",
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
        tensors = (_scales(self.raw_keys), self._places(), self.key_gain, prepared, sum(self.entries))
        return self._launch(prepare_keys, self._key_grid(tiles), tiles, *tensors, TILE=tiles.keys)

    def prepared_keys(self) -> torch.Tensor:
        """[g, entries of all scales, d] in q's dtype."""
        prepared = self._empty(self.g, sum(self.entries), self.d, dtype=self.q.dtype)
        self.preparation(prepared).run()
        return prepared

    def attention(self, keys, out, lse, scale_lse) -> Launch:
        tiles = self.tuning.forward
        tensors = (self._queries(), self._keys(keys), self._places(), out, lse, scale_lse)
        sizes = {"ROWS": tiles.rows, "HEADS": tiles.heads, "KEYS": tiles.keys}
        return self._launch(attend_kernel, self._row_grid(tiles), tiles, *tensors, **sizes)

    def forward(self, with_weights: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Output [t, n, d], the softmax's log-sum-exp [n, t] and that of every scale [t, n, L], in units of log 2."""
        out = self._empty(self.rows, self.n, self.d, dtype=self.q.dtype)
        lse = self._empty(self.n, self.rows)
        scale_lse = self._empty(self.rows, self.n, self.spec.scales) if with_weights else None
        self.attention(self.prepared_keys(), out, lse, scale_lse).run()
        return out, lse, scale_lse

    def made_by_query_gradients(self) -> QueryGradients:
        n, scales = self.n, self.spec.scales
        tiles = self._row_grid(self.tuning.query_gradient)[0]
        parts = 0 if self.rho is None else tiles
        return QueryGradients(
            grad_q=self._empty(self.rows, n, self.d, dtype=self.q.dtype),
            delta=self._empty(n, self.rows),
            norms=self._empty(n, self.rows),
            offsets=self._empty(n, scales, self.rows),
            gain_parts=self._empty(tiles, n, self.d),
            rho_parts=self._empty(parts, scales, n, self.d),
            beta_parts=self._empty(parts, scales, n),
        )

    def query_gradients(self, keys, out, lse, grad_out, made: QueryGradients) -> Launch:
        tiles = self.tuning.query_gradient
        tensors = (self._queries(), self._keys(keys), self._places(), out, lse, _rows(grad_out), made)
        sizes = {"ROWS": tiles.rows, "HEADS": tiles.heads, "KEYS": tiles.keys}
        return self._launch(query_gradient_kernel, self._row_grid(tiles), tiles, *tensors, **sizes)

    def key_gradients(self, keys, grad_out, made: QueryGradients, grad_keys, grad_values, gain_parts) -> Launch:
        tiles = self.tuning.key_gradient
        of_keys = (self._keys(keys), _scales(self.raw_keys), self.key_gain)
        written = (_scales(grad_keys), _scales(grad_values), gain_parts)
        tensors = (self._queries(), *of_keys, self._places(), _rows(grad_out), made, *written)
        sizes = {"ROWS": tiles.rows, "KEYS": tiles.keys}
        return self._launch(key_gradient_kernel, self._key_grid(tiles), tiles, *tensors, **sizes)

    def backward(self, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor):
        """Gradients of q; of query gain, key gain, rho and beta; and of every scale's keys and values."""
        grad_out = lined_up(grad_out)
        keys, made = self.prepared_keys(), self.made_by_query_gradients()
        self.query_gradients(keys, out, lse, grad_out, made).run()
        grad_keys, grad_values = (
            [self._empty(*x.shape, dtype=x.dtype) for x in of] for of in (self.raw_keys, self.values)
        )
        gain_parts = self._empty(self._key_grid(self.tuning.key_gradient)[0], self.g, self.d)
        self.key_gradients(keys, grad_out, made, grad_keys, grad_values, gain_parts).run()
        learned = [made.gain_parts.sum(0).to(self.query_gain.dtype), gain_parts.sum(0).to(self.key_gain.dtype)]
        if self.rho is None:
            return made.grad_q, (*learned, None, None), grad_keys, grad_values
        grad_rho = made.rho_parts.sum(0) * self.query_gain
        learned += [grad_rho.to(self.rho.dtype), made.beta_parts.sum(0).to(self.beta.dtype)]
        return made.grad_q, tuple(learned), grad_keys, grad_values


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x, x.stride(0), x.stride(1))


def _scales(tensors: Sequence[torch.Tensor]) -> Scales:
    return Scales(tuple(tensors), tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors))


def _compiled() -> bool:
    """Whether kernels are compiled, rather than interpreted."""
    return not triton.knobs.runtime.interpret

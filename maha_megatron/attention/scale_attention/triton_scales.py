"""Every scale's attention by kernels: which buffers they read and write, and in which order (triton_scales_ops.py).

    forward     prepare_keys -> attend_scales_kernel, or by warp groups (gluon_forward.py)
    backward    prepare_keys -> scales_query_gradient_kernel -> key_gradient_kernel, or by warp groups
                (gluon_key_gradient.py) (-> add_parts_kernel)

Kept for backward: q, the levels, O [t, n, L, d] and LSE [t, n, L]. Every sum has a fixed order, so results are bitwise
reproducible.
"""

from typing import NamedTuple

import torch

import maha_megatron.attention.scale_attention.triton_joint as joint
from maha_megatron.attention.scale_attention.triton_arguments import QueryGradients, Rows
from maha_megatron.attention.scale_attention.triton_scales_forward import attend_scales_kernel
from maha_megatron.attention.scale_attention.triton_scales_query_gradient import scales_query_gradient_kernel
from maha_megatron.attention.triton_launch import Launch


class Given(NamedTuple):
    """What backward is given: O and dO [t, n, L, d] in q's dtype; the others fp32 [t, n, L]."""

    outs: torch.Tensor
    lses: torch.Tensor
    grad_outs: torch.Tensor
    grad_lses: torch.Tensor
    grad_utilities: torch.Tensor | None

    def of_heads(self, heads: slice) -> "Given":
        """Numbers contiguous, as the kernels take them."""
        outs, lses, grad_outs, *others = self
        return Given(
            outs[:, heads],
            lses[:, heads].contiguous(),
            grad_outs[:, heads],
            *(None if x is None else x[:, heads].contiguous() for x in others),
        )


class Call(joint.Call):
    """One call's tensors and numbers."""

    apart, each = True, True

    def rows_of(self, outputs: torch.Tensor) -> Rows:
        """Of [t, n, L, d], the last two contiguous: a head and scale is a head of its own."""
        return Rows(outputs, outputs.stride(0), outputs.stride(2))

    def attention(self, keys, outs, lses, utilities) -> Launch:
        tensors = (self._queries(), self._keys(keys), self._places(), self.rows_of(outs), lses, utilities)
        return self._by_groups(keys, *tensors, None) or self._portable(attend_scales_kernel, *tensors)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """O [t, n, L, d] in q's dtype, LSE [t, n, L] and, with rho, utilities [t, n, L] in fp32."""
        outs = self._empty(self.rows, self.n, self.spec.scales, self.d, dtype=self.q.dtype)
        lses = self._empty(self.rows, self.n, self.spec.scales)
        utilities = None if self.rho is None else torch.empty_like(lses)
        self.attention(self.prepared_keys(), outs, lses, utilities).run()
        return outs, lses, utilities

    def query_gradients(self, keys, given: Given, made: QueryGradients) -> Launch:
        tiles = self.tuning.query_gradient
        outs, grad_outs = self.rows_of(given.outs), self.rows_of(given.grad_outs)
        of_rows = given._replace(outs=outs, grad_outs=grad_outs, grad_utilities=None)
        tensors = (self._queries(), self._keys(keys), self._places(), of_rows, made)
        sizes = {"ROWS": tiles.rows, "HEADS": tiles.heads, "KEYS": tiles.keys}
        return self._launch(scales_query_gradient_kernel, self._row_grid(tiles), tiles, *tensors, **sizes)

    def found_by_query_gradients(self, given: Given) -> QueryGradients:
        """As of the joint kernels, but gradients of utilities are given."""
        found = self.made_by_query_gradients()
        if given.grad_utilities is None:
            return found
        utilities = given.grad_utilities.permute(1, 2, 0).contiguous()
        return found._replace(utility_gradients=utilities, shares=utilities)

    def backward(self, given: Given):
        """Gradients of q; of query gain, key gain, rho and beta; and of every scale's keys and values."""
        return self._in_portions(lambda heads: (given.of_heads(heads),))

    def _gradients(self, given: Given, grad_q, grad_keys, grad_values, sums) -> None:
        """Writes the latter four."""
        keys = self.prepared_keys()
        found = self.found_by_query_gradients(given)._replace(grad_q=joint.of_rows(grad_q))
        self.query_gradients(keys, given, found).run()
        self._through_keys(keys, given.grad_outs, found, grad_keys, grad_values, sums)

"""Aggregation by kernels: which buffers they read and write, and in which order (triton.py calls them).

    forward    products_kernel (gram)  ->  equilibrium_kernel  ->  continuation_kernel  ->  combine_kernel
    backward   weights_gradient_kernel  ->  equilibrium_gradient_kernel  ->  outputs_gradient_kernel

Each is one launch; outputs are never widened in memory. All steps of Newton's method are taken inside a kernel, and
what they leave unsolved is solved by another, so that the device is asked nothing. The quadratic with a matrix goes to
`solvers.solve`.
"""

import torch

from maha_megatron.attention.aggregation import triton_continuation, triton_equilibrium, triton_outputs
from maha_megatron.attention.aggregation.solvers import (
    GRAM_EPSILON,
    NEWTON_STEPS,
    TARGET,
    TOLERANCE,
    skew_matrix,
    solve,
)
from maha_megatron.attention.triton_launch import Launch

PROGRAM_LINES, OUTPUT_LINES = 128, 32  # rows of one head, and lines (a row and head each), of one program
HELD_NUMBERS = 16384  # of all scales' outputs, by one program


class Fusion:
    """One call's tensors: O [t, n, L, d], LSE and learned utilities [t, n, L], kappa [n], skew [n, L (L - 1) / 2].

    Entropy has kappa or a skew part, or both: without them no output of a scale is needed.
    """

    def __init__(self, outs, lses, utilities, kappa, skew, regularizer: str, lse_utility: bool):
        self.outs, self.lses, self.utilities = outs, lses, utilities.contiguous()
        self.kappa, self.skew = kappa, skew
        self.regularizer, self.lse_utility = regularizer, lse_utility
        self.rows, self.n, self.scales, self.width = outs.shape
        self.coupled = kappa is not None or skew is not None
        assert self.coupled or regularizer == "quadratic", regularizer

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Of every row and head."""
        return torch.empty(self.rows, self.n, *shape, dtype=dtype, device=self.outs.device)

    def over_outputs(self, kernel, *tensors: torch.Tensor | None, each: int = OUTPUT_LINES) -> Launch:
        """Of a kernel of triton_outputs.py; `each`: lines of one program."""
        lines = self.rows * self.n
        sizes = {"lines": lines, "SCALES": self.scales, "WIDTH": self.width, "LINES": each}
        return self._launch(kernel, (-(-lines // each),), tensors, sizes)

    def products(self, made: torch.Tensor) -> Launch:
        each = 1 << (HELD_NUMBERS // (self.scales * self.width)).bit_length() - 1
        return self.over_outputs(triton_outputs.products_kernel, self.outs, made, each=min(each, OUTPUT_LINES))

    def over_programs(self, kernel, *tensors: torch.Tensor | None, warps: int = 4, **options: object) -> Launch:
        """Of a kernel of triton_equilibrium.py or triton_continuation.py."""
        sizes = {"rows": self.rows, "n": self.n, "SCALES": self.scales, "LINES": PROGRAM_LINES}
        return self._launch(kernel, (-(-self.rows // PROGRAM_LINES), self.n), tensors, sizes | options, warps)

    def _launch(self, kernel, grid: tuple[int, ...], tensors, sizes: dict[str, object], warps: int = 4) -> Launch:
        arguments = dict(zip(kernel.arg_names, tensors, strict=False)) | sizes
        options = {"num_warps": warps}
        return Launch(kernel=kernel, grid=grid, arguments=arguments, options=options, device=self.outs.device)

    def equilibrium(self, products, weights, residuals, steps) -> Launch:
        tensors = (self.utilities, self.lses, products, self.kappa, self.skew, weights, residuals, steps)
        options = {"LSE": self.lse_utility, "STEPS": NEWTON_STEPS, "TARGET": TARGET[torch.float32]}
        return self.over_programs(triton_equilibrium.equilibrium_kernel, *tensors, **options)

    def continuation(self, products, weights, residuals, steps) -> Launch:
        """Of the programs that `equilibrium` left unsolved, in place of what stands there."""
        tensors = (self.utilities, self.lses, products, self.kappa, self.skew, weights, residuals, steps)
        options = {"LSE": self.lse_utility, "TOLERANCE": TOLERANCE[torch.float32] / 2, "TARGET": TARGET[torch.float64]}
        options["SIZE"] = 1 << (self.scales - 1).bit_length()
        return self.over_programs(triton_continuation.continuation_kernel, *tensors, warps=1, **options)

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Output, weights, and with a matrix products (gram), residuals and steps, else None."""
        products, residuals, steps = None, None, None
        if self.kappa is not None:
            products = self.empty(self.scales, self.scales)
            self.products(products).run()
        if self.coupled and self.regularizer == "quadratic":
            weights, residuals, steps = self._solved(products)
        else:
            weights = self.empty(self.scales)
            if self.coupled:
                residuals, steps = self.empty(), self.empty(dtype=torch.int32)
            self.equilibrium(products, weights, residuals, steps).run()
            if self.coupled:
                self.continuation(products, weights, residuals, steps).run()
        out = self.empty(self.width, dtype=self.outs.dtype)
        self.over_outputs(triton_outputs.combine_kernel, self.outs, weights, out).run()
        return out, weights, products, residuals, steps

    def _solved(self, products) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights, residuals and steps by `solvers.solve`."""
        feasible = self.lses != -torch.inf
        payoff = self.utilities + self.lses if self.lse_utility else self.utilities
        matrix = self.lses.new_zeros(self.scales, self.scales) if self.skew is None else skew_matrix(self.skew)
        if products is not None:
            mean = products.diagonal(dim1=-2, dim2=-1).sum(-1) / feasible.sum(-1)
            matrix = matrix + (self.kappa / (mean + GRAM_EPSILON))[..., None, None] * products
        solved = solve(matrix, payoff, feasible, self.regularizer)
        return solved.weights.contiguous(), solved.residual, solved.steps

    def equilibrium_gradient(self, products, weights, grad_weights, *made: torch.Tensor) -> Launch:
        tensors = (grad_weights, weights, self.lses, products, self.kappa, self.skew, *made)
        entropy = self.regularizer == "entropy"
        return self.over_programs(triton_equilibrium.equilibrium_gradient_kernel, *tensors, ENTROPY=entropy)

    def backward(self, grad_out, out, weights, products) -> tuple[torch.Tensor | None, ...]:
        """Gradients of O, of the payoffs [t, n, L], of kappa and of the skew part, if given."""
        grad_weights, grad_payoffs = self.empty(self.scales), self.empty(self.scales)
        self.over_outputs(triton_outputs.weights_gradient_kernel, self.outs, grad_out, grad_weights).run()
        grad_kappas, through_gram = (None, None) if products is None else (self.empty(), self.empty(2))
        made = (grad_payoffs, through_gram, grad_kappas)
        self.equilibrium_gradient(products, weights, grad_weights, *made).run()
        grad_kappa = None if grad_kappas is None else grad_kappas.sum(0)
        grad_skew = None if self.skew is None else self._skew_gradient(weights, grad_payoffs)
        grad_outs = torch.empty_like(self.outs)
        tensors = (self.outs, out, weights, grad_out, grad_payoffs, through_gram, grad_outs)
        self.over_outputs(triton_outputs.outputs_gradient_kernel, *tensors).run()
        return grad_outs, grad_payoffs, grad_kappa, grad_skew

    def _skew_gradient(self, weights: torch.Tensor, grad_payoffs: torch.Tensor) -> torch.Tensor:
        """From dM_ij = -dc_i w_j, whose upper triangle A has as it is, and whose lower one negative."""
        by_head = grad_payoffs.permute(1, 2, 0) @ weights.transpose(0, 1)
        row, column = torch.triu_indices(self.scales, self.scales, 1, device=weights.device)
        return (by_head.mT - by_head)[:, row, column]

"""Aggregation by kernels as operators of torch (triton_fusion.py has the order).

Everything that needs the scales' outputs but stated programs: entropy without coupling and equal weights need none.
"""

import torch
import torch.nn.functional as F

from maha_megatron.attention.aggregation.solvers import TOLERANCE, SolveReport
from maha_megatron.attention.aggregation.triton_fusion import Fusion
from maha_megatron.attention.spec import AttentionParameters, MahaSpec

# an operator's schema is read off annotations: these names keep them short
Tensor = torch.Tensor
Given = torch.Tensor | None


def aggregate(
    outputs_tnld: torch.Tensor,
    lse_tnl: torch.Tensor,
    utility_tnl: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
) -> tuple[torch.Tensor, torch.Tensor, SolveReport | None]:
    """sum_l w_l O_l per row and head, as `aggregate` of eager.py.

    Args:
        outputs_tnld: of every scale, contiguous, in the dtype of the result.
        lse_tnl: fp32; -inf where infeasible, and the output is 0 there.
        utility_tnl: the learned part <rho_l, q> + beta_l, fp32.

    Returns:
        Output [t, n, d], weights [t, n, L], and the solver's report, None where the weights have a closed form.
    """
    kappa = F.softplus(parameters.coupling_raw.float()) if spec.coupling == "gram" else None
    skew = parameters.skew.float() if spec.aggregation == "nash" else None
    given = (outputs_tnld, lse_tnl, utility_tnl, kappa, skew, spec.regularizer, spec.lse_utility)
    out_tnd, weights_tnl, _, residual_tn, steps_tn = fuse_scales(*given)
    if kappa is None and skew is None:
        return out_tnd, weights_tnl, None
    missed = (~(residual_tn <= TOLERANCE[torch.float32])).sum()
    return out_tnd, weights_tnl, SolveReport(residual_tn=residual_tn, steps_tn=steps_tn, missed=missed)


@torch.library.custom_op("maha_megatron::fuse_scales", mutates_args=())
def fuse_scales(
    outs: Tensor, lses: Tensor, utilities: Tensor, kappa: Given, skew: Given, regularizer: str, lse_utility: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [t, n, d], weights [t, n, L]; products [t, n, L, L] with kappa, residuals and steps [t, n] with either
    part of M, else empty.
    """
    made = Fusion(outs, lses, utilities, kappa, skew, regularizer, lse_utility).forward()
    return tuple(lses.new_empty(0) if x is None else x for x in made)


@fuse_scales.register_fake
def _(outs, lses, utilities, kappa, skew, regularizer, lse_utility):
    rows, n, scales, width = outs.shape
    solved = (0,) if kappa is None and skew is None else (rows, n)
    products = (0,) if kappa is None else (rows, n, scales, scales)
    steps = lses.new_empty(solved, dtype=torch.float32 if solved == (0,) else torch.int32)
    numbers = (lses.new_empty(shape) for shape in (lses.shape, products, solved))
    return outs.new_empty(rows, n, width), *numbers, steps


@torch.library.custom_op("maha_megatron::fuse_scales_backward", mutates_args=())
def fuse_scales_backward(
    grad_out: Tensor,
    out: Tensor,
    weights: Tensor,
    products: Tensor,
    outs: Tensor,
    lses: Tensor,
    utilities: Tensor,
    kappa: Given,
    skew: Given,
    regularizer: str,
    lse_utility: bool,
) -> list[Tensor]:
    """Gradients of the outputs, of the payoffs (one for utilities and LSE) and, if given, kappa and the skew part."""
    fusion = Fusion(outs, lses, utilities, kappa, skew, regularizer, lse_utility)
    made = fusion.backward(grad_out.contiguous(), out, weights, None if kappa is None else products)
    return [x for x in made if x is not None]


@fuse_scales_backward.register_fake
def _(grad_out, out, weights, products, outs, lses, utilities, kappa, skew, regularizer, lse_utility):
    return [x.new_empty(x.shape) for x in (outs, utilities, kappa, skew) if x is not None]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.regularizer, ctx.lse_utility = inputs
    out, weights, products, residuals, steps = output
    ctx.mark_non_differentiable(weights, products, residuals, steps)
    ctx.save_for_backward(out, weights, products, *tensors)


def _backward(ctx, grad_out: Tensor, *_) -> tuple:
    out, weights, products, outs, lses, utilities, kappa, skew = ctx.saved_tensors
    given = (outs, lses, utilities, kappa, skew, ctx.regularizer, ctx.lse_utility)
    grads = iter(fuse_scales_backward(grad_out, out, weights, products, *given))
    grad_outs, *others = (None if x is None else next(grads) for x in (outs, utilities, kappa, skew))
    return grad_outs, others[0] if ctx.lse_utility else None, *others, None, None


fuse_scales.register_autograd(_backward, setup_context=_keep)

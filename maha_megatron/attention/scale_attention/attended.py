"""What attention of all scales and their aggregation hand back, in every backend."""

from dataclasses import dataclass

import torch

from maha_megatron.attention.aggregation.solvers import SolveReport


@dataclass(frozen=True, kw_only=True)
class Attended:
    """out_tnd [t, n, d] in q's dtype; weights_tnl [t, n, L] detached, None where nobody asked and they cost something;
    report None where weights have a closed form.
    """

    out_tnd: torch.Tensor
    weights_tnl: torch.Tensor | None
    report: SolveReport | None

"""A mean and its standard error, where what was measured comes in groups whose members are alike."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A measured mean.

    Attributes:
        mean: sum over count.
        standard_error: of the mean; None for fewer than two groups.
        count: measurements.
        groups: groups that hold any of them.
    """

    mean: float
    standard_error: float | None
    count: int
    groups: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.mean:.4f}{error}"


def grouped_mean(sum_k: torch.Tensor, count_k: torch.Tensor | None = None) -> Mean:
    """The mean over all members of k groups, which are independent of each other; their members need not be.

    The error is that of a ratio of sums: members of one group (tokens of one sample) count as one draw. With one member
    each it is the usual standard deviation / sqrt(k).

    Args:
        sum_k: [k], each group's sum.
        count_k: integer [k], members of each group, not all 0; None: one each.
    """
    sum_k = sum_k.double()
    count_k = torch.ones_like(sum_k) if count_k is None else count_k.double()
    total, groups = count_k.sum(), int((count_k > 0).sum())
    mean = sum_k.sum() / total
    error = None
    if groups > 1:
        spread = (sum_k - mean * count_k).square().sum() * groups / (groups - 1)
        error = math.sqrt(spread) / float(total)
    return Mean(mean=float(mean), standard_error=error, count=int(total), groups=groups)

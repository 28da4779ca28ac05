"""How well the programs of the scales' weights were solved: totals that stay on the device until somebody asks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maha_megatron.attention.aggregation.solvers import SolveReport


@dataclass(frozen=True, kw_only=True)
class SolveCounts:
    """Host numbers over all layers, micro-batches and ranks.

    Attributes:
        programs: one per row, head and layer.
        missed: those whose weights miss the solver's tolerance.
        steps_mean: linear systems solved for a program; None where the solver does not count them.
        residual_max: the largest relative residual; infinite where one is not a number.
    """

    programs: int
    missed: int
    steps_mean: float | None
    residual_max: float


@dataclass(frozen=True, kw_only=True)
class SolveTotals:
    """Sums of SolveReports on their device: counts float64 [3] (programs, missed, steps; steps -1 a program where
    they are not counted, so that the sum is negative) and worst float64 [], the largest residual."""

    counts: torch.Tensor
    worst: torch.Tensor

    @staticmethod
    def of(report: SolveReport) -> "SolveTotals":
        """The totals of one report. No host synchronisation."""
        residual = report.residual_tn.detach().double()
        steps = residual.new_full((), -residual.numel()) if report.steps_tn is None else report.steps_tn.sum().double()
        programs = residual.new_full((), residual.numel())
        worst = residual.nan_to_num(nan=torch.inf).amax()
        return SolveTotals(counts=torch.stack((programs, report.missed.double(), steps)), worst=worst)

    def __add__(self, other: "SolveTotals") -> "SolveTotals":
        return SolveTotals(counts=self.counts + other.counts, worst=torch.maximum(self.worst, other.worst))

    def over_all_ranks(self) -> SolveCounts:
        """Summed over every rank: they hold different heads or different samples. Collective; waits for the device."""
        counts, worst = self.counts.clone(), self.worst.clone()
        dist.all_reduce(counts)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        programs, missed, steps = counts.tolist()
        return SolveCounts(
            programs=int(programs),
            missed=int(missed),
            steps_mean=steps / programs if steps >= 0 else None,
            residual_max=worst.item(),
        )

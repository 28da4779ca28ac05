"""The numbers of a run: metrics.jsonl, one object a logged step, and the same in TensorBoard. Rank 0 writes them.

| name | unit and meaning |
|---|---|
| loss_nats | loss of the step's batch, per unmasked token, before the step |
| learning_rate | read from the optimizer after it was set |
| gradient_norm | global norm before clipping |
| tokens_per_s, step_s | over the steps since the last row, validation and saving left out |
| tflops_per_device | model FLOPs of forward and backward (config/accounting) per second and device, / 1e12 |
| mfu_frac | tflops_per_device / the device's stated peak; absent where no peak is known |
| data_wait_s | mean seconds of a step in which rank 0 waited for its batches |
| memory_bytes | peak of rank 0: allocated on the GPU, resident set on a CPU |
| scale_weight/layer_03/scale_1 | mean weight that rows and heads of that layer give the scale |
| missed_solves | programs of the scales' weights (one a row, head and layer) that missed the solver's tolerance |
| solver_steps_mean | linear systems solved for such a program; absent for stated ones |
| solver_residual_max | largest relative residual of such a program's optimality conditions |
| validation_loss_nats, validation_bits_per_byte | over the fixed validation samples |
| validation_loss_nats/NAME | over those of the source of that name, where there are several |

The three of solvers cover all ranks' forward passes since the last row, validation included; they are absent where no
layer needs a solver.
"""

import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

# Dense bf16 peak in TFLOP/s by a part of the device's name, from the vendor's data sheets; first match counts.
PEAK_BF16_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """Appends rows to metrics.jsonl and TensorBoard.

    Args:
        folder: the run's folder.
        last_step: step of the checkpoint that the run continues from, 0 for a new run. What an earlier process wrote
            after it is cut: those steps happen again.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        rows = [row for row in read_rows(path) if row["step"] <= last_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=last_step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Write one row; the file is complete up to it when this returns."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


class Throughput:
    """Time and tokens of the steps since the last row.

    Args:
        flops_per_token: model FLOPs of forward and backward.
        devices: ranks that share the work.
        peak_tflops: stated peak of one device, or None.
    """

    def __init__(self, flops_per_token: float, devices: int, peak_tflops: float | None) -> None:
        self._flops_per_token, self._devices, self._peak_tflops = flops_per_token, devices, peak_tflops
        self._steps, self._tokens, self._seconds, self._waited_s = 0, 0, 0.0, 0.0

    def add(self, step_s: float, tokens: int, data_wait_s: float) -> None:
        """Count one step of all ranks; this one waited `data_wait_s` of it for its batches."""
        self._steps, self._tokens, self._seconds = self._steps + 1, self._tokens + tokens, self._seconds + step_s
        self._waited_s += data_wait_s

    def take(self) -> dict[str, float]:
        """Means since the last call, under their names in metrics.jsonl."""
        tokens_per_s = self._tokens / self._seconds
        tflops_per_device = tokens_per_s * self._flops_per_token / self._devices / 1e12
        row = {
            "step_s": self._seconds / self._steps,
            "data_wait_s": self._waited_s / self._steps,
            "tokens_per_s": tokens_per_s,
            "tflops_per_device": tflops_per_device,
        }
        if self._peak_tflops:
            row["mfu_frac"] = tflops_per_device / self._peak_tflops
        self._steps, self._tokens, self._seconds, self._waited_s = 0, 0, 0.0, 0.0
        return row


def peak_tflops(configured: float, precision: str) -> float | None:
    """Peak that MFU is stated against: the configured one, else bf16's by the device's name, else None."""
    if configured:
        return configured
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_BF16_TFLOPS if part in name), None)


def peak_memory_bytes() -> int:
    """Most memory this process ever held: allocated on its GPU, or its resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

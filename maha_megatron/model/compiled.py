"""The memory-bound pieces between matrix products, fused by torch.compile: SwiGLU's middle, RMSNorm, the loss's rows.

The pieces hold no parameter (RMSNorm's weight is an argument), so that tensor and sequence parallelism, ZeRO and
recomputation meet the modules as they are. README.md of this folder says what each saves.

Each is compiled for one form of its arguments at a time (shape, strides, gradients or none), and torch refuses the
ninth of a function in a process. Training and validation need one each, validation's other rows and recomputation one
or two more; the loss's pieces need one for every length of a chunk.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from maha_megatron.errors import EnvironmentMismatch
from maha_megatron.model.layer_specs import SwiGlu, gated
from maha_megatron.model.loss import LossPieces, OutputLayer, row_exponentials, row_peaks, row_probabilities
from maha_megatron.model.norms import RMSNorm, rms_norm_formula


def compile_pieces(model: nn.Module, device: torch.device, *, norms: bool = True) -> None:
    """Put fused forms into every SwiGlu, RMSNorm and OutputLayer of the model; they are compiled at their first call.

    Args:
        norms: RMSNorm too. It saves the device's time and costs the host's: not where the host is the slower.

    Raises:
        EnvironmentMismatch: torch.compile does not work on this machine.
    """
    check_compiler(device)
    activate = _fused(gated)
    normalise = functools.partial(_by_rows, _fused(rms_norm_formula))
    pieces = LossPieces(
        peaks=_fused(row_peaks), exponentials=_fused(row_exponentials), probabilities=_fused(row_probabilities)
    )
    for module in model.modules():
        if isinstance(module, SwiGlu):
            module.activate = activate
        elif isinstance(module, RMSNorm) and norms:
            module.normalise = normalise
        elif isinstance(module, OutputLayer):
            module.pieces = pieces


def check_compiler(device: torch.device) -> None:
    """Compile and run the smallest function there is.

    Raises:
        EnvironmentMismatch: that failed.
    """
    try:
        _fused(_one_more)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a compiler, a driver or a cache folder brings up
        reason = (str(error).strip().splitlines() or [""])[0]
        needs = "Triton and a C compiler (apt-get install gcc)" if device.type == "cuda" else "a C++ compiler"
        raise EnvironmentMismatch(
            f"train.compile: torch.compile does not work here ({type(error).__name__}: {reason}); it needs {needs} and "
            "a folder to write to (TORCHINDUCTOR_CACHE_DIR), or set train.compile: false"
        ) from error


def _by_rows(fused: Callable, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Of [t, 1, h] as [t, h]: the embedding's rows and a layer's differ in the strides of [t, 1, h].

    To the compiler these would be two forms of everything, eight with recomputation and validation of other rows.
    """
    return fused(hidden.flatten(0, -2), weight, eps).view(hidden.shape)


def _one_more(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _fused(piece: Callable) -> Callable:
    return torch.compile(piece, fullgraph=True, dynamic=False)

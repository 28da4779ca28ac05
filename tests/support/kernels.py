"""Kernels in tests: calls with tiles of one's choice, and compilation for a card that is not there."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maha_megatron.attention.scale_attention.triton_launch import Launch

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler made of one launch, for one program and thread."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch whose tensors may be on the meta device, as a first call on a card would."""
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if kernel.params[index].is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = _signature(value)
            _describe(value, (index,), attributes, constants)
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    registers, stack = _resources(made.asm["cubin"])
    return Compiled(
        registers=registers, spilled_bytes=stack, shared_bytes=made.metadata.shared, ptx=str(made.asm["ptx"])
    )


def _signature(value):
    if isinstance(value, tuple):
        return tuple(_signature(item) for item in value)
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "constexpr" if value == 1 else "i32"


def _describe(value, path, attributes, constants) -> None:
    """What a call tells the compiler of its arguments: numbers that 16 divides, and those that are 1."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _describe(item, (*path, index), attributes, constants)
    elif isinstance(value, torch.Tensor) or (value != 1 and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    elif value == 1:
        constants[path] = value


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread: what a kernel without arrays of its own has there was spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK"))
    return int(registers[1]), int(stack[1])

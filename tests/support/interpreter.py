"""Triton's interpreter: kernels run on the CPU, step by step; on a CUDA device where there is one, compiled.

Import this before anything that imports kernels; tests/conftest.py tells Triton which of the two.

Triton 3.6's own has three faults that these tests would meet, and that are mended here: numpy 2.4 no longer takes an
array of one element for a loop bound; bf16 is held as the bits of integers, which products multiply; and rounding to
bf16 cuts off.

Two thirds of its time are spared too: it looks through the whole language at every call of one function by another, and
computes whether integers overflow, which it says only when it debugs. `fast_interpreter.py` spares another part.
"""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
import triton.runtime.interpreter as interpreter

from tests.support import fast_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_patch_tensor, _cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl
_Handle = interpreter.TensorHandle


def _patch_tensor_for_new_numpy(tensor, scope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cast_rounding(self, source, target):
    old, new = source.dtype.scalar, target.scalar
    if (old, new) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return _Handle(rounded.view(torch.int16).numpy().view(np.uint16), new)
    if (old, new) == (tl.bfloat16, tl.float32):
        return _Handle(_widened(source.data), new)
    return _cast(self, source, target)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = (_widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
    return _Handle(np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar)


_patched: set[int] = set()
"""Namespaces in which the running kernel's language has been replaced."""
_launch = interpreter.GridExecutor.__call__


def _launch_anew(self, *args, **kwargs):
    _patched.clear()
    return _launch(self, *args, **kwargs)


def _call_function(self, *args, **kwargs):
    if id(self.fn.__globals__) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(self.fn.__globals__))
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter._patch_lang_tensor = _patch_tensor_for_new_numpy
interpreter.InterpreterBuilder.cast_impl = _cast_rounding
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.GridExecutor.__call__ = _launch_anew
interpreter.InterpretedFunction.__call__ = _call_function
assert not interpreter.interpreter_builder.options.debug
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
if DEVICE == "cpu":  # elsewhere kernels are compiled
    fast_interpreter.make_fast()

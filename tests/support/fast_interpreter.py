"""Less work for Triton's interpreter between two operations of numpy; what it computes and refuses stays as it is.

For every intermediate result it builds a table of numpy's types, wraps the shape anew, checks it again and writes names
that only messages show: nearly half of its time. `make_fast` is for processes that compile nothing, since the compiler
shares these classes.
"""

import functools
import math

import numpy as np
import triton.language as tl
import triton.language.core as core
import triton.language.semantic as semantic
import triton.runtime.interpreter as interpreter

_numpy_dtype, _equal, _same = interpreter._get_np_dtype, core.dtype.__eq__, core.tuple.__eq__
_broadcast = semantic.TritonSemantic.broadcast_impl_value


def make_fast() -> None:
    """Put the functions below in place of the interpreter's and the language's own."""
    interpreter._get_np_dtype = _numpy_dtype_of
    core.block_type.__init__, core.tensor.__init__ = _init_block, _init_tensor
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tuple_type.__init__, core.tuple_type.name = _init_tuple_type, property(_tuple_type_name)
    core.dtype.__eq__, core.tuple.__eq__ = _equal_dtypes, _equal_tuples
    semantic.TritonSemantic.broadcast_impl_value = _broadcast_to_each_other


@functools.cache
def _named_dtype(name: str) -> np.dtype:
    return _numpy_dtype(tl.dtype(name))


def _numpy_dtype_of(kind) -> np.dtype:
    kind = kind.scalar
    return _numpy_dtype(kind) if kind.is_ptr() else _named_dtype(kind.name)


@functools.cache
def _checked_shape(shape: tuple[int, ...]):
    """The language's tuple of a block's shape, and its number of elements."""
    return tl.tuple(shape), core.validate_block_shape(shape)


def _init_block(self, element, shape) -> None:
    sizes = shape.value if isinstance(shape, tl.constexpr) else shape
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in sizes])
    self.element_ty, (self.shape, self.numel) = element, _checked_shape(sizes)
    if not sizes:
        raise TypeError("0d block_type is forbidden")


@functools.cache
def _wrapped_shape(shape: tuple[int, ...]):
    """As a tensor holds its shape, and its number of elements."""
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _init_tensor(self, handle, kind) -> None:
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = _wrapped_shape(tuple(kind.shape) if kind.is_block() else ())


def _init_tuple_type(self, types, fields=None) -> None:
    self.types, self.fields = types, fields or [""] * len(types)


def _tuple_type_name(self) -> str:
    return "[" + ",".join(f"{field}:{kind}" for field, kind in zip(self.fields, self.types, strict=False)) + "]"


def _equal_dtypes(self, other) -> bool:
    return self is other or _equal(self, other)


def _equal_tuples(self, other):
    return tl.constexpr(self.values == list(other)) if isinstance(other, tl.tuple | list) else _same(self, other)


def _broadcast_to_each_other(self, one, other):
    return (one, other) if one.shape is other.shape else _broadcast(self, one, other)

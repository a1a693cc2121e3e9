"""Triton's interpreter with less overhead for each operation, for the kernels' tests."""

import builtins
import functools
import math
import operator
from types import SimpleNamespace

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

PATCHED_VERSION = "3.7."  # whose private names are used below


def reduce_overhead() -> None:
    """Patch the interpreter, once for the process.

    It replaces the functions of triton.language at every launch and at every call of a device function: do it once.
    It builds a table at every look-up of a NumPy dtype: cache the result. It checks for integer overflow by
    operations that are interpreted in turn: check by NumPy. Each result has a type, with a shape of objects and a
    name: make them once for each shape. Other versions of Triton run as they are, slowly.
    """
    if not triton.__version__.startswith(PATCHED_VERSION):
        return
    interpreter._patch_attr = bind_semantic
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    of_scalar = functools.cache(interpreter._get_np_dtype)
    uint64 = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda t: uint64 if isinstance(t.scalar, tl.pointer_type) else of_scalar(t.scalar)
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow
    tl.block_type.__init__ = initialize_block_type
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.block_type.with_element_ty = with_element_type
    tl.tensor.__init__ = initialize_tensor
    TritonSemantic.broadcast_impl_value = broadcast


def check_overflow(semantic, lhs, rhs, operation) -> None:
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        exact = getattr(operator, operation.__name__)(*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        in_range = dtype.get_int_min_value() <= exact.min() and exact.max() <= dtype.get_int_max_value()
        assert in_range, f"int{dtype.int_bitwidth} overflow in {operation.__name__}"


# ---- functions -------------------------------------------------------------------------------------------------------

BUILTIN_CODE = tl.core.builtin(lambda: None).__code__  # of a wrapper that only checks that there is a `_semantic`


def bind_semantic(owner, name, member, builder, scope) -> None:
    """In `owner`, `member` with the interpreter as `_semantic`."""
    semantic = interpreter.interpreter_semantic
    function = member.__wrapped__ if member.__code__ is BUILTIN_CODE else member

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, call)


# ---- types and shapes ------------------------------------------------------------------------------------------------


@functools.cache
def make_shape(sizes: tuple[int, ...]) -> tuple:
    """The shape of a block's type, that of a tensor, and the number of elements."""
    numel = tl.core.validate_block_shape(sizes)
    return tl.tuple(sizes), tl.tuple([tl.constexpr(size) for size in sizes]), numel, tl.constexpr(math.prod(sizes))


def initialize_block_type(self, element_type, shape) -> None:
    assert isinstance(shape, (list, tl.tuple))
    sizes = builtins.tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.others = element_type, {}
    self.shape, self.tensor_shape, self.numel, self.tensor_numel = make_shape(sizes)


def with_element_type(self, element_type):
    """The type of a block of that shape. An entry keeps its element type, so that no other gets its id."""
    found = self.others.get(id(element_type))
    if found is None:
        found = self.others[id(element_type)] = tl.block_type(element_type, self.shape)
    return found


def initialize_tensor(self, handle, type) -> None:
    self.handle, self.type = handle, type
    if isinstance(type, tl.block_type):
        self.dtype, self.shape, self.numel = type.element_ty, type.tensor_shape, type.tensor_numel
    else:
        self.dtype, (_, self.shape, _, self.numel) = type.scalar, make_shape(())


original_broadcast = TritonSemantic.broadcast_impl_value


def broadcast(semantic, lhs, rhs):
    """Equal shapes are one object, and need no more; nor do two scalars."""
    types = [x.type if isinstance(x.type, tl.block_type) else None for x in (lhs, rhs)]
    if types[0] and types[1]:
        sizes = [type.shape.values for type in types]
        if sizes[0] is sizes[1]:
            return lhs, rhs
        if len(sizes[0]) == len(sizes[1]):
            return broadcast_blocks(semantic, lhs, rhs, *sizes)
    elif types[0] is types[1]:
        return lhs, rhs
    return original_broadcast(semantic, lhs, rhs)


def broadcast_blocks(semantic, lhs, rhs, left: list[int], right: list[int]):
    shape = [b if a == 1 else a for a, b in zip(left, right, strict=True)]
    if any(b not in (1, size) for b, size in zip(right, shape, strict=True)):
        return original_broadcast(semantic, lhs, rhs)  # an error
    return [
        x if sizes == shape
        else tl.tensor(semantic.builder.create_broadcast(x.handle, shape), tl.block_type(x.type.element_ty, shape))
        for x, sizes in ((lhs, left), (rhs, right))
    ]  # fmt: skip

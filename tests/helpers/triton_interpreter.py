"""Triton's interpreter with less overhead for each operation: the kernels' tests take half of the time."""

import functools
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
    operations that are interpreted in turn: check by NumPy. Other versions of Triton run as they are, slowly.
    """
    if not triton.__version__.startswith(PATCHED_VERSION):
        return
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
    of_scalar = functools.cache(interpreter._get_np_dtype)
    uint64 = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda t: uint64 if isinstance(t.scalar, tl.pointer_type) else of_scalar(t.scalar)
    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow


def check_overflow(semantic, lhs, rhs, operation) -> None:
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        exact = getattr(operator, operation.__name__)(*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        in_range = dtype.get_int_min_value() <= exact.min() and exact.max() <= dtype.get_int_max_value()
        assert in_range, f"int{dtype.int_bitwidth} overflow in {operation.__name__}"

"""Helpers for all Triton kernels. The same names exist without Triton, and with TRITON_INTERPRET=1 on the CPU."""

import math
import os
from types import SimpleNamespace

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = math.log2(math.e)


try:
    import triton
    import triton.language as tl

    jit = triton.jit
    NATIVE, PER_LOG2 = tl.constexpr(not INTERPRETED), tl.constexpr(LOG2E)
except ImportError:  # macOS, Windows: only the plain versions run
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)
    NATIVE, PER_LOG2 = False, LOG2E

    def jit(function):
        return function


HALF_DTYPES = (torch.bfloat16, torch.float16)


def can_run(*tensors: Tensor) -> bool:
    """Whether kernels support these tensors: on a GPU, or on the CPU with Triton's interpreter; not float64."""
    if triton is None:
        return False
    return all((t.is_cuda or INTERPRETED) and t.dtype != torch.float64 for t in tensors)


def multiprocessors(x: Tensor) -> int:
    """The number of multiprocessors of x's device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def dot_dtype(*tensors: Tensor):
    """The dtype of tl.dot's operands: the half type that all tensors share, otherwise float32; always float32 in the
    interpreter, which does not support half types."""
    if INTERPRETED or any(t.dtype != tensors[0].dtype for t in tensors):
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(tensors[0].dtype, tl.float32)


@jit
def fast_exp(x):
    """exp(x) in three instructions. Triton's tl.exp takes six, to handle results under 1e-38, which are zero here."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * PER_LOG2], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return tl.exp(x)


@jit
def fast_reciprocal(x):
    """1 / x; results under 1e-38 are zero."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return 1.0 / x

"""What all Triton kernels share. Without Triton, or with TRITON_INTERPRET=1 on the CPU, the same names exist."""

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
except ImportError:  # macOS, Windows: the plain paths alone
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)
    NATIVE, PER_LOG2 = False, LOG2E

    def jit(function):
        return function


HALF_DTYPES = (torch.bfloat16, torch.float16)


def can_run(*tensors: Tensor) -> bool:
    """Whether kernels can take these tensors: on a GPU, or on the CPU where Triton interprets; no float64."""
    if triton is None:
        return False
    return all((t.is_cuda or INTERPRETED) and t.dtype != torch.float64 for t in tensors)


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the device that x is on."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not under n."""
    return 1 << (n - 1).bit_length()


def dot_dtype(*tensors: Tensor):
    """What tl.dot multiplies: the half type that all are in, or float32, also where the interpreter knows no half."""
    if INTERPRETED or any(t.dtype != tensors[0].dtype for t in tensors):
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(tensors[0].dtype, tl.float32)


@jit
def fast_exp(x):
    """exp(x) in three instructions where Triton's takes six, which guard results that are under 1e-38, here zero."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * PER_LOG2], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return tl.exp(x)


@jit
def fast_reciprocal(x):
    """1 / x, zero where that is under 1e-38."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return 1.0 / x

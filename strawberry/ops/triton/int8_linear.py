"""Linear maps with int8 weights and a scale per output channel."""

import torch
from torch import Tensor

from strawberry.ops.triton.common import HALF_DTYPES, dot_dtype, jit, next_power_of_2, tl


@jit
def int8_gemv_kernel(
    x, w, scale, bias, y, M, N, K, x_row,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Up to four rows of x: products accumulate elementwise along k, and are reduced across lanes once at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, at = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    start_w = w + n.to(tl.int64) * K
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + at
        weight = tl.load(start_w[:, None] + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        value = tl.load(x + m[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total += value.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    result = tl.sum(total, axis=2) * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    here = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], result.to(y.dtype.element_ty), mask=here)


@jit
def int8_gemm_kernel(
    x, w, scale, bias, y, M, N, K, x_row,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Up to 64 rows of x: tensor cores multiply all of them by a few rows of w."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m, at = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    start_w = w + n.to(tl.int64) * K
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + at
        weight = tl.load(start_w[:, None] + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        value = tl.load(x + m[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(value.to(DOT), tl.trans(weight.to(DOT)), total, input_precision="ieee")
    result = total * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    here = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], result.to(y.dtype.element_ty), mask=here)


@torch.library.custom_op("strawberry::int8_linear", mutates_args=())
def int8_linear_op(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    (M, K), N = x.shape, w.size(0)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    args = (x, w, scale, scale if bias is None else bias, y, M, N, K, x.stride(0))
    if M <= 4:
        rows = next_power_of_2(M)
        block = {"ROWS": rows, "BLOCK_N": 4 if N < 16384 else 8, "BLOCK_K": min(1024 // rows, next_power_of_2(K))}
        int8_gemv_kernel[(-(-N // block["BLOCK_N"]),)](*args, **block, BIAS=bias is not None, num_warps=4)
    else:
        block = {"ROWS": next_power_of_2(max(M, 16)), "BLOCK_N": 16 if N < 16384 else 64}
        block["BLOCK_K"] = 128 if x.dtype in HALF_DTYPES else 32
        types = {"BIAS": bias is not None, "DOT": dot_dtype(x)}
        int8_gemm_kernel[(-(-N // block["BLOCK_N"]),)](*args, **block, **types, num_warps=4, num_stages=4)
    return y


@int8_linear_op.register_fake
def _(x, w, scale, bias):
    return x.new_empty(x.size(0), w.size(0))

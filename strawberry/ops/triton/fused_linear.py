"""Linear maps of a few rows, with the norm before them and the activation and the residual sum after them."""

import torch
from torch import Tensor

from strawberry.ops.triton.common import (
    HALF_DTYPES,
    dot_dtype,
    fast_exp,
    jit,
    next_power_of_2,
    overlaps,
    prefetch,
    tl,
    wait_for_inputs,
)

MAX_GEMV_ROWS = 16  # up to which rows are multiplied one after the other, and more on tensor cores
MAX_WEIGHTS = 3  # matrices that one kernel multiplies by the same rows


@jit
def gelu(h):
    return 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))


@jit
def sigmoid(h):
    return 1 / (1 + fast_exp(-h))


@jit
def gelu_tanh(h):
    return h * sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))  # (1 + tanh(z)) / 2 = σ(2z)


@jit
def row_norm(
    x, n_zeros, BLOCK_N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr
):
    """(mean, 1 / standard deviation) of K numbers from x on; the mean is 0 for an RMS norm. n_zeros is (BLOCK_N, 1)
    zeros: a program's lanes then read x as they read the rows of W."""
    at = tl.arange(0, BLOCK_K)
    mean = tl.sum(n_zeros.to(tl.float32), axis=1)
    if LAYER:
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            k = n_zeros + (start + at)[None, :]
            total += tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) / K
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = n_zeros + (start + at)[None, :]
        value = tl.where(k < K, tl.load(x + k, mask=k < K, other=0.0).to(tl.float32) - mean[:, None], 0.0)
        total += value * value
    return mean, 1 / tl.sqrt(tl.sum(total, axis=1) / K + EPS)


@jit
def select_weight(
    w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's matrix, its scale and bias, the column of y where its results begin, its N, and the program's
    index among those of the matrix."""
    program = tl.program_id(0)
    zero = program * 0  # numbers as tensors, which both ways through an `if` share
    w, scale, bias, first, N = w1, scale1, bias1, zero, zero + N1
    if N2 > 0:
        ends = tl.cdiv(N1, BLOCK_N), tl.cdiv(N2, BLOCK_N)
        if program >= ends[0]:
            program -= ends[0]
            w, scale, bias, first, N = w2, scale2, bias2, zero + N1, zero + N2
            if program >= ends[1]:
                program -= ends[1]
                w, scale, bias, first, N = w3, scale3, bias3, zero + N1 + N2, zero + N3
    return w, scale, bias, first, N, program


@jit
def activate(h, gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "swiglu":
        h *= gate * sigmoid(gate)
    elif ACTIVATION == "gelu":
        h = gelu(h)
    elif ACTIVATION == "gelu_tanh":
        h = gelu_tanh(h)
    elif ACTIVATION == "relu":
        h = tl.maximum(h, 0.0)
    elif ACTIVATION == "relu2":
        h = tl.maximum(h, 0.0) * tl.maximum(h, 0.0)
    return h


@jit
def fused_linear_kernel(
    x, gain, shift, w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, residual, y, M, x_row, w_row, residual_row,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, OUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr,
    EPS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N results of each row of x. Products accumulate elementwise along k, and each result is reduced across the
    lanes of one warp. Every row is computed alone, by the same instructions whatever M is; the second and later rows
    read W from the L1 cache. With several matrices, a program's matrix follows from its index."""
    w, scale, bias, first, N, program = select_weight(
        w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, N1, N2, N3, BLOCK_N)
    n, at = program * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    n_zeros = tl.zeros((BLOCK_N, 1), tl.int32)
    start_w = n.to(tl.int64)[:, None] * K
    if OVERLAP:
        lines = tl.arange(0, LINES)[None, :] * LINE
        lines = w + tl.where((n < N)[:, None] & (lines < K), start_w + lines, 0)
        prefetch(lines)
        if GATED:
            prefetch(lines + OUT * K)
        wait_for_inputs()
    for m in range(M):
        row = x + m * x_row
        mean, inverse = 0.0, 1.0
        if NORM != "none":
            mean, inverse = row_norm(row, n_zeros, BLOCK_N, K, BLOCK_K, NORM == "layer", EPS)
            mean, inverse = mean[:, None], inverse[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            k = n_zeros + (start + at)[None, :]
            mask = (n < N)[:, None] & (k < K)
            place = w + m * w_row + start_w + k
            if K % 16 == 0:
                place = tl.multiple_of(place, [16, 16])
            weight = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM != "none":
                value = (value - mean) * inverse
            if GAIN:
                value *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            if SHIFT:
                value += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
            total += value * weight
            if GATED:
                gate += value * tl.load(place + OUT * K, mask=mask, other=0.0).to(tl.float32)
        result = tl.sum(total, axis=1)
        gating = tl.sum(gate, axis=1)
        if SCALED:
            result *= tl.load(scale + n, mask=n < N, other=0.0)
            if GATED:
                gating *= tl.load(scale + OUT + n, mask=n < N, other=0.0)
        if BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            if GATED:
                gating += tl.load(bias + OUT + n, mask=n < N, other=0.0).to(tl.float32)
        result = activate(result, gating, ACTIVATION)
        if RESIDUAL:
            result += tl.load(residual + m * residual_row + first + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y + m * OUT + first + n, result.to(y.dtype.element_ty), mask=n < N)


@jit
def fused_linear_dot_kernel(
    x, gain, shift, w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, residual, y, M, x_row, residual_row,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr,
    EPS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """All rows by BLOCK_N rows of W, on tensor cores; the normed rows are rounded to their type."""
    w, scale, bias, first, N, program = select_weight(
        w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, N1, N2, N3, BLOCK_N)
    m, n, at = tl.arange(0, ROWS), program * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    start_x, start_w = x + m[:, None] * x_row, w + n.to(tl.int64)[:, None] * K
    if OVERLAP:
        wait_for_inputs()
    mean = tl.zeros((ROWS,), tl.float32)
    inverse = mean + 1.0
    if NORM == "layer":
        sums = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = (start + at)[None, :]
            sums += tl.load(start_x + k, mask=(m < M)[:, None] & (k < K), other=0.0).to(tl.float32)
        mean = tl.sum(sums, axis=1) / K
    if NORM != "none":
        squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = (start + at)[None, :]
            value = tl.load(start_x + k, mask=(m < M)[:, None] & (k < K), other=0.0).to(tl.float32) - mean[:, None]
            squares += tl.where(k < K, value * value, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(squares, axis=1) / K + EPS)
    result, gate = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + at)[None, :]
        value = tl.load(start_x + k, mask=(m < M)[:, None] & (k < K), other=0.0)
        if NORM != "none":
            value = (value.to(tl.float32) - mean[:, None]) * inverse[:, None]
        if GAIN:
            value *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
        if SHIFT:
            value += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        mask = (n < N)[:, None] & (k < K)
        weight = tl.load(start_w + k, mask=mask, other=0.0)
        result = tl.dot(value.to(DOT), tl.trans(weight.to(DOT)), result, input_precision="ieee")
        if GATED:
            weight = tl.load(start_w + OUT * K + k, mask=mask, other=0.0)
            gate = tl.dot(value.to(DOT), tl.trans(weight.to(DOT)), gate, input_precision="ieee")
    if SCALED:
        result *= tl.load(scale + n, mask=n < N, other=0.0)[None, :]
        if GATED:
            gate *= tl.load(scale + OUT + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias + OUT + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    result = activate(result, gate, ACTIVATION)
    here, column = (m < M)[:, None] & (n < N)[None, :], (first + n)[None, :]
    if RESIDUAL:
        result += tl.load(residual + m[:, None] * residual_row + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * OUT + column, result.to(y.dtype.element_ty), mask=here)


@torch.library.custom_op("strawberry::fused_linear", mutates_args=())
def fused_linear_op(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], biases: list[Tensor], norm: str, gain: Tensor | None,
    shift: Tensor | None, eps: float, activation: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    (M, K), widths = x.shape, list_widths(weights, activation)
    y = torch.empty(M, sum(widths), dtype=x.dtype, device=x.device)
    pointers = [x, *(x if t is None else t for t in (gain, shift)), *weights]
    pointers += [weights[0]] * (MAX_WEIGHTS - len(weights))
    for tensors in (scales, biases):
        pointers += [*tensors, *[x] * (MAX_WEIGHTS - len(tensors))]
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    args, overlap = (*pointers, x if residual is None else residual, y, M), overlaps(x)
    wide = sum(widths) >= 16384
    block_n = (16 if wide else 4) if M <= MAX_GEMV_ROWS else (64 if wide else 16)
    grid = (sum(-(-n // block_n) for n in widths),)
    widths += [0] * (MAX_WEIGHTS - len(widths))
    options = {"K": K, "N1": widths[0], "N2": widths[1], "N3": widths[2], "OUT": y.size(1), "BLOCK_N": block_n,
               "NORM": norm, "GAIN": gain is not None, "SHIFT": shift is not None, "EPS": eps, "SCALED": bool(scales),
               "BIAS": bool(biases), "ACTIVATION": activation, "RESIDUAL": residual is not None, "OVERLAP": overlap,
               "num_warps": 4, **({"launch_pdl": True} if overlap else {})}  # fmt: skip
    if M <= MAX_GEMV_ROWS:
        line = 128 // weights[0].element_size()  # numbers in a line of the L2 cache
        w_row = weights[0].stride(0) if weights[0].dim() == 3 else 0
        blocks = {"LINE": line, "LINES": next_power_of_2(-(-K // line)), "BLOCK_K": min(256, next_power_of_2(K))}
        fused_linear_kernel[grid](*args, strides[0], w_row, strides[1], **options, **blocks)
    else:
        fused_linear_dot_kernel[grid](*args, *strides, **options, ROWS=next_power_of_2(max(M, 16)), DOT=dot_dtype(x),
                                      BLOCK_K=128 if x.dtype in HALF_DTYPES else 32, num_stages=3)  # fmt: skip
    return y


@fused_linear_op.register_fake
def _(x, weights, scales, biases, norm, gain, shift, eps, activation, residual):
    return x.new_empty(x.size(0), sum(list_widths(weights, activation)))


def list_widths(weights: list[Tensor], activation: str) -> list[int]:
    """The columns of the result that each matrix makes."""
    return [w.size(-2) // (2 if activation == "swiglu" else 1) for w in weights]

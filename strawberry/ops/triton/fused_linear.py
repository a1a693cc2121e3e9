"""Linear maps of a few rows, with the norm before them and the activation and the residual sum after them."""

import torch
from torch import Tensor

from strawberry.ops.triton.common import fast_exp, jit, next_power_of_2, overlaps, prefetch, tl, wait_for_inputs

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
        if ACTIVATION == "swiglu":
            result *= gating * sigmoid(gating)
        elif ACTIVATION == "gelu":
            result = gelu(result)
        elif ACTIVATION == "gelu_tanh":
            result = gelu_tanh(result)
        elif ACTIVATION == "relu":
            result = tl.maximum(result, 0.0)
        elif ACTIVATION == "relu2":
            result = tl.maximum(result, 0.0) * tl.maximum(result, 0.0)
        if RESIDUAL:
            result += tl.load(residual + m * residual_row + first + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y + m * OUT + first + n, result.to(y.dtype.element_ty), mask=n < N)


@torch.library.custom_op("strawberry::fused_linear", mutates_args=())
def fused_linear_op(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], biases: list[Tensor], norm: str, gain: Tensor | None,
    shift: Tensor | None, eps: float, activation: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    (M, K), widths = x.shape, list_widths(weights, activation)
    y = torch.empty(M, sum(widths), dtype=x.dtype, device=x.device)
    fill = [weights[0]] * (MAX_WEIGHTS - len(weights))
    w_row = weights[0].stride(0) if weights[0].dim() == 3 else 0
    pointers = [x, *(x if t is None else t for t in (gain, shift)), *weights, *fill]
    for tensors in (scales, biases):
        pointers += [*tensors, *[x] * (MAX_WEIGHTS - len(tensors))]
    residual_row = 0 if residual is None else residual.stride(0)
    args = (*pointers, x if residual is None else residual, y, M, x.stride(0), w_row, residual_row)
    block_n = 4 if sum(widths) < 16384 else 16
    programs = sum(-(-n // block_n) for n in widths)
    widths += [0] * (MAX_WEIGHTS - len(widths))
    overlap, line = overlaps(x), 128 // weights[0].element_size()  # numbers in a line of the L2 cache
    fused_linear_kernel[(programs,)](
        *args, K=K, N1=widths[0], N2=widths[1], N3=widths[2], OUT=y.size(1), BLOCK_N=block_n,
        BLOCK_K=min(256, next_power_of_2(K)), NORM=norm, GAIN=gain is not None, SHIFT=shift is not None, EPS=eps,
        SCALED=bool(scales), BIAS=bool(biases), ACTIVATION=activation, RESIDUAL=residual is not None, OVERLAP=overlap,
        LINE=line, LINES=next_power_of_2(-(-K // line)), num_warps=4, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return y


@fused_linear_op.register_fake
def _(x, weights, scales, biases, norm, gain, shift, eps, activation, residual):
    return x.new_empty(x.size(0), sum(list_widths(weights, activation)))


def list_widths(weights: list[Tensor], activation: str) -> list[int]:
    """The columns of the result that each matrix makes."""
    return [w.size(-2) // (2 if activation == "swiglu" else 1) for w in weights]

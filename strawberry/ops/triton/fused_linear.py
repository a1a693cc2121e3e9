"""Linear maps of a few rows, with the norm before them and the activation and the residual sum after them."""

import torch
from torch import Tensor

from strawberry.ops.triton.common import HALF_DTYPES, dot_dtype, fast_exp, jit, next_power_of_2, tl

MAX_GEMV_ROWS = 16  # rows up to which they are multiplied one after the other; more use tensor cores
MAX_WEIGHTS = 3  # matrices that one kernel multiplies by the same rows
REGISTERS = 64 * 1024  # bytes that a program may load early: half of the registers that its threads can have
SHARED_MEMORY = 96 * 1024  # bytes that a program may use; compute capability 8.6 has 99 KB
WIDE = 16384  # results per row from which on each program computes more of them


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
    """(mean, 1 / standard deviation) of K numbers from x on, (BLOCK_N,) each; the mean is 0 for an RMS norm. n_zeros,
    (BLOCK_N, 1) zeros, gives the loads of x the layout of those of W."""
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
    program, w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The program's matrix, its scale and bias, the column of y where its results begin, its N, and the program's index
    among those of the matrix."""
    zero = program * 0  # makes constants tensors: both branches of an `if` must give the same types
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
def load_blocks(start, inside, n_zeros, K: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr):
    """A tuple of the blocks (BLOCK_N, BLOCK_K) of K numbers from each of start (BLOCK_N, 1) on, from left to right."""
    blocks = ()
    for first in tl.static_range(0, K, BLOCK_K):
        k = n_zeros + (first + tl.arange(0, BLOCK_K))[None, :]
        place = start + k
        if ALIGNED:
            place = tl.multiple_of(place, [16, 16])
        blocks += (tl.load(place, mask=inside & (k < K), other=0.0),)
    return blocks


@jit
def load_scales(
    scale, bias, n, N, OUT: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """The scales and biases of results n and of their gates; 0 where there are none."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    factor, term = tl.zeros_like(n).to(tl.float32), tl.zeros_like(n).to(tl.float32)
    gate_factor, gate_term = factor, term
    if SCALED:
        factor = tl.load(scale + n, mask=n < N, other=0.0)
        if GATED:
            gate_factor = tl.load(scale + OUT + n, mask=n < N, other=0.0)
    if BIAS:
        term = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GATED:
            gate_term = tl.load(bias + OUT + n, mask=n < N, other=0.0).to(tl.float32)
    return factor, term, gate_factor, gate_term


@jit
def finish(
    h, gate, factor, term, gate_factor, gate_term,
    SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The activation of the sums h (…, BLOCK_N), after their scales and biases; `gate`: the gate's sums for
    "swiglu"."""
    if SCALED:
        h, gate = h * factor, gate * gate_factor
    if BIAS:
        h, gate = h + term, gate + gate_term
    return activate(h, gate, ACTIVATION)


@jit
def fused_linear_kernel(
    x, gain, shift, w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, residual, y, M, x_row, w_row, residual_row,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, OUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr,
    EPS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """BLOCK_N results of each row of x. Products accumulate elementwise along k, and each result is reduced across the
    lanes of one warp. Every row is computed alone, by the same instructions whatever M is; the second and later rows
    read W from the L1 cache. With several matrices, a program's index selects its matrix. AHEAD: W and the norm's gain
    and shift are loaded before the norm is computed."""
    w, scale, bias, first, N, program = select_weight(
        tl.program_id(0), w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, N1, N2, N3, BLOCK_N)
    n, at = program * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    n_zeros = tl.zeros((BLOCK_N, 1), tl.int32)
    inside, everywhere = (n < N)[:, None], n_zeros == 0
    start_w = n.to(tl.int64)[:, None] * K
    scales = load_scales(scale, bias, n, N, OUT, SCALED, BIAS, ACTIVATION)
    for m in range(M):
        row, rows_w = x + m * x_row, w + m * w_row + start_w
        weights = load_blocks(rows_w, inside, n_zeros, K, BLOCK_K, K % 16 == 0)
        gates, gains, shifts = weights, weights, weights
        if GATED:
            gates = load_blocks(rows_w + OUT * K, inside, n_zeros, K, BLOCK_K, K % 16 == 0)
        if GAIN:
            gains = load_blocks(gain + n_zeros, everywhere, n_zeros, K, BLOCK_K, False)
        if SHIFT:
            shifts = load_blocks(shift + n_zeros, everywhere, n_zeros, K, BLOCK_K, False)
        sum_with = tl.zeros((BLOCK_N,), tl.float32)
        if RESIDUAL:
            sum_with = tl.load(residual + m * residual_row + first + n, mask=n < N, other=0.0).to(tl.float32)
        if AHEAD:
            tl.debug_barrier()  # otherwise the compiler moves the loads after the norm, one after the other
        mean, inverse = 0.0, 1.0
        if NORM != "none":
            mean, inverse = row_norm(row, n_zeros, BLOCK_N, K, BLOCK_K, NORM == "layer", EPS)
            mean, inverse = mean[:, None], inverse[:, None]
        total, gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            k = n_zeros + (start + at)[None, :]
            value = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
            if NORM != "none":
                value = (value - mean) * inverse
            if GAIN:
                value *= gains[start // BLOCK_K].to(tl.float32)
            if SHIFT:
                value += shifts[start // BLOCK_K].to(tl.float32)
            total += value * weights[start // BLOCK_K].to(tl.float32)
            if GATED:
                gate += value * gates[start // BLOCK_K].to(tl.float32)
        result = finish(tl.sum(total, axis=1), tl.sum(gate, axis=1), scales[0], scales[1], scales[2], scales[3],
                        SCALED, BIAS, ACTIVATION) + sum_with  # fmt: skip
        tl.store(y + m * OUT + first + n, result.to(y.dtype.element_ty), mask=n < N)


@jit
def fused_linear_dot_kernel(
    x, w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, residual, y, M, x_row, residual_row, row_blocks,
    K: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ROWS rows by BLOCK_N rows of W, on tensor cores. Programs that share rows of W have consecutive indices, so that
    all but the first read them from the L2 cache."""
    w, scale, bias, first, N, program = select_weight(
        tl.program_id(0) // row_blocks, w1, w2, w3, scale1, scale2, scale3, bias1, bias2, bias3, N1, N2, N3, BLOCK_N)
    m = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    n, at = program * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    start_x, start_w = x + m[:, None] * x_row, w + n.to(tl.int64)[:, None] * K
    if K % 16 == 0:
        start_w = tl.multiple_of(start_w, [16, 16])
    result, gate = tl.zeros((ROWS, BLOCK_N), tl.float32), tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + at)[None, :]
        value = tl.load(start_x + k, mask=(m < M)[:, None] & (k < K), other=0.0).to(DOT)
        mask = (n < N)[:, None] & (k < K)
        weight = tl.load(start_w + k, mask=mask, other=0.0)
        result = tl.dot(value, tl.trans(weight.to(DOT)), result, input_precision="ieee")
        if GATED:
            weight = tl.load(start_w + OUT * K + k, mask=mask, other=0.0)
            gate = tl.dot(value, tl.trans(weight.to(DOT)), gate, input_precision="ieee")
    factor, term, gate_factor, gate_term = load_scales(scale, bias, n, N, OUT, SCALED, BIAS, ACTIVATION)
    result = finish(result, gate, factor, term, gate_factor, gate_term, SCALED, BIAS, ACTIVATION)
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
    options = {"K": K, "OUT": y.size(1), "SCALED": bool(scales), "BIAS": bool(biases), "ACTIVATION": activation,
               "RESIDUAL": residual is not None, "num_warps": 4}  # fmt: skip
    options |= {f"N{i + 1}": n for i, n in enumerate(widths + [0] * (MAX_WEIGHTS - len(widths)))}
    pointers = []
    for tensors in (weights, scales, biases):  # padded with one of the same type: see select_weight
        pointers += [*tensors, *[tensors[0] if tensors else x] * (MAX_WEIGHTS - len(tensors))]
    pointers += [x if residual is None else residual, y]
    residual_row = 0 if residual is None else residual.stride(0)
    if M <= MAX_GEMV_ROWS:
        # 3072 results by 8: of 768 programs by 4, an H100 runs 660 at once
        block_n = 16 if y.size(1) >= WIDE else 8 if y.size(1) > 2560 else 4
        w_row = weights[0].stride(0) if weights[0].dim() == 3 else 0
        grid = (sum(-(-n // block_n) for n in widths),)
        ahead = K * (block_n * (1 + (activation == "swiglu")) + 4 * (gain is not None) + 4 * (shift is not None))
        options["AHEAD"] = ahead * x.element_size() <= REGISTERS
        options |= {"NORM": norm, "GAIN": gain is not None, "SHIFT": shift is not None, "EPS": eps}
        fused_linear_kernel[grid](
            x, *(x if t is None else t for t in (gain, shift)), *pointers, M, x.stride(0), w_row, residual_row,
            BLOCK_N=block_n, BLOCK_K=min(256, next_power_of_2(K)), **options)  # fmt: skip
        return y
    if norm != "none":
        raise ValueError(f"{M} rows with a norm: up to {MAX_GEMV_ROWS}")
    block = choose_dot_block(M, y.size(1), x, activation == "swiglu")
    row_blocks = -(-M // block["ROWS"])
    grid = (row_blocks * sum(-(-n // block["BLOCK_N"]) for n in widths),)
    fused_linear_dot_kernel[grid](x, *pointers, M, x.stride(0), residual_row, row_blocks, **block,
                                  **options, DOT=dot_dtype(x))  # fmt: skip
    return y


@fused_linear_op.register_fake
def _(x, weights, scales, biases, norm, gain, shift, eps, activation, residual):
    return x.new_empty(x.size(0), sum(list_widths(weights, activation)))


def choose_dot_block(M: int, N: int, x: Tensor, gated: bool) -> dict[str, int]:
    """The shape of one program's product, and the number of stages of its loads: one more than fit SHARED_MEMORY. If W
    is small, 32 rows by few rows of W, so that most multiprocessors have a program; if W is large, all rows, so that W
    is read once."""
    half, rows, block_n = x.dtype in HALF_DTYPES, 32, 16 if N < 2048 else 32
    block_k = 256 if half else 64
    if N >= WIDE:
        rows, block_n, block_k = next_power_of_2(M), 64, block_k // 2
    stage = (rows + block_n * (1 + gated)) * block_k * x.element_size()
    return {"ROWS": rows, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_stages": min(5, 1 + SHARED_MEMORY // stage)}


def list_widths(weights: list[Tensor], activation: str) -> list[int]:
    """The number of columns of the result from each matrix."""
    return [w.size(-2) // (2 if activation == "swiglu" else 1) for w in weights]

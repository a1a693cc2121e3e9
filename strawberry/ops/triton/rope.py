"""RoPE and RMS norm of queries and keys, in the layout of a fused qkv projection."""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import jit, tl
from strawberry.ops.triton.float8 import store_with_transpose

ROPE_TILE = 2048  # elements per program: in half types, 16 bytes of each half of a row per thread
NORM_EPS = 1e-6  # of the RMS norm


def fused_qk_rope_norm(
    qkv: Tensor, widths: tuple[int, ...], cos: Tensor, sin: Tensor, normed: bool
) -> tuple[Tensor, ...]:
    """Queries, keys and values for attention: RoPE rotates the pairs of each head of q and k and, if `normed`, each
    head is divided by its root mean square.

    qkv (B, T, Dq + 2·Dk), the output of a fused projection, and widths (Dq, Dk, Dk); cos and sin (B or 1, T, 1, d/2),
    for heads of d channels. Returns q and k, (B, T, Dq) and (B, T, Dk) in qkv's dtype, and v, a view of qkv.
    Differentiable in qkv. Requires `can_fuse_rope`.

    One pass in each direction. Backward writes the gradient of qkv directly, where plain PyTorch computes those of q, k
    and v and then concatenates them. It recomputes the norm from qkv, which attention keeps anyway for v.

    Bytes moved per element of (B, T, D) in half types, D = Dq = Dk: forward 8, backward 12, and 4 more if normed.
    """
    return QKRopeNorm.apply(qkv, widths, cos, sin, normed)


def can_fuse_rope(qkv: Tensor, widths: tuple[int, ...], cos: Tensor) -> bool:
    """Whether the kernels can be used: in training, with q, k and v from one product, and RoPE over the whole of each
    head, of 16 … 256 channels, a power of two."""
    d = 2 * cos.size(-1)
    fits = 16 <= d <= 256 and d & (d - 1) == 0 and len(widths) == 3 and widths[1] == widths[2]
    supported = fits and kernels.can_run(qkv, cos) and qkv.dtype.is_floating_point and cos.size(1) == qkv.size(1)
    return supported and qkv.numel() > 0 and torch.is_grad_enabled() and qkv.requires_grad


class QKRopeNorm(torch.autograd.Function):
    """`fused_qk_rope_norm`. An autograd function, because an operator of torch.library may not return a view such as
    v."""

    @staticmethod
    def forward(ctx, qkv: Tensor, widths: tuple[int, ...], cos: Tensor, sin: Tensor, normed: bool) -> tuple:
        ctx.save_for_backward(qkv if normed else None, cos, sin)
        ctx.normed = normed
        q, k = torch.ops.strawberry.qk_rope_norm(qkv, cos, sin, widths[0], widths[1], normed)
        return q, k, qkv[..., widths[0] + widths[1] :]

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
        qkv, cos, sin = ctx.saved_tensors
        return torch.ops.strawberry.qk_rope_norm_backward(dq, dk, dv, qkv, cos, sin), None, None, None, None


@jit
def program_rows(heads, tokens, HALF: tl.constexpr, ROWS: tl.constexpr):
    """The program's rows, each a head of a token: the token index, the columns of the head's first half, and the
    mask."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return row // heads, row % heads * (2 * HALF) + tl.arange(0, HALF)[None, :], row < tokens * heads


@jit
def load_halves(x, at, here, HALF: tl.constexpr):
    """Both halves of the rows, in float32."""
    first = tl.load(x + at, mask=here, other=0.0)
    return first.to(tl.float32), tl.load(x + at + HALF, mask=here, other=0.0).to(tl.float32)


@jit
def store_halves(x, at, here, first, second, HALF: tl.constexpr):
    tl.store(x + at, first.to(x.dtype.element_ty), mask=here)
    tl.store(x + at + HALF, second.to(x.dtype.element_ty), mask=here)


@jit
def load_cos_sin(cos, sin, token, places, here, HALF: tl.constexpr):
    """Cosines and sines of the rows' tokens; the tables have `places` positions, T or B · T."""
    at = token % places * HALF + tl.arange(0, HALF)[None, :]
    c, s = tl.load(cos + at, mask=here, other=0.0), tl.load(sin + at, mask=here, other=0.0)
    return c.to(tl.float32), s.to(tl.float32)


@jit
def rms_reciprocal(first, second, HALF: tl.constexpr, EPS: tl.constexpr):
    """One over the root mean square of each row, which rotation does not change."""
    return tl.rsqrt(tl.sum(first * first + second * second, axis=1)[:, None] * (0.5 / HALF) + EPS)


@jit
def rope_norm_part(
    qkv, cos, sin, y, heads, tokens, places, width,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token, column, here = program_rows(heads, tokens, HALF, ROWS)
    a, b = load_halves(qkv, token.to(tl.int64) * width + column, here, HALF)
    c, s = load_cos_sin(cos, sin, token, places, here, HALF)
    if NORMED:
        root = rms_reciprocal(a, b, HALF, EPS)
        a, b = a * root, b * root
    at = token.to(tl.int64) * (heads * 2 * HALF) + column
    store_halves(y, at, here, a * c + b * s, b * c - a * s, HALF)


@jit
def rope_norm_kernel(
    qkv, cos, sin, q, k, heads, kv_heads, tokens, places, width,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Consecutive rows (heads of tokens) of q or of k, depending on the program's second index."""
    if tl.program_id(1) == 0:
        rope_norm_part(qkv, cos, sin, q, heads, tokens, places, width, NORMED, EPS, HALF, ROWS)
    else:
        k_part = qkv + heads * (2 * HALF)
        rope_norm_part(k_part, cos, sin, k, kv_heads, tokens, places, width, NORMED, EPS, HALF, ROWS)


@jit
def rope_norm_gradient(
    grad, grad_at, qkv, at, cos, sin, token, places, here,
    ROTATED: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of rows of the gradient of qkv at offset `at`, from the gradient of q, k or v at offset `grad_at`."""
    a, b = load_halves(grad, grad_at, here, HALF)
    if ROTATED:
        c, s = load_cos_sin(cos, sin, token, places, here, HALF)
        a, b = a * c - b * s, b * c + a * s
        if NORMED:
            x, y = load_halves(qkv, at, here, HALF)
            root = rms_reciprocal(x, y, HALF, EPS)
            share = tl.sum(a * x + b * y, axis=1)[:, None] * root * root * (0.5 / HALF)
            a, b = root * (a - x * share), root * (b - y * share)
    return a, b


@jit
def rope_norm_part_backward(
    grad, s_row, s_token, qkv, cos, sin, d_qkv, heads, tokens, T, places, width,
    ROTATED: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token, column, here = program_rows(heads, tokens, HALF, ROWS)
    at = token.to(tl.int64) * width + column
    grad_at = (token // T).to(tl.int64) * s_row + (token % T).to(tl.int64) * s_token + column
    a, b = rope_norm_gradient(grad, grad_at, qkv, at, cos, sin, token, places, here, ROTATED, NORMED, EPS, HALF)
    store_halves(d_qkv, at, here, a, b, HALF)


@jit
def rope_norm_backward_kernel(
    dq, dk, dv, qkv, cos, sin, d_qkv, heads, kv_heads, tokens, T, places, width,
    sq_row, sk_row, sv_row, sq_token, sk_token, sv_token,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of qkv for rows of q, k or v; v's gradient is copied."""
    part = tl.program_id(1)
    k = heads * (2 * HALF)
    if part == 0:
        rope_norm_part_backward(
            dq, sq_row, sq_token, qkv, cos, sin, d_qkv, heads, tokens, T, places, width,
            True, NORMED, EPS, HALF, ROWS)  # fmt: skip
    elif part == 1:
        rope_norm_part_backward(
            dk, sk_row, sk_token, qkv + k, cos, sin, d_qkv + k, kv_heads, tokens, T, places, width,
            True, NORMED, EPS, HALF, ROWS)  # fmt: skip
    else:
        rope_norm_part_backward(
            dv, sv_row, sv_token, qkv, cos, sin, d_qkv + k + kv_heads * (2 * HALF), kv_heads, tokens, T, places, width,
            False, NORMED, EPS, HALF, ROWS)  # fmt: skip


@jit
def qkv_grad_quantize_kernel(
    dq, dk, dv, qkv, cos, sin, y, transposed, scale, most, heads, kv_heads, tokens, T, places, width,
    sq_row, sk_row, sv_row, sq_token, sk_token, sv_token,
    NORMED: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v for some tokens: the gradient of `rope_norm_backward_kernel`, quantized to 8 bits."""
    head, k = tl.program_id(1), heads * (2 * HALF)
    token = (tl.program_id(0) * TALL + tl.arange(0, TALL))[:, None]
    column = head * (2 * HALF) + tl.arange(0, HALF)[None, :]
    here, row, t = token < tokens, (token // T).to(tl.int64), (token % T).to(tl.int64)
    at = token.to(tl.int64) * width + column
    if head < heads:
        grad_at = row * sq_row + t * sq_token + column
        a, b = rope_norm_gradient(dq, grad_at, qkv, at, cos, sin, token, places, here, True, NORMED, EPS, HALF)
    elif head < heads + kv_heads:
        grad_at = row * sk_row + t * sk_token + column - k
        a, b = rope_norm_gradient(dk, grad_at, qkv, at, cos, sin, token, places, here, True, NORMED, EPS, HALF)
    else:
        grad_at = row * sv_row + t * sv_token + column - k - kv_heads * (2 * HALF)
        a, b = rope_norm_gradient(dv, grad_at, qkv, at, cos, sin, token, places, here, False, NORMED, EPS, HALF)
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = head.to(tl.int64) * (2 * HALF) + tl.arange(0, HALF)
    there = (r < tokens)[:, None] & (c < width)[None, :]
    store_with_transpose(y, transposed, a * scale, r, c, tokens, width, there, most)
    store_with_transpose(y, transposed, b * scale, r, HALF + c, tokens, width, there, most)


def rope_launch_config(tokens: int, heads: int, cos: Tensor, parts: int, normed: bool) -> tuple[tuple[int, int], dict]:
    """The grid over rows and parts, and the kernel's constants."""
    half = cos.size(-1)
    rows = ROPE_TILE // (2 * half)
    shape = {"NORMED": normed, "EPS": NORM_EPS, "HALF": half, "ROWS": rows, "num_warps": 4}
    return (-(-tokens * heads // rows), parts), shape


@torch.library.custom_op("strawberry::qk_rope_norm", mutates_args=())
def qk_rope_norm_op(qkv: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int, normed: bool) -> tuple[Tensor, Tensor]:
    qkv, cos, sin = (x.contiguous() for x in (qkv, cos, sin))
    (B, T, width), d = qkv.shape, 2 * cos.size(-1)
    q, k = (torch.empty(B, T, n, dtype=qkv.dtype, device=qkv.device) for n in (n_q, n_k))
    grid, shape = rope_launch_config(B * T, max(n_q, n_k) // d, cos, 2, normed)
    rope_norm_kernel[grid](qkv, cos, sin, q, k, n_q // d, n_k // d, B * T, cos.size(0) * T, width, **shape)
    return q, k


@qk_rope_norm_op.register_fake
def _(qkv, cos, sin, n_q, n_k, normed):
    return tuple(qkv.new_empty(*qkv.shape[:2], n) for n in (n_q, n_k))


@torch.library.custom_op("strawberry::qk_rope_norm_backward", mutates_args=())
def qk_rope_norm_backward_op(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of qkv, (B, T, Dq + 2·Dk), from those of q, k and v; qkv is given if q and k were normed."""
    normed = qkv is not None
    grads = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv)]
    qkv, cos, sin = (x if x is None else x.contiguous() for x in (qkv, cos, sin))
    (B, T, n_q), n_k, d = dq.shape, dk.size(-1), 2 * cos.size(-1)
    d_qkv = torch.empty(B, T, n_q + 2 * n_k, dtype=dq.dtype, device=dq.device)
    grid, shape = rope_launch_config(B * T, max(n_q, n_k) // d, cos, 3, normed)
    sizes = (n_q // d, n_k // d, B * T, T, cos.size(0) * T, d_qkv.size(-1))
    strides = [x.stride(axis) for axis in (0, 1) for x in grads]
    rope_norm_backward_kernel[grid](*grads, qkv if normed else d_qkv, cos, sin, d_qkv, *sizes, *strides, **shape)
    return d_qkv


@qk_rope_norm_backward_op.register_fake
def _(dq, dk, dv, qkv, cos, sin):
    return dq.new_empty(*dq.shape[:2], dq.size(-1) + 2 * dk.size(-1))


def qkv_grad_quantize(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale · the gradient of qkv in FP8, (B · T, Dq + 2·Dk), and its transpose; arguments as in
    `qk_rope_norm_backward`."""
    found = torch.ops.strawberry.qkv_grad_quantize(dq, dk, dv, qkv, cos, sin, scale, dtype)
    return tuple(y.view(dtype) for y in found)


@torch.library.custom_op("strawberry::qkv_grad_quantize", mutates_args=())
def qkv_grad_quantize_op(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grads = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv)]
    read, cos, sin = dq if qkv is None else qkv.contiguous(), cos.contiguous(), sin.contiguous()
    (B, T, n_q), n_k, d = dq.shape, dk.size(-1), 2 * cos.size(-1)
    width = n_q + 2 * n_k
    y, transposed = dq.new_empty(B * T, width, dtype=dtype), dq.new_empty(width, B * T, dtype=dtype)
    sizes = (n_q // d, n_k // d, B * T, T, cos.size(0) * T, width)
    strides = [x.stride(axis) for axis in (0, 1) for x in grads]
    shape = {"NORMED": qkv is not None, "EPS": NORM_EPS, "HALF": d // 2, "TALL": 128, "num_warps": 8}
    qkv_grad_quantize_kernel[(-(-B * T // 128), width // d)](
        *grads, read, cos, sin, y, transposed, scale, torch.finfo(dtype).max, *sizes, *strides, **shape)  # fmt: skip
    return y.view(torch.uint8), transposed.view(torch.uint8)


@qkv_grad_quantize_op.register_fake
def _(dq, dk, dv, qkv, cos, sin, scale, dtype):
    tokens, width = dq.size(0) * dq.size(1), dq.size(-1) + 2 * dk.size(-1)
    return dq.new_empty(tokens, width, dtype=torch.uint8), dq.new_empty(width, tokens, dtype=torch.uint8)

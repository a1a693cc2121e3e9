"""Large matrix products of training in FP8, which GPUs since Hopper and Ada compute at twice the speed of bfloat16
(arXiv 2209.05433). Weights, activations between products, sums and updates keep their dtypes.

There are two 8-bit formats: E4M3 for the forward pass (3 bits of mantissa, 2⁻⁹ to 448), E5M2 for gradients (2 bits,
2⁻¹⁶ to 57,344). A tensor is multiplied by a scale, rounded, and saturates beyond the format's range; the product is
multiplied by both inverse scales. Scales of activations and gradients are static, which saves a pass over the tensor to
find its largest value: norms keep activations near 1, and the gradients of a mean over a batch's tokens have one
magnitude. A weight has few numbers compared with the tokens, so its scale is dynamic (`quantize_fp8_dynamic`).

`torch._scaled_mm` requires that the summed axis of both operands is contiguous. The forward pass multiplies x
(tokens, in) and W (out, in) as they are, but a weight's gradient sums over tokens, so x and the gradient are also
needed transposed, in FP8. The kernels of ops/triton/float8.py write both layouts in one pass, fused with the activation
if there is one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from strawberry.ops.activations import ACTIVATIONS
from strawberry.ops.common import to_autocast_dtype
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton import rope as rope_kernels

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACT_SCALE = 2.0**2  # activations saturate at ±112
GRAD_SCALE = 2.0**20  # of gradients of the mean loss
LOGIT_GRAD_SCALE = 2.0**15  # of the gradients of the logits
MIN_DIM = 512  # minimum of m · n / (m + n) for W (m, n), above which FP8 saves more than quantizing costs
INVERSE_SCALES: dict[float, Tensor] = {}  # scale → 1 / scale on the device, see `prepare`


def transpose_fp8(x: Tensor) -> Tensor:
    """x (n, m), of a one-byte dtype, as a contiguous (m, n)."""
    if not kernels.can_run(x):
        return x.t().contiguous()
    return torch.ops.strawberry.transpose_fp8(x.view(torch.uint8)).view(x.dtype)


# Between the two products of a feed-forward, activations and gradients are needed in FP8 only: row-major for the next
# product, and transposed for its weight's gradient. The kernels read their input once.


def act_quantize(h: Tensor, kind: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale · f(h), its transpose) in FP8, (n, m) and (m, n), f from ACTIVATIONS: h (n, m), or (n, 2m) for
    "swiglu"."""
    if not kernels.can_run(h):
        y = quantize_fp8(ACTIVATIONS[kind][0](h.float()), scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.act_quantize(h, kind, scale, dtype))


def act_quantize_backward(
    h: Tensor, grad: Tensor, kind: str, scale: float, dtype: torch.dtype, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale · the gradient of h, its transpose) in FP8, from `grad` (n, m), the gradient of f(h). `more`, of h's
    shape, is the gradient of h from its other uses."""
    if not kernels.can_run(h, grad):
        dh = ACTIVATIONS[kind][1](h.float(), grad.float())
        y = quantize_fp8(dh if more is None else dh + more, scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.act_quantize_backward(h, grad, more, kind, scale, dtype))


def concat_quantize(parts: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale · the concatenated parts, its transpose) in FP8: three parts (n, ·), whose widths are multiples of 64."""
    if not kernels.can_run(*parts):
        y = quantize_fp8(torch.cat(parts, dim=1).float(), scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.concat_quantize(*parts, scale, dtype))


def quantize_fp8(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """scale · x, rounded to `dtype`; values beyond its range saturate. The scale is a power of 2, so scaling is
    exact."""
    most = torch.finfo(dtype).max
    return (x * scale).clamp(-most, most).to(dtype)


def prepare(device: torch.device) -> None:
    """Allocate the inverse scales on the device before training, so that no step launches kernels to create them."""
    for scale in (ACT_SCALE, GRAD_SCALE, LOGIT_GRAD_SCALE):
        INVERSE_SCALES[scale] = torch.tensor(1 / scale, device=device)


def is_eligible(x: Tensor, *matrices) -> bool:
    """Whether to compute x Wᵀ in FP8, x (…, in), W (out, in); or f(x Wᵀ) W₂ᵀ, for a pair of matrices. Only in training
    under autocast, if the first W is large and all sizes are multiples of 16; not for int8 weights or a matrix per
    chunk."""
    if not (torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type)):
        return False
    if not all(isinstance(w, Tensor) and w.dim() == 2 for w in matrices):
        return False
    sizes = [x.numel() // x.size(-1), *(n for w in matrices for n in w.shape)]
    return is_large(*matrices[0].shape) and not any(n % 16 for n in sizes)


def is_large(m: int, n: int) -> bool:
    return m * n >= MIN_DIM * (m + n)


def has_eligible_weight(model: nn.Module) -> bool:
    """Whether a model has a matrix that is large enough, alone or concatenated with two others for q, k and v."""
    return any(p.ndim == 2 and is_large(3 * p.size(0), p.size(1)) for p in model.parameters())


def quantize_fp8_dynamic(w: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in E4M3, scaled by a power of 2 so that its largest value is near the end of the range, and its float32
    inverse scale ()."""
    most = w.abs().amax().float().clamp(min=1e-12) / torch.finfo(E4M3).max
    inverse_scale = torch.exp2(torch.log2(most).ceil())
    return quantize_fp8(w, (1 / inverse_scale).to(w.dtype), E4M3), inverse_scale


def scaled_mm(
    a: Tensor,
    b: Tensor,
    inverse_scale_a: Tensor,
    inverse_scale_b: Tensor,
    dtype: torch.dtype,
    use_fast_accum: bool = False,
) -> Tensor:
    """a bᵀ, (n, m) in `dtype`, for a (n, k) and b (m, k) in FP8, both contiguous, the only layout that the tensor cores
    support. With `use_fast_accum`, sums have fewer bits than float32, which suffices in the forward pass."""
    return torch._scaled_mm(
        a, b.t(), scale_a=inverse_scale_a, scale_b=inverse_scale_b, out_dtype=dtype, use_fast_accum=use_fast_accum
    )


def linear_forward(x: Tensor, w: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x Wᵀ, and the tensors that `linear_backward` needs. Both operands are transposed here, not in the backward pass,
    where torch.compile would quantize them again."""
    x8, (w8, inverse_scale) = quantize_fp8(x, ACT_SCALE, E4M3), quantize_fp8_dynamic(w)
    y = scaled_mm(x8, w8, INVERSE_SCALES[ACT_SCALE], inverse_scale, x.dtype, use_fast_accum=True)
    return y, (transpose_fp8(x8), transpose_fp8(w8), inverse_scale)


def linear_backward(
    g8: Tensor, g_t: Tensor, x_t: Tensor, w_t: Tensor, inverse_scale: Tensor, types: tuple
) -> tuple[Tensor, Tensor]:
    """The gradients of x and W from the gradient of x Wᵀ in FP8, g8, and its transpose, g_t."""
    inverse_g, inverse_x = INVERSE_SCALES[GRAD_SCALE], INVERSE_SCALES[ACT_SCALE]
    dx = scaled_mm(g8, w_t, inverse_g, inverse_scale, types[0])
    return dx, scaled_mm(g_t, x_t, inverse_g, inverse_x, types[1])


class Float8Linear(torch.autograd.Function):
    """x Wᵀ and its two gradients, all three products in FP8: x (n, in) in a half type, W (out, in)."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        y, saved = linear_forward(x, w)
        ctx.save_for_backward(*saved)
        ctx.types = x.dtype, w.dtype
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        g8 = quantize_fp8(grad, GRAD_SCALE, E5M2)
        return linear_backward(g8, transpose_fp8(g8), *ctx.saved_tensors, ctx.types)


class Float8SplitLinear(torch.autograd.Function):
    """x Wᵀ, split into three parts of these widths. Backward concatenates and quantizes their gradients in one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, *widths: int) -> tuple[Tensor, ...]:
        y, saved = linear_forward(x, w)
        ctx.save_for_backward(*saved)
        ctx.types = x.dtype, w.dtype
        return y.split(widths, dim=1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        g8, g_t = concat_quantize(grads, GRAD_SCALE, E5M2)
        return *linear_backward(g8, g_t, *ctx.saved_tensors, ctx.types), None, None, None


class Float8QKVRope(torch.autograd.Function):
    """q, k and v from x Wᵀ, x (B, T, in), with these widths. One kernel applies RoPE and, if `normed`, the norm to q
    and k; in backward one kernel computes the gradient of x Wᵀ and quantizes it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, widths: tuple, cos: Tensor, sin: Tensor, normed: bool) -> tuple:
        y, saved = linear_forward(x.flatten(0, 1), w)
        qkv = y.unflatten(0, x.shape[:2])
        ctx.save_for_backward(*saved, qkv if normed else None, cos, sin)
        ctx.types = x.dtype, w.dtype
        q, k = torch.ops.strawberry.qk_rope_norm(qkv, cos, sin, widths[0], widths[1], normed)
        return q, k, qkv[..., widths[0] + widths[1] :]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        *saved, qkv, cos, sin = ctx.saved_tensors
        g8, g_t = rope_kernels.qkv_grad_quantize(*grads, qkv, cos, sin, GRAD_SCALE, E5M2)
        dx, dw = linear_backward(g8, g_t, *saved, ctx.types)
        return dx.unflatten(0, grads[0].shape[:2]), dw, None, None, None, None


class Float8MLP(torch.autograd.Function):
    """(f(h) W₂ᵀ, h) with h = x W₁ᵀ, all six products in FP8; f(h) exists in FP8 only. x (n, in) in a half type, W₁
    (hidden, in), W₂ (out, ·), f from ACTIVATIONS. With `return_hidden`, h is differentiable. `input_is_opaque`: x comes
    from a kernel with which torch.compile cannot fuse the quantization, so a separate kernel quantizes x."""

    @staticmethod
    def forward(
        ctx, x: Tensor, w1: Tensor, w2: Tensor, activation: str, return_hidden: bool, input_is_opaque: bool
    ) -> tuple[Tensor, Tensor]:
        if input_is_opaque:
            x8, x_t = act_quantize(x, "identity", ACT_SCALE, E4M3)
        else:
            x8 = quantize_fp8(x, ACT_SCALE, E4M3)
            x_t = transpose_fp8(x8)
        (first, inverse_1), (second, inverse_2) = quantize_fp8_dynamic(w1), quantize_fp8_dynamic(w2)
        h = scaled_mm(x8, first, INVERSE_SCALES[ACT_SCALE], inverse_1, x.dtype, use_fast_accum=True)
        y8, y_t = act_quantize(h, activation, ACT_SCALE, E4M3)
        transposed = transpose_fp8(first), transpose_fp8(second)
        ctx.save_for_backward(x_t, h, y_t, *transposed, inverse_1, inverse_2)
        ctx.activation, ctx.types = activation, (x.dtype, w1.dtype, w2.dtype)
        if not return_hidden:  # otherwise autograd would allocate a gradient of zeros
            ctx.mark_non_differentiable(h)
        ctx.return_hidden = return_hidden
        return scaled_mm(y8, second, INVERSE_SCALES[ACT_SCALE], inverse_2, x.dtype, use_fast_accum=True), h

    @staticmethod
    def backward(ctx, grad: Tensor, more: Tensor | None) -> tuple:
        x_t, h, y_t, first_t, second_t, inverse_1, inverse_2 = ctx.saved_tensors
        inverse_g, inverse_x = INVERSE_SCALES[GRAD_SCALE], INVERSE_SCALES[ACT_SCALE]
        g8, g_t = act_quantize(grad, "identity", GRAD_SCALE, E5M2)
        dy = scaled_mm(g8, second_t, inverse_g, inverse_2, ctx.types[0])
        dw2 = scaled_mm(g_t, y_t, inverse_g, inverse_x, ctx.types[2])
        more = more if ctx.return_hidden else None
        h8, h_t = act_quantize_backward(h, dy, ctx.activation, GRAD_SCALE, E5M2, more)
        dx = scaled_mm(h8, first_t, inverse_g, inverse_1, ctx.types[0])
        return dx, scaled_mm(h_t, x_t, inverse_g, inverse_x, ctx.types[1]), dw2, None, None, None


def float8_mlp(
    x: Tensor, w1: Tensor, w2: Tensor, activation: str, return_hidden: bool = False, input_is_opaque: bool = False
) -> tuple:
    """(f(h) W₂ᵀ, h) with h = x W₁ᵀ, x (B, T, in). Requires `is_eligible(x, w1, w2)`."""
    results = Float8MLP.apply(to_autocast_dtype(x).flatten(0, -2), w1, w2, activation, return_hidden, input_is_opaque)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in results)

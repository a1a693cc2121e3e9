"""Projections to q, k and v, and the transforms of q and k before a mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from strawberry.context import ForwardContext, Mode
from strawberry.ops import float8
from strawberry.ops.chunks import Weight, chunked_linear, materialize
from strawberry.ops.common import norm, to_autocast_dtype
from strawberry.ops.linear import Int8Weight, linear
from strawberry.ops.rope import apply_rope
from strawberry.ops.triton import rope as rope_kernels

Transform = Callable[[Tensor, Tensor, ForwardContext], tuple[Tensor, Tensor]]  # (q, k, ctx) -> (q, k), (B, T, ·) each


def split_qkv_apply_rope(
    qkv: Tensor | Sequence[Tensor], widths: Sequence[int], transform: Transform, ctx: ForwardContext
) -> tuple[Tensor, ...]:
    """The mixer's q, k and v: splits qkv and transforms q and k. qkv is one tensor (B, T, Σ widths), or one tensor for
    each width; with two widths, those of k and v, q equals k."""
    if isinstance(qkv, Tensor):
        if transform in FUSED_ROPE and rope_kernels.can_fuse_rope(qkv, tuple(widths), ctx.rope[0]):
            return rope_kernels.fused_qk_rope_norm(qkv, tuple(widths), *ctx.rope, normed=FUSED_ROPE[transform])
        qkv = qkv.split(widths, dim=-1)
    *q, k, v = qkv
    return *transform(q[0] if q else k, k, ctx), v


def fused_qkv_projection(
    x: Tensor, w: Weight, widths: Sequence[int], transform: Transform, ctx: ForwardContext, precision: str | None = None
) -> Sequence[Tensor]:
    """The mixer's q, k and v from one product x Wᵀ, W (Σ widths, in). In FP8, one pass concatenates their gradients,
    applies the inverse rotation and quantizes them."""
    if precision != "float8":
        return split_qkv_apply_rope(chunked_linear(x, w, ctx), widths, transform, ctx)
    w = materialize(w)
    if len(widths) == 3 and float8.is_eligible(x, w):
        x = to_autocast_dtype(x)
        if transform in FUSED_ROPE and rope_kernels.can_fuse_rope(x, tuple(widths), ctx.rope[0]):
            return float8.Float8QKVRope.apply(x, w, tuple(widths), *ctx.rope, FUSED_ROPE[transform])
        if not any(n % 64 for n in widths):
            parts = float8.Float8SplitLinear.apply(x.flatten(0, -2), w, *widths)
            parts = [part.unflatten(0, x.shape[:-1]) for part in parts]
            return split_qkv_apply_rope(parts, widths, transform, ctx)
    return split_qkv_apply_rope(chunked_linear(x, w, ctx, precision), widths, transform, ctx)


def qkv_projection(
    x: Tensor, weights: Sequence[Tensor | Int8Weight], biases: Sequence[Tensor | None], transform: Transform,
    ctx: ForwardContext, precision: str | None = None,
) -> Sequence[Tensor]:  # fmt: skip
    """The mixer's q, k and v from one matrix each, or from two matrices, those of k and v, if q equals k. In training
    the matrices are concatenated, so that the forward pass and the gradient of x are one product each."""
    widths = [w.size(0) for w in weights]
    if not torch.is_grad_enabled() or any(isinstance(w, Int8Weight) for w in weights):
        qkv = [linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
        return split_qkv_apply_rope(qkv, widths, transform, ctx)
    w = torch.cat(list(weights))
    if biases[0] is None:
        return fused_qkv_projection(x, w, widths, transform, ctx, precision)
    qkv = linear(x, w, torch.cat(list(biases)), precision)
    return split_qkv_apply_rope(qkv, widths, transform, ctx)


def no_transform(q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    return q, k


def norm_channels(q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """`norm` over all D channels, for AFT, in the dtypes of q and k. Autocast on a GPU would return float32, and AFT,
    which is memory-bound, would read twice as many bytes."""
    return norm(q).to(q.dtype), norm(k).to(k.dtype)


def norm_heads(d: int) -> Transform:
    """`norm` over each head's d channels of q and k, without positions."""

    def transform(q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        q, k = (norm(x.unflatten(-1, (-1, d))).flatten(2).to(x.dtype) for x in (q, k))
        return q, k

    return transform


def rotary(q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """Rotary positions per head."""
    q, k = rotate_heads(q, k, ctx)
    return q.flatten(2), k.flatten(2)


def rotary_qk_norm(q: Tensor, k: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """Rotary positions, then `norm`, per head."""
    q, k = rotate_heads(q, k, ctx)
    return norm(q).flatten(2), norm(k).flatten(2)


def rotate_heads(q: Tensor, k: Tensor, ctx: ForwardContext) -> Sequence[Tensor]:
    """q and k rotated, (B, T, H, d). A decode step stacks and rotates both at once, since there a launch costs more
    than the copy."""
    q, k = (x.unflatten(-1, (-1, 2 * ctx.rope[0].size(-1))) for x in (q, k))
    if ctx.mode is Mode.DECODE and q.shape == k.shape:
        return apply_rope(torch.stack((q, k)), ctx.rope).unbind()
    return apply_rope(q, ctx.rope), apply_rope(k, ctx.rope)


FUSED_ROPE = {rotary: False, rotary_qk_norm: True}  # transforms that have a fused kernel → whether it includes the norm

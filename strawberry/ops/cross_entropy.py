"""Cross entropy of the head: loss and gradients without storing the logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops import float8
from strawberry.ops.common import no_autocast, softcap, to_accum_dtype, to_autocast_dtype
from strawberry.ops.float8 import (
    ACT_SCALE,
    E4M3,
    E5M2,
    INVERSE_SCALES,
    LOGIT_GRAD_SCALE,
    quantize_fp8,
    quantize_fp8_dynamic,
    scaled_mm,
    transpose_fp8,
)
from strawberry.ops.linear import linear
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.cross_entropy import fused_cross_entropy

MAX_LOGITS_BYTES = 1 << 30  # maximum size of the logits in memory at one time
MIN_PART_BYTES = (
    1 << 26
)  # smaller logits are not worth dividing; larger ones, up to MAX_LOGITS_BYTES, are divided into at most eight parts


def should_fuse(x: Tensor) -> bool:
    """Whether to compute the head's loss and gradients together. On a CPU, torch's own cross entropy is faster."""
    return x.is_cuda


def linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, cap: float | None, precision: str | None = None, *,
    keep_logits: bool = True, compile_parts: bool = False,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(logits, sum of the cross entropies in nats) of logits softcap(x Wᵀ): x (B, T, C), W (V, C), targets (B · T,)
    int64, where −1 is ignored. Without `keep_logits` the logits may be None, and are then never stored. With
    `compile_parts`, torch.compile compiles the computation of each part of the tokens separately."""
    if not keep_logits and should_fuse(x):
        x = to_autocast_dtype(x).flatten(0, 1)
        use_float8 = precision == "float8" and float8.is_eligible(x, w)
        return None, FusedLinearCrossEntropy.apply(x, w, targets, cap, use_float8, compile_parts)
    logits = softcap(linear(x, w, precision=precision), cap)
    return logits, plain_cross_entropy(logits, targets)


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross entropies over targets ≥ 0, in nats: logits (B, T, V), targets (B · T,)."""
    return F.cross_entropy(to_accum_dtype(logits).flatten(0, 1), targets, ignore_index=-1, reduction="sum")


class HeadMatmuls:
    """The head's three matrix products for a part of the tokens: x (n, C) in `dtype`, W (V, C)."""

    grad_logits = 1.0, None  # scale and dtype of the gradient of the logits; None: the logits' dtype

    def __init__(self, w: Tensor, dtype: torch.dtype):
        V = w.size(0)  # products are slow unless rows start at multiples of 16 bytes
        self.table = F.pad(w.to(dtype), (0, 0, 0, -V % 64 if V % 8 else 0))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.table.mT

    def backward(self, grad_logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and W from the gradient of the logits."""
        return grad_logits @ self.table, grad_logits.mT @ x


class Float8HeadMatmuls(HeadMatmuls):
    """The same products in FP8. Gradients of the logits below 2⁻³¹ underflow to zero."""

    grad_logits = LOGIT_GRAD_SCALE, E5M2

    def __init__(self, w: Tensor, dtype: torch.dtype):
        super().__init__(w, dtype)
        self.table, self.inverse_scale = quantize_fp8_dynamic(self.table)
        self.transposed = transpose_fp8(self.table)

    def logits(self, x: Tensor) -> Tensor:
        x8 = quantize_fp8(x, ACT_SCALE, E4M3)
        return scaled_mm(x8, self.table, INVERSE_SCALES[ACT_SCALE], self.inverse_scale, x.dtype, use_fast_accum=True)

    def backward(self, grad_logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x_t = transpose_fp8(quantize_fp8(x, ACT_SCALE, E4M3))
        inverse, inverse_x = INVERSE_SCALES[LOGIT_GRAD_SCALE], INVERSE_SCALES[ACT_SCALE]
        dx = scaled_mm(grad_logits, self.transposed, inverse, self.inverse_scale, x.dtype)
        return dx, scaled_mm(transpose_fp8(grad_logits), x_t, inverse, inverse_x, x.dtype)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropies, in nats, of logits softcap(x Wᵀ): x (N, C), W (V, C), targets (N,) int64, where
    negative targets are ignored.

    The logits are never stored as a whole. The forward pass computes them for a part of the tokens and both gradients
    from them, so the backward pass only scales the gradients (as in Liger, arXiv 2410.10989). With z = softcap(l),
    ∂/∂l = (softmax(z) − onehot(target)) · (1 − (z / cap)²). The sums over the vocabulary are float32 or wider.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w: Tensor,
        targets: Tensor,
        cap: float | None,
        use_float8: bool = False,
        compile_parts: bool = False,
    ) -> Tensor:
        with no_autocast(x):
            products = (Float8HeadMatmuls if use_float8 else HeadMatmuls)(w, x.dtype)
            size = x.size(0) * len(products.table) * x.element_size()
            parts = max(1, min(8, size // MIN_PART_BYTES)) if size <= MAX_LOGITS_BYTES else -(-size // MAX_LOGITS_BYTES)
            rows = -(-x.size(0) // (16 * parts)) * 16
            fwd_bwd = compiled_fwd_bwd() if compile_parts else cross_entropy_fwd_bwd
            total, dx, dw = 0.0, [], 0.0
            for some, wanted in zip(x.split(rows), targets.split(rows), strict=True):
                nats, grad_logits = fwd_bwd(products.logits(some), wanted, w.size(0), cap, *products.grad_logits)
                total = total + nats
                gradients = products.backward(grad_logits, some)
                dx.append(gradients[0])
                dw = dw + to_accum_dtype(gradients[1][: w.size(0)])
        ctx.save_for_backward(torch.cat(dx), dw)
        ctx.dtype = w.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), (dw * grad).to(ctx.dtype), None, None, None, None


def cross_entropy_fwd_bwd(
    logits: Tensor, targets: Tensor, V: int, cap: float | None, scale: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Σ cross entropy over the targets ≥ 0, and scale · its gradient with respect to the logits (N, ≥ V), in `dtype` or
    else the logits' dtype. Columns from V on are padding."""
    if kernels.can_run(logits):
        nats, grad_logits = fused_cross_entropy(logits, targets, V, cap, scale, dtype)
        return nats.sum(), grad_logits
    wanted, real = targets.clamp(min=0).unsqueeze(-1), (targets >= 0).unsqueeze(-1)
    place = torch.arange(logits.size(1), device=logits.device)
    z = softcap(to_accum_dtype(logits), cap)
    if logits.size(1) > V:
        z = torch.where(place < V, z, -math.inf)
    top = z.amax(dim=-1, keepdim=True)
    log_sum = top + (z - top).exp().sum(dim=-1, keepdim=True).log()
    nats = log_sum - softcap(to_accum_dtype(logits.gather(1, wanted)), cap)
    grad_logits = (z - log_sum).exp() - (place == wanted).to(z.dtype)
    if cap is not None:
        grad_logits = grad_logits * (1 - (softcap(to_accum_dtype(logits), cap) / cap).square())
    return torch.where(real, nats, 0.0).sum(), (torch.where(real, grad_logits, 0.0) * scale).to(dtype or logits.dtype)


@functools.cache
def compiled_fwd_bwd() -> Callable:
    return torch.compile(cross_entropy_fwd_bwd, dynamic=False)

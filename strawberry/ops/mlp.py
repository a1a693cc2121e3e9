"""Feed-forwards f(x W₁ᵀ) W₂ᵀ as one operation, so that activation and quantization can be fused."""

from __future__ import annotations

import torch
from torch import Tensor

from strawberry.context import ForwardContext
from strawberry.ops import float8
from strawberry.ops.activations import ACTIVATIONS, swiglu
from strawberry.ops.chunks import Weight, chunked_linear, materialize
from strawberry.ops.linear import linear


def mlp(x: Tensor, w1: Tensor, w2: Tensor, activation: str, b1: Tensor | None = None, b2: Tensor | None = None,
        precision: str | None = None) -> Tensor:  # fmt: skip
    """f(x W₁ᵀ + b₁) W₂ᵀ + b₂ with f from ACTIVATIONS: x (B, T, in), W₁ (hidden, in), W₂ (out, hidden). For "swiglu", W₁
    (2 · hidden, in) has the rows of u, then those of g."""
    if b1 is None and precision == "float8" and float8.is_eligible(x, w1, w2):
        return float8.float8_mlp(x, w1, w2, activation)[0]
    f = ACTIVATIONS[activation][0]
    return linear(f(linear(x, w1, b1, precision)), w2, b2, precision)


def swiglu_mlp(y: Tensor, w1: Weight, w2: Weight, ctx: ForwardContext, gate: Tensor | None = None,
               precision: str | None = None, return_hidden: bool = False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(u ⊙ silu(g)) W₂ᵀ with (u, g) = y W₁ᵀ, and (u, g), concatenated (B, T, 2C), over which retention sums.

    W₁ (2C, D) and W₂ (C, C) may differ from chunk to chunk. `gate` (B, T, C) multiplies u. In the second result, u is
    zero for invalid and frozen tokens; set `return_hidden` if that result needs a gradient.
    """
    w1, w2 = materialize(w1), materialize(w2)
    unmasked = gate is None and ctx.lengths is None and ctx.active is None
    if unmasked and precision == "float8" and float8.is_eligible(y, w1, w2):
        return float8.float8_mlp(y, w1, w2, "swiglu", return_hidden, input_is_opaque=True)
    ug = chunked_linear(y, w1, ctx, precision)
    if gate is not None:
        u, g = ug.chunk(2, dim=-1)
        ug = torch.cat((u * gate, g), dim=-1)
    out = chunked_linear(swiglu(ug), w2, ctx, precision)
    if not unmasked:
        u, g = ug.chunk(2, dim=-1)
        ug = torch.cat((ctx.mask_invalid(u), g), dim=-1)
    return out, ug

"""The attention residual, and what exclusive self-attention takes away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops.common import norm, to_accum_dtype


def attention_residual(branches: Sequence[Tensor], query: Tensor) -> Tensor:
    """Σ_n a_n s_n with a = softmax_n(norm(s_n) · q), for branches s_n (B, T, C) and q (C): attention over depth, for
    each token (arXiv 2603.15031). Returns (B, T, C) in the dtype of the first branch; sums are float32 or wider.

    The scores are sums over channels, not matrix products: the rounding of a product may depend on the number of rows.
    """
    score = torch.stack([(norm(to_accum_dtype(s)) * query).sum(dim=-1, keepdim=True) for s in branches])
    weight = score.softmax(dim=0)  # (n, B, T, 1)
    return sum(a * s for a, s in zip(weight, branches, strict=True)).to(branches[0].dtype)


def exclude_value(y: Tensor, v: Tensor, d: int) -> Tensor:
    """Exclusive self-attention: y − (y · v̂) v̂ with v̂ = v / max(‖v‖, 1e-6), per head of d channels. y (B, T, H·d) loses
    the direction of the token's own value v (B, T, H·d)."""
    y_heads, v_heads = (to_accum_dtype(x).unflatten(-1, (-1, d)) for x in (y, v))
    unit = F.normalize(v_heads, dim=-1, eps=1e-6)
    return (y_heads - (y_heads * unit).sum(dim=-1, keepdim=True) * unit).flatten(2).to(y.dtype)

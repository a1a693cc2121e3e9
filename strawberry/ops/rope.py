"""Rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops.common import to_accum_dtype
from strawberry.ops.triton.rope import NORM_EPS


def qk_rope_norm_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int, normed: bool
) -> tuple[Tensor, Tensor]:
    """`fused_qk_rope_norm`'s q and k in plain PyTorch."""
    made = []
    for x in qkv.split((n_q, n_k, n_k), dim=-1)[:2]:
        a, b = to_accum_dtype(x).unflatten(-1, (-1, 2 * cos.size(-1))).chunk(2, dim=-1)
        x = torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
        made.append((F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) if normed else x).flatten(2).to(qkv.dtype))
    return tuple(made)


def qk_rope_norm_backward_plain(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, *tables_normed) -> Tensor:
    """The gradient of qkv."""
    *tables, normed = tables_normed
    n_q, n_k = dq.size(-1), dk.size(-1)
    _, back = torch.func.vjp(lambda x: (*qk_rope_norm_plain(x, *tables, n_q, n_k, normed), x[..., n_q + n_k :]), qkv)
    return back((dq, dk, dv))[0]

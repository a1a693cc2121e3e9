"""Softmax attention."""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.decode_attention import num_splits


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    size: int,
    scale: float,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v for one new token in each row, its keys in a ring.

    q (B, H, d); k, v (B, size + 1, Hkv·d), slot s holding the newest position p ≤ pos with p % size == s; the slot
    after them is never read. pos (B,) int64, on the device: the query's position, whose own k and v are in the ring. It
    sees the slots 0 … min(pos + 1, size) − 1; with −1 a row is idle, its result zero. H is a multiple of Hkv
    (arXiv 2305.13245). Where new_k, new_v (B, Hkv·d) are given, they are written into the ring on the way. Returns
    (B, H, d) in q's dtype; sums are float32.

    Bytes moved: k and v of the tokens that are there, once, and 4·S·d·H·B twice for S splits of a long context
    (flash-decoding, arXiv 2311.01282). Floor: those of k and v over the copy bandwidth.
    """
    if not kernels.can_run(q, k, v):
        if new_k is not None:
            rows = torch.arange(len(pos), device=pos.device)[pos >= 0]
            k[rows, pos[rows] % size], v[rows, pos[rows] % size] = new_k[rows].to(k.dtype), new_v[rows].to(v.dtype)
        return decode_attention_plain(q, k, v, pos, size, scale)
    splits = num_splits(q, k, size)
    if new_k is None:
        return torch.ops.strawberry.decode_attention(q, k, v, pos, size, scale, splits)
    return torch.ops.strawberry.decode_attention_writing(q, k, v, new_k, new_v, pos, size, scale, splits)


def decode_attention_plain(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, size: int, scale: float) -> Tensor:
    """`decode_attention` in plain PyTorch, by a mask over all slots; at least float32."""
    d = q.size(-1)
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    k, v = (x[:, :size].unflatten(-1, (-1, d)).to(wide) for x in (k, v))  # (B, size, Hkv, d)
    grouped = q.to(wide).unflatten(1, (k.size(2), -1))  # (B, Hkv, H / Hkv, d)
    seen = torch.arange(size, device=q.device) <= pos.unsqueeze(1)  # (B, size)
    score = torch.einsum("bhgd,bshd->bhgs", grouped, k) * scale
    weight = score.masked_fill(~seen[:, None, None], -1e30).softmax(-1) * (pos >= 0)[:, None, None, None]
    v = v.masked_fill(~seen[:, :, None, None], 0.0)  # what an unwritten slot holds may be anything
    return torch.einsum("bhgs,bshd->bhgd", weight, v).flatten(1, 2).to(q.dtype)

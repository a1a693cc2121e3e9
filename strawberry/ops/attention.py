"""Softmax attention: over whole sequences, with a KV cache, and for one new token per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from strawberry.cache import CACHE_ALIGNMENT, RingKVCache, round_up
from strawberry.context import ForwardContext, Mode
from strawberry.ops.flops import counted
from strawberry.ops.masks import (
    AttentionPattern,
    sliding_window_block_mask,
    sliding_window_mask,
    sliding_window_mask_mod,
)
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
    """softmax(q kᵀ · scale) v for one new token in each row, with keys and values in a ring buffer.

    q (B, H, d); k, v (B, size + 1, Hkv·d): slot s has the newest position p ≤ pos with p % size == s; the last slot is
    never read. pos (B,) int64, on the device: the query's position, whose own k and v are in the ring. The query
    attends to slots 0 … min(pos + 1, size) − 1; a row with pos −1 is idle, and its result is zero. H is a multiple of
    Hkv (arXiv 2305.13245). If new_k, new_v (B, Hkv·d) are given, they are written into the ring first. Returns
    (B, H, d) in q's dtype; sums are float32.

    Bytes moved: k and v of the cached tokens once, and 4·S·d·H·B twice for S splits of a long context (flash-decoding,
    arXiv 2311.01282). Lower bound on the time: the bytes of k and v divided by the copy bandwidth.
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
    """`decode_attention` in plain PyTorch, with a mask over all slots; computed in float32 or wider."""
    d = q.size(-1)
    accum_dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    k, v = (x[:, :size].unflatten(-1, (-1, d)).to(accum_dtype) for x in (k, v))  # (B, size, Hkv, d)
    grouped = q.to(accum_dtype).unflatten(1, (k.size(2), -1))  # (B, Hkv, H / Hkv, d)
    seen = torch.arange(size, device=q.device) <= pos.unsqueeze(1)  # (B, size)
    score = torch.einsum("bhgd,bshd->bhgs", grouped, k) * scale
    weight = score.masked_fill(~seen[:, None, None], -1e30).softmax(-1) * (pos >= 0)[:, None, None, None]
    v = v.masked_fill(~seen[:, :, None, None], 0.0)  # unwritten slots may hold any value
    return torch.einsum("bhgs,bshd->bhgd", weight, v).flatten(1, 2).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ · scale + mask) v. q (B, T, H, d), k and v (B, S, Hkv, ·) → (B, T, H, ·). Without a mask: causal
    with T = S, or one query that attends to all keys.

    SDPA's own causal mask is correct only if queries and keys start at the same position, so calls with a cache pass a
    mask.
    """
    B, T, H, kv = *q.shape[:3], k.size(2)
    if kv != H and T == 1 and (mask is None or mask.size(1) == 1):  # query heads that share keys become T queries
        q = q.reshape(B, kv, H // kv, -1).transpose(1, 2)
    elif kv != H:
        k, v = (x.repeat_interleave(H // kv, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=mask is None and T > 1, scale=scale,
        dropout_p=dropout)  # fmt: skip
    return y.transpose(1, 2) if kv == H or T > 1 else y.reshape(B, T, H, -1)


def sdpa_with_empty_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """`sdpa` whose mask may exclude every key of a token: the result is zero, where softmax alone would give NaN."""
    blind = ~mask.any(dim=-1, keepdim=True)  # (B, H or 1, T or 1, 1)
    y = sdpa(q, k, v, mask | blind, scale=scale, dropout=dropout)
    return y.masked_fill(blind.transpose(1, 2), 0.0)


def attention(
    q: Tensor, k: Tensor, v: Tensor, d: int, pattern: AttentionPattern, ctx: ForwardContext,
    cache: RingKVCache | None = None, *, scale: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Softmax attention with a pattern: q (B, T, H·d), k and v (B, T, Hkv·d) → (B, T, H·d). With a cache, k and v are
    appended to the cached ones."""
    if cache is not None and ctx.mode is Mode.DECODE and type(pattern) is AttentionPattern and kernels.can_run(q):
        y = decode_attention(
            q.squeeze(1).unflatten(-1, (-1, d)), cache.k, cache.v, ctx.positions.squeeze(1), cache.size, scale,
            new_k=k.squeeze(1), new_v=v.squeeze(1))  # fmt: skip
        return y.flatten(1).unsqueeze(1).to(v.dtype)
    if cache is not None:
        k, v = cache.update(ctx, k, v)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in (q, k, v))
    if cache is None or ctx.num_cached == 0:
        return prefill_attention(q, k, v, pattern, ctx, scale=scale, dropout=dropout).flatten(2)
    mask = ctx.cached_attention_mask(pattern, cache)
    return sdpa(q, k, v, mask, scale=scale, dropout=dropout).flatten(2)


FULL = AttentionPattern()


def attention_with_sink(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor, d: int, ctx: ForwardContext,
    cache: RingKVCache | None = None, *, scale: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Softmax attention in which every token also attends to a sink, with key sink_k and value sink_v (H·d): q, k and v
    (B, T, H·d) → (B, T, H·d). The cache must have CACHE_ALIGNMENT slots more than tokens.

    The sink is a token before the first: it takes position 0, the row's tokens those from 1 on, and the causal mask
    then includes it. A call that starts all rows prepends it, with a query whose result is dropped: queries and keys
    keep their common start, so plain causal attention computes the call. Later calls read it from the cache's slot 0.
    """
    if cache is None or ctx.num_cached == 0:
        sink = (torch.zeros_like(sink_k), sink_k, sink_v)
        q, k, v = (torch.cat((s.to(x.dtype).expand(len(x), 1, -1), x), 1) for s, x in zip(sink, (q, k, v), strict=True))
        lengths = None if ctx.lengths is None else ctx.lengths + 1
        ctx = replace(ctx, positions=F.pad(ctx.positions + 1, (1, 0)), lengths=lengths)
        return attention(q, k, v, d, FULL, ctx, cache, scale=scale, dropout=dropout)[:, 1:]
    cache.k[:, 0], cache.v[:, 0] = sink_k, sink_v  # again in each call: the step of a free row overwrites its slot 0
    num_cached = None if ctx.num_cached is None else ctx.num_cached + 1
    max_cached = ctx.max_cached_tokens + 1
    if num_cached is None:  # masked: a step then reads a multiple of CACHE_ALIGNMENT slots
        max_cached = round_up(max_cached + 1, CACHE_ALIGNMENT) - 1
    ctx = replace(ctx, positions=ctx.positions + 1, num_cached=num_cached, max_cached_tokens=max_cached)
    return attention(q, k, v, d, FULL, ctx, cache, scale=scale, dropout=dropout)


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, d: int, patterns: Sequence[AttentionPattern], ctx: ForwardContext,
    caches: Sequence[RingKVCache] | None = None, *, scale: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention whose heads are divided, in order, into one group per pattern, each with its window. Without a cache,
    one FlexAttention kernel computes all groups if it can be used."""
    q4, n = q.unflatten(-1, (-1, d)), len(patterns)
    windows = tuple(pattern.size for pattern in patterns for _ in range(q4.size(2) // n))
    if caches is None and ctx.causal and min(windows) < q.size(1) and can_use_flex_attention(q4, dropout):
        k4, v4 = (x.unflatten(-1, (-1, d)) for x in (k, v))
        return flex_sliding_window(q4, k4, v4, windows, ctx, scale=scale).flatten(2)
    groups = zip(*(x.chunk(n, dim=-1) for x in (q, k, v)), patterns, caches or [None] * n, strict=True)
    parts = [attention(*qkv, d, pattern, ctx, cache, scale=scale, dropout=dropout) for *qkv, pattern, cache in groups]
    return torch.cat(parts, dim=-1)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, ctx: ForwardContext, *, scale: float, dropout: float
) -> Tensor:
    """`sdpa` over whole sequences with a pattern. A sliding window costs O(T · window): with FlexAttention where
    torch.compile generates its kernel, otherwise with `block_local_attention`."""
    T = q.size(1)
    if q.is_meta:
        flops = 2 * q.size(0) * q.size(2) * pattern.num_pairs(T, ctx.causal) * (q.size(3) + v.size(3))
        return counted(q.new_empty(*q.shape[:3], v.size(3)), flops)
    if not ctx.causal:
        return sdpa_with_empty_rows(q, k, v, ctx.attention_mask(pattern), scale=scale, dropout=dropout)
    if type(pattern) is AttentionPattern and not pattern.is_full(T):
        if can_use_flex_attention(q, dropout):
            return flex_sliding_window(q, k, v, (pattern.size,), ctx, scale=scale)
        if 4 * max(pattern.size, MIN_BLOCK) <= T:
            return block_local_attention(q, k, v, pattern.size, scale=scale, dropout=dropout)
    return sdpa(q, k, v, ctx.attention_mask(pattern), scale=scale, dropout=dropout)


MIN_BLOCK = 64  # minimum number of queries in a block


def block_local_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """Sliding-window attention in blocks of n ≥ window queries; each block attends to its own block of keys and to the
    previous one.

    q (B, T, H, d), k and v (B, T, Hkv, ·) → (B, T, H, ·). Work and memory are T · 2n.
    """
    T, n = q.size(1), max(window, MIN_BLOCK)
    first = sdpa(
        *(x[:, :n] for x in (q, k, v)), sliding_window_mask(n, 0, window, q.device), scale=scale, dropout=dropout
    )
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -T % n)).unflatten(1, (-1, n)) for x in (q, k, v))  # (B, J, n, heads, ·)
    J = q.size(1)
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (k, v))  # (B · (J − 1), 2n, heads, ·)
    rest = sdpa(q[:, 1:].flatten(0, 1), k, v, sliding_window_mask(n, n, window, q.device), scale=scale, dropout=dropout)
    return torch.cat((first, rest.unflatten(0, (-1, J - 1)).flatten(1, 2)), dim=1)[:, :T]


def can_use_flex_attention(q: Tensor, dropout: float) -> bool:
    """Whether FlexAttention may be used: only under torch.compile, which generates one kernel; in eager mode it costs
    O(T²)."""
    return (torch.compiler.is_compiling() and q.is_cuda and q.dtype != torch.float64 and dropout == 0
            and q.size(1) >= 256 and q.size(-1) >= 16)  # fmt: skip


# for heads of 64 channels in half types and windows of a few blocks; FlexAttention's defaults suit long windows
FLEX_TILES = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64,
         "bwd_BLOCK_N2": 32, "num_warps": 4, "num_stages": 3}  # fmt: skip


def flex_sliding_window(
    q: Tensor, k: Tensor, v: Tensor, windows: tuple[int, ...], ctx: ForwardContext, *, scale: float
) -> Tensor:
    """FlexAttention (arXiv 2412.05496) where head h attends to the newest `windows[h]` tokens; a single window applies
    to all heads.

    q (B, T, H, d), k and v (B, T, Hkv, ·) → (B, T, H, ·). Blocks of 128 keys that are masked for a whole block of
    queries are not read. The block mask is built once per call for all layers.
    """
    T, grouped = q.size(1), k.size(2) != q.size(2)
    key = ("blocks", windows)
    if key not in ctx.mask_cache:
        ctx.mask_cache[key] = sliding_window_block_mask(T, windows, q.device)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # cast before the transpose, which then stays a view
    mask = BlockMask((T, T), *ctx.mask_cache[key], (128, 128), sliding_window_mask_mod(windows))
    tiles = FLEX_TILES if q.size(-1) == v.size(-1) == 64 and dtype.itemsize == 2 else None
    y = flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=tiles)
    return y.transpose(1, 2)

"""Attention-free mixing with learned positions (arXiv 2105.14103):
y_t = σ(q_t) ⊙ Σ exp(k_s + p_{t,s}) v_s / Σ exp(k_s + p_{t,s}).

Tokens are divided into blocks. Pairs within a block are computed one by one, pairs of blocks within the window as
matrix products relative to each block's largest key, and tokens before the window as running sums. On a GPU a kernel
does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from strawberry.cache import LayerCache, RingKVCache
from strawberry.context import ForwardContext
from strawberry.ops.aft import (
    SoftmaxState,
    delay_blocks,
    load_state,
    masked_state,
    merge_states,
    new_state_cache,
    online_softmax_scan,
    store_state,
)
from strawberry.ops.chunks import to_chunks
from strawberry.ops.common import no_autocast, to_accum_dtype
from strawberry.ops.flops import counted
from strawberry.ops.masks import AttentionPattern
from strawberry.ops.triton import aft_positional as kernels_positional
from strawberry.ops.triton import common as kernels

BLOCK = 32  # tokens


class PositionBias(Protocol):
    """p_{t,s}, added to the keys. With a `window`, p is 0 where t − s ≥ window, but sums still include every s."""

    window: int | None
    groups: int  # of channels, each with its own p
    flops_per_pair: int  # to compute p

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """p (G, …, T, S) from the positions t (…, T, 1) and s (…, 1, S)."""

    def parameters(self) -> Sequence[Tensor]: ...

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The whole mixer as fused kernels."""


class LowRankBias(NamedTuple):
    """p = a bᵀ: a, b (block_size, m)."""

    a: Tensor
    b: Tensor
    window: int | None = None
    groups: int = 1

    @property
    def flops_per_pair(self) -> int:
        return 2 * self.a.size(1)

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        last = len(self.a) - 1  # padding of the last block may lie beyond it
        a = to_accum_dtype(self.a)[t.clamp(0, last).squeeze(-1)]
        b = to_accum_dtype(self.b)[s.clamp(0, last).squeeze(-2)]
        p = (a @ b.mT).unsqueeze(0)
        return p if self.window is None else torch.where((t - s).abs() < self.window, p, 0.0)

    def parameters(self) -> Sequence[Tensor]:
        return self.a, self.b

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels_positional.fused_aft_local(q, k, v, self.a, self.b, self.window or k.size(1))


class ConvBias(NamedTuple):
    """p depends on the distance t − s: taps (G, window), 0 at larger distances."""

    taps: Tensor
    flops_per_pair: int = 0

    @property
    def groups(self) -> int:
        return self.taps.size(0)

    @property
    def window(self) -> int:
        return self.taps.size(1)

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        distance = (t - s).abs()
        taps = to_accum_dtype(self.taps)[:, distance.clamp(max=self.window - 1)]
        return torch.where(distance < self.window, taps, 0.0)

    def parameters(self) -> Sequence[Tensor]:
        return (self.taps,)

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels_positional.fused_aft_conv(q, k, v, self.taps)


def aft_positional(
    q: Tensor, k: Tensor, v: Tensor, bias: PositionBias, ctx: ForwardContext, cache: list | None = None
) -> Tensor:
    """σ(q_t) ⊙ Σ exp(k_s + p_{t,s}) v_s / Σ exp(k_s + p_{t,s}), all (B, T, D), in v's dtype."""
    if v.is_meta:
        B, T, D = v.shape
        pairs = AttentionPattern(bias.window).num_pairs(T, ctx.causal)
        far = 0 if bias.window is None or bias.window >= T else T  # tokens before the window cost one scan
        return counted(v, 4 * B * D * (pairs + far) + bias.flops_per_pair * pairs)
    if ctx.causal and cache is None and kernels.can_run(q, k, v, *bias.parameters()):
        return bias.fused(q, k, v)
    with no_autocast(q):
        if not ctx.causal:
            o = forward_bidirectional(to_accum_dtype(k), to_accum_dtype(v), bias, ctx)
        elif cache is None:
            o = positional_states(to_accum_dtype(k), to_accum_dtype(v), bias).mean()
        else:
            o = forward_cached(to_accum_dtype(k), to_accum_dtype(v), bias, ctx, cache)
    return (torch.sigmoid(to_accum_dtype(q)) * o).to(v.dtype)


def new_positional_cache(batch: int, max_length: int, device, dtype, width: int, window: int | None) -> list:
    """A ring buffer of the newest keys and values and, with a window, the state of the tokens before it."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    size = max_length if window is None else min(window, max_length)
    far = None if window is None else new_state_cache(batch, device, dtype, width)
    return [RingKVCache(batch, device, dtype, size, k=width, v=width), far]


def positional_states(k: Tensor, v: Tensor, bias: PositionBias, first: int = 0) -> SoftmaxState:
    """Each token's state over itself and all earlier tokens, (B, T, D); k and v start at position `first`."""
    T, c = k.size(1), BLOCK
    k, v = to_chunks(k, c), to_chunks(v, c)  # (B, J, c, D)
    J = k.size(1)
    sums = intra_block(k, v, bias, first)
    top = k.amax(dim=2, keepdim=True).detach()
    e = (k - top).exp()
    blocks = SoftmaxState(top, e * v, e)
    near = J - 1 if bias.window is None else min(J - 1, -(-(bias.window - 1) // c))
    for r in range(1, near + 1):
        sums = merge_states(sums, delay_blocks(inter_block(blocks, r, bias, first), r))
    if near < J - 1:
        before = online_softmax_scan(SoftmaxState(top[:, :, 0], blocks.numerator.sum(2), blocks.denominator.sum(2)))
        far = SoftmaxState(*(t[:, : J - near - 1].unsqueeze(2) for t in before))
        sums = merge_states(sums, delay_blocks(far, near + 1))
    return SoftmaxState(*(x.flatten(1, 2)[:, :T] for x in sums))


def intra_block(k: Tensor, v: Tensor, bias: PositionBias, first: int) -> SoftmaxState:
    """Each token's state over the tokens of its own block up to itself, pair by pair: (B, J, c, D)."""
    J, c = k.size(1), k.size(2)
    i = torch.arange(c, device=k.device)
    start = first + c * torch.arange(J, device=k.device)[:, None, None]
    p = per_channel(bias(start + i[:, None], start + i), bias.groups, k.size(-1))  # (J, c, c, D or 1)
    p = p.masked_fill((i > i[:, None])[..., None], -torch.inf)
    score = k.unsqueeze(2) + p  # (B, J, t, s, D)
    top = score.amax(dim=3).detach()
    e = (score - top.unsqueeze(3)).exp()
    return SoftmaxState(top, (e * v.unsqueeze(2)).sum(dim=3), e.sum(dim=3))


def inter_block(blocks: SoftmaxState, r: int, bias: PositionBias, first: int) -> SoftmaxState:
    """Each token's state over the block that is r blocks before its own, for blocks r … J − 1: (B, J − r, c, D)."""
    J, c, width = blocks.top.size(1) - r, *blocks.numerator.shape[2:]
    i = torch.arange(c, device=blocks.top.device)
    start = first + c * torch.arange(J, device=i.device)[:, None, None]
    p = bias(start + r * c + i[:, None], start + i)  # (G, J, c, c)
    highest = p.amax(dim=-1, keepdim=True).detach()
    weight = (p - highest).exp()

    def mixed(x: Tensor) -> Tensor:
        x = x[:, :J].unflatten(-1, (bias.groups, -1))  # (B, J, s, G, D / G)
        return torch.einsum("gjts,bjsgd->bjtgd", weight, x).flatten(3)

    top = blocks.top[:, :J] + per_channel(highest, bias.groups, width)[..., 0, :]
    return SoftmaxState(top.expand(-1, -1, c, width), mixed(blocks.numerator), mixed(blocks.denominator))


def per_channel(p: Tensor, groups: int, width: int) -> Tensor:
    """p (G, …) → (…, D), or (…, 1) if all channels share p."""
    p = p.movedim(0, -1)
    return p if groups == 1 else p.repeat_interleave(width // groups, dim=-1)


def forward_bidirectional(k: Tensor, v: Tensor, bias: PositionBias, ctx: ForwardContext) -> Tensor:
    """In an encoder: each token's weighted mean over all tokens, (B, T, D). With a window, p is 0 where |t − s| ≥
    window."""
    if ctx.padding_mask is not None:
        k = k.masked_fill(ctx.padding_mask.unsqueeze(-1), -torch.inf)
    top = k.amax(dim=1, keepdim=True).clamp(min=-1e30).detach()
    e = (k - top).exp()
    i = torch.arange(k.size(1), device=k.device)
    p = bias(i[:, None], i[None, :])  # (G, T, S)
    weight = (p - p.amax(dim=-1, keepdim=True).detach()).exp()
    total, share = (
        torch.einsum("gts,bsgd->btgd", weight, x.unflatten(-1, (bias.groups, -1))).flatten(2) for x in (e * v, e)
    )
    return SoftmaxState(top, total, share).mean()


def forward_cached(k: Tensor, v: Tensor, bias: PositionBias, ctx: ForwardContext, cache: list) -> Tensor:
    if k.size(1) > 1 and ctx.num_cached is not None:
        return prefill_chunk(k, v, bias, ctx, *cache)
    steps = [decode_step(k[:, t : t + 1], v[:, t : t + 1], bias, ctx.at_token(t), *cache) for t in range(k.size(1))]
    return torch.cat(steps, dim=1)


def prefill_chunk(
    k: Tensor, v: Tensor, bias: PositionBias, ctx: ForwardContext, ring: RingKVCache, far: LayerCache | None
) -> Tensor:
    """Several tokens at once, after the ring's; all rows must have the same number of cached tokens."""
    n = min(ctx.num_cached, ring.size)
    slots = torch.arange(ctx.num_cached - n, ctx.num_cached, device=k.device) % ring.size  # oldest first
    k, v = (torch.cat((old[:, slots], new), dim=1) for old, new in zip((ring.k, ring.v), (k, v), strict=True))
    sums = SoftmaxState(*(x[:, n:] for x in positional_states(k, v, bias, ctx.num_cached - n)))
    if far is not None:
        before = load_state(far)
        sums = merge_states(sums, SoftmaxState(*(x.unsqueeze(1) for x in before)))
        count = k.size(1) - n if ctx.lengths is None else ctx.lengths.unsqueeze(1)
        leaves = torch.arange(k.size(1), device=k.device) < n + count - ring.size  # (S) or (B, S)
        store_state(far, merge_states(before, masked_state(k, v, leaves.expand(k.shape[:2]))))
    ring.write(ctx, (k[:, n:], v[:, n:]))
    return sums.mean()


def decode_step(
    k: Tensor, v: Tensor, bias: PositionBias, ctx: ForwardContext, ring: RingKVCache, far: LayerCache | None
) -> Tensor:
    """One token: writes it to the ring, and moves the token that leaves the window to the state of those before it."""
    if far is not None:
        evict(ctx, ring, far)
    (keys, values), s = ring.update(ctx, k, v), ring.positions(ctx)
    p = per_channel(bias(ctx.positions.unsqueeze(-1), s.clamp(min=0).unsqueeze(1)), bias.groups, k.size(-1))[
        :, 0
    ]  # (B, S, D or 1)
    score = (keys + p).masked_fill((s < 0).unsqueeze(-1), -torch.inf)
    top = score.amax(dim=1, keepdim=True)
    e = (score - top.clamp(min=-1e30)).exp()
    sums = SoftmaxState(top, (e * values).sum(1, keepdim=True), e.sum(1, keepdim=True))
    if far is not None:
        sums = merge_states(sums, SoftmaxState(*(x.unsqueeze(1) for x in load_state(far))))
    return sums.mean()


def evict(ctx: ForwardContext, ring: RingKVCache, far: LayerCache) -> None:
    """Add the token that the next one overwrites in the ring to the state of the tokens before the window."""
    slot = (ctx.positions % ring.size).expand(len(ring.k), 1)
    k, v = (x.gather(1, slot.unsqueeze(-1).expand(-1, -1, ring.k.size(-1))) for x in (ring.k, ring.v))
    leaves = (
        ctx.positions >= ring.size
        if ctx.lengths is None
        else (ctx.positions >= ring.size) & (ctx.lengths > 0).unsqueeze(1)
    )
    store_state(far, merge_states(load_state(far), masked_state(k, v, leaves.expand(k.shape[:2]))))

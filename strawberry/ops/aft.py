"""Attention-free mixing (arXiv 2105.14103): softmax states, their scan over time, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.cache import LayerCache
from strawberry.context import ForwardContext
from strawberry.ops.common import to_accum_dtype
from strawberry.ops.flops import counted
from strawberry.ops.triton import aft as aft_kernels
from strawberry.ops.triton import common as kernels


def linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """h_t = decay_t · h_{t−1} + x_t over axis 1, from h = 0. Work O(T), depth O(log T), causal.

    decay, x (B, T, ·) → h (B, T, ·). Adjacent steps are combined into pairs; the scan of half length over the pairs
    gives the odd steps, from which the even steps follow.
    """
    if x.size(1) == 1:
        return x
    even = x.size(1) // 2 * 2
    d0, d1, x0, x1 = decay[:, 0:even:2], decay[:, 1:even:2], x[:, 0:even:2], x[:, 1:even:2]
    odd = linear_scan(d1 * d0, d1 * x0 + x1)
    before = F.pad(odd, (0, 0, 1, -1))  # h just before each even step
    h = torch.stack((d0 * before + x0, odd), dim=2).flatten(1, 2)
    if even == x.size(1):
        return h
    return torch.cat((h, decay[:, even:] * h[:, -1:] + x[:, even:]), dim=1)


class SoftmaxState(NamedTuple):
    """Σ exp(k)·v and Σ exp(k) over a set of tokens, (…, D) each, both divided by exp(top), where top is about the
    largest k."""

    top: Tensor
    numerator: Tensor
    denominator: Tensor

    def mean(self) -> Tensor:
        return self.numerator / torch.where(self.denominator > 0, self.denominator, 1.0)


def merge_states(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state of the union of two disjoint sets of tokens. An empty set has top −∞ and zero sums."""
    top = torch.maximum(a.top, b.top)
    finite = torch.where(top == -torch.inf, 0.0, top)  # −∞ − −∞ would be NaN where both are empty
    fa, fb = (a.top - finite).exp(), (b.top - finite).exp()
    return SoftmaxState(top, a.numerator * fa + b.numerator * fb, a.denominator * fa + b.denominator * fb)


def online_softmax_scan(each: SoftmaxState) -> SoftmaxState:
    """The state over all s ≤ t, for every t (axis 1), relative to the running maximum: sums cannot overflow, and a
    large later key does not underflow the sums before it."""
    if each.top.size(1) == 1:
        return each
    top = each.top.cummax(dim=1).values
    decay = F.pad((top[:, :-1] - top[:, 1:]).exp(), (0, 0, 1, 0))
    e = (each.top - top).exp()
    both = linear_scan(torch.cat((decay, decay), -1), torch.cat((e * each.numerator, e * each.denominator), -1))
    return SoftmaxState(top, *both.chunk(2, dim=-1))


class AFTSimpleScan(torch.autograd.Function):
    """o_t = Σ_{s ≤ t} exp(k_s) v_s / Σ_{s ≤ t} exp(k_s). Saves five (B, T, D) tensors for backward.

    With r_t = ∂L/∂o_t / Σ_{s ≤ t} exp(k_s), the gradients are sums over t ≥ s, computed by a scan in reverse:
    ∂L/∂v_s = exp(k_s) Σ_{t ≥ s} r_t and ∂L/∂k_s = exp(k_s) (v_s Σ_{t ≥ s} r_t − Σ_{t ≥ s} r_t o_t).
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor) -> Tensor:
        sums = online_softmax_scan(SoftmaxState(k, v, torch.ones_like(v)))
        o = sums.numerator / sums.denominator
        ctx.save_for_backward(k, v, o, sums.top, sums.denominator)
        return o

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        k, v, o, top, denominator = ctx.saved_tensors
        r = grad / denominator
        decay = F.pad((top[:, :-1] - top[:, 1:]).exp(), (0, 0, 0, 1)).flip(1)
        both = linear_scan(torch.cat((decay, decay), -1), torch.cat((r, r * o), -1).flip(1)).flip(1)
        after, weighted = both.chunk(2, dim=-1)
        e = (k - top).exp()
        return e * (v * after - weighted), e * after


def aft_simple(q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, cache: LayerCache | None = None) -> Tensor:
    """σ(q_t) ⊙ Σ exp(k_s) v_s / Σ exp(k_s), all (B, T, D), in v's dtype."""
    if v.is_meta:
        return counted(v, 4 * v.numel())  # a multiplication and an addition for numerator and denominator each
    if ctx.causal and cache is None:
        if kernels.can_run(q, k, v):
            return aft_kernels.fused_aft_simple(q, k, v)
        o = AFTSimpleScan.apply(to_accum_dtype(k), to_accum_dtype(v))
    elif ctx.causal:
        o = simple_cached(to_accum_dtype(k), to_accum_dtype(v), ctx, cache)
    else:
        o = simple_bidirectional(to_accum_dtype(k), to_accum_dtype(v), ctx)
    return (torch.sigmoid(to_accum_dtype(q)) * o).to(v.dtype)


def simple_bidirectional(k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
    """In an encoder: the weighted mean over all tokens, which is the same for every token."""
    if ctx.padding_mask is not None:
        k = k.masked_fill(ctx.padding_mask.unsqueeze(-1), -1e30)
        v = v.masked_fill(ctx.padding_mask.all(dim=1)[:, None, None], 0.0)  # rows of padding only give zero
    return (k.softmax(dim=1) * v).sum(dim=1, keepdim=True).expand_as(v)


def simple_cached(k: Tensor, v: Tensor, ctx: ForwardContext, cache: LayerCache) -> Tensor:
    """The means over the cached state and the call's tokens, (B, T, D). Updates the cached state."""
    valid = ctx.valid_mask()
    if valid is not None:
        k = k.masked_fill(~valid.unsqueeze(-1), -1e30)  # not −∞, which would give NaN in a row of padding
    earlier = SoftmaxState(*(t.unsqueeze(1) for t in load_state(cache)))
    state = merge_states(earlier, online_softmax_scan(SoftmaxState(k, v, torch.ones_like(v))))
    for kept, new in zip(load_state(cache), state, strict=True):
        new = new[:, -1]
        kept.copy_(new if ctx.lengths is None else torch.where((ctx.lengths > 0).unsqueeze(-1), new, kept))
    return state.mean()


def masked_state(k: Tensor, v: Tensor, mask: Tensor) -> SoftmaxState:
    """The state (B, D) of the tokens (B, S, D) where mask (B, S) is true; an empty set if it is false everywhere."""
    k = k.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    top = k.amax(dim=1)
    e = (k - top.clamp(min=-1e30).unsqueeze(1)).exp()
    return SoftmaxState(top, (e * v).sum(dim=1), e.sum(dim=1))


def load_state(state: LayerCache) -> SoftmaxState:
    return SoftmaxState(state.top, state.numerator, state.denominator)


def store_state(state: LayerCache, sums: SoftmaxState) -> None:
    for kept, new in zip(load_state(state), sums, strict=True):
        kept.copy_(new)


def new_state_cache(batch: int, device, dtype, width: int) -> LayerCache:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    zero = ((width,), 0.0, dtype)
    return LayerCache(batch, device, top=((width,), -torch.inf, dtype), numerator=zero, denominator=zero)


def delay_blocks(sums: SoftmaxState, r: int) -> SoftmaxState:
    """The states of J blocks (axis 1) shifted by r blocks, J + r blocks; the first r are empty sets."""
    return SoftmaxState(
        *(F.pad(x, (0, 0, 0, 0, r, 0), value=e) for x, e in zip(sums, (-torch.inf, 0.0, 0.0), strict=True))
    )

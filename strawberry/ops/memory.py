"""A linear memory: per head a matrix S (d, e) that maps keys to values, written and read token by token.

    gated rule    S_t = α_t S_{t−1} + β_t k_t v_tᵀ                                (arXiv 2405.21060)
    delta rule    S_t = α_t S_{t−1} + β_t k_t (v_t − α_t S_{t−1}ᵀ k_t)ᵀ           (arXiv 2412.06464)
    read          o_t = S_tᵀ q_t

Whole sequences are computed chunk by chunk, all chunks at once: inside a chunk by products of queries and keys, between
chunks by a scan over one matrix per chunk (arXiv 2406.06484). The chunk's size changes speed, not the result.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from strawberry.cache import LayerCache
from strawberry.context import ForwardContext
from strawberry.ops.common import no_autocast, to_accum_dtype


def read_memory(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, size: int, delta: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o (B, T, H, e) and the last state (B, H, d, e), None without a first one: q, k (B, T, H, d); v (B, T, H, e);
    log α ≤ 0 and β (B, T, H), float32 or wider, both zero for tokens that write nothing; `size` tokens in a chunk.
    The backward pass recomputes what lies between: it would take more memory than a block's activations."""
    if torch.is_grad_enabled() and state is None and v.requires_grad:
        compute = partial(read_memory_chunks, size=size, delta=delta)
        return checkpoint(compute, q, k, v, log_decay, beta, use_reentrant=False, preserve_rng_state=False)
    return read_memory_chunks(q, k, v, log_decay, beta, size=size, delta=delta, state=state)


def read_memory_chunks(q, k, v, log_decay, beta, *, size: int, delta: bool, state=None) -> tuple[Tensor, Tensor | None]:
    """`read_memory`, with a backward pass by autograd."""
    T = q.size(1)
    with no_autocast(q):
        if T == 1 and state is not None:
            return step_memory(q, k, v, log_decay, beta, state, delta)
        q, k, v = (split_chunks(x.to(v.dtype), min(size, T)) for x in (q, k, v))  # (B, H, n, c, ·)
        passed, beta = (split_chunks(x.unsqueeze(-1), min(size, T)).squeeze(-1) for x in (log_decay, beta))
        passed = passed.cumsum(dim=-1)  # log of the decay since the chunk's start, (B, H, n, c)
        decay = masked_decay(passed)  # of what token s wrote, seen by token t
        writes, erases = v * beta.unsqueeze(-1).to(v.dtype), None
        end = (passed[..., -1:] - passed).exp().unsqueeze(-1).to(k.dtype)  # decay until the chunk's end
        if delta:
            overlap = beta.unsqueeze(-1) * decay * to_accum_dtype(k @ k.mT)
            solve = InvertUnitLower.apply(overlap.tril(-1)).to(v.dtype)
            writes = solve @ writes
            erases = solve @ (k * (beta * passed.exp()).unsqueeze(-1).to(k.dtype))
        before, last = scan_states(k * end, writes, erases, passed[..., -1], state)
        if delta:
            writes = writes - erases @ before
        o = (decay.to(v.dtype) * (q @ k.mT)) @ writes + (q * passed.exp().unsqueeze(-1).to(q.dtype)) @ before
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T], last


def step_memory(q, k, v, log_decay, beta, state, delta: bool) -> tuple[Tensor, Tensor]:
    """`read_memory` for one token: the recurrence itself."""
    q, k, v = (x[:, 0].to(state.dtype).unsqueeze(-2) for x in (q, k, v))  # (B, H, 1, ·)
    state = log_decay[:, 0].exp()[..., None, None].to(state.dtype) * state
    write = v - k @ state if delta else v
    state = state + k.mT @ (beta[:, 0, :, None, None].to(state.dtype) * write)
    return (q @ state).transpose(1, 2), state


def split_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ·) → (B, H, n, size, ·), with zeros after the last token."""
    if x.size(1) % size:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.size(1) % size))
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def masked_decay(passed: Tensor) -> Tensor:
    """exp(passed_t − passed_s) for s ≤ t, else 0: (…, c) → (…, c, c)."""
    c = passed.size(-1)
    later = torch.ones(c, c, dtype=torch.bool, device=passed.device).triu(1)
    return (passed.unsqueeze(-1) - passed.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()


def scan_states(k: Tensor, writes: Tensor, erases: Tensor | None, passed: Tensor, first: Tensor | None):
    """The state before each chunk, (B, H, n, d, e) in k's dtype, and after the last one, (B, H, d, e), None without a
    first state: k (B, H, n, c, d) decayed to the chunk's end, passed (B, H, n) the log of each chunk's decay."""
    added = to_accum_dtype(k.mT @ writes)
    if erases is None:
        before, last = decay_states(added, passed, first)
    else:
        kept = passed.exp()[..., None, None] * torch.eye(k.size(-1), dtype=passed.dtype, device=k.device)
        kept = kept - to_accum_dtype(k.mT @ erases)
        if first is not None:  # as if the first chunk had written it
            head = added[:, :, :1] + kept[:, :, :1] @ first.unsqueeze(2)
            added = torch.cat((head, added[:, :, 1:]), dim=2)
        after = affine_scan(kept, added)
        start = torch.zeros_like(after[:, :, :1]) if first is None else first.unsqueeze(2)
        before, last = torch.cat((start, after[:, :, :-1]), dim=2), after[:, :, -1]
    return before.to(k.dtype), None if first is None else last.to(first.dtype)


def decay_states(added: Tensor, passed: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """`scan_states` where the decay of a chunk is one number: a product with a triangular matrix."""
    total = F.pad(passed.cumsum(dim=-1), (1, 0))  # (B, H, n + 1): the log of the decay until each boundary
    decay = masked_decay(total)[..., 1:]  # [c, i]: of what chunk i added, at boundary c > i
    states = (decay @ added.flatten(-2)).unflatten(-1, added.shape[-2:])
    if first is not None:
        states = states + total.exp()[..., None, None] * first.unsqueeze(2)
    return states[:, :, :-1], states[:, :, -1]


def affine_scan(a: Tensor, b: Tensor) -> Tensor:
    """S_i = a_i S_{i−1} + b_i over axis 2, from S = 0: a (B, H, n, d, d), b (B, H, n, d, e). Depth O(log n): adjacent
    steps are combined into pairs; the scan over the pairs gives the odd steps, from which the even ones follow."""
    n = b.size(2)
    if n == 1:
        return b
    even = n // 2 * 2
    a0, a1, b0, b1 = a[:, :, 0:even:2], a[:, :, 1:even:2], b[:, :, 0:even:2], b[:, :, 1:even:2]
    odd = affine_scan(a1 @ a0, a1 @ b0 + b1)
    later = a0[:, :, 1:] @ odd[:, :, :-1] + b0[:, :, 1:]
    s = torch.stack((torch.cat((b0[:, :, :1], later), dim=2), odd), dim=3).flatten(2, 3)
    if even == n:
        return s
    return torch.cat((s, a[:, :, even:] @ s[:, :, -1:] + b[:, :, even:]), dim=2)


class InvertUnitLower(torch.autograd.Function):
    """(I + L)⁻¹ for strictly lower triangular L (…, c, c). Blocks of 1, 2, 4 … rows are inverted in pairs:
    [[A, 0], [M, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ M A⁻¹, B⁻¹]]. Saves only the result."""

    @staticmethod
    def forward(ctx, lower: Tensor) -> Tensor:
        c = lower.size(-1)
        i = torch.arange(c, device=lower.device)
        x, width = torch.eye(c, dtype=lower.dtype, device=lower.device), 1
        while width < c:
            block = i // width
            pair = (block.unsqueeze(1) == block + 1) & (block % 2 == 0)  # the lower left block of each pair
            between = lower * pair.to(lower.dtype)
            x = x - (between if width == 1 else x @ between @ x)
            width *= 2
        x = x.expand(lower.shape)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with no_autocast(x):
            return -(x.mT @ grad @ x.mT).tril(-1)


def unit(x: Tensor) -> Tensor:
    """x at about unit length over the last axis, in x's dtype; x near zero stays there, with bounded gradients."""
    y = to_accum_dtype(x)
    return (y * (y.pow(2).sum(dim=-1, keepdim=True) + 0.01).rsqrt()).to(x.dtype)


def soft_norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis with eps 0.01, so that what is hardly anything stays small."""
    return F.rms_norm(x, (x.size(-1),), eps=0.01)


def causal_convolution(x: Tensor, taps: Tensor, ctx: ForwardContext, cache: LayerCache | None) -> Tensor:
    """y_t = Σ_j taps_j ⊙ x_{t−j}: x (B, T, ·), taps (n, ·). The cache's `tail` has the last n − 1 tokens (B, n − 1, ·).
    Zeros precede the first token. Several sets of taps, (m, n, ·), give (m, B, T, ·)."""
    n, T = taps.size(-2), x.size(1)
    earlier = x.new_zeros(x.size(0), n - 1, x.size(2)) if cache is None else cache.tail.to(x.dtype)
    both = torch.cat((earlier, x), dim=1)
    if cache is not None:
        cache.tail.copy_(last_tokens(both, n - 1, ctx))
    taps = taps.to(x.dtype).unsqueeze(-3)  # (…, 1, n, ·)
    return sum(both[:, n - 1 - j : n - 1 - j + T] * taps[..., j : j + 1, :] for j in range(n))


def last_tokens(both: Tensor, n: int, ctx: ForwardContext) -> Tensor:
    """The last n valid tokens of (B, n + T, ·), whose first n tokens come from earlier calls."""
    if ctx.lengths is None:
        return both[:, both.size(1) - n :]
    index = ctx.lengths.unsqueeze(1) + torch.arange(n, device=both.device)
    return both.gather(1, index.unsqueeze(-1).expand(-1, -1, both.size(2)))

"""A linear memory: for each head a matrix S (d, e) that maps keys to values. Each token writes and reads.

    write    S_t = α_t S_{t−1} + β_t k_t (v_t − α_t S_{t−1}ᵀ k_t)ᵀ          gated delta rule, arXiv 2412.06464
    read     o_t = S_tᵀ q_t

The write multiplies S by the decay α_t, and then replaces the share β_t of the value Sᵀ k_t that S has for k_t by v_t
(delta rule, arXiv 2102.11174). Whole sequences are computed chunk by chunk (arXiv 2406.06484): the writes of a chunk
solve a triangular system, and only the state S is passed to the next chunk. The chunk size changes the speed, not the
result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from strawberry.cache import LayerCache
from strawberry.context import ForwardContext
from strawberry.ops.common import no_autocast, to_accum_dtype
from strawberry.ops.flops import counted
from strawberry.ops.triton import memory as memory_kernels
from strawberry.ops.triton import memory_step as memory_step_kernels

MEMORY_CHUNK = 64  # default tokens in a chunk: larger chunks compute more pairs, smaller ones are more sequential steps
EPS = 0.01  # of `unit` and `soft_norm`
OFFSETS = (-4.0, -9.0)  # of the first and the last head's decay


def delta_memory(
    z: Tensor, v: Tensor, gates: Tensor, gate_bias: Tensor, taps: Tensor, size: int, ctx: ForwardContext,
    cache: LayerCache | None,
) -> Tensor:  # fmt: skip
    """What the heads read, normalized and gated, (B, T, M) in v's dtype: z, v (B, T, M); gates (B, T, 3H), raw, and
    their bias (3H,); taps (n, M); `size` tokens in a chunk. The cache has the last n tokens of z, `tail` (B, n, M), and
    `state` (B, H, d, d). One token of each row without gradients is one kernel if it can run."""
    if cache is not None and memory_step_kernels.can_fuse_step(z, v, gates, taps, cache.tail, cache.state):
        return memory_step_kernels.fused_step(
            z, v, gates, gate_bias, taps, cache.tail, cache.state, ctx.lengths, ctx.active, EPS, OFFSETS
        )
    z = causal_convolution(z, taps, ctx, cache)  # (B, T + 1, M), of the token before too
    z, v = (y.unflatten(-1, (len(gate_bias) // 3, -1)) for y in (z, v))
    z, (log_decay, beta, read_gate) = unit(z), activate_gates(gates, gate_bias, ctx)
    state = None if cache is None else cache.state
    o, last = read_memory(z[:, 1:], z[:, :-1], v, log_decay, beta, size=size, state=state)
    if cache is not None:
        state.copy_(last)
    return (soft_norm(o) * read_gate.unsqueeze(-1)).to(v.dtype).flatten(2)


def activate_gates(gates: Tensor, gate_bias: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
    """log α, β and σ(c), (B, T, H) each; tokens that write nothing have log α = β = 0."""
    a, b, c = (to_accum_dtype(gates) + gate_bias).chunk(3, dim=-1)
    offset = torch.linspace(*OFFSETS, a.size(-1), dtype=a.dtype, device=a.device)
    return ctx.mask_invalid(F.logsigmoid(-a - offset)), ctx.mask_invalid(torch.sigmoid(b)), torch.sigmoid(c)


def read_memory(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, size: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, e) in v's dtype and the last state (B, H, d, e): q, k (B, T, H, d); v (B, T, H, e); log_decay = log α
    ≤ 0 and β (B, T, H), both zero for tokens that write nothing; `size` tokens in a chunk; `state`: the first state
    (B, H, d, e), zero by default. The backward pass recomputes the states: stored, they would take more memory than a
    block's activations."""
    inputs = (q, k, v, log_decay, beta)
    with no_autocast(q):
        if q.size(1) == 1 and state is not None:
            return step_memory(*inputs, state)
        if memory_kernels.can_fuse_memory(q, k, v):
            return memory_kernels.fused_memory(*inputs, size, state)
        if torch.is_grad_enabled() and state is None and v.requires_grad:
            return checkpoint(read_chunks, *inputs, size, use_reentrant=False, preserve_rng_state=False)
        return read_chunks(*inputs, size, state)


def read_chunks(q, k, v, log_decay, beta, size: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`read_memory` in plain PyTorch. tests/ops/test_memory.py compares it with the recurrence, and
    tests/ops/kernels_in_interpreter.py the kernels with it."""
    inputs = [to_accum_dtype(x).transpose(1, 2).split(size, dim=2) for x in (q, k, v, log_decay, beta)]
    outputs = []
    if state is None:
        state = inputs[0][0].new_zeros(v.size(0), v.size(2), k.size(3), v.size(3))
    for chunk in zip(*inputs, strict=True):
        o, state = read_chunk(*chunk, state)
        outputs.append(o)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype), state


def read_chunk(q, k, v, log_decay, beta, state: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, H, c, e) and the state after one chunk: q, k (B, H, c, d), v (B, H, c, e), log α and β (B, H, c).

    With Γ_t the product of α from the chunk's start to t and S the state before the chunk, the chunk adds k_t n_tᵀ for
    each token, where n_t = β_t (v_t − Γ_t Sᵀ k_t − Σ_{s<t} Γ_t/Γ_s (k_t · k_s) n_s) (arXiv 2412.06464)."""
    log_gamma = log_decay.cumsum(dim=-1)
    decay = masked_decay(log_gamma)
    since_start, until_end = log_gamma.exp().unsqueeze(-1), (log_gamma[..., -1:] - log_gamma).exp().unsqueeze(-1)
    beta = beta.unsqueeze(-1)
    writes = solve_unit_lower((beta * decay * (k @ k.mT)).tril(-1), beta * (v - since_start * (k @ state)))
    o = (decay * (q @ k.mT)) @ writes + since_start * (q @ state)
    return o, since_start[..., -1:, :] * state + (until_end * k).mT @ writes


def masked_decay(log_gamma: Tensor) -> Tensor:
    """Γ_t / Γ_s for s ≤ t, else 0: (…, c) → (…, c, c)."""
    c = log_gamma.size(-1)
    later = torch.ones(c, c, dtype=torch.bool, device=log_gamma.device).triu(1)
    return (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()


def solve_unit_lower(lower: Tensor, b: Tensor) -> Tensor:
    """x of (I + L) x = b: L (…, c, c) strictly lower triangular, b (…, c, e)."""
    if b.is_meta:
        return counted(b, b.numel() * (b.size(-2) - 1))  # a multiplication and an addition for each pair s < t
    return torch.linalg.solve_triangular(lower, b, upper=False, unitriangular=True)


def step_memory(q, k, v, log_decay, beta, state: Tensor) -> tuple[Tensor, Tensor]:
    """`read_memory` for one token: the recurrence. Products are elementwise and then summed, so that rounding does not
    depend on the other rows."""
    q, k = (x[:, 0].to(state.dtype).unsqueeze(-1) for x in (q, k))  # (B, H, d, 1)
    decay, beta = (x[:, 0, :, None, None].to(state.dtype) for x in (log_decay.exp(), beta))
    state = decay * state
    error = v[:, 0].to(state.dtype).unsqueeze(-2) - (k * state).sum(dim=-2, keepdim=True)  # (B, H, 1, e)
    state = state + beta * k * error
    return (q * state).sum(dim=-2).unsqueeze(1).to(v.dtype), state


def unit(x: Tensor) -> Tensor:
    """x / √(|x|² + EPS) over the last axis, in x's dtype: about unit length, but near zero for x near zero, with
    bounded gradients."""
    y = to_accum_dtype(x)
    return (y * (y.pow(2).sum(dim=-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def soft_norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis with a large eps, so that values near zero stay near zero."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def causal_convolution(x: Tensor, taps: Tensor, ctx: ForwardContext, cache: LayerCache | None) -> Tensor:
    """y_t = x_t + Σ_{j<n} taps_j ⊙ x_{t−j} for the call's tokens and the token before them, (B, T + 1, ·): x (B, T, ·),
    taps (n, ·). The cache's `tail` has the last n tokens (B, n, ·). Without a cache, zeros precede the first token."""
    n, T = taps.size(0), x.size(1)
    earlier = x.new_zeros(x.size(0), n, x.size(2)) if cache is None else cache.tail.to(x.dtype)
    padded = torch.cat((earlier, x), dim=1)
    if cache is not None:
        cache.tail.copy_(last_tokens(padded, n, ctx))
    taps = taps.to(x.dtype)
    return padded[:, n - 1 :] + sum(padded[:, n - 1 - j : n + T - j] * taps[j] for j in range(n))


def last_tokens(padded: Tensor, n: int, ctx: ForwardContext) -> Tensor:
    """The last n valid tokens of each row, (B, n, ·), of (B, n + T, ·), whose first n tokens are those of earlier
    calls."""
    if ctx.lengths is None:
        return padded[:, padded.size(1) - n :]
    index = ctx.lengths.unsqueeze(1) + torch.arange(n, device=padded.device)
    return padded.gather(1, index.unsqueeze(-1).expand(-1, -1, padded.size(2)))

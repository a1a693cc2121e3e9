"""Every architecture, in one file, read top to bottom. What each computes stands in its class; what a user may ask of
it stands in its Config.

Notation:  B rows · T tokens · S keys · V vocab_size · C n_embd · D n_qkv · H n_head · d = D / H · J chunks

Index:  helpers · where tokens stand, and what layers carry · attention · mixers: softmax, AFT, expert attention ·
        projections and feed-forward · the language model · strawberry · tinystar · registry, initialisation

How it fits together: mixers mix q, k, v over time, projections make them, blocks wire, models stack. A mixer is
`forward(q, k, v, x, at, state) -> y`, all (B, T, ·): x is the normed input (routers read it), `at` says where the tokens
stand, `state` is what the layer carried from earlier calls (None when the whole sequence is given at once).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import UserError, check, nearest, option

# ---- helpers -------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a learned scale."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def wide(x: Tensor) -> Tensor:
    """Float32 for the half types: sums, softmax and deviations are accumulated in it. float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def full_precision(x: Tensor):
    """A context in which matrix products are not cast down by autocast."""
    return torch.autocast(x.device.type, enabled=False)


def std(w: Tensor, n: int) -> Tensor:
    """Rescale each matrix (…, rows, columns) to standard deviation n^(−1/2), unbiased, one number per matrix."""
    return w * (n**-0.5 / (wide(w).std(dim=(-2, -1), keepdim=True) + 1e-8)).to(w.dtype)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def linear_scan(decay: Tensor, x: Tensor) -> Tensor:
    """h_t = decay_t · h_{t−1} + x_t over axis 1, from h = 0. Work O(T), depth O(log T); no step sees a later one.

    Neighbours are folded into pairs, the half-length problem gives the odd steps, and those give the even ones.
    (B, T, ·) twice to (B, T, ·).
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


# ---- where tokens stand, and what layers carry ---------------------------------------------------------------------


class Rope(nn.Module):
    """Rotary positions (arXiv 2104.09864): the cosines and sines of given positions."""

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        self.exact = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.register_buffer("frequency", self.exact.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        # bfloat16 frequencies would turn far positions by the wrong angle, and float64 ones made from float32 too:
        # whatever the model is cast to, they are made anew from the exact ones
        super()._apply(fn, recurse)
        dtype = torch.float64 if self.frequency.dtype == torch.float64 else torch.float32
        self.frequency = self.exact.to(self.frequency.device, dtype)
        return self

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        angle = (pos.unsqueeze(-1) * self.frequency).unsqueeze(2)  # (B, T, 1, d/2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the half-split pairs of x (B, T, H, d)."""
    cos, sin = rope
    x1, x2 = wide(x).chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


@dataclass
class At:
    """Where the tokens of one call stand: all that a layer may know besides q, k, v and x."""

    pos: Tensor  # (1, T) or (B, T), counted from each row's start
    rope: tuple[Tensor, Tensor] | None = None
    slot: int = 0  # tokens in each retention chunk of this call
    count: Tensor | None = None  # (B,) how many of the tokens are real, the others being padding; None: all
    border: bool | Tensor = True  # whether the call begins at a retention chunk's border, (B,) where rows differ
    active: Tensor | None = None  # (B, T) tokens whose depth reaches this pass; None: all
    masks: dict = field(default_factory=dict)

    def real(self) -> Tensor | None:
        """(B, T), False for padding; None when there is none."""
        if self.count is None:
            return None
        return torch.arange(self.pos.size(1), device=self.pos.device) < self.count.unsqueeze(1)

    def mask(self, window: Window) -> Tensor | None:
        """Who sees whom in this call, (B, 1, T, T), made once for all layers; None for plain causal attention."""
        if window.size is None or window.size >= self.pos.size(1):
            return None
        if window.size not in self.masks:
            self.masks[window.size] = window.sees(self.pos, self.pos)
        return self.masks[window.size]


class State:
    """What one layer carries from call to call: named tensors (B, …) and the values that they start from."""

    def __init__(self, batch: int, device, **tensors: tuple[tuple[int, ...], float, torch.dtype]):
        self.start = {name: value for name, (_, value, _) in tensors.items()}
        for name, (shape, value, dtype) in tensors.items():
            setattr(self, name, torch.full((batch, *shape), value, dtype=dtype, device=device))

    def reset(self, rows) -> None:
        for name, value in self.start.items():
            getattr(self, name)[rows] = value

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.start)


class Ring(State):
    """The newest `size` keys and values of each row, at slot `position % size`; one slot more takes what is dropped."""

    def __init__(self, batch: int, device, dtype, size: int, **widths: int):
        self.size, self.names = size, tuple(widths)
        tensors = {name: ((size + 1, width), 0.0, dtype) for name, width in widths.items()}
        super().__init__(batch, device, pos=((size + 1,), -1, torch.int64), **tensors)

    def extend(self, at: At, *new: Tensor) -> tuple[Tensor, ...]:
        """Add the call's tensors (B, T, ·); returns each with what is kept before it, (B, S, ·), and positions (B, S)."""
        T, pos = at.pos.size(1), at.pos.expand(new[0].size(0), -1)
        old = [] if T == 1 else [getattr(self, name)[:, : self.size].clone() for name in self.names]
        old_pos = self.pos[:, : self.size].clone()
        self.write(at, pos, new)
        if T == 1:  # the token's slot held the one that just left the window: the ring itself is what it sees
            return *(getattr(self, name)[:, : self.size] for name in self.names), self.pos[:, : self.size]
        return *(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)), torch.cat((old_pos, pos), dim=1)

    def write(self, at: At, pos: Tensor, new: tuple[Tensor, ...]) -> None:
        T = pos.size(1)
        count = T if at.count is None else at.count.unsqueeze(1)
        index = torch.arange(T, device=pos.device)
        kept = ((index < count) & (index >= count - self.size)).expand_as(pos)
        slot = torch.where(kept, pos % self.size, self.size)
        self.pos.scatter_(1, slot, torch.where(kept, pos, -1))
        for name, tensor in zip(self.names, new, strict=True):
            getattr(self, name).scatter_(1, slot.unsqueeze(-1).expand_as(tensor), tensor.to(getattr(self, name).dtype))


def states_in(tree) -> Iterator[State]:
    """Every State of a nested list."""
    if isinstance(tree, State):
        yield tree
    elif tree is not None:
        for branch in tree:
            yield from states_in(branch)


class Cache:
    """The states of all layers, and how many tokens each row has.

    >>> cache = model.new_cache(batch_size=2, max_length=512)
    >>> logits, _ = model(prompt, cache=cache)      # the whole prompt, (2, T, V)
    >>> logits, _ = model(token, cache=cache)       # (2, 1): continues where it stands
    >>> cache.reset([1])                            # row 1 starts anew, row 0 goes on
    """

    def __init__(self, layers: list, batch_size: int, max_length: int, device):
        self.layers, self.max_length = layers, max_length
        self.length = [0] * batch_size  # on the host too, so that no decision waits for the device
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def reset(self, rows) -> None:
        rows = [rows] if isinstance(rows, int) else list(rows)
        for row in rows:
            self.length[row] = 0
        self.pos[rows] = 0
        for state in states_in(self.layers):
            state.reset(rows)

    def advance(self, counts: list[int]) -> None:
        self.length = [n + c for n, c in zip(self.length, counts, strict=True)]
        self.pos += torch.tensor(counts, device=self.pos.device)

    def nbytes(self) -> int:
        return sum(state.nbytes() for state in states_in(self.layers))


# ---- attention -----------------------------------------------------------------------------------------------------


class Window:
    """Causal attention to the newest `size` tokens, the token itself among them; None: to all."""

    def __init__(self, size: int | None = None):
        self.size = size

    def sees(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """(B, T) and (B, S) positions, −1 where a slot is empty, to (B, 1, T, S)."""
        q_pos, k_pos = q_pos.unsqueeze(-1), k_pos.unsqueeze(-2)
        seen = (k_pos <= q_pos) & (k_pos >= 0)
        if self.size is not None:
            seen = seen & (k_pos > q_pos - self.size)
        return seen.unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float | None = None, dropout: float = 0.0):
    """softmax(q kᵀ · scale + mask) v. q (B, T, H, d), k and v (B, S, Hkv, ·) to (B, T, H, ·); no mask: causal, T = S.

    SDPA's own causal mask is only right where queries and keys begin together, so a cache always brings a mask.
    """
    if k.size(2) != q.size(2):
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
    )
    return y.transpose(1, 2)


# How a family readies q and k (B, T, ·) for its mixers: (q, k, at) -> (q, k)


def as_is(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    return q, k


def channel_norm(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """`norm` over all D channels, for AFT."""
    return norm(q), norm(k)


def rotary(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Rotary positions per head."""
    d = 2 * at.rope[0].size(-1)
    q, k = (rotate(x.unflatten(-1, (-1, d)), at.rope).flatten(2) for x in (q, k))
    return q, k


def rotary_qk_norm(q: Tensor, k: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Rotary positions, then `norm`, per head."""
    d = 2 * at.rope[0].size(-1)
    q, k = (norm(rotate(x.unflatten(-1, (-1, d)), at.rope)).flatten(2) for x in (q, k))
    return q, k


# ---- mixers --------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Mixes q, k, v over time. `new_state` makes what it carries between calls, `flops` counts its products per token."""

    def new_state(self, batch: int, max_length: int, device, dtype) -> State | list | None:
        raise NotImplementedError

    def flops(self, T: int) -> float:
        raise NotImplementedError


class Softmax(Mixer):
    """Softmax attention over a window, heads of d channels; k and v may have fewer heads than q (arXiv 2305.13245)."""

    def __init__(self, n_head: int, d: int, *, n_kv_head: int | None = None, window: int | None = None, prepare=as_is,
                 dropout: float = 0.0):
        super().__init__()
        self.n_head, self.n_kv_head, self.d = n_head, n_kv_head or n_head, d
        self.window, self.prepare, self.dropout = Window(window), prepare, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: Ring | None) -> Tensor:
        q, k = self.prepare(q, k, at)
        mask = at.mask(self.window)
        if state is not None:
            k, v, k_pos = state.extend(at, k, v)
            mask = self.window.sees(at.pos, k_pos)
        q, k, v = (x.unflatten(-1, (-1, self.d)) for x in (q, k, v))
        return attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0).flatten(2)

    def new_state(self, batch: int, max_length: int, device, dtype) -> Ring:
        size = max_length if self.window.size is None else min(self.window.size, max_length)
        return Ring(batch, device, dtype, size, k=self.n_kv_head * self.d, v=self.n_kv_head * self.d)

    def flops(self, T: int) -> float:
        return 4 * T * self.n_head * self.d


class Sums(NamedTuple):
    """Running sums of exp(k)·v and exp(k), (B, T, D), both divided by exp(top), the running maximum of k."""

    top: Tensor
    numerator: Tensor
    denominator: Tensor


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over two disjoint sets of tokens. An empty set has top −∞ and zero sums."""
    top = torch.maximum(a.top, b.top)
    finite = torch.where(top == -torch.inf, 0.0, top)  # −∞ − −∞ would be NaN where both are empty
    fa, fb = (a.top - finite).exp(), (b.top - finite).exp()
    return Sums(top, a.numerator * fa + b.numerator * fb, a.denominator * fa + b.denominator * fb)


def running_sums(k: Tensor, v: Tensor) -> Sums:
    """Σ_{s ≤ t} exp(k_s) v_s and Σ_{s ≤ t} exp(k_s) for every t, against the running maximum: no overflow, and no early
    token lost to a later one's maximum. k, v (B, T, D)."""
    top = k.cummax(dim=1).values
    decay = torch.cat((torch.zeros_like(top[:, :1]), (top[:, :-1] - top[:, 1:]).exp()), dim=1)
    e = (k - top).exp()
    numerator, denominator = linear_scan(torch.cat((decay, decay), -1), torch.cat((e * v, e), -1)).chunk(2, dim=-1)
    return Sums(top, numerator, denominator)


class AFTSimpleFunction(torch.autograd.Function):
    """o_t = Σ_{s ≤ t} exp(k_s) v_s / Σ_{s ≤ t} exp(k_s), keeping five (B, T, D) tensors for the way back.

    With r_t = ∂L/∂o_t / Σ_{s ≤ t} exp(k_s), the gradients are sums over the future, again a scan, backwards:
    ∂L/∂v_s = exp(k_s) Σ_{t ≥ s} r_t and ∂L/∂k_s = exp(k_s) (v_s Σ_{t ≥ s} r_t − Σ_{t ≥ s} r_t o_t).
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor) -> Tensor:
        sums = running_sums(k, v)
        o = sums.numerator / sums.denominator
        ctx.save_for_backward(k, v, o, sums.top, sums.denominator)
        return o

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        k, v, o, top, denominator = ctx.saved_tensors
        r = grad / denominator
        decay = torch.cat(((top[:, :-1] - top[:, 1:]).exp(), torch.zeros_like(top[:, :1])), dim=1).flip(1)
        both = linear_scan(torch.cat((decay, decay), -1), torch.cat((r, r * o), -1).flip(1)).flip(1)
        after, weighted = both.chunk(2, dim=-1)
        e = (k - top).exp()
        return e * (v * after - weighted), e * after


class AFTSimple(Mixer):
    """Attention-free mixing (arXiv 2105.14103) without positions: y_t = σ(q_t) ⊙ Σ exp(k_s) v_s / Σ exp(k_s)."""

    def __init__(self, c, prepare):
        super().__init__()
        self.width, self.prepare = c.n_qkv, prepare

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: State | None) -> Tensor:
        q, k = self.prepare(q, k, at)
        o = AFTSimpleFunction.apply(wide(k), wide(v)) if state is None else self.go_on(wide(k), wide(v), at, state)
        return (torch.sigmoid(wide(q)) * o).to(v.dtype)

    def go_on(self, k: Tensor, v: Tensor, at: At, state: State) -> Tensor:
        real = at.real()
        if real is not None:
            k = k.masked_fill(~real.unsqueeze(-1), -1e30)  # finite: padding must not make NaN of its own row's sums
        earlier = Sums(*(t.unsqueeze(1) for t in (state.top, state.numerator, state.denominator)))
        sums = merge(earlier, running_sums(k, v))
        some = at.count is None or (at.count > 0).unsqueeze(-1)
        for kept, new in zip((state.top, state.numerator, state.denominator), sums, strict=True):
            kept.copy_(new[:, -1] if some is True else torch.where(some, new[:, -1], kept))
        return sums.numerator / sums.denominator

    def new_state(self, batch: int, max_length: int, device, dtype) -> State:
        wide_type = torch.float64 if dtype == torch.float64 else torch.float32
        zero = ((self.width,), 0.0, wide_type)
        return State(batch, device, top=((self.width,), -torch.inf, wide_type), numerator=zero, denominator=zero)

    def flops(self, T: int) -> float:
        return 0


class Router(nn.Module):
    """Chooses `active` of n for each token: p = softmax(x W), the largest p + bias kept, each weighted n·p.

    Balance without a loss (arXiv 2408.15664): after each optimizer step `bias += 0.01·sign(mean load − load)`. The bias
    touches the choice only.
    """

    roles = {"weight": "router"}

    def __init__(self, n_embd: int, n: int, active: int):
        super().__init__()
        self.n, self.active = n, active
        self.weight = nn.Parameter(torch.empty(n, n_embd))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("load", torch.zeros(n), persistent=False)  # tokens since the last optimizer step

    def choose(self, x: Tensor, at: At) -> tuple[Tensor, Tensor]:
        """Probabilities (B, T, n) of the normed x (B, T, C), and which are kept."""
        with full_precision(x):
            p = F.linear(wide(x), wide(self.weight)).softmax(dim=-1)
        score = p.detach() + self.bias
        mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
        first = torch.ones(self.n, self.n, dtype=torch.bool, device=x.device).tril(-1)  # ties: the lower index
        rank = ((other > mine) | ((other == mine) & first)).sum(dim=-1)
        kept = rank < self.active
        if self.training:
            counted = kept if at.active is None else kept & at.active.unsqueeze(-1)
            self.load += counted.sum(dim=(0, 1))
        return p, kept

    def forward(self, x: Tensor, at: At) -> Tensor:
        """The weight of each of the n for each token, (B, T, n), zero for those not chosen."""
        p, kept = self.choose(x, at)
        return (self.n * p * kept).to(x.dtype)

    @torch.no_grad()
    def balance(self) -> None:
        self.bias += 0.01 * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

    def flops(self, T: int) -> float:
        return 2 * self.weight.numel()


class ExpertAttention(Mixer):
    """Token-level mixture of local-context attention (The Expert Abundance): groups of heads, each with a window of its
    own, weighted token by token by a router. Keys and values are never routed. See MoH (arXiv 2410.11842)."""

    def __init__(self, c, prepare):
        super().__init__()
        heads, d = c.n_head // c.n_experts, c.n_qkv // c.n_head
        self.groups = nn.ModuleList(
            Softmax(heads, d, window=window, dropout=c.dropout) for window in expert_windows(c)
        )
        self.router = Router(c.n_embd, c.n_experts, c.a_experts) if c.n_experts > 1 else None
        self.prepare = prepare

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, at: At, state: list | None) -> Tensor:
        q, k = self.prepare(q, k, at)
        thirds = (t.chunk(len(self.groups), dim=-1) for t in (q, k, v))
        states = state or [None] * len(self.groups)
        parts = [g(*qkv, x, at, s) for g, *qkv, s in zip(self.groups, *thirds, states, strict=True)]
        if self.router is None:
            return parts[0]
        weight = self.router(x, at).unsqueeze(-1)  # (B, T, n_experts, 1)
        return (torch.stack(parts, dim=2) * weight).flatten(2)

    def new_state(self, batch: int, max_length: int, device, dtype) -> list:
        return [group.new_state(batch, max_length, device, dtype) for group in self.groups]

    def flops(self, T: int) -> float:
        return sum(group.flops(T) for group in self.groups) + (self.router.flops(T) if self.router else 0)


def expert_windows(c) -> list[int]:
    """The window of each expert: as listed, or window, window/2, window/4, … not under 16."""
    if c.windows is not None:
        return c.windows
    return [max(c.window >> e, min(16, c.window)) for e in range(c.n_experts)]


# ---- projections and feed-forward ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x Wᵀ (+ b), W (out, in). `role` says how it starts and who optimizes it: see `init_weights`."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False, role: str = "matrix"):
        super().__init__()
        self.roles = {"weight": role, "bias": "bias"}
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def flops(self, T: int) -> float:
        return 2 * self.weight.numel()


class Embedding(nn.Module):
    """Rows of a table, (B, T) int64 to (B, T, C)."""

    def __init__(self, n: int, width: int, role: str = "embedding"):
        super().__init__()
        self.roles = {"weight": role}
        self.weight = nn.Parameter(torch.empty(n, width))

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight)


class RMSNorm(nn.Module):
    """`norm` with a learned scale."""

    roles = {"weight": "norm"}

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class LayerNorm(nn.Module):
    """Mean and deviation removed, with a learned scale and shift (arXiv 1607.06450)."""

    roles = {"weight": "norm", "bias": "bias"}

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), eps=1e-5)


class SwiGLU(nn.Module):
    """u, g = split(x W₁); (u ⊙ silu(g)) W₂ (arXiv 2002.05202)."""

    def __init__(self, n_embd: int, n_ffn: int | None, *, bias: bool = False, role: str = "matrix"):
        super().__init__()
        n_ffn = n_ffn or -(-8 * n_embd // 3 // 64) * 64  # 8C/3, rounded up to 64
        self.w1 = Linear(n_embd, 2 * n_ffn, bias=bias)
        self.w2 = Linear(n_ffn, n_embd, bias=bias, role=role)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.w1(x).chunk(2, dim=-1)
        return self.w2(u * F.silu(g))

    def flops(self, T: int) -> float:
        return self.w1.flops(T) + self.w2.flops(T)


class GELU(nn.Module):
    """gelu(x W₁) W₂ (arXiv 1606.08415)."""

    def __init__(self, n_embd: int, n_ffn: int | None, *, bias: bool = False, role: str = "matrix"):
        super().__init__()
        n_ffn = n_ffn or 4 * n_embd
        self.w1 = Linear(n_embd, n_ffn, bias=bias)
        self.w2 = Linear(n_ffn, n_embd, bias=bias, role=role)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))

    def flops(self, T: int) -> float:
        return self.w1.flops(T) + self.w2.flops(T)


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
FEED_FORWARDS = {"SwiGLU": SwiGLU, "GELU": GELU}

# ---- the language model --------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """What every architecture is asked for."""

    arch: str = option("strawberry", "the family of architectures")
    vocab_size: int = option(8192, "entries of the vocabulary, at least as many as the encoder has", low=1)
    block_size: int = option(256, "tokens in a training window", low=1)
    n_layer: int = option(2, "blocks", low=1)
    n_head: int = option(4, "heads", low=1)
    n_embd: int = option(64, "channels of the residual stream", low=1)
    dropout: float = option(0.0, "on embeddings, attention probabilities and residual branches", low=0, below=1)


class LanguageModel(nn.Module):
    """What all families share: the call, the loss, the cache, generation.

    A family gives `embed_tokens(idx, at)`, `trunk(x, at, states)`, `head(x)`, `new_states(…)` and `flops(T)`, and sets
    `rope`, `chunk` (retention's, where weights change along the row) and `max_positions` (learned positions).
    """

    Config = ModelConfig
    causal = True  # whether the three promises hold: no token sees a later one, rows are apart, cache equals full pass
    chunk: int | None = None
    max_positions: int | None = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope = None
        self.drop = nn.Dropout(config.dropout)

    # -- one call

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, lengths=None):
        """Logits (B, T, V) and, given targets, the mean loss in nats.

        idx (B, T) int64; targets (B, T), −1 ignored, all −1 gives loss 0. With a cache the call continues where it
        stands; lengths (B,) says how many of each row's tokens are real, when rows are ragged.
        """
        if self.max_positions is not None and idx.size(1) > self.max_positions:
            raise UserError(f"{idx.size(1)} tokens exceed block_size {self.max_positions}, where learned positions end; "
                            "give fewer, or train with a larger block_size")
        x = self.whole(idx) if cache is None else self.go_on(idx, cache, lengths)
        logits = self.head(x)
        if targets is None:
            return logits, None
        flat = targets.flatten()
        loss = F.cross_entropy(wide(logits).flatten(0, 1), flat, ignore_index=-1, reduction="sum")
        return logits, loss / (flat >= 0).sum().clamp(min=1)

    def whole(self, idx: Tensor) -> Tensor:
        pos = torch.arange(idx.size(1), device=idx.device).unsqueeze(0)
        return self.hidden(idx, At(pos, slot=min(self.chunk or idx.size(1), idx.size(1))), None)

    def hidden(self, idx: Tensor, at: At, states) -> Tensor:
        at.rope = None if self.rope is None else self.rope(at.pos)
        return self.trunk(self.drop(self.embed_tokens(idx, at)), at, states)

    @torch.no_grad()
    def go_on(self, idx: Tensor, cache: Cache, lengths) -> Tensor:
        """Continue each row of the cache. Retention's weights change at chunk borders, so calls are cut there."""
        B, T = idx.shape
        counts = [T] * B if lengths is None else [int(n) for n in lengths]
        self.check_call(idx, cache, counts)
        outputs, begin = [], 0
        for end in self.cuts(cache, T):
            part = [min(max(n - begin, 0), end - begin) for n in counts]
            outputs.append(self.hidden(idx[:, begin:end], self.stand(cache, end - begin, part), cache.layers))
            cache.advance(part)
            begin = end
        return torch.cat(outputs, dim=1)

    def check_call(self, idx: Tensor, cache: Cache, counts: list[int]) -> None:
        if not self.causal:
            raise UserError(f"a {self.config.arch} model that sees the future has no cache; call it on the whole text")
        if len(counts) != len(cache.length) or idx.size(0) != len(counts):
            raise UserError(f"the call has {idx.size(0)} rows, {len(counts)} lengths; the cache has {len(cache.length)}")
        if min(counts) < 0 or max(counts) > idx.size(1):
            raise UserError(f"lengths {counts} must lie between 0 and the call's {idx.size(1)} tokens")
        longest = max(n + c for n, c in zip(cache.length, counts, strict=True))
        if longest > cache.max_length:
            raise UserError(f"{longest} tokens exceed the cache's max_length {cache.max_length}; make a longer one")

    def cuts(self, cache: Cache, T: int) -> list[int]:
        """Where the parts of a call of T tokens end: at the first chunk border, or token by token where rows differ."""
        if self.chunk is None or T == 1:
            return [T]
        if len(set(cache.length)) > 1:
            return list(range(1, T + 1))
        first = -cache.length[0] % self.chunk
        return [T] if first == 0 or first >= T else [first, T]

    def stand(self, cache: Cache, T: int, counts: list[int]) -> At:
        device = cache.pos.device
        pos = cache.pos.unsqueeze(1) + torch.arange(T, device=device)
        border = [n % self.chunk == 0 for n in cache.length] if self.chunk else [True]
        return At(
            pos,
            slot=min(self.chunk or T, T),
            count=None if min(counts) == T else torch.tensor(counts, device=device),
            border=border[0] if len(set(border)) == 1 else torch.tensor(border, device=device),
        )

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens, on the model's device."""
        if self.max_positions is not None and max_length > self.max_positions:
            raise UserError(f"max_length {max_length} exceeds block_size {self.max_positions}, where learned positions end")
        p = next(self.parameters())
        return Cache(self.new_states(batch_size, max_length, p.device, p.dtype), batch_size, max_length, p.device)

    # -- text

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, min_p: float | None = None, stop=(), generator=None) -> Iterator[Tensor]:
        """Continue idx (B, T), one token (B,) int64 at a time.

        temperature 0 takes the likeliest. `stop` holds token ids that end a row: it repeats its stop token until all
        rows have ended. `generator` is a torch.Generator, or one for each row.
        """
        stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
        ended, last = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device), None
        total = idx.size(1) + max_new_tokens
        fits = self.causal and (self.max_positions is None or total <= self.max_positions)
        cache = self.new_cache(idx.size(0), total) if fits else None
        logits = self.last_logits(idx, cache)
        for i in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p, min_p, generator)
            token = token if last is None else torch.where(ended, last, token)
            yield token
            last, ended = token, ended | torch.isin(token, stop)
            if i + 1 == max_new_tokens or (len(stop) and bool(ended.all())):
                return
            idx = torch.cat((idx, token.unsqueeze(1)), dim=1)
            logits = self.last_logits(idx if cache is None else token.unsqueeze(1), cache)

    def last_logits(self, idx: Tensor, cache: Cache | None) -> Tensor:
        """(B, V) in float32 after the last token: through the cache, or computed anew from the last block_size tokens,
        row by row, since rows may see each other where there is no cache to be had."""
        if cache is not None:
            return wide(self(idx, cache=cache)[0][:, -1])
        rows = [self(row[-self.config.block_size :].unsqueeze(0))[0][:, -1] for row in idx]
        return wide(torch.cat(rows))

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None, stop=(), generator=None) -> Tensor:
        """idx (B, T) and what follows it, (B, T + new). Arguments as `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, stop, generator)
        return torch.cat((idx, *(token.unsqueeze(1) for token in tokens)), dim=1)

    # -- about the model

    def roles(self) -> dict[str, str]:
        """Parameter name to role: what `init_weights` and the optimizer go by."""
        return {
            f"{prefix}.{name}" if prefix else name: module.roles[name]
            for prefix, module in self.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if p is not None
        }

    def num_params(self, non_embedding: bool = True) -> int:
        """How many numbers are learned; without those of embeddings and learned positions unless asked otherwise."""
        left_out = ("embedding", "position", "head") if non_embedding else ()
        roles = self.roles()
        return sum(p.numel() for name, p in self.named_parameters() if roles[name] not in left_out)

    def flops_per_token(self, T: int) -> float:
        """Floating-point operations of the matrix products in one training step over windows of T tokens, per token:
        forward 1, backward 2. Attention is counted full, T² without a causal or window discount."""
        return 3 * self.flops(T)

    def routers(self) -> dict[str, Router]:
        return {name: m for name, m in self.named_modules() if isinstance(m, Router)}

    def after_step(self) -> None:
        """To be called after each optimizer step in training: balances the routers."""
        for router in self.routers().values():
            router.balance()


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, generator):
    """Draw a token (B,) from logits (B, V), after the filters: the k likeliest; the likeliest that make up p together;
    those at least min_p times as likely as the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # what stands before a token already makes up p
        logits = ordered.masked_fill(beyond, -torch.inf).gather(-1, order.argsort(dim=-1))
    p = logits.softmax(dim=-1)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0.0)
    if isinstance(generator, (list, tuple)):
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generator, strict=True)])
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


# ---- strawberry ----------------------------------------------------------------------------------------------------


@dataclass
class StrawberryConfig(ModelConfig):
    arch: str = option("strawberry", "the family of architectures", choices=("strawberry",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(2, "retention steps of each block before its last step; 0: none", low=0)
    aft_ratio: int = option(3, "attention-free steps for each step of expert attention", low=0)
    window: int | None = option(None, "tokens that attention sees; default block_size / 4", low=1)
    retention: str = option("on", "'none': the same steps with weights that stay as they are", choices=("on", "none"))
    retention_scope: str = option(
        "causal", "what the update sums over: earlier chunks of the row, or ('batch', not causal) everything",
        choices=("causal", "batch"))
    retention_chunk: int | None = option(
        None, "tokens that share weights; default n_embd rounded up to a power of two, at most block_size / 2, "
        "at least 16", low=1)
    retention_scale: float | None = option(None, "size of the update; default n_embd ** -0.5", above=0)
    logit_softcap: float | None = option(None, "c: logits become c·tanh(logits / c)", above=0)

    n_experts = 1  # expert attention with one expert is a sliding window
    windows = None

    def __post_init__(self):
        c = self
        c.window = max(1, c.block_size // 4) if c.window is None else c.window
        if c.retention_chunk is None:
            power = 1 << (c.n_embd - 1).bit_length()
            c.retention_chunk = max(16, min(power, c.block_size // 2))
        c.retention_scale = c.n_embd**-0.5 if c.retention_scale is None else c.retention_scale

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)


def heads_divide(name: str, width: int, n_head: int) -> Iterator[tuple[str, str]]:
    if width % n_head:
        yield name, f"is {width}, which n_head {n_head} does not divide; try {-(-width // n_head) * n_head}"
    elif width // n_head % 2:
        yield name, f"gives heads of {width // n_head} channels, but rotary positions turn pairs: an even number"


class Weights(NamedTuple):
    """The three matrices of a block that retention changes: each shared, (rows, columns), or one for each chunk of each
    row, (B, J, rows, columns)."""

    qkv: Tensor  # (3D, C)
    swiglu: Tensor  # (2C, D)
    out: Tensor  # (C, C)


def to_chunks(x: Tensor, slot: int) -> Tensor:
    """(B, T, ·) to (B, J, slot, ·), zeros after the last token."""
    return F.pad(x, (0, 0, 0, -x.size(1) % slot)).unflatten(1, (-1, slot))


def project(x: Tensor, w: Tensor, at: At) -> Tensor:
    """x (B, T, in) through w (out, in), or through the w (B, J, out, in) of each token's chunk."""
    if w.dim() == 2:
        return F.linear(x, w)
    y = to_chunks(x, at.slot) @ w.mT.to(x.dtype)  # (B, J, slot, out)
    return y.flatten(1, 2)[:, : x.size(1)]


def reweigh(w: Weights, oa: Tensor, out: Tensor, tao: Tensor) -> Weights:
    """The update rule: w + f(w) with f(w) = silu(w @ oa) @ outᵀ, rescaled to its usual deviation times |tao|."""

    def f(m: Tensor) -> Tensor:
        return F.silu(m @ oa.to(m.dtype)) @ out.mT

    C, D = w.qkv.size(-1), w.swiglu.size(-1)
    alpha, beta, gamma = tao.abs().unbind(dim=-1)
    view = w.swiglu.unflatten(-2, (C, 2)).flatten(-2).mT  # (…, 2C, D) → (…, C, 2D) → (…, 2D, C)
    change = f(view).mT.unflatten(-1, (2, D)).flatten(-3, -2)  # and back
    return Weights(
        std(w.qkv + f(w.qkv), C) * alpha,
        std(w.swiglu + change, D) * beta,
        std(w.out + f(w.out), C) * gamma,
    )


class NoRetention:
    """The same steps with weights that stay as they are."""

    chunk = None
    causal = True

    def update(self, w: Weights, u: Tensor, g: Tensor, block: StrawberryBlock, at: At, state: None) -> Weights:
        return w

    def new_state(self, batch: int, device, dtype, w: Weights) -> None:
        return None

    def flops(self, w: Weights, T: int) -> float:
        return 0


class BatchRetention:
    """The rule read literally: oa from all tokens of all rows. It sees the future and the other rows."""

    chunk = None
    causal = False

    def __init__(self, c):
        self.scale = c.retention_scale

    def update(self, w: Weights, u: Tensor, g: Tensor, block: StrawberryBlock, at: At, state: None) -> Weights:
        with full_precision(u):
            total = (wide(u).mT @ wide(g)).mean(dim=0)
        return reweigh(w, self.scale * norm(total), block.out, block.tao)

    def new_state(self, batch: int, device, dtype, w: Weights) -> None:
        return None

    def flops(self, w: Weights, T: int) -> float:
        C = w.out.size(-1)
        return 2 * C * C + reweigh_flops(w) / T


class CausalRetention:
    """oa of chunk j from chunks 0 … j − 1 of its own row. Carries, for each step, the sum over finished chunks, that of
    the open one, and the open one's weights, which the next step's update starts from."""

    causal = True

    def __init__(self, c):
        self.scale, self.chunk = c.retention_scale, c.retention_chunk

    def update(self, w: Weights, u: Tensor, g: Tensor, block: StrawberryBlock, at: At, state: State | None) -> Weights:
        with full_precision(u):
            sums = to_chunks(wide(u), at.slot).mT @ to_chunks(wide(g), at.slot)  # (B, J, C, C)
        if state is None:
            return self.weights(w, sums, block)
        self.open_chunk(state, at)
        sums[:, 0] += state.partial
        before = state.finished.unsqueeze(1) + F.pad(sums, (0, 0, 0, 0, 1, -1)).cumsum(dim=1)
        kept = Weights(*(getattr(state, name).unsqueeze(1) for name in Weights._fields))
        new = kept if at.border is False else reweigh(w, self.scale * norm(before), block.out, block.tao)
        if isinstance(at.border, Tensor):  # rows inside a chunk keep its weights
            at_border = at.border.view(-1, 1, 1, 1)
            new = Weights(*(torch.where(at_border, n, k) for n, k in zip(new, kept, strict=True)))
        self.keep(state, at, before, sums, new)
        return new

    def weights(self, w: Weights, sums: Tensor, block: StrawberryBlock) -> Weights:
        before = F.pad(sums, (0, 0, 0, 0, 1, -1)).cumsum(dim=1)
        return reweigh(w, self.scale * norm(before), block.out, block.tao)

    def open_chunk(self, state: State, at: At) -> None:
        """At a border the open chunk is finished: its sum joins the others."""
        if at.border is False:
            return
        done = state.partial if at.border is True else torch.where(at.border.view(-1, 1, 1), state.partial, 0.0)
        state.finished += done
        state.partial -= done

    def keep(self, state: State, at: At, before: Tensor, sums: Tensor, new: Weights) -> None:
        """Carry what belongs to the chunk of each row's last real token."""
        rows = torch.arange(before.size(0), device=before.device)
        last = -1 if at.count is None else ((at.count - 1).clamp(min=0) // at.slot)
        state.finished.copy_(before[rows, last])
        state.partial.copy_(sums[rows, last])
        for name, w in zip(Weights._fields, new, strict=True):
            getattr(state, name).copy_(w[rows, last])

    def new_state(self, batch: int, device, dtype, w: Weights) -> State:
        C, wide_type = w.out.size(-1), torch.float64 if dtype == torch.float64 else torch.float32
        matrices = {name: (tuple(m.shape), 0.0, wide_type) for name, m in zip(Weights._fields, w, strict=True)}
        square = ((C, C), 0.0, wide_type)
        return State(batch, device, finished=square, partial=square, **matrices)

    def flops(self, w: Weights, T: int) -> float:
        C = w.out.size(-1)
        return 2 * C * C + reweigh_flops(w) * -(-T // self.chunk) / T


def reweigh_flops(w: Weights) -> float:
    """Two products with a (C, C) matrix for each row of the three matrices, as f sees them."""
    C = w.out.size(-1)
    return 2 * 2 * C * (w.qkv.numel() + w.swiglu.numel() + w.out.numel())


RETENTION = {"causal": CausalRetention, "batch": BatchRetention}


def strawberry_steps(c: StrawberryConfig) -> list[str]:
    """Which mixer each step of a block uses: retention steps 1 … R, attention every (aft_ratio + 1)-th, then attention.

    >>> strawberry_steps(StrawberryConfig(r_layer=5, aft_ratio=3))
    ['aft', 'aft', 'aft', 'tea', 'aft', 'tea']
    """
    steps = ["tea" if i % (c.aft_ratio + 1) == 0 else "aft" for i in range(1, c.r_layer + 1)]
    return [*steps, "tea"]


class StrawberryBlock(nn.Module):
    """R retention steps and a last one, all with the same weights, which retention changes from step to step."""

    roles = {"w_attn_qkv": "matrix", "w_attn_swiglu": "matrix", "w_attn_out": "matrix", "out": "residual", "tao": "tao"}

    def __init__(self, c: StrawberryConfig):
        super().__init__()
        C, D = c.n_embd, c.n_qkv
        self.w_attn_qkv = nn.Parameter(torch.empty(3 * D, C))  # q, then k, then v
        self.w_attn_swiglu = nn.Parameter(torch.empty(2 * C, D))
        self.w_attn_out = nn.Parameter(torch.empty(C, C))
        self.retention = NoRetention()
        if c.r_layer and c.retention == "on":
            self.out, self.tao = nn.Parameter(torch.empty(C, C)), nn.Parameter(torch.empty(1, 3))
            self.retention = RETENTION[c.retention_scope](c)
        self.steps = strawberry_steps(c)
        self.tea = ExpertAttention(c, rotary_qk_norm)
        self.aft = AFTSimple(c, channel_norm) if "aft" in self.steps else None
        self.drop = nn.Dropout(c.dropout)

    def base(self) -> Weights:
        return Weights(self.w_attn_qkv, self.w_attn_swiglu, self.w_attn_out)

    def forward(self, x: Tensor, at: At, states: list | None) -> Tensor:
        w = self.base()
        for i, kind in enumerate(self.steps):
            mixed, retained = (None, None) if states is None else states[i]
            x, u, g = self.step(getattr(self, kind), x, w, at, mixed)
            if i + 1 < len(self.steps):
                w = self.retention.update(w, u, g, self, at, retained)
        return x

    def step(self, mixer: Mixer, x: Tensor, w: Weights, at: At, state) -> tuple[Tensor, Tensor, Tensor]:
        """Mix and SwiGLU with the weights w; also its u and g, which retention sums."""
        h = norm(x)
        q, k, v = project(h, w.qkv, at).chunk(3, dim=-1)
        u, g = project(mixer(q, k, v, h, at, state), w.swiglu, at).chunk(2, dim=-1)
        real = at.real()
        summed = u if real is None else u * real.unsqueeze(-1)
        return x + self.drop(project(u * F.silu(g), w.out, at)), summed, g

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return [
            (getattr(self, kind).new_state(batch, max_length, device, dtype),
             self.retention.new_state(batch, device, dtype, self.base()) if i + 1 < len(self.steps) else None)
            for i, kind in enumerate(self.steps)
        ]

    def flops(self, T: int) -> float:
        w = self.base()
        steps = sum(2 * sum(m.numel() for m in w) + getattr(self, kind).flops(T) for kind in self.steps)
        return steps + (len(self.steps) - 1) * self.retention.flops(w, T)


class Strawberry(LanguageModel):
    """Strawberry (2026): attention-free mixing, local attention, and weights that the text read so far rewrites."""

    Config = StrawberryConfig

    def __init__(self, config: StrawberryConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(StrawberryBlock(c) for _ in range(c.n_layer))
        self.rope = Rope(c.n_qkv // c.n_head)
        self.causal = all(block.retention.causal for block in self.blocks)
        self.chunk = self.blocks[0].retention.chunk

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        return norm(self.embed(idx))

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, at, None if states is None else states[i])
        return x

    def head(self, x: Tensor) -> Tensor:
        return softcap(F.linear(norm(x), self.embed.weight), self.config.logit_softcap)

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return [block.new_states(batch, max_length, device, dtype) for block in self.blocks]

    def flops(self, T: int) -> float:
        return sum(block.flops(T) for block in self.blocks) + 2 * self.embed.weight.numel()


# ---- tinystar ------------------------------------------------------------------------------------------------------


@dataclass
class TinyStarConfig(ModelConfig):
    arch: str = option("tinystar", "the family of architectures", choices=("tinystar",))
    n_qkv: int | None = option(None, "channels of q; default n_embd", low=1)
    n_kv_head: int | None = option(None, "heads of k and v in GQA; default n_head / 2", low=1)
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 8C/3 (SwiGLU) or 4C", low=1)
    window: int | None = option(None, "tokens that -SWA attention sees; default block_size / 4", low=1)
    kv_rank: int | None = option(None, "MHLA's latent; default n_embd / 4", low=1)
    rope_dim: int | None = option(None, "MHLA's rotary channels; default half a head's", low=2)
    norm_type: str = option("RMSNorm", "norms, with learned scales", choices=tuple(NORMS))
    attention_type: str = option(
        "GQA", "heads of k and v: as q, grouped, one, or a latent; -SWA: over a sliding window",
        choices=("MHA", "GQA", "MQA", "MHLA", "MHA-SWA", "GQA-SWA", "MQA-SWA", "MHLA-SWA"))
    ffn_type: str = option("SwiGLU", "feed-forward", choices=tuple(FEED_FORWARDS))
    pos_encoding: str = option(
        "RoPE", "how tokens know where they stand", choices=("Learned", "RoPE", "Sinusoidal", "None"))
    tie_embeddings: bool = option(True, "one table for input and output")

    def __post_init__(self):
        self.n_qkv = self.n_embd if self.n_qkv is None else self.n_qkv
        self.n_kv_head = max(1, self.n_head // 2) if self.n_kv_head is None else self.n_kv_head
        self.window = max(1, self.block_size // 4) if self.window is None else self.window
        self.kv_rank = max(1, self.n_embd // 4) if self.kv_rank is None else self.kv_rank
        self.rope_dim = max(2, self.n_qkv // self.n_head // 4 * 2) if self.rope_dim is None else self.rope_dim

    @property
    def bias(self) -> bool:
        """GPT-2's biases, in the LayerNorm + GELU baseline only."""
        return self.norm_type == "LayerNorm" and self.ffn_type == "GELU"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        if self.n_head % self.n_kv_head:
            yield "n_kv_head", f"is {self.n_kv_head}, which does not divide n_head {self.n_head}"
        if self.rope_dim % 2:
            yield "rope_dim", f"is {self.rope_dim}, but rotary positions turn pairs: an even number"


class SelfAttention(nn.Module):
    """Projections around softmax attention: all heads of q, n_kv_head heads of k and v."""

    def __init__(self, c: TinyStarConfig, n_kv_head: int, window: int | None):
        super().__init__()
        d = c.n_qkv // c.n_head
        self.wq = Linear(c.n_embd, c.n_qkv, bias=c.bias)
        self.wk = Linear(c.n_embd, n_kv_head * d, bias=c.bias)
        self.wv = Linear(c.n_embd, n_kv_head * d, bias=c.bias)
        self.wo = Linear(c.n_qkv, c.n_embd, bias=c.bias)
        self.mixer = Softmax(c.n_head, d, n_kv_head=n_kv_head, window=window, prepare=POSITIONS[c.pos_encoding].prepare,
                             dropout=c.dropout)

    def forward(self, x: Tensor, at: At, state: Ring | None) -> Tensor:
        return self.wo(self.mixer(self.wq(x), self.wk(x), self.wv(x), x, at, state))

    def new_state(self, batch: int, max_length: int, device, dtype) -> Ring:
        return self.mixer.new_state(batch, max_length, device, dtype)

    def flops(self, T: int) -> float:
        return sum(w.flops(T) for w in (self.wq, self.wk, self.wv, self.wo)) + self.mixer.flops(T)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are read out of one latent of kv_rank
    numbers; positions go through a rotary key of rope_dim numbers that all heads share. These two are all it caches."""

    def __init__(self, c: TinyStarConfig, n_kv_head: int, window: int | None):
        super().__init__()
        self.n_head, self.d, self.rank, self.rope_dim = c.n_head, c.n_qkv // c.n_head, c.kv_rank, c.rope_dim
        self.wq = Linear(c.n_embd, c.n_head * (self.d + self.rope_dim), bias=c.bias)
        self.wkv_a = Linear(c.n_embd, self.rank + self.rope_dim, bias=c.bias)
        self.kv_norm = RMSNorm(self.rank)
        self.wkv_b = Linear(self.rank, c.n_head * 2 * self.d)  # per head: k, then v
        self.wo = Linear(c.n_qkv, c.n_embd, bias=c.bias)
        self.window, self.dropout = Window(window), c.dropout

    def forward(self, x: Tensor, at: At, state: Ring | None) -> Tensor:
        q, q_rope = self.wq(x).unflatten(-1, (self.n_head, -1)).split((self.d, self.rope_dim), dim=-1)
        latent, k_rope = self.wkv_a(x).split((self.rank, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_norm(latent), rotate(k_rope.unsqueeze(2), at.rope)
        mix = self.expanded if state is None else self.absorbed
        return self.wo(mix(q, rotate(q_rope, at.rope), latent, k_rope, at, state).flatten(2))

    def expanded(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, at: At, state: None) -> Tensor:
        """Keys and values written out per head: the fewest products where all tokens are given at once."""
        k, v = self.wkv_b(latent).unflatten(-1, (self.n_head, -1)).chunk(2, dim=-1)
        k = torch.cat((k, k_rope.expand(-1, -1, self.n_head, -1)), dim=-1)
        dropout = self.dropout if self.training else 0.0
        return attend(torch.cat((q, q_rope), dim=-1), k, v, at.mask(self.window), dropout=dropout)

    def absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, at: At, state: Ring) -> Tensor:
        """The same with the up-projections moved to q and to the result: one latent head serves all heads of q."""
        latent, k_rope, k_pos = state.extend(at, latent, k_rope.flatten(2))
        wk, wv = self.wkv_b.weight.unflatten(0, (self.n_head, 2, self.d)).unbind(dim=1)  # (H, d, rank) each
        q = torch.cat((torch.einsum("bthd,hdr->bthr", q, wk), q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1).unsqueeze(2)
        scale = (self.d + self.rope_dim) ** -0.5
        y = attend(q, k, latent.unsqueeze(2), self.window.sees(at.pos, k_pos), scale=scale)
        return torch.einsum("bthr,hdr->bthd", y, wv)

    def new_state(self, batch: int, max_length: int, device, dtype) -> Ring:
        size = max_length if self.window.size is None else min(self.window.size, max_length)
        return Ring(batch, device, dtype, size, latent=self.rank, k_rope=self.rope_dim)

    def flops(self, T: int) -> float:
        projections = sum(w.flops(T) for w in (self.wq, self.wkv_a, self.wkv_b, self.wo))
        return projections + 2 * T * self.n_head * (2 * self.d + self.rope_dim)


# attention_type to the class, and its heads of k and v from (n_head, n_kv_head)
ATTENTIONS = {
    "MHA": (SelfAttention, lambda h, kv: h),
    "GQA": (SelfAttention, lambda h, kv: kv),
    "MQA": (SelfAttention, lambda h, kv: 1),
    "MHLA": (LatentAttention, lambda h, kv: 1),
}


def tinystar_attention(c: TinyStarConfig) -> nn.Module:
    name, _, sliding = c.attention_type.partition("-")
    attention, kv_heads = ATTENTIONS[name]
    return attention(c, kv_heads(c.n_head, c.n_kv_head), c.window if sliding else None)


class LearnedPositions(nn.Module):
    """A learned vector for each of block_size places, added to the embedding."""

    roles = {"weight": "position"}
    prepare = staticmethod(as_is)

    def __init__(self, c):
        super().__init__()
        self.max_positions = c.block_size
        self.weight = nn.Parameter(torch.empty(c.block_size, c.n_embd))

    def forward(self, x: Tensor, at: At) -> Tensor:
        return x + F.embedding(at.pos, self.weight)


class SinusoidalPositions(nn.Module):
    """sin(pos / 10000^(2i/C)) in even channels, cos in odd ones (arXiv 1706.03762), added to the embedding."""

    max_positions = None
    prepare = staticmethod(as_is)

    def __init__(self, c):
        super().__init__()
        self.width, self.rope = c.n_embd, Rope(c.n_embd)

    def forward(self, x: Tensor, at: At) -> Tensor:
        cos, sin = self.rope(at.pos)
        both = torch.stack((sin, cos), dim=-1).flatten(-2).squeeze(2)  # (B, T, C), sin and cos in turn
        return x + both[..., : self.width].to(x.dtype)


class RotaryPositions(nn.Module):
    """q and k are turned in each attention; nothing is added."""

    max_positions = None
    prepare = staticmethod(rotary)

    def __init__(self, c):
        super().__init__()

    def forward(self, x: Tensor, at: At) -> Tensor:
        return x


class NoPositions(RotaryPositions):
    """Only the causal mask tells where a token stands (arXiv 2305.19466)."""

    prepare = staticmethod(as_is)


POSITIONS = {"Learned": LearnedPositions, "RoPE": RotaryPositions, "Sinusoidal": SinusoidalPositions, "None": NoPositions}


class TinyStarBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, c: TinyStarConfig):
        super().__init__()
        self.norm1, self.norm2 = NORMS[c.norm_type](c.n_embd), NORMS[c.norm_type](c.n_embd)
        self.attn = tinystar_attention(c)
        self.ffn = FEED_FORWARDS[c.ffn_type](c.n_embd, c.n_ffn, bias=c.bias)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, at: At, state: Ring | None) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), at, state))
        return x + self.drop(self.ffn(self.norm2(x)))

    def new_states(self, batch: int, max_length: int, device, dtype) -> State:
        return self.attn.new_state(batch, max_length, device, dtype)

    def flops(self, T: int) -> float:
        return self.attn.flops(T) + self.ffn.flops(T)


class TinyStar(LanguageModel):
    """One block, three slots: GPT-2's descendants side by side."""

    Config = TinyStarConfig

    def __init__(self, config: TinyStarConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd, "embedding" if c.tie_embeddings else "input")
        self.positions = POSITIONS[c.pos_encoding](c)
        self.blocks = nn.ModuleList(TinyStarBlock(c) for _ in range(c.n_layer))
        self.norm = NORMS[c.norm_type](c.n_embd)
        self.unembed = None if c.tie_embeddings else Linear(c.n_embd, c.vocab_size, role="head")
        latent = c.attention_type.startswith("MHLA")
        self.rope = Rope(c.rope_dim if latent else c.n_qkv // c.n_head)
        self.max_positions = self.positions.max_positions

    def embed_tokens(self, idx: Tensor, at: At) -> Tensor:
        return self.positions(self.embed(idx), at)

    def trunk(self, x: Tensor, at: At, states: list | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, at, None if states is None else states[i])
        return x

    def head(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.unembed is None else self.unembed(x)

    def new_states(self, batch: int, max_length: int, device, dtype) -> list:
        return [block.new_states(batch, max_length, device, dtype) for block in self.blocks]

    def flops(self, T: int) -> float:
        return sum(block.flops(T) for block in self.blocks) + 2 * self.embed.weight.numel()


# ---- registry, initialisation --------------------------------------------------------------------------------------

MODELS: dict[str, type[LanguageModel]] = {"strawberry": Strawberry, "tinystar": TinyStar}
CONFIGS: dict[str, type[ModelConfig]] = {name: model.Config for name, model in MODELS.items()}


def build(hyperparams: dict | ModelConfig) -> LanguageModel:
    """The model that a JSON file's "model_hyperparams" describe, its weights as `init_weights` draws them.

    >>> build({"arch": "tinystar", "n_layer": 4, "n_embd": 128}).num_params()
    """
    config = hyperparams
    if isinstance(hyperparams, dict):
        arch = hyperparams.get("arch", "strawberry")
        if arch not in MODELS:
            raise UserError(f"arch {arch!r} is not known; there are: {', '.join(MODELS)}{nearest(str(arch), MODELS)}")
        config, problems = check(CONFIGS[arch], hyperparams, "model_hyperparams")
        if problems:
            raise UserError("\n".join(problems))
    model = MODELS[config.arch](config)
    init_weights(model)
    return model


@torch.no_grad()
def init_weights(model: LanguageModel) -> None:
    """Every parameter's start, by its role.

    role       start                          optimized by               decay
    matrix     uniform, std fan_in^(−1/2)     Muon where asked, or AdamW yes
    residual   zero                           Muon where asked, or AdamW yes
    embedding  normal, std 0.02               AdamW                      yes
    input      normal, std 1                  AdamW                      yes
    head       uniform, std fan_in^(−1/2)     AdamW                      no
    router     uniform, std fan_in^(−1/2)     AdamW                      no
    position   normal, std 0.02               AdamW                      no
    norm       one                            AdamW                      no
    tao        one                            AdamW                      no
    bias       zero                           AdamW                      no

    `embedding` is a table that is also the head (tied), `input` one that is not.
    """
    roles = model.roles()
    for name, p in model.named_parameters():
        START[roles[name]](p)


def uniform(p: Tensor) -> None:
    bound = math.sqrt(3 / p.size(1))  # a uniform distribution over ±b has standard deviation b / √3
    p.uniform_(-bound, bound)


START = {
    "matrix": uniform,
    "residual": nn.init.zeros_,
    "embedding": lambda p: p.normal_(std=0.02),
    "input": lambda p: p.normal_(std=1.0),
    "head": uniform,
    "router": uniform,
    "position": lambda p: p.normal_(std=0.02),
    "norm": nn.init.ones_,
    "tao": nn.init.ones_,
    "bias": nn.init.zeros_,
}

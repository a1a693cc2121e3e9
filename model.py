"""All architectures in one file, ordered for reading from top to bottom. Each class states the formula it computes; its
Config declares the options. strawberry/ops selects how an operation is computed: plain PyTorch, a Triton kernel or FP8.

Notation:  B rows · T tokens · S keys · V vocab_size · C n_embd · D n_qkv · H n_head · d = D / H · J chunks
           A row is a sequence in a batch.

Index:  mixers: softmax, AFT, LAM, expert attention · projections and feed-forward · attention · positions · recursion ·
        the language model · strawberry · strawberry-silia · strawberry-v0 · palm · tinystar · transformer · registry,
        initialisation

A projection computes q, k and v, a mixer mixes them over time, a block combines these modules, and a model stacks
blocks. A mixer is a module with

    qk_transform                              applied to q and k before `forward`: see strawberry/ops/qkv.py
    forward(q, k, v, x, ctx, cache) -> y      all (B, T, ·); x is the normed input, which routers read; `ctx` has the
                                              tokens' positions and masks; `cache` is the state of earlier calls, None
                                              for whole sequences
    new_cache(batch, max_length, device, dtype) -> LayerCache | list | None

`python model.py --config air.json` prints a model: steps, mixers, shapes, parameters, FLOPs per token, cache size.
"""

from __future__ import annotations

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strawberry import ops
from strawberry.cache import CACHE_ALIGNMENT, Cache, ChunkCache, CrossKVCache, LayerCache, RingKVCache
from strawberry.common import UserError, nearest, run_cli
from strawberry.config import check, option
from strawberry.context import EncodedSource, ForwardContext, Mode
from strawberry.ops.common import no_autocast, norm, softcap, to_accum_dtype, to_autocast_dtype
from strawberry.ops.masks import AttentionPattern, BigBirdPattern, LongformerPattern
from strawberry.run_config import load_run
from strawberry.stack import run_blocks
from strawberry.summary import summarize


class Rope(nn.Module):
    """Rotary positions (arXiv 2104.09864): the cosines and sines of given positions."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.exact = frequencies  # (d/2,) float64
        self.register_buffer("frequency", frequencies.float(), persistent=False)

    def _apply(self, fn, recurse=True):
        # recomputed from the float64 values after every cast: frequencies in bfloat16, or in float64 cast from float32,
        # give wrong angles at large positions
        super()._apply(fn, recurse)
        dtype = torch.float64 if self.frequency.dtype == torch.float64 else torch.float32
        self.frequency = self.exact.to(self.frequency.device, dtype)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = (positions.unsqueeze(-1) * self.frequency).unsqueeze(2)  # (B, T, 1, d/2)
        return angle.cos(), angle.sin()


# ---- mixers --------------------------------------------------------------------------------------------------------


class Softmax(nn.Module):
    """Softmax attention with H heads of d channels; k and v may have fewer heads than q (arXiv 2305.13245)."""

    def __init__(self, c, *, n_kv_head: int | None = None, pattern: AttentionPattern | None = None,
                 qk_transform: Callable = ops.no_transform):  # fmt: skip
        super().__init__()
        self.n_head, self.d = c.n_head, c.n_qkv // c.n_head
        self.n_kv_head = n_kv_head or self.n_head
        self.pattern, self.qk_transform, self.dropout = pattern or AttentionPattern(), qk_transform, c.dropout
        self.scale = softmax_scale(c, qk_transform)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: RingKVCache | None):
        dropout = self.dropout if self.training else 0.0
        return ops.attention(q, k, v, self.d, self.pattern, ctx, cache, scale=self.scale, dropout=dropout)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> RingKVCache:
        width = self.n_kv_head * self.d
        return RingKVCache(batch, device, dtype, self.pattern.cache_size(max_length), k=width, v=width)


def softmax_scale(c, qk_transform: Callable) -> float:
    """d^(−1/2), multiplied by the squared attention factor where rotary positions are scaled."""
    d = c.n_qkv // c.n_head
    if qk_transform not in (ops.rotary, ops.rotary_qk_norm):
        return d**-0.5
    return d**-0.5 * ops.rope_frequencies(d, c.rope_scaling, c.block_size)[1] ** 2


class SinkSoftmax(Softmax):
    """`Softmax` in which every token also attends to a sink (arXiv 2309.17453): a learned key and value per head, which
    have no position. Both start at zero, so that at first the softmax's denominator is larger by exp(0)."""

    roles = {"sink_k": "bias", "sink_v": "bias"}

    def __init__(self, c, qk_transform: Callable):
        super().__init__(c, qk_transform=qk_transform)
        self.sink_k, self.sink_v = nn.Parameter(torch.empty(c.n_qkv)), nn.Parameter(torch.empty(c.n_qkv))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: RingKVCache | None):
        dropout = self.dropout if self.training else 0.0
        return ops.attention_with_sink(
            q, k, v, self.sink_k, self.sink_v, self.d, ctx, cache, scale=self.scale, dropout=dropout)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> RingKVCache:
        # the sink takes one slot; a whole line of slots keeps the ring's size as aligned as max_length is
        return super().new_cache(batch, max_length + CACHE_ALIGNMENT, device, dtype)


class AFTSimple(nn.Module):
    """Attention-free mixing (arXiv 2105.14103) without positions: y_t = σ(q_t) ⊙ Σ exp(k_s) v_s / Σ exp(k_s)."""

    def __init__(self, c, qk_transform: Callable):
        super().__init__()
        self.width, self.qk_transform = c.n_qkv, qk_transform

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: LayerCache | None):
        return ops.aft_simple(q, k, v, ctx, cache)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> LayerCache:
        return ops.new_state_cache(batch, device, dtype, self.width)


class AFTFull(nn.Module):
    """Attention-free mixing with learned positions: exp(k_s + p_{t,s}), p = a bᵀ, a and b (block_size, 128). With a
    window, p is 0 where t − s ≥ window, but the sums still include every s."""

    roles = {"a": "position", "b": "position"}

    def __init__(self, c, qk_transform: Callable, window: int | None = None):
        super().__init__()
        self.width, self.window, self.qk_transform = c.n_qkv, window, qk_transform
        self.a, self.b = nn.Parameter(torch.empty(c.block_size, 128)), nn.Parameter(torch.empty(c.block_size, 128))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: list | None):
        return ops.aft_positional(q, k, v, ops.LowRankBias(self.a, self.b, self.window), ctx, cache)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> list:
        return ops.new_positional_cache(batch, max_length, device, dtype, self.width, self.window)


class AFTConv(nn.Module):
    """Attention-free mixing where p depends on the distance t − s: `window` taps for each of n_head groups of channels,
    0 at larger distances."""

    roles = {"kernel": "position"}

    def __init__(self, c, qk_transform: Callable):
        super().__init__()
        self.width, self.window, self.qk_transform = c.n_qkv, c.window, qk_transform
        self.kernel = nn.Parameter(torch.empty(c.n_head, c.window))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: list | None):
        return ops.aft_positional(q, k, v, ops.ConvBias(self.kernel), ctx, cache)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> list:
        return ops.new_positional_cache(batch, max_length, device, dtype, self.width, self.window)


def aft_local(c, qk_transform: Callable) -> AFTFull:
    """AFTFull with p = 0 where t − s ≥ window."""
    return AFTFull(c, qk_transform, window=c.window)


AFTS = {"simple": AFTSimple, "full": AFTFull, "local": aft_local, "conv": AFTConv}
FIXED_LENGTH_AFTS = {"full", "local"}  # kinds whose learned positions end at block_size


class LAM(nn.Module):
    """Linear attention (arXiv 2007.14902): the similarity of q and k is 1 + cos(q, k), so three sums per head represent
    all earlier tokens. y_t = (Σ v_s + q̂_t Σ k̂_sᵀ v_s) / max(t + q̂_t · Σ k̂_s, 1e-6), where t starts at 1."""

    segment = 256  # tokens whose pairwise similarities are computed; earlier tokens enter through the sums

    def __init__(self, c, qk_transform: Callable):
        super().__init__()
        self.n_head, self.d, self.qk_transform = c.n_head, c.n_qkv // c.n_head, qk_transform

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: LayerCache | None):
        valid = ~ctx.padding_mask if ctx.padding_mask is not None else ctx.valid_mask()
        with no_autocast(x):
            heads = (to_accum_dtype(t).unflatten(-1, (-1, self.d)) for t in (q, k, v))
            q, k, v_acc = (t.transpose(1, 2) for t in heads)  # (B, H, T, d)
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            ones = torch.ones_like(v_acc[..., :1])
            if valid is not None:
                k, v_acc, ones = (t * valid[:, None, :, None] for t in (k, v_acc, ones))
            mix = self.forward_causal if ctx.causal else self.forward_bidirectional
            y, count = mix(q, k, torch.cat((v_acc, ones), dim=-1), cache)
        return (y / count.clamp(min=1e-6)).transpose(1, 2).flatten(2).to(v.dtype)

    def forward_bidirectional(self, q: Tensor, k: Tensor, v: Tensor, cache: None) -> tuple[Tensor, Tensor]:
        y = v.sum(dim=2, keepdim=True) + q @ (k.mT @ v)
        return y[..., :-1], y[..., -1:]

    def forward_causal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """The last channel of v is 1, so the last channel of the weighted sum is the denominator."""
        total, outer = (0.0, 0.0) if cache is None else (cache.total.unsqueeze(2), cache.outer)
        parts = []
        for q_now, k_now, v_now in zip(*(t.split(self.segment, dim=2) for t in (q, k, v)), strict=True):
            similar = (1 + q_now @ k_now.mT).tril()
            parts.append(similar @ v_now + total + (0.0 if isinstance(outer, float) else q_now @ outer))
            total, outer = total + v_now.sum(dim=2, keepdim=True), outer + k_now.mT @ v_now
        if cache is not None:
            cache.total.copy_(total.squeeze(2))
            cache.outer.copy_(outer)
        y = torch.cat(parts, dim=2)
        return y[..., :-1], y[..., -1:]

    def new_cache(self, batch: int, max_length: int, device, dtype) -> LayerCache:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (self.n_head, self.d, self.d + 1)
        return LayerCache(batch, device, total=((self.n_head, self.d + 1), 0.0, dtype), outer=(shape, 0.0, dtype))


class Router(nn.Module):
    """Selects `active` of n items for each token: p = softmax(norm(x) Wᵀ); the items with the largest p + bias are
    selected, each with weight n·p.

    Auxiliary-loss-free load balancing (arXiv 2408.15664): after each optimizer step
    `bias += 0.01·sign(mean load − load)`. The bias affects the selection only, not the weights.
    """

    roles = {"weight": "router"}

    def __init__(self, n_embd: int, n: int, active: int):
        super().__init__()
        self.n, self.active = n, active
        self.weight = nn.Parameter(torch.empty(n, n_embd))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("load", torch.zeros(n), persistent=False)  # tokens since the last optimizer step
        self.register_buffer("share", torch.zeros(n), persistent=False)  # of the last step's selections, for logs

    def choose(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Probabilities, and the mask of the selected items, both (B, T, n), for x (B, T, C)."""
        with no_autocast(x):
            p = F.linear(to_accum_dtype(norm(x)), to_accum_dtype(self.weight)).softmax(dim=-1)
        score = p.detach() + self.bias
        mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
        first = torch.ones(self.n, self.n, dtype=torch.bool, device=x.device).tril(-1)  # the lower index wins ties
        rank = ((other > mine) | ((other == mine) & first)).sum(dim=-1)
        kept = rank < self.active
        if self.training:
            counted = kept if ctx.active is None else kept & ctx.active.unsqueeze(-1)
            self.load += counted.sum(dim=(0, 1))
        return p, kept

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """The items' weights for each token, (B, T, n); zero for items that are not selected."""
        p, kept = self.choose(x, ctx)
        return (self.n * p * kept).to(x.dtype)

    @torch.no_grad()
    def balance(self, scale: Tensor | float = 1.0) -> None:
        self.bias += 0.01 * scale * torch.sign(self.load.mean() - self.load)
        self.share.copy_(self.load / self.load.sum().clamp(min=1))
        self.load.zero_()


class ExpertAttention(nn.Module):
    """Token-level mixture of local-context attention (The Expert Abundance): groups of heads, each with its own window;
    a router weights the groups for each token. Keys and values are never routed. See MoH (arXiv 2410.11842)."""

    def __init__(self, c, qk_transform: Callable):
        super().__init__()
        self.n_head, self.d, self.dropout = c.n_head, c.n_qkv // c.n_head, c.dropout
        self.qk_transform, self.scale = qk_transform, softmax_scale(c, qk_transform)
        self.patterns = [AttentionPattern(window) for window in expert_windows(c)]
        self.router = Router(c.n_embd, c.n_experts, c.a_experts) if c.n_experts > 1 else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, ctx: ForwardContext, cache: list | None):
        dropout = self.dropout if self.training else 0.0
        y = ops.grouped_attention(q, k, v, self.d, self.patterns, ctx, cache, scale=self.scale, dropout=dropout)
        if self.router is None:
            return y
        weight = self.router(x, ctx).unsqueeze(-1)  # (B, T, n_experts, 1)
        return (y.unflatten(2, (len(self.patterns), -1)) * weight).flatten(2)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> list:
        width = self.n_head // len(self.patterns) * self.d
        sizes = [pattern.cache_size(max_length) for pattern in self.patterns]
        return [RingKVCache(batch, device, dtype, size, k=width, v=width) for size in sizes]


def expert_windows(c) -> list[int]:
    """The window of each expert: `windows`, or by default window, window/2, window/4, …, at least min(16, window).

    >>> expert_windows(StrawberryConfig(window=48, n_experts=4))
    [48, 24, 16, 16]
    """
    return c.windows or [max(c.window >> e, min(16, c.window)) for e in range(c.n_experts)]


# ---- projections and feed-forward ----------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = x Wᵀ (+ b), W (out, in). `role` selects its initialization and its optimizer: see `init_weights`."""

    products = ("weight",)
    precision = None  # see ops.prepare_weights

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False, role: str = "matrix"):
        super().__init__()
        self.roles = {"weight": role, "bias": "bias"}
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.precision)

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and W of the product x Wᵀ, for a loss that computes the product in parts."""
        return x, self.weight


class LowRank(nn.Module):
    """A low-rank linear map: in → rank → out."""

    def __init__(self, n_in: int, n_out: int, rank: int, role: str = "matrix"):
        super().__init__()
        self.down, self.up = Linear(n_in, rank, role=role), Linear(rank, n_out, role=role)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.up.head_inputs(self.down(x))


class Embedding(nn.Module):
    """Table lookup, (B, T) int64 → (B, T, C)."""

    products = ("weight",)

    def __init__(self, n: int, width: int, role: str = "embedding"):
        super().__init__()
        self.roles = {"weight": role}
        self.weight = nn.Parameter(torch.empty(n, width))
        self.register_buffer("probe", torch.empty(0), persistent=False)  # has the dtype that the model is cast to

    def forward(self, idx: Tensor) -> Tensor:
        return ops.embedding(idx, self.weight, self.probe.dtype)


class RMSNorm(nn.Module):
    """`norm` with a learned scale (arXiv 1910.07467)."""

    roles = {"weight": "norm"}

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # the scale keeps its precision; torch.compile still fuses this into one pass
            return (norm(to_accum_dtype(x)) * self.weight).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class LayerNorm(nn.Module):
    """Normalizes to mean 0 and variance 1, then applies a learned scale and shift (arXiv 1607.06450)."""

    roles = {"weight": "norm", "bias": "bias"}

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        y = to_accum_dtype(x) if x.dtype != self.weight.dtype else x
        return F.layer_norm(y, self.weight.shape, self.weight, self.bias, eps=1e-5).to(x.dtype)


class FeedForward(nn.Module):
    """f(x W₁ᵀ) W₂ᵀ, f from ops.ACTIVATIONS; for "swiglu", x W₁ᵀ is u and g, concatenated (arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.activation = c.ffn_type.lower()
        n_ffn = c.n_ffn or default_ffn_width(self.activation, c.n_embd)
        self.w1 = Linear(c.n_embd, (2 if self.activation == "swiglu" else 1) * n_ffn, bias=c.bias)
        self.w2 = Linear(n_ffn, c.n_embd, bias=c.bias, role=c.out_proj_role)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        w1, w2 = self.w1, self.w2
        return ops.mlp(x, w1.weight, w2.weight, self.activation, w1.bias, w2.bias, w1.precision)


def default_ffn_width(activation: str, n_embd: int) -> int:
    """4C; for swiglu, which has a third matrix, 8C/3 rounded up to a multiple of 64."""
    return -(-8 * n_embd // 3 // 64) * 64 if activation == "swiglu" else 4 * n_embd


class MoE(nn.Module):
    """Mixture of n_ffn_experts feed-forwards, a_ffn_experts of which are active for each token (arXiv 1701.06538).
    Every expert is computed for every token: shapes are fixed, and no token depends on the routing of other tokens."""

    def __init__(self, c):
        super().__init__()
        self.router = Router(c.n_embd, c.n_ffn_experts, c.a_ffn_experts)
        self.experts = nn.ModuleList(FeedForward(c) for _ in range(c.n_ffn_experts))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        weight = self.router(x, ctx)
        return sum(weight[..., e : e + 1] * expert(x, ctx) for e, expert in enumerate(self.experts))


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
FEED_FORWARDS = ("swiglu", "gelu", "relu", "relu2")


def feed_forward(c) -> nn.Module:
    """The feed-forward that `ffn_type` names, or a mixture of n_ffn_experts of them."""
    return MoE(c) if c.n_ffn_experts > 1 else FeedForward(c)


# ---- attention layers: projections around a mixer, (x, ctx, cache) -> y ---------------------------------------------


class SelfAttention(nn.Module):
    """Projections around any mixer. Without wq, q equals k (KV attention, arXiv 2305.19129)."""

    def __init__(self, c, mixer: nn.Module, *, n_kv_head: int | None = None, has_q: bool = True,
                 add_to_values: Callable | None = None):  # fmt: skip
        super().__init__()
        kv_width = (n_kv_head or c.n_head) * (c.n_qkv // c.n_head)
        self.wq = Linear(c.n_embd, c.n_qkv, bias=c.bias) if has_q else None
        self.wk, self.wv = Linear(c.n_embd, kv_width, bias=c.bias), Linear(c.n_embd, kv_width, bias=c.bias)
        self.wo = Linear(c.n_qkv, c.n_embd, bias=c.bias, role=c.out_proj_role)
        self.mixer, self.add_to_values = mixer, add_to_values or keep_values

    def forward(self, x: Tensor, ctx: ForwardContext, cache) -> Tensor:
        layers = [layer for layer in (self.wq, self.wk, self.wv) if layer is not None]
        weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        q, k, v = ops.qkv_projection(x, weights, biases, self.mixer.qk_transform, ctx, self.wk.precision)
        return self.wo(self.mixer(q, k, self.add_to_values(v, x, ctx), x, ctx, cache))

    def new_cache(self, batch: int, max_length: int, device, dtype):
        return self.mixer.new_cache(batch, max_length, device, dtype)


def keep_values(v: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor:
    return v


class ValueEmbedding(nn.Module):
    """v + 2σ(W_g x̃) ⊙ table[token], a gate for each head of v; x̃ is the first min(32, C) channels of x. The values of a
    layer then know their token, whatever the layers before made of it."""

    roles = {"gate": "bias", "table": "embedding"}

    def __init__(self, c, n_kv_head: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(n_kv_head, min(32, c.n_embd)))
        self.table = nn.Parameter(torch.empty(c.vocab_size, n_kv_head * (c.n_qkv // c.n_head)))

    def forward(self, v: Tensor, x: Tensor, ctx: ForwardContext) -> Tensor:
        narrow = x[..., : self.gate.size(1)].unsqueeze(-2)  # (B, T, 1, ·)
        gate = 2 * torch.sigmoid((narrow * self.gate).sum(dim=-1))  # (B, T, n_kv_head)
        value = ops.embedding(ctx.tokens, self.table, v.dtype).unflatten(-1, (len(self.gate), -1))
        return v + (gate.unsqueeze(-1) * value).flatten(2).to(v.dtype)


def value_embedding(c, layer: int, n_kv_head: int) -> ValueEmbedding | None:
    """Of every second layer, the last one included."""
    return ValueEmbedding(c, n_kv_head) if c.value_embeddings and (c.n_layer - 1 - layer) % 2 == 0 else None


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are projections of one latent of
    kv_rank channels. A rotary key of rope_dim channels, shared by all heads, encodes positions. The cache holds only
    the latent and the rotary key."""

    def __init__(self, c, pattern: AttentionPattern):
        super().__init__()
        self.n_head, self.d, self.rank, self.rope_dim = c.n_head, c.n_qkv // c.n_head, c.kv_rank, c.rope_dim
        self.wq = Linear(c.n_embd, c.n_head * (self.d + self.rope_dim), bias=c.bias)
        self.wkv_a = Linear(c.n_embd, self.rank + self.rope_dim, bias=c.bias)
        self.kv_norm = RMSNorm(self.rank)
        self.wkv_b = Linear(self.rank, c.n_head * 2 * self.d)  # per head: k, then v
        self.wkv_b.products = ()  # `absorbed` reads it too
        self.wo = Linear(c.n_qkv, c.n_embd, bias=c.bias, role=c.out_proj_role)
        self.pattern, self.dropout = pattern, c.dropout
        factor = ops.rope_frequencies(c.rope_dim, c.rope_scaling, c.block_size)[1]
        self.scale = (self.d + self.rope_dim) ** -0.5 * factor**2

    def forward(self, x: Tensor, ctx: ForwardContext, cache: RingKVCache | None) -> Tensor:
        q, q_rope = self.wq(x).unflatten(-1, (self.n_head, -1)).split((self.d, self.rope_dim), dim=-1)
        latent, k_rope = self.wkv_a(x).split((self.rank, self.rope_dim), dim=-1)
        latent, k_rope = self.kv_norm(latent), ops.apply_rope(k_rope.unsqueeze(2), ctx.rope)
        q_rope = ops.apply_rope(q_rope, ctx.rope)
        cached = None if cache is None else cache.update(ctx, latent, k_rope.flatten(2))
        if cache is None or ctx.num_cached == 0:
            y = self.expanded(q, q_rope, latent, k_rope, ctx)
        else:
            y = self.absorbed(q, q_rope, *cached, ctx.cached_attention_mask(self.pattern, cache))
        return self.wo(y.flatten(2))

    def expanded(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, ctx: ForwardContext) -> Tensor:
        """Computes keys and values per head, which takes the fewest FLOPs when the call holds all tokens."""
        k, v = self.wkv_b(latent).unflatten(-1, (self.n_head, -1)).chunk(2, dim=-1)
        k = torch.cat((k, k_rope.expand(-1, -1, self.n_head, -1).to(k.dtype)), dim=-1)
        q = torch.cat((q, q_rope), dim=-1)
        dropout = self.dropout if self.training else 0.0
        return ops.prefill_attention(q, k, v, self.pattern, ctx, scale=self.scale, dropout=dropout)

    def absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same result with the up-projections applied to q and to the output: all query heads attend to one latent
        head, so keys and values are never expanded per head."""
        wk, wv = self.wkv_b.weight.unflatten(0, (self.n_head, 2, self.d)).unbind(dim=1)  # (H, d, rank) each
        q = torch.cat((torch.einsum("bthd,hdr->bthr", q, wk), q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1).unsqueeze(2)
        y = ops.sdpa(q, k, latent.unsqueeze(2), mask, scale=self.scale)
        return torch.einsum("bthr,hdr->bthd", y, wv)

    def new_cache(self, batch: int, max_length: int, device, dtype) -> RingKVCache:
        size = self.pattern.cache_size(max_length)
        return RingKVCache(batch, device, dtype, size, latent=self.rank, k_rope=self.rope_dim)


class CrossAttention(nn.Module):
    """Softmax attention from each token to the whole source; a source that is all padding contributes zero."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.d, self.dropout = c.n_head, c.n_qkv // c.n_head, c.dropout
        kv_width = {"GQA": c.n_kv_head, "MQA": 1}.get(c.attention_type.partition("-")[0], c.n_head) * self.d
        self.wq, self.wo = Linear(c.n_embd, c.n_qkv, bias=c.bias), Linear(c.n_qkv, c.n_embd, bias=c.bias)
        self.wk, self.wv = Linear(c.n_embd, kv_width, bias=c.bias), Linear(c.n_embd, kv_width, bias=c.bias)

    def forward(self, x: Tensor, ctx: ForwardContext, cache: CrossKVCache | None) -> Tensor:
        k, v = self.project_source(ctx.source) if cache is None else (cache.k, cache.v)
        q, k, v = (t.unflatten(-1, (-1, self.d)) for t in (self.wq(x), k, v))
        mask = ~ctx.source.padding[:, None, None, :].expand(-1, 1, x.size(1), -1)
        y = ops.sdpa_with_empty_rows(q, k, v, mask, scale=self.d**-0.5, dropout=self.dropout if self.training else 0.0)
        empty = ctx.source.padding.all(dim=1)[:, None, None]
        return self.wo(y.flatten(2)).masked_fill(empty, 0.0)

    def project_source(self, source: EncodedSource) -> tuple[Tensor, Tensor]:
        """The source's keys and values."""
        return self.wk(source.x), self.wv(source.x)


def attention_pattern(c, layer: int) -> AttentionPattern:
    """The attention pattern of one layer: full, a sliding window if attention_type ends in -SWA, or sparse."""
    if c.sparse != "none":
        return SPARSE[c.sparse](c, layer)
    return AttentionPattern(c.window if c.attention_type.endswith("-SWA") else None)


SPARSE = {"longformer": lambda c, layer: LongformerPattern(c.window, c.n_global), "bigbird": BigBirdPattern}


def grouped_query(kv_heads: Callable) -> Callable:
    """Returns a builder of self-attention with `kv_heads(c)` heads of k and v."""

    def build(c, layer: int, qk_transform: Callable) -> SelfAttention:
        n, pattern = kv_heads(c), attention_pattern(c, layer)
        mixer = Softmax(c, n_kv_head=n, pattern=pattern, qk_transform=qk_transform)
        return SelfAttention(c, mixer, n_kv_head=n, add_to_values=value_embedding(c, layer, n))

    return build


def kv_attention(c, layer: int, qk_transform: Callable) -> SelfAttention:
    mixer = Softmax(c, pattern=attention_pattern(c, layer), qk_transform=qk_transform)
    return SelfAttention(c, mixer, has_q=False)


# attention_type without -SWA → builder of the layer: (config, layer index, transform of q and k) -> module
ATTENTIONS = {
    "MHA": grouped_query(lambda c: c.n_head),
    "GQA": grouped_query(lambda c: c.n_kv_head),
    "MQA": grouped_query(lambda c: 1),
    "MHLA": lambda c, layer, qk_transform: LatentAttention(c, attention_pattern(c, layer)),
    "kv": kv_attention,
    "aft": lambda c, layer, qk_transform: SelfAttention(c, AFTS[c.aft](c, qk_transform)),
    "lam": lambda c, layer, qk_transform: SelfAttention(c, LAM(c, qk_transform)),
    "expert": lambda c, layer, qk_transform: SelfAttention(c, ExpertAttention(c, qk_transform)),
}


def make_attention(c, layer: int) -> nn.Module:
    return ATTENTIONS[c.attention_type.partition("-")[0]](c, layer, choose_qk_transform(c))


def choose_qk_transform(c) -> Callable:
    """Rotary positions where they are asked for, then the norm of each head where that is."""
    if not c.qk_norm:
        return POSITIONS[c.pos_encoding].qk_transform
    return ops.rotary_qk_norm if c.pos_encoding == "RoPE" else ops.norm_heads(c.n_qkv // c.n_head)


# ---- positions that a model adds to its embedding ------------------------------------------------------------------


class LearnedPositions(nn.Module):
    """A learned vector for each of block_size positions."""

    roles = {"weight": "position"}
    qk_transform = staticmethod(ops.no_transform)

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.block_size, c.n_embd))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        pos = ctx.positions.clamp(0, len(self.weight) - 1)  # padding may lie after the table's end; an idle row has −1
        return x + F.embedding(pos, self.weight)


class SinusoidalPositions(nn.Module):
    """sin(pos / 10000^(2i/C)) in even channels, cos in odd ones (arXiv 1706.03762)."""

    qk_transform = staticmethod(ops.no_transform)

    def __init__(self, c):
        super().__init__()
        self.rope = Rope(ops.rope_frequencies(c.n_embd, ops.RopeScaling(), c.block_size)[0])

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        cos, sin = self.rope(ctx.positions)
        both = torch.stack((sin, cos), dim=-1).flatten(-2).squeeze(2)  # (B, T, C), sin and cos in turn
        return x + both[..., : x.size(-1)].to(x.dtype)


class RotaryPositions(nn.Module):
    """Each attention layer rotates q and k; nothing is added to the embedding."""

    qk_transform = staticmethod(ops.rotary)

    def __init__(self, c):
        super().__init__()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x


class NoPositions(nn.Module):
    """No positional encoding: only the causal mask provides order (arXiv 2305.19466)."""

    qk_transform = staticmethod(ops.no_transform)

    def __init__(self, c):
        super().__init__()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return x


POSITIONS = {
    "Learned": LearnedPositions,
    "RoPE": RotaryPositions,
    "Sinusoidal": SinusoidalPositions,
    "None": NoPositions,
}


def max_positions(c) -> int | None:
    """block_size where positions are learned, which limits the length of a sequence; else None."""
    learned = c.pos_encoding == "Learned" or (c.attention_type == "aft" and c.aft in FIXED_LENGTH_AFTS)
    return c.block_size if learned else None


def build_rope(c) -> Rope:
    """The rotary positions of a model whose attention is chosen by attention_type."""
    dim = c.rope_dim if c.attention_type.startswith("MHLA") else c.n_qkv // c.n_head
    return Rope(ops.rope_frequencies(dim, c.rope_scaling, c.block_size)[0])


# ---- recursion -----------------------------------------------------------------------------------------------------


def run_recursions(run: Callable, x: Tensor, ctx: ForwardContext, caches: list | None, n: int, depth: Router | None):
    """Makes n passes of run(x, ctx, cache) or, with a depth router, as many as it selects for each token
    (arXiv 2507.10524).

    After a token's last pass its x is frozen; its keys and values are still computed. The result is
    x₀ + n·q·(x − x₀), where q is the probability of the selected depth, so that the router receives a gradient.
    """
    caches = caches or [None] * n
    if depth is None:
        for cache in caches:
            x = run(x, ctx, cache)
        return x
    p, kept = depth.choose(x, ctx)
    reaches = kept.flip(-1).cumsum(dim=-1).flip(-1).bool()  # (B, T, n): whether a token takes pass i
    start = x
    for i, cache in enumerate(caches):
        x = run(x, replace(ctx, active=reaches[..., i]), cache)
    share = (depth.n * p * kept).sum(dim=-1, keepdim=True).to(x.dtype)
    return start + share * (x - start)


# ---- the language model --------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """Options of every architecture."""

    arch: str = option("strawberry", "the family of architectures")
    vocab_size: int = option(8192, "size of the vocabulary, at least the encoder's", low=1)
    block_size: int = option(256, "tokens in a training window", low=1)
    n_layer: int = option(2, "blocks", low=1, high=4096)
    n_head: int = option(4, "heads", low=1, high=65536)
    n_embd: int = option(64, "channels of the residual stream", low=1)
    dropout: float = option(0.0, "dropout on embeddings, attention probabilities and residual branches", low=0, below=1)
    rope_scaling: ops.RopeScaling = option(ops.RopeScaling(), "rotary positions beyond the trained length")

    # defaults of options that only some families declare but that shared modules read from every config
    bias = False
    out_proj_role = "matrix"  # the role of matrices that write into the residual stream
    sparse = "none"
    windows = None
    n_experts = 1
    n_ffn_experts = 1
    qk_norm = False
    value_embeddings = False


@dataclass
class ExpertOptions:
    """Of expert attention."""

    n_experts: int = option(1, "groups of heads, from which a router chooses for each token", low=1)
    a_experts: int | None = option(None, "active groups per token; default half", low=1)
    windows: list[int] | None = option(None, "each expert's; default window, window / 2, … not under 16", low=1)


@dataclass
class FeedForwardExpertOptions:
    """Of a mixture of feed-forwards."""

    n_ffn_experts: int = option(1, "feed-forwards, from which a router chooses for each token", low=1)
    a_ffn_experts: int | None = option(None, "active feed-forwards per token; default half", low=1)


@dataclass
class RecursionOptions:
    """Of passes that share weights."""

    recursions: int = option(1, "how often each stack runs", low=1, high=1024)
    adaptive: bool = option(False, "let each token choose its number of recursions")


@dataclass
class AttentionOptions:
    """Of families whose attention_type names softmax attention."""

    n_qkv: int | None = option(None, "channels of q; default n_embd", low=1)
    n_kv_head: int | None = option(
        None, "heads of k and v in GQA; default n_head / 2, or what divides n_head below it", low=1)
    kv_rank: int | None = option(None, "MHLA's latent; default n_embd / 4", low=1)
    rope_dim: int | None = option(None, "MHLA's rotary channels; default half a head's", low=2)
    tie_embeddings: bool = option(True, "share one table between embedding and head")



def default_window(c) -> None:
    c.window = c.window or max(1, c.block_size // 4)


def default_experts(c) -> None:
    c.a_experts = c.a_experts or max(1, c.n_experts // 2)
    if hasattr(c, "a_ffn_experts"):
        c.a_ffn_experts = c.a_ffn_experts or max(1, c.n_ffn_experts // 2)


def half_of(n: int) -> int:
    """n / 2, or the largest divisor of n below it.

    >>> half_of(12), half_of(25), half_of(1)
    (6, 5, 1)
    """
    return next((m for m in range(n // 2, 0, -1) if n % m == 0), 1)


def default_attention(c) -> None:
    """Sets the sizes that the values of attention_type need, derived from the width."""
    default_window(c)
    c.n_qkv = c.n_qkv or c.n_embd
    c.n_kv_head = c.n_kv_head or half_of(c.n_head)
    c.kv_rank = c.kv_rank or max(1, c.n_embd // 4)
    c.rope_dim = c.rope_dim or max(2, c.n_qkv // c.n_head // 4 * 2)


def default_chunk_size(c, widths: int = 1) -> int:
    """`widths` times n_embd, rounded up to a power of two, at most block_size / 2, at least 16: a chunk whose update of
    C × C matrices costs a fixed share of the steps of its tokens."""
    return max(16, min(1 << (widths * c.n_embd - 1).bit_length(), c.block_size // 2))


def attention_problems(c) -> Iterator[tuple[str, str]]:
    if c.n_head % c.n_kv_head:
        yield "n_kv_head", f"must divide n_head {c.n_head}"
    if c.rope_dim % 2:
        yield "rope_dim", "must be even, since rotary positions turn pairs"
    if c.pos_encoding == "Sinusoidal" and c.n_embd % 2:
        yield "n_embd", "must be even for sinusoidal positions"


def heads_divide(name: str, width: int, n_head: int) -> Iterator[tuple[str, str]]:
    if width % n_head:
        yield name, f"must be a multiple of n_head {n_head}; try {-(-width // n_head) * n_head}"
    elif width // n_head % 2:
        yield name, f"gives heads of {width // n_head} channels, but rotary positions turn pairs: an even number"


def recursion_problems(c: RecursionOptions) -> Iterator[tuple[str, str]]:
    if c.adaptive and c.recursions < 2:
        yield "adaptive", "needs recursions of at least 2, to have depths to choose from"


def expert_problems(c) -> Iterator[tuple[str, str]]:
    """Problems of expert groups: sizes that do not divide, wrong number of windows, too many active experts."""
    if c.n_head % c.n_experts:
        yield "n_experts", f"must divide n_head {c.n_head}"
    if c.windows is not None and len(c.windows) != c.n_experts:
        yield "windows", f"must have one window for each of n_experts {c.n_experts}"
    for active, n in (("a_experts", "n_experts"), ("a_ffn_experts", "n_ffn_experts")):
        if getattr(c, active, 1) > getattr(c, n):
            yield active, f"must be at most {n} {getattr(c, n)}"


class CachedGeneration:
    """The methods of LanguageModel that use a KV cache: prefill, decode steps, text generation."""

    # -- with a cache

    @torch.no_grad()
    def forward_cached(self, idx: Tensor, cache: Cache, lengths=None) -> Tensor:
        """Hidden states (B, T, C) of idx (B, T), whose tokens continue each row of the cache. Computes the call in
        parts, because retention's weights change at chunk boundaries: see `prefill_bounds`."""
        B, T = idx.shape
        counts = [T] * B if lengths is None else [int(n) for n in lengths]
        self.check_cached_call(idx, cache, counts)
        outputs, begin = [], 0
        for end in self.prefill_bounds(cache, T):
            part = [min(max(n - begin, 0), end - begin) for n in counts]
            ctx = self.make_cached_context(cache, end - begin, part)
            outputs.append(self.hidden_states(idx[:, begin:end], ctx, cache.layers))
            cache.advance(part)
            begin = end
        return torch.cat(outputs, dim=1)

    @torch.no_grad()
    def decode_step(self, token: Tensor, cache: Cache, max_cached_tokens: int = 2**62) -> Tensor:
        """Logits (B, V), float32 or wider, after one more token (B,) of every row.

        The kernel launches do not depend on the rows' lengths and nothing synchronizes with the host, so a CUDA graph
        can capture this method: see strawberry/inference. Before the call, the caller calls `begin_chunks` for rows at
        a chunk boundary; after it, the caller advances cache.positions and cache.lengths. No row may have more than
        `max_cached_tokens` tokens in the cache.
        """
        ctx = ForwardContext(
            cache.positions.unsqueeze(1), Mode.DECODE, chunk_size=1, chunk_weights_ready=True,
            max_cached_tokens=max_cached_tokens, source=cache.source)  # fmt: skip
        return to_accum_dtype(self.head(self.hidden_states(token.unsqueeze(1), ctx, cache.layers))[:, -1])

    def begin_chunks(self, cache: Cache, rows) -> None:
        """Build the next chunk's weights for these rows (a list or slice), which are at a chunk boundary."""

    def check_cached_call(self, idx: Tensor, cache: Cache, counts: list[int]) -> None:
        if not self.causal:
            raise UserError(f"this {self.config.arch} sees the future and has no cache; call it on the whole text")
        if len(counts) != len(cache.lengths) or idx.size(0) != len(counts):
            raise UserError(
                f"{idx.size(0)} rows, {len(counts)} lengths, a cache for {len(cache.lengths)}: give as many")
        if min(counts) < 0 or max(counts) > idx.size(1):
            raise UserError(f"lengths {counts} must lie between 0 and the call's {idx.size(1)} tokens")
        longest = max(n + c for n, c in zip(cache.lengths, counts, strict=True))
        if longest > cache.max_length:
            raise UserError(f"{longest} tokens exceed the cache's max_length {cache.max_length}; make a longer one")

    def prefill_bounds(self, cache: Cache, T: int) -> list[int]:
        """Ends of the parts of a call of T tokens: the first chunk boundary, then every `max_prefill` tokens, rounded
        up to whole chunks; on a GPU, what begins an empty cache may be longer. Each token is a part if the model has
        chunks and the rows' lengths differ."""
        if T == 1 or (self.chunk_size and len(set(cache.lengths)) > 1):
            return list(range(1, T + 1))
        chunk, cached = self.chunk_size or 1, max(cache.lengths)
        first, most = -cached % chunk, -(-self.max_prefill // chunk) * chunk
        if not cached and self.device.type == "cuda":
            first = -(-self.max_first_prefill // chunk) * chunk
        return sorted({min(first, T), *range(first + most, T, most), T} - {0})

    def make_cached_context(self, cache: Cache, T: int, counts: list[int]) -> ForwardContext:
        """The context of a part of T tokens. If the part lies within one chunk, this first builds the chunk's weights
        for rows at a chunk boundary; a longer part that starts at a boundary builds the weights itself."""
        device, lengths = cache.positions.device, set(cache.lengths)
        start = lengths.pop() if len(lengths) == 1 else None
        ready = self.chunk_size is not None and (T == 1 or start is None or start % self.chunk_size != 0)
        if ready and (rows := [i for i, n in enumerate(cache.lengths) if n % self.chunk_size == 0]):
            self.begin_chunks(cache, slice(None) if len(rows) == len(counts) else rows)
        i = torch.arange(T, device=device)
        return ForwardContext(
            cache.positions.unsqueeze(1) + i if start is None else (start + i).unsqueeze(0),
            Mode.PREFILL,
            lengths=None if min(counts) == T else torch.tensor(counts, device=device),
            num_cached=start,
            max_cached_tokens=max(cache.lengths),
            chunk_size=min(self.chunk_size or T, T),
            chunk_weights_ready=ready,
            source=cache.source,
        )

    def new_cache(self, batch_size: int, max_length: int, source: Tensor | None = None,
                  max_source: int | None = None) -> Cache:  # fmt: skip
        """An empty cache for `batch_size` rows of up to `max_length` tokens, on the model's device. For an
        encoder-decoder it holds the encoded source (B, S), or space for sources of up to `max_source` tokens: see
        `set_source`. Raises UserError where max_length exceeds the learned positions."""
        if self.max_positions is not None and max_length > self.max_positions:
            raise UserError(f"max_length {max_length} exceeds block_size {self.max_positions}, where positions end")
        device, dtype = self.device, self.probe.dtype
        cache = Cache(self.new_caches(batch_size, max_length, device, dtype), batch_size, max_length, device)
        self.init_cross_cache(cache, source, max_source)
        return cache

    def init_cross_cache(self, cache: Cache, source: Tensor | None, max_source: int | None) -> None:
        """Allocate space for the source in a new cache. Raises UserError for a source that the model cannot read."""
        self.encode_source(source)

    def set_source(self, source: Tensor, cache: Cache) -> None:
        """Replace the source (B, S) of the cache's rows. Raises UserError where it cannot be read or does not fit."""
        self.encode_source(source)

    # -- text

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, min_p: float | None = None, stop=(), generator=None,
               source: Tensor | None = None) -> Iterator[Tensor]:
        """Generate tokens that continue idx (B, T), and yield them step by step, (B,) int64 each.

        temperature 0 selects the most likely token. `stop` has the token ids that end a row; an ended row repeats its
        stop token until all rows have ended. `generator` is a torch.Generator, or one for each row. This simple loop is
        slow on a GPU: the scripts generate with strawberry/inference/engine.py. Raises UserError for an encoder, and
        where the model predicts NaN.
        """
        if not self.generates:
            raise UserError(f"a {self.config.arch} of kind encoder predicts masked tokens; it does not continue text")
        stop = torch.tensor(sorted(stop), dtype=torch.int64, device=idx.device)
        top_k = None if not top_k or top_k >= self.config.vocab_size else top_k
        top_p = None if top_p is None or top_p >= 1 else top_p
        ended, last = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device), None
        total = idx.size(1) + max_new_tokens
        fits = self.causal and (self.max_positions is None or total <= self.max_positions)
        cache = self.new_cache(idx.size(0), total, source) if fits else None
        logits = self.last_logits(idx, cache, source)
        for i in range(max_new_tokens):
            u = ops.uniform_numbers(len(idx), generator, idx.device)
            token = ops.sample(logits, u, temperature, top_k, top_p, min_p, width=top_k)
            if bool((token < 0).any()):
                raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint")
            token = token if last is None else torch.where(ended, last, token)
            yield token
            last, ended = token, ended | torch.isin(token, stop)
            if i + 1 == max_new_tokens or (len(stop) and bool(ended.all())):
                return
            idx = torch.cat((idx, token.unsqueeze(1)), dim=1)
            logits = self.last_logits(idx if cache is None else token.unsqueeze(1), cache, source)

    @torch.no_grad()
    def logits_after(self, idx: Tensor, cache: Cache, lengths: list[int] | None = None) -> Tensor:
        """Logits (B, V), float32 or wider, after the last token of idx (B, T), or after the first `lengths` of a row,
        at least one of each."""
        self.check_length(idx)
        x = self.forward_cached(idx, cache, lengths)
        if lengths is not None:
            x = x[torch.arange(len(x), device=x.device), torch.tensor(lengths, device=x.device) - 1].unsqueeze(1)
        return to_accum_dtype(self.head(x[:, -1:])[:, -1])

    def last_logits(self, idx: Tensor, cache: Cache | None, source: Tensor | None) -> Tensor:
        """Logits (B, V), float32 or wider, after the last token. Without a cache they are recomputed from the last
        block_size tokens, row by row, because rows may depend on each other in a model without a cache."""
        if cache is not None:
            return self.logits_after(idx, cache)
        sources = [None] * len(idx) if source is None else source.split(1)
        rows = zip(idx[:, -self.config.block_size :].split(1), sources, strict=True)
        return to_accum_dtype(torch.cat([self(row, source=its)[0][:, -1] for row, its in rows]))

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None, stop=(), generator=None,
                 source: Tensor | None = None) -> Tensor:
        """idx (B, T) followed by the generated tokens, (B, T + new). The arguments are those of `stream`."""
        tokens = self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, stop, generator, source)
        return torch.cat((idx, *(token.unsqueeze(1) for token in tokens)), dim=1)


class LanguageModel(CachedGeneration, nn.Module):
    """Base class of all families: forward pass, loss, cache, generation.

    A family defines `embed`, `trunk(x, ctx, caches)`, `head_inputs(x)` and `new_caches(…)`, and overrides the
    attributes below where it differs. `head_inputs` returns (x, W), whose product x Wᵀ is the logits.
    """

    Config = ModelConfig
    causal = True  # whether it is causal and batch-independent, and decoding with a cache equals the full pass
    generates = True  # whether it predicts the next token
    takes_source = False  # whether it needs source=, as encoder-decoders do
    chunk_size: int | None = None  # tokens that share weights, where weights change along the row
    max_positions: int | None = None  # number of learned positions
    cap: float | None = None  # of `softcap`, for the logits
    compile_partitions = 1  # graphs into which torch.compile divides the blocks
    max_prefill = 2048  # tokens in a part of a prefill, at most: bounds the masks' size for long prompts
    max_first_prefill = 8192  # in the first part on a GPU, which needs no mask for it
    precision = None  # of the head's product in training; see ops.prepare_weights
    compile_loss = False  # whether the fused loss is compiled separately, if the model is not compiled as one graph

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope = None
        self.can_fuse_loss = type(self).head is LanguageModel.head  # a family's own head may be any function
        self.drop = nn.Dropout(config.dropout)
        self.register_buffer("probe", torch.empty(0), persistent=False)  # has the model's device and dtype

    @property
    def device(self) -> torch.device:
        return self.probe.device

    def set_compile_partitions(self, n: int) -> bool:
        """Split compilation into about n graphs so that DDP overlaps all-reduce with backward. Returns whether there is
        more than one graph. With one graph, all gradients are ready only at the end of backward."""
        return self.compile_partitions > 1

    # -- forward pass

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, lengths=None,
                source: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Logits (B, T, V) and, given targets, the mean loss in nats. In training with targets, the logits may be None.

        idx (B, T) int64; targets (B, T), −1 is ignored, all −1 gives loss 0. With a cache, the tokens continue those of
        earlier calls; for ragged rows, lengths (B,) is the number of valid tokens in each row. Encoder-decoders take
        source (B, S); a cache already holds it. Raises UserError for more tokens than learned positions.
        """
        self.check_length(idx)
        if cache is None:
            ctx = replace(self.make_context(idx), source=self.encode_source(source))
            x = self.hidden_states(idx, ctx, None)
        else:
            x = self.forward_cached(idx, cache, lengths)
        if targets is None:
            return self.head(x), None
        flat = targets.flatten()
        if self.can_fuse_loss:
            x, w = self.head_inputs(x)
            keep_logits = not (self.training and torch.is_grad_enabled())
            options = {"keep_logits": keep_logits, "compile_parts": self.compile_loss}
            logits, loss = ops.linear_cross_entropy(x, w, flat, self.cap, self.precision, **options)
        else:
            logits = self.head(x)
            loss = ops.plain_cross_entropy(logits, flat)
        return logits, loss / (flat >= 0).sum().clamp(min=1)

    def head(self, x: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return softcap(ops.linear(*self.head_inputs(x), precision=self.precision), self.cap)

    def check_length(self, idx: Tensor) -> None:
        if self.max_positions is not None and idx.size(1) > self.max_positions:
            raise UserError(f"{idx.size(1)} tokens exceed block_size {self.max_positions}, where positions end; "
                            "give fewer, or train with a larger block_size")  # fmt: skip

    def make_context(self, idx: Tensor) -> ForwardContext:
        """The context of whole sequences."""
        positions = torch.arange(idx.size(1), device=idx.device).unsqueeze(0)
        return ForwardContext(positions, chunk_size=min(self.chunk_size or idx.size(1), idx.size(1)))

    def encode_source(self, source: Tensor | None) -> EncodedSource | None:
        """The source as cross-attention reads it; None in families that read none, and a UserError if given one."""
        if source is not None:
            raise UserError(f"a {self.config.arch} of this kind reads no source; give it to an encoder-decoder")

    def embed_tokens(self, idx: Tensor, ctx: ForwardContext) -> Tensor:
        return norm(self.embed(idx))

    def hidden_states(self, idx: Tensor, ctx: ForwardContext, caches) -> Tensor:
        """Hidden states (B, T, C), the input of the head."""
        ctx = replace(ctx, rope=None if self.rope is None else self.rope(ctx.positions))
        return self.trunk(to_autocast_dtype(self.drop(self.embed_tokens(idx, ctx))), ctx, caches)

    # -- about the model

    def roles(self) -> dict[str, str]:
        """Parameter name → role, which selects its initialization (`init_weights`) and its optimizer."""
        return {
            f"{prefix}.{name}" if prefix else name: module.roles[name]
            for prefix, module in self.named_modules()
            for name, p in module.named_parameters(recurse=False)
            if p is not None
        }

    def num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters; by default without embeddings, learned positions and the head."""
        left_out = ("embedding", "input", "position", "head") if non_embedding else ()
        roles = self.roles()
        return sum(p.numel() for name, p in self.named_parameters() if roles[name] not in left_out)

    def count_flops(self, T: int, rows: int = 1) -> dict[str, int]:
        """Module path → floating-point operations of a forward pass over `rows` windows of T tokens; "" is the whole
        model. Attention is counted by its pattern: see strawberry/ops/flops.py."""
        idx = torch.empty(rows, T, dtype=torch.int64, device="meta")
        return ops.count_flops(lambda: type(self)(self.config), idx, source=idx if self.takes_source else None)

    def flops_per_token(self, T: int, rows: int = 1) -> float:
        """Floating-point operations per token of a training step over `rows` windows of T tokens. The backward pass
        costs twice the forward pass."""
        return 3 * self.count_flops(T, rows)[""] / (rows * T)

    def routers(self) -> dict[str, Router]:
        return {name: m for name, m in self.named_modules() if isinstance(m, Router)}

    def after_step(self, scale: Tensor | float = 1.0) -> None:
        """Balance the routers, unless `scale` is 0. Call it after each optimizer step in training."""
        for router in self.routers().values():
            router.balance(scale)


# ---- strawberry ----------------------------------------------------------------------------------------------------


class Memory(nn.Module):
    """out · o, where o is read from a linear memory: `retention_rule: "delta"` adds it to x before a block's last step.

    Projections z, values and gates are linear in h = norm(x). A convolution over the last four projections gives the
    query, q_t = unit(z_t + Σ_{j<4} taps_j ⊙ z_{t−j}); the key is the query of the token before, k_t = q_{t−1}, so that
    the memory maps a token to the value of the token after it. A head's gates are log α = log σ(−a − offset) for the
    decay, β = σ(b) for the write, and σ(c) for the read. The offsets, −4 … −9, initialize the decay such that heads
    forget over about 50 to 8,000 tokens. strawberry/ops/memory.py has the recurrence (arXiv 2412.06464).
    """

    roles = {"w_key": "matrix", "w_value": "matrix", "w_gates": "bias", "gate_bias": "bias", "taps": "bias",
             "out": "residual"}  # fmt: skip
    products = ("w_key", "w_value", "out")
    precision = None

    def __init__(self, c: StrawberryConfig):
        super().__init__()
        C, M = c.n_embd, c.memory_width
        self.d, self.n_head, self.size = c.memory_head, M // c.memory_head, c.retention_chunk
        self.w_key, self.w_value = nn.Parameter(torch.empty(M, C)), nn.Parameter(torch.empty(M, C))
        self.w_gates, self.gate_bias = (nn.Parameter(torch.empty(3 * self.n_head, *rest)) for rest in ((C,), ()))
        self.taps = nn.Parameter(torch.empty(4, M))
        self.out = nn.Parameter(torch.empty(C, M))

    def forward(self, x: Tensor, ctx: ForwardContext, cache: LayerCache | None) -> Tensor:
        h = norm(x)
        z, v = (ops.linear(h, w, precision=self.precision) for w in (self.w_key, self.w_value))
        gates = F.linear(h, self.w_gates)
        o = ops.delta_memory(z, v, gates, self.gate_bias, self.taps, self.size, ctx, cache)
        return ops.linear(o, self.out, precision=self.precision)

    def new_cache(self, batch: int, device, dtype) -> LayerCache:
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state = ((self.n_head, self.d, self.d), 0.0, state_dtype)
        return LayerCache(batch, device, state=state, tail=((4, self.n_head * self.d), 0.0, dtype))


MEMORIES = {"delta": Memory}  # retention_rule → the memory before a block's last step


@dataclass
class StrawberryConfig(RecursionOptions, ExpertOptions, ModelConfig):
    arch: str = option("strawberry", "the family of architectures", choices=("strawberry",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(2, "retention steps of each block before its last step; 0: none", low=0, high=1024)
    aft_ratio: int = option(3, "attention-free steps for each step of expert attention", low=0)
    aft: str = option("simple", "positions of attention-free mixing", choices=tuple(AFTS))
    window: int | None = option(None, "attention window in tokens; default block_size / 4", low=1)
    n_ffn_experts: int = option(1, "groups of SwiGLU channels, from which a router chooses for each token", low=1)
    a_ffn_experts: int | None = option(None, "active groups per token; default half", low=1)
    retention: str = option("on", "'none': the same steps with fixed weights", choices=("on", "none"))
    retention_scope: str = option(
        "causal", "sum of the update: over earlier chunks of the row, or ('batch', not causal) over everything",
        choices=("causal", "batch"))
    retention_chunk: int | None = option(
        None, "tokens that share weights; default 8 n_embd rounded up to a power of two, at most block_size / 2, "
        "at least 16; with the rule delta, tokens computed at once; default 64", low=1)
    retention_scale: float | None = option(None, "size of the update; default n_embd ** -0.5", above=0)
    retention_rule: str = option(
        "silu", "'silu': the context rewrites the matrices; 'delta': a linear memory before the last step",
        choices=("silu", *MEMORIES))
    memory_head: int | None = option(
        None, "channels of a head of the memory; default 64 or the largest divisor of memory_width below it", low=1)
    memory_width: int | None = option(None, "channels of the memory's keys and of its values; default n_embd", low=1)
    logit_softcap: float | None = option(None, "c: logits become c·tanh(logits / c)", above=0)

    def __post_init__(self):
        default_window(self)
        default_experts(self)
        # 8 n_embd: the fewer updates, the lower the loss and the cost were (docs/architectures/retention.md)
        chunk = default_chunk_size(self, widths=8) if self.retention_rule == "silu" else ops.MEMORY_CHUNK
        self.retention_chunk = self.retention_chunk or chunk
        self.retention_scale = self.retention_scale or self.n_embd**-0.5
        self.memory_width = self.memory_width or self.n_embd
        self.memory_head = self.memory_head or next(d for d in range(64, 0, -1) if self.memory_width % d == 0)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from expert_problems(self)
        if self.n_embd % self.n_ffn_experts:
            yield "n_ffn_experts", f"must divide n_embd {self.n_embd}"
        if self.memory_width % self.memory_head:
            yield "memory_head", f"must divide memory_width {self.memory_width}"
        if self.retention_rule != "silu" and self.retention_scope != "causal":
            yield "retention_rule", f"needs retention_scope causal, not {self.retention_scope}; or set the rule silu"
        yield from recursion_problems(self)


class NoRetention:
    """The same steps with fixed weights."""

    chunk_size = None
    causal = True
    compile_steps = False  # whether torch.compile compiles each step and each update separately
    reads_hidden = False  # whether `update` reads u and g

    def update(self, w: ops.BlockWeights, ug: Tensor, block: StrawberryBlock, ctx: ForwardContext, cache: None):
        return w

    def new_cache(self, batch: int, device, dtype, w: ops.BlockWeights) -> None:
        return None


class BatchRetention(NoRetention):
    """The update rule taken literally: oa sums over all tokens of all rows, so a token depends on later tokens and on
    other rows."""

    causal = False
    reads_hidden = True
    compile_steps = True  # few matrices: passes over them cost little compared with compiling whole blocks

    def __init__(self, c):
        self.scale = c.retention_scale

    def update(self, w: ops.BlockWeights, ug: Tensor, block: StrawberryBlock, ctx: ForwardContext, cache: None):
        u, g = ug.chunk(2, dim=-1)
        return ops.batch_retention_update(w, u, g, self.scale, block.out, block.tao)


class CausalRetention:
    """oa of chunk j sums over chunks 0 … j − 1 of the same row. The cache holds two sums, over the finished chunks and
    over the open one, and the open chunk's weights, from which the next step's update starts."""

    causal = True
    compile_steps = False
    reads_hidden = True

    def __init__(self, c):
        self.scale, self.chunk_size = c.retention_scale, c.retention_chunk

    def update(self, w: ops.BlockWeights, ug: Tensor, block: StrawberryBlock, ctx: ForwardContext, cache: ChunkCache):
        u, g = ug.chunk(2, dim=-1)
        if cache is None:
            return ops.causal_retention_update(w, u, g, self.scale, block.out, block.tao, ctx)
        return ops.BlockWeights(*ops.build_per_chunk(u, g, ctx, cache, lambda before: self.build(w, before, block)))

    def build(self, w: ops.BlockWeights, before: Tensor, block: StrawberryBlock) -> ops.BlockWeights:
        """The weights of each chunk from `before` (B, J, C, C), the sums Σ uᵀ g over the chunks before it."""
        return ops.retention_update(w, self.scale * norm(before), block.out, block.tao)

    def new_cache(self, batch: int, device, dtype, w: ops.BlockWeights) -> ChunkCache:
        return ChunkCache(batch, device, dtype, w.out.size(-1), [tuple(m.shape) for m in w])


RETENTION = {"causal": CausalRetention, "batch": BatchRetention}


def strawberry_steps(c: StrawberryConfig) -> list[str]:
    """The mixer of each step of a block: R retention steps, every (aft_ratio + 1)-th with attention, then attention.

    >>> strawberry_steps(StrawberryConfig(r_layer=5, aft_ratio=3))
    ['aft', 'aft', 'aft', 'tea', 'aft', 'tea']
    """
    steps = ["tea" if i % (c.aft_ratio + 1) == 0 else "aft" for i in range(1, c.r_layer + 1)]
    return [*steps, "tea"]


class StrawberryBlock(nn.Module):
    """R retention steps and a last step, all with the same weights, which retention updates after each retention
    step."""

    roles = {"w_attn_qkv": "matrix", "w_attn_swiglu": "matrix", "w_attn_out": "matrix", "out": "residual", "tao": "tao"}
    precision = None

    def __init__(self, c: StrawberryConfig):
        super().__init__()
        C, D = c.n_embd, c.n_qkv
        self.widths = [D] * 3  # of q, k and v, in this order
        self.w_attn_qkv = nn.Parameter(torch.empty(3 * D, C))
        self.w_attn_swiglu = nn.Parameter(torch.empty(2 * C, D))
        self.w_attn_out = nn.Parameter(torch.empty(C, C))
        self.retention, self.memory = NoRetention(), None
        rule = c.retention_rule if c.r_layer and c.retention == "on" else None
        if rule == "silu":
            self.out, self.tao = nn.Parameter(torch.empty(C, C)), nn.Parameter(torch.empty(1, 3))
            self.retention = RETENTION[c.retention_scope](c)
        else:  # only matrix products read the weights
            self.products = ("w_attn_qkv", "w_attn_swiglu", "w_attn_out")
            self.memory = MEMORIES[rule](c) if rule in MEMORIES else None
        self.steps = strawberry_steps(c)
        self.tea = ExpertAttention(c, ops.rotary_qk_norm)
        self.aft = AFTS[c.aft](c, ops.norm_channels) if "aft" in self.steps else None
        self.ffn_router = Router(C, c.n_ffn_experts, c.a_ffn_experts) if c.n_ffn_experts > 1 else None
        self.drop = nn.Dropout(c.dropout)

    def weights(self) -> ops.BlockWeights:
        return ops.BlockWeights(self.w_attn_qkv, self.w_attn_swiglu, self.w_attn_out)

    def forward(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        w = self.weights()
        for i, kind in enumerate(self.steps):
            cache, retention_cache = (None, None) if caches is None else caches[i]
            last = i + 1 == len(self.steps)
            if last and self.memory is not None:
                x = ctx.keep_frozen(x, x + self.drop(self.memory(x, ctx, retention_cache)))
            x, ug = self.step(getattr(self, kind), x, w, ctx, cache, retain=not last)
            if not last:
                w = self.retention.update(w, ug, self, ctx, retention_cache)  # the weights of the next step
        return x

    def step(self, mixer: nn.Module, x: Tensor, w: ops.BlockWeights, ctx: ForwardContext, cache, retain: bool):
        """The mixer, then SwiGLU, with the weights w. Returns x, and the SwiGLU's u and g, concatenated, (B, T, 2C):
        with `retain`, the retention update sums over them."""
        q, k, v = ops.fused_qkv_projection(norm(x), w.qkv, self.widths, mixer.qk_transform, ctx, self.precision)
        y = mixer(q, k, v, x, ctx, cache)
        gate = None
        if self.ffn_router is not None:  # (B, T, C); zero in groups of channels that are not selected
            gate = self.ffn_router(x, ctx).repeat_interleave(len(self.w_attn_out) // self.ffn_router.n, dim=-1)
        retain = retain and self.retention.reads_hidden
        out, ug = ops.swiglu_mlp(y, w.swiglu, w.out, ctx, gate, self.precision, return_hidden=retain)
        return ctx.keep_frozen(x, x + self.drop(out)), ug

    def begin_chunks(self, caches: list, rows) -> None:
        w = self.weights()
        for _, cache in caches[:-1]:
            w = ops.BlockWeights(*cache.begin_chunk(rows, lambda before, w=w: self.retention.build(w, before, self)))

    def new_caches(self, batch: int, max_length: int, device, dtype) -> list:
        return [
            (getattr(self, kind).new_cache(batch, max_length, device, dtype),
             self.retention.new_cache(batch, device, dtype, self.weights()) if i + 1 < len(self.steps) else
             None if self.memory is None else self.memory.new_cache(batch, device, dtype))
            for i, kind in enumerate(self.steps)
        ]


class Strawberry(LanguageModel):
    """Strawberry (2026): attention-free mixing, local attention, and fast weights: the context rewrites the block's
    matrices."""

    Config = StrawberryConfig

    def __init__(self, config: StrawberryConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(StrawberryBlock(c) for _ in range(c.n_layer))
        self.depth = Router(c.n_embd, c.recursions, 1) if c.adaptive else None
        self.rope = Rope(ops.rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])
        self.compile_partitions = len(self.blocks)
        retention = self.blocks[0].retention
        self.causal, self.chunk_size, self.cap = retention.causal, retention.chunk_size, c.logit_softcap
        self.max_positions = c.block_size if c.aft in FIXED_LENGTH_AFTS and self.blocks[0].aft is not None else None

    def trunk(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        return run_recursions(self.run_stack, x, ctx, caches, self.config.recursions, self.depth)

    def run_stack(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        return run_blocks(self.blocks, x, ctx, caches, self.compile_partitions)

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x), self.embed.weight

    def new_caches(self, batch: int, max_length: int, device, dtype) -> list:
        passes = range(self.config.recursions)
        return [[block.new_caches(batch, max_length, device, dtype) for block in self.blocks] for _ in passes]

    def begin_chunks(self, cache: Cache, rows) -> None:
        for caches in cache.layers:
            for block, block_caches in zip(self.blocks, caches, strict=True):
                block.begin_chunks(block_caches, rows)


# ---- strawberry-silia ----------------------------------------------------------------------------------------------


@dataclass
class StrawberrySiliaConfig(ModelConfig):
    arch: str = option("strawberry-silia", "the family of architectures", choices=("strawberry-silia",))
    n_qkv: int = option(256, "D, channels of q, of k, of v and of the gate", low=1)
    attention_sink: bool = option(True, "a learned key and value per head, which every token attends to")
    exclusive: bool = option(True, "remove the direction of a token's own value from its attention's output")
    gated: bool = option(True, "multiply the attention's output by σ(o), o from the attention's input")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)


class SiliaAttention(nn.Module):
    """q, k, v, o = split(x W): softmax attention of q·τ₀, k·τ₁ and v, less the direction of the token's own value, then
    the gate σ(o) (arXiv 2505.06708) and a projection to n_out channels."""

    roles = {"tau": "tau"}

    def __init__(self, c: StrawberrySiliaConfig, n_out: int, role: str):
        super().__init__()
        D = c.n_qkv
        self.widths = [D] * 3  # of q, k and v, in this order; then o
        self.w_qkvo = Linear(c.n_embd, (4 if c.gated else 3) * D)
        self.tau = nn.Parameter(torch.empty(2))
        self.mixer = (SinkSoftmax if c.attention_sink else Softmax)(c, qk_transform=ops.rotary_qk_norm)
        self.exclude = ops.exclude_value if c.exclusive else keep_output
        self.gate = gate_output if c.gated else keep_output
        self.w_out = Linear(D, n_out, role=role)

    def forward(self, x: Tensor, ctx: ForwardContext, cache: RingKVCache | None) -> Tensor:
        qkv, o = self.w_qkvo(x).tensor_split((sum(self.widths),), dim=-1)  # o has no channels without the gate
        q, k, v = ops.split_qkv_apply_rope(qkv, self.widths, self.mixer.qk_transform, ctx)
        y = self.mixer(q * self.tau[0], k * self.tau[1], v, x, ctx, cache)
        return self.w_out(self.gate(self.exclude(y, v, self.mixer.d), o))


def gate_output(y: Tensor, o: Tensor) -> Tensor:
    return y * torch.sigmoid(o)


def keep_output(y: Tensor, *others) -> Tensor:
    return y


class SiliaBlock(nn.Module):
    """y = A₂(u ⊙ silu(g)) with u, g = split(A₁(norm(x))), then the attention residual: the next x is a mean of the
    embedding and the branches y so far, weighted for each token (arXiv 2603.15031). A₁ and A₂ are attention layers;
    there is no feed-forward."""

    roles = {"query": "bias"}

    def __init__(self, c: StrawberrySiliaConfig):
        super().__init__()
        self.attn1 = SiliaAttention(c, 2 * c.n_embd, "matrix")
        self.attn2 = SiliaAttention(c, c.n_embd, "residual")
        self.query = nn.Parameter(torch.empty(c.n_embd))  # of the attention residual
        self.drop = nn.Dropout(c.dropout)

    def forward(self, state: tuple[Tensor, tuple[Tensor, ...]], ctx: ForwardContext, caches: tuple | None):
        """`state` is x and the branches before this block, the embedding first; returns both for the next block."""
        (x, branches), (cache1, cache2) = state, caches or (None, None)
        y = self.attn2(ops.swiglu(self.attn1(norm(x), ctx, cache1)), ctx, cache2)
        branches = (*branches, self.drop(y))
        return ops.attention_residual(branches, self.query), branches

    def new_caches(self, *args) -> tuple:
        return self.attn1.mixer.new_cache(*args), self.attn2.mixer.new_cache(*args)


class StrawberrySilia(LanguageModel):
    """Strawberry (April 2026): blocks of two attention layers with a SiLU gate between them, and an attention residual
    over their outputs."""

    Config = StrawberrySiliaConfig

    def __init__(self, config: StrawberrySiliaConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(SiliaBlock(c) for _ in range(c.n_layer))
        self.rope = Rope(ops.rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])

    def trunk(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        return run_blocks(self.blocks, (x, (x,)), ctx, caches)[0]

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x), self.embed.weight

    def new_caches(self, *args) -> list:
        return [block.new_caches(*args) for block in self.blocks]


# ---- strawberry-v0 -------------------------------------------------------------------------------------------------


@dataclass
class StrawberryV0Config(ExpertOptions, ModelConfig):
    arch: str = option("strawberry-v0", "the family of architectures", choices=("strawberry-v0",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(2, "how often each block runs", low=1, high=1024)
    aft: str = option("full", "positions of attention-free mixing", choices=tuple(AFTS))
    window: int | None = option(None, "attention window in tokens; default block_size / 4", low=1)
    compaction: bool = option(False, "Compaction Compute: before its attention a block adds norm(x) @ Y to x")
    compaction_scope: str = option(
        "causal", "sum in Y: over earlier chunks of the row, or ('batch', not causal) over everything",
        choices=("causal", "batch"))
    retention_chunk: int | None = option(
        None, "tokens that share Y; default n_embd rounded up to a power of two, at most block_size / 2, at least 16",
        low=1)

    def __post_init__(self):
        default_window(self)
        default_experts(self)
        self.retention_chunk = self.retention_chunk or default_chunk_size(self)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from expert_problems(self)


def compact(x: Tensor, wo: Tensor, wa: Tensor, wt: Tensor) -> Tensor:
    """Compaction Compute: Y = π·tanh((Oᵀ A) / √C) @ WT with O = norm(x) WO and A = norm(x) WA. Y is (C, C) for any
    number of tokens in x (…, C)."""
    h = norm(x).flatten(0, -2)
    o, a = h @ wo, h @ wa
    with no_autocast(x):
        total = to_accum_dtype(o).mT @ to_accum_dtype(a)
    return compaction_matrix(total, wt)


def compaction_matrix(total: Tensor, wt: Tensor) -> Tensor:
    """Y from the sum Oᵀ A."""
    return math.pi * torch.tanh(total * total.size(-1) ** -0.5) @ wt.to(total.dtype)


class BatchCompaction(nn.Module):
    """Y sums over all tokens of all rows, so a token depends on later tokens and on other rows."""

    roles = {"wo": "matrix", "wa": "matrix", "wt": "residual"}
    causal = False
    chunk_size = None

    def __init__(self, c: StrawberryV0Config):
        super().__init__()
        self.wo, self.wa, self.wt = (nn.Parameter(torch.empty(c.n_embd, c.n_embd)) for _ in range(3))

    def forward(self, x: Tensor, ctx: ForwardContext, cache: None) -> Tensor:
        return x + norm(x) @ compact(x, self.wo, self.wa, self.wt).to(x.dtype)

    def new_cache(self, batch: int, device, dtype) -> None:
        return None


class CausalCompaction(nn.Module):
    """Y of each chunk is computed from the mean over the earlier chunks of its row."""

    roles = {"wo": "matrix", "wa": "matrix", "wt": "residual"}
    causal = True

    def __init__(self, c: StrawberryV0Config):
        super().__init__()
        self.chunk_size = c.retention_chunk
        self.wo, self.wa, self.wt = (nn.Parameter(torch.empty(c.n_embd, c.n_embd)) for _ in range(3))

    def forward(self, x: Tensor, ctx: ForwardContext, cache: ChunkCache | None) -> Tensor:
        h = norm(x)
        tokens = ctx.positions[:, :: ctx.chunk_size]  # (B or 1, J), the number of tokens before each chunk
        o, a = ctx.mask_invalid(h @ self.wo), h @ self.wa
        (y,) = ops.build_per_chunk(o, a, ctx, cache, lambda before: self.build(before, tokens))
        return x + ops.chunked_linear(h, y.mT, ctx)

    def build(self, before: Tensor, tokens: Tensor) -> list[Tensor]:
        """Y of each chunk from `before` (B, J, C, C), the sums over `tokens` (B or 1, J) earlier tokens."""
        return [compaction_matrix(before / tokens.clamp(min=1)[..., None, None], self.wt)]

    def new_cache(self, batch: int, device, dtype) -> ChunkCache:
        return ChunkCache(batch, device, dtype, len(self.wo), [tuple(self.wt.shape)])


COMPACTION = {"causal": CausalCompaction, "batch": BatchCompaction}


class StrawberryV0Block(nn.Module):
    """AFT mixes v, expert attention mixes the result, and SwiGLU writes to the residual stream. The block runs r_layer
    times with the same weights."""

    roles = {"w_qkv": "matrix", "w_swiglu": "matrix", "w_out": "residual"}
    precision = None
    products = ("w_qkv", "w_swiglu", "w_out")

    def __init__(self, c: StrawberryV0Config):
        super().__init__()
        C, D = c.n_embd, c.n_qkv
        self.w_qkv = nn.Parameter(torch.empty(3 * D, C))
        self.w_swiglu = nn.Parameter(torch.empty(2 * C, D))
        self.w_out = nn.Parameter(torch.empty(C, C))
        self.aft, self.tea = AFTS[c.aft](c, ops.rotary_qk_norm), ExpertAttention(c, ops.rotary_qk_norm)
        self.compaction = COMPACTION[c.compaction_scope](c) if c.compaction else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext, caches: tuple | None) -> Tensor:
        aft, tea, compaction = caches or (None, None, None)
        if self.compaction is not None:
            x = self.compaction(x, ctx, compaction)
        q, k, v = ops.linear(norm(x), self.w_qkv, precision=self.precision).chunk(3, dim=-1)
        v = self.aft(*self.aft.qk_transform(q, k, ctx), v, x, ctx, aft)
        y = self.tea(*self.tea.qk_transform(q, k, ctx), v, x, ctx, tea)
        u = ops.swiglu(ops.linear(y, self.w_swiglu, precision=self.precision))
        return x + self.drop(ops.linear(u, self.w_out, precision=self.precision))

    def new_caches(self, batch: int, max_length: int, device, dtype) -> tuple:
        compaction = self.compaction.new_cache(batch, device, dtype) if self.compaction is not None else None
        return (*(m.new_cache(batch, max_length, device, dtype) for m in (self.aft, self.tea)), compaction)


class StrawberryV0(LanguageModel):
    """Strawberry (2025): attention-free mixing inside attention, and repeated blocks."""

    Config = StrawberryV0Config

    def __init__(self, config: StrawberryV0Config):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(StrawberryV0Block(c) for _ in range(c.n_layer))
        self.rope = Rope(ops.rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])
        self.max_positions = c.block_size if c.aft in FIXED_LENGTH_AFTS else None
        compaction = self.blocks[0].compaction
        if compaction is not None:
            self.causal, self.chunk_size = compaction.causal, compaction.chunk_size

    def trunk(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = run_recursions(block, x, ctx, None if caches is None else caches[i], self.config.r_layer, None)
        return x

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x), self.embed.weight

    def new_caches(self, batch: int, max_length: int, device, dtype) -> list:
        return repeated_caches(self.blocks, self.config.r_layer, batch, max_length, device, dtype)

    def begin_chunks(self, cache: Cache, rows) -> None:
        tokens = cache.positions[rows].unsqueeze(1)
        for block, repeats in zip(self.blocks, cache.layers, strict=True):
            for *_, chunk_cache in repeats:
                chunk_cache.begin_chunk(rows, lambda before, block=block: block.compaction.build(before, tokens))


def repeated_caches(blocks: nn.ModuleList, repeats: int, *args) -> list:
    """For each block, the caches of each of its repeats."""
    return [[block.new_caches(*args) for _ in range(repeats)] for block in blocks]


# ---- palm ----------------------------------------------------------------------------------------------------------


@dataclass
class PalmConfig(ModelConfig):
    arch: str = option("palm", "the family of architectures", choices=("palm",))
    n_qkv: int = option(256, "D, channels of q, of k and of v", low=1)
    r_layer: int = option(1, "how often each block runs", low=1, high=1024)
    d_rank: int | None = option(64, "rank of every linear map; null: full rank", low=1)
    attention_type: str = option("aft", "mixer", choices=("aft", "lam", "kv", "mha"))
    aft: str = option("simple", "positions of attention-free mixing", choices=tuple(AFTS))
    window: int | None = option(
        None, "window of AFT's local and conv positions in tokens; default block_size / 4", low=1)
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 8C/3 rounded up to 64", low=1)
    parallel: bool = option(True, "add a SwiGLU feed-forward in parallel with the attention")

    def __post_init__(self):
        default_window(self)
        self.n_ffn = self.n_ffn or -(-8 * self.n_embd // 3 // 64) * 64

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)


PALM_MIXERS = {
    "aft": lambda c: AFTS[c.aft](c, ops.rotary_qk_norm),
    "lam": lambda c: LAM(c, ops.rotary_qk_norm),
    "kv": lambda c: Softmax(c, qk_transform=ops.rotary_qk_norm),
    "mha": lambda c: Softmax(c, qk_transform=ops.rotary_qk_norm),
}


def palm_linear(c: PalmConfig, n_in: int, n_out: int, role: str = "matrix") -> nn.Module:
    return Linear(n_in, n_out, role=role) if c.d_rank is None else LowRank(n_in, n_out, c.d_rank, role)


class AttentionOnDetail(nn.Module):
    """q, k, v = w₂(relu²(w₁ x)) (neural attention, arXiv 2310.11398), any mixer, and a gated output projection."""

    def __init__(self, c: PalmConfig):
        super().__init__()
        self.widths = [c.n_qkv] * (2 if c.attention_type == "kv" else 3)  # in KV attention q is k
        self.w1, self.w2 = palm_linear(c, c.n_embd, c.n_qkv), palm_linear(c, c.n_qkv, sum(self.widths))
        self.mixer = PALM_MIXERS[c.attention_type](c)
        self.out = palm_linear(c, c.n_qkv, 2 * c.n_embd)

    def forward(self, x: Tensor, ctx: ForwardContext, cache) -> Tensor:
        q, k, v = ops.split_qkv_apply_rope(self.w2(ops.relu2(self.w1(x))), self.widths, self.mixer.qk_transform, ctx)
        return ops.swiglu(self.out(self.mixer(q, k, v, x, ctx, cache)))


class PalmFeedForward(nn.Module):
    """SwiGLU with low-rank linear maps."""

    def __init__(self, c: PalmConfig):
        super().__init__()
        self.w1, self.w2 = palm_linear(c, c.n_embd, 2 * c.n_ffn), palm_linear(c, c.n_ffn, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(ops.swiglu(self.w1(x)))


class PalmBlock(nn.Module):
    """x + attention(norm(x)) + ffn(norm(x)), in parallel (arXiv 2204.02311); the feed-forward is optional."""

    def __init__(self, c: PalmConfig):
        super().__init__()
        self.attn, self.ffn = AttentionOnDetail(c), PalmFeedForward(c) if c.parallel else None
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext, cache) -> Tensor:
        h = norm(x)
        y = self.attn(h, ctx, cache)
        return x + self.drop(y if self.ffn is None else y + self.ffn(h))

    def new_caches(self, *args):
        return self.attn.mixer.new_cache(*args)


class Palm(LanguageModel):
    """Palm: low-rank linear maps, an untied head, and a network that computes queries, keys and values."""

    Config = PalmConfig

    def __init__(self, config: PalmConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.d_rank or c.n_embd, "input")
        self.embed_up = None if c.d_rank is None else Linear(c.d_rank, c.n_embd)
        self.blocks = nn.ModuleList(PalmBlock(c) for _ in range(c.n_layer))
        self.unembed = palm_linear(c, c.n_embd, c.vocab_size, "head")
        self.rope = Rope(ops.rope_frequencies(c.n_qkv // c.n_head, c.rope_scaling, c.block_size)[0])
        self.max_positions = c.block_size if c.attention_type == "aft" and c.aft in FIXED_LENGTH_AFTS else None

    def embed_tokens(self, idx: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.embed(idx)
        return x if self.embed_up is None else self.embed_up(x)

    def trunk(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = run_recursions(block, x, ctx, None if caches is None else caches[i], self.config.r_layer, None)
        return x

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.unembed.head_inputs(norm(x))

    def new_caches(self, batch: int, max_length: int, device, dtype) -> list:
        return repeated_caches(self.blocks, self.config.r_layer, batch, max_length, device, dtype)


# ---- tinystar ------------------------------------------------------------------------------------------------------


@dataclass
class TinyStarConfig(FeedForwardExpertOptions, AttentionOptions, ModelConfig):
    arch: str = option("tinystar", "the family of architectures", choices=("tinystar",))
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 8C/3 (SwiGLU) or 4C", low=1)
    window: int | None = option(None, "window of -SWA attention in tokens; default block_size / 4", low=1)
    norm_type: str = option("RMSNorm", "type of norm, with a learned scale", choices=tuple(NORMS))
    attention_type: str = option(
        "GQA", "heads of k and v: as q, grouped, one, or a latent; -SWA: over a sliding window",
        choices=("MHA", "GQA", "MQA", "MHLA", "MHA-SWA", "GQA-SWA", "MQA-SWA", "MHLA-SWA"))
    ffn_type: str = option(
        "SwiGLU", "feed-forward; GELU_tanh: as GPT-2's checkpoints",
        choices=("SwiGLU", "GELU", "GELU_tanh", "ReLU2"))
    pos_encoding: str = option(
        "RoPE", "position encoding", choices=("Learned", "RoPE", "Sinusoidal", "None"))

    qk_norm: bool = option(False, "norm of each head's q and k, after the rotary positions")
    logit_softcap: float | None = option(None, "c: logits become c·tanh(logits / c)", above=0)
    skip_scalars: bool = option(False, "before each block x becomes λx + μx₀, x₀ the normed embedding")
    value_embeddings: bool = option(False, "a gated table of values by token, in every second layer")

    out_proj_role = "residual"  # an embedding of std 0.02 would be negligible beside the output of unit-gain matrices

    def __post_init__(self):
        default_attention(self)
        self.a_ffn_experts = self.a_ffn_experts or max(1, self.n_ffn_experts // 2)

    @property
    def bias(self) -> bool:
        """GPT-2's biases, in the LayerNorm + GELU baseline only."""
        return self.norm_type == "LayerNorm" and self.ffn_type in ("GELU", "GELU_tanh")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from attention_problems(self)
        yield from expert_problems(self)
        for name in ("qk_norm", "value_embeddings"):
            if getattr(self, name) and self.attention_type.startswith("MHLA"):
                yield name, "is for MHA, GQA and MQA: MHLA makes keys and values of a latent; set one of them"


class SkipScalars(nn.Module):
    """x ← λ x + μ x₀, x₀ the input of the first block; λ = 1 and μ = 0 at first."""

    roles = {"scale": "norm", "shift": "bias"}

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        return self.scale.to(x.dtype) * x + self.shift.to(x.dtype) * ctx.stack_input


def keep_stream(x: Tensor, ctx: ForwardContext) -> Tensor:
    return x


class TinyStarBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, c: TinyStarConfig, layer: int):
        super().__init__()
        self.norm1, self.norm2 = NORMS[c.norm_type](c.n_embd), NORMS[c.norm_type](c.n_embd)
        self.attn, self.ffn = make_attention(c, layer), feed_forward(c)
        self.skip = SkipScalars() if c.skip_scalars else keep_stream
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, ctx: ForwardContext, cache: RingKVCache | None) -> Tensor:
        x = self.skip(x, ctx)
        x = x + self.drop(self.attn(self.norm1(x), ctx, cache))
        return x + self.drop(self.ffn(self.norm2(x), ctx))

    def new_caches(self, batch: int, max_length: int, device, dtype) -> LayerCache:
        return self.attn.new_cache(batch, max_length, device, dtype)


class TinyStar(LanguageModel):
    """One block with exchangeable parts, to compare the descendants of GPT-2."""

    Config = TinyStarConfig

    def __init__(self, config: TinyStarConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd, "embedding" if c.tie_embeddings else "input")
        self.positions = POSITIONS[c.pos_encoding](c)
        self.blocks = nn.ModuleList(TinyStarBlock(c, layer) for layer in range(c.n_layer))
        self.norm = NORMS[c.norm_type](c.n_embd)
        self.unembed = None if c.tie_embeddings else Linear(c.n_embd, c.vocab_size, role="head")
        self.rope, self.max_positions, self.cap = build_rope(c), max_positions(c), c.logit_softcap

    def hidden_states(self, idx: Tensor, ctx: ForwardContext, caches) -> Tensor:
        return super().hidden_states(idx, replace(ctx, tokens=idx) if self.config.value_embeddings else ctx, caches)

    def embed_tokens(self, idx: Tensor, ctx: ForwardContext) -> Tensor:
        x = self.embed(idx)
        return self.positions(norm(x) if self.config.skip_scalars else x, ctx)

    def set_compile_partitions(self, n: int) -> bool:
        self.compile_partitions = min(n, len(self.blocks))
        return self.compile_partitions > 1

    def trunk(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        ctx = replace(ctx, stack_input=x) if self.config.skip_scalars else ctx
        return run_blocks(self.blocks, x, ctx, caches, self.compile_partitions)

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), (self.unembed or self.embed).weight

    def new_caches(self, batch: int, max_length: int, device, dtype) -> list:
        return [block.new_caches(batch, max_length, device, dtype) for block in self.blocks]


# ---- transformer ---------------------------------------------------------------------------------------------------


@dataclass
class TransformerConfig(RecursionOptions, ExpertOptions, FeedForwardExpertOptions, AttentionOptions, ModelConfig):
    arch: str = option("transformer", "the family of architectures", choices=("transformer",))
    kind: str = option("encoder-decoder", "stacks of the model", choices=("encoder-decoder", "decoder", "encoder"))
    n_encoder_layer: int | None = option(None, "blocks of the encoder; default n_layer", low=1, high=4096)
    n_ffn: int | None = option(None, "hidden channels of the feed-forward; default 4C, for swiglu 8C/3", low=1)
    norm_position: str = option(
        "post", "post: norm after each residual sum; pre: norm before each part", choices=("post", "pre"))
    norm_type: str = option("LayerNorm", "type of norm, with a learned scale", choices=tuple(NORMS))
    attention_type: str = option(
        "MHA", "mixer of self-attention; -SWA: over a sliding window",
        choices=(*ATTENTIONS, "MHA-SWA", "GQA-SWA", "MQA-SWA", "MHLA-SWA", "kv-SWA"))
    ffn_type: str = option("relu", "feed-forward", choices=tuple(FEED_FORWARDS))
    pos_encoding: str = option("Sinusoidal", "position encoding", choices=tuple(POSITIONS))
    bias: bool = option(True, "biases in linear maps")
    pad_id: int | None = option(None, "padding token, in the source and in an encoder", low=0)
    window: int | None = option(None, "window of -SWA and sparse attention in tokens; default block_size / 4", low=1)
    aft: str = option("simple", "positions of attention-free mixing", choices=tuple(AFTS))
    sparse: str = option("none", "sparse pattern of softmax attention", choices=("none", *SPARSE))
    n_global: int = option(0, "sparse: first tokens, which every token attends to", low=0)
    n_random: int = option(3, "bigbird: random blocks per block of queries", low=0)
    sparse_block: int = option(64, "bigbird: tokens in a block", low=1)
    sparse_seed: int = option(0, "bigbird: seed of the random blocks", low=0)

    def __post_init__(self):
        default_attention(self)
        default_experts(self)
        self.n_encoder_layer = self.n_encoder_layer or self.n_layer

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from heads_divide("n_qkv", self.n_qkv, self.n_head)
        yield from attention_problems(self)
        yield from expert_problems(self)
        yield from recursion_problems(self)
        if self.sparse != "none" and self.attention_type in ("aft", "lam", "expert"):
            yield "sparse", f"is for softmax attention, which attention_type {self.attention_type!r} is not"
        if self.sparse != "none" and self.attention_type.endswith("-SWA"):
            yield "sparse", "has a window of its own; take an attention_type without -SWA"


def post_norm(x: Tensor, norm: nn.Module, part: Callable, drop: nn.Module) -> Tensor:
    """Norm after each residual sum, as published: the residual stream itself is normed."""
    return norm(x + drop(part(x)))


def pre_norm(x: Tensor, norm: nn.Module, part: Callable, drop: nn.Module) -> Tensor:
    """Norm of each part's input; the residual stream is not normed (arXiv 2002.04745)."""
    return x + drop(part(norm(x)))


NORM_POSITIONS = {"post": post_norm, "pre": pre_norm}


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention where there is a source, feed-forward."""

    def __init__(self, c: TransformerConfig, layer: int, crosses: bool):
        super().__init__()
        self.wire, self.drop = NORM_POSITIONS[c.norm_position], nn.Dropout(c.dropout)
        self.norm1, self.attn = NORMS[c.norm_type](c.n_embd), make_attention(c, layer)
        self.norm2, self.cross = NORMS[c.norm_type](c.n_embd), CrossAttention(c) if crosses else None
        self.norm3, self.ffn = NORMS[c.norm_type](c.n_embd) if crosses else None, feed_forward(c)

    def forward(self, x: Tensor, ctx: ForwardContext, caches: tuple | None) -> Tensor:
        cache, cross_cache = caches or (None, None)
        y = self.wire(x, self.norm1, lambda h: self.attn(h, ctx, cache), self.drop)
        if self.cross is not None:
            y = self.wire(y, self.norm2, lambda h: self.cross(h, ctx, cross_cache), self.drop)
        y = self.wire(y, self.norm3 or self.norm2, lambda h: self.ffn(h, ctx), self.drop)
        return ctx.keep_frozen(x, y)

    def new_caches(self, *args) -> tuple:
        return self.attn.new_cache(*args), CrossKVCache() if self.cross is not None else None


class TransformerStack(nn.Module):
    """Positions, blocks and, with pre-norm, a final norm. Encoder and decoder are one stack each."""

    def __init__(self, c: TransformerConfig, n_layer: int, crosses: bool):
        super().__init__()
        self.recursions = c.recursions
        self.positions = POSITIONS[c.pos_encoding](c)
        self.blocks = nn.ModuleList(TransformerBlock(c, layer, crosses) for layer in range(n_layer))
        self.depth = Router(c.n_embd, c.recursions, 1) if c.adaptive else None
        self.norm = NORMS[c.norm_type](c.n_embd) if c.norm_position == "pre" else nn.Identity()

    def forward(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        return self.norm(run_recursions(self.run_stack, x, ctx, caches, self.recursions, self.depth))

    def run_stack(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        return run_blocks(self.blocks, x, ctx, caches)

    def new_caches(self, *args) -> list:
        return [[block.new_caches(*args) for block in self.blocks] for _ in range(self.recursions)]


class Transformer(LanguageModel):
    """The original Transformer (arXiv 1706.03762) and its later variants: encoder, decoder or both, every part
    exchangeable."""

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        c = config
        self.embed = Embedding(c.vocab_size, c.n_embd, "embedding" if c.tie_embeddings else "input")
        self.takes_source = c.kind == "encoder-decoder"
        self.causal = self.generates = c.kind != "encoder"
        self.encoder = TransformerStack(c, c.n_encoder_layer, False) if c.kind != "decoder" else None
        self.decoder = TransformerStack(c, c.n_layer, self.takes_source) if c.kind != "encoder" else None
        self.unembed = None if c.tie_embeddings else Linear(c.n_embd, c.vocab_size, role="head")
        self.rope, self.max_positions = build_rope(c), max_positions(c)

    def embed_with_positions(self, idx: Tensor, ctx: ForwardContext, stack: TransformerStack) -> Tensor:
        return stack.positions(self.embed(idx) * self.config.n_embd**0.5, ctx)  # arXiv 1706.03762, section 3.4

    def embed_tokens(self, idx: Tensor, ctx: ForwardContext) -> Tensor:
        return self.embed_with_positions(idx, ctx, self.decoder or self.encoder)

    def trunk(self, x: Tensor, ctx: ForwardContext, caches: list | None) -> Tensor:
        return (self.decoder or self.encoder)(x, ctx, caches)

    def head_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, (self.unembed or self.embed).weight

    def make_context(self, idx: Tensor) -> ForwardContext:
        return super().make_context(idx) if self.causal else self.make_encoder_context(idx)

    def make_encoder_context(self, idx: Tensor) -> ForwardContext:
        """A bidirectional context: every token attends to all tokens except padding."""
        positions = torch.arange(idx.size(1), device=idx.device).unsqueeze(0)
        pad = -1 if self.config.pad_id is None else self.config.pad_id
        return ForwardContext(positions, Mode.ENCODE, padding_mask=idx == pad)

    def encode_source(self, source: Tensor | None) -> EncodedSource | None:
        if not self.takes_source:
            return super().encode_source(source)
        if source is None:
            raise UserError("an encoder-decoder needs a source (B, S); give source=")
        self.check_length(source)
        ctx = self.make_encoder_context(source)
        ctx = replace(ctx, rope=self.rope(ctx.positions))
        x = self.encoder(to_autocast_dtype(self.drop(self.embed_with_positions(source, ctx, self.encoder))), ctx, None)
        return EncodedSource(x, ctx.padding_mask)

    def new_caches(self, *args) -> list:
        return self.decoder.new_caches(*args)

    def cross_caches(self, cache: Cache) -> Iterator[tuple[CrossAttention, CrossKVCache]]:
        for caches in cache.layers:
            for block, (_, cross_cache) in zip(self.decoder.blocks, caches, strict=True):
                yield block.cross, cross_cache

    def init_cross_cache(self, cache: Cache, source: Tensor | None, max_source: int | None) -> None:
        if not self.takes_source or (source is None and max_source is None):
            self.encode_source(source)
            return
        B, size = len(cache.lengths), max_source or source.size(1)
        cache.source = EncodedSource(None, torch.ones(B, size, dtype=torch.bool, device=self.device))
        for cross, cross_cache in self.cross_caches(cache):
            cross_cache.allocate(B, size, cross.wk.weight.size(0), self.device, self.probe.dtype)
        if source is not None:
            self.set_source(source, cache)

    @torch.no_grad()
    def set_source(self, source: Tensor, cache: Cache) -> None:
        encoded, S, padding = self.encode_source(source), source.size(1), cache.source.padding
        if padding.size(1) < S:
            raise UserError(f"a source of {S} tokens exceeds the {padding.size(1)} that the cache was made for; "
                            "give new_cache a larger max_source")  # fmt: skip
        padding.copy_(F.pad(encoded.padding, (0, padding.size(1) - S), value=True))
        for cross, cross_cache in self.cross_caches(cache):
            cross_cache.k[:, :S], cross_cache.v[:, :S] = cross.project_source(encoded)


# ---- registry, initialisation --------------------------------------------------------------------------------------

MODELS: dict[str, type[LanguageModel]] = {
    "strawberry": Strawberry,
    "strawberry-silia": StrawberrySilia,
    "strawberry-v0": StrawberryV0,
    "palm": Palm,
    "tinystar": TinyStar,
    "transformer": Transformer,
}
CONFIGS: dict[str, type[ModelConfig]] = {name: model.Config for name, model in MODELS.items()}


def build(hyperparams: dict | ModelConfig) -> LanguageModel:
    """The model of `hyperparams`, a JSON file's "model_hyperparams", with weights from `init_weights`. Raises UserError
    where a key or a value is wrong.

    >>> build({"arch": "tinystar", "n_layer": 4, "n_embd": 128}).num_params()
    787584
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
    """Initialize every parameter by its role.

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
    tau        1.2                            AdamW                      no
    bias       zero                           AdamW                      no

    `embedding` is a table that is also the head (tied weights); `input` is a table that is not.
    """
    roles = model.roles()
    for name, p in model.named_parameters():
        INITIALIZERS[roles[name]](p)


def uniform(p: Tensor) -> None:
    bound = math.sqrt(3 / p.size(1))  # a uniform distribution over ±b has standard deviation b / √3
    p.uniform_(-bound, bound)


INITIALIZERS = {
    "matrix": uniform,
    "residual": nn.init.zeros_,
    "embedding": lambda p: p.normal_(std=0.02),
    "input": lambda p: p.normal_(std=1.0),
    "head": uniform,
    "router": uniform,
    "position": lambda p: p.normal_(std=0.02),
    "norm": nn.init.ones_,
    "tao": nn.init.ones_,
    "tau": lambda p: p.fill_(1.2),
    "bias": nn.init.zeros_,
}


def main(argv: list[str]) -> None:
    print(summarize(build(load_run(argv, CONFIGS).model_hyperparams)))


if __name__ == "__main__":
    run_cli(main)

"""tinystar, palm and transformer a second time: naive loops over t in float64, one row at a time.

This file shares nothing with model.py, so that agreement means something. It favours the reader over speed: numpy,
vectors of one token, explicit sums over the tokens that a token sees. Widths and biases are read off the parameters.

    logits = naive_tinystar(cfg, model.state_dict(), idx)            # idx (B, T) -> float64 (B, T, V)
    logits = naive_transformer(cfg, model.state_dict(), idx, source)

Index
    One token            softmax, rms, layer_norm, linear, activations, feed_forward, route, moe
    Positions            rope_frequencies (linear, ntk, yarn, longrope), rotary, sinusoid, embed_row
    Visibility           sees(t, s, head): causal, window, padding, longformer, bigbird
    Mixers               softmax_mixer, aft_mixer, lam_mixer
    Attention            projections -> mixer -> output, by attention_type
    Models               naive_tinystar, naive_palm, naive_transformer

Names of parameters are joined in the small functions `tinystar_…`, `palm_…` and `transformer_…`, above each model.

Readings: where the specification leaves a choice, this file takes
     1. RMS norms: eps 1e-6 everywhere, learned scale or not. LayerNorm: eps 1e-5. GELU: the exact one (erf).
     2. Sinusoids as published: columns 2i and 2i+1 are sin and cos of pos / 10000^(2i/C), pos from 0.
     3. transformer: x = √C · embed + position, whatever the position encoding; tinystar and palm do not scale.
     4. transformer, post-norm: no norm after the last block. Pre-norm: one after each stack (`encoder.norm` before the
        cross-attention reads it, `decoder.norm` before the head).
     5. One embedding for source and idx; the head is tied unless `head.weight` exists. Learned positions: one table
        for each stack.
     6. Padding is a mask on keys: of the source in encoder and cross-attention, of idx when `kind` is encoder. The
        decoder's own attention has the causal mask alone, padding there comes last and its targets are ignored.
     7. A source of padding alone: the whole cross-attention branch is zero, its output bias too. Elsewhere a head
        that sees nothing mixes to zero, then the output projection applies as always.
     8. Cross-attention is softmax attention with n_kv_head groups and no positions, whatever the self-attention.
     9. Where all tokens are seen (encoder): windows are |t−s| < w, AFT and LAM sum over all unpadded tokens, LAM's t
        is their number, AFT's `to_local` and `conv` go by |t−s|.
    10. YaRN's ramp is linear in the pair's index between floor and ceiling, as the authors' code and all published
        checkpoints have it (the paper's text has it linear in the number of rotations). NTK: base · factor^(d/(d−2)).
    11. The attention factor of YaRN and LongRoPE is squared and multiplies the softmax scale, with QK-norm and
        without; AFT and LAM have no softmax scale and ignore it. In MHLA it multiplies the whole score.
    12. LongRoPE's factor is block_size / original_max_position unless given.
    13. MHLA rotates its rotary part whatever `pos_encoding` says: it is part of the mechanism.
    14. longformer, seen by t: its window, and s < n_global. bigbird: these, and `n_random` blocks of `sparse_block`
        tokens out of those before t's own block, drawn without replacement by
        random.Random("seed,layer,head,block").sample. In encoders too; globals there see everything.
        `sparse` is for softmax attention (MHLA and KV included), not for AFT, LAM or expert attention.
    15. Routers read norm(h), h being what the routed part itself is given.
    16. `recursions` repeats each stack (encoder, decoder) N times; with `adaptive` each stack has its own router on
        its own x₀ (embedding + position), and the stack's final norm comes after x₀ + N·q_n·(x_n − x₀).
    17. palm: x starts as the bare embedding, one norm before the head. A repeat is a whole block, so r_layer 1 is
        each block once. One FFN makes q, k, v (for "kv": k, v), rows in that order: w2 relu²(w1 h). AFT, LAM and KV
        too get rotated and normed q and k. `parallel: false` has no feed-forward at all.
    18. A window that is itself under 16 is every expert's; halving stops at 16.
    19. LAM divides q and k by max(‖·‖, 1e-12).
"""

import functools
import math
import random

import numpy as np
import torch

# ---- One token -------------------------------------------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def gelu_tanh(x):
    return np.array([0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x])


def relu(x):
    return np.maximum(x, 0)


def relu2(x):
    return np.maximum(x, 0) ** 2


def rms(x, g=1.0, eps=1e-6):
    return x / np.sqrt((x * x).mean() + eps) * g


def layer_norm(x, g, b=0.0, eps=1e-5):
    centred = x - x.mean()
    return centred / np.sqrt((centred * centred).mean() + eps) * g + b


def scaled_norm(p, name, x, norm_type):
    """The norm with learned scale called `name`."""
    if norm_type == "RMSNorm":
        return rms(x, p[f"{name}.weight"])
    return layer_norm(x, p[f"{name}.weight"], p.get(f"{name}.bias", 0.0))


def linear(p, name, x):
    """W x + b. W is `name.weight`, or, of low rank, `name.up.weight @ name.down.weight`; b only if it exists."""
    if f"{name}.down.weight" in p:
        return p[f"{name}.up.weight"] @ (p[f"{name}.down.weight"] @ x)
    return p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0.0)


def feed_forward(w1, b1, w2, b2, x, ffn_type):
    hidden = w1 @ x + b1
    if ffn_type == "swiglu":
        u, g = np.split(hidden, 2)
        hidden = u * silu(g)
    else:
        hidden = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu, "relu2": relu2}[ffn_type](hidden)
    return w2 @ hidden + b2


def route(router, bias, x, kept):
    """{expert: weight}: the `kept` largest of softmax(router · norm(x)) + bias, ties to the lower index."""
    prob = softmax(router @ rms(x))
    order = sorted(range(len(prob)), key=lambda e: (-(prob[e] + bias[e]), e))
    return {e: len(prob) * prob[e] for e in order[:kept]}


def dense_or_moe(p, name, x, cfg, ffn_type):
    """The feed-forward called `name`; weights of experts are stacked along a first axis."""
    w1, w2 = p[f"{name}.w1.weight"], p[f"{name}.w2.weight"]
    b1, b2 = p.get(f"{name}.w1.bias"), p.get(f"{name}.w2.bias")
    if w1.ndim == 2:
        return feed_forward(w1, 0.0 if b1 is None else b1, w2, 0.0 if b2 is None else b2, x, ffn_type)
    y = np.zeros(w2.shape[1])
    for e, weight in route(*router(p, f"{name}.router"), x, cfg["a_ffn_experts"]).items():
        e1, e2 = (0.0 if b1 is None else b1[e]), (0.0 if b2 is None else b2[e])
        y += weight * feed_forward(w1[e], e1, w2[e], e2, x, ffn_type)
    return y


def router(p, name):
    """(W_rᵀ (n, C), bias (n,)); the bias touches the choice only."""
    weight = p[f"{name}.weight"]
    return weight, p.get(f"{name}.bias", np.zeros(len(weight)))


# ---- Positions -------------------------------------------------------------------------------------------------------


def rope_frequencies(dim, scaling=None, block_size=None, base=10000.0):
    """(inverse frequencies (dim/2,), attention factor) for heads of `dim` rotary channels.

    `scaling` is None or a dict: {"type": "linear" | "ntk", "factor"}, {"type": "yarn", "factor",
    "original_max_position"[, "beta_fast", "beta_slow", "attention_factor"]}, {"type": "longrope", "short_factor",
    "long_factor", "original_max_position"[, "factor", "attention_factor"]}.

    >>> rope_frequencies(4, {"type": "linear", "factor": 2.0})[0].tolist()       # 1/2 and 0.01/2
    [0.5, 0.005]
    """
    plain = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])
    kind = (scaling or {}).get("type", "none")
    if kind == "none":
        return plain, 1.0
    if kind == "linear":  # position interpolation, arXiv 2306.15595
        return plain / scaling["factor"], 1.0
    if kind == "ntk":  # NTK-aware, as in arXiv 2309.00071, eq. 15
        wider = base * scaling["factor"] ** (dim / (dim - 2))
        return np.array([wider ** (-2 * i / dim) for i in range(dim // 2)]), 1.0
    if kind == "yarn":
        return yarn_frequencies(dim, scaling, base, plain)
    return longrope_frequencies(scaling, block_size, plain)


def yarn_frequencies(dim, scaling, base, plain):
    """arXiv 2309.00071: pairs with many rotations stay, those with less than one are interpolated, a ramp between."""
    factor, length = scaling["factor"], scaling["original_max_position"]

    def pair_with_rotations(n):  # the (real) index i with length · base^(−2i/dim) = 2π · n
        return dim * math.log(length / (2 * math.pi * n)) / (2 * math.log(base))

    low = max(math.floor(pair_with_rotations(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_with_rotations(scaling.get("beta_slow", 1))), dim - 1)
    if low == high:
        high += 0.001
    mixed = []
    for i, frequency in enumerate(plain):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        mixed.append(frequency * (1 - ramp) + frequency / factor * ramp)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0  # eq. 22
    return np.array(mixed), attention


def longrope_frequencies(scaling, block_size, plain):
    """arXiv 2402.13753: a divisor for each rotary pair, from the long list beyond the original length."""
    length = scaling["original_max_position"]
    divisors = scaling["long_factor"] if block_size > length else scaling["short_factor"]
    factor = scaling.get("factor")
    if factor is None:
        factor = block_size / length
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return plain / np.array(divisors, dtype=np.float64), attention


def rotary(x, t, inv_freq):
    """Rotate the pairs (x_i, x_{i+d/2}) of one head at position t, by −t · inv_freq_i."""
    x1, x2 = np.split(x, 2)
    cos, sin = np.cos(t * inv_freq), np.sin(t * inv_freq)
    return np.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin])


def sinusoid(t, width):
    """arXiv 1706.03762, section 3.5.

    >>> sinusoid(0, 4).tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    angles = [t / 10000 ** (2 * (c // 2) / width) for c in range(width)]
    return np.array([math.sin(a) if c % 2 == 0 else math.cos(a) for c, a in enumerate(angles)])


def position(t, width, pos_encoding, table):
    """What is added to the embedding at position t."""
    if pos_encoding == "Learned":
        return table[t]
    if pos_encoding == "Sinusoidal":
        return sinusoid(t, width)
    return np.zeros(width)


# ---- Visibility: sees(t, s, head) ------------------------------------------------------------------------------------


def default_window(cfg):
    return cfg.get("window") or cfg["block_size"] // 4


def drawn_blocks(cfg, layer, head, block):
    """BigBird's random blocks for one block of queries, all before it. cfg["drawn_blocks"] may be another draw."""
    if "drawn_blocks" in cfg:
        return cfg["drawn_blocks"](layer, head, block)
    return draw_blocks(cfg.get("sparse_seed", 0), layer, head, block, cfg.get("n_random", 3))


@functools.cache
def draw_blocks(seed, layer, head, block, n_random):
    return random.Random(f"{seed},{layer},{head},{block}").sample(range(block), min(n_random, block))


def visibility(cfg, layer, causal, padding=None, window=None):
    """sees(t, s, head) -> bool, for `sparse` too. padding[s] hides token s; window None means no window."""
    sparse = cfg.get("sparse") or "none"
    n_global, block = cfg.get("n_global", 0), cfg.get("sparse_block", 64)
    if sparse != "none":
        window = default_window(cfg)

    def sees(t, s, head):
        if (causal and s > t) or (padding is not None and padding[s]):
            return False
        if window is None or abs(t - s) < window:
            return True
        if sparse == "none":
            return False
        if s < n_global or t < n_global:  # arXiv 2004.05150
            return True
        return sparse == "bigbird" and s // block in drawn_blocks(cfg, layer, head, t // block)  # arXiv 2007.14062

    return sees


# ---- Mixers: lists of q, k, v over time -> list of y -----------------------------------------------------------------


def softmax_mixer(q, k, v, sees, scale):
    """q: for each t an (H, d) array; k, v: for each s an (n_kv_head, d) array. Returns for each t an (H · d) vector."""
    y = []
    for t in range(len(q)):
        parts = []
        for h in range(len(q[t])):
            shared = h * len(k[0]) // len(q[t])  # query heads in order share the kv heads
            seen = [s for s in range(len(k)) if sees(t, s, h)]
            part = np.zeros(v[0].shape[1])
            if seen:
                keys, values = (np.stack([x[s][shared] for s in seen]) for x in (k, v))
                part = softmax(keys @ q[t][h] * scale) @ values
            parts.append(part)
        y.append(np.concatenate(parts))
    return y


def aft_mixer(q, k, v, sees, bias):
    """arXiv 2105.14103. q, k, v: for each t a vector (D,); bias(t, s): a number, or a vector (D,)."""
    y = []
    for t in range(len(q)):
        seen = [s for s in range(len(k)) if sees(t, s, 0)]
        total, weights = np.zeros_like(v[0]), np.zeros_like(v[0])
        if seen:
            exponents = {s: k[s] + bias(t, s) for s in seen}
            largest = np.max(np.stack(list(exponents.values())), axis=0)
            for s in seen:
                weight = np.exp(exponents[s] - largest)
                total, weights = total + weight * v[s], weights + weight
            total = total / weights
        y.append(sigmoid(q[t]) * total)
    return y


def aft_bias(p, name, cfg, width):
    """bias(t, s) of the four kinds of AFT; a, b are (block_size, m), the kernel is (n_head, window)."""
    kind, window = cfg.get("aft", "simple"), default_window(cfg)

    def bias(t, s):
        if kind == "simple" or (kind in ("local", "conv") and abs(t - s) >= window):
            return 0.0
        if kind == "conv":
            return np.repeat(p[f"{name}.kernel"][:, abs(t - s)], width // cfg["n_head"])
        return p[f"{name}.a"][t] @ p[f"{name}.b"][s]

    return bias


def unit(x):
    return x / max(math.sqrt(x @ x), 1e-12)


def lam_mixer(q, k, v, sees):
    """arXiv 2007.14902. q, k, v: for each t an (H, d) array."""
    y = []
    for t in range(len(q)):
        parts = []
        for h in range(len(q[t])):
            seen = [s for s in range(len(k)) if sees(t, s, h)]
            qn = unit(q[t][h])
            above, below = np.zeros(v[0].shape[1]), float(len(seen))
            for s in seen:
                cosine = qn @ unit(k[s][h])
                above, below = above + (1 + cosine) * v[s][h], below + cosine
            parts.append(above / max(below, 1e-6))
        y.append(np.concatenate(parts))
    return y


# ---- Attention: what a block calls, by attention_type ----------------------------------------------------------------


def heads(x, d):
    """(H·d,) -> (H, d)"""
    return x.reshape(-1, d)


def head_width(cfg):
    return (cfg.get("n_qkv") or cfg["n_embd"]) // cfg["n_head"]


def rotated(x, t, cfg, inv_freq):
    """Each head of x (H, d) rotated, where the positions are rotary."""
    if cfg.get("pos_encoding") != "RoPE":
        return x
    return np.stack([rotary(head, t, inv_freq) for head in x])


def frequencies(cfg, dim):
    return rope_frequencies(dim, cfg.get("rope_scaling"), cfg["block_size"], cfg.get("rope_base", 10000.0))


def softmax_attention(p, name, cfg, h, layer, causal, padding=None):
    """MHA, GQA and MQA, and KV attention (arXiv 2305.19129), in which q is k."""
    d = head_width(cfg)
    inv_freq, factor = frequencies(cfg, d)
    k = [rotated(heads(linear(p, f"{name}.wk", x), d), t, cfg, inv_freq) for t, x in enumerate(h)]
    v = [heads(linear(p, f"{name}.wv", x), d) for x in h]
    q = k
    if base_type(cfg) != "kv":
        q = [rotated(heads(linear(p, f"{name}.wq", x), d), t, cfg, inv_freq) for t, x in enumerate(h)]
    if cfg.get("qk_norm"):
        q, k = ([np.stack([rms(head) for head in x]) for x in parts] for parts in (q, k))
    if f"{name}.add_to_values.table" in p:
        v = [with_value_embedding(p, f"{name}.add_to_values", v_t, x, token)
             for v_t, x, token in zip(v, h, cfg["tokens"], strict=True)]  # fmt: skip
    sees = visibility(cfg, layer, causal, padding, window_of(cfg))
    y = softmax_mixer(q, k, v, sees, d**-0.5 * (factor**2 if cfg.get("pos_encoding") == "RoPE" else 1))
    return [linear(p, f"{name}.wo", x) for x in y]


def with_value_embedding(p, name, v, x, token):
    """v (heads, d) of one token, whose normed input is x: each head gets its part of a table's row, times a gate."""
    row, gate = p[f"{name}.table"][token].reshape(v.shape), p[f"{name}.gate"]
    out = np.empty_like(v)
    for head in range(len(v)):
        z = sum(gate[head, i] * x[i] for i in range(gate.shape[1]))
        out[head] = v[head] + 2 / (1 + math.exp(-z)) * row[head]
    return out


def latent_attention(p, name, cfg, h, layer, causal, padding=None):
    """MHLA, arXiv 2405.04434, section 2.1: expanded keys and values, one rotary key for all heads."""
    d, rope_dim = head_width(cfg), cfg["rope_dim"]
    inv_freq, factor = frequencies(cfg, rope_dim)
    q, k, v = [], [], []
    for t, x in enumerate(h):
        q_t = heads(linear(p, f"{name}.wq", x), d + rope_dim)  # per head [nope, rope]
        q.append(np.stack([np.concatenate([head[:d], rotary(head[d:], t, inv_freq)]) for head in q_t]))
        latent, k_rope = np.split(linear(p, f"{name}.wkv_a", x), [cfg["kv_rank"]])
        kv_t = heads(linear(p, f"{name}.wkv_b", rms(latent, p[f"{name}.kv_norm.weight"])), 2 * d)  # per head [k, v]
        k_rope = rotary(k_rope, t, inv_freq)
        k.append(np.stack([np.concatenate([head[:d], k_rope]) for head in kv_t]))
        v.append(kv_t[:, d:])
    sees = visibility(cfg, layer, causal, padding, window_of(cfg))
    y = softmax_mixer(q, k, v, sees, (d + rope_dim) ** -0.5 * factor**2)
    return [linear(p, f"{name}.wo", x) for x in y]


def aft_attention(p, name, cfg, h, layer, causal, padding=None):
    d = head_width(cfg)
    inv_freq, _ = frequencies(cfg, d)
    q, k = ([rotated(heads(linear(p, f"{name}.{w}", x), d), t, cfg, inv_freq).reshape(-1) for t, x in enumerate(h)]
            for w in ("wq", "wk"))  # fmt: skip
    v = [linear(p, f"{name}.wv", x) for x in h]
    sees = visibility({**cfg, "sparse": "none"}, layer, causal, padding)
    y = aft_mixer(q, k, v, sees, aft_bias(p, f"{name}.aft", cfg, len(v[0])))
    return [linear(p, f"{name}.wo", x) for x in y]


def lam_attention(p, name, cfg, h, layer, causal, padding=None):
    d = head_width(cfg)
    inv_freq, _ = frequencies(cfg, d)
    q, k = ([rotated(heads(linear(p, f"{name}.{w}", x), d), t, cfg, inv_freq) for t, x in enumerate(h)]
            for w in ("wq", "wk"))  # fmt: skip
    v = [heads(linear(p, f"{name}.wv", x), d) for x in h]
    y = lam_mixer(q, k, v, visibility({**cfg, "sparse": "none"}, layer, causal, padding))
    return [linear(p, f"{name}.wo", x) for x in y]


def expert_windows(cfg):
    """One window for each expert: an explicit list, or window, window/2, …, not under 16."""
    if cfg.get("windows"):
        return cfg["windows"]
    window = default_window(cfg)
    return [max(window >> e, min(16, window)) for e in range(cfg["n_experts"])]


def expert_attention(p, name, cfg, h, layer, causal, padding=None):
    """The heads in n_experts groups, each with its own window; a router keeps a_experts groups for each token."""
    d, n_head, n_experts = head_width(cfg), cfg["n_head"], cfg["n_experts"]
    inv_freq, factor = frequencies(cfg, d)
    q, k = ([rotated(heads(linear(p, f"{name}.{w}", x), d), t, cfg, inv_freq) for t, x in enumerate(h)]
            for w in ("wq", "wk"))  # fmt: skip
    v = [heads(linear(p, f"{name}.wv", x), d) for x in h]
    windows = expert_windows(cfg)

    def sees(t, s, head):
        hidden = (causal and s > t) or (padding is not None and padding[s])
        return not hidden and abs(t - s) < windows[head * n_experts // n_head]

    y = softmax_mixer(q, k, v, sees, d**-0.5 * (factor**2 if cfg.get("pos_encoding") == "RoPE" else 1))
    out = []
    for x, y_t in zip(h, y, strict=True):
        kept = {0: 1.0} if n_experts == 1 else route(*router(p, f"{name}.router"), x, cfg["a_experts"])
        parts = [part * kept.get(e, 0.0) for e, part in enumerate(np.split(y_t, n_experts))]
        out.append(linear(p, f"{name}.wo", np.concatenate(parts)))
    return out


def cross_attention(p, name, cfg, h, memory, padding):
    """Each token of h looks at all unpadded tokens of memory; nothing to see adds nothing."""
    if all(padding):
        return [np.zeros_like(x) for x in h]
    d = head_width(cfg)
    q = [heads(linear(p, f"{name}.wq", x), d) for x in h]
    k = [heads(linear(p, f"{name}.wk", x), d) for x in memory]
    v = [heads(linear(p, f"{name}.wv", x), d) for x in memory]
    y = softmax_mixer(q, k, v, lambda t, s, head: not padding[s], d**-0.5)
    return [linear(p, f"{name}.wo", x) for x in y]


ATTENTION = {
    "MHA": softmax_attention,
    "GQA": softmax_attention,
    "MQA": softmax_attention,
    "MHLA": latent_attention,
    "kv": softmax_attention,
    "aft": aft_attention,
    "lam": lam_attention,
    "expert": expert_attention,
}


def base_type(cfg):
    return cfg["attention_type"].removesuffix("-SWA")


def window_of(cfg):
    return default_window(cfg) if cfg["attention_type"].endswith("-SWA") else None


def add(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def as_numpy(params):
    return {name: tensor.detach().cpu().double().numpy() for name, tensor in params.items()}


def stack_rows(rows):
    return torch.from_numpy(np.stack([np.stack(row) for row in rows]))


# ---- tinystar --------------------------------------------------------------------------------------------------------

TINYSTAR = {  # v0.2-ModernBase
    "norm_type": "RMSNorm",
    "attention_type": "GQA",
    "ffn_type": "SwiGLU",
    "pos_encoding": "RoPE",
}


def tinystar_part(layer, part):
    return f"blocks.{layer}.{part}"


def tinystar_head(p):
    return p.get("head.weight", p["embed.weight"])


def naive_tinystar(cfg, params, idx):
    """Logits (B, T, V), float64, of tokens idx (B, T)."""
    cfg, p = {**TINYSTAR, **cfg}, as_numpy(params)
    return stack_rows([tinystar_row(cfg, p, row) for row in idx.tolist()])


def tinystar_row(cfg, p, tokens):
    norm_type, ffn_type = cfg["norm_type"], cfg["ffn_type"].lower()
    x = [p["embed.weight"][token] for token in tokens]
    x = [rms(x_t) for x_t in x] if cfg.get("skip_scalars") else x
    x = [x_t + position(t, len(x_t), cfg["pos_encoding"], p.get("positions.weight")) for t, x_t in enumerate(x)]
    cfg, start = {**cfg, "tokens": tokens}, x
    for layer in range(cfg["n_layer"]):
        if cfg.get("skip_scalars"):
            scale, shift = (p[f"blocks.{layer}.skip.{name}"][0] for name in ("scale", "shift"))
            x = [scale * x_t + shift * start_t for x_t, start_t in zip(x, start, strict=True)]
        h = [scaled_norm(p, tinystar_part(layer, "norm1"), x_t, norm_type) for x_t in x]
        x = add(x, ATTENTION[base_type(cfg)](p, tinystar_part(layer, "attn"), cfg, h, layer, causal=True))
        h = [scaled_norm(p, tinystar_part(layer, "norm2"), x_t, norm_type) for x_t in x]
        x = add(x, [dense_or_moe(p, tinystar_part(layer, "ffn"), h_t, cfg, ffn_type) for h_t in h])
    logits, cap = [tinystar_head(p) @ scaled_norm(p, "norm", x_t, norm_type) for x_t in x], cfg.get("logit_softcap")
    return [cap * np.tanh(row / cap) for row in logits] if cap else logits


# ---- palm ------------------------------------------------------------------------------------------------------------

PALM = {"attention_type": "aft", "aft": "simple", "parallel": True, "r_layer": 1, "pos_encoding": "RoPE"}


def palm_embed(p, token):
    """V -> d_rank -> C"""
    row = p["embed.weight"][token]
    return p["embed.up.weight"] @ row if "embed.up.weight" in p else row


def palm_unembed(p, x):
    """C -> d_rank -> V"""
    return linear(p, "head", x)


def palm_qkv(p, layer, x):
    """Neural attention (arXiv 2310.11398): two linears, squared ReLU between; rows q, k, v (for "kv": k, v)."""
    return linear(p, f"blocks.{layer}.attn.w2", relu2(linear(p, f"blocks.{layer}.attn.w1", x)))


def palm_gate(p, layer, y):
    u, g = np.split(linear(p, f"blocks.{layer}.attn.out", y), 2)
    return u * silu(g)


def palm_ffn(p, layer, x):
    u, g = np.split(linear(p, f"blocks.{layer}.ffn.w1", x), 2)
    return linear(p, f"blocks.{layer}.ffn.w2", u * silu(g))


def palm_aft(layer):
    """The name before `.a`, `.b` and `.kernel`."""
    return f"blocks.{layer}.attn.aft"


def naive_palm(cfg, params, idx):
    """Logits (B, T, V), float64, of tokens idx (B, T)."""
    cfg, p = {**PALM, **cfg}, as_numpy(params)
    return stack_rows([palm_row(cfg, p, row) for row in idx.tolist()])


def palm_row(cfg, p, tokens):
    x = [palm_embed(p, token) for token in tokens]
    for layer in range(cfg["n_layer"]):
        for _ in range(cfg["r_layer"]):
            h = [rms(x_t) for x_t in x]
            after = add(x, [palm_gate(p, layer, y_t) for y_t in palm_mix(cfg, p, layer, h)])
            if cfg["parallel"]:  # arXiv 2204.02311: both read the same norm(x)
                after = add(after, [palm_ffn(p, layer, h_t) for h_t in h])
            x = after
    return [palm_unembed(p, rms(x_t)) for x_t in x]


def palm_mix(cfg, p, layer, h):
    """y for each t, (D,)"""
    d, kind = head_width(cfg), cfg["attention_type"]
    inv_freq, factor = frequencies(cfg, d)

    def rotate(x, t):  # rotary, then QK-norm, per head
        return np.stack([rms(head) for head in rotated(heads(x, d), t, cfg, inv_freq)])

    parts = [np.split(palm_qkv(p, layer, h_t), 2 if kind == "kv" else 3) for h_t in h]
    k = [rotate(part[-2], t) for t, part in enumerate(parts)]
    v = [heads(part[-1], d) for part in parts]
    q = k if kind == "kv" else [rotate(part[0], t) for t, part in enumerate(parts)]
    sees = visibility(cfg, layer, causal=True)
    if kind == "aft":
        q, k, v = ([x.reshape(-1) for x in part] for part in (q, k, v))
        return aft_mixer(q, k, v, sees, aft_bias(p, palm_aft(layer), cfg, len(v[0])))
    if kind == "lam":
        return lam_mixer(q, k, v, sees)
    return softmax_mixer(q, k, v, sees, d**-0.5 * factor**2)


# ---- transformer -----------------------------------------------------------------------------------------------------

TRANSFORMER = {  # the original, arXiv 1706.03762
    "kind": "encoder-decoder",
    "norm_position": "post",
    "norm_type": "LayerNorm",
    "attention_type": "MHA",
    "ffn_type": "relu",
    "pos_encoding": "Sinusoidal",
    "recursions": 1,
    "adaptive": False,
    "pad_id": None,
}


def transformer_part(stack, layer, part):
    """Parts: norm1 attn norm2 ffn; with a source norm1 attn norm2 cross norm3 ffn. stack: encoder | decoder."""
    return f"{stack}.blocks.{layer}.{part}"


def transformer_norm(stack):
    return f"{stack}.norm"


def transformer_depth(stack):
    return f"{stack}.depth"


def transformer_positions(p, stack):
    return p.get(f"{stack}.positions.weight")


def transformer_layers(cfg, stack):
    return cfg.get("n_encoder_layer") or cfg["n_layer"] if stack == "encoder" else cfg["n_layer"]


def transformer_head(p, x):
    return p.get("head.weight", p["embed.weight"]) @ x + p.get("head.bias", 0.0)


def naive_transformer(cfg, params, idx, source=None):
    """Logits (B, T, V), float64, of tokens idx (B, T); an encoder-decoder also reads source (B, S)."""
    cfg, p = {**TRANSFORMER, **cfg}, as_numpy(params)
    sources = source.tolist() if source is not None else [None] * len(idx)
    return stack_rows([transformer_row(cfg, p, row, src) for row, src in zip(idx.tolist(), sources, strict=True)])


def transformer_row(cfg, p, tokens, source):
    if cfg["kind"] == "encoder":
        x = transformer_stack(cfg, p, "encoder", tokens, causal=False, padding=padded(cfg, tokens))
    elif cfg["kind"] == "decoder":
        x = transformer_stack(cfg, p, "decoder", tokens, causal=True)
    else:
        padding = padded(cfg, source)
        memory = transformer_stack(cfg, p, "encoder", source, causal=False, padding=padding)
        x = transformer_stack(cfg, p, "decoder", tokens, causal=True, memory=(memory, padding))
    return [transformer_head(p, x_t) for x_t in x]


def padded(cfg, tokens):
    return [token == cfg["pad_id"] for token in tokens]


def transformer_stack(cfg, p, stack, tokens, causal, padding=None, memory=None):
    """Embedding, positions, blocks (perhaps several times), and with pre-norm the last norm."""
    width = p["embed.weight"].shape[1]
    table = transformer_positions(p, stack)
    x0 = [
        math.sqrt(width) * p["embed.weight"][token] + position(t, width, cfg["pos_encoding"], table)
        for t, token in enumerate(tokens)
    ]
    n = cfg["recursions"]
    depth, share = [n] * len(x0), [1 / n] * len(x0)
    if cfg["adaptive"]:
        depth, share = zip(*[chosen_depth(p, stack, x_t) for x_t in x0], strict=True)
    x = x0
    for step in range(1, n + 1):
        for layer in range(transformer_layers(cfg, stack)):
            after = transformer_block(cfg, p, stack, layer, x, causal, padding, memory)
            x = [after[t] if step <= depth[t] else x[t] for t in range(len(x))]  # a frozen x still makes k and v
    if cfg["adaptive"]:
        x = [x0[t] + n * share[t] * (x[t] - x0[t]) for t in range(len(x))]
    if cfg["norm_position"] == "pre":
        x = [scaled_norm(p, transformer_norm(stack), x_t, cfg["norm_type"]) for x_t in x]
    return x


def chosen_depth(p, stack, x):
    """(n, q_n): how many passes this token takes, after arXiv 2507.10524; ties to the smaller."""
    weight, bias = router(p, transformer_depth(stack))
    prob = softmax(weight @ rms(x))
    n = min(range(len(prob)), key=lambda i: (-(prob[i] + bias[i]), i))
    return n + 1, prob[n]


def transformer_block(cfg, p, stack, layer, x, causal, padding, memory):
    def self_attention(h):
        return ATTENTION[base_type(cfg)](p, transformer_part(stack, layer, "attn"), cfg, h, layer, causal, padding)

    def cross(h):
        return cross_attention(p, transformer_part(stack, layer, "cross"), cfg, h, *memory)

    def ffn(h):
        return [dense_or_moe(p, transformer_part(stack, layer, "ffn"), h_t, cfg, cfg["ffn_type"].lower()) for h_t in h]

    sublayers = [self_attention, cross, ffn] if memory else [self_attention, ffn]
    for number, sublayer in enumerate(sublayers, start=1):
        norm_name = transformer_part(stack, layer, f"norm{number}")
        if cfg["norm_position"] == "pre":
            x = add(x, sublayer([scaled_norm(p, norm_name, x_t, cfg["norm_type"]) for x_t in x]))
        else:
            x = [scaled_norm(p, norm_name, x_t, cfg["norm_type"]) for x_t in add(x, sublayer(x))]
    return x

"""Slow, literal float64 versions of the strawberry families and their parts, to compare model.py with.

Written from the specification and the papers it cites, sharing no code with model.py, so that agreement to 1e-9 says
something. Everything is a loop over tokens in NumPy float64; only what happens inside one token is a matrix product.
No running sums, no running maxima, no caches, no batching: nothing here is clever.

    logits = naive_strawberry(cfg, model.state_dict(), idx)      # (B, T) int -> (B, T, V) float64

`cfg` is the "model_hyperparams" dict; a missing key, or one that is None, takes the specification's default.
`params` maps state-dict names to arrays or tensors, matrices as in torch.nn.Linear (out, in).

Index:  1 small parts   2 mixers   3 routing and experts   4 feed-forwards   5 strawberry   6 strawberry-v0
        7 strawberry-silia

Notation: B rows, T tokens, V vocab_size, C n_embd, D n_qkv, H n_head, d = D/H, R r_layer. Tokens count from 0.
`x` is the residual stream, `xn` its norm.

Readings, where the specification leaves a choice:
 1. Order of the whole: x = norm(embed) -> stack -> norm -> tied head -> softcap, in strawberry-v0 too. A norm is
    applied wherever it is written, also on what was just normalised (eps makes the second one count: 5e-7).
 2. RoPE rotates each head's d numbers, pair i is (i, i + d/2) at frequency 10000^(-2i/d), the position is the token's
    index in its row. QK-norm comes after it, over each head's d; scores are still divided by sqrt(d).
 3. GQA: consecutive query heads share a key head (h // (H / n_kv_head)).
 4. Expert windows: window // 2^e, not under 16; a `window` that is itself under 16 is left as it is for all experts.
    An explicit list is `windows` and used as it is.
    The default window is block_size // 4, at least 1. a_experts and a_ffn_experts default to all.
 5. A kept expert weighs n_experts * p_e with p the softmax over all experts; kept weights aren't renormalised.
 6. A retention step is a SwiGLU step with the weights it found, followed by their update from that step's own u, v.
    The first step uses the base weights as they are, the last step's u, v go nowhere.
 7. Groups of SwiGLU channels (n_ffn_experts): u itself is multiplied by the group's weight (0 when dropped), so the
    weighted u is what both the SwiGLU and oa see; v is left alone. The router reads the step's norm(x).
 8. oa: row c holds u's channel c, so norm runs over v's channels; retention_scale multiplies after the norm. Causal:
    a plain sum over tokens. Batch: the sum over T, then the mean over rows.
 9. Chunk of token t = t // retention_chunk, t its index in the row. A row shorter than a chunk is all chunk 0, whose
    oa is 0: its weights are rescaled, nothing more. By default max(16, min(C up to a power of two, block_size // 2)).
10. Recursions: x goes on, everything else starts anew in each pass: base weights, oa, attention and AFT sums see that
    pass only. Positions don't go on counting. All passes share AFT positions and routers.
11. Adaptive depth: x0 is the stack's input; N * q_n uses q without the bias. A frozen token's q, k, v come from its
    frozen x with its chunk's weights of that pass; it contributes u = v = 0 and still counts as a token of its chunk.
12. strawberry-v0: rotary and QK-norm per head come first, AFT and expert attention then read these same q and k;
    AFT gets no further norm. r_layer counts passes through the block (1 means once).
13. Compaction: O and A come from the norm of x before anything is added; its Y acts on that same norm(x). Causal: sum
    over earlier chunks / tokens in them, then / sqrt(C), then tanh; chunk 0 has Y = 0. Batch: the bare sum over B*T.
14. LAM: a zero q or k stays zero. GELU is the exact one (erf).
15. strawberry-silia: the sink's score is q·τ₀ · k_sink / √d, times the squared attention factor as every score; a
    gate is σ of its own channels, which come after v's.
"""

import math

import numpy as np
from naive_others import rope_frequencies


def float64(params):
    """Arrays or torch tensors by name -> NumPy float64 arrays by the same names."""
    return {name: np.asarray(p.detach().cpu() if hasattr(p, "detach") else p, np.float64) for name, p in params.items()}


def option(cfg, name, default):
    """cfg[name], or the default where the key is missing or None."""
    return default if cfg.get(name) is None else cfg[name]


# ---- 1 small parts -----------------------------------------------------------------------------------------------


def norm(x):
    """RMS norm over the last axis, no learned scale (arXiv 1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def std(w, n):
    """w · n^(−1/2) / (unbiased standard deviation of the whole matrix + 1e-8)."""
    mean = w.sum() / w.size
    deviation = math.sqrt(((w - mean) ** 2).sum() / (w.size - 1))
    return w * n**-0.5 / (deviation + 1e-8)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(scores):
    """Of one vector."""
    e = np.exp(scores - np.max(scores))
    return e / e.sum()


def rotary(x, t, frequency=None):
    """One head's vector x (d,) at position t, half-split pairs (arXiv 2104.09864)."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = t * (10000.0 ** (-2 * i / len(x)) if frequency is None else frequency[i])
        x1, x2 = x[i], x[i + half]
        y[i] = x1 * math.cos(angle) + x2 * math.sin(angle)
        y[i + half] = x2 * math.cos(angle) - x1 * math.sin(angle)
    return y


def frequencies(cfg):
    """(radians per position of each pair, attention factor): rope_scaling's, or the plain ones."""
    return rope_frequencies(cfg["n_qkv"] // cfg["n_head"], option(cfg, "rope_scaling", None), cfg["block_size"])


def rotary_and_norm(cfg, x):
    """x (T, D) -> (T, D): RoPE of each head of each token at the token's position, then its norm over d."""
    y = np.empty_like(x)
    frequency, _ = frequencies(cfg)
    for t in range(len(x)):
        for head in heads(x.shape[1], cfg["n_head"]):
            y[t, head] = norm(rotary(x[t, head], t, frequency))
    return y


def heads(width, n_head):
    """The slices of `width` channels that are the heads, in order."""
    d = width // n_head
    return [slice(h * d, (h + 1) * d) for h in range(n_head)]


def power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 if n <= 1 else 2 * power_of_two((n + 1) // 2)


def chunk_size(cfg):
    """retention_chunk, by default 8C (v0: C) up to a power of two, at most block_size/2, at least 16."""
    widths = 1 if option(cfg, "arch", "strawberry") == "strawberry-v0" else 8
    default = max(16, min(power_of_two(widths * cfg["n_embd"]), cfg["block_size"] // 2))
    return option(cfg, "retention_chunk", default)


# ---- 2 mixers: each maps q, k, v of one row, (T, D), to y (T, D) --------------------------------------------------


def softmax_attention(q, k, v, n_head, n_kv_head=None, window=None):
    """softmax(q kᵀ/√d) v per head, token t sees t−window+1 … t. k, v: (T, n_kv_head · d), n_kv_head = H by default."""
    n_kv_head = n_kv_head or n_head
    q_heads, kv_heads = heads(q.shape[1], n_head), heads(k.shape[1], n_kv_head)
    d = q.shape[1] // n_head
    y = np.zeros((len(q), n_head * d))
    for h in range(n_head):
        kv = kv_heads[h // (n_head // n_kv_head)]
        for t in range(len(q)):
            seen = [s for s in range(t + 1) if window is None or t - s < window]
            p = softmax(np.array([q[t, q_heads[h]] @ k[s, kv] / math.sqrt(d) for s in seen]))
            y[t, q_heads[h]] = sum(p_s * v[s, kv] for p_s, s in zip(p, seen, strict=True))
    return y


def kv_attention(k, v, n_head, window=None):
    """Softmax attention with q = k (arXiv 2305.19129)."""
    return softmax_attention(k, k, v, n_head, window=window)


def lam(q, k, v, n_head):
    """Linear attention mechanism (arXiv 2007.14902), causal, per head."""
    y = np.zeros_like(v)
    for head in heads(q.shape[1], n_head):
        for t in range(len(q)):
            q_hat = unit(q[t, head])
            sum_v = sum(v[s, head] for s in range(t + 1))
            sum_kv = sum(np.outer(unit(k[s, head]), v[s, head]) for s in range(t + 1))  # (d, d)
            sum_k = sum(unit(k[s, head]) for s in range(t + 1))
            y[t, head] = (sum_v + q_hat @ sum_kv) / max((t + 1) + q_hat @ sum_k, 1e-6)
    return y


def unit(x):
    """x / ‖x‖, and 0 for 0."""
    return x / max(math.sqrt(x @ x), 1e-12)


def aft(q, k, v, p=None):
    """y_t = σ(q_t) ⊙ Σ_{s≤t} exp(k_s + p_{t,s}) ⊙ v_s / Σ_{s≤t} exp(k_s + p_{t,s})   (arXiv 2105.14103)

    p(t, s) is a number, or one per channel (D,); None is 0, that is `simple`. No maximum is subtracted: float64 carries
    exp(k) for any |k| < 700."""
    y = np.empty_like(v)
    for t in range(len(q)):
        above, below = 0.0, 0.0
        for s in range(t + 1):
            e = np.exp(k[s] + (0 if p is None else p(t, s)))
            above = above + e * v[s]
            below = below + e
        y[t] = sigmoid(q[t]) * above / below
    return y


def aft_simple_long(q, k, v):
    """`aft` with p = 0, the sums carried on from token to token: the float64 reference for very long rows."""
    y, above, below = np.empty_like(v), 0.0, 0.0
    for t in range(len(q)):
        above = above + np.exp(k[t]) * v[t]
        below = below + np.exp(k[t])
        y[t] = sigmoid(q[t]) * above / below
    return y


def aft_full_position(a, b):
    """p_{t,s} = (a bᵀ)_{t,s}"""
    return lambda t, s: a[t] @ b[s]


def aft_local_position(a, b, window):
    """As full inside the window, 0 beyond it (where the sum still runs)."""
    return lambda t, s: a[t] @ b[s] if t - s < window else 0.0


def aft_conv_position(kernel, width):
    """kernel (n_head, window): p_{t,s} of a channel is its group's tap t − s, 0 beyond the last tap."""
    n_group, taps = kernel.shape

    def p(t, s):
        if t - s >= taps:
            return np.zeros(width)
        return np.array([kernel[c // (width // n_group), t - s] for c in range(width)])

    return p


def aft_position(cfg, P, block, kind):
    """The position term of a block's AFT, by kind; its parameters lie under blocks.{l}.aft."""
    if kind == "simple":
        return None
    if kind == "full":
        return aft_full_position(P[block + "aft.a"], P[block + "aft.b"])
    if kind == "local":
        return aft_local_position(P[block + "aft.a"], P[block + "aft.b"], window_of(cfg))
    if kind == "conv":
        return aft_conv_position(P[block + "aft.kernel"], cfg["n_qkv"])
    raise ValueError(f"no such aft: {kind!r}")


# ---- 3 routing and experts ---------------------------------------------------------------------------------------


def route(xn, W, bias, n_kept):
    """The weights of all experts for one token, 0 for the dropped: xn (C,) normed, W (n_experts, C), bias (n_experts,).

    The bias touches the choice only (arXiv 2408.15664); of equals, the lower index is kept."""
    n = len(W)
    p = softmax(W @ xn)
    order = sorted(range(n), key=lambda e: (-(p[e] + bias[e]), e))
    weights = np.zeros(n)
    for e in order[:n_kept]:
        weights[e] = n * p[e]
    return weights


def window_of(cfg):
    return option(cfg, "window", max(1, cfg["block_size"] // 4))


def expert_windows(cfg):
    """One window per expert: the explicit list, or window, window/2, window/4, … not under 16."""
    if option(cfg, "windows", None):
        return cfg["windows"]
    window = window_of(cfg)
    return [max(window // 2**e, min(window, 16)) for e in range(option(cfg, "n_experts", 1))]


def expert_attention(q, k, v, n_head, windows, weights):
    """Expert e is sliding-window attention over its group of heads; its part is scaled by weights[t][e]."""
    y = np.empty_like(v)
    groups = heads(q.shape[1], len(windows))  # of H / n_experts heads each
    for e, group in enumerate(groups):
        part = softmax_attention(q[:, group], k[:, group], v[:, group], n_head // len(windows), window=windows[e])
        for t in range(len(q)):
            y[t, group] = weights[t][e] * part[t]
    return y


def block_expert_attention(cfg, P, block, q, k, v, xn):
    """Expert attention with a block's router; q and k have their rotary and norm already. xn (T, C) is routed."""
    n = option(cfg, "n_experts", 1)
    if n == 1:
        weights = np.ones((len(q), 1))
    else:
        W, bias, kept = P[block + "tea.router.weight"], P[block + "tea.router.bias"], option(cfg, "a_experts", n)
        weights = [route(xn_t, W, bias, kept) for xn_t in xn]
    _, factor = frequencies(cfg)  # squared, it multiplies the scores
    return expert_attention(q * factor**2, k, v, cfg["n_head"], expert_windows(cfg), weights)


# ---- 4 feed-forwards: one token x (C,) -> (C,) -------------------------------------------------------------------


def gelu(x):
    """x Φ(x), exact (arXiv 1606.08415)."""
    return x * np.array([(1 + math.erf(z / math.sqrt(2))) / 2 for z in x])


def relu(x):
    return np.maximum(x, 0)


def relu2(x):
    """Squared ReLU (arXiv 2109.08668)."""
    return relu(x) ** 2


def feed_forward(kind, x, W1, W2, b1=0.0, b2=0.0):
    """W1 (n_ffn, C), for swiglu (2 n_ffn, C): u above g; W2 (C, n_ffn)."""
    hidden = W1 @ x + b1
    if kind == "swiglu":
        u, g = np.split(hidden, 2)
        hidden = u * silu(g)
    else:
        hidden = {"gelu": gelu, "relu": relu, "relu2": relu2}[kind](hidden)
    return W2 @ hidden + b2


def ffn_width(kind, C):
    """The default n_ffn: 4C, for swiglu 8C/3 rounded up to a multiple of 64."""
    return 64 * math.ceil(8 * C / (3 * 64)) if kind == "swiglu" else 4 * C


def moe(kind, xn, router, bias, n_kept, experts):
    """Σ_e weight_e · FFN_e(xn) (arXiv 1701.06538). xn (C,) is normed; experts: one (W1, W2) each."""
    weights = route(xn, router, bias, n_kept)
    return sum(weights[e] * feed_forward(kind, xn, *experts[e]) for e in range(len(experts)) if weights[e] != 0)


# ---- 5 strawberry ------------------------------------------------------------------------------------------------


def naive_strawberry(cfg, params, idx):
    """Logits (B, T, V) of `arch: strawberry`. With the batch scope, rows are taken together; else each one alone."""
    P, idx = prepare(cfg, params, idx)
    if retention_is_on(cfg) and option(cfg, "retention_scope", "causal") == "batch":
        return strawberry_rows(cfg, P, idx)
    return np.concatenate([strawberry_rows(cfg, P, row[None]) for row in idx])


def prepare(cfg, params, idx):
    return float64(params), np.asarray(idx)


def strawberry_rows(cfg, P, idx):
    x = embed(P, idx)
    N = option(cfg, "recursions", 1)
    if option(cfg, "adaptive", False):
        x = adaptive_depth(cfg, P, x, N)
    else:
        all_tokens = np.ones(idx.shape, bool)
        for _ in range(N):
            x = strawberry_stack(cfg, P, x, all_tokens)
    return head(cfg, P, x)


def embed(P, idx):
    """(B, T) -> (B, T, C)"""
    return np.array([[norm(P["embed.weight"][token]) for token in row] for row in idx])


def head(cfg, P, x):
    """(B, T, C) -> (B, T, V): the tied head, with the optional softcap."""
    logits = np.array([[P["embed.weight"] @ norm(x_t) for x_t in row] for row in x])
    c = cfg.get("logit_softcap")
    return c * np.tanh(logits / c) if c else logits


def strawberry_stack(cfg, P, x, moving):
    """All blocks once, each from its base weights. moving (B, T): False where a token is frozen."""
    for layer in range(cfg["n_layer"]):
        x = strawberry_block(cfg, P, f"blocks.{layer}.", x, moving)
    return x


def adaptive_depth(cfg, P, x0, N):
    """Each token takes n of N passes, n chosen by a router at the start (arXiv 2507.10524, token choice)."""
    B, T, _ = x0.shape
    n, q_n = np.zeros((B, T), int), np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            q = softmax(P["depth.weight"] @ norm(x0[b, t]))  # q[m − 1] is the probability of m passes
            n[b, t] = 1 + max(range(N), key=lambda m, q=q: (q[m] + P["depth.bias"][m], -m))
            q_n[b, t] = q[n[b, t] - 1]
    x = x0
    for number in range(1, N + 1):
        x = strawberry_stack(cfg, P, x, moving=n >= number)
    return x0 + N * q_n[:, :, None] * (x - x0)


def retention_is_on(cfg):
    return option(cfg, "retention", "on") != "none"


def strawberry_block(cfg, P, block, x, moving):
    """R retention steps and a last step. w[b][j]: the weights that tokens of row b's chunk j use now."""
    B, T, _ = x.shape
    base = (P[block + "w_attn_qkv"], P[block + "w_attn_swiglu"], P[block + "w_attn_out"])
    w = [[base for _ in range(n_chunks(cfg, T))] for _ in range(B)]
    for i in range(1, cfg["r_layer"] + 1):
        mix = strawberry_tea if i % (option(cfg, "aft_ratio", 3) + 1) == 0 else strawberry_aft
        x, u, v = strawberry_step(cfg, P, block, mix, x, w, moving)
        if retention_is_on(cfg) and not has_memory(cfg):
            oa = retention_oa(cfg, u, v)
            out, tao = P[block + "out"], P[block + "tao"]
            w = [[update(w[b][j], oa[b][j], out, tao) for j in range(len(w[b]))] for b in range(B)]
    if cfg["r_layer"] and retention_is_on(cfg) and has_memory(cfg):
        read = np.array([read_memory(cfg, P, block + "memory.", x[b], moving[b]) for b in range(B)])
        x = np.where(moving[:, :, None], x + read, x)
    return strawberry_step(cfg, P, block, strawberry_tea, x, w, moving)[0]


def has_memory(cfg):
    return option(cfg, "retention_rule", "silu") == "delta"


def read_memory(cfg, P, M, x, moving):
    """out · read of one row (T, C), head by head and token by token. S maps keys to values."""
    T, d = len(x), cfg["memory_head"]
    H, taps, o = cfg["memory_width"] // d, P[M + "taps"], np.zeros((T, cfg["memory_width"]))
    h = np.array([norm(x_t) for x_t in x])
    z, values = h @ P[M + "w_key"].T, h @ P[M + "w_value"].T
    convolved = [z[t] + sum(taps[j] * z[t - j] for j in range(min(4, t + 1))) for t in range(T)]
    for head in range(H):
        S, channels = np.zeros((d, d)), slice(head * d, (head + 1) * d)
        offset = -4 - 5 * (head / (H - 1) if H > 1 else 0)
        key = np.zeros(d)
        for t in range(T):
            forget, write, show = (P[M + "w_gates"] @ h[t] + P[M + "gate_bias"])[head::H]
            query = smooth_unit(convolved[t][channels])
            if moving[t]:
                S = S / (1 + math.exp(forget + offset))  # exp(−softplus(z)) = 1 / (1 + e^z)
                S = S + sigmoid(write) * np.outer(key, values[t, channels] - S.T @ key)
            read = S.T @ query
            o[t, channels] = sigmoid(show) * read / np.sqrt(np.mean(read * read) + 0.01)
            key = query  # of the next token
    return o @ P[M + "out"].T


def smooth_unit(x):
    return x / np.sqrt(np.sum(x * x) + 0.01)


def n_chunks(cfg, T):
    return math.ceil(T / chunk_size(cfg))


def strawberry_step(cfg, P, block, mix, x, w, moving):
    """Mixer and SwiGLU once: x (B, T, C) -> the new x, and the u, v that the update sums (0 for frozen tokens)."""
    B, T, C = x.shape
    D, chunk = cfg["n_qkv"], chunk_size(cfg)
    x_new, u, v = x.copy(), np.zeros((B, T, C)), np.zeros((B, T, C))
    for b in range(B):
        xn = np.array([norm(x[b, t]) for t in range(T)])
        q, key, value = np.zeros((3, T, D))
        for t in range(T):
            w_qkv, _, _ = w[b][t // chunk]
            q[t], key[t], value[t] = w_qkv[:D] @ xn[t], w_qkv[D : 2 * D] @ xn[t], w_qkv[2 * D :] @ xn[t]
        y = mix(cfg, P, block, q, key, value, xn)
        for t in range(T):
            if moving[b, t]:
                _, w_swiglu, w_out = w[b][t // chunk]
                u[b, t], v[b, t] = w_swiglu[:C] @ y[t], w_swiglu[C:] @ y[t]
                u[b, t] *= group_weights(cfg, P, block, xn[t])
                x_new[b, t] = x[b, t] + w_out @ (u[b, t] * silu(v[b, t]))
    return x_new, u, v


def strawberry_aft(cfg, P, block, q, k, v, xn):
    """norm over D, no rotary."""
    return aft(norm(q), norm(k), v, aft_position(cfg, P, block, option(cfg, "aft", "simple")))


def strawberry_tea(cfg, P, block, q, k, v, xn):
    q, k = rotary_and_norm(cfg, q), rotary_and_norm(cfg, k)
    return block_expert_attention(cfg, P, block, q, k, v, xn)


def group_weights(cfg, P, block, xn):
    """(C,): what each channel of u is multiplied by; the C channels are n_ffn_experts groups in order."""
    C, n = cfg["n_embd"], option(cfg, "n_ffn_experts", 1)
    if n == 1:
        return np.ones(C)
    kept = option(cfg, "a_ffn_experts", n)
    weights = route(xn, P[block + "ffn_router.weight"], P[block + "ffn_router.bias"], kept)
    return np.array([weights[c // (C // n)] for c in range(C)])


def retention_oa(cfg, u, v):
    """oa[b][j], (C, C): what the weights of row b's chunk j are updated with, from u, v (B, T, C) of this step."""
    B, T, C = u.shape
    scale = option(cfg, "retention_scale", C**-0.5)
    if option(cfg, "retention_scope", "causal") == "batch":
        total = sum(np.outer(u[b, t], v[b, t]) for b in range(B) for t in range(T))
        return [[scale * norm(total / B)] * n_chunks(cfg, T)] * B
    oa = [[None] * n_chunks(cfg, T) for _ in range(B)]
    for b in range(B):
        for j in range(n_chunks(cfg, T)):
            total = np.zeros((C, C))
            for s in range(j * chunk_size(cfg)):  # the tokens of chunks 0 … j−1
                total += np.outer(u[b, s], v[b, s])
            oa[b][j] = scale * norm(total)
    return oa


def update(w, oa, out, tao):
    """The three new weights of one chunk, from the three old ones."""
    w_qkv, w_swiglu, w_out = w
    alpha, beta, gamma = np.abs(tao[0])
    C, D = w_qkv.shape[1], w_swiglu.shape[1]

    def f(w):
        return silu(w @ oa) @ out.T

    viewed = w_swiglu.reshape(C, 2 * D).T  # (2C, D) → (C, 2D) → (2D, C)
    unviewed = f(viewed).T.reshape(2 * C, D)
    return (
        std(w_qkv + f(w_qkv), C) * alpha,
        std(w_swiglu + unviewed, D) * beta,
        std(w_out + f(w_out), C) * gamma,
    )


# ---- 6 strawberry-v0 ---------------------------------------------------------------------------------------------


def naive_strawberry_v0(cfg, params, idx):
    """Logits (B, T, V) of `arch: strawberry-v0`. Rows are taken together only by batch-scope compaction."""
    P, idx = prepare(cfg, params, idx)
    if option(cfg, "compaction", False) and option(cfg, "compaction_scope", "causal") == "batch":
        return v0_rows(cfg, P, idx)
    return np.concatenate([v0_rows(cfg, P, row[None]) for row in idx])


def v0_rows(cfg, P, idx):
    x = embed(P, idx)
    for layer in range(cfg["n_layer"]):
        for _ in range(cfg["r_layer"]):
            x = v0_block(cfg, P, f"blocks.{layer}.", x)
    return head(cfg, P, x)


def v0_block(cfg, P, block, x):
    """(B, T, C) -> (B, T, C), once through the block."""
    B, T, C = x.shape
    D = cfg["n_qkv"]
    w_qkv, w_swiglu, w_out = P[block + "w_qkv"], P[block + "w_swiglu"], P[block + "w_out"]
    if option(cfg, "compaction", False):
        x = add_compaction(cfg, P, block, x)
    x_new = np.empty_like(x)
    for b in range(B):
        xn = np.array([norm(x[b, t]) for t in range(T)])
        qkv = np.array([w_qkv @ xn[t] for t in range(T)])
        q, k, v = rotary_and_norm(cfg, qkv[:, :D]), rotary_and_norm(cfg, qkv[:, D : 2 * D]), qkv[:, 2 * D :]
        v = aft(q, k, v, aft_position(cfg, P, block, option(cfg, "aft", "full")))
        y = block_expert_attention(cfg, P, block, q, k, v, xn)
        for t in range(T):
            u, g = w_swiglu[:C] @ y[t], w_swiglu[C:] @ y[t]
            x_new[b, t] = x[b, t] + w_out @ (u * silu(g))
    return x_new


def compact(xs, WO, WA, WT, divisor=1):
    """Y = π tanh((Oᵀ A) / divisor / √C) WT, (C, C), of any collection of tokens xs (n, C); no tokens give 0.

    WO, WA, WT (C, C) multiply from the right."""
    C = len(WO)
    total = np.zeros((C, C))
    for x in xs:
        total += np.outer(norm(x) @ WO, norm(x) @ WA)
    return math.pi * np.tanh(total / divisor / math.sqrt(C)) @ WT


def add_compaction(cfg, P, block, x):
    """x + norm(x) Y, with the Y of the token's chunk (causal) or of the whole batch."""
    B, T, C = x.shape
    WO, WA, WT = P[block + "wo"], P[block + "wa"], P[block + "wt"]
    chunk = chunk_size(cfg)
    y = np.empty_like(x)
    for b in range(B):
        for j in range(n_chunks(cfg, T)):
            if option(cfg, "compaction_scope", "causal") == "batch":
                Y = compact(x.reshape(B * T, C), WO, WA, WT)
            else:
                Y = compact(x[b, : j * chunk], WO, WA, WT, divisor=max(1, j * chunk))
            for t in range(j * chunk, min((j + 1) * chunk, T)):
                y[b, t] = x[b, t] + norm(x[b, t]) @ Y
    return y


# ---- 7 strawberry-silia ------------------------------------------------------------------------------------------


def naive_strawberry_silia(cfg, params, idx):
    """Logits (B, T, V) of `arch: strawberry-silia`, row by row."""
    P, idx = prepare(cfg, params, idx)
    return np.concatenate([head(cfg, P, silia_row(cfg, P, embed(P, row[None])[0])[None]) for row in idx])


def silia_row(cfg, P, x):
    """(T, C) -> (T, C): what leaves the last block."""
    branches = [x]
    for layer in range(cfg["n_layer"]):
        block = f"blocks.{layer}."
        ug = silia_attention(cfg, P, block + "attn1.", np.array([norm(x_t) for x_t in x]))
        C = ug.shape[1] // 2
        branches.append(silia_attention(cfg, P, block + "attn2.", ug[:, :C] * silu(ug[:, C:])))
        x = np.empty_like(x)
        for t in range(len(x)):
            a = softmax(np.array([norm(s[t]) @ P[block + "query"] for s in branches]))
            x[t] = sum(a_n * s[t] for a_n, s in zip(a, branches, strict=True))
    return x


def silia_attention(cfg, P, name, x):
    """(T, C) -> (T, n_out): sharpened attention with a sink, less the token's own value, gated, projected."""
    T, D, (tau_q, tau_k) = len(x), cfg["n_qkv"], P[name + "tau"]
    parts = np.array([P[name + "w_qkvo.weight"] @ x_t for x_t in x])
    q, k, v = rotary_and_norm(cfg, parts[:, :D]), rotary_and_norm(cfg, parts[:, D : 2 * D]), parts[:, 2 * D : 3 * D]
    _, factor = frequencies(cfg)
    scale = factor**2 / math.sqrt(D // cfg["n_head"])
    y = np.empty((T, D))
    for head_ in heads(D, cfg["n_head"]):
        for t in range(T):
            pairs = [(k[s, head_] * tau_k, v[s, head_]) for s in range(t + 1)]
            if cfg["attention_sink"]:
                pairs.append((P[name + "mixer.sink_k"][head_], P[name + "mixer.sink_v"][head_]))
            e = [math.exp(q[t, head_] * tau_q @ key * scale) for key, _ in pairs]
            y_t = sum(e_s * value for e_s, (_, value) in zip(e, pairs, strict=True)) / sum(e)
            if cfg["exclusive"]:
                own = v[t, head_] / max(math.sqrt(v[t, head_] @ v[t, head_]), 1e-6)
                y_t = y_t - (y_t @ own) * own
            y[t, head_] = y_t
    if cfg["gated"]:
        y = y * sigmoid(parts[:, 3 * D :])
    return np.array([P[name + "w_out.weight"] @ y_t for y_t in y])

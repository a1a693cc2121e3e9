"""The slow references of naive_strawberry.py against a third implementation: PyTorch's functions, the papers' formulas
in another form, and values computed by hand. Nothing here depends on model.py.

`strawberry_block_by_matrices` is one strawberry block written with whole matrices, for rows of one chunk.
"""

import math

import naive_strawberry as naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F

CFG = {"vocab_size": 11, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 8, "n_qkv": 16, "r_layer": 2}
CFG |= {"window": 5, "retention_chunk": 4, "aft_ratio": 1}
EXPERTS = {"n_experts": 2, "a_experts": 1, "windows": [5, 2], "n_ffn_experts": 4, "a_ffn_experts": 2}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def assert_close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def parameters(cfg, seed=0):
    """Random parameters of both architectures under all names; each reads its own."""
    rng = np.random.default_rng(seed)
    C, D, H, T = cfg["n_embd"], cfg["n_qkv"], cfg["n_head"], cfg["block_size"]
    N, n, m = cfg.get("recursions", 1), cfg.get("n_experts", 1), cfg.get("n_ffn_experts", 1)
    shapes = {"embed.weight": (cfg["vocab_size"], C), "depth.weight": (N, C), "depth.bias": (N,)}
    for i in range(cfg["n_layer"]):
        block = {"w_attn_qkv": (3 * D, C), "w_attn_swiglu": (2 * C, D), "w_attn_out": (C, C), "out": (C, C)}
        block |= {"tao": (1, 3), "w_qkv": (3 * D, C), "w_swiglu": (2 * C, D), "w_out": (C, C)}
        block |= {"wo": (C, C), "wa": (C, C), "wt": (C, C), "aft.a": (T, 128), "aft.b": (T, 128), "aft.kernel": (H, 3)}
        block |= {"tea.router.weight": (n, C), "tea.router.bias": (n,)}
        block |= {"ffn_router.weight": (m, C), "ffn_router.bias": (m,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: rng.normal(size=shape) * 0.4 for name, shape in shapes.items()}


def tokens(cfg, B, T, seed=0):
    return np.random.default_rng(seed).integers(cfg["vocab_size"], size=(B, T))


# ---- small parts -------------------------------------------------------------------------------------------------


def test_norm_and_std_equal_torch():
    x = normal(7, 6)
    assert_close(naive.norm(x), F.rms_norm(torch.tensor(x), (6,), eps=1e-6))
    assert_close(naive.std(x, 9), torch.tensor(x) / 3 / (torch.tensor(x).std() + 1e-8))


def test_rotary_is_a_product_of_complex_numbers():
    """Half-split pairs as complex numbers x1 + i·x2, multiplied by e^(−i·angle): y1 = x1·cos + x2·sin."""
    x, t = normal(8), 13
    z = (x[:4] + 1j * x[4:]) * np.exp(-1j * t * 10000.0 ** (-np.arange(4) / 4))
    assert_close(naive.rotary(x, t), np.concatenate([z.real, z.imag]))


def test_default_chunk():
    for C, block_size, chunk in [(16, 64, 16), (17, 64, 32), (48, 256, 64), (256, 256, 128), (8, 64, 16), (64, 20, 16)]:
        assert naive.chunk_size({"arch": "strawberry-v0", "n_embd": C, "block_size": block_size}) == chunk
    for C, block_size, chunk in [(16, 512, 128), (17, 1024, 256), (16, 64, 32), (2, 1024, 16), (64, 20, 16)]:
        assert naive.chunk_size({"n_embd": C, "block_size": block_size}) == chunk
    assert naive.chunk_size({"n_embd": 64, "block_size": 256, "retention_chunk": 3}) == 3


def test_feed_forward_equals_torch():
    x, W1, W2 = normal(6), normal(10, 6), normal(6, 10)
    hidden = torch.tensor(W1 @ x)
    for kind, activation in [("gelu", F.gelu), ("relu", F.relu), ("relu2", lambda h: F.relu(h).square())]:
        assert_close(naive.feed_forward(kind, x, W1, W2), W2 @ activation(hidden).numpy())
    assert_close(naive.feed_forward("swiglu", x, W1, W2[:, :5]), W2[:, :5] @ (hidden[:5] * F.silu(hidden[5:])).numpy())
    assert [naive.ffn_width("swiglu", C) for C in (24, 25, 64, 384)] == [64, 128, 192, 1024]
    assert naive.ffn_width("gelu", 10) == 40


# ---- mixers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_softmax_attention_equals_torch(n_kv_head, window):
    T, H, d = 13, 4, 6
    q, k, v = normal(T, H * d), normal(T, n_kv_head * d, seed=1), normal(T, n_kv_head * d, seed=2)
    age = torch.arange(T)[:, None] - torch.arange(T)
    mask = (age >= 0) & (age < (window or T))
    Q, K, W = (torch.tensor(a).view(T, -1, d).transpose(0, 1) for a in (q, k, v))
    y = F.scaled_dot_product_attention(Q[None], K[None], W[None], attn_mask=mask, enable_gqa=True)[0]
    assert_close(naive.softmax_attention(q, k, v, H, n_kv_head, window), y.transpose(0, 1).reshape(T, H * d))


def test_kv_attention_is_attention_of_k_to_k():
    k, v = normal(9, 8), normal(9, 8, seed=1)
    K, W = (torch.tensor(a).view(9, 2, 4).transpose(0, 1)[None] for a in (k, v))
    y = F.scaled_dot_product_attention(K, K, W, is_causal=True)[0].transpose(0, 1).reshape(9, 8)
    assert_close(naive.kv_attention(k, v, 2), y)


def test_lam_is_attention_with_one_plus_cosine():
    """arXiv 2007.14902, eq. 14: y_t = Σ_s (1 + q̂·k̂_s) v_s / Σ_s (1 + q̂·k̂_s)."""
    q, k, v = normal(9, 8), normal(9, 8, seed=1), normal(9, 8, seed=2)
    Q, K, W = (torch.tensor(a).view(9, 2, 4).transpose(0, 1) for a in (q, k, v))
    weight = (1 + F.normalize(Q, dim=-1) @ F.normalize(K, dim=-1).mT).tril()
    y = weight @ W / weight.sum(-1, keepdim=True)
    assert_close(naive.lam(q, k, v, 2), y.transpose(0, 1).reshape(9, 8))


def test_aft_is_the_quadratic_formula():
    """All kinds at once as one (T, T, D) tensor of exponents."""
    T, D = 12, 8
    q, k, v = normal(T, D), normal(T, D, seed=1), normal(T, D, seed=2)
    a, b, kernel = normal(T, 5), normal(T, 5, seed=1), normal(2, 3)
    age = np.arange(T)[:, None] - np.arange(T)
    full = np.repeat((a @ b.T)[:, :, None], D, axis=2)
    conv = np.where((age < 3)[:, :, None], np.repeat(kernel.T[np.clip(age, 0, 2)], D // 2, axis=2), 0)
    for position, p in [
        (None, np.zeros((T, T, D))),
        (naive.aft_full_position(a, b), full),
        (naive.aft_local_position(a, b, 4), full * (age < 4)[:, :, None]),
        (naive.aft_conv_position(kernel, D), conv),
    ]:
        weight = torch.tensor(k[None] + p).masked_fill(torch.tensor(age < 0)[:, :, None], -math.inf).softmax(dim=1)
        assert_close(naive.aft(q, k, v, position), torch.tensor(q).sigmoid() * (weight * torch.tensor(v)).sum(1))
    assert_close(naive.aft_simple_long(q, k, v), naive.aft(q, k, v))


# ---- routing -----------------------------------------------------------------------------------------------------


def test_routing_keeps_the_largest_ties_go_low_and_the_bias_only_chooses():
    p = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    W, x = np.log(p)[:, None], np.ones(1)
    assert_close(naive.route(x, W, np.zeros(4), 1), [2, 0, 0, 0])
    assert_close(naive.route(x, W, np.zeros(4), 3), [2, 1, 1 / 2, 0])
    assert_close(naive.route(x, W, np.array([0, 0, 0, 1]), 2), [2, 0, 0, 1 / 2])
    assert_close(naive.route(x, np.zeros((4, 1)), np.zeros(4), 2), [1, 1, 0, 0])


def test_expert_windows_halve_down_to_16():
    windows = {(64, 4): [64, 32, 16, 16], (50, 3): [50, 25, 16], (8, 2): [8, 8], (100, 1): [100]}
    for (window, n), expected in windows.items():
        assert naive.expert_windows({"window": window, "n_experts": n, "block_size": 256}) == expected
    assert naive.expert_windows({"windows": [3, 1], "n_experts": 2, "block_size": 256}) == [3, 1]
    assert naive.expert_windows({"block_size": 256}) == [64]


def test_expert_attention_is_masked_attention_per_group_of_heads():
    T, H, d = 10, 4, 4
    q, k, v = normal(T, H * d), normal(T, H * d, seed=1), normal(T, H * d, seed=2)
    weights = np.array([[t % 2, 2 * (t % 3)] for t in range(T)])
    age = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.stack([(age >= 0) & (age < w) for w in (6, 6, 3, 3)])
    Q, K, W = (torch.tensor(a).view(T, H, d).transpose(0, 1) for a in (q, k, v))
    y = F.scaled_dot_product_attention(Q, K, W, attn_mask=mask).transpose(0, 1).reshape(T, H * d).numpy()
    assert_close(naive.expert_attention(q, k, v, H, [6, 3], weights), y * np.repeat(weights, 8, axis=1))


def test_moe_is_the_weighted_sum_of_the_kept():
    x, router = normal(6), normal(3, 6)
    experts = [(normal(5, 6, seed=e), normal(6, 5, seed=e)) for e in range(3)]
    p = torch.tensor(router @ x).softmax(0).numpy()
    order = np.argsort(-p)[:2]
    expected = sum(3 * p[e] * (experts[e][1] @ np.maximum(experts[e][0] @ x, 0)) for e in order)
    assert_close(naive.moe("relu", x, router, np.zeros(3), 2, experts), expected)


# ---- strawberry --------------------------------------------------------------------------------------------------


def rms(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rope_and_norm(x):
    """x (B, T, H, 4): rotary as complex numbers, then the norm of each head."""
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(2) / 2)
    x = torch.complex(x[..., :2], x[..., 2:]) * torch.tensor(np.exp(-1j * angle))[:, None]
    return rms(torch.cat([x.real, x.imag], -1))


def attention(q, k, v):
    """(B, T, H, d) each -> (B, T, D)"""
    y = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True)
    return y.transpose(1, 2).flatten(2)


def strawberry_block_by_matrices(P, idx, scale, H=4, D=16):
    """One block, R = 2 (AFT, then TEA with an endless window), one oa for all rows, from the whole batch."""
    P = {name.removeprefix("blocks.0."): torch.tensor(p) for name, p in P.items()}
    (B, T), C = idx.shape, P["out"].shape[0]
    w = [P["w_attn_qkv"], P["w_attn_swiglu"], P["w_attn_out"]]

    def tea(q, k, v):
        q, k, v = (a.view(B, T, H, D // H) for a in (q, k, v))
        return attention(rope_and_norm(q), rope_and_norm(k), v)

    def aft(q, k, v):
        e = rms(k).exp()
        return rms(q).sigmoid() * (e * v).cumsum(1) / e.cumsum(1)

    x = rms(P["embed.weight"][torch.tensor(idx)])
    for mixer in (aft, tea, tea):
        y = mixer(*(rms(x) @ w[0].T).split(D, dim=-1))
        u, v = (y @ w[1].T).split(C, dim=-1)
        x = x + (u * F.silu(v)) @ w[2].T
        oa = scale * rms(torch.einsum("btc,btd->cd", u, v) / B)
        views = [w[0], w[1].view(C, 2 * D).T, w[2]]
        new = [m + F.silu(m @ oa) @ P["out"].T for m in views]
        new[1] = new[1].T.reshape(2 * C, D)
        w = [m / (m.std() + 1e-8) * n**-0.5 * g for m, n, g in zip(new, (C, D, C), P["tao"][0].abs(), strict=True)]
    return rms(x) @ P["embed.weight"].T


@pytest.mark.parametrize("scale", [None, 1.0])
def test_batch_scope_equals_whole_matrices(scale):
    cfg = CFG | {"n_layer": 1, "window": 99, "retention_chunk": 16, "retention_scope": "batch"}
    P, idx = parameters(cfg), tokens(cfg, 3, 9)
    P["blocks.0.tao"] = np.array([[0.7, -1.3, -0.4]])
    expected = strawberry_block_by_matrices(P, idx, scale or 8**-0.5)
    for chunk in (16, 2):
        cfg |= {"retention_scale": scale, "retention_chunk": chunk}
        assert_close(naive.naive_strawberry(cfg, P, idx), expected, 1e-10)


def test_the_first_chunk_is_only_rescaled():
    cfg = CFG | {"n_layer": 1, "window": 99, "retention_chunk": 9}
    P, idx = parameters(cfg), tokens(cfg, 2, 9)
    assert_close(naive.naive_strawberry(cfg, P, idx), strawberry_block_by_matrices(P, idx, 0.0), 1e-10)
    longer = np.concatenate([idx, tokens(cfg, 2, 4)], axis=1)
    assert_close(naive.naive_strawberry(cfg, P, longer)[:, :9], strawberry_block_by_matrices(P, idx, 0.0), 1e-10)


def gates(logits, bias, n_active):
    """(T, n) -> n · p of the kept by p + bias, 0 elsewhere."""
    p = torch.tensor(logits).softmax(-1)
    chosen = (p + torch.tensor(bias)).topk(n_active).indices
    return torch.zeros_like(p).scatter(1, chosen, p.gather(1, chosen) * p.shape[1]).numpy()


def test_a_step_routes_heads_and_channels_by_the_norm_of_its_x():
    """q = k = 0 makes attention the mean of the window; two heads of four channels per expert, groups of two channels.
    u carries its group's weight, v doesn't."""
    cfg = CFG | EXPERTS
    P, x = parameters(cfg), normal(1, 4, 8)
    P["blocks.0.w_attn_qkv"][:32] = 0
    w = tuple(P["blocks.0." + name] for name in ("w_attn_qkv", "w_attn_swiglu", "w_attn_out"))
    xn = rms(torch.tensor(x[0])).numpy()
    tea = gates(xn @ P["blocks.0.tea.router.weight"].T, P["blocks.0.tea.router.bias"], 1)
    ffn = gates(xn @ P["blocks.0.ffn_router.weight"].T, P["blocks.0.ffn_router.bias"], 2)
    value = xn @ w[0][32:].T
    means = [np.concatenate([value[: t + 1, :8].mean(0), value[max(0, t - 1) : t + 1, 8:].mean(0)]) for t in range(4)]
    y = np.array(means) * np.repeat(tea, 8, axis=1)
    u, v = (y @ w[1][:8].T) * np.repeat(ffn, 2, axis=1), y @ w[1][8:].T
    expected = x[0] + (u * F.silu(torch.tensor(v)).numpy()) @ w[2].T
    all_tokens = np.ones((1, 4), bool)
    results = naive.strawberry_step(cfg, P, "blocks.0.", naive.strawberry_tea, x, [[w]], all_tokens)
    for result, value in zip(results, (expected, u, v), strict=True):
        assert_close(result[0], value)


def test_a_later_chunk_uses_the_finished_chunks_only():
    """Two chunks of 4, one step back: the second chunk's oa is the sum over the four tokens of the first."""
    u, v = normal(1, 7, 8), normal(1, 7, 8, seed=1)
    first, second = naive.retention_oa(CFG | {"retention_scale": 0.5}, u, v)[0]
    assert_close(first, np.zeros((8, 8)))
    assert_close(second, 0.5 * rms(torch.tensor(u[0, :4].T @ v[0, :4])))


CAUSAL = {
    "plain": {},
    "no retention": {"retention": "none"},
    "no steps": {"r_layer": 0},
    "experts": EXPERTS,
    "aft full": {"aft": "full"},
    "aft local": {"aft": "local"},
    "aft conv": {"aft": "conv"},
    "recursions": {"recursions": 2},
    "adaptive": {"recursions": 3, "adaptive": True, **EXPERTS},
}
V0 = {
    "v0": {},
    "v0 compaction": {"compaction": True, "aft": "simple"},
    "v0 experts": {"compaction": True, **EXPERTS},
}


@pytest.mark.parametrize("name", [*CAUSAL, *V0])
def test_causal_and_row_independent(name):
    reference = naive.naive_strawberry if name in CAUSAL else naive.naive_strawberry_v0
    cfg = CFG | (CAUSAL | V0)[name]
    P, idx = parameters(cfg), tokens(cfg, 2, 11)
    other = idx.copy()
    other[0, 6], other[1] = (idx[0, 6] + 1) % 11, (idx[1] + 1) % 11
    a, b = reference(cfg, P, idx), reference(cfg, P, other)
    assert np.array_equal(a[0, :6], b[0, :6])
    assert (np.abs(a[0, 6:] - b[0, 6:]).max(-1) > 1e-9).all()
    assert np.array_equal(reference(cfg, P, idx[:1]), a[:1])
    assert_close(reference(cfg, P, idx[:, :7]), a[:, :7])


@pytest.mark.parametrize("option", [{"retention_scope": "batch"}, {"compaction": True, "compaction_scope": "batch"}])
def test_batch_scopes_see_the_future_and_the_other_rows(option):
    reference = naive.naive_strawberry_v0 if "compaction" in option else naive.naive_strawberry
    cfg = CFG | option
    P, idx = parameters(cfg), tokens(cfg, 2, 11)
    other = idx.copy()
    other[1, 10] = (idx[1, 10] + 1) % 11
    changed = np.abs(reference(cfg, P, idx) - reference(cfg, P, other)).max(-1)
    assert (changed > 1e-9).all()


def test_every_option_changes_the_result():
    idx = tokens(CFG, 1, 11)
    cfgs = [CFG | extra for extra in CAUSAL.values()]
    cfgs += [CFG | {"aft_ratio": 0}, CFG | {"retention_scale": 1.0}, CFG | {"logit_softcap": 2.0}]
    results = [naive.naive_strawberry(cfg, parameters(CFG | cfg), idx) for cfg in cfgs]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert np.abs(a - b).max() > 1e-6


def test_softcap():
    P, idx = parameters(CFG), tokens(CFG, 1, 5)
    logits = naive.naive_strawberry(CFG, P, idx)
    assert_close(naive.naive_strawberry(CFG | {"logit_softcap": 2.0}, P, idx), 2 * np.tanh(logits / 2))


def test_recursion_repeats_the_stack_from_its_base_weights():
    P, idx = parameters(CFG), tokens(CFG, 1, 11)
    x, all_tokens = naive.embed(P, idx), np.ones(idx.shape, bool)
    twice = naive.strawberry_stack(CFG, P, naive.strawberry_stack(CFG, P, x, all_tokens), all_tokens)
    assert_close(naive.naive_strawberry(CFG | {"recursions": 2}, P, idx), naive.head(CFG, P, twice))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_adaptive_with_one_depth_for_all_is_that_many_recursions(n):
    """The bias forces n passes on every token; a zero router gives q = 1/3, so that the result is x_n itself."""
    cfg = CFG | {"recursions": 3, "adaptive": True}
    P, idx = parameters(cfg), tokens(cfg, 1, 11)
    P["depth.weight"][:], P["depth.bias"][:] = 0, np.eye(3)[n - 1]
    plain = naive.naive_strawberry(CFG | {"recursions": n}, P, idx)
    assert_close(naive.naive_strawberry(cfg, P, idx), plain, 1e-10)
    P["depth.bias"][:] = 0  # all tied: one pass
    assert_close(naive.naive_strawberry(cfg, P, idx), naive.naive_strawberry(CFG, P, idx), 1e-10)


def test_a_frozen_token_is_seen_and_leaves_oa_alone():
    """Frozen: x stays. Seen: later tokens change with its x. Out of oa: u and v are zero."""
    P = parameters(CFG)
    x, moving = normal(1, 6, 8), np.array([[True, True, False, True, True, True]])
    base = tuple(P["blocks.0." + name] for name in ("w_attn_qkv", "w_attn_swiglu", "w_attn_out"))
    w = [[base, base]]
    for mix in (naive.strawberry_aft, naive.strawberry_tea):
        free, _, _ = naive.strawberry_step(CFG, P, "blocks.0.", mix, x, w, np.ones((1, 6), bool))
        frozen, u, v = naive.strawberry_step(CFG, P, "blocks.0.", mix, x, w, moving)
        assert np.array_equal(frozen[0, 2], x[0, 2]) and not u[0, 2].any() and not v[0, 2].any()
        assert_close(np.delete(frozen, 2, axis=1), np.delete(free, 2, axis=1))


# ---- strawberry-v0 -----------------------------------------------------------------------------------------------


def v0_block_by_matrices(P, idx, compaction, H=4, D=16):
    """One block, once, with whole matrices: AFT-simple, endless window, batch-scope compaction if asked for."""
    P = {name.removeprefix("blocks.0."): torch.tensor(p) for name, p in P.items()}
    (B, T), C = idx.shape, P["wo"].shape[0]
    x = rms(P["embed.weight"][torch.tensor(idx)])
    if compaction:
        o, a = (rms(x) @ P["wo"]).view(B * T, C), (rms(x) @ P["wa"]).view(B * T, C)
        x = x + rms(x) @ (math.pi * torch.tanh((o.T @ a) / math.sqrt(C)) @ P["wt"])
    q, k, v = (a.view(B, T, H, D // H) for a in (rms(x) @ P["w_qkv"].T).split(D, dim=-1))
    q, k = rope_and_norm(q), rope_and_norm(k)
    v = q.sigmoid() * (k.exp() * v).cumsum(1) / k.exp().cumsum(1)
    u, g = (attention(q, k, v) @ P["w_swiglu"].T).split(C, dim=-1)
    return rms(x + (u * F.silu(g)) @ P["w_out"].T) @ P["embed.weight"].T


@pytest.mark.parametrize("compaction", [False, True])
def test_v0_equals_whole_matrices(compaction):
    cfg = CFG | {"n_layer": 1, "r_layer": 1, "window": 99, "aft": "simple"}
    P, idx = parameters(cfg), tokens(cfg, 3, 9)
    cfg |= {"compaction": compaction, "compaction_scope": "batch"}
    assert_close(naive.naive_strawberry_v0(cfg, P, idx), v0_block_by_matrices(P, idx, compaction))


def test_causal_compaction_is_the_mean_over_the_finished_chunks():
    P, x = parameters(CFG), normal(2, 10, 8)
    y = naive.add_compaction(CFG, P, "blocks.0.", x)
    assert_close(y[:, :4], x[:, :4])
    X, (WO, WA, WT) = torch.tensor(x), (torch.tensor(P["blocks.0." + name]) for name in ("wo", "wa", "wt"))
    mean = ((rms(X[1, :8]) @ WO).T @ (rms(X[1, :8]) @ WA)) / 8
    assert_close(y[1, 8:], X[1, 8:] + rms(X[1, 8:]) @ (math.pi * torch.tanh(mean / math.sqrt(8)) @ WT))

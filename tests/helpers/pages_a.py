"""What the Python of pages in docs/architectures is compared with; tests/test_architecture_pages.py runs it."""

import torch
from pages_b import C, T, context, fill, randn
from torch.testing import assert_close

import model
from strawberry import ops
from strawberry.cache import RingKVCache
from strawberry.context import EncodedSource, ForwardContext, Mode
from strawberry.ops.masks import AttentionPattern, LongformerPattern


def compare_attention(page: dict) -> None:
    for heads in (4, 2, 1):
        q, k, v = randn(1, T, 4 * 6), randn(1, T, heads * 6), randn(1, T, heads * 6)
        ours = ops.attention(q, k, v, 6, AttentionPattern(), context(), None, scale=6**-0.5)
        assert_close(page["causal_attention"](q[0], k[0], v[0], 6), ours[0])


def compare_masks(page: dict) -> None:
    positions = torch.arange(40)
    for window, n_global in ((7, 3), (1, 1), (50, 0)):
        ours = LongformerPattern(window, n_global).mask(positions[None], positions[None])[0, 0]
        assert torch.equal(page["longformer_mask"](positions, window, n_global), ours)
        ours = LongformerPattern(window, n_global).mask(positions[None], positions[None], causal=False)[0, 0]
        assert torch.equal(page["longformer_mask"](positions, window, n_global, causal=False), ours)
    window = AttentionPattern(7).mask(positions[None], positions[None])[0, 0]
    assert torch.equal(page["longformer_mask"](positions, 7, 0), window)


def compare_cross_attention(page: dict) -> None:
    config = model.TransformerConfig(attention_type="GQA", n_embd=C, n_qkv=C, n_head=4, n_kv_head=2, bias=False)
    layer = fill(model.CrossAttention(config))
    layer.wo.weight.copy_(torch.eye(C))
    x, z = randn(1, T, C), randn(1, 5, C)
    for padding in ([False] * 5, [False, True, False, True, True], [True] * 5):
        source = EncodedSource(z, torch.tensor([padding]))
        ours = layer(x, ForwardContext(torch.arange(T)[None], source=source), None)[0]
        parts = (layer.wq(x)[0], layer.wk(z)[0], layer.wv(z)[0])
        assert_close(page["cross_attention"](*parts, torch.tensor(padding), 4), ours)


def compare_positions(page: dict) -> None:
    x, positions = randn(T, 3, 8), torch.arange(T) + 1000
    rope = model.Rope(ops.rope_frequencies(8, ops.RopeScaling(), 64)[0]).double()
    ours = ops.apply_rope(x.unsqueeze(0), rope(positions.unsqueeze(0)))
    assert_close(page["rotate"](x, positions), ours[0])
    added = model.SinusoidalPositions(model.TransformerConfig(n_embd=C, n_qkv=C)).double()
    ours = added(torch.zeros(1, T, C).double(), ForwardContext(positions.unsqueeze(0)))
    assert_close(page["sinusoidal"](positions, C), ours[0])


def compare_kv_cache(page: dict) -> None:
    q, k, v = (randn(1, 20, 8) for _ in range(3))
    whole = ops.attention(q, k, v, 8, AttentionPattern(5), context(20), None, scale=8**-0.5)[0]
    keys, values = torch.zeros(5, 8).double(), torch.zeros(5, 8).double()
    cache = RingKVCache(1, "cpu", torch.float64, 5, k=8, v=8)
    for t in range(20):
        y = page["decode"](keys, values, q[0, t], k[0, t], v[0, t], t)
        ctx = ForwardContext(torch.tensor([[t]]), Mode.DECODE, num_cached=t, max_cached_tokens=t)
        one = (x[:, t : t + 1] for x in (q, k, v))
        assert_close(ops.attention(*one, 8, AttentionPattern(5), ctx, cache, scale=8**-0.5)[0, 0], y)
        assert_close(y, whole[t])
        assert torch.equal(cache.k[0, :5], keys) and torch.equal(cache.v[0, :5], values)


def compare_aft(page: dict) -> None:
    q, k, v = (randn(1, 50, C) for _ in range(3))
    for scale in (1, 800):  # exp(800) is no float64
        ours = ops.aft_simple(q, scale * k, v, context(50))[0]
        for name in ("aft", "aft_simple"):
            assert_close(page[name](q[0], scale * k[0], v[0]), ours)
    a, b, taps = randn(50, 128) / 8, randn(50, 128) / 8, randn(4, 7)
    distance = (torch.arange(50)[:, None] - torch.arange(50)).clamp(min=0)  # later tokens are hidden
    full = (a @ b.T).unsqueeze(-1)
    near = (distance < 7).unsqueeze(-1)
    conv = taps[:, distance.clamp(max=6)].movedim(0, -1).repeat_interleave(C // 4, dim=-1)
    kinds = [(full, ops.LowRankBias(a, b)), (full * near, ops.LowRankBias(a, b, 7)), (conv * near, ops.ConvBias(taps))]
    for p, bias in kinds:
        assert_close(page["aft"](q[0], k[0], v[0], p), ops.aft_positional(q, k, v, bias, context(50))[0])


def compare_tea(page: dict) -> None:
    config = model.StrawberryConfig(n_embd=C, n_qkv=24, n_head=6, n_experts=3, a_experts=2, windows=[9, 4, 2])
    layer = fill(model.ExpertAttention(config, ops.no_transform))
    q, k, v, x = randn(1, 30, 24), randn(1, 30, 24), randn(1, 30, 24), randn(1, 30, C)
    weight = layer.router(x, context(30))[0]
    ours = layer(q, k, v, x, context(30), None)[0]
    assert_close(page["expert_attention"](q[0], k[0], v[0], weight, [9, 4, 2], 4), ours)


def compare_retention(page: dict) -> None:
    D = 12
    w = ops.BlockWeights(randn(3 * D, C), randn(2 * C, D), randn(C, C))
    total, out, tao = randn(C, C), randn(C, C), randn(1, 3)
    from strawberry.ops.common import norm

    ours = ops.retention_update(w, 0.3 * norm(total), out, tao)
    for plain, fused in zip(page["retention_update"](*w, total, out, tao[0], 0.3), ours, strict=True):
        assert_close(plain, fused)


def compare_delta_memory(page: dict) -> None:
    config = model.StrawberryConfig(n_embd=C, n_head=1, memory_head=4, memory_width=8, retention_rule="delta",
                                    retention_chunk=8)  # fmt: skip
    layer, x = fill(model.Memory(config)), randn(1, 30, C)
    tensors = layer.w_key, layer.w_value, layer.w_gates, layer.gate_bias, layer.taps, layer.out
    assert_close(page["delta_memory"](x[0], *tensors, 4), layer(x, context(30), None)[0])


def compare_recursion(page: dict) -> None:
    router = fill(model.Router(C, 4, 1))
    router.bias.copy_(randn(4) / 4)
    matrix, x = randn(C, C) / 4, randn(1, 30, C)
    assert len(router.choose(x, context(30))[1].sum(dim=(0, 1)).nonzero()) > 1  # tokens differ in depth
    run = lambda x, ctx, cache: ctx.keep_frozen(x, x + torch.tanh(x @ matrix))  # noqa: E731
    ours = model.run_recursions(run, x, context(30), None, 4, router)[0]
    plain = page["adaptive_passes"](x[0], lambda x: x + torch.tanh(x @ matrix), router.weight, router.bias)
    assert_close(plain, ours)


COMPARISONS = {
    "attention.md": compare_attention,
    "masks.md": compare_masks,
    "cross-attention.md": compare_cross_attention,
    "positions.md": compare_positions,
    "kv-cache.md": compare_kv_cache,
    "aft.md": compare_aft,
    "tea.md": compare_tea,
    "retention.md": compare_retention,
    "delta-memory.md": compare_delta_memory,
    "recursion.md": compare_recursion,
}

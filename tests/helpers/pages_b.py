"""What the Python of pages in docs/architectures is compared with; tests/test_architecture_pages.py runs it."""

import numpy as np
import torch
from torch.testing import assert_close

import model
import optimizer
from strawberry import ops
from strawberry.context import ForwardContext
from strawberry.data.objectives import SpanCorruption
from strawberry.ops import cross_entropy
from strawberry.ops.common import norm

T, C = 9, 16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 and eval mode, its parameters drawn from a normal distribution."""
    module = module.double().eval().requires_grad_(False)
    for p in module.parameters():
        p.copy_(randn(*p.shape))
    return module


def context(length: int = T) -> ForwardContext:
    return ForwardContext(torch.arange(length).unsqueeze(0), chunk_size=length)


def compare_compaction(page: dict) -> None:
    x, *weights = randn(T, C), *(randn(C, C) for _ in range(3))
    assert_close(page["compact"](x, *weights), model.compact(x, *weights))


def compare_attention_on_detail(page: dict) -> None:
    config = model.PalmConfig(n_embd=C, n_qkv=8, n_head=2, d_rank=None, attention_type="lam")
    layer = fill(model.AttentionOnDetail(config))
    layer.mixer.qk_transform = ops.no_transform
    x, ctx = randn(2, T, C), context()
    mixer = lambda q, k, v: layer.mixer(q, k, v, x, ctx, None)  # noqa: E731
    ours = layer(x, ctx, None)
    assert_close(page["attention_on_detail"](x, layer.w1.weight, layer.w2.weight, layer.out.weight, mixer), ours)


def compare_lam(page: dict) -> None:
    layer = model.LAM(model.PalmConfig(n_qkv=8, n_head=1), ops.no_transform)
    q, k, v = (randn(1, 600, 8) for _ in range(3))  # more than two segments
    assert_close(page["linear_attention"](q[0], k[0], v[0]), layer(q, k, v, q, context(600), None)[0])


def compare_kv_attention(page: dict) -> None:
    config = model.TransformerConfig(
        kind="decoder", attention_type="kv", n_embd=C, n_qkv=8, n_head=2, bias=False, pos_encoding="None"
    )
    layer = fill(model.make_attention(config, 0))
    layer.wo.weight.copy_(torch.eye(C)[:, :8])  # only the first 8 channels, as they are
    x = randn(1, T, C)
    ours = layer(x, context(), None)[0, :, :8]
    assert_close(page["kv_attention"](x[0], layer.wk.weight, layer.wv.weight, 2), ours)


def compare_mhla(page: dict) -> None:
    config = model.TinyStarConfig(attention_type="MHLA", n_embd=C, n_qkv=C, n_head=2, kv_rank=6, rope_dim=4)
    layer = fill(model.LatentAttention(config, model.attention_pattern(config, 0)))
    q, q_rope, latent, k_rope = randn(1, T, 2, 8), randn(1, T, 2, 4), randn(1, T, 6), randn(1, T, 4)
    wk, wv = layer.wkv_b.weight.unflatten(0, (2, 2, 8)).unbind(dim=1)
    plain = page["latent_attention"](q[0], q_rope[0], latent[0], k_rope[0], wk, wv)
    assert_close(plain, layer.expanded(q, q_rope, latent, k_rope.unsqueeze(2), context())[0])
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    assert_close(plain, layer.absorbed(q, q_rope, latent, k_rope, mask)[0])


def compare_moe(page: dict) -> None:
    router = fill(model.Router(C, 6, 2))
    router.bias.copy_(randn(6) / 4)
    x = randn(40, C)
    weights = page["route"](x, router.weight, router.bias, 2)
    assert ((weights > 0).sum(-1) == 2).all()
    assert_close(weights, router(x.unsqueeze(0), context(40))[0])


def compare_feed_forward(page: dict) -> None:
    layer = fill(model.FeedForward(model.TinyStarConfig(n_embd=C, ffn_type="SwiGLU", n_ffn=24)))
    x = randn(2, T, C)
    assert_close(page["swiglu_feed_forward"](x, layer.w1.weight, layer.w2.weight), layer(x, context()))


def compare_norms(page: dict) -> None:
    x, layer = randn(2, T, C), fill(model.RMSNorm(C))
    assert_close(page["rms_norm"](x), norm(x))
    assert_close(page["rms_norm"](x, layer.weight), layer(x))


def compare_losses(page: dict) -> None:
    x, w, targets = randn(1, 30, C).requires_grad_(), randn(11, C).requires_grad_(), torch.randint(-1, 11, (30,))
    assert (targets < 0).any()
    loss, grad_x, grad_w = page["linear_cross_entropy"](x.detach()[0], w.detach(), targets)
    fused = cross_entropy.FusedLinearCrossEntropy.apply(x[0], w, targets, None, False, False)
    assert_close(loss, fused.detach())
    for ours in (fused, ops.linear_cross_entropy(x, w, targets, None)[1]):
        gradients = torch.autograd.grad(ours, (x, w))
        assert_close(grad_x, gradients[0][0])
        assert_close(grad_w, gradients[1])


class Encoder:
    eot, vocab_size = 90, 91


class Windows:
    def read_windows(self, seed: int, first: int, count: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 90, (count, 41))


def compare_objectives(page: dict) -> None:
    batch = SpanCorruption(Encoder, 40).make_batch(Windows(), 3, 0, 5)
    for window, source, target in zip(Windows().read_windows(3, 0, 5)[:, 1:], batch.source, batch.y, strict=True):
        text, spans, place = window.tolist(), [], 0
        for token in source.tolist():  # spans lie where the source has a sentinel; the target says how long they are
            if token > Encoder.eot:
                cut = target.tolist()
                at = cut.index(token)
                length = next(i for i, t in enumerate(cut[at + 1 :]) if t >= Encoder.eot)
                spans.append((place, place + length))
                place += length
            else:
                place += 1
        assert len(spans) == 2
        wanted = page["corrupt_spans"](text, spans, Encoder.vocab_size, Encoder.eot)
        assert wanted == (source.tolist(), target.tolist())


def compare_muon(page: dict) -> None:
    for shape in ((8, 5), (5, 8), (6, 6)):
        g = randn(*shape)
        assert_close(page["orthogonalise"](g), optimizer.newton_schulz(g.unsqueeze(0))[0])


def compare_value_embeddings(page: dict) -> None:
    layer = fill(model.ValueEmbedding(model.TinyStarConfig(vocab_size=29, n_embd=40, n_qkv=24, n_head=4), 2))
    v, x, tokens = randn(1, T, 12), randn(1, T, 40), torch.randint(29, (1, T))
    ours = layer(v, x, ForwardContext(torch.arange(T)[None], tokens=tokens))[0]
    assert_close(page["add_value_embedding"](v[0], x[0], tokens[0], layer.gate, layer.table), ours)


def compare_silia(page: dict) -> None:
    config = model.StrawberrySiliaConfig(n_embd=C, n_qkv=8, n_head=2)
    mixer, ctx = fill(model.SinkSoftmax(config, ops.no_transform)), context()
    q, k, v = (randn(1, T, 8) for _ in range(3))
    y = mixer(q, k, v, v, ctx, None)
    for head in (slice(0, 4), slice(4, 8)):
        qkv = (x[0, :, head] for x in (q, k, v))
        assert_close(page["sink_attention"](*qkv, mixer.sink_k[head], mixer.sink_v[head]), y[0, :, head])
        left = page["exclude_value"](y[0, :, head], v[0, :, head])
        assert_close(left, ops.exclude_value(y, v, 4)[0, :, head])
    branches, query = randn(3, T, C), randn(C)
    assert_close(page["attention_residual"](branches, query), ops.attention_residual(branches.unsqueeze(1), query)[0])


COMPARISONS = {
    "silia.md": compare_silia,
    "value-embeddings.md": compare_value_embeddings,
    "compaction-compute.md": compare_compaction,
    "attention-on-detail.md": compare_attention_on_detail,
    "lam.md": compare_lam,
    "kv-and-neural-attention.md": compare_kv_attention,
    "mhla.md": compare_mhla,
    "moe.md": compare_moe,
    "feed-forward.md": compare_feed_forward,
    "norms.md": compare_norms,
    "losses.md": compare_losses,
    "objectives.md": compare_objectives,
    "muon.md": compare_muon,
}

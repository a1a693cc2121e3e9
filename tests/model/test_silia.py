"""strawberry-silia: what neither the slow reference nor the three promises, which cover it too, check."""

import math

import pytest
import torch
from cases import CASES, tokens

from model import build
from strawberry import ops
from strawberry.context import ForwardContext, Mode
from strawberry.ops.common import norm
from strawberry.training.blocks import compile_blocks

CASE = CASES["strawberry-silia()"]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def naive_sink_attention(q, k, v, sink_k, sink_v, d):
    """Σ over the sink and s ≤ t, one query of one head at a time; all (T, D)."""
    y = torch.empty_like(q)
    for t in range(len(q)):
        for head in range(q.size(1) // d):
            at = slice(head * d, (head + 1) * d)
            e = [math.exp(q[t, at] @ key / d**0.5) for key in (sink_k[at], *k[: t + 1, at])]
            y[t, at] = sum(e_s * v_s for e_s, v_s in zip(e, (sink_v[at], *v[: t + 1, at]), strict=True)) / sum(e)
    return y


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 4]])
def test_sink_attention_equals_loops(chunks):
    """In one call and with a cache that has other keys and values in its slots."""
    torch.manual_seed(0)
    mixer = build(CASE).blocks[0].attn1.mixer.double().requires_grad_(False)
    q, k, v = (randn(1, 9, 32) for _ in range(3))
    mixer.sink_k.data, mixer.sink_v.data = 2 * randn(32), 3 * randn(32)
    expected = naive_sink_attention(q[0], k[0], v[0], mixer.sink_k, mixer.sink_v, 8)
    cache = mixer.new_cache(1, 9, "cpu", torch.float64)
    cache.k.fill_(7.0), cache.v.fill_(7.0)
    parts, start = [], 0
    with torch.no_grad():
        for n in chunks:
            at = ForwardContext(torch.arange(start, start + n)[None], Mode.PREFILL, num_cached=start,
                                max_cached_tokens=start)  # fmt: skip
            parts.append(mixer(*(x[:, start : start + n] for x in (q, k, v, v)), at, cache))
            start += n
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected)
    uncached = mixer(q, k, v, v, ForwardContext(torch.arange(9)[None]), None)
    torch.testing.assert_close(uncached[0], expected)


def test_a_new_sink_adds_one_to_the_denominator():
    torch.manual_seed(0)
    mixer = build(CASE).blocks[0].attn1.mixer.double()
    q, k, v = (randn(1, 1, 32) for _ in range(3))
    y = mixer(q, k, v, v, ForwardContext(torch.zeros(1, 1, dtype=torch.int64)), None)
    weight = ((q * k).unflatten(-1, (4, 8)).sum(-1, keepdim=True) / 8**0.5).exp()
    torch.testing.assert_close(y.unflatten(-1, (4, 8)), weight / (weight + 1) * v.unflatten(-1, (4, 8)))


def test_exclude_value_is_orthogonal_to_the_own_value():
    torch.manual_seed(0)
    y, v = randn(2, 5, 32), randn(2, 5, 32)
    rest = ops.exclude_value(y, v, 8)
    assert (rest * v).unflatten(-1, (4, 8)).sum(-1).abs().max() < 1e-12
    along = (y - rest).unflatten(-1, (4, 8)) / v.unflatten(-1, (4, 8))
    torch.testing.assert_close(along, along[..., :1].expand_as(along))  # the removed part is parallel to v


@pytest.mark.parametrize("length", [0.0, 1e-7])
def test_exclude_value_divides_by_a_norm_of_1e_6_or_more(length):
    torch.manual_seed(0)
    y, direction = randn(1, 1, 8), randn(8)
    v = (length * direction / direction.norm())[None, None].requires_grad_()
    rest = ops.exclude_value(y, v, 8)
    torch.testing.assert_close(rest, y - (y * v).sum() / 1e-6 * v / 1e-6)
    rest.sum().backward()
    assert v.grad.isfinite().all()


def test_attention_residual_is_the_mean_of_branches_at_initialization():
    """A₂ writes nothing yet, so that this is x₀ / (L + 1), and the logits are those of x₀."""
    torch.manual_seed(0)
    model, idx = build(CASE).double().eval(), tokens(2, 9)
    x0, ctx = norm(model.embed(idx)), model.make_context(idx)
    x = model.hidden_states(idx, ctx, None)
    torch.testing.assert_close(x, x0 / 3)
    branches = [randn(2, 9, 16) for _ in range(4)]
    torch.testing.assert_close(ops.attention_residual(branches, torch.zeros(16)), sum(branches) / 4)


def test_the_cache_has_64_more_slots_with_a_sink():
    for sink, more in ((True, 64), (False, 0)):
        model = build({**CASE, "attention_sink": sink})
        for length in (50, 200):
            slots = length + more + 1  # the last is for masked writes
            assert model.new_cache(3, length).nbytes() == 3 * 2 * 2 * slots * 2 * 32 * 4  # rows, blocks, attentions


@pytest.mark.slow
def test_compile_blocks_compiles_every_block(monkeypatch):
    """Blocks differ in the number of branches, so each needs a graph: more than the recompile limit allows."""
    torch._dynamo.reset()
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **options: torch_compile(run, **options, backend="eager"))
    model, idx = build({**CASE, "n_layer": 3}), tokens(1, 9)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=2):
        with torch.no_grad():
            expected = model(idx)[0]
            compile_blocks(model, True)
            torch.testing.assert_close(model(idx)[0], expected)
        model(idx, idx)[1].backward()
    torch._dynamo.reset()

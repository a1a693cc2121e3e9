"""The three implementations of sliding-window attention: masked, block-local and FlexAttention. They compute the same
function, are exactly causal and cost O(T · window). The reference is a loop over tokens in float64."""

import importlib
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import build
from strawberry.context import ForwardContext, Mode
from strawberry.ops.attention import (
    block_local_attention,
    can_use_flex_attention,
    flex_sliding_window,
    prefill_attention,
    sdpa,
)
from strawberry.ops.masks import AttentionPattern, sliding_window_block_mask

attention = importlib.import_module("strawberry.ops.attention")  # ops.attention is its function
B, D = 2, 16


def make_qkv(T: int, heads: int, kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, D, dtype=torch.float64, generator=generator) for n in (heads, kv_heads, kv_heads)]


def naive_sliding_window(q, k, v, windows: list[int], scale: float) -> torch.Tensor:
    """Head by head and token by token, over the newest windows[h] tokens."""
    share = q.size(2) // k.size(2)
    y = torch.empty_like(q)
    for h, window in enumerate(windows):
        for t in range(q.size(1)):
            s = slice(max(0, t - window + 1), t + 1)
            weight = (k[:, s, h // share] @ q[:, t, h].unsqueeze(-1) * scale).softmax(dim=1)  # (B, S, 1)
            y[:, t, h] = (weight * v[:, s, h // share]).sum(dim=1)
    return y


def make_context(T: int) -> ForwardContext:
    return ForwardContext(torch.arange(T).unsqueeze(0))


# ---- block_local_attention -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("T, window", [(300, 7), (256, 64), (320, 80), (257, 1), (383, 65)])
def test_block_local_attention_equals_sliding_window_attention(T, window, kv_heads):
    q, k, v = make_qkv(T, 4, kv_heads)
    expected = naive_sliding_window(q, k, v, [window] * 4, 0.3)
    torch.testing.assert_close(block_local_attention(q, k, v, window, scale=0.3), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [30, 70])
def test_block_local_attention_has_the_gradients_of_masked_attention(window):
    qkv = [x.requires_grad_() for x in make_qkv(290, 2, 1)]
    positions, grad = make_context(290).positions, make_qkv(290, 2, 2, seed=1)[0]
    masked = sdpa(*qkv, AttentionPattern(window).mask(positions, positions), scale=0.3)
    expected = torch.autograd.grad(masked, qkv, grad)
    got = torch.autograd.grad(block_local_attention(*qkv, window, scale=0.3), qkv, grad)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_only_long_causal_inputs_use_block_local_attention(monkeypatch):
    """Short inputs, wide windows and encoders use a mask."""
    windows = []
    monkeypatch.setattr(attention, "block_local_attention", lambda *args, **options: windows.append(args[3]))
    for T, window in [(300, 75), (300, 76), (255, 3), (256, 3), (300, 300)]:
        prefill_attention(*make_qkv(T, 2, 2), AttentionPattern(window), make_context(T), scale=1.0, dropout=0.0)
    ctx = ForwardContext(make_context(300).positions, Mode.ENCODE)
    prefill_attention(*make_qkv(300, 2, 2), AttentionPattern(75), ctx, scale=1.0, dropout=0.0)
    assert windows == [75, 3]


def test_attention_flops_are_proportional_to_the_window():
    """Each token multiplies with 2 · window keys, for any length."""
    for T in (512, 1024, 4096):
        q, k, v = (x.float() for x in make_qkv(T, 2, 2))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            prefill_attention(q, k, v, AttentionPattern(128), make_context(T), scale=1.0, dropout=0.0)
        products = counter.get_total_flops() / (4 * B * 2 * D)  # of a query and a key
        assert products == (T - 128) * 256 + 128 * 128


OPTIONS = {
    "experts": {"n_experts": 2, "windows": [70, 9], "r_layer": 0, "n_layer": 1},
    "SWA": {"arch": "tinystar", "attention_type": "GQA-SWA", "n_kv_head": 2, "window": 40},
    "latent": {"arch": "tinystar", "attention_type": "MHLA-SWA", "window": 40},
}
T = 300


def long_model(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape = {"vocab_size": 29, "block_size": T, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_qkv": 64}
    model = build({**shape, **OPTIONS[name]}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_models_with_block_local_attention_keep_the_promises(name, monkeypatch):
    """Exactly causal in float32; in float64 the same logits with masked attention, and through the cache."""
    model = long_model(name)
    idx = torch.randint(29, (2, T), generator=torch.Generator().manual_seed(1))
    y = model(idx)[0]
    for t in (63, 64, 128, 200, 298):
        other = idx.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 29
        assert torch.equal(model(other)[0][:, : t + 1], y[:, : t + 1])
    model.double()
    y = model(idx)[0]
    cache = model.new_cache(2, T)
    parts = [model(part, cache=cache)[0] for part in idx.split([280, 1, 19], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=0, atol=1e-9)
    monkeypatch.setattr(attention, "MIN_BLOCK", 10**9)
    assert (model(idx)[0] - y).abs().max() < 1e-11


# ---- flex_sliding_window ---------------------------------------------------------------------------------------------


def block_mask_to_dense(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(H, J, J): how often BlockMask's tables list each block."""
    result = torch.zeros(index.shape[1:], dtype=torch.int64)
    for h, rows in enumerate(count[0].tolist()):
        for i, n in enumerate(rows):
            result[h, i].index_add_(0, index[0, h, i, :n].long(), torch.ones(n, dtype=torch.int64))
    return result


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 100, 128, 130])
def test_sliding_window_block_mask_equals_the_mask_of_every_pair(length):
    """Each block of 16 queries and 16 keys is full, partial or empty, by the mask of its pairs."""
    n, windows = 16, (1, 2, 15, 16, 17, 18, 31, 32, 33, 33, 48, 64, 100, 200)
    tables = sliding_window_block_mask(length, windows, "cpu", n)
    J = -(-length // n)
    t = torch.arange(J * n)
    mask = torch.stack([(t[:, None] >= t) & (t[:, None] - t < w) & (t[:, None] < length) for w in windows])
    pairs = mask.view(-1, J, n, J, n).transpose(2, 3).flatten(3)
    whole, part = pairs.all(-1), pairs.any(-1) & ~pairs.all(-1)
    expected = (part, whole, part.mT, whole.mT)
    for got, right in zip((block_mask_to_dense(*tables[i : i + 2]) for i in (0, 2, 4, 6)), expected, strict=True):
        assert torch.equal(got, right.long())


@pytest.mark.slow
@pytest.mark.parametrize("windows, kv_heads", [((7, 7, 64, 150), 4), ((1, 129, 128, 300), 4), ((40,), 2), ((200,), 1)])
@torch.no_grad()
def test_flex_sliding_window_equals_sliding_window_attention(windows, kv_heads):
    q, k, v = make_qkv(290, 4, kv_heads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention warns that it is slow without torch.compile
        got = flex_sliding_window(q, k, v, windows, make_context(290), scale=0.3)
    expected = naive_sliding_window(q, k, v, list(windows) * (4 // len(windows)), 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_flex_attention_is_not_used_on_a_cpu():
    q = make_qkv(300, 2, 2)[0].float()
    assert not can_use_flex_attention(q, 0.0)
    assert not torch.compile(lambda q: can_use_flex_attention(q, 0.0), backend="eager", fullgraph=True)(q)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_flex_sliding_window_compiles_as_one_graph(name, monkeypatch):
    """No graph breaks, the same logits. Without gradients, which FlexAttention does not have on the CPU."""
    model = long_model(name)
    idx = torch.randint(29, (2, T), generator=torch.Generator().manual_seed(1))
    expected = model(idx)[0]
    calls = []
    monkeypatch.setattr(attention, "can_use_flex_attention", lambda q, dropout: True)
    record = lambda *args, **options: calls.append(1) or flex_sliding_window(*args, **options)  # noqa: E731
    monkeypatch.setattr(attention, "flex_sliding_window", record)
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(idx)[0]
    torch._dynamo.reset()
    assert calls
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)

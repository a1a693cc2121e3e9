"""Properties of every architecture besides its function: numerics, gradients, parameter counts, FLOPs, training,
experts, cache bytes. The cases are those of test_model.py, generated from the registry.

Index:  sums over long inputs · gradients · half precision · parameters · FLOPs · initialisation and optimizer ·
        overfitting, files, compiling · experts · cache bytes
"""

import copy
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from cases import CASES, T, every_case, perturbed_model, source_for, tokens
from machine import require_program
from naive_strawberry import aft, aft_conv_position, aft_full_position, aft_local_position, aft_simple_long, sigmoid
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import encoder
import model as model_file
from model import AFTS, CONFIGS, INITIALIZERS, LAM, MODELS, build, init_weights
from optimizer import DECAYED, HIDDEN, ROLES, build_optimizer
from strawberry import ops
from strawberry.config import check
from strawberry.context import ForwardContext
from strawberry.model_file import load_model, save_model
from strawberry.ops.aft import AFTSimpleScan
from strawberry.ops.chunks import (
    chunk_sums,
    chunked_matmul,
    chunked_matmul_backward,
    chunked_matmul_backward_plain,
    chunked_matmul_plain,
)
from strawberry.ops.qkv import no_transform
from strawberry.ops.retention import BlockWeights, GatedUpdate, rescale_std, update_concatenated, update_separately
from strawberry.run_config import OptimizerHyperparams

torch.set_num_threads(1)
aft_positional = importlib.import_module("strawberry.ops.aft_positional")  # ops.aft_positional is its function
attention = importlib.import_module("strawberry.ops.attention")
memory = importlib.import_module("strawberry.ops.memory")

# ---- sums over long inputs -----------------------------------------------------------------------------------------

LONG, WIDTH = 65536, 4


def extreme_inputs(shape: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v (n, WIDTH) in float64, exact in float32, with keys between −80 and 80."""
    rng, t = np.random.default_rng(0), np.arange(n)[:, None]
    keys = {
        "-80 or 80": rng.choice([-80.0, 80.0], (n, WIDTH)),
        "uniform": rng.uniform(-80, 80, (n, WIDTH)),
        "first key is the maximum": np.where(t == 0, 80.0, 69.0),  # 65,536 others, each e^−11: half of the total weight
        "high, then low": np.where(t < 8, 80.0, -80.0),
        "low, then high": np.where(t < n - 8, -80.0, 80.0),
        "rising": np.linspace(-80, 80, n)[:, None],
        "flat": np.full((n, 1), 80.0),
    }
    arrays = rng.normal(size=(n, WIDTH)), keys[shape] + np.zeros((n, WIDTH)), rng.normal(size=(n, WIDTH))
    return tuple(x.astype(np.float32).astype(np.float64) for x in arrays)


KEYS = ["-80 or 80", "uniform", "first key is the maximum", "high, then low", "low, then high", "rising", "flat"]


def make_aft(kind: str, n: int, window: int = 40) -> nn.Module:
    """An AFT in float32 for n tokens, its position parameters drawn from a normal distribution."""
    torch.manual_seed(0)
    mix = AFTS[kind](SimpleNamespace(n_qkv=WIDTH, n_head=2, window=window, block_size=n), no_transform)
    for p in mix.parameters():
        nn.init.normal_(p, std=0.3)
    return mix.requires_grad_(False)


def run_aft(mix: nn.Module, q, k, v) -> np.ndarray:
    q, k, v = (torch.tensor(x, dtype=torch.float32)[None] for x in (q, k, v))
    y = mix(q, k, v, v, ForwardContext(torch.arange(q.size(1))[None]), None)
    assert y.dtype == torch.float32
    return y[0].double().numpy()


def check_means(got: np.ndarray, reference, q, k, v, bound: float) -> None:
    """The error of each weighted mean is under `bound` times the weighted mean of |v|, which has no cancellation."""
    assert np.isfinite(got).all()
    error = np.abs(got - reference(q, k, v)) / reference(q, k, np.abs(v))
    assert error.max() < bound, f"relative error {error.max():.1e} at token {error.argmax() // WIDTH}"


@pytest.mark.parametrize("shape", KEYS)
def test_aft_simple_over_65536_tokens_with_keys_of_80(shape):
    """float32 against float64, within 2e-6 (measured: at most 6e-7)."""
    q, k, v = extreme_inputs(shape, LONG)
    check_means(run_aft(make_aft("simple", LONG), q, k, v), aft_simple_cumulative, q, k, v, 2e-6)


def aft_simple_cumulative(q, k, v):
    e = np.exp(k)  # e^±80 fits float64
    return sigmoid(q) * np.cumsum(e * v, axis=0) / np.cumsum(e, axis=0)


def test_the_cumulative_reference_equals_the_loop():
    q, k, v = extreme_inputs("uniform", 3000)
    np.testing.assert_allclose(aft_simple_cumulative(q, k, v), aft_simple_long(q, k, v), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("shape", KEYS)
def test_aft_conv_over_65536_tokens_with_keys_of_80(shape):
    """float32 against prefix sums and a window of taps in float64, within 1e-5 (measured: at most 5e-6, most of it the
    rounding of k + p near 80, where float32 has steps of 8e-6)."""
    mix = make_aft("conv", LONG)
    taps = mix.kernel.double().numpy().repeat(WIDTH // 2, axis=0).T  # (window, WIDTH)

    def reference(q, k, v):
        above, below = np.zeros_like(v), np.zeros_like(v)
        n = len(taps)
        above[n:], below[n:] = np.cumsum(np.exp(k) * v, axis=0)[:-n], np.cumsum(np.exp(k), axis=0)[:-n]
        for distance, tap in enumerate(taps):
            e = np.exp(k[: len(k) - distance] + tap)
            above[distance:] += e * v[: len(v) - distance]
            below[distance:] += e
        return sigmoid(q) * above / below

    check_means(run_aft(mix, *(qkv := extreme_inputs(shape, LONG))), reference, *qkv, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", KEYS)
@pytest.mark.parametrize("kind", ["full", "local", "conv"])
def test_positional_aft_with_keys_of_80(kind, shape):
    """float32 against the loop over pairs in float64, beyond blocks and windows, within 1e-5 (measured: 4e-6)."""
    n = 137
    mix = make_aft(kind, n)
    weights = {name: p.double().numpy() for name, p in mix.named_parameters()}
    position = {
        "full": lambda: aft_full_position(weights["a"], weights["b"]),
        "local": lambda: aft_local_position(weights["a"], weights["b"], 40),
        "conv": lambda: aft_conv_position(weights["kernel"], WIDTH),
    }[kind]()
    qkv = extreme_inputs(shape, n)
    check_means(run_aft(mix, *qkv), lambda q, k, v: aft(q, k, v, position), *qkv, 1e-5)


@pytest.mark.parametrize("shape", KEYS)
def test_aft_simple_gradients_over_65536_tokens(shape):
    """float32 against autograd through cumulative sums in float64, within 5e-6 of the largest (measured: 1.3e-6)."""
    _, k, v = (torch.tensor(x)[None] for x in extreme_inputs(shape, LONG))
    weight = torch.randn(1, LONG, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = [x.clone().requires_grad_() for x in (k, v)]
    e = exact[0].exp()
    ((e * exact[1]).cumsum(1) / e.cumsum(1) * weight).sum().backward()
    ours = [x.float().requires_grad_() for x in (k, v)]
    (AFTSimpleScan.apply(*ours) * weight.float()).sum().backward()
    for x, exact_x in zip(ours, exact, strict=True):
        assert (x.grad - exact_x.grad).abs().max() < 5e-6 * exact_x.grad.abs().max()
        torch.testing.assert_close(x.grad[0, 0].double(), exact_x.grad[0, 0], rtol=2e-4, atol=1e-5)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1.0, 30.0])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_aft_simple_scan_passes_gradcheck(keys, length):
    generator = torch.Generator().manual_seed(length)
    k = torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
    k = k.sign() * keys if keys > 1 else k
    v = torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(AFTSimpleScan.apply, (k.requires_grad_(), v.requires_grad_()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "local", "conv", "lam"])
def test_gradients_of_mixers(kind, monkeypatch):
    """Of q, k, v and the position parameters, over several blocks or segments."""
    torch.manual_seed(0)
    c = SimpleNamespace(n_qkv=4, n_head=2, window=5, block_size=12)
    mix = (LAM(c, no_transform) if kind == "lam" else AFTS[kind](c, no_transform)).double()
    mix.segment = 3
    monkeypatch.setattr(aft_positional, "BLOCK", 3)
    names = [name for name, _ in mix.named_parameters()]
    at = ForwardContext(torch.arange(11)[None])
    qkv = [torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    positions = [torch.randn(p.shape, dtype=torch.float64, requires_grad=True) for p in mix.parameters()]

    def output(q, k, v, *p):
        return torch.func.functional_call(mix, dict(zip(names, p, strict=True)), (q, k, v, v, at, None))

    assert torch.autograd.gradcheck(lambda *x: output(*x, *positions), qkv)
    if positions:
        assert torch.autograd.gradcheck(lambda *p: output(*qkv, *p), positions, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["causal", "batch"])
def test_gradients_of_retention(scope):
    """Of a block's weights and its input, over three chunks and a partial one."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 3, "n_qkv": 4, "r_layer": 2, "aft_ratio": 1, "retention_chunk": 3}
    model = build({"retention_scope": scope, "window": 2, "block_size": 16, **sizes}).double()
    block, names = model.blocks[0], [name for name, _ in model.blocks[0].named_parameters()]
    assert names == ["w_attn_qkv", "w_attn_swiglu", "w_attn_out", "out", "tao"]
    params = [(p + 0.3 * torch.randn_like(p)).detach().requires_grad_() for p in block.parameters()]
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    pos = torch.arange(11)[None]
    at = ForwardContext(pos, rope=model.rope(pos), chunk_size=3 if scope == "causal" else 11)

    def output(x, *p):
        return torch.func.functional_call(block, dict(zip(names, p, strict=True)), (x, at, None))

    assert torch.autograd.gradcheck(output, (x, *params))


@pytest.mark.parametrize("shared", [True, False])
def test_concatenated_and_separate_retention_updates_are_equal(shared):
    """Results and gradients, for weights that all chunks share or that each has; gradcheck of the separate update."""
    generator, C, D, n = torch.Generator().manual_seed(0), 3, 4, (2, 2)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    lead = () if shared else n
    raws = BlockWeights(randn(*lead, 3 * D, C), randn(*lead, 2 * C, D), randn(*lead, C, C))
    scales, oa, out = [randn(*n, 1, 1) for _ in range(3)], randn(*n, C, C), randn(C, C)
    inputs, results = [*raws, *scales, oa, out], []
    for update in (update_concatenated, update_separately):
        weights, deviations = update(raws, scales, oa, out)
        outputs = [*weights, *deviations]
        loss = sum((i + y.cos()).prod(dim=-1).sum() for i, y in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for concatenated, separate in zip(*results, strict=True):
        torch.testing.assert_close(concatenated, separate)
    view = raws.swiglu.unflatten(-2, (C, 2)).flatten(-2).detach().requires_grad_()
    for raw, viewed in ((raws.qkv, False), (view, True)):
        assert torch.autograd.gradcheck(lambda *x, v=viewed: GatedUpdate.apply(*x, v), (raw, scales[0], oa, out))


@pytest.mark.parametrize("T", [6, 11, 12, 23])
@pytest.mark.parametrize("rows", [2, 5])
def test_chunked_matmul_equals_the_product_of_each_token(rows, T):
    """Both implementations: the product of each token with its chunk's matrix, and its gradients."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    chunk, later = 3, -(-T // 3) - 1
    x, first, w, grad = randn(rows, T, 4), randn(5, 4), randn(rows, later, 5, 4), randn(rows, T, 5).detach()
    y = torch.stack([torch.stack([(first if t < chunk else w[b, t // chunk - 1]) @ x[b, t] for t in range(T)])
                     for b in range(rows)])  # fmt: skip
    wanted = torch.autograd.grad(y, (x, first, w), grad)
    args = [z.detach() for z in (x, first, w)]
    for product in (chunked_matmul, chunked_matmul_plain):
        torch.testing.assert_close(product(*args, chunk), y.detach())
    for gradients in (chunked_matmul_backward, chunked_matmul_backward_plain):
        for got, exact in zip(gradients(grad, *args, chunk), wanted, strict=True):
            torch.testing.assert_close(got, exact)


def k_bias_has_no_effect(model: nn.Module, name: str) -> bool:
    """Softmax and AFT do not change when every key gets the same vector, which a bias of k is without RoPE."""
    c = model.config
    if not name.endswith("wk.bias"):
        return False
    kind = c.attention_type.removesuffix("-SWA")
    return ".cross." in name or (kind in ("MHA", "GQA", "MQA", "expert", "aft") and c.pos_encoding != "RoPE")


def trainable_model(case: str) -> nn.Module:
    """`perturbed_model` in float64 with gradients; routers without bias, so that each expert gets tokens."""
    model = copy.deepcopy(perturbed_model(case)).requires_grad_()
    for router in model.routers().values():
        router.bias.zero_()
    return model


@every_case
def test_every_parameter_receives_its_gradient(case):
    """T = 3 chunks + 5. None is zero, and they predict the loss along a random direction, within 1e-5."""
    model = trainable_model(case)
    n = 3 * (model.chunk_size or 16) + 5
    idx, targets, source = tokens(2, n), tokens(2, n, seed=1), source_for(model, 2)
    model(idx, targets, source=source)[1].backward()
    sizes = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    zero = {name for name, size in sizes.items() if size < 1e-9}
    assert zero == {name for name in sizes if k_bias_has_no_effect(model, name)}

    generator, step, derivative = torch.Generator().manual_seed(0), 1e-8, 0.0  # small: ReLUs must not change sign
    directions = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in model.parameters()]
    with torch.no_grad():
        for p, direction in zip(model.parameters(), directions, strict=True):
            derivative += (p.grad * direction).sum().item()
            p.add_(direction, alpha=step)
        above = model(idx, targets, source=source)[1].item()
        for p, direction in zip(model.parameters(), directions, strict=True):
            p.sub_(direction, alpha=2 * step)
        below = model(idx, targets, source=source)[1].item()
    assert (above - below) / (2 * step) == pytest.approx(derivative, rel=1e-5, abs=1e-6)


# ---- half precision ------------------------------------------------------------------------------------------------


def bfloat16_bound(model: nn.Module) -> float:
    """Of ‖logits − float32's‖ / ‖float32's‖; for routed models of its median over tokens, since a token whose routing
    is a near tie may choose another expert. Measured: 0.025, palm 0.05, batch compaction (tanh of a long sum) 0.10."""
    c = model.config
    if getattr(c, "compaction", False) and not model.causal:
        return 0.2
    return 0.08 if c.arch == "palm" else 0.04


def relative_error(model: nn.Module, logits: torch.Tensor, exact: torch.Tensor) -> float:
    assert logits.isfinite().all()
    error = logits.float() - exact
    if not model.routers():
        return (error.norm() / exact.norm()).item()
    return (error.norm(dim=-1) / exact.norm(dim=-1)).median().item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*AFTS, "lam"])
def test_aft_and_lam_accumulate_bfloat16_in_float32(kind):
    """2,000 tokens: a bfloat16 sum of ones stops growing at 256. Only the result is rounded, within 2^−8."""
    c = SimpleNamespace(n_qkv=WIDTH, n_head=2, window=40, block_size=2000)
    mix = LAM(c, no_transform) if kind == "lam" else make_aft(kind, 2000)
    mix, at = mix.bfloat16(), ForwardContext(torch.arange(2000)[None])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2000, WIDTH, generator=generator).bfloat16() for _ in range(3))
    v = v + 2
    state = mix.new_cache(1, 2000, "cpu", torch.bfloat16)
    pieces = [(0, 300), (300, 301)] if kind in ("full", "local", "conv") else [(0, 300), (300, 301), (301, 2000)]
    cached = torch.cat([mix(*(x[:, a:b] for x in (q, k, v, v)), ForwardContext(torch.arange(a, b)[None]), state)
                        for a, b in pieces], dim=1)  # fmt: skip
    exact = copy.deepcopy(mix).float()(q.float(), k.float(), v.float(), v, at, None)
    for y in (mix(q, k, v, v, at, None), cached):
        assert y.dtype == torch.bfloat16
        assert ((y.float() - exact[:, : y.size(1)]) / exact[:, : y.size(1)]).abs().max() < 2**-8


def test_std_routing_and_chunk_sums_of_bfloat16_are_float32():
    """A bfloat16 model computes the std, router probabilities and Σ uᵀ v in float32."""
    torch.manual_seed(0)
    w = (torch.randn(300, 300) + 0.25).bfloat16()
    torch.testing.assert_close(rescale_std(w, 300).float().std(), torch.tensor(300**-0.5), rtol=2e-3, atol=0)
    router, x = model_file.Router(16, 4, 2), torch.randn(1, 5, 16).bfloat16()
    init_weights_of(router)
    p = router.bfloat16().choose(x, ForwardContext(torch.arange(5)[None]))[0]
    assert p.dtype == torch.float32 and (p.sum(-1) - 1).abs().max() < 1e-6
    u, v = ((torch.randn(2, 600, 8) + 1).bfloat16() for _ in range(2))
    sums = chunk_sums(u, v, 300)
    assert sums.dtype == torch.float32
    exact = u.double()[:, :300].mT @ v.double()[:, :300]
    torch.testing.assert_close(sums[:, 0].double(), exact, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(chunk_sums(u.float(), v.float(), 300), sums)


@pytest.mark.slow
@every_case
def test_bfloat16_stays_near_float32(case):
    """With bfloat16 weights, and under autocast."""
    model = perturbed_model(case, torch.float32)
    idx, source = tokens(2, T), source_for(model, 2)
    exact = model(idx, source=source)[0]
    half = copy.deepcopy(model).bfloat16()(idx, source=source)[0]
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        auto = model(idx, source=source)[0]
    for logits in (half, auto):
        assert 1e-5 < relative_error(model, logits, exact) < bfloat16_bound(model)


@pytest.mark.parametrize("arch", MODELS)
def test_bfloat16_through_the_cache_stays_near_float32(arch):
    model = perturbed_model(f"{arch}()", torch.float32)
    half = copy.deepcopy(model).bfloat16()
    idx, source = tokens(2, T), source_for(model, 2)
    exact = model(idx, source=source)[0]
    cache = half.new_cache(2, T, source)
    logits = torch.cat([half(part, cache=cache)[0] for part in idx.split([20, *[1] * (T - 20)], dim=1)], dim=1)
    assert relative_error(model, logits, exact) < bfloat16_bound(model)


@pytest.mark.parametrize("arch", MODELS)
def test_autocast_trains(arch):
    """Loss and gradients under autocast are float32 and near those without it."""
    model = copy.deepcopy(perturbed_model(f"{arch}()", torch.float32)).requires_grad_()
    idx, targets, source = tokens(2, T), tokens(2, T, seed=1), source_for(model, 2)

    def gradient():
        loss = model(idx, targets, source=source)[1]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
        return loss, torch.cat([g.flatten() for g in grads])

    loss, exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        near, grads = gradient()
    assert abs(near - loss) < 0.01 * loss
    assert (grads - exact).norm() < 0.1 * exact.norm()


# ---- parameters ----------------------------------------------------------------------------------------------------


def config_for_counting(case: str) -> dict:
    """The case with sizes that differ from each other, so that no formula can confuse them."""
    stacks = {"n_encoder_layer": 2} if case.startswith("transformer") else {}
    return {**CASES[case], "n_embd": 24, "n_layer": 3, **stacks}


def linear(n_in: int, n_out: int, bias: bool = False) -> int:
    return n_in * n_out + n_out * bias


def aft_positions(c) -> int:
    """Position parameters of one AFT: p = a bᵀ with 128 columns each, or a tap for each group and distance."""
    pairs = 2 * c.block_size * 128
    return {"simple": 0, "full": pairs, "local": pairs, "conv": c.n_head * c.window}[c.aft]


def router_params(c, n: int) -> int:
    """Of a router among n experts; a single expert has none."""
    return c.n_embd * n if n > 1 else 0


def strawberry_params(c) -> tuple[int, int]:
    """(of blocks, of embeddings, heads and positions)"""
    C, D = c.n_embd, c.n_qkv
    block = 3 * D * C + 2 * C * D + C * C + router_params(c, c.n_experts) + router_params(c, c.n_ffn_experts)
    if c.r_layer and c.retention == "on":
        block += C * C + 3 if c.retention_rule == "silu" else memory_params(c)
    positions = aft_positions(c) if c.r_layer and c.aft_ratio else 0
    depth = C * c.recursions if c.adaptive else 0
    return c.n_layer * block + depth, c.vocab_size * C + c.n_layer * positions


def memory_params(c) -> int:
    """Keys, values and output; three gates per head; four convolution taps per channel."""
    C, M = c.n_embd, c.memory_width
    return 3 * M * C + 3 * (M // c.memory_head) * (C + 1) + 4 * M


def strawberry_v0_params(c) -> tuple[int, int]:
    C, D = c.n_embd, c.n_qkv
    block = 3 * D * C + 2 * C * D + C * C + router_params(c, c.n_experts) + (3 * C * C if c.compaction else 0)
    return c.n_layer * block, c.vocab_size * C + c.n_layer * aft_positions(c)


def strawberry_silia_params(c) -> tuple[int, int]:
    C, D = c.n_embd, c.n_qkv
    attention = (4 if c.gated else 3) * D * C + 2 + 2 * D * c.attention_sink
    return c.n_layer * (2 * attention + D * 2 * C + D * C + C), c.vocab_size * C


def palm_params(c) -> tuple[int, int]:
    C, D, F, rank, V = c.n_embd, c.n_qkv, 64, c.d_rank, c.vocab_size  # 8C/3 = 64

    def low_rank_params(n_in, n_out):
        return n_in * n_out if rank is None else rank * (n_in + n_out)

    parts = 2 if c.attention_type == "kv" else 3
    block = low_rank_params(C, D) + low_rank_params(D, parts * D) + low_rank_params(D, 2 * C)
    block += low_rank_params(C, 2 * F) + low_rank_params(F, C) if c.parallel else 0
    positions = aft_positions(c) if c.attention_type == "aft" else 0
    table = V * C if rank is None else V * rank
    return c.n_layer * block + (0 if rank is None else rank * C), table + low_rank_params(C, V) + c.n_layer * positions


def norm_params(c) -> int:
    return {"RMSNorm": 1, "LayerNorm": 2}[c.norm_type] * c.n_embd


def attention_params(c, bias: bool) -> tuple[int, int]:
    """(projections and routers, positions)"""
    C, D, H, d = c.n_embd, c.n_qkv, c.n_head, c.n_qkv // c.n_head
    kind = c.attention_type.removesuffix("-SWA")
    if kind == "MHLA":
        down = linear(C, H * (d + c.rope_dim), bias) + linear(C, c.kv_rank + c.rope_dim, bias)
        return down + c.kv_rank + c.kv_rank * 2 * D + linear(D, C, bias), 0
    kv = {"GQA": c.n_kv_head * d, "MQA": d}.get(kind, D)
    total = 2 * linear(C, kv, bias) + linear(D, C, bias) + (0 if kind == "kv" else linear(C, D, bias))
    return total + (router_params(c, c.n_experts) if kind == "expert" else 0), aft_positions(c) if kind == "aft" else 0


def ffn_params(c, bias: bool) -> int:
    swiglu = c.ffn_type.lower() == "swiglu"
    F = 64 if swiglu else 4 * c.n_embd
    one = linear(c.n_embd, 2 * F if swiglu else F, bias) + linear(F, c.n_embd, bias)
    return c.n_ffn_experts * one + router_params(c, c.n_ffn_experts)


def tinystar_params(c) -> tuple[int, int]:
    bias = c.norm_type == "LayerNorm" and c.ffn_type.startswith("GELU")
    block = 2 * norm_params(c) + attention_params(c, bias)[0] + ffn_params(c, bias) + 2 * c.skip_scalars
    tables = c.vocab_size * c.n_embd * (1 if c.tie_embeddings else 2)
    kv_heads = {"MHA": c.n_head, "MQA": 1}.get(c.attention_type.removesuffix("-SWA"), c.n_kv_head)
    with_values = -(-c.n_layer // 2) * c.value_embeddings
    body = c.n_layer * block + norm_params(c) + with_values * kv_heads * min(32, c.n_embd)
    tables += with_values * c.vocab_size * kv_heads * c.n_qkv // c.n_head
    return body, tables + c.block_size * c.n_embd * (c.pos_encoding == "Learned")


def transformer_params(c) -> tuple[int, int]:
    C, D, d = c.n_embd, c.n_qkv, c.n_qkv // c.n_head
    attention, positions = attention_params(c, c.bias)
    kv = {"GQA": c.n_kv_head * d, "MQA": d}.get(c.attention_type.removesuffix("-SWA"), D)
    cross = linear(C, D, c.bias) + 2 * linear(C, kv, c.bias) + linear(D, C, c.bias) + norm_params(c)
    body, outside = 0, c.vocab_size * C * (1 if c.tie_embeddings else 2)
    stacks = {"encoder": [(2, 0)], "decoder": [(3, 0)], "encoder-decoder": [(2, 0), (3, cross)]}[c.kind]
    for layers, crossing in stacks:
        n = c.n_layer if layers == 3 or c.kind == "decoder" else c.n_encoder_layer
        body += n * (2 * norm_params(c) + attention + ffn_params(c, c.bias) + crossing)
        body += norm_params(c) * (c.norm_position == "pre") + C * c.recursions * c.adaptive
        outside += n * positions + c.block_size * C * (c.pos_encoding == "Learned")
    return body, outside


PARAMS = {
    "strawberry": strawberry_params,
    "strawberry-silia": strawberry_silia_params,
    "strawberry-v0": strawberry_v0_params,
    "palm": palm_params,
    "tinystar": tinystar_params,
    "transformer": transformer_params,
}


@every_case
def test_parameters_equal_a_closed_formula(case):
    model = build(config_for_counting(case))
    body, outside = PARAMS[model.config.arch](model.config)
    assert sum(p.numel() for p in model.parameters()) == model.num_params(non_embedding=False) == body + outside
    assert model.num_params() == body


def test_default_widths_are_those_of_the_specification():
    c = build({"arch": "tinystar", "n_embd": 96, "n_head": 6, "block_size": 128, "n_layer": 1}).blocks[0]
    assert c.ffn.w2.weight.shape == (96, 256)  # 8C/3, already a multiple of 64
    assert build({"arch": "tinystar", "n_embd": 104, "n_layer": 1}).blocks[0].ffn.w2.weight.shape == (104, 320)
    assert build({"arch": "transformer", "n_embd": 24, "n_layer": 1}).decoder.blocks[0].ffn.w1.weight.shape == (96, 24)
    for n_embd, block_size, chunk in [(96, 4096, 1024), (128, 1024, 512), (64, 64, 32), (64, 16, 16), (8, 256, 64)]:
        assert build({"n_embd": n_embd, "block_size": block_size}).config.retention_chunk == chunk
    v0 = {"arch": "strawberry-v0", "n_layer": 1}
    for n_embd, block_size, chunk in [(96, 1024, 128), (128, 1024, 128), (64, 64, 32), (64, 16, 16), (8, 256, 16)]:
        assert build(v0 | {"n_embd": n_embd, "block_size": block_size}).config.retention_chunk == chunk
    assert build({"block_size": 100}).config.window == 25
    assert build({"n_embd": 64}).config.retention_scale == 64**-0.5


# ---- FLOPs ---------------------------------------------------------------------------------------------------------


def naive_prefill_attention(q, k, v, pattern, ctx, *, scale, dropout):
    """`prefill_attention` for one query at a time, over the visible keys only; heads with one mask together."""
    T, H = q.shape[1:3]
    visible = pattern.mask(torch.arange(T)[None], torch.arange(T)[None], ctx.causal)[0].expand(-1, T, T)  # (H or 1, …)
    k, v = (x.repeat_interleave(H // k.size(2), dim=2).transpose(1, 2) for x in (k, v))  # (B, H, T, d)
    y = q.new_zeros(*q.shape[:3], v.size(-1))
    for first, mask in enumerate(visible):
        heads = slice(first, H, len(visible))
        for t, keys in enumerate(mask):
            weight = (q[:, t, heads].unsqueeze(2) @ k[:, heads, keys].mT * scale).softmax(dim=-1)
            y[:, t, heads] = (weight @ v[:, heads, keys]).squeeze(2)
    return y


def naive_aft_positional(scans: list):
    """`aft_positional` one token at a time, over its window; appends the FLOPs of the sums beyond it to `scans`."""

    def mix(q, k, v, bias, ctx, cache=None):
        T, e, positions = k.size(1), k.exp(), torch.arange(k.size(1))
        parts = []
        for t in range(T):
            others = positions[: t + 1] if ctx.causal else positions
            near = (t - others).abs() < (bias.window or T)
            far = others[~near]
            p = bias(torch.tensor([[t]]), others[near][None]).exp()  # (G, 1, S)
            above, below = (
                torch.cat([w @ part for w, part in zip(p, x[:, others[near]].chunk(len(p), -1), strict=True)], dim=-1)
                + x[:, far].sum(dim=1, keepdim=True)
                for x in (e * v, e)
            )
            parts.append(torch.sigmoid(q[:, t : t + 1]) * above / below)
        scans.append(0 if bias.window is None or bias.window >= T else 4 * v.numel())
        return torch.cat(parts, dim=1)

    return mix


@pytest.mark.slow
@pytest.mark.parametrize(("case", "common"), [
    ("strawberry()", False), ("strawberry(retention_scope=batch)", True),
    ("strawberry-v0(compaction=True,compaction_scope=batch)", True),
])  # fmt: skip
def test_flops_shared_by_all_rows_are_counted_once(case, common):
    """Those of batch-scope retention and compaction, which do not depend on the number of rows."""
    model = build({**config_for_counting(case), "aft": "simple"})
    n = model.config.block_size
    assert (model.flops_per_token(n, rows=3) < model.flops_per_token(n)) == common


def substitute(lower, b):
    """Solves (I + L) x = b row by row."""
    x = b[..., :1, :]
    for t in range(1, b.size(-2)):
        x = torch.cat((x, b[..., t : t + 1, :] - lower[..., t : t + 1, :t] @ x), dim=-2)
    return x


@pytest.mark.slow
@every_case
def test_flops_per_token_equal_those_of_the_flop_counter(case, monkeypatch):
    """FlopCounterMode counts a naive model, where every pair of tokens is a product of its own."""
    torch.manual_seed(0)
    n, rows = 16, 2
    model = build({**config_for_counting(case), "n_layer": 1, "dropout": 0.0}).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    idx = tokens(rows, n).clamp(min=1)  # 0 would be padding, which an encoder masks
    source = idx.flip(1) if model.takes_source else None
    fast, flops = model(idx, source=source)[0], model.flops_per_token(n, rows) * n * rows
    scans, simple = [], ops.aft_simple

    def scan(q, k, v, ctx, cache=None):
        scans.append(4 * v.numel())
        return simple(q, k, v, ctx, cache)

    monkeypatch.setattr(ops, "prefill_attention", naive_prefill_attention)
    monkeypatch.setattr(attention, "prefill_attention", naive_prefill_attention)
    monkeypatch.setattr(ops, "aft_positional", naive_aft_positional(scans))
    monkeypatch.setattr(ops, "aft_simple", scan)
    monkeypatch.setattr(memory, "checkpoint", lambda compute, *inputs, **options: compute(*inputs))
    monkeypatch.setattr(memory, "solve_unit_lower", substitute)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits, loss = model(idx, tokens(rows, n, seed=2), source=source)
        forward = counter.get_total_flops() + sum(scans)
        loss.backward()
    torch.testing.assert_close(logits, fast, rtol=0, atol=1e-9)
    assert flops == pytest.approx(3 * forward, rel=1e-9)
    # LAM's last tokens add to sums that no token reads: their backward has no FLOPs
    assert 0.95 * 3 * forward < counter.get_total_flops() + 3 * sum(scans) <= 3 * forward


# ---- initialisation and optimizer ----------------------------------------------------------------------------------


def parse_role_table() -> dict[str, tuple[str, str, str]]:
    """Role → (initialization, optimizer, decay), from the docstring of init_weights."""
    lines = [line.strip() for line in init_weights.__doc__.splitlines()]
    rows = lines[next(i for i, line in enumerate(lines) if line.startswith("role ")) + 1 :]
    rows = rows[: rows.index("")]
    starts = ("uniform, std fan_in^(−1/2)", "zero", "one", "1.2", "normal, std 0.02", "normal, std 1")
    found = {}
    for row in rows:
        role, rest = row.split(None, 1)
        start = next(s for s in starts if rest.startswith(s + " "))
        *optimizer, decay = rest.removeprefix(start).split()
        found[role] = (start, " ".join(optimizer), decay)
    return found


def test_the_table_names_every_role():
    assert parse_role_table().keys() == INITIALIZERS.keys() == set(ROLES)
    assert {role for role, (_, _, decay) in parse_role_table().items() if decay == "yes"} == DECAYED
    assert {decay for _, _, decay in parse_role_table().values()} == {"yes", "no"}
    assert {role for role, (_, by, _) in parse_role_table().items() if by == "Muon where asked, or AdamW"} == HIDDEN
    assert {by for _, by, _ in parse_role_table().values()} == {"Muon where asked, or AdamW", "AdamW"}


def check_initialization(name: str, p: torch.Tensor, start: str) -> None:
    constants = {"zero": 0.0, "one": 1.0, "1.2": 1.2}
    if start in constants:
        assert torch.equal(p, torch.full_like(p, constants[start])), name
        return
    std = {"normal, std 0.02": 0.02, "normal, std 1": 1.0}.get(start) or p.size(1) ** -0.5
    assert abs(p.std() / std - 1) < 5 / (2 * p.numel()) ** 0.5, (name, p.std(), std)
    assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name
    beyond = (p.abs() > 3**0.5 * std * (1 + 1e-6)).float().mean()  # where a uniform distribution ends
    assert beyond == 0 if start.startswith("uniform") else (beyond > 0.01 or p.numel() < 400), (name, start)


@every_case
def test_parameters_are_initialized_and_optimized_as_the_table_says(case):
    """Measured on initialized weights; each parameter is in exactly one group, with Muon and without."""
    torch.manual_seed(1)
    model = build(config_for_counting(case))
    roles, rows = model.roles(), parse_role_table()
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        check_initialization(name, p, rows[roles[name]][0])
    for use_muon in (False, True):
        hyper = OptimizerHyperparams(use_muon=use_muon, weight_decay=0.3)
        parts = build_optimizer(model, hyper, 1e-3, "cpu").parts
        groups = [(id(p), kind, g["weight_decay"]) for kind, part in parts.items() for g in part.param_groups
                for p in g["params"]]  # fmt: skip
        expected = []
        for name, p in model.named_parameters():
            _, by, decay = rows[roles[name]]
            kind = "muon" if use_muon and by.startswith("Muon") else "adamw"
            expected.append((id(p), kind, 0.3 if decay == "yes" else 0.0))
        assert sorted(groups) == sorted(expected)


# ---- overfitting, files, compiling ---------------------------------------------------------------------------------

TINY = {"vocab_size": 16, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
WIDE = {"n_qkv": 32, "retention_chunk": 8}
TINY_MODELS = {
    "strawberry": {**WIDE},
    "strawberry, experts": {**WIDE, "n_experts": 2, "n_ffn_experts": 2, "r_layer": 1},
    "strawberry, adaptive": {**WIDE, "adaptive": True, "recursions": 2},
    "strawberry-silia": {"n_qkv": 32},
    "strawberry-v0": {**WIDE},
    "strawberry-v0, compaction and experts": {**WIDE, "compaction": True, "n_experts": 2},
    "palm": {"n_qkv": 32},
    "palm, lam": {"n_qkv": 32, "attention_type": "lam"},
    "tinystar": {},
    "tinystar, experts": {"n_ffn_experts": 4},
    "tinystar, latent": {"attention_type": "MHLA"},
    "transformer": {},
    "transformer, adaptive": {"kind": "decoder", "adaptive": True, "recursions": 2},
    "transformer, experts": {"attention_type": "expert", "n_experts": 2},
    "transformer, encoder": {"kind": "encoder"},
}
every_tiny_model = pytest.mark.parametrize("name", TINY_MODELS)


def tiny_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build({"arch": name.split(",")[0], **TINY, **TINY_MODELS[name]})


def test_every_architecture_has_a_tiny_model():
    assert {name.split(",")[0] for name in TINY_MODELS} == set(MODELS)


@pytest.mark.slow
@every_tiny_model
def test_one_batch_is_overfitted(name):
    """A loss under 0.1 nats within 300 steps; random weights have about 2.8."""
    model = tiny_model(name).train()
    text = torch.randint(16, (2, 17), generator=torch.Generator().manual_seed(1))
    source = text[:, :8].flip(1) if model.takes_source else None
    hyper = OptimizerHyperparams(weight_decay=0.0, eps=1e-8, beta2=0.99)
    optimizer, losses = build_optimizer(model, hyper, 1e-2, "cpu"), []
    while not losses or (losses[-1] >= 0.1 and len(losses) < 300):
        loss = model(text[:, :-1], text[:, 1:], source=source)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.1, (losses[0], len(losses), losses[-1])


@every_tiny_model
def test_a_saved_model_gives_the_same_logits_bit_for_bit(name, tmp_path):
    model = tiny_model(name).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(router.bias for router in model.routers().values())):
            tensor.add_(0.3 * torch.randn_like(tensor))
    (tmp_path / "text").write_text("characters")
    save_model(tmp_path / "file", model, encoder.load(f"chars:{tmp_path / 'text'}"), {})
    again = load_model(tmp_path / "file")[0].eval()
    idx = torch.randint(16, (2, 16))
    source = idx.flip(1) if model.takes_source else None
    assert again.config == model.config
    assert torch.equal(again(idx, source=source)[0], model(idx, source=source)[0])


def loss_and_gradients(call, model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of one training step over two chunks and a partial one."""
    idx, source = tokens(2, 37), source_for(model, 2)
    loss = call(idx[:, :-1], idx[:, 1:], source=source)[1]
    return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def check_equal(got: tuple, expected: tuple) -> None:
    """The losses and gradients that loss_and_gradients gives."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    for got_grad, expected_grad in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(got_grad, expected_grad, rtol=1e-3, atol=1e-5)


def check_compiled(case: str, backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build({**CASES[case], "n_layer": 1})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    check_equal(loss_and_gradients(compiled, model), loss_and_gradients(model, model))
    torch._dynamo.reset()


COMPILED = [
    *(f"{arch}()" for arch in MODELS),
    "strawberry(r_layer=0)",
    "tinystar(n_ffn_experts=4)",
    "tinystar(qk_norm=True,ffn_type=ReLU2,logit_softcap=5.0,tie_embeddings=False,skip_scalars=True,"
    "value_embeddings=True,attention_type=MQA-SWA)",
    "transformer(kind=encoder,attention_type=MHLA-SWA)",
    "transformer(kind=decoder,sparse=longformer,n_global=2,n_random=2)",
    "transformer(kind=decoder,adaptive=True,recursions=3,norm_position=pre)",
]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_model_compiles_as_one_graph(case):
    """torch.compile(fullgraph=True): no graph breaks, the same loss and gradients."""
    check_compiled(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["causal", "batch"])
def test_all_blocks_share_one_compilation(scope):
    """As many graphs for three blocks as for two; the same loss and gradients."""
    graphs = {}
    for n_layer in (2, 3):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build({**CASES["strawberry()"], "r_layer": 1, "retention_scope": scope, "n_layer": n_layer})
        expected = loss_and_gradients(model, model)
        counter = torch._dynamo.testing.CompileCounter()
        check_equal(loss_and_gradients(torch.compile(model, backend=counter, dynamic=False), model), expected)
        graphs[n_layer] = counter.frame_count
    torch._dynamo.reset()
    assert graphs[2] == graphs[3] < 9


@pytest.mark.slow
def test_compile_partitions_share_a_graph_and_equal_the_eager_model():
    """Equal partitions share a graph; the loss and gradients equal those of the eager model."""
    compiled = []
    for n_layer, n in ((5, 2), (4, 2), (4, 1)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build({**CASES["tinystar()"], "attention_type": "MHA-SWA", "n_layer": n_layer})
        expected = loss_and_gradients(model, model)
        assert model.set_compile_partitions(n) == (n > 1)
        counter = torch._dynamo.testing.CompileCounter()
        check_equal(loss_and_gradients(torch.compile(model, backend=counter, dynamic=False), model), expected)
        compiled.append((counter.frame_count, counter.op_count))
    torch._dynamo.reset()
    (uneven, _), (partitioned, ops_of_two), (whole, ops_of_four) = compiled
    assert whole == 1 < partitioned <= 4 and uneven == partitioned + 1 and ops_of_two < 0.6 * ops_of_four


@pytest.mark.slow
def test_model_compiles_with_inductor():
    require_program("g++", "clang++")
    with torch._inductor.config.patch("cpp.vec_isa_ok", True):  # otherwise ten programs are compiled to probe the CPU
        check_compiled("tinystar()", "inductor")


# ---- experts -------------------------------------------------------------------------------------------------------


def make_skewed_model(hyperparams: dict) -> nn.Module:
    """All embeddings share a direction, which the first expert's router weight has too."""
    torch.manual_seed(0)
    model = build({"vocab_size": 64, "block_size": 16, "n_layer": 1, "n_head": 4, "n_embd": 16, **hyperparams})
    direction = nn.functional.normalize(torch.randn(16), dim=0)
    with torch.no_grad():
        model.embed.weight.normal_().add_(2 * direction)
        for router in model.routers().values():
            router.weight.normal_(std=0.5)
            router.weight[0] += direction
            router.weight[-1] -= 0.5 * direction
    return model.train()


def train_and_measure_loads(model: nn.Module, steps: int, balanced: bool) -> dict[str, torch.Tensor]:
    """Share of each expert relative to uniform over the last 50 steps of training."""
    routers, generator = model.routers(), torch.Generator().manual_seed(1)
    total = {name: torch.zeros(router.n) for name, router in routers.items()}
    optimizer = build_optimizer(model, OptimizerHyperparams(weight_decay=0.0), 1e-3, "cpu")
    for step in range(steps):
        text = torch.randint(64, (4, 17), generator=generator)
        optimizer.zero_grad()
        model(text[:, :-1], text[:, 1:])[1].backward()
        optimizer.step()
        for name, router in routers.items():
            total[name] += router.load * (step >= steps - 50)
            if not balanced:
                router.load.zero_()
        if balanced:
            model.after_step()
    return {name: load / load.mean() for name, load in total.items()}


ROUTED = {
    "blocks.0.tea.router blocks.0.ffn_router depth": {
        "n_qkv": 16, "r_layer": 0, "n_experts": 4, "n_ffn_experts": 4, "adaptive": True, "recursions": 2},
    "blocks.0.ffn.router": {"arch": "tinystar", "n_ffn_experts": 4},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("names", ROUTED)
def test_the_bias_balances_a_skewed_router(names):
    """After 250 steps every load is within 20 % of uniform with the bias, and no router's loads are without it."""
    for balanced in (True, False):
        loads = train_and_measure_loads(make_skewed_model(ROUTED[names]), 250, balanced)
        assert list(loads) == names.split()
        for name, load in loads.items():
            assert ((load - 1).abs().max() < 0.2) == balanced, (name, balanced, load)


def test_the_bias_moves_by_a_hundredth_towards_the_mean():
    router = model_file.Router(4, 3, 1)
    router.load.copy_(torch.tensor([5.0, 3.0, 1.0]))
    router.balance()
    assert router.bias.tolist() == pytest.approx([-0.01, 0.0, 0.01]) and router.load.tolist() == [0, 0, 0]


def test_loads_sum_over_micro_batches_and_steps_of_the_block():
    sizes = {"n_qkv": 32, "retention_chunk": 16, "r_layer": 2, "aft_ratio": 1}  # aft, tea, tea: attention twice
    model = build({**TINY, "n_embd": 32, **sizes, "n_head": 4, "n_experts": 4, "n_ffn_experts": 4, "a_ffn_experts": 1})
    tea, ffn = model.routers().values()
    model.eval()(tokens(3, 16) % 16)
    assert tea.load.sum() == ffn.load.sum() == 0  # evaluation does not count
    model.train()
    for micro in (1, 2, 3):
        model(tokens(3, 16, seed=micro) % 16)
        assert tea.load.sum() == micro * 3 * 16 * 2 * 2  # tokens, uses, active
        assert ffn.load.sum() == micro * 3 * 16 * 3 * 1
    expected = 0.01 * torch.sign(tea.load.mean() - tea.load)
    model.after_step()
    torch.testing.assert_close(tea.bias, expected)
    assert tea.load.sum() == ffn.load.sum() == 0
    assert "blocks.0.tea.router.bias" in model.state_dict() and not any("load" in name for name in model.state_dict())


def test_frozen_tokens_do_not_count_as_load():
    """The depth router counts all tokens once; the others count the tokens whose depth reaches the pass."""
    routed = {"n_experts": 2, "a_experts": 1, "adaptive": True, "recursions": 2}
    model = build({**TINY, "n_qkv": 32, "r_layer": 0, **routed})
    model.train()(tokens(3, 16) % 16)
    depth, tea = model.depth.load, model.blocks[0].tea.router.load
    assert depth.sum() == 48 and 0 < depth[0] < 48
    assert tea.sum() == 48 + depth[1]


@pytest.mark.parametrize("cached", [False, True])
def test_each_expert_attends_to_exactly_its_window(cached):
    """Token t − w changes nothing through an expert of window w; token t − w + 1 does."""
    torch.manual_seed(0)
    windows = [3, 1, 8, 5]
    c = build({"n_qkv": 32, "n_head": 8, "n_experts": 4, "a_experts": 4, "windows": windows, "block_size": 32}).config
    tea = model_file.ExpertAttention(c, no_transform).eval()
    init_weights_of(tea)
    q, k, v, x = (torch.randn(1, 20, n) for n in (32, 32, 32, c.n_embd))

    def parts(k, v):
        at, state = ForwardContext(torch.arange(20)[None]), None
        if not cached:
            return tea(q, k, v, x, at, None)[0].chunk(4, dim=-1)
        state = tea.new_cache(1, 20, "cpu", torch.float32)
        steps = [tea(*(z[:, a:b] for z in (q, k, v, x)), ForwardContext(torch.arange(a, b)[None]), state)
                 for a, b in [(0, 9), (9, 10), (10, 11), (11, 17), (17, 18), (18, 19), (19, 20)]]  # fmt: skip
        return torch.cat(steps, dim=1)[0].chunk(4, dim=-1)

    before = parts(k, v)
    for s in range(20):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, s] += 1
        other_v[:, s] -= 1
        for w, one, two in zip(windows, before, parts(other_k, other_v), strict=True):
            changed = (one != two).any(dim=-1).nonzero().flatten().tolist()
            assert changed == list(range(s, min(s + w, 20))), (w, s, changed)


def init_weights_of(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.1)


@pytest.mark.parametrize("options", [{"r_layer": 0}, {"n_qkv": 32, "r_layer": 0, "n_experts": 2, "windows": [7, 4]}])
def test_a_model_attends_to_exactly_its_window(options):
    """One layer of sliding-window attention: a logit depends on the newest `window` tokens only."""
    torch.manual_seed(0)
    model = build({**TINY, "n_head": 4, "block_size": 32, "window": 7, **options}).eval()
    idx = torch.randint(16, (1, 20))
    for s in range(20):
        other = idx.clone()
        other[0, s] = (other[0, s] + 1) % 16
        changed = (model(other)[0] != model(idx)[0]).any(dim=-1)[0].nonzero().flatten().tolist()
        assert changed[0] == s and changed[-1] < s + 7
        if options == {"r_layer": 0}:
            assert changed == list(range(s, min(s + 7, 20)))


# ---- cache bytes ---------------------------------------------------------------------------------------------------


def cache_bytes(hyperparams: dict, max_length: int, rows: int = 2, filled: int = 0) -> int:
    model = build({"vocab_size": 16, "block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 32, **hyperparams}).eval()
    cache = model.new_cache(rows, max_length)
    if filled:
        model(torch.zeros(rows, filled, dtype=torch.int64), cache=cache)
    return cache.nbytes()


RINGS = [  # tinystar's attention_type → numbers per token and layer
    ({"attention_type": "MHLA", "kv_rank": 12, "rope_dim": 4}, 12 + 4),
    ({"attention_type": "MHA"}, 2 * 4 * 8),
    ({"attention_type": "GQA", "n_kv_head": 2}, 2 * 2 * 8),
    ({"attention_type": "MQA"}, 2 * 8),
]
FLOAT = 4  # bytes; each ring buffer has one more slot, for masked writes


@pytest.mark.parametrize("options, numbers", RINGS)
@pytest.mark.parametrize("filled", [0, 40])
def test_attention_cache_bytes_per_token(options, numbers, filled):
    """2 rows, 2 layers: MHLA kv_rank + rope_dim, others 2·n_kv_head·d; with a window, at most `window` tokens."""
    slot = 2 * 2 * FLOAT * numbers
    hyperparams = {"arch": "tinystar", **options}
    for length in (50, 200):
        assert cache_bytes(hyperparams, length, filled=filled) == (length + 1) * slot
    windowed = {**hyperparams, "attention_type": f"{options['attention_type']}-SWA", "window": 30}
    for length, n_tokens in ((20, 20), (50, 30), (10**6, 30)):
        assert cache_bytes(windowed, length, filled=min(filled, length)) == (n_tokens + 1) * slot


D = 64
SUMS = FLOAT * 3 * D  # numerator, denominator, maximum
ring = FLOAT * 2 * D
CONSTANT = {  # bytes for each row and layer, whatever the length; the window is 30
    "AFT simple": ({"arch": "palm", "n_qkv": D}, SUMS),
    "AFT conv": ({"arch": "palm", "n_qkv": D, "aft": "conv", "window": 30}, SUMS + 31 * ring),
    "LAM": ({"arch": "palm", "n_qkv": D, "attention_type": "lam"}, FLOAT * 4 * (17 + 16 * 17)),
    "retention": (
        {"n_qkv": D, "r_layer": 1, "window": 30},  # two sums and the open chunk's weights; then an AFT and a TEA
        FLOAT * (2 * 32 * 32 + 3 * D * 32 + 2 * 32 * D + 32 * 32) + SUMS + 31 * ring),
    "retention, two passes of two experts": (
        {"n_qkv": D, "r_layer": 1, "windows": [30, 9], "n_experts": 2, "recursions": 2},
        2 * (FLOAT * (3 * 32 * 32 + 5 * D * 32) + SUMS + (31 + 10) * FLOAT * D)),
    "compaction": (
        {"arch": "strawberry-v0", "n_qkv": D, "compaction": True, "aft": "simple", "window": 30, "r_layer": 1},
        FLOAT * 3 * 32 * 32 + SUMS + 31 * ring),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_cache_bytes_of_mixers_with_constant_state(name):
    hyperparams, size = CONSTANT[name]
    for length, filled in ((40, 0), (40, 40), (5000, 45), (10**6, 0)):
        assert cache_bytes(hyperparams, length, filled=filled) == 2 * 2 * size


@pytest.mark.parametrize("aft_kind, n_tokens, far", [("full", 200, 0), ("local", 30, SUMS)])
def test_positional_aft_cache_bytes(aft_kind, n_tokens, far):
    """`full` caches all k, v; `local` the window and the three sums."""
    hyperparams = {"arch": "palm", "n_qkv": D, "aft": aft_kind, "window": 30}
    assert cache_bytes(hyperparams, 200) == 2 * 2 * ((n_tokens + 1) * ring + far)


def test_an_encoder_decoder_caches_its_source_once():
    model = build({"arch": "transformer", **TINY, "attention_type": "MQA"}).eval()
    cache = model.new_cache(2, 10, torch.zeros(2, 7, dtype=torch.int64))
    size = 2 * 11 * FLOAT * 2 * 8 + 2 * 7 * FLOAT * 2 * 8
    for _ in range(2):
        assert cache.nbytes() == size
        model(torch.zeros(2, 4, dtype=torch.int64), cache=cache)
    assert cache.nbytes() == size


@pytest.mark.parametrize("n_head, expected", [(1, 1), (2, 1), (3, 1), (4, 2), (12, 6), (15, 5), (25, 5)])
def test_heads_of_any_number_are_grouped_by_default(n_head, expected):
    for arch in ("tinystar", "transformer"):
        c, problems = check(CONFIGS[arch], {"arch": arch, "n_head": n_head, "n_embd": 8 * n_head})
        assert problems == [] and c.n_kv_head == expected and n_head % c.n_kv_head == 0

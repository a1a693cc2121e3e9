"""The kernels of strawberry/ops/triton in Triton's interpreter, on the CPU. tests/ops/test_kernels.py runs this file in
processes of its own with TRITON_INTERPRET=1, so that Triton is unchanged for other tests.

References are naive float64 code that shares nothing with the kernels.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from decoding import SMALL, by_generate, collect, requests_for, small_model
from triton.runtime.errors import InterpreterError
from triton_interpreter import reduce_overhead

from model import AFTS, build
from optimizer import Muon
from strawberry.cache import LayerCache
from strawberry.context import ForwardContext
from strawberry.inference.engine import Decoder
from strawberry.inference.fusing import fuse_linears
from strawberry.ops import float8, muon
from strawberry.ops.attention import decode_attention
from strawberry.ops.float8 import act_quantize, act_quantize_backward, concat_quantize, transpose_fp8
from strawberry.ops.fused_linear import NO_NORM, Norm, fused_linear, fused_linear_plain
from strawberry.ops.linear import int8_linear, prepare_weights, quantize_int8
from strawberry.ops.memory import delta_memory, read_chunks, read_memory
from strawberry.ops.qkv import norm_channels
from strawberry.ops.retention import GatedUpdate
from strawberry.ops.triton import aft, aft_positional, memory, memory_step, rope
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.aft import fused_aft_simple, is_chained, segment_size
from strawberry.ops.triton.aft_positional import fused_aft_conv, fused_aft_local
from strawberry.ops.triton.common import INTERPRETED
from strawberry.ops.triton.cross_entropy import fused_cross_entropy
from strawberry.ops.triton.decode_attention import num_splits
from strawberry.ops.triton.retention import can_fuse_update
from strawberry.ops.triton.rope import can_fuse_rope, fused_qk_rope_norm, qkv_grad_quantize

assert INTERPRETED, "run by tests/ops/test_kernels.py, or with TRITON_INTERPRET=1"
reduce_overhead()


@pytest.fixture(autouse=True)
def fill_empty_with_nan(monkeypatch):
    """An element that a kernel does not write is NaN."""
    empty = torch.empty

    def empty_with_nan(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", empty_with_nan)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_close(got: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    """‖got − exact‖ < bound · ‖exact‖, which is false for NaN."""
    assert got.shape == exact.shape
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < bound, f"relative error {error:.1e}"


BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.bfloat16]


@kernels.jit
def square_kernel(x):
    tl.store(x, tl.load(x) * tl.load(x))


def test_integer_overflow_is_an_error():
    """The patched interpreter checks as the original does."""
    x = torch.tensor([-(2**15)], dtype=torch.int32)
    square_kernel[(1,)](x)
    assert x.item() == 2**30
    with pytest.raises(InterpreterError, match="int32 overflow in mul"):
        square_kernel[(1,)](x)


# ---- decode_attention ------------------------------------------------------------------------------------------------


def naive_decode_attention(q, k, v, pos, size, scale):
    """A loop over rows, heads and the positions that each query sees, by the definition of a ring buffer."""
    B, H, d = q.shape
    group = H // (k.size(-1) // d)
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros(B, H, d, dtype=torch.float64)
    for b in range(B):
        p = int(pos[b])
        slots = [s % size for s in range(max(0, p - size + 1), p + 1)]
        for h in range(H if slots else 0):
            part = slice(h // group * d, (h // group + 1) * d)
            y[b, h] = (k[b, slots, part] @ q[b, h] * scale).softmax(0) @ v[b, slots, part]
    return y


def ring_buffer_inputs(B, H, Hkv, d, size, pos, dtype=torch.float32):
    """q, k, v, pos. Slots that must not be read and queries of idle rows are NaN."""
    pos = torch.tensor(pos)
    assert len(pos) == B
    q, k, v = randn(B, H, d, dtype=dtype), *(randn(B, size + 1, Hkv * d, seed=s, dtype=dtype) for s in (1, 2))
    for b, p in enumerate(pos.tolist()):
        k[b, min(p + 1, size) :] = v[b, min(p + 1, size) :] = math.nan
        q[b] *= math.nan if p < 0 else 1
    return q, k, v, pos


RING_BUFFERS = {  # B, H, Hkv, d, size, pos
    "MHA": (2, 3, 3, 64, 40, [39, 7]),
    "GQA": (2, 6, 2, 64, 70, [69, 63]),
    "MQA": (1, 12, 1, 80, 33, [20]),
    "wrapped around": (3, 2, 2, 24, 50, [50, 131, 10_000_000_019]),
    "GQA wrapped around": (2, 4, 2, 24, 300, [300, 5000]),
    "idle rows": (3, 4, 4, 24, 20, [-1, 3, -1]),
    "GQA idle rows": (3, 4, 1, 24, 20, [-1, 3, -1]),
    "first token": (2, 4, 2, 128, 64, [0, 1]),
    "heads of 128": (1, 2, 2, 128, 200, [177]),
    "heads of 256": (1, 2, 1, 256, 40, [31]),
    "one slot": (2, 2, 2, 8, 1, [0, 9]),
    "more heads than 16 to a group": (1, 20, 1, 16, 90, [88]),
}


@pytest.mark.parametrize("splits, dtype", [(1, torch.float32), (3, torch.bfloat16), (16, torch.float32)], ids=str)
@pytest.mark.parametrize("shape", RING_BUFFERS)
def test_decode_attention_equals_softmax_over_the_ring_buffer(shape, splits, dtype):
    q, k, v, pos = ring_buffer_inputs(*RING_BUFFERS[shape], dtype)
    size, scale = RING_BUFFERS[shape][4], RING_BUFFERS[shape][3] ** -0.5
    got = torch.ops.strawberry.decode_attention(q, k, v, pos, size, scale, splits)
    assert got.dtype == dtype
    idle = pos < 0
    assert (got[idle] == 0).all()
    check_close(got[~idle], naive_decode_attention(q, k, v, pos, size, scale)[~idle], BOUND[dtype])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", RING_BUFFERS)
def test_decode_attention_writes_new_keys_and_values_into_the_ring_buffer(shape, splits):
    """The result equals that of a buffer that has the new key and value already. An idle row's buffer is unchanged."""
    B, H, Hkv, d, size, _ = RING_BUFFERS[shape]
    q, k, v, pos = ring_buffer_inputs(*RING_BUFFERS[shape])
    new_k, new_v = randn(B, 2, Hkv * d, seed=8).unbind(1)  # non-contiguous
    written_k, written_v = k.clone(), v.clone()
    for b, p in enumerate(pos.tolist()):
        if p >= 0:
            written_k[b, p % size], written_v[b, p % size] = new_k[b], new_v[b]
    got = torch.ops.strawberry.decode_attention_writing(q, k, v, new_k, new_v, pos, size, 0.3, splits)
    busy = pos >= 0
    check_close(got[busy], naive_decode_attention(q, written_k, written_v, pos, size, 0.3)[busy], BOUND[torch.float32])
    assert (got[~busy] == 0).all()
    torch.testing.assert_close((k, v), (written_k, written_v), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["tinystar", "tinystar, window", "strawberry, experts, two passes",
                                  "strawberry, memory", "strawberry-silia", "encoder-decoder"])  # fmt: skip
def test_decoder_with_kernels_generates_the_tokens_of_generate_without_kernels(name, monkeypatch):
    model = small_model(name).float()
    requests = [replace(request, max_new_tokens=4) for request in requests_for(model, 3)]
    got = collect(Decoder(model, 2, 64), requests)
    monkeypatch.setattr(kernels, "can_run", lambda *tensors: False)
    for request, (tokens, _) in zip(requests, got, strict=True):
        assert tokens == by_generate(model, request)


@pytest.mark.parametrize("shape", RING_BUFFERS)
def test_plain_decode_attention_equals_softmax_over_the_ring_buffer(shape):
    q, k, v, pos = ring_buffer_inputs(*RING_BUFFERS[shape], torch.float64)
    size, idle = RING_BUFFERS[shape][4], pos < 0
    got = decode_attention(
        q.masked_fill(q.isnan(), 0.0), *(x.masked_fill(x.isnan(), 9.0) for x in (k, v)), pos, size, 0.3
    )
    assert (got[idle] == 0).all()
    exact = naive_decode_attention(q, k, v, pos, size, 0.3)
    torch.testing.assert_close(got[~idle], exact[~idle], rtol=1e-12, atol=1e-12)


def test_decode_attention_with_scores_of_a_thousand():
    q, k, v, pos = ring_buffer_inputs(2, 2, 2, 16, 100, [99, 57])
    exact = naive_decode_attention(q * 400, k, v, pos, 100, 1.0)
    check_close(decode_attention(q * 400, k, v, pos, 100, 1.0), exact, 1e-4)


def test_decode_attention_accepts_non_contiguous_queries():
    """q is a slice of a fused projection's output."""
    q, k, v, pos = ring_buffer_inputs(2, 4, 4, 16, 30, [29, 3])
    qkv = torch.full((2, 3 * 64), math.nan)
    qkv[:, :64] = q.flatten(1)
    view = qkv[:, :64].unflatten(1, (4, 16))
    assert not view.is_contiguous()
    check_close(decode_attention(view, k, v, pos, 30, 0.25), naive_decode_attention(q, k, v, pos, 30, 0.25), 2e-6)


def test_decode_attention_is_batch_invariant():
    q, k, v, pos = ring_buffer_inputs(3, 4, 2, 24, 300, [299, 5, 1000])
    alone = torch.cat([torch.ops.strawberry.decode_attention(*(x[b : b + 1] for x in (q, k, v, pos)), 300, 0.2, 3)
                       for b in range(3)])  # fmt: skip
    assert torch.equal(torch.ops.strawberry.decode_attention(q, k, v, pos, 300, 0.2, 3), alone)


def test_decode_attention_splits_only_long_contexts(monkeypatch):
    """Long ones have no more splits than the GPU runs programs at once."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 132)
    q, short, long = torch.zeros(1, 12, 64), torch.zeros(1, 257, 768), torch.zeros(1, 8193, 768)
    assert num_splits(q, short, 256) == 1
    assert 16 <= num_splits(q, long, 8192) <= 128
    assert num_splits(torch.zeros(512, 12, 64), long.expand(512, -1, -1), 8192) == 1


# ---- int8 ------------------------------------------------------------------------------------------------------------


def test_quantize_int8_rounds_to_nearest_and_keeps_rows_of_zeros():
    w = randn(50, 64)
    w[7] = 0
    w[8] *= 1e-20
    w8, scale = quantize_int8(w)
    assert w8.dtype == torch.int8 and scale.dtype == torch.float32 and (w8[7] == 0).all()
    error = (w8.double() * scale.double().unsqueeze(1) - w.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(1)).all()
    nonzero = torch.arange(50) != 7
    assert (w8.abs().amax(dim=1)[nonzero] == 127).all() and (w8 >= -127).all()
    assert w8.sign().eq(w.sign()).logical_or(w8 == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 16, 33, 64, 65])
def test_int8_linear_equals_the_dequantized_product(M, biased, dtype):
    N, K = 37, 200
    w8 = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(M))
    x, scale = randn(M, K, dtype=dtype), randn(N, seed=1).exp() / 100
    bias = randn(N, seed=2, dtype=dtype) if biased else None
    exact = x.double() @ (w8.double() * scale.double().unsqueeze(1)).T + (bias.double() if biased else 0)
    got = int8_linear(x, w8, scale, bias)
    assert got.dtype == dtype
    check_close(got, exact, BOUND[dtype])


@pytest.mark.parametrize("N, K", [(1, 1), (4, 1024), (5, 2500), (130, 16)])
@pytest.mark.parametrize("M", [1, 7])
def test_int8_linear_of_odd_shapes(M, N, K):
    w8 = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    x = randn(M, 1, 2 * K)[..., :K]  # non-contiguous
    got = int8_linear(x, w8, torch.full((N,), 0.01))
    check_close(got, x.double() @ w8.double().T * 0.01, 2e-6)

# ---- fused_linear ----------------------------------------------------------------------------------------------------


def naive_fused_linear(x, weights, scales=(), biases=(), norm=NO_NORM, activation="identity", residual=None):
    """Row by row, by the definitions, in float64."""
    w = torch.cat([w.double() for w in weights], dim=-2)
    if scales:
        w = w * torch.cat(list(scales)).double().unsqueeze(-1)
    rows = []
    for m, row in enumerate(x.double()):
        if norm.kind == "layer":
            row = row - row.sum() / len(row)
        if norm.kind != "none":
            row = row / ((row**2).sum() / len(row) + norm.eps).sqrt()
        row = row if norm.gain is None else row * norm.gain.double()
        row = row if norm.shift is None else row + norm.shift.double()
        rows.append((w[m] if w.dim() == 3 else w) @ row)
    h = torch.stack(rows)
    h = h + torch.cat(list(biases)).double() if biases else h
    half = h.size(1) // 2
    h = {
        "identity": lambda: h,
        "relu": lambda: h * (h > 0),
        "relu2": lambda: (h * (h > 0)) ** 2,
        "gelu": lambda: h * (1 + torch.special.erf(h / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
        "swiglu": lambda: h[:, :half] * h[:, half:] / (1 + (-h[:, half:]).exp()),
    }[activation]()
    return h if residual is None else h + residual.double()


def fused_linear_inputs(M, K, widths, dtype=torch.float32, norm="none", biased=False, int8=False, per_row=False):
    shape = [(M, n, K) if per_row else (n, K) for n in widths]
    weights = [randn(*size, seed=10 + i, dtype=dtype) / K**0.5 for i, size in enumerate(shape)]
    scales = []
    if int8:
        weights, scales = zip(*map(quantize_int8, weights), strict=True)
    biases = [randn(n, seed=20 + i, dtype=dtype) for i, n in enumerate(widths)] if biased else []
    gain, shift = (randn(K, seed=s, dtype=dtype) + 1 for s in (30, 31))
    norm = {"none": Norm(), "rms": Norm("rms", gain, None, 1e-6), "plain rms": Norm("rms", None, None, 1e-6),
            "layer": Norm("layer", gain, shift, 1e-5)}[norm]  # fmt: skip
    return randn(M, K, dtype=dtype) * 3 + 0.5, weights, scales, biases, norm


@pytest.mark.parametrize("norm, biased, int8, M, activation", [
    *(("layer", True, False, 2, activation) for activation in ("identity", "relu", "relu2", "gelu", "gelu_tanh")),
    *(("rms", False, True, 2, activation) for activation in ("identity", "swiglu")),
    *(("none", True, True, 20, activation) for activation in ("relu2", "swiglu")),
    ("layer", True, False, 20, "gelu"), ("layer", True, False, 2, "swiglu"), ("plain rms", False, False, 2, "swiglu"),
])  # fmt: skip
def test_fused_linear_equals_norm_linear_activation_and_residual(norm, biased, int8, M, activation):
    x, weights, scales, biases, norm = fused_linear_inputs(M, 300, [22], torch.bfloat16, norm, biased, int8)
    residual = randn(M, 22 // (1 + (activation == "swiglu")), seed=3, dtype=torch.bfloat16)
    args = (weights, scales, biases, norm, activation, residual)
    got = fused_linear(x, *args)
    assert got.dtype == torch.bfloat16
    check_close(got, naive_fused_linear(x, *args), BOUND[torch.bfloat16])
    check_close(fused_linear(x.float(), *args[:-1], residual.float()), naive_fused_linear(x, *args), 3e-6)
    check_close(fused_linear_plain(x.double(), *args), naive_fused_linear(x, *args), 1e-6)


@pytest.mark.parametrize("K, widths", [(1, [1]), (64, [4, 4, 4]), (257, [5, 1, 9]), (768, [12, 7])])
@pytest.mark.parametrize("M", [1, 5, 17, 64])
def test_fused_linear_of_odd_shapes(M, K, widths):
    x, *args = fused_linear_inputs(M, K, widths, norm="layer" if K > 1 else "rms", biased=True)
    residual = randn(M, 2 * sum(widths), seed=3)[:, : sum(widths)]  # non-contiguous
    got = fused_linear(x.repeat(1, 2)[:, :K], *args, residual=residual)
    check_close(got, naive_fused_linear(x, *args, residual=residual), 3e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_fused_linear_is_batch_invariant(int8):
    x, *args = fused_linear_inputs(16, 100, [10], torch.bfloat16, "layer", True, int8)
    y = fused_linear(x, *args, "swiglu")
    for rows in (slice(0, 1), slice(3, 5), slice(7, 16)):
        assert torch.equal(fused_linear(x[rows], *args, "swiglu"), y[rows])


def test_fused_linear_with_weights_per_row():
    x, *args = fused_linear_inputs(3, 40, [6], norm="rms", per_row=True)
    check_close(fused_linear(x, *args, "swiglu"), naive_fused_linear(x, *args, activation="swiglu"), 3e-6)


def test_compiled_step_runs_fused_linear():
    """fuse_linears rewrites the graph that torch.compile traces."""
    torch.manual_seed(3)
    hyper = {"arch": "tinystar", "norm_type": "LayerNorm", "attention_type": "MHA", "ffn_type": "GELU",
             "pos_encoding": "Learned", "n_layer": 1, "n_embd": 16, "n_head": 2}  # fmt: skip
    model = build(SMALL | hyper).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)

    def fuse(module, inputs):
        assert fuse_linears(module.graph) == 5
        module.recompile()
        return module.forward

    with torch.no_grad():
        logits = []
        for step in (model.decode_step, torch.compile(model.decode_step, backend=fuse, dynamic=False)):
            cache = model.new_cache(1, 8)
            model.logits_after(torch.tensor([[1, 2]]), cache)
            logits.append(step(torch.tensor([3]), cache, 8))
    check_close(logits[1], logits[0].double(), 3e-6)


# ---- AFT simple ------------------------------------------------------------------------------------------------------


def naive_aft_simple(q, k, v):
    """Softmax over the keys of every pair of tokens; differentiable."""
    T = k.size(1)
    score = k.unsqueeze(1).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1)[None, :, :, None], -math.inf)
    return torch.sigmoid(q) * (score.softmax(dim=2) * v.unsqueeze(1)).sum(dim=2)  # (B, T, S, D) summed over S


def make_keys(kind: str, T: int, D: int) -> torch.Tensor:
    t = torch.arange(T)[:, None]
    return {
        "normal": randn(T, D),
        "-80 or 80": 80 * randn(T, D).sign(),
        "uniform": 160 * randn(T, D).sigmoid() - 80,
        "first key is the maximum": torch.where(t == 0, 80.0, 69.0).expand(T, D),
        "high, then low": torch.where(t < 8, 80.0, -80.0).expand(T, D),
        "low, then high": torch.where(t < T - 8, -80.0, 80.0).expand(T, D),
        "rising": torch.linspace(-80, 80, T)[:, None].expand(T, D),
        "thousands apart": 3000 * randn(T, D),
    }[kind]


KEYS = [
    "normal",
    "-80 or 80",
    "uniform",
    "first key is the maximum",
    "high, then low",
    "low, then high",
    "rising",
    "thousands apart",
]


def check_aft_simple(q, k, v, bound: float) -> None:
    """Result and gradients against float64. The gradient of k is a difference of sums, which may cancel: its error is
    relative to those sums."""
    weight = randn(*v.shape, seed=9, dtype=v.dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = naive_aft_simple(*exact)
    (expected * weight.double()).sum().backward()
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    got = torch.ops.strawberry.aft_simple(*ours, True)[0]
    assert got.dtype == v.dtype
    (got * weight).sum().backward()
    check_close(got, expected.detach(), bound)
    floor = (exact[2].grad * exact[2].detach()).norm().item()
    for name, x, exact_x in zip("qkv", ours, exact, strict=True):
        assert x.grad.dtype == x.dtype
        size = exact_x.grad.norm().item() + (floor if name == "k" else 0.0)
        error = (x.grad.double() - exact_x.grad).norm().item()
        assert error <= bound * size, f"gradient of {name}: {error:.1e} of {size:.1e}"


@pytest.fixture(params=["chained", "not chained"])
def small_tiles(request, monkeypatch):
    """Smaller tiles, so that short inputs have several: the interpreter is slow."""
    sizes = {"AFT_ROWS": 8, "AFT_CHAINED_ROWS": 4, "AFT_SEGMENT": 8, "AFT_MIN_SEGMENT": 8, "AFT_GROUP": 2}
    for name, value in (sizes | {"AFT_MIN_PROGRAMS": 10**9 if request.param == "chained" else 0}).items():
        monkeypatch.setattr(aft, name, value)


@pytest.mark.parametrize("keys", KEYS)
def test_aft_simple_forward_and_backward(keys, small_tiles):
    """Three segments, two groups."""
    B, T, D = 2, 21, 20
    k = torch.stack((make_keys(keys, T, D), make_keys(keys, T, D).flip(1) - 5))
    check_aft_simple(randn(B, T, D), k, randn(B, T, D, seed=2), 2e-6)


@pytest.mark.parametrize("T", [1, 8, 9, 17, 40])
def test_aft_simple_of_any_length(T, small_tiles):
    check_aft_simple(*(randn(1, T, 33 if T == 17 else 3, seed=s) for s in range(3)), 2e-6)


def test_aft_simple_over_128_tokens_with_default_tiles():
    """Short, because the interpreter is slow; `python bench.py kernels` tests 65,536 on a GPU."""
    check_aft_simple(*(randn(1, 128, 2, seed=s) for s in range(3)), 2e-6)


def test_aft_simple_in_bfloat16(small_tiles):
    check_aft_simple(*(randn(1, 21, 20, seed=s, dtype=torch.bfloat16) for s in range(3)), 8e-3)


def test_aft_simple_accepts_mixed_dtypes_and_non_contiguous_values(small_tiles):
    """As after QK-norm: q and k in float32, v a bfloat16 slice of the fused projection."""
    q, k, v = randn(2, 20, 24, dtype=torch.bfloat16).chunk(3, dim=-1)
    check_aft_simple(q.float(), k.float() * 2, v, 8e-3)


def test_aft_simple_propagates_nan_to_later_tokens_of_its_channel_only(small_tiles):
    """Chained programs wait for sums to be written: NaN is a written one."""
    q, k, v = (randn(2, 40, 5, seed=s) for s in range(3))
    y = fused_aft_simple(q, k, v)
    k[0, 11, 3] = math.nan
    with_nan = fused_aft_simple(q, k, v)
    affected = torch.zeros(2, 40, 5, dtype=torch.bool)
    affected[0, 11:, 3] = True
    assert not torch.isfinite(with_nan[affected]).any() and torch.equal(with_nan[~affected], y[~affected])


def test_aft_simple_chains_segments_only_with_few_programs(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 132)
    chained = [is_chained(torch.empty(B, T, 768, device="meta"))
               for B, T in [(32, 1024), (22, 1024), (8, 4096), (1, 65536), (1, 128), (1, 32)]]  # fmt: skip
    assert chained == [False, False, True, True, True, False]
    assert [segment_size(torch.empty(4, T, D, device="meta")) for T, D in [(256, 256), (8192, 256)]] == [32, 128]


def test_aft_simple_is_causal():
    q, k, v = (randn(1, 40, 8, seed=s) for s in range(3))
    y = fused_aft_simple(q, k, v)
    k[:, 21:], v[:, 21:] = math.nan, math.nan
    assert torch.equal(fused_aft_simple(q, k, v)[:, :21], y[:, :21])


def test_aft_simple_is_batch_invariant():
    q, k, v = (randn(3, 20, 8, seed=s) for s in range(3))
    y = fused_aft_simple(q, k, v)
    assert torch.equal(torch.cat([fused_aft_simple(*(x[b : b + 1] for x in (q, k, v))) for b in range(3)]), y)


# ---- AFT with a position bias ----------------------------------------------------------------------------------------


def naive_aft_positional(q, k, v, p):
    """Softmax over keys plus bias p (G, T, T) of every pair of tokens; G groups of channels; differentiable."""
    T, D = k.shape[1:]
    score = k.unsqueeze(1) + p.movedim(0, -1).repeat_interleave(D // len(p), dim=-1)
    score = score.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1)[None, :, :, None], -math.inf)
    return torch.sigmoid(q) * (score.softmax(dim=2) * v.unsqueeze(1)).sum(dim=2)


def make_bias_matrix(kind: str, p, T: int, window: int) -> torch.Tensor:
    """The bias p (G, T, T): taps[|t − s|] or a_t · b_s, and 0 where the distance is `window` or more."""
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    if kind == "conv":
        bias = p[0][:, distance.clamp(max=window - 1)]
    else:
        bias = (p[0][:T] @ p[1][:T].T)[None]
    return torch.where(distance < window, bias, 0.0)


def check_aft_positional(kind, q, k, v, p, window: int, bound: float) -> None:
    """Result and gradients, those of the bias too, against float64."""
    weight = randn(*v.shape, seed=9, dtype=v.dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, *p)]
    expected = naive_aft_positional(*exact[:3], make_bias_matrix(kind, exact[3:], v.size(1), window))
    (expected * weight.double()).sum().backward()
    ours = [x.detach().requires_grad_() for x in (q, k, v, *p)]
    got = fused_aft_conv(*ours) if kind == "conv" else fused_aft_local(*ours, window)
    assert got.dtype == v.dtype
    (got * weight).sum().backward()
    check_close(got, expected.detach(), bound)
    floor = (exact[2].grad * exact[2].detach()).norm().item()  # see check_aft_simple
    for name, x, exact_x in zip("qkvab", ours, exact, strict=False):
        size = exact_x.grad.norm().item() + (floor if name in "kab" else 0.0)
        error = (x.grad.double() - exact_x.grad).norm().item()
        assert x.grad.dtype == x.dtype and error <= bound * size, f"{name}: {error:.1e} of {size:.1e}"


def make_bias_parameters(kind: str, T: int, groups: int, window: int) -> list[torch.Tensor]:
    return [randn(groups, window, seed=5)] if kind == "conv" else [randn(T + 2, 6, seed=5), randn(T + 2, 6, seed=6)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(aft_positional, "AFT_BLOCK", 16)


@pytest.mark.parametrize("kind", ["conv", "local"])
@pytest.mark.parametrize("B, T, D, groups, window", [
    (2, 50, 6, 2, 20), (1, 70, 5, 1, 17), (1, 64, 4, 2, 1), (1, 40, 4, 4, 40), (1, 33, 34, 2, 18), (2, 1, 2, 1, 3),
])  # fmt: skip
def test_aft_positional_forward_and_backward(kind, B, T, D, groups, window, small_blocks):
    q, k, v = (randn(B, T, D, seed=s) for s in range(3))
    check_aft_positional(kind, q, k, v, make_bias_parameters(kind, T, groups, window), window, 5e-6)


@pytest.mark.parametrize("kind", ["conv", "local"])
@pytest.mark.parametrize("keys", [keys for keys in KEYS if keys != "thousands apart"])
def test_aft_positional_with_keys_of_80(kind, keys, small_blocks):
    T, window = 40, 19
    q, v, k = randn(1, T, 4), randn(1, T, 4, seed=2), make_keys(keys, T, 4)[None].contiguous()
    p = [x * 0.2 for x in make_bias_parameters(kind, T, 2, window)]
    check_aft_positional(kind, q, k, v, p, window, 1e-5)


@pytest.mark.parametrize("kind", ["conv", "local"])
def test_aft_positional_with_default_blocks_in_bfloat16(kind):
    T, window = 100, 40
    q, k, v = (randn(1, T, 8, seed=s, dtype=torch.bfloat16) for s in range(3))
    check_aft_positional(kind, q, k, v, make_bias_parameters(kind, T, 2, window), window, 1e-2)


# ---- AFT in models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", AFTS)
def test_aft_mixers_launch_kernels_and_equal_the_plain_path(kind, dtype, small_blocks, monkeypatch):
    """Result and gradients; the plain path is computed in float64, which kernels do not support."""
    torch.manual_seed(0)
    mix = AFTS[kind](SimpleNamespace(n_qkv=6, n_head=2, window=19, block_size=50), norm_channels)
    for p in mix.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plain, ctx = copy.deepcopy(mix).double(), ForwardContext(torch.arange(30)[None])
    q, k, v, grad = (randn(2, 30, 6, seed=s, dtype=dtype) for s in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plain(*norm_channels(*exact[:2], ctx), exact[2], exact[0], ctx, None)
    expected.backward(grad.double())
    ours, launches = [x.requires_grad_() for x in (q, k, v)], []
    names = (aft, "fused_aft_simple"), (aft_positional, "fused_aft_conv"), (aft_positional, "fused_aft_local")
    for module, name in names:
        fused = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, fused=fused: launches.append(1) or fused(*args))
    got = mix(*norm_channels(*ours[:2], ctx), ours[2], ours[0], ctx, None)
    got.backward(grad)
    assert launches
    bound = 2e-5 if dtype == torch.float32 else 3e-2
    check_close(got, expected.detach(), bound)
    pairs = [*zip(ours, exact, strict=True), *zip(mix.parameters(), plain.parameters(), strict=True)]
    for x, exact_x in pairs:
        check_close(x.grad, exact_x.grad, bound)


@pytest.mark.parametrize("kind", ["simple", "conv", "local"])
def test_aft_model_with_kernels_compiles_as_one_graph(kind, small_blocks, monkeypatch):
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "block_size": 24, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_qkv": 12, "d_rank": 4}
    model = build({"arch": "palm", "aft": kind, "window": 9, **shape})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(31, (1, 24))

    def step(call):
        loss = call(idx, idx)[1]
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    torch._dynamo.reset()
    got = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "can_run", lambda *tensors: False)
    torch.testing.assert_close(got, step(model), rtol=1e-3, atol=1e-5)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def test_custom_operators_pass_opcheck(small_blocks):
    q, k, v, pos = ring_buffer_inputs(2, 4, 2, 16, 30, [29, 35])
    torch.library.opcheck(torch.ops.strawberry.decode_attention.default, (q, k, v, pos, 30, 0.25, 2))
    w8, scale = quantize_int8(randn(9, 16))
    torch.library.opcheck(torch.ops.strawberry.int8_linear.default, (randn(2, 16), w8, scale, None))
    torch.library.opcheck(torch.ops.strawberry.int8_linear.default, (randn(2, 16), w8, scale, randn(9)))
    qkv = [randn(1, 3, 2, seed=s).requires_grad_() for s in range(3)]
    torch.library.opcheck(torch.ops.strawberry.aft_simple.default, (*qkv, True))
    cos, sin = make_rope(1, 3, 16)
    torch.library.opcheck(torch.ops.strawberry.qk_rope_norm.default, (randn(2, 3, 64), cos, sin, 32, 16, True))
    grads = randn(2, 3, 32), randn(2, 3, 16, seed=1), randn(2, 3, 48, seed=2)[..., 16:32]
    for qkv_or_none in (randn(2, 3, 64), None):
        torch.library.opcheck(torch.ops.strawberry.qk_rope_norm_backward.default, (*grads, qkv_or_none, cos, sin))
    weight, maximum = torch.rand(1, 1, 1, 16, 16).requires_grad_(), torch.zeros(1, 1, 16)
    torch.library.opcheck(torch.ops.strawberry.aft_positional.default, (*qkv, weight, maximum))


def test_kernels_compile_without_graph_breaks():
    q, k, v, pos = ring_buffer_inputs(2, 4, 2, 16, 30, [29, 35])
    w8, scale = quantize_int8(randn(9, 16))

    def step(q, k, v, pos):
        return int8_linear(decode_attention(q, k, v, pos, 30, 0.25) * 2, w8, scale)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, pos), step(q, k, v, pos))


# ---- the linear memory -----------------------------------------------------------------------------------------------

MEMORIES = {  # B, T, H, d, tokens in a chunk, dtype
    "whole chunks": (1, 32, 2, 16, 16, torch.float32),
    "odd ends and heads": (2, 37, 2, 24, 23, torch.float32),
    "less than a chunk": (2, 3, 1, 16, 32, torch.float32),
    "half": (1, 70, 1, 32, 64, torch.bfloat16),
}


def memory_inputs(B, T, H, d, size, dtype):
    """z, of which q and k are slices, v, log α, β. Tokens 1 and 2 write nothing."""
    z = randn(B, T + 1, H, d) / d**0.5
    log_decay, beta = -randn(B, T, H, seed=2).abs() / 4, randn(B, T, H, seed=3).sigmoid()
    log_decay[:, 1:3] = beta[:, 1:3] = 0
    return z.to(dtype), randn(B, T, H, d, seed=1, dtype=dtype), log_decay, beta


@pytest.mark.parametrize("shape", MEMORIES)
def test_fused_memory_equals_the_recurrence(shape):
    """o, the last state and all gradients from an empty state; o and the last state from a random one."""
    *_, size, dtype = MEMORIES[shape]
    inputs, state = memory_inputs(*MEMORIES[shape]), randn(*(MEMORIES[shape][i] for i in (0, 2, 3, 3)), seed=4)
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    results = []
    for read, cast in ((read_memory, lambda x: x.clone()), (read_chunks, lambda x: x.double())):
        z, v, *gates = (cast(x).requires_grad_() for x in inputs)
        o, last = read(z[:, 1:], z[:, :-1], v, *gates, size=size)
        grads = torch.autograd.grad(o, (z, v, *gates), cast(randn(*o.shape, seed=5, dtype=dtype)))
        with torch.no_grad():
            results.append((o, last, *grads, *read(z[:, 1:], z[:, :-1], v, *gates, size=size, state=cast(state))))
    for got, exact in zip(*results, strict=True):
        check_close(got, exact, bound)


@pytest.mark.parametrize("passes", [{}, {"recursions": 2, "adaptive": True}], ids=["one pass", "frozen tokens"])
def test_memory_model_trains_prefills_and_decodes_with_kernels(passes, monkeypatch):
    """Loss, gradients, cached logits and the last state equal those in float64, which kernels do not support."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_qkv": 16, "vocab_size": 32, "block_size": 64, "r_layer": 1}
    model = build(sizes | {"retention_rule": "delta", "retention_chunk": 16, "memory_head": 8} | passes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    idx, launches, steps = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(1)), [], []
    fused, fused_step = memory.fused_memory, memory_step.fused_step
    monkeypatch.setattr(memory, "fused_memory", lambda *inputs: launches.append(1) or fused(*inputs))
    monkeypatch.setattr(memory_step, "fused_step", lambda *inputs: steps.append(1) or fused_step(*inputs))
    results = []
    for m in (model, copy.deepcopy(model).double()):
        loss = m(idx, idx)[1]
        grads = torch.autograd.grad(loss, list(m.parameters()))
        cache = m.new_cache(2, 64)
        with torch.no_grad():
            logits = torch.cat([m(part, cache=cache)[0] for part in idx.split((18, 1, 1, 10), dim=1)], dim=1)
        results.append((loss, logits, *grads, cache.layers[0][0][-1][1].state))
    n = passes.get("recursions", 1)
    assert len(launches) == 3 * n and len(steps) == 2 * n  # training, and two prefills; two tokens
    for got, exact in zip(*results, strict=True):
        check_close(got, exact, 1e-4)


STEPS = {  # B, H, d, dtype of z, v and gates, dtype of the parameters and of the cache's tail
    "one row": (1, 2, 16, torch.float32, torch.float32),
    "odd heads": (3, 5, 24, torch.float32, torch.float32),
    "one wide head": (3, 1, 128, torch.float32, torch.float32),
    "one channel": (2, 3, 1, torch.float32, torch.float32),
    "half": (3, 3, 24, torch.bfloat16, torch.bfloat16),
    "autocast": (2, 2, 32, torch.bfloat16, torch.float32),
}


def memory_cache(B, H, d, dtype=torch.float32) -> LayerCache:
    return LayerCache(B, "cpu", state=((H, d, d), 0.0, torch.float32), tail=((4, H * d), 0.0, dtype))


def memory_step_inputs(B, T, H, d, dtype, weights_dtype):
    """z, v and gates of T tokens, not contiguous, as parts of one product have it; the gates' bias; taps."""
    M = H * d
    parts = (2 * randn(B, T, 2 * M + 3 * H, seed=T)).to(dtype).split((M, M, 3 * H), dim=-1)
    return parts, randn(3 * H, seed=2, dtype=weights_dtype), randn(4, M, seed=3, dtype=weights_dtype)


def naive_delta_memory(z, v, gates, bias, taps, writes, H):
    """o (T, M) and the last state of one row's tokens, one head and token at a time; `writes` (T,): whether the token
    writes."""
    (T, M), d = z.shape, z.size(1) // H
    z, v, gates, bias, taps = (x.double() for x in (z, v, gates, bias, taps))
    unit = torch.zeros(T + 1, H, d, dtype=torch.float64)  # of the token before each, then of the last
    o, state = torch.zeros(T, M, dtype=torch.float64), torch.zeros(H, d, d, dtype=torch.float64)
    for t in range(T):
        y = z[t] + sum(taps[j] * z[t - j] for j in range(min(4, t + 1)))
        a, b, c = (gates[t] + bias).view(3, H)
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            unit[t + 1, h] = q = y[part] / (y[part].dot(y[part]) + 0.01).sqrt()
            if writes[t]:
                state[h] /= 1 + (a[h] - 4 - 5 * h / max(H - 1, 1)).exp()
                new = (v[t, part] - state[h].T @ unit[t, h]) / (1 + (-b[h]).exp())
                state[h] += torch.outer(unit[t, h], new)
            read = state[h].T @ q
            o[t, part] = read / (read.dot(read) / d + 0.01).sqrt() / (1 + (-c[h]).exp())
    return o, state


@pytest.mark.parametrize("shape", STEPS)
def test_memory_steps_equal_the_recurrence(shape):
    """Token by token from an empty cache. A row without a token in a call (length 0) keeps its state and tail, bit for
    bit, and its later tokens are those of the row without that call. A frozen token keeps the state only."""
    B, H, d, dtype, weights_dtype = STEPS[shape]
    T, cache = 9, memory_cache(B, H, d, weights_dtype)
    (z, v, gates), bias, taps = memory_step_inputs(B, T, H, d, dtype, weights_dtype)
    v = v.contiguous() if shape == "odd heads" else v  # rows of another stride than those of z
    valid, active = (torch.rand(T, B, generator=torch.Generator().manual_seed(s)) < 0.7 for s in (1, 2))
    valid[0], valid[3], active[:2], active[3], active[4] = True, True, True, False, True
    for x in (z, v, gates):
        x[~valid.T] = math.nan
    outputs = []
    for t in range(T):
        lengths = None if valid[t].all() else valid[t].long()
        depth = torch.stack((active[t], active[t]), dim=-1).unsqueeze(1)
        ctx = ForwardContext(torch.tensor([[t]]), lengths=lengths, active=None if active[t].all() else depth[..., 1])
        before = cache.tail.clone(), cache.state.clone()
        with torch.no_grad():
            outputs.append(delta_memory(*(x[:, t : t + 1] for x in (z, v, gates)), bias, taps, 64, ctx, cache))
        for b in range(B):
            assert torch.equal(cache.tail[b], before[0][b]) == (not valid[t, b])
            assert torch.equal(cache.state[b], before[1][b]) == (t == 0 or not (valid[t, b] and active[t, b]))
    got = torch.cat(outputs, dim=1)
    assert got.dtype == dtype and not got[:, 0].any()
    for b in range(B):
        kept = valid[:, b]
        row = (x[b, kept] for x in (z, v, gates))
        o, state = naive_delta_memory(*row, bias, taps, active[kept, b], H)
        check_close(got[b, kept], o, BOUND[dtype])
        check_close(cache.state[b], state, BOUND[torch.float32])
        assert torch.equal(cache.tail[b].to(dtype), z[b, kept][-4:])


def test_a_memory_step_is_batch_invariant():
    (z, v, gates), bias, taps = memory_step_inputs(3, 6, 2, 24, torch.bfloat16, torch.bfloat16)

    def steps(rows: slice):
        cache, outputs = memory_cache(len(z[rows]), 2, 24, torch.bfloat16), []
        for t in range(z.size(1)):
            token = (x[rows, t : t + 1] for x in (z, v, gates))
            with torch.no_grad():
                outputs.append(delta_memory(*token, bias, taps, 64, ForwardContext(torch.tensor([[t]])), cache))
        return torch.cat(outputs, dim=1), cache.tail, cache.state

    everyone = steps(slice(0, 3))
    for b in range(3):
        for alone, together in zip(steps(slice(b, b + 1)), everyone, strict=True):
            assert torch.equal(alone[0], together[b])


def test_a_memory_step_of_some_rows_leaves_the_others():
    """Rows side by side in the cache, and every second row, which the kernel does not support."""
    (z, v, gates), bias, taps = memory_step_inputs(2, 1, 3, 24, torch.float32, torch.float32)
    for rows, others in ((slice(1, 3), slice(3, 5)), (slice(0, 4, 2), slice(1, 5, 2))):
        cache, alone = memory_cache(5, 3, 24), memory_cache(2, 3, 24)
        cache.state.copy_(randn(*cache.state.shape, seed=7))
        alone.state.copy_(cache.state[rows])
        before, found = cache.state[others].clone(), []
        for part in (cache.slice(rows), alone):
            with torch.no_grad():
                found.append(delta_memory(z, v, gates, bias, taps, 64, ForwardContext(torch.zeros(1, 1)), part))
        check_close(found[0], found[1], 1e-6)
        check_close(cache.state[rows], alone.state, 1e-6)
        assert torch.equal(cache.tail[rows], alone.tail) and torch.equal(cache.state[others], before)
        assert not cache.tail[others].any()


def test_a_memory_step_with_gradients_is_plain(monkeypatch):
    (z, v, gates), bias, taps = memory_step_inputs(2, 1, 2, 24, torch.float32, torch.float32)
    cache, ctx = memory_cache(2, 2, 24), ForwardContext(torch.tensor([[0]]))
    cache.state.normal_()
    monkeypatch.setattr(memory_step, "fused_step", None)
    o = delta_memory(z, v.clone().requires_grad_(), gates, bias, taps, 64, ctx, cache)
    assert o.requires_grad


def test_a_memory_step_compiles_without_graph_breaks():
    """It changes the cache in place, in the compiled code too."""
    B, H, d = 2, 3, 16
    parts, bias, taps = memory_step_inputs(B, 2, H, d, torch.float32, torch.float32)
    tokens = [[x[:, t : t + 1] for x in parts] for t in range(2)]
    caches = memory_cache(B, H, d), memory_cache(B, H, d)
    for state in caches:
        state.state.copy_(randn(B, H, d, d, seed=7))
        state.tail.copy_(randn(B, 4, H * d, seed=8))
    lengths, active, rest = torch.tensor([1, 0]), torch.tensor([[True], [False]]), (0.01, [-4.0, -9.0])
    for about in ((None, None), (lengths, active)):
        args = (*tokens[0], bias, taps, caches[0].tail.clone(), caches[0].state.clone(), *about, *rest)
        torch.library.opcheck(torch.ops.strawberry.memory_step.default, args)

    def step(z, v, gates, cache):
        return 2 * delta_memory(z, v, gates, bias, taps, 64, ForwardContext(torch.zeros(1, 1)), cache)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for token in tokens:
            assert torch.equal(compiled(*token, caches[0]), step(*token, caches[1]))
    for name in ("tail", "state"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name))


# ---- retention_update ------------------------------------------------------------------------------------------------


def naive_retention_update(raw, scale, oa, out, viewed):
    """A loop over rows and chunks: (the updated weights, their standard deviations)."""
    B, n = oa.shape[:2]
    new = []
    for b in range(B):
        for j in range(n):
            w = raw if raw.dim() == 2 else raw[b, j]
            w = w.T if viewed else w
            updated = w + torch.nn.functional.silu(scale[b, j] * (w @ oa[b, j])) / scale[b, j] @ out.T
            new.append(updated.T if viewed else updated)
    updated = torch.stack(new).unflatten(0, (B, n))
    return updated, updated.std(dim=(-2, -1), keepdim=True)


RETENTION_UPDATES = {  # B, chunks, rows and columns (C) of the matrix, is it viewed transposed, do all chunks share it
    "first step": (2, 2, 40, 24, False, True),
    "first step, viewed": (2, 2, 40, 24, True, True),
    "later": (3, 1, 24, 24, False, False),
    "later, viewed": (2, 2, 40, 24, True, False),
    "several tiles": (1, 2, 260, 136, False, False),
    "several tiles, viewed": (2, 1, 260, 136, True, False),
    "whole tiles": (1, 2, 256, 128, False, False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RETENTION_UPDATES)
def test_retention_update_forward_and_backward(case, dtype):
    """Updated weights, standard deviations and all gradients."""
    B, n, rows, C, viewed, shared = RETENTION_UPDATES[case]
    shape = (C, rows) if viewed else (rows, C)
    raw = randn(*shape if shared else (B, n, *shape), dtype=dtype)
    scale, oa = randn(B, n, 1, 1, seed=1).abs() + 0.3, randn(B, n, C, C, seed=2, dtype=dtype) * C**-0.5
    out, grad = randn(C, C, seed=3, dtype=dtype) * C**-0.5, randn(B, n, *shape, seed=4, dtype=dtype)
    ours = [x.clone().requires_grad_() for x in (raw, scale, oa, out)]
    each = scale.expand(B, n, rows, C)  # a scale per element: the sum of their gradients cancels
    exact = [x.double().requires_grad_() for x in (raw, each, oa, out)]
    assert can_fuse_update(raw, oa)
    got, want = GatedUpdate.apply(*ours, viewed), naive_retention_update(*exact, viewed)
    for new, deviation in got, want:
        grad_deviation = 40 * randn(B, n, 1, 1, seed=5).double()
        ((new.double() * grad.double()).sum() + (deviation.double() * grad_deviation).sum()).backward()
    bound = 4 * BOUND[dtype]
    (raw, scale, oa, out), (exact_raw, each, exact_oa, exact_out) = ([x.grad for x in xs] for xs in (ours, exact))
    pairs = (raw, exact_raw), (oa, exact_oa), (out, exact_out), *zip(got, want, strict=True)
    for a, b in pairs:
        check_close(a.detach(), b.detach(), bound)
    assert (scale - each.sum(dim=(-2, -1), keepdim=True)).norm() < bound * each.norm()


def test_retention_model_trains_with_kernels():
    """Loss and gradients equal those of the plain path in float64."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_qkv": 24, "vocab_size": 32, "block_size": 64, "retention_chunk": 16}
    model = build({**sizes, "r_layer": 2, "n_head": 2, "aft": "full"}).double()
    torch.nn.init.normal_(model.blocks[0].out, std=0.2)
    idx = torch.randint(32, (2, 60))
    exact = model(idx, idx)[1]
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    loss = model.float()(idx, idx)[1]
    check_close(loss.detach()[None], exact.detach()[None], 1e-5)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), exact_grads, strict=True):
        check_close(a, b, 1e-4)


def test_retention_update_compiles_without_graph_breaks():
    shape = (2, 2, 24, 24)
    inputs = randn(*shape), torch.ones(2, 2, 1, 1), randn(*shape, seed=1), randn(24, 24, seed=2)

    def loss(*x):
        return sum(y.square().sum() for y in GatedUpdate.apply(*x, False))

    inputs = [x.requires_grad_() for x in inputs]
    functions = loss, torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(f(*inputs), inputs) for f in functions)
    for eager, compiled in zip(a, b, strict=True):
        torch.testing.assert_close(eager, compiled)


# ---- qk_rope_norm ----------------------------------------------------------------------------------------------------


def make_rope(rows: int, T: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 9 * randn(rows, T, 1, d // 2, seed=5)
    return angle.cos(), angle.sin()


def naive_qk_rope_norm(x, cos, sin, d, normed):
    """Each head of x (B, T, ·) as d/2 complex numbers a + ib, times e^−iφ, then RMS norm."""
    a, b = x.unflatten(-1, (-1, d)).chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.complex(cos, -sin)
    if normed:
        z = z / ((z.real**2 + z.imag**2).sum(dim=-1, keepdim=True) / d + 1e-6).sqrt()
    return torch.cat((z.real, z.imag), dim=-1).flatten(2)


ROPE_SHAPES = {  # B, T, H, Hkv, d, batch size of cos and sin
    "heads of 16": (2, 7, 3, 3, 16, 1),
    "heads of 32, GQA": (1, 33, 6, 2, 32, 1),
    "heads of 64": (2, 13, 12, 12, 64, 1),
    "heads of 64, MQA": (2, 5, 5, 1, 64, 1),
    "heads of 128, positions per row": (3, 5, 2, 2, 128, 3),
    "a head of 256": (1, 3, 1, 1, 256, 1),
    "one token": (1, 1, 1, 1, 16, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["rope", "rope and norm"])
@pytest.mark.parametrize("shape", ROPE_SHAPES)
def test_qk_rope_norm_forward_and_backward(shape, normed, dtype):
    """The first token is small, so that the norm's eps matters. Gradients are strided, as those of attention."""
    B, T, H, Hkv, d, rows = ROPE_SHAPES[shape]
    widths, (cos, sin) = (H * d, Hkv * d, Hkv * d), make_rope(rows, T, d)
    qkv = randn(B, T, sum(widths), dtype=dtype)
    qkv[:, 0] *= 1e-3
    exact = qkv.double().requires_grad_()
    q, k, v = exact.split(widths, dim=-1)
    expected = *(naive_qk_rope_norm(x, cos.double(), sin.double(), d, normed) for x in (q, k)), v
    grads = [
        randn(B, T, 2 * widths[0], seed=1, dtype=dtype)[..., : widths[0]],
        randn(T, B, widths[1], seed=2, dtype=dtype).transpose(0, 1),
        randn(B, T, 2 * widths[2], seed=3, dtype=dtype)[..., ::2],
    ]
    exact_grads = torch.autograd.grad(expected, exact, [x.double() for x in grads])[0]
    ours = qkv.requires_grad_()
    assert can_fuse_rope(ours, widths, cos)
    got = fused_qk_rope_norm(ours, widths, cos, sin, normed)
    grad = torch.autograd.grad(got, ours, grads)[0]
    bound = {torch.float32: 5e-7, torch.bfloat16: BOUND[torch.bfloat16], torch.float16: 1e-3}[dtype]
    assert got[2].data_ptr() == ours[..., sum(widths[:2]) :].data_ptr()  # no copy
    for x, exact_x in zip(got, expected, strict=True):
        assert x.dtype == dtype
        check_close(x.detach(), exact_x.detach(), bound)
    assert grad.dtype == dtype and grad.is_contiguous()
    for part, exact_x in zip(grad.split(widths, dim=-1), exact_grads.split(widths, dim=-1), strict=True):
        check_close(part[:, :1], exact_x[:, :1], bound)
        check_close(part, exact_x, bound)


def test_qk_rope_norm_with_tiles_that_end_within_a_token(monkeypatch):
    """Several tiles per token, the last one partly masked."""
    monkeypatch.setattr(rope, "ROPE_TILE", 64)
    test_qk_rope_norm_forward_and_backward("heads of 16", True, torch.float32)


def test_can_fuse_rope():
    qkv, (cos, _) = randn(2, 5, 144).requires_grad_(), make_rope(1, 5, 16)
    thirds = (48, 48, 48)
    assert can_fuse_rope(qkv, thirds, cos) and can_fuse_rope(qkv, (112, 16, 16), cos)
    with torch.no_grad():
        assert not can_fuse_rope(qkv, thirds, cos)
    assert not can_fuse_rope(qkv.detach(), thirds, cos)
    assert not can_fuse_rope(qkv.detach().double().requires_grad_(), thirds, cos)
    assert not can_fuse_rope(qkv, (72, 72), cos)  # KV attention
    for d in (8, 24):
        assert not can_fuse_rope(qkv, thirds, make_rope(1, 5, d)[0])


ROPE_MODELS = {
    "strawberry": {"n_qkv": 32, "n_experts": 2, "window": 16, "r_layer": 0, "retention": "none"},
    "strawberry-silia": {"arch": "strawberry-silia", "n_qkv": 32},
    "palm": {"arch": "palm", "attention_type": "mha", "n_qkv": 32},
    "lam": {"arch": "palm", "attention_type": "lam", "n_qkv": 32},
    "tinystar": {"arch": "tinystar", "attention_type": "MQA"},
    "decoder": {"arch": "transformer", "kind": "decoder", "attention_type": "GQA", "n_kv_head": 1, "bias": True},
}


@pytest.mark.parametrize("name", ROPE_MODELS)
def test_rope_models_launch_qk_rope_norm(name, monkeypatch):
    """Loss and gradients, eager and compiled, equal those of the plain path in float64."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 32, "block_size": 48}
    if name in ("tinystar", "decoder"):
        sizes["pos_encoding"] = "RoPE"
    model = build(sizes | ROPE_MODELS[name]).double()
    std = 0.4 if name == "strawberry-silia" else 0.2  # its branches are products of two layers: 0.2² is too small
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    idx, learned = torch.randint(32, (2, 41)), list(model.parameters())
    exact = model(idx, idx)[1]
    exact_grads = torch.autograd.grad(exact, learned, allow_unused=True)
    fused, launches = fused_qk_rope_norm, []
    monkeypatch.setattr(rope, "fused_qk_rope_norm", lambda *args, **kw: launches.append(1) or fused(*args, **kw))
    model.float()
    torch._dynamo.reset()
    for call in (model, torch.compile(model, backend="aot_eager")):
        loss = call(idx, idx)[1]
        check_close(loss.detach()[None], exact.detach()[None], 1e-5)
        for a, b in zip(torch.autograd.grad(loss, learned, allow_unused=True), exact_grads, strict=True):
            if b is not None:
                check_close(a, b, 1e-4)
        assert launches
        launches.clear()


# ---- fused_cross_entropy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("V", "width"), [(50, 64), (64, 64), (1000, 1024), (20_000, 20_032)])
def test_fused_cross_entropy_losses_and_grad_logits(V, width, cap, dtype):
    logits = (4 * randn(9, width)).to(dtype)
    logits[2, 7], logits[3, 7], logits[4, V - 3] = 80.0, -80.0, 120.0  # exp(120) overflows float32
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(1))
    targets[5] = -1
    exact = logits[:, :V].double().requires_grad_()
    z = exact if cap is None else cap * torch.tanh(exact / cap)
    exact_losses = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    exact_losses.sum().backward()
    losses, grad_logits = fused_cross_entropy(logits, targets, V, cap)
    check_close(losses, exact_losses.detach(), 2e-6)
    check_close(grad_logits[:, :V], exact.grad, BOUND[dtype])
    assert not grad_logits[5].any() and not grad_logits[:, V:].any() and grad_logits.dtype == dtype


@pytest.mark.parametrize(("V", "width"), [(50, 64), (20_000, 20_032)])
def test_fused_cross_entropy_scales_and_casts_grad_logits(V, width):
    logits = (4 * randn(9, width)).bfloat16()
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(1))
    losses, grad_logits = fused_cross_entropy(logits, targets, V, None)
    same_losses, scaled = fused_cross_entropy(logits, targets, V, None, 2.0**15, torch.float32)
    assert torch.equal(losses, same_losses) and scaled.dtype == torch.float32
    check_close(scaled[:, :V] / 2**15, grad_logits[:, :V].double(), BOUND[torch.bfloat16])


# ---- float8 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (128, 128), (200, 37), (1, 300)])
def test_transpose_fp8_moves_bytes(shape):
    x = randn(*shape).to(torch.float8_e4m3fn)
    y = transpose_fp8(x)
    assert y.is_contiguous() and y.dtype == x.dtype
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8).t())


ACTIVATIONS = {
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "gelu_tanh": lambda h: h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
    "relu": lambda h: h * (h > 0),
    "relu2": lambda h: h * h * (h > 0),
    "identity": lambda h: h,
    "swiglu": lambda h: h.chunk(2, dim=-1)[0] * torch.nn.functional.silu(h.chunk(2, dim=-1)[1]),
}


def check_quantized(got: torch.Tensor, transposed: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    """Up to 6 % of the elements may be wrong: the interpreter's conversion drops the carry where a number is rounded up
    to a power of two, about 3 of 100, and gives half of it."""
    assert torch.equal(transposed.view(torch.uint8), got.view(torch.uint8).t()) and transposed.is_contiguous()
    off = ((got.double() / scale - exact).abs() > 0.13 * exact.abs() + 2.0**-9 / scale).double().mean()
    assert off < 0.06


@pytest.mark.parametrize("rows_columns", [(128, 64), (200, 37), (16, 96)])
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_act_quantize_and_its_backward(kind, rows_columns):
    rows, columns = rows_columns
    width = columns * (2 if kind == "swiglu" else 1)
    h, grad = randn(rows, width).bfloat16(), randn(rows, columns, seed=1).bfloat16()
    grad_hidden = randn(rows, width, seed=2).bfloat16()
    x = h.double().requires_grad_()
    exact = ACTIVATIONS[kind](x)
    (grad_x,) = torch.autograd.grad(exact, x, grad.double())
    check_quantized(*act_quantize(h, kind, 4.0, torch.float8_e4m3fn), exact.detach(), 4.0)
    for added in (None, grad_hidden):
        exact = grad_x if added is None else grad_x + added.double()
        check_quantized(*act_quantize_backward(h, grad, kind, 64.0, torch.float8_e5m2, added), exact, 64.0)


@pytest.mark.parametrize("rows", [128, 37])
def test_concat_quantize_equals_cat(rows):
    wide = randn(rows, 320).bfloat16()
    parts = wide[:, :64], randn(rows, 128, seed=1).bfloat16(), wide[:, 192:256]  # two are non-contiguous
    check_quantized(*concat_quantize(parts, 64.0, torch.float8_e5m2), torch.cat(parts, dim=1).double(), 64.0)
    torch.library.opcheck(torch.ops.strawberry.concat_quantize, (*parts, 64.0, torch.float8_e5m2))
    with pytest.raises(ValueError, match="64"):
        concat_quantize((wide[:, :32], *parts[1:]), 64.0, torch.float8_e5m2)


def test_float8_operators_pass_opcheck():
    h, grad, eight = randn(16, 32).bfloat16(), randn(16, 32).bfloat16(), torch.float8_e5m2
    ops = torch.ops.strawberry
    torch.library.opcheck(ops.transpose_fp8, (h.to(eight).view(torch.uint8),))
    torch.library.opcheck(ops.act_quantize, (h, "gelu", 4.0, eight))
    torch.library.opcheck(ops.act_quantize_backward, (h, grad, None, "gelu", 4.0, eight))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_qkv_grad_quantize_equals_qk_rope_norm_backward(normed, heads):
    """qk_rope_norm_backward itself is tested above."""
    B, T, d = 2, 67, 16
    n_q, n_k = (n * d for n in heads)
    qkv = randn(B, T, n_q + 2 * n_k).bfloat16()
    wide = randn(B, T, n_q + 2 * n_k, seed=1).bfloat16()
    grads = wide[..., :n_q], randn(B, T, n_k, seed=2).bfloat16(), wide[..., n_q + n_k :]
    angle = randn(1, T, 1, d // 2, seed=3)
    inputs = (*grads, qkv if normed else None, angle.cos(), angle.sin())
    exact = torch.ops.strawberry.qk_rope_norm_backward(*(x if x is None else x.double().float() for x in inputs))
    check_quantized(*qkv_grad_quantize(*inputs, 64.0, torch.float8_e5m2), exact.flatten(0, 1).double(), 64.0)
    torch.library.opcheck(torch.ops.strawberry.qkv_grad_quantize, (*inputs, 64.0, torch.float8_e5m2))


def test_float8_qkv_rope_equals_float8_linear_and_qk_rope_norm():
    from strawberry.ops.float8 import Float8Linear, Float8QKVRope, prepare

    prepare(torch.device("cpu"))
    B, T, d = 2, 64, 16
    x, w = randn(B, T, 64).bfloat16().requires_grad_(), (randn(192, 64, seed=1) / 8).requires_grad_()
    angle, widths = randn(1, T, 1, d // 2, seed=2), (64, 64, 64)
    tables = angle.cos(), angle.sin()
    got = Float8QKVRope.apply(x, w, widths, *tables, True)
    compiled = torch.compile(lambda x, w: Float8QKVRope.apply(x, w, widths, *tables, True), backend="aot_eager",
                             fullgraph=True)(x, w)  # fmt: skip
    expected = fused_qk_rope_norm(Float8Linear.apply(x.flatten(0, 1), w).unflatten(0, (B, T)), widths, *tables, True)
    grads = [randn(B, T, 64, seed=i).bfloat16() * 2**-15 for i in (3, 4, 5)]
    for a, b, c in zip(got, expected, compiled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    pairs = [torch.autograd.grad(y, (x, w), grads) for y in (got, expected, compiled)]
    for a, b, c in zip(*pairs, strict=True):  # the interpreter's conversion and torch's differ: see check_quantized
        check_close(a, b.double(), 0.2)
        assert torch.equal(a, c)


FLOAT8_MODELS = {  # and which kernels quantize the gradients of q, k and v, and how often
    "strawberry": ({"arch": "strawberry", "retention": "none", "r_layer": 1}, {"rope and norm": 1, "concat": 1}),
    "grouped": ({"arch": "tinystar", "attention_type": "GQA", "n_kv_head": 1, "pos_encoding": "RoPE"}, {"rope": 1}),
    "learned": ({"arch": "tinystar", "attention_type": "MHA", "pos_encoding": "Learned"}, {"concat": 1}),
    "narrow": ({"arch": "tinystar", "attention_type": "GQA", "n_kv_head": 1, "pos_encoding": "Learned"}, {}),
}


@pytest.mark.parametrize("name", FLOAT8_MODELS)
def test_float8_models_quantize_qkv_gradients_once(name, monkeypatch):
    hyper, expected = FLOAT8_MODELS[name]
    torch.manual_seed(0)
    model = build({"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 64, "block_size": 16} | hyper)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    launches = []

    def qkv_quantize(*args):
        launches.append("rope" if args[3] is None else "rope and norm")  # only the norm's backward reads qkv
        return qkv_grad_quantize(*args)

    monkeypatch.setattr(float8, "concat_quantize", lambda *args: launches.append("concat") or concat_quantize(*args))
    monkeypatch.setattr(rope, "qkv_grad_quantize", qkv_quantize)
    monkeypatch.setattr(float8, "MIN_DIM", 4)
    idx, grads = torch.randint(64, (1, 16)), []
    for on in (True, False):
        prepare_weights(model, "float8" if on else None, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        grads.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True))
    assert {kind: launches.count(kind) for kind in launches} == expected
    for p, a, b in zip(model.parameters(), *grads, strict=True):
        if p.ndim == 2 and b.any():  # not closer, for the reason in check_quantized
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.8


# ---- muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 48), (3, 50, 33), (1, 5, 7), (1, 96, 16)])
def test_muon_symmetric_product(shape, dtype):
    """Several tiles and partial tiles, with and without an addend, of a matrix and of a transposed one."""
    n, rows, cols = shape
    for x in (randn(n, rows, cols, dtype=dtype), randn(n, cols, rows, dtype=dtype).mT):
        exact = torch.stack([a.double() @ a.double().T for a in x])
        got = muon.symmetric_product(x, x)
        check_close(got, exact, BOUND[dtype])
        assert torch.equal(got, got.mT)
        c = (randn(n, rows, rows, seed=3) + randn(n, rows, rows, seed=3).mT).to(dtype)
        check_close(muon.symmetric_product(x, -x, c, alpha=2.0, beta=-5.0), -2 * exact - 5 * c.double(), BOUND[dtype])


@pytest.mark.parametrize("shape", [(3, 5), (70, 40)])
def test_muon_momentum_is_updated_unless_a_gradient_is_not_finite(shape):
    grads, buffers = ([randn(*shape, seed=s + first) for s in range(3)] for first in (0, 3))
    before, found_inf, weight = [b.clone() for b in buffers], torch.zeros(()), torch.tensor(0.1)
    for dtype in DTYPES:
        ahead = muon.move_and_look_ahead(grads, buffers, weight, found_inf, dtype)
        assert ahead.dtype == dtype
        for g, b, old, out in zip(grads, buffers, before, ahead, strict=True):
            new = 0.9 * old.double() + 0.1 * g.double()
            check_close(b, new, BOUND[torch.float32])
            check_close(out, 0.9 * new + 0.1 * g.double(), BOUND[dtype])
            b.copy_(old)
    found_inf.fill_(1.0)
    ahead = muon.move_and_look_ahead([g * math.nan for g in grads], buffers, weight, found_inf, torch.float32)
    for b, old, out in zip(buffers, before, ahead, strict=True):
        assert torch.equal(b, old) and torch.equal(out, old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_muon_decays_and_updates_weights(dtype):
    params, update = [randn(70, 40, seed=s) for s in range(2)], randn(2, 70, 40, seed=5, dtype=dtype)
    exact = [p.double() for p in params]
    muon.decay_and_add(params, update, torch.tensor(-0.5), torch.tensor(0.25))
    for p, w, u in zip(params, exact, update.double(), strict=True):
        check_close(p, 0.75 * w - 0.5 * u, BOUND[torch.float32])


def test_muon_step_with_kernels_equals_the_plain_step():
    """With all options, against float64, which kernels do not support."""
    options = {"lr": 0.1, "beta2": 0.9, "decay_schedule": "lr"}
    shapes = [(20, 18), (18, 20), (20, 18)]
    start = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    both = []
    for kind in (torch.float32, torch.float64):
        params = [torch.nn.Parameter(p.to(kind, copy=True)) for p in start]
        optimizer = Muon(params, **options, ns_dtype=kind)
        optimizer.found_inf, optimizer.lerp = torch.zeros(()), torch.tensor(0.15, dtype=kind)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.05, dtype=kind)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=100 * step + 50 + i).to(kind)
            optimizer.step()
        both.append(params)
    for p, exact in zip(*both, strict=True):
        check_close(p.detach(), exact.detach(), 1e-5)

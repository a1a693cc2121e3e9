"""The kernels of strawberry/ops/triton in Triton's interpreter, on the CPU. tests/ops/test_kernels.py runs this file in
processes of its own, with TRITON_INTERPRET=1, so that no other test's Triton is changed.

References are written out in float64 and share no code with them.
"""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from decoding import SMALL, by_generate, collect, requests_for, small_model

from model import AFTS, build
from optimizer import Muon
from strawberry.context import ForwardContext
from strawberry.inference.engine import Decoder
from strawberry.inference.fusing import fuse_linears
from strawberry.ops import float8, muon
from strawberry.ops.attention import decode_attention
from strawberry.ops.float8 import act_quantize, act_quantize_backward, concat_quantize, transpose_fp8
from strawberry.ops.fused_linear import NO_NORM, Norm, fused_linear, fused_linear_plain
from strawberry.ops.linear import int8_linear, prepare_weights, quantize_int8
from strawberry.ops.memory import read_chunks, read_memory
from strawberry.ops.qkv import norm_channels
from strawberry.ops.retention import GatedUpdate
from strawberry.ops.triton import aft, aft_positional, memory, rope
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.aft import fused_aft_simple, is_chained, segment_size
from strawberry.ops.triton.aft_positional import fused_aft_conv, fused_aft_local
from strawberry.ops.triton.common import INTERPRETED
from strawberry.ops.triton.cross_entropy import fused_cross_entropy
from strawberry.ops.triton.decode_attention import num_splits
from strawberry.ops.triton.retention import can_fuse_update
from strawberry.ops.triton.rope import can_fuse_rope, fused_qk_rope_norm, qkv_grad_quantize

assert INTERPRETED, "run by tests/ops/test_kernels.py, or with TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    """‖got − exact‖ / ‖exact‖, which NaN never passes."""
    assert got.shape == exact.shape
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < bound, f"relative error {error:.1e}"


BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.bfloat16]

# ---- decode_attention ------------------------------------------------------------------------------------------------


def ring_softmax(q, k, v, pos, size, scale):
    """A loop over rows, heads and the positions that each query sees, found by the definition of a ring."""
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


def ring(B, H, Hkv, d, size, pos, dtype=torch.float32):
    """q, k, v, pos; NaN in every slot that must not be read, and in the query of an idle row."""
    pos = torch.tensor(pos)
    assert len(pos) == B
    q, k, v = draw(B, H, d, dtype=dtype), *(draw(B, size + 1, Hkv * d, seed=s, dtype=dtype) for s in (1, 2))
    for b, p in enumerate(pos.tolist()):
        k[b, min(p + 1, size) :] = v[b, min(p + 1, size) :] = math.nan
        q[b] *= math.nan if p < 0 else 1
    return q, k, v, pos


RINGS = {  # B, H, Hkv, d, size, pos
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
@pytest.mark.parametrize("shape", RINGS)
def test_decode_is_softmax_over_the_ring(shape, splits, dtype):
    q, k, v, pos = ring(*RINGS[shape], dtype)
    size, scale = RINGS[shape][4], RINGS[shape][3] ** -0.5
    got = torch.ops.strawberry.decode_attention(q, k, v, pos, size, scale, splits)
    assert got.dtype == dtype
    idle = pos < 0
    assert (got[idle] == 0).all()
    check(got[~idle], ring_softmax(q, k, v, pos, size, scale)[~idle], BOUND[dtype])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", RINGS)
def test_decode_writes_the_new_token_into_the_ring(shape, splits):
    """The same result, and the same ring, as where k and v stood there before; an idle row's ring stays as it was."""
    B, H, Hkv, d, size, _ = RINGS[shape]
    q, k, v, pos = ring(*RINGS[shape])
    new_k, new_v = torch.stack((draw(B, Hkv * d, seed=8), draw(B, Hkv * d, seed=9)), dim=1).unbind(1)  # strided
    written_k, written_v = k.clone(), v.clone()
    for b, p in enumerate(pos.tolist()):
        if p >= 0:
            written_k[b, p % size], written_v[b, p % size] = new_k[b], new_v[b]
    got = torch.ops.strawberry.decode_attention_writing(q, k, v, new_k, new_v, pos, size, 0.3, splits)
    busy = pos >= 0
    check(got[busy], ring_softmax(q, written_k, written_v, pos, size, 0.3)[busy], BOUND[torch.float32])
    assert (got[~busy] == 0).all()
    torch.testing.assert_close((k, v), (written_k, written_v), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["tinystar", "tinystar, window", "strawberry, experts, two passes", "strawberry-silia",
                                  "encoder-decoder"])  # fmt: skip
def test_decoder_through_kernels_makes_the_texts_that_generate_makes(name, monkeypatch):
    """Without kernels."""
    model = small_model(name).float()
    requests = [replace(request, max_new_tokens=4) for request in requests_for(model, 3)]
    got = collect(Decoder(model, 2, 64), requests)
    monkeypatch.setattr(kernels, "can_run", lambda *tensors: False)
    for request, (tokens, _) in zip(requests, got, strict=True):
        assert tokens == by_generate(model, request)


@pytest.mark.parametrize("shape", RINGS)
def test_decode_plain_is_softmax_over_the_ring(shape):
    q, k, v, pos = ring(*RINGS[shape], torch.float64)
    size, idle = RINGS[shape][4], pos < 0
    got = decode_attention(
        q.masked_fill(q.isnan(), 0.0), *(x.masked_fill(x.isnan(), 9.0) for x in (k, v)), pos, size, 0.3
    )
    assert (got[idle] == 0).all()
    torch.testing.assert_close(got[~idle], ring_softmax(q, k, v, pos, size, 0.3)[~idle], rtol=1e-12, atol=1e-12)


def test_decode_with_scores_of_a_thousand():
    q, k, v, pos = ring(2, 2, 2, 16, 100, [99, 57])
    check(decode_attention(q * 400, k, v, pos, 100, 1.0), ring_softmax(q * 400, k, v, pos, 100, 1.0), 1e-4)


def test_decode_takes_a_part_of_a_wider_projection():
    """q as it comes out of a projection that also makes k and v."""
    q, k, v, pos = ring(2, 4, 4, 16, 30, [29, 3])
    wide = torch.full((2, 3 * 64), math.nan)
    wide[:, :64] = q.flatten(1)
    view = wide[:, :64].unflatten(1, (4, 16))
    assert not view.is_contiguous()
    check(decode_attention(view, k, v, pos, 30, 0.25), ring_softmax(q, k, v, pos, 30, 0.25), 2e-6)


def test_a_rows_result_does_not_depend_on_its_company():
    q, k, v, pos = ring(3, 4, 2, 24, 300, [299, 5, 1000])
    alone = torch.cat([torch.ops.strawberry.decode_attention(*(x[b : b + 1] for x in (q, k, v, pos)), 300, 0.2, 3)
                       for b in range(3)])  # fmt: skip
    assert torch.equal(torch.ops.strawberry.decode_attention(q, k, v, pos, 300, 0.2, 3), alone)


def test_short_contexts_are_not_split(monkeypatch):
    """And long ones are, into no more parts than there are programs to run."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 132)
    q, short, long = torch.zeros(1, 12, 64), torch.zeros(1, 257, 768), torch.zeros(1, 8193, 768)
    assert num_splits(q, short, 256) == 1
    assert 16 <= num_splits(q, long, 8192) <= 128
    assert num_splits(torch.zeros(512, 12, 64), long.expand(512, -1, -1), 8192) == 1


# ---- int8 ------------------------------------------------------------------------------------------------------------


def test_quantize_rounds_to_nearest_and_keeps_rows_of_zeros():
    w = draw(50, 64)
    w[7] = 0
    w[8] *= 1e-20
    w8, scale = quantize_int8(w)
    assert w8.dtype == torch.int8 and scale.dtype == torch.float32 and (w8[7] == 0).all()
    error = (w8.double() * scale.double().unsqueeze(1) - w.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(1)).all()
    kept = torch.arange(50) != 7
    assert (w8.abs().amax(dim=1)[kept] == 127).all() and (w8 >= -127).all()
    assert w8.sign().eq(w.sign()).logical_or(w8 == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 16, 33, 64, 65])
def test_int8_linear_is_the_product(M, biased, dtype):
    N, K = 37, 200
    w8 = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(M))
    x, scale = draw(M, K, dtype=dtype), draw(N, seed=1).exp() / 100
    bias = draw(N, seed=2, dtype=dtype) if biased else None
    exact = x.double() @ (w8.double() * scale.double().unsqueeze(1)).T + (bias.double() if biased else 0)
    got = int8_linear(x, w8, scale, bias)
    assert got.dtype == dtype
    check(got, exact, BOUND[dtype])


@pytest.mark.parametrize("N, K", [(1, 1), (4, 1024), (5, 2500), (130, 16)])
@pytest.mark.parametrize("M", [1, 7])
def test_int8_linear_of_odd_shapes(M, N, K):
    w8 = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    x = draw(M, 1, 2 * K)[..., :K]  # rows that do not follow each other
    got = int8_linear(x, w8, torch.full((N,), 0.01))
    check(got, x.double() @ w8.double().T * 0.01, 2e-6)

# ---- fused_linear ----------------------------------------------------------------------------------------------------


def fused_linear_exact(x, weights, scales=(), biases=(), norm=NO_NORM, activation="identity", residual=None):
    """Row by row and result by result, by the definitions, in float64."""
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
    weights = [draw(*size, seed=10 + i, dtype=dtype) / K**0.5 for i, size in enumerate(shape)]
    scales = []
    if int8:
        weights, scales = zip(*map(quantize_int8, weights), strict=True)
    biases = [draw(n, seed=20 + i, dtype=dtype) for i, n in enumerate(widths)] if biased else []
    gain, shift = (draw(K, seed=s, dtype=dtype) + 1 for s in (30, 31))
    norm = {"none": Norm(), "rms": Norm("rms", gain, None, 1e-6), "plain rms": Norm("rms", None, None, 1e-6),
            "layer": Norm("layer", gain, shift, 1e-5)}[norm]  # fmt: skip
    return draw(M, K, dtype=dtype) * 3 + 0.5, weights, scales, biases, norm


@pytest.mark.parametrize("norm, biased, int8, M, activation", [
    *(("layer", True, False, 2, activation) for activation in ("identity", "relu", "relu2", "gelu", "gelu_tanh")),
    *(("rms", False, True, 2, activation) for activation in ("identity", "swiglu")),
    *(("none", True, True, 20, activation) for activation in ("relu2", "swiglu")),
    ("layer", True, False, 20, "gelu"), ("layer", True, False, 2, "swiglu"), ("plain rms", False, False, 2, "swiglu"),
])  # fmt: skip
def test_fused_linear_is_norm_product_activation_and_sum(norm, biased, int8, M, activation):
    x, weights, scales, biases, norm = fused_linear_inputs(M, 300, [22], torch.bfloat16, norm, biased, int8)
    residual = draw(M, 22 // (1 + (activation == "swiglu")), seed=3, dtype=torch.bfloat16)
    args = (weights, scales, biases, norm, activation, residual)
    got = fused_linear(x, *args)
    assert got.dtype == torch.bfloat16
    check(got, fused_linear_exact(x, *args), BOUND[torch.bfloat16])
    check(fused_linear(x.float(), *args[:-1], residual.float()), fused_linear_exact(x, *args), 3e-6)
    check(fused_linear_plain(x.double(), *args), fused_linear_exact(x, *args), 1e-6)


@pytest.mark.parametrize("K, widths", [(1, [1]), (64, [4, 4, 4]), (257, [5, 1, 9]), (768, [12, 7])])
@pytest.mark.parametrize("M", [1, 5, 17, 64])
def test_fused_linear_of_odd_shapes(M, K, widths):
    x, *args = fused_linear_inputs(M, K, widths, norm="layer" if K > 1 else "rms", biased=True)
    residual = draw(M, 2 * sum(widths), seed=3)[:, : sum(widths)]  # rows that do not follow each other
    got = fused_linear(x.repeat(1, 2)[:, :K], *args, residual=residual)
    check(got, fused_linear_exact(x, *args, residual=residual), 3e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_of_fused_linear_does_not_depend_on_its_company(int8):
    x, *args = fused_linear_inputs(16, 100, [10], torch.bfloat16, "layer", True, int8)
    y = fused_linear(x, *args, "swiglu")
    for rows in (slice(0, 1), slice(3, 5), slice(7, 16)):
        assert torch.equal(fused_linear(x[rows], *args, "swiglu"), y[rows])


def test_fused_linear_with_a_matrix_for_each_row():
    x, *args = fused_linear_inputs(3, 40, [6], norm="rms", per_row=True)
    check(fused_linear(x, *args, "swiglu"), fused_linear_exact(x, *args, activation="swiglu"), 3e-6)


def test_a_fused_step_runs_the_kernel():
    """As torch.compile records it."""
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
    check(logits[1], logits[0].double(), 3e-6)


# ---- AFT simple ------------------------------------------------------------------------------------------------------


def aft_by_pairs(q, k, v):
    """Every pair of tokens, its weight against the largest key up to t; float64, and differentiable."""
    T = k.size(1)
    score = k.unsqueeze(1).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1)[None, :, :, None], -math.inf)
    return torch.sigmoid(q) * (score.softmax(dim=2) * v.unsqueeze(1)).sum(dim=2)  # (B, t, s, D) summed over s


def keys_like(kind: str, T: int, D: int) -> torch.Tensor:
    t = torch.arange(T)[:, None]
    return {
        "normal": draw(T, D),
        "either": 80 * draw(T, D).sign(),
        "anything": 160 * draw(T, D).sigmoid() - 80,
        "first one high": torch.where(t == 0, 80.0, 69.0).expand(T, D),
        "high, then low": torch.where(t < 8, 80.0, -80.0).expand(T, D),
        "low, then high": torch.where(t < T - 8, -80.0, 80.0).expand(T, D),
        "rising": torch.linspace(-80, 80, T)[:, None].expand(T, D),
        "thousands apart": 3000 * draw(T, D),
    }[kind]


KEYS = [
    "normal",
    "either",
    "anything",
    "first one high",
    "high, then low",
    "low, then high",
    "rising",
    "thousands apart",
]


def check_aft(q, k, v, bound: float) -> None:
    """Result and gradients against pairs in float64 on the same numbers. A gradient of k is a difference: its error is
    judged by the sum of what is subtracted, which nothing cancels in."""
    weight = draw(*v.shape, seed=9, dtype=v.dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = aft_by_pairs(*exact)
    (expected * weight.double()).sum().backward()
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    got = torch.ops.strawberry.aft_simple(*ours, True)[0]
    assert got.dtype == v.dtype
    (got * weight).sum().backward()
    check(got, expected.detach(), bound)
    floor = (exact[2].grad * exact[2].detach()).norm().item()
    for name, mine, its in zip("qkv", ours, exact, strict=True):
        assert mine.grad.dtype == mine.dtype
        size = its.grad.norm().item() + (floor if name == "k" else 0.0)
        error = (mine.grad.double() - its.grad).norm().item()
        assert error <= bound * size, f"gradient of {name}: {error:.1e} of {size:.1e}"


@pytest.fixture(params=["chained", "not chained"])
def small_tiles(request, monkeypatch):
    """More tiles of fewer tokens: the interpreter is slow."""
    sizes = {"AFT_ROWS": 8, "AFT_CHAINED_ROWS": 4, "AFT_SEGMENT": 8, "AFT_MIN_SEGMENT": 8, "AFT_GROUP": 2}
    for name, value in (sizes | {"AFT_MIN_PROGRAMS": 10**9 if request.param == "chained" else 0}).items():
        monkeypatch.setattr(aft, name, value)


@pytest.mark.parametrize("keys", KEYS)
def test_aft_and_its_gradients(keys, small_tiles):
    """Three segments, two groups."""
    B, T, D = 2, 21, 20
    k = torch.stack((keys_like(keys, T, D), keys_like(keys, T, D).flip(1) - 5))
    check_aft(draw(B, T, D), k, draw(B, T, D, seed=2), 2e-6)


@pytest.mark.parametrize("T", [1, 8, 9, 17, 40])
def test_aft_of_any_length(T, small_tiles):
    check_aft(*(draw(1, T, 33 if T == 17 else 3, seed=s) for s in range(3)), 2e-6)


def test_aft_over_128_tokens():
    """As many as the interpreter has time for; `python bench.py kernels` goes to 65,536 on a GPU."""
    check_aft(*(draw(1, 128, 2, seed=s) for s in range(3)), 2e-6)


def test_aft_in_bfloat16(small_tiles):
    check_aft(*(draw(1, 37, 40, seed=s, dtype=torch.bfloat16) for s in range(3)), 8e-3)


def test_aft_takes_thirds_of_a_projection(small_tiles):
    """q and k normed, in float32, and v as it is, a third of a wider tensor."""
    wide = draw(2, 20, 24, dtype=torch.bfloat16)
    q, k, v = wide.chunk(3, dim=-1)
    check_aft(q.float(), k.float() * 2, v, 8e-3)


def test_aft_never_waits_for_what_is_not_a_number(small_tiles):
    """NaN goes where it must, and no further: to later tokens of its channel and row."""
    q, k, v = (draw(2, 40, 5, seed=s) for s in range(3))
    y = fused_aft_simple(q, k, v)
    k[0, 11, 3] = math.nan
    bad = fused_aft_simple(q, k, v)
    hit = torch.zeros(2, 40, 5, dtype=torch.bool)
    hit[0, 11:, 3] = True
    assert not torch.isfinite(bad[hit]).any() and torch.equal(bad[~hit], y[~hit])


def test_aft_chains_segments_only_where_programs_are_few(monkeypatch):
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 132)
    chained = [is_chained(torch.empty(B, T, 768, device="meta"))
               for B, T in [(32, 1024), (22, 1024), (8, 4096), (1, 65536), (1, 128), (1, 32)]]  # fmt: skip
    assert chained == [False, False, True, True, True, False]
    assert [segment_size(torch.empty(4, T, D, device="meta")) for T, D in [(256, 256), (8192, 256)]] == [32, 128]


def test_aft_looks_back_only():
    q, k, v = (draw(1, 40, 8, seed=s) for s in range(3))
    y = fused_aft_simple(q, k, v)
    k[:, 21:], v[:, 21:] = math.nan, math.nan
    assert torch.equal(fused_aft_simple(q, k, v)[:, :21], y[:, :21])


def test_aft_rows_do_not_depend_on_each_other():
    q, k, v = (draw(3, 20, 8, seed=s) for s in range(3))
    y = fused_aft_simple(q, k, v)
    assert torch.equal(torch.cat([fused_aft_simple(*(x[b : b + 1] for x in (q, k, v))) for b in range(3)]), y)


# ---- AFT with positions ----------------------------------------------------------------------------------------------


def positional_by_pairs(q, k, v, p):
    """Every pair of tokens, p (G, T, T) for groups of channels; in the types given, and differentiable."""
    T, D = k.shape[1:]
    score = k.unsqueeze(1) + p.movedim(0, -1).repeat_interleave(D // len(p), dim=-1)
    score = score.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1)[None, :, :, None], -math.inf)
    return torch.sigmoid(q) * (score.softmax(dim=2) * v.unsqueeze(1)).sum(dim=2)


def pairs_of(kind: str, p, T: int, window: int) -> torch.Tensor:
    """p (G, T, T), entry by entry: 0 from a distance of `window` on."""
    if kind == "conv":
        return torch.stack([pairs_of("taps", [taps], T, window)[0] for taps in p[0]])
    if kind == "taps":
        return torch.stack([p[0][abs(t - s)] if abs(t - s) < window else p[0][0] * 0
                            for t in range(T) for s in range(T)]).view(1, T, T)  # fmt: skip
    a, b = p
    return torch.stack([a[t] @ b[s] if abs(t - s) < window else a[0, 0] * 0
                        for t in range(T) for s in range(T)]).view(1, T, T)  # fmt: skip


def check_positional(kind, q, k, v, p, window: int, bound: float) -> None:
    """Result and gradients, also of the positions, against pairs in float64."""
    weight = draw(*v.shape, seed=9, dtype=v.dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, *p)]
    expected = positional_by_pairs(*exact[:3], pairs_of(kind, exact[3:], v.size(1), window))
    (expected * weight.double()).sum().backward()
    ours = [x.detach().requires_grad_() for x in (q, k, v, *p)]
    got = fused_aft_conv(*ours) if kind == "conv" else fused_aft_local(*ours, window)
    assert got.dtype == v.dtype
    (got * weight).sum().backward()
    check(got, expected.detach(), bound)
    floor = (exact[2].grad * exact[2].detach()).norm().item()  # what a gradient of k or p is a difference of
    for name, mine, its in zip("qkvab", ours, exact, strict=False):
        size = its.grad.norm().item() + (floor if name in "kab" else 0.0)
        error = (mine.grad.double() - its.grad).norm().item()
        assert mine.grad.dtype == mine.dtype and error <= bound * size, f"{name}: {error:.1e} of {size:.1e}"


def positions(kind: str, T: int, groups: int, window: int) -> list[torch.Tensor]:
    return [draw(groups, window, seed=5)] if kind == "conv" else [draw(T + 2, 6, seed=5), draw(T + 2, 6, seed=6)]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(aft_positional, "AFT_BLOCK", 16)


@pytest.mark.parametrize("kind", ["conv", "local"])
@pytest.mark.parametrize("B, T, D, groups, window", [
    (2, 50, 6, 2, 20), (1, 70, 5, 1, 17), (1, 64, 4, 2, 1), (1, 40, 4, 4, 40), (1, 33, 34, 2, 18), (2, 1, 2, 1, 3),
])  # fmt: skip
def test_positional_aft_and_its_gradients(kind, B, T, D, groups, window, small_blocks):
    q, k, v = (draw(B, T, D, seed=s) for s in range(3))
    check_positional(kind, q, k, v, positions(kind, T, groups, window), window, 5e-6)


@pytest.mark.parametrize("kind", ["conv", "local"])
@pytest.mark.parametrize("keys", [keys for keys in KEYS if keys != "thousands apart"])
def test_positional_aft_with_keys_of_80_in_the_interpreter(kind, keys, small_blocks):
    T, window = 40, 19
    q, v, k = draw(1, T, 4), draw(1, T, 4, seed=2), keys_like(keys, T, 4)[None].contiguous()
    p = [x * 0.2 for x in positions(kind, T, 2, window)]
    check_positional(kind, q, k, v, p, window, 1e-5)


@pytest.mark.parametrize("kind", ["conv", "local"])
def test_positional_aft_in_whole_blocks_and_bfloat16(kind):
    T, window = 100, 40
    q, k, v = (draw(1, T, 8, seed=s, dtype=torch.bfloat16) for s in range(3))
    check_positional(kind, q, k, v, positions(kind, T, 2, window), window, 1e-2)


# ---- AFT in models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", AFTS)
def test_mixers_go_by_kernels_and_agree_with_their_plain_path(kind, dtype, small_blocks, monkeypatch):
    """Result and gradients, the plain path in float64, which no kernel takes."""
    torch.manual_seed(0)
    mix = AFTS[kind](SimpleNamespace(n_qkv=6, n_head=2, window=19, block_size=50), norm_channels)
    for p in mix.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plain, at = copy.deepcopy(mix).double(), ForwardContext(torch.arange(30)[None])
    q, k, v, slope = (draw(2, 30, 6, seed=s, dtype=dtype) for s in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plain(*norm_channels(*exact[:2], at), exact[2], exact[0], at, None)
    expected.backward(slope.double())
    ours, taken = [x.requires_grad_() for x in (q, k, v)], []
    names = (aft, "fused_aft_simple"), (aft_positional, "fused_aft_conv"), (aft_positional, "fused_aft_local")
    for room, name in names:
        fused = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *args, fused=fused: taken.append(1) or fused(*args))
    got = mix(*norm_channels(*ours[:2], at), ours[2], ours[0], at, None)
    got.backward(slope)
    assert taken
    bound = 2e-5 if dtype == torch.float32 else 3e-2
    check(got, expected.detach(), bound)
    pairs = [*zip(ours, exact, strict=True), *zip(mix.parameters(), plain.parameters(), strict=True)]
    for mine, its in pairs:
        check(mine.grad, its.grad, bound)


@pytest.mark.parametrize("kind", ["simple", "conv", "local"])
def test_a_model_with_kernels_compiles_as_one_graph(kind, small_blocks, monkeypatch):
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


def test_the_operators_are_registered_as_pytorch_wants_them(small_blocks):
    q, k, v, pos = ring(2, 4, 2, 16, 30, [29, 35])
    torch.library.opcheck(torch.ops.strawberry.decode_attention.default, (q, k, v, pos, 30, 0.25, 2))
    w8, scale = quantize_int8(draw(9, 16))
    torch.library.opcheck(torch.ops.strawberry.int8_linear.default, (draw(2, 16), w8, scale, None))
    torch.library.opcheck(torch.ops.strawberry.int8_linear.default, (draw(2, 16), w8, scale, draw(9)))
    qkv = [draw(1, 3, 2, seed=s).requires_grad_() for s in range(3)]
    torch.library.opcheck(torch.ops.strawberry.aft_simple.default, (*qkv, True))
    cos, sin = angles(1, 3, 16)
    torch.library.opcheck(torch.ops.strawberry.qk_rope_norm.default, (draw(2, 3, 64), cos, sin, 32, 16, True))
    grads = draw(2, 3, 32), draw(2, 3, 16, seed=1), draw(2, 3, 48, seed=2)[..., 16:32]
    for qkv_or_none in (draw(2, 3, 64), None):
        torch.library.opcheck(torch.ops.strawberry.qk_rope_norm_backward.default, (*grads, qkv_or_none, cos, sin))
    weight, most = torch.rand(1, 1, 1, 16, 16).requires_grad_(), torch.zeros(1, 1, 16)
    torch.library.opcheck(torch.ops.strawberry.aft_positional.default, (*qkv, weight, most))


def test_compile_keeps_the_kernels_whole():
    q, k, v, pos = ring(2, 4, 2, 16, 30, [29, 35])
    w8, scale = quantize_int8(draw(9, 16))

    def step(q, k, v, pos):
        return int8_linear(decode_attention(q, k, v, pos, 30, 0.25) * 2, w8, scale)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, pos), step(q, k, v, pos))


def test_compile_differentiates_aft(small_blocks):
    qkv = [draw(1, 10, 3, seed=s).requires_grad_() for s in range(3)]

    def loss(q, k, v):
        local = fused_aft_local(q, k, v, v[0], k[0], 5)
        y = fused_aft_conv(q, fused_aft_simple(q * 2, k, v), v, torch.ones(1, 7)) + local
        return (y**2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*qkv), qkv) for f in (compiled, loss))
    torch.testing.assert_close(got, expected)


# ---- the linear memory -----------------------------------------------------------------------------------------------

MEMORIES = {  # B, T, H, d, tokens in a chunk, dtype
    "whole chunks": (1, 32, 2, 16, 16, torch.float32),
    "odd ends and heads": (2, 37, 2, 24, 23, torch.float32),
    "less than a chunk": (2, 3, 1, 16, 32, torch.float32),
    "half": (1, 70, 1, 32, 64, torch.bfloat16),
}


def memory_inputs(B, T, H, d, size, dtype):
    """z, of which q and k are slices, v, log α, β. Some tokens write nothing."""
    z = draw(B, T + 1, H, d) / d**0.5
    log_decay, beta = -draw(B, T, H, seed=2).abs() / 4, draw(B, T, H, seed=3).sigmoid()
    log_decay[:, 1:3] = beta[:, 1:3] = 0
    return z.to(dtype), draw(B, T, H, d, seed=1, dtype=dtype), log_decay, beta


@pytest.mark.parametrize("shape", MEMORIES)
def test_a_memory_computes_its_recurrence(shape):
    """o, the last state and all gradients, from an empty state; o and the last state from another one."""
    *_, size, dtype = MEMORIES[shape]
    inputs, state = memory_inputs(*MEMORIES[shape]), draw(*(MEMORIES[shape][i] for i in (0, 2, 3, 3)), seed=4)
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    found = []
    for read, cast in ((read_memory, lambda x: x.clone()), (read_chunks, lambda x: x.double())):
        z, v, *gates = (cast(x).requires_grad_() for x in inputs)
        o, last = read(z[:, 1:], z[:, :-1], v, *gates, size=size)
        grads = torch.autograd.grad(o, (z, v, *gates), cast(draw(*o.shape, seed=5, dtype=dtype)))
        with torch.no_grad():
            found.append((o, last, *grads, *read(z[:, 1:], z[:, :-1], v, *gates, size=size, state=cast(state))))
    for got, exact in zip(*found, strict=True):
        check(got, exact, bound)


def test_a_model_with_a_memory_trains_and_decodes_by_kernels(monkeypatch):
    """Loss, gradients and cached logits are those of float64, which no kernel computes."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_qkv": 16, "vocab_size": 32, "block_size": 64, "r_layer": 1}
    model = build(sizes | {"retention_rule": "delta", "retention_chunk": 16, "memory_head": 8})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx, launched, fused = torch.randint(32, (2, 30)), [], memory.fused_memory
    monkeypatch.setattr(memory, "fused_memory", lambda *inputs: launched.append(1) or fused(*inputs))
    found = []
    for one in (model, copy.deepcopy(model).double()):
        loss = one(idx, idx)[1]
        grads = torch.autograd.grad(loss, list(one.parameters()))
        cache = one.new_cache(2, 64)
        with torch.no_grad():
            logits = torch.cat([one(part, cache=cache)[0] for part in idx.split((19, 1, 10), dim=1)], dim=1)
        found.append((loss, logits, *grads))
    assert len(launched) == 3  # training, and two prefills
    for got, exact in zip(*found, strict=True):
        check(got, exact, 1e-4)


# ---- retention's weights ---------------------------------------------------------------------------------------------


def updated_weights(raw, scale, oa, out, viewed):
    """A loop over rows and chunks: (the sums, their deviations)."""
    B, n = oa.shape[:2]
    new = []
    for b in range(B):
        for j in range(n):
            w = raw if raw.dim() == 2 else raw[b, j]
            seen = w.T if viewed else w
            more = torch.nn.functional.silu(scale[b, j] * (seen @ oa[b, j])) / scale[b, j] @ out.T
            new.append((seen + more).T if viewed else seen + more)
    sums = torch.stack(new).unflatten(0, (B, n))
    return sums, sums.std(dim=(-2, -1), keepdim=True)


GROWING = {  # B, n, rows as the rule reads them, C, viewed, one matrix for all
    "first step": (2, 2, 40, 24, False, True),
    "first step, viewed": (2, 2, 40, 24, True, True),
    "later": (3, 1, 24, 24, False, False),
    "later, viewed": (2, 2, 40, 24, True, False),
    "several tiles": (1, 2, 260, 136, False, False),
    "several tiles, viewed": (2, 1, 260, 136, True, False),
    "whole tiles": (1, 2, 256, 128, False, False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GROWING)
def test_grow(case, dtype):
    """Through model.Grow: sums, deviations and all gradients."""
    B, n, rows, C, viewed, shared = GROWING[case]
    shape = (C, rows) if viewed else (rows, C)
    raw = draw(*shape if shared else (B, n, *shape), dtype=dtype)
    scale, oa = draw(B, n, 1, 1, seed=1).abs() + 0.3, draw(B, n, C, C, seed=2, dtype=dtype) * C**-0.5
    out, grad = draw(C, C, seed=3, dtype=dtype) * C**-0.5, draw(B, n, *shape, seed=4, dtype=dtype)
    ours = [x.clone().requires_grad_() for x in (raw, scale, oa, out)]
    each = scale.expand(B, n, rows, C)  # a scale for each number, since in the sum of their gradients much cancels
    exact = [x.double().requires_grad_() for x in (raw, each, oa, out)]
    assert can_fuse_update(raw, oa)
    got, want = GatedUpdate.apply(*ours, viewed), updated_weights(*exact, viewed)
    for new, deviation in got, want:
        slope = 40 * draw(B, n, 1, 1, seed=5).double()
        ((new.double() * grad.double()).sum() + (deviation.double() * slope).sum()).backward()
    bound = 4 * BOUND[dtype]
    (raw, scale, oa, out), (exact_raw, each, exact_oa, exact_out) = ([x.grad for x in xs] for xs in (ours, exact))
    pairs = (raw, exact_raw), (oa, exact_oa), (out, exact_out), *zip(got, want, strict=True)
    for a, b in pairs:
        check(a.detach(), b.detach(), bound)
    assert (scale - each.sum(dim=(-2, -1), keepdim=True)).norm() < bound * each.norm()


def test_a_model_with_retention_grows_by_kernels():
    """A training step's loss and gradients are those of the plain path in float64."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_qkv": 24, "vocab_size": 32, "block_size": 64, "retention_chunk": 16}
    model = build({**sizes, "r_layer": 2, "n_head": 2, "aft": "full"}).double()
    torch.nn.init.normal_(model.blocks[0].out, std=0.2)
    idx = torch.randint(32, (2, 60))
    exact = model(idx, idx)[1]
    wanted = torch.autograd.grad(exact, list(model.parameters()))
    loss = model.float()(idx, idx)[1]
    check(loss.detach()[None], exact.detach()[None], 1e-5)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        check(a, b, 1e-4)


def test_grow_is_compiled_whole():
    raw, scale, oa, out = draw(2, 2, 24, 24), torch.ones(2, 2, 1, 1), draw(2, 2, 24, 24, seed=1), draw(24, 24, seed=2)

    def total(*x):
        return sum(y.square().sum() for y in GatedUpdate.apply(*x, False))

    ways = total, torch.compile(total, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(way(*(xs := [x.requires_grad_() for x in (raw, scale, oa, out)])), xs) for way in ways)
    for eager, compiled in zip(a, b, strict=True):
        torch.testing.assert_close(eager, compiled)


# ---- queries and keys, normed and turned -----------------------------------------------------------------------------


def angles(rows: int, T: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 9 * draw(rows, T, 1, d // 2, seed=5)
    return angle.cos(), angle.sin()


def turned_as_complex(x, cos, sin, d, normed):
    """Each head of x (B, T, ·) as d/2 complex numbers a + ib, times e^−iφ; divided by their root mean square."""
    a, b = x.unflatten(-1, (-1, d)).chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.complex(cos, -sin)
    if normed:
        z = z / ((z.real**2 + z.imag**2).sum(dim=-1, keepdim=True) / d + 1e-6).sqrt()
    return torch.cat((z.real, z.imag), dim=-1).flatten(2)


TURNS = {  # B, T, H, Hkv, d, rows of the tables
    "heads of 16": (2, 7, 3, 3, 16, 1),
    "heads of 32, shared": (1, 33, 6, 2, 32, 1),
    "heads of 64": (2, 13, 12, 12, 64, 1),
    "heads of 64, one key": (2, 5, 5, 1, 64, 1),
    "heads of 128, each row's own places": (3, 5, 2, 2, 128, 3),
    "a head of 256": (1, 3, 1, 1, 256, 1),
    "one token": (1, 1, 1, 1, 16, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["turned", "normed"])
@pytest.mark.parametrize("shape", TURNS)
def test_turned_queries_and_keys_and_their_gradients(shape, normed, dtype):
    """Small numbers among them, which the norm's 1e-6 shows in. Gradients come strided, as attention makes them."""
    B, T, H, Hkv, d, rows = TURNS[shape]
    widths, (cos, sin) = (H * d, Hkv * d, Hkv * d), angles(rows, T, d)
    qkv = draw(B, T, sum(widths), dtype=dtype)
    qkv[:, 0] *= 1e-3
    exact = qkv.double().requires_grad_()
    q, k, v = exact.split(widths, dim=-1)
    expected = *(turned_as_complex(x, cos.double(), sin.double(), d, normed) for x in (q, k)), v
    slopes = [
        draw(B, T, 2 * widths[0], seed=1, dtype=dtype)[..., : widths[0]],  # part of something wider
        draw(T, B, widths[1], seed=2, dtype=dtype).transpose(0, 1),  # tokens before rows
        draw(B, T, 2 * widths[2], seed=3, dtype=dtype)[..., ::2],  # every second number
    ]
    wanted = torch.autograd.grad(expected, exact, [x.double() for x in slopes])[0]
    ours = qkv.requires_grad_()
    assert can_fuse_rope(ours, widths, cos)
    got = fused_qk_rope_norm(ours, widths, cos, sin, normed)
    grad = torch.autograd.grad(got, ours, slopes)[0]
    bound = {torch.float32: 5e-7, torch.bfloat16: BOUND[torch.bfloat16], torch.float16: 1e-3}[dtype]
    assert got[2].data_ptr() == ours[..., sum(widths[:2]) :].data_ptr()  # no copy
    for x, its in zip(got, expected, strict=True):
        assert x.dtype == dtype
        check(x.detach(), its.detach(), bound)
    assert grad.dtype == dtype and grad.is_contiguous()
    for part, its in zip(grad.split(widths, dim=-1), wanted.split(widths, dim=-1), strict=True):
        check(part[:, :1], its[:, :1], bound)
        check(part, its, bound)


def test_turning_over_two_rows_of_programs(monkeypatch):
    """Rows of programs that end amid a token; what is not there is not written."""
    monkeypatch.setattr(rope, "ROPE_TILE", 64)
    test_turned_queries_and_keys_and_their_gradients("heads of 16", True, torch.float32)


def test_what_turns_by_its_kernel():
    qkv, (cos, _) = draw(2, 5, 144).requires_grad_(), angles(1, 5, 16)
    thirds = (48, 48, 48)
    assert can_fuse_rope(qkv, thirds, cos) and can_fuse_rope(qkv, (112, 16, 16), cos)
    with torch.no_grad():
        assert not can_fuse_rope(qkv, thirds, cos)
    assert not can_fuse_rope(qkv.detach(), thirds, cos)
    assert not can_fuse_rope(qkv.detach().double().requires_grad_(), thirds, cos)
    assert not can_fuse_rope(qkv, (72, 72), cos)  # KV attention
    for d in (8, 24):
        assert not can_fuse_rope(qkv, thirds, angles(1, 5, d)[0])


TURNING = {
    "strawberry": {"n_qkv": 32, "n_experts": 2, "window": 16, "r_layer": 0, "retention": "none"},
    "strawberry-silia": {"arch": "strawberry-silia", "n_qkv": 32},
    "palm": {"arch": "palm", "attention_type": "mha", "n_qkv": 32},
    "lam": {"arch": "palm", "attention_type": "lam", "n_qkv": 32},
    "tinystar": {"arch": "tinystar", "attention_type": "MQA"},
    "decoder": {"arch": "transformer", "kind": "decoder", "attention_type": "GQA", "n_kv_head": 1, "bias": True},
}


@pytest.mark.parametrize("name", TURNING)
def test_models_turn_by_the_kernel(name, monkeypatch):
    """A training step's loss and gradients, as it is and compiled, are those of the plain path in float64."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 32, "block_size": 48}
    if name in ("tinystar", "decoder"):
        sizes["pos_encoding"] = "RoPE"
    model = build(sizes | TURNING[name]).double()
    std = 0.4 if name == "strawberry-silia" else 0.2  # its branches are products of two layers, and would be tiny
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    idx, learned = torch.randint(32, (2, 41)), list(model.parameters())
    exact = model(idx, idx)[1]
    wanted = torch.autograd.grad(exact, learned, allow_unused=True)
    turn, taken = fused_qk_rope_norm, []
    monkeypatch.setattr(rope, "fused_qk_rope_norm", lambda *args, **kw: taken.append(1) or turn(*args, **kw))
    model.float()
    torch._dynamo.reset()
    for call in (model, torch.compile(model, backend="aot_eager")):
        loss = call(idx, idx)[1]
        check(loss.detach()[None], exact.detach()[None], 1e-5)
        for a, b in zip(torch.autograd.grad(loss, learned, allow_unused=True), wanted, strict=True):
            if b is not None:
                check(a, b, 1e-4)
        assert taken
        taken.clear()


# ---- the head's loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("V", "width"), [(50, 64), (64, 64), (1000, 1024), (20_000, 20_032)])
def test_head_slopes_are_the_gradient_of_the_cross_entropy(V, width, cap, dtype):
    logits = (4 * draw(9, width)).to(dtype)
    logits[2, 7], logits[3, 7], logits[4, V - 3] = 80.0, -80.0, 120.0  # the last beyond what exp has room for
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(1))
    targets[5] = -1
    exact = logits[:, :V].double().requires_grad_()
    z = exact if cap is None else cap * torch.tanh(exact / cap)
    wanted = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    wanted.sum().backward()
    nats, slopes = fused_cross_entropy(logits, targets, V, cap)
    check(nats, wanted.detach(), 2e-6)
    check(slopes[:, :V], exact.grad, BOUND[dtype])
    assert not slopes[5].any() and not slopes[:, V:].any() and slopes.dtype == dtype


@pytest.mark.parametrize(("V", "width"), [(50, 64), (20_000, 20_032)])
def test_head_slopes_may_be_scaled_and_of_another_type(V, width):
    logits = (4 * draw(9, width)).bfloat16()
    targets = torch.randint(V, (9,), generator=torch.Generator().manual_seed(1))
    nats, slopes = fused_cross_entropy(logits, targets, V, None)
    again, scaled = fused_cross_entropy(logits, targets, V, None, 2.0**15, torch.float32)
    assert torch.equal(nats, again) and scaled.dtype == torch.float32
    check(scaled[:, :V] / 2**15, slopes[:, :V].double(), BOUND[torch.bfloat16])


# ---- matrices of bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (128, 128), (200, 37), (1, 300)])
def test_transposed_moves_bytes(shape):
    x = draw(*shape).to(torch.float8_e4m3fn)
    y = transpose_fp8(x)
    assert y.is_contiguous() and y.dtype == x.dtype
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8).t())


BENT = {
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "gelu_tanh": lambda h: h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
    "relu": lambda h: h * (h > 0),
    "relu2": lambda h: h * h * (h > 0),
    "identity": lambda h: h,
    "swiglu": lambda h: h.chunk(2, dim=-1)[0] * torch.nn.functional.silu(h.chunk(2, dim=-1)[1]),
}


def in_8_bits(got: torch.Tensor, turned: torch.Tensor, exact: torch.Tensor, scale: float) -> None:
    """The interpreter's conversion forgets to carry, so that where rounding goes up to a power of two, some 3 numbers
    of 100, it gives half of it."""
    assert torch.equal(turned.view(torch.uint8), got.view(torch.uint8).t()) and turned.is_contiguous()
    off = ((got.double() / scale - exact).abs() > 0.13 * exact.abs() + 2.0**-9 / scale).double().mean()
    assert off < 0.06


@pytest.mark.parametrize("rows_columns", [(128, 64), (200, 37), (16, 96)])
@pytest.mark.parametrize("kind", list(BENT))
def test_what_is_between_two_products(kind, rows_columns):
    rows, columns = rows_columns
    width = columns * (2 if kind == "swiglu" else 1)
    h, grad = draw(rows, width).bfloat16(), draw(rows, columns, seed=1).bfloat16()
    more = draw(rows, width, seed=2).bfloat16()
    seen = h.double().requires_grad_()
    exact = BENT[kind](seen)
    (slope,) = torch.autograd.grad(exact, seen, grad.double())
    in_8_bits(*act_quantize(h, kind, 4.0, torch.float8_e4m3fn), exact.detach(), 4.0)
    in_8_bits(*act_quantize_backward(h, grad, kind, 64.0, torch.float8_e5m2), slope, 64.0)
    in_8_bits(*act_quantize_backward(h, grad, kind, 64.0, torch.float8_e5m2, more), slope + more.double(), 64.0)


@pytest.mark.parametrize("rows", [128, 37])
def test_gradients_are_joined(rows):
    wide = draw(rows, 320).bfloat16()
    parts = wide[:, :64], draw(rows, 128, seed=1).bfloat16(), wide[:, 192:256]  # two of them with rows between theirs
    in_8_bits(*concat_quantize(parts, 64.0, torch.float8_e5m2), torch.cat(parts, dim=1).double(), 64.0)
    torch.library.opcheck(torch.ops.strawberry.concat_quantize, (*parts, 64.0, torch.float8_e5m2))
    with pytest.raises(ValueError, match="64"):
        concat_quantize((wide[:, :32], *parts[1:]), 64.0, torch.float8_e5m2)


def test_bytes_are_ops_that_a_compiler_keeps():
    h, grad, eight = draw(16, 32).bfloat16(), draw(16, 32).bfloat16(), torch.float8_e5m2
    ops = torch.ops.strawberry
    torch.library.opcheck(ops.transpose_fp8, (h.to(eight).view(torch.uint8),))
    torch.library.opcheck(ops.act_quantize, (h, "gelu", 4.0, eight))
    torch.library.opcheck(ops.act_quantize_backward, (h, grad, None, "gelu", 4.0, eight))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_turned_gradients_in_8_bits(normed, heads):
    """What turn_backward gives, which is tested above, in bytes."""
    B, T, d = 2, 67, 16
    n_q, n_k = (n * d for n in heads)
    qkv = draw(B, T, n_q + 2 * n_k).bfloat16()
    wide = draw(B, T, n_q + 2 * n_k, seed=1).bfloat16()
    grads = wide[..., :n_q], draw(B, T, n_k, seed=2).bfloat16(), wide[..., n_q + n_k :]
    angle = draw(1, T, 1, d // 2, seed=3)
    about = (*grads, qkv if normed else None, angle.cos(), angle.sin())
    exact = torch.ops.strawberry.qk_rope_norm_backward(*(x if x is None else x.double().float() for x in about))
    in_8_bits(*qkv_grad_quantize(*about, 64.0, torch.float8_e5m2), exact.flatten(0, 1).double(), 64.0)
    torch.library.opcheck(torch.ops.strawberry.qkv_grad_quantize, (*about, 64.0, torch.float8_e5m2))


def test_a_turned_product_in_8_bits():
    from strawberry.ops.float8 import Float8Linear, Float8QKVRope, prepare

    prepare(torch.device("cpu"))
    B, T, d = 2, 64, 16
    x, w = draw(B, T, 64).bfloat16().requires_grad_(), (draw(192, 64, seed=1) / 8).requires_grad_()
    angle, widths = draw(1, T, 1, d // 2, seed=2), (64, 64, 64)
    tables = angle.cos(), angle.sin()
    got = Float8QKVRope.apply(x, w, widths, *tables, True)
    whole = torch.compile(lambda x, w: Float8QKVRope.apply(x, w, widths, *tables, True), backend="aot_eager",
                          fullgraph=True)(x, w)  # fmt: skip
    wanted = fused_qk_rope_norm(Float8Linear.apply(x.flatten(0, 1), w).unflatten(0, (B, T)), widths, *tables, True)
    grads = [draw(B, T, 64, seed=i).bfloat16() * 2**-15 for i in (3, 4, 5)]
    for a, b, c in zip(got, wanted, whole, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    pairs = [torch.autograd.grad(y, (x, w), grads) for y in (got, wanted, whole)]
    for a, b, c in zip(*pairs, strict=True):  # the interpreter's conversion and torch's differ: see in_8_bits
        check(a, b.double(), 0.2)
        assert torch.equal(a, c)


IN_8_BITS = {  # and how often the gradients of q, k and v are turned, with or without the norm, or joined
    "strawberry": ({"arch": "strawberry", "retention": "none", "r_layer": 1}, {"normed": 1, "joined": 1}),
    "grouped": ({"arch": "tinystar", "attention_type": "GQA", "n_kv_head": 1, "pos_encoding": "RoPE"}, {"turned": 1}),
    "learned": ({"arch": "tinystar", "attention_type": "MHA", "pos_encoding": "Learned"}, {"joined": 1}),
    "narrow": ({"arch": "tinystar", "attention_type": "GQA", "n_kv_head": 1, "pos_encoding": "Learned"}, {}),
}


@pytest.mark.parametrize("name", IN_8_BITS)
def test_models_join_their_gradients_in_8_bits(name, monkeypatch):
    hyper, wanted = IN_8_BITS[name]
    torch.manual_seed(0)
    model = build({"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 64, "block_size": 16} | hyper)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    taken, turn, join = [], qkv_grad_quantize, concat_quantize
    monkeypatch.setattr(float8, "concat_quantize", lambda *args: taken.append("joined") or join(*args))
    kind = {True: "turned", False: "normed"}
    monkeypatch.setattr(rope, "qkv_grad_quantize", lambda *args: taken.append(kind[args[3] is None]) or turn(*args))
    monkeypatch.setattr(float8, "MIN_DIM", 4)
    idx, found = torch.randint(64, (1, 16)), []
    for on in (True, False):
        prepare_weights(model, "float8" if on else None, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)[1]
        found.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True))
    assert {kind: taken.count(kind) for kind in taken} == wanted
    for p, a, b in zip(model.parameters(), *found, strict=True):
        if p.ndim == 2 and b.any():  # the interpreter rounds some numbers to half of what they are: see in_8_bits
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.8


# ---- muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 48), (3, 50, 33), (1, 5, 7), (1, 96, 16)])
def test_muons_products_are_symmetric_products(shape, dtype):
    """More tiles than one and parts of tiles, with and without a term to add, of a matrix and of a transposed one."""
    n, rows, cols = shape
    for x in (draw(n, rows, cols, dtype=dtype), draw(n, cols, rows, dtype=dtype).mT):
        exact = torch.stack([a.double() @ a.double().T for a in x])
        got = muon.symmetric_product(x, x)
        check(got, exact, BOUND[dtype])
        assert torch.equal(got, got.mT)
        c = (draw(n, rows, rows, seed=3) + draw(n, rows, rows, seed=3).mT).to(dtype)
        check(muon.symmetric_product(x, -x, c, alpha=2.0, beta=-5.0), -2 * exact - 5 * c.double(), BOUND[dtype])


@pytest.mark.parametrize("shape", [(3, 5), (70, 40)])
def test_muons_momentum_moves_unless_a_gradient_is_not_finite(shape):
    grads, buffers = ([draw(*shape, seed=s + first) for s in range(3)] for first in (0, 3))
    before, found_inf, weight = [b.clone() for b in buffers], torch.zeros(()), torch.tensor(0.1)
    for dtype in DTYPES:
        ahead = muon.move_and_look_ahead(grads, buffers, weight, found_inf, dtype)
        assert ahead.dtype == dtype
        for g, b, old, out in zip(grads, buffers, before, ahead, strict=True):
            new = 0.9 * old.double() + 0.1 * g.double()
            check(b, new, BOUND[torch.float32])
            check(out, 0.9 * new + 0.1 * g.double(), BOUND[dtype])
            b.copy_(old)
    found_inf.fill_(1.0)
    ahead = muon.move_and_look_ahead([g * math.nan for g in grads], buffers, weight, found_inf, torch.float32)
    for b, old, out in zip(buffers, before, ahead, strict=True):
        assert torch.equal(b, old) and torch.equal(out, old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_muons_weights_decay_and_move(dtype):
    params, update = [draw(70, 40, seed=s) for s in range(2)], draw(2, 70, 40, seed=5, dtype=dtype)
    exact = [p.double() for p in params]
    muon.decay_and_add(params, update, torch.tensor(-0.5), torch.tensor(0.25))
    for p, w, u in zip(params, exact, update.double(), strict=True):
        check(p, 0.75 * w - 0.5 * u, BOUND[torch.float32])


def test_muons_step_by_kernels_is_the_plain_one():
    """With all options; float64 has no kernels."""
    about = {"lr": 0.1, "beta2": 0.9, "decay_schedule": "lr"}
    shapes = [(20, 18), (18, 20), (20, 18)]
    start = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    both = []
    for kind in (torch.float32, torch.float64):
        params = [torch.nn.Parameter(p.to(kind, copy=True)) for p in start]
        optimizer = Muon(params, **about, ns_dtype=kind)
        optimizer.found_inf, optimizer.lerp = torch.zeros(()), torch.tensor(0.15, dtype=kind)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.05, dtype=kind)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = draw(*p.shape, seed=100 * step + 50 + i).to(kind)
            optimizer.step()
        both.append(params)
    for p, exact in zip(*both, strict=True):
        check(p.detach(), exact.detach(), 1e-5)

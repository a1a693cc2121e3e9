"""Products in 8 bits, against numbers rounded by hand in float64. On the CPU torch multiplies 8-bit matrices, too, so
that what a GPU does is done here by the same code, slowly."""

import json
import math

import pytest
import torch
from runs import metrics, run, write_config
from torch._dynamo import trace_rules

from model import build
from strawberry.common import UserError
from strawberry.ops import cross_entropy, float8
from strawberry.ops.activations import ACTIVATIONS
from strawberry.ops.cross_entropy import FusedLinearCrossEntropy
from strawberry.ops.float8 import (
    Float8Linear,
    Float8MLP,
    Float8SplitLinear,
    act_quantize,
    quantize_fp8,
    quantize_fp8_dynamic,
)
from strawberry.ops.linear import prepare_weights
from strawberry.training import setup

FORWARD, BACKWARD = (3, -6, 448.0), (2, -14, 57344.0)  # mantissa bits, smallest normal exponent, largest number


@pytest.fixture(autouse=True)
def in_8_bits(monkeypatch):
    """Also for small matrices."""
    monkeypatch.setattr(float8, "MIN_DIM", 4)
    float8.prepare(torch.device("cpu"))


@pytest.fixture
def products(monkeypatch) -> list:
    """Something for each product in 8 bits."""
    trace_rules.get_torch_obj_rule_map()  # torch.compile's table of torch's functions, which is made once
    made, whole = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: made.append(1) or whole(*a, **k))
    return made


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(x: torch.Tensor, scale: float, kind: tuple) -> torch.Tensor:
    """x in float64, as 8 bits hold scale · x: to the nearest, halves to even, cut at the largest number."""
    bits, least, most = kind
    x = x.double() * scale
    exponent = torch.frexp(x).exponent - 1
    step = torch.exp2((exponent.clamp(min=least) - bits).double())
    return ((x / step).round() * step).clamp(-most, most) / scale


def rounded_matrix(w: torch.Tensor) -> torch.Tensor:
    return rounded(w, 2.0 ** -math.ceil(math.log2(w.abs().max().item() / 448)), FORWARD)


def near(got: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    assert got.shape == exact.shape
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < bound, f"relative error {error:.1e}"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float8_e4m3fn, FORWARD), (torch.float8_e5m2, BACKWARD)])
def test_rounding_is_to_the_nearest_and_cuts(dtype, kind):
    x = torch.cat((draw(4000), draw(4000) * 1e-3, draw(100) * 1e6, torch.tensor([0.0, 1e9, -1e9, math.inf])))
    got = quantize_fp8(x.float(), 4.0, dtype)
    assert torch.equal(got.double() / 4, rounded(x.float(), 4.0, kind))
    assert quantize_fp8(torch.tensor([math.nan]), 4.0, dtype).isnan().all()


def test_a_matrix_is_measured():
    for w in (draw(32, 48).float() * 3e-4, draw(32, 48).float() * 1e5, torch.zeros(16, 16)):
        w8, undo = quantize_fp8_dynamic(w)
        assert torch.log2(undo) == torch.log2(undo).round() and w8.float().isfinite().all()
        if w.any():
            near(w8.double() * undo, w.double(), 0.03)
            assert 224 <= w8.float().abs().max() <= 448


def test_a_product_is_that_of_the_rounded_numbers():
    x, w, grad = draw(48, 64).bfloat16(), draw(32, 64, seed=1).float() * 0.02, draw(48, 32, seed=2).bfloat16() * 2**-15
    inputs = x.requires_grad_(), w.requires_grad_()
    y = Float8Linear.apply(*inputs)
    dx, dw = torch.autograd.grad(y, inputs, grad)
    x8, w8, g8 = rounded(x.detach(), 4, FORWARD), rounded_matrix(w.detach()), rounded(grad, 2**20, BACKWARD)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    near(y.detach(), x8 @ w8.T, 3e-3)
    near(dx, g8 @ w8, 3e-3)
    near(dw, g8.T @ x8, 1e-5)
    near(dw, grad.double().T @ x.detach().double(), 0.1)  # and near what they should be


def test_a_joint_product_is_a_product_in_parts():
    x, w = draw(48, 64).bfloat16(), draw(192, 64, seed=1).float() * 0.02
    grad = draw(48, 192, seed=2).bfloat16() * 2**-15
    inputs = x.requires_grad_(), w.requires_grad_()
    whole, parts = Float8Linear.apply(*inputs), Float8SplitLinear.apply(*inputs, 64, 64, 64)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    wanted = torch.autograd.grad(whole, inputs, grad)
    for a, b in zip(torch.autograd.grad(parts, inputs, grad.split(64, dim=1)), wanted, strict=True):
        assert torch.equal(a, b)


FUNCTIONS = {
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "gelu_tanh": lambda h: h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
    "relu": lambda h: h * (h > 0),
    "relu2": lambda h: h * h * (h > 0),
    "swiglu": lambda h: h[:, :32] * h[:, 32:] / (1 + torch.exp(-h[:, 32:])),
}


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_a_feed_forward_is_that_of_the_rounded_numbers(kind, alone, apart):
    hidden, width = (64, 32) if kind == "swiglu" else (64, 64)
    x, w1, w2 = draw(48, 64).bfloat16(), draw(hidden, 64, seed=1).float() / 8, draw(48, width, seed=2).float() / 8
    grad, more = draw(48, 48, seed=3).bfloat16() * 2**-15, draw(48, hidden, seed=4).bfloat16() * 2**-15 * apart
    inputs = x.requires_grad_(), w1.requires_grad_(), w2.requires_grad_()
    y, h = Float8MLP.apply(*inputs, kind, apart, alone)
    assert h.requires_grad == apart
    got = torch.autograd.grad((y, h) if apart else (y,), inputs, (grad, more) if apart else (grad,))
    x8, first, second = rounded(x.detach(), 4, FORWARD), rounded_matrix(w1.detach()), rounded_matrix(w2.detach())
    near(h.detach(), x8 @ first.T, 3e-3)
    seen = h.detach().double().requires_grad_()  # what it rounds to from here on is its own
    y8 = rounded(FUNCTIONS[kind](seen.detach()), 4, FORWARD)
    near(y.detach(), y8 @ second.T, 4e-3)
    g8 = rounded(grad, 2**20, BACKWARD)
    dy = (g8 @ second).bfloat16().double()
    h8 = rounded(torch.autograd.grad(FUNCTIONS[kind](seen), seen, dy)[0] + more.double(), 2**20, BACKWARD)
    for a, b, bound in zip(got, (h8 @ first, h8.T @ x8, g8.T @ y8), (1e-2, 1e-2, 5e-3), strict=True):
        near(a, b, bound)


def test_which_products_are_taken(monkeypatch):
    monkeypatch.setattr(float8, "MIN_DIM", 512)
    x = torch.zeros(2, 24, 768)
    takes = [(3072, 768), (1536, 768)]
    with torch.autocast("cpu", torch.bfloat16):
        assert all(float8.is_eligible(x, torch.zeros(shape)) for shape in takes)
        assert not float8.is_eligible(x, torch.zeros(768, 768))  # what it gains, rounding costs
        assert not float8.is_eligible(x, torch.zeros(3000, 768))  # no multiple of 16
        assert not float8.is_eligible(torch.zeros(1, 9, 768), torch.zeros(3072, 768))
        assert float8.is_eligible(x, torch.zeros(3072, 768), torch.zeros(768, 3072))
        assert not float8.is_eligible(x, torch.zeros(3072, 768), torch.zeros(760, 3072))
        with torch.no_grad():
            assert not float8.is_eligible(x, torch.zeros(3072, 768))
    assert not float8.is_eligible(x, torch.zeros(3072, 768))


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_head_in_8_bits_is_near_the_head(cap, products):
    x, w = draw(160, 64).bfloat16().requires_grad_(), (draw(100, 64, seed=1).float() / 8).requires_grad_()
    targets = torch.arange(160) % 101 - 1
    exact = FusedLinearCrossEntropy.apply(x, w, targets, cap, False)
    assert not products
    got = FusedLinearCrossEntropy.apply(x, w, targets, cap, True)
    assert len(products) == 3
    assert got.item() == pytest.approx(exact.item(), rel=2e-3)
    for a, b in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(exact, (x, w)), strict=True):
        near(a, b.double(), 0.08)


SHAPE = {"vocab_size": 512, "block_size": 32, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_qkv": 64}
ARCHITECTURES = [
    {"arch": "tinystar", "ffn_type": "GELU"}, {"arch": "tinystar", "ffn_type": "SwiGLU"}, {"arch": "strawberry"},
    {"arch": "strawberry", "retention": "none"}, {"arch": "strawberry", "retention_scope": "batch"},
    {"arch": "strawberry", "n_experts": 2, "n_ffn_experts": 2}, {"arch": "strawberry-v0"}, {"arch": "palm"},
    {"arch": "strawberry-silia"}, {"arch": "strawberry", "retention_rule": "delta", "retention_chunk": 16},
]  # fmt: skip

# whole feed-forwards in 8 bits: of causal retention's steps the first alone has one matrix for all tokens
FED = dict(zip(map(json.dumps, ARCHITECTURES), (2, 2, 2, 6, 6, 0, 0, 0, 0, 6), strict=True))


def gradients(model, way) -> tuple[float, torch.Tensor]:
    idx, targets = (torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = way(idx, targets)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("shape, fused", [
    *((shape, False) for shape in ARCHITECTURES), *((shape, True) for shape in ARCHITECTURES[1:3]),
], ids=str)  # fmt: skip
def test_gradients_of_a_model_point_where_they_should(shape, fused, products, monkeypatch):
    bends, bent = [], act_quantize
    monkeypatch.setattr(float8, "act_quantize", lambda h, kind, *a: bends.append(kind) or bent(h, kind, *a))
    monkeypatch.setattr(cross_entropy, "should_fuse", lambda x: fused)
    torch.manual_seed(0)
    model = build({**SHAPE, **shape}).train()
    prepare_weights(model, "float8", model.device)
    loss, eight = gradients(model, model)
    assert products and len(bends) - bends.count("identity") == FED[json.dumps(shape)]
    prepare_weights(model, None, model.device)
    exact, sixteen = gradients(model, model)
    assert loss == pytest.approx(exact, rel=2e-3)
    assert torch.cosine_similarity(eight, sixteen, dim=0) > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    {"arch": "tinystar", "n_layer": 1, "ffn_type": "GELU"}, {"arch": "strawberry", "n_layer": 1, "r_layer": 1},
], ids=str)  # fmt: skip
def test_a_compiler_makes_the_same_of_it_in_one_graph(shape):
    torch.manual_seed(0)
    model = build({**SHAPE, **shape}).train()
    prepare_weights(model, "float8", model.device)
    loss, eager = gradients(model, model)
    again, compiled = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False))
    torch._dynamo.reset()  # these sizes are nothing to later tests
    assert loss == again
    assert torch.equal(eager, compiled)


@pytest.mark.slow
def test_training_in_8_bits(run_folder, capfd):
    write_config(model_hyperparams={"n_embd": 32, "n_qkv": 32})
    assert run("--dtype=float8") == 0
    output = capfd.readouterr()
    assert "float8" in output.out and "no matrix" not in output.err
    eight = [line["loss"] for line in metrics() if "loss" in line]
    assert run("--dtype=bfloat16", "--checkpoints.path=half") == 0
    sixteen = [line["loss"] for line in metrics("half/metrics.jsonl") if "loss" in line]
    assert eight != sixteen and eight == pytest.approx(sixteen, rel=2e-2)


def test_a_model_too_small_for_it_is_reported(run_folder, capfd, monkeypatch):
    monkeypatch.setattr(float8, "MIN_DIM", 512)
    write_config()
    assert run("--dtype=float8", "--max_iters=2") == 0
    output = capfd.readouterr()
    assert 'dtype = "float8": this model has no matrix (m, n) with m · n ≥ 512 · (m + n)' in output.err
    eight = [line["loss"] for line in metrics() if "loss" in line]
    assert run("--dtype=bfloat16", "--max_iters=2", "--checkpoints.path=half") == 0
    assert "float8" not in capfd.readouterr().err
    assert eight == [line["loss"] for line in metrics("half/metrics.jsonl") if "loss" in line]


def test_machines_that_cannot_are_reported(monkeypatch):
    assert setup.choose_dtype("float8", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match='dtype = "float8": mps does not multiply in 8 bits; use "bfloat16"'):
        setup.choose_dtype("float8", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match='NVIDIA A100 does not multiply in 8 bits, .* 8.9 or more; use "bfloat16"'):
        setup.choose_dtype("float8", torch.device("cuda"))


def test_plain_paths_are_the_gradients_of_what_they_are_beside():
    for name in FUNCTIONS:
        f, back = ACTIVATIONS[name]
        h, grad = draw(8, 64).requires_grad_(), draw(8, 32 if name == "swiglu" else 64, seed=1)
        torch.testing.assert_close(back(h.detach(), grad), torch.autograd.grad(f(h), h, grad)[0], msg=name)
        torch.testing.assert_close(f(h.detach()), FUNCTIONS[name](h.detach()), msg=name)

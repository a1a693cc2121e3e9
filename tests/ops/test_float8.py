"""float8 matrix products, against products of numbers rounded in float64. torch._scaled_mm also runs on the CPU, so the
GPU's code is tested here."""

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
def make_small_matrices_eligible(monkeypatch):
    monkeypatch.setattr(float8, "MIN_DIM", 4)
    float8.prepare(torch.device("cpu"))


@pytest.fixture
def scaled_mm_calls(monkeypatch) -> list:
    """One element per call of torch._scaled_mm."""
    trace_rules.get_torch_obj_rule_map()  # torch.compile's table of torch's functions, which is built once
    calls, scaled_mm = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: calls.append(1) or scaled_mm(*a, **k))
    return calls


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def round_fp8(x: torch.Tensor, scale: float, kind: tuple) -> torch.Tensor:
    """scale · x rounded to an FP8 format, to nearest, ties to even, saturating; then divided by scale. float64."""
    bits, least, most = kind
    x = x.double() * scale
    exponent = torch.frexp(x).exponent - 1
    step = torch.exp2((exponent.clamp(min=least) - bits).double())
    return ((x / step).round() * step).clamp(-most, most) / scale


def round_matrix_fp8(w: torch.Tensor) -> torch.Tensor:
    return round_fp8(w, 2.0 ** -math.ceil(math.log2(w.abs().max().item() / 448)), FORWARD)


def check_close(got: torch.Tensor, exact: torch.Tensor, bound: float) -> None:
    assert got.shape == exact.shape
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < bound, f"relative error {error:.1e}"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float8_e4m3fn, FORWARD), (torch.float8_e5m2, BACKWARD)])
def test_quantize_fp8_rounds_to_nearest_and_saturates(dtype, kind):
    x = torch.cat((randn(4000), randn(4000) * 1e-3, randn(100) * 1e6, torch.tensor([0.0, 1e9, -1e9, math.inf])))
    got = quantize_fp8(x.float(), 4.0, dtype)
    assert torch.equal(got.double() / 4, round_fp8(x.float(), 4.0, kind))
    assert quantize_fp8(torch.tensor([math.nan]), 4.0, dtype).isnan().all()


def test_quantize_fp8_dynamic_scales_by_the_largest_element():
    for w in (randn(32, 48).float() * 3e-4, randn(32, 48).float() * 1e5, torch.zeros(16, 16)):
        w8, inverse_scale = quantize_fp8_dynamic(w)
        assert torch.log2(inverse_scale) == torch.log2(inverse_scale).round() and w8.float().isfinite().all()
        if w.any():
            check_close(w8.double() * inverse_scale, w.double(), 0.03)
            assert 224 <= w8.float().abs().max() <= 448


def test_float8_linear_equals_the_product_of_rounded_inputs():
    x, w = randn(48, 64).bfloat16(), randn(32, 64, seed=1).float() * 0.02
    grad = randn(48, 32, seed=2).bfloat16() * 2**-15
    inputs = x.requires_grad_(), w.requires_grad_()
    y = Float8Linear.apply(*inputs)
    dx, dw = torch.autograd.grad(y, inputs, grad)
    x8, w8, g8 = round_fp8(x.detach(), 4, FORWARD), round_matrix_fp8(w.detach()), round_fp8(grad, 2**20, BACKWARD)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    check_close(y.detach(), x8 @ w8.T, 3e-3)
    check_close(dx, g8 @ w8, 3e-3)
    check_close(dw, g8.T @ x8, 1e-5)
    check_close(dw, grad.double().T @ x.detach().double(), 0.1)  # and near the product without rounding


def test_float8_split_linear_equals_float8_linear():
    x, w = randn(48, 64).bfloat16(), randn(192, 64, seed=1).float() * 0.02
    grad = randn(48, 192, seed=2).bfloat16() * 2**-15
    inputs = x.requires_grad_(), w.requires_grad_()
    y, parts = Float8Linear.apply(*inputs), Float8SplitLinear.apply(*inputs, 64, 64, 64)
    assert torch.equal(torch.cat(parts, dim=1), y)
    expected = torch.autograd.grad(y, inputs, grad)
    for a, b in zip(torch.autograd.grad(parts, inputs, grad.split(64, dim=1)), expected, strict=True):
        assert torch.equal(a, b)


FUNCTIONS = {
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "gelu_tanh": lambda h: h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
    "relu": lambda h: h * (h > 0),
    "relu2": lambda h: h * h * (h > 0),
    "swiglu": lambda h: h[:, :32] * h[:, 32:] / (1 + torch.exp(-h[:, 32:])),
}


@pytest.mark.slow
@pytest.mark.parametrize("return_hidden", [False, True])
@pytest.mark.parametrize("input_is_opaque", [False, True])
@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_float8_mlp_equals_products_of_rounded_inputs(kind, input_is_opaque, return_hidden):
    hidden, width = (64, 32) if kind == "swiglu" else (64, 64)
    x, w1, w2 = randn(48, 64).bfloat16(), randn(hidden, 64, seed=1).float() / 8, randn(48, width, seed=2).float() / 8
    grad, grad_h = (randn(48, n, seed=n).bfloat16() * 2**-15 for n in (48, hidden))
    grad_h = grad_h * return_hidden
    inputs = x.requires_grad_(), w1.requires_grad_(), w2.requires_grad_()
    y, h = Float8MLP.apply(*inputs, kind, return_hidden, input_is_opaque)
    assert h.requires_grad == return_hidden
    got = torch.autograd.grad((y, h) if return_hidden else (y,), inputs, (grad, grad_h) if return_hidden else (grad,))
    x8, first, second = round_fp8(x.detach(), 4, FORWARD), round_matrix_fp8(w1.detach()), round_matrix_fp8(w2.detach())
    check_close(h.detach(), x8 @ first.T, 3e-3)
    exact_h = h.detach().double().requires_grad_()  # h as rounded by the code under test
    y8 = round_fp8(FUNCTIONS[kind](exact_h.detach()), 4, FORWARD)
    check_close(y.detach(), y8 @ second.T, 4e-3)
    g8 = round_fp8(grad, 2**20, BACKWARD)
    dy = (g8 @ second).bfloat16().double()
    dh = torch.autograd.grad(FUNCTIONS[kind](exact_h), exact_h, dy)[0] + grad_h.double()
    h8 = round_fp8(dh, 2**20, BACKWARD)
    for a, b, bound in zip(got, (h8 @ first, h8.T @ x8, g8.T @ y8), (1e-2, 1e-2, 5e-3), strict=True):
        check_close(a, b, bound)


def test_is_eligible(monkeypatch):
    monkeypatch.setattr(float8, "MIN_DIM", 512)
    x = torch.zeros(2, 24, 768)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(float8.is_eligible(x, torch.zeros(n, 768)) for n in (3072, 1536))
        assert not float8.is_eligible(x, torch.zeros(768, 768))  # the faster product does not pay for quantization
        assert not float8.is_eligible(x, torch.zeros(3000, 768))  # no multiple of 16
        assert not float8.is_eligible(torch.zeros(1, 9, 768), torch.zeros(3072, 768))
        assert float8.is_eligible(x, torch.zeros(3072, 768), torch.zeros(768, 3072))
        assert not float8.is_eligible(x, torch.zeros(3072, 768), torch.zeros(760, 3072))
        with torch.no_grad():
            assert not float8.is_eligible(x, torch.zeros(3072, 768))
    assert not float8.is_eligible(x, torch.zeros(3072, 768))


@pytest.mark.parametrize("cap", [None, 5.0])
def test_fused_cross_entropy_in_float8_is_near_bfloat16(cap, scaled_mm_calls):
    x, w = randn(160, 64).bfloat16().requires_grad_(), (randn(100, 64, seed=1).float() / 8).requires_grad_()
    targets = torch.arange(160) % 101 - 1
    exact = FusedLinearCrossEntropy.apply(x, w, targets, cap, False)
    assert not scaled_mm_calls
    got = FusedLinearCrossEntropy.apply(x, w, targets, cap, True)
    assert len(scaled_mm_calls) == 3
    assert got.item() == pytest.approx(exact.item(), rel=2e-3)
    for a, b in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(exact, (x, w)), strict=True):
        check_close(a, b.double(), 0.08)


SHAPE = {"vocab_size": 128, "block_size": 32, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_qkv": 32}
ARCHITECTURES = [
    {"arch": "tinystar", "ffn_type": "GELU"}, {"arch": "tinystar", "ffn_type": "SwiGLU"}, {"arch": "strawberry"},
    {"arch": "strawberry", "retention": "none"}, {"arch": "strawberry", "retention_scope": "batch"},
    {"arch": "strawberry", "n_experts": 2, "n_ffn_experts": 2}, {"arch": "strawberry-v0"}, {"arch": "palm"},
    {"arch": "strawberry-silia"}, {"arch": "strawberry", "retention_rule": "delta", "retention_chunk": 16},
]  # fmt: skip

# calls of float8_mlp: of causal retention's steps only the first has one matrix for all tokens
FUSED_MLPS = dict(zip(map(json.dumps, ARCHITECTURES), (2, 2, 2, 6, 6, 0, 0, 0, 0, 6), strict=True))


def loss_and_gradients(model, function) -> tuple[float, torch.Tensor]:
    idx, targets = (torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = function(idx, targets)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("shape, fused", [
    *((shape, False) for shape in ARCHITECTURES), *((shape, True) for shape in ARCHITECTURES[1:3]),
], ids=str)  # fmt: skip
def test_float8_gradients_are_near_those_of_bfloat16(shape, fused, scaled_mm_calls, monkeypatch):
    names = []
    monkeypatch.setattr(float8, "act_quantize", lambda h, name, *a: names.append(name) or act_quantize(h, name, *a))
    monkeypatch.setattr(cross_entropy, "should_fuse", lambda x: fused)
    torch.manual_seed(0)
    model = build({**SHAPE, **shape}).train()
    prepare_weights(model, "float8", model.device)
    loss, grads = loss_and_gradients(model, model)
    assert scaled_mm_calls and len(names) - names.count("identity") == FUSED_MLPS[json.dumps(shape)]
    prepare_weights(model, None, model.device)
    exact_loss, exact_grads = loss_and_gradients(model, model)
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert torch.cosine_similarity(grads, exact_grads, dim=0) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    {"arch": "tinystar", "n_layer": 1, "ffn_type": "GELU"}, {"arch": "strawberry", "n_layer": 1, "r_layer": 1},
], ids=str)  # fmt: skip
def test_float8_model_compiles_as_one_graph_with_equal_gradients(shape):
    torch.manual_seed(0)
    model = build({**SHAPE, **shape}).train()
    prepare_weights(model, "float8", model.device)
    loss, grads = loss_and_gradients(model, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled_loss, compiled_grads = loss_and_gradients(model, compiled)
    torch._dynamo.reset()  # no later test uses these graphs
    assert loss == compiled_loss
    assert torch.equal(grads, compiled_grads)


@pytest.mark.slow
def test_training_in_float8_has_nearly_the_losses_of_bfloat16(run_folder, capfd):
    write_config(model_hyperparams={"n_embd": 32, "n_qkv": 32})
    assert run("--dtype=float8") == 0
    output = capfd.readouterr()
    assert "float8" in output.out and "no matrix" not in output.err
    eight = [line["loss"] for line in metrics() if "loss" in line]
    assert run("--dtype=bfloat16", "--checkpoints.path=half") == 0
    sixteen = [line["loss"] for line in metrics("half/metrics.jsonl") if "loss" in line]
    assert eight != sixteen and eight == pytest.approx(sixteen, rel=2e-2)


def test_model_without_eligible_matrices_warns_and_trains_in_bfloat16(run_folder, capfd, monkeypatch):
    monkeypatch.setattr(float8, "MIN_DIM", 512)
    write_config()
    assert run("--dtype=float8", "--max_iters=2") == 0
    output = capfd.readouterr()
    assert 'dtype = "float8": this model has no matrix (m, n) with m · n ≥ 512 · (m + n)' in output.err
    eight = [line["loss"] for line in metrics() if "loss" in line]
    assert run("--dtype=bfloat16", "--max_iters=2", "--checkpoints.path=half") == 0
    assert "float8" not in capfd.readouterr().err
    assert eight == [line["loss"] for line in metrics("half/metrics.jsonl") if "loss" in line]


def test_devices_without_float8_are_rejected(monkeypatch):
    assert setup.choose_dtype("float8", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match='dtype = "float8": mps does not multiply in 8 bits; use "bfloat16"'):
        setup.choose_dtype("float8", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match='NVIDIA A100 does not multiply in 8 bits, .* 8.9 or more; use "bfloat16"'):
        setup.choose_dtype("float8", torch.device("cuda"))


def test_backward_of_activations_equals_autograd():
    for name in FUNCTIONS:
        f, back = ACTIVATIONS[name]
        h, grad = randn(8, 64).requires_grad_(), randn(8, 32 if name == "swiglu" else 64, seed=1)
        torch.testing.assert_close(back(h.detach(), grad), torch.autograd.grad(f(h), h, grad)[0], msg=name)
        torch.testing.assert_close(f(h.detach()), FUNCTIONS[name](h.detach()), msg=name)

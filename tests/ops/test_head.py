"""FusedLinearCrossEntropy, which computes loss and gradients together, against F.cross_entropy of all logits."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES

import model as models
from model import build
from strawberry.ops import cross_entropy
from strawberry.ops.common import softcap
from strawberry.ops.cross_entropy import FusedLinearCrossEntropy, cross_entropy_fwd_bwd


def make_inputs(N=37, C=6, V=21, dtype=torch.float64):
    torch.manual_seed(0)
    x, w = torch.randn(N, C, dtype=dtype, requires_grad=True), torch.randn(V, C, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[::5] = -1
    return x, w, targets


def reference_loss(x, w, targets, cap):
    return F.cross_entropy(softcap(x @ w.mT, cap), targets, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("V", [21, 24, 64])
@pytest.mark.parametrize("part", [1 << 30, 8 * 64 * 10])
def test_loss_and_gradients_equal_those_of_all_logits_at_once(V, cap, part, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", part)
    x, w, targets = make_inputs(V=V)
    expected = reference_loss(x, w, targets, cap)
    expected_grads = torch.autograd.grad(3 * expected, (x, w))
    got = FusedLinearCrossEntropy.apply(x, w, targets, cap)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(3 * got, (x, w)), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_logits_are_computed_in_parts(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", 8 * 64 * 10)
    shapes = []
    record = lambda logits, *a: shapes.append(logits.shape) or cross_entropy_fwd_bwd(logits, *a)  # noqa: E731
    monkeypatch.setattr(cross_entropy, "cross_entropy_fwd_bwd", record)
    FusedLinearCrossEntropy.apply(*make_inputs(N=37, V=21), None)
    assert [rows for rows, _ in shapes] == [16, 16, 5]
    assert {width for _, width in shapes} == {64}  # padded, since 21 is no multiple of 8


def test_small_logits_are_divided_into_parts_of_16_rows_or_more(monkeypatch):
    """Parts bound the memory of temporary logits; parts of few rows would make the products slow."""
    sizes = []
    record = lambda z, *a: sizes.append(len(z)) or cross_entropy_fwd_bwd(z, *a)  # noqa: E731
    monkeypatch.setattr(cross_entropy, "cross_entropy_fwd_bwd", record)
    monkeypatch.setattr(cross_entropy, "MIN_PART_BYTES", 8 * 64 * 16)
    for N, rows in ((31, [31]), (32, [16, 16]), (160, [32] * 5)):
        sizes.clear()
        FusedLinearCrossEntropy.apply(*make_inputs(N=N, V=64), None)
        assert sizes == rows


def test_loss_and_gradients_are_zero_where_all_targets_are_ignored():
    x, w, targets = make_inputs()
    loss = FusedLinearCrossEntropy.apply(x, w, torch.full_like(targets, -1), None)
    assert loss.item() == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, (x, w)))


def test_bfloat16_is_near_float64():
    x, w, targets = make_inputs(N=64, C=32, V=100)
    expected = torch.autograd.grad(reference_loss(x, w, targets, None), (x, w))
    low = x.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    got = torch.autograd.grad(FusedLinearCrossEntropy.apply(*low, targets, None), low)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_case_trains_with_the_fused_loss(case, monkeypatch):
    torch.manual_seed(0)
    model = build(CASES[case]).double().train()
    V = model.config.vocab_size
    idx, source = torch.randint(V, (2, 32)), torch.randint(V, (2, 8)) if model.takes_source else None
    targets = torch.randint(-1, V, (2, 32))
    results = []
    for fused in (False, True):
        monkeypatch.setattr(cross_entropy, "should_fuse", lambda x, fused=fused: fused)
        torch.manual_seed(1)
        logits, loss = model(idx, targets, source=source)
        assert (logits is None) == fused
        learned = [p for p in model.parameters() if p.requires_grad]
        results.append((loss, *torch.autograd.grad(loss, learned, allow_unused=True)))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_family_with_its_own_head_does_not_fuse_the_loss(monkeypatch):
    class Own(models.TinyStar):
        def head(self, x):
            return super().head(x) * 2

    monkeypatch.setattr(cross_entropy, "should_fuse", lambda x: True)
    monkeypatch.setitem(models.MODELS, "tinystar", Own)
    model = build({"arch": "tinystar", "vocab_size": 50, "block_size": 16, "n_embd": 32}).train()
    idx = torch.randint(50, (2, 16))
    logits, loss = model(idx, idx)
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), idx.flatten()).item(), rel=1e-6)


@pytest.mark.slow
def test_the_fused_loss_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(cross_entropy, "should_fuse", lambda x: True)
    torch.manual_seed(0)
    model = build({"arch": "tinystar", "vocab_size": 50, "block_size": 16, "n_embd": 32}).train()
    idx = torch.randint(50, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(idx, idx)[1]
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(idx, idx)[1]
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)

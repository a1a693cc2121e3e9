"""The head's loss, taken together with its gradients, against torch's cross entropy of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES

import model as models
from model import build
from strawberry.ops import cross_entropy
from strawberry.ops.common import softcap
from strawberry.ops.cross_entropy import FusedLinearCrossEntropy, cross_entropy_fwd_bwd


def inputs(N=37, C=6, V=21, dtype=torch.float64):
    torch.manual_seed(0)
    x, w = torch.randn(N, C, dtype=dtype, requires_grad=True), torch.randn(V, C, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    targets[::5] = -1
    return x, w, targets


def plain(x, w, targets, cap):
    return F.cross_entropy(softcap(x @ w.mT, cap), targets, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("V", [21, 24, 64])
@pytest.mark.parametrize("part", [1 << 30, 8 * 64 * 10])
def test_loss_and_gradients_are_those_of_whole_logits(V, cap, part, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", part)
    x, w, targets = inputs(V=V)
    expected = plain(x, w, targets, cap)
    wanted = torch.autograd.grad(3 * expected, (x, w))
    got = FusedLinearCrossEntropy.apply(x, w, targets, cap)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(3 * got, (x, w)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_logits_exist_in_parts_only(monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS_BYTES", 8 * 64 * 10)
    seen, whole = [], cross_entropy_fwd_bwd
    noted = lambda logits, *a: seen.append(logits.shape) or whole(logits, *a)  # noqa: E731
    monkeypatch.setattr(cross_entropy, "cross_entropy_fwd_bwd", noted)
    FusedLinearCrossEntropy.apply(*inputs(N=37, V=21), None)
    assert [rows for rows, _ in seen] == [16, 16, 5]
    assert {width for _, width in seen} == {64}  # padded, since 21 is no multiple of 8


def test_few_logits_are_divided_too(monkeypatch):
    """So that what comes and goes is small beside what is kept, but no product is."""
    seen, whole = [], cross_entropy_fwd_bwd
    noted = lambda z, *a: seen.append(len(z)) or whole(z, *a)  # noqa: E731
    monkeypatch.setattr(cross_entropy, "cross_entropy_fwd_bwd", noted)
    monkeypatch.setattr(cross_entropy, "MIN_PART_BYTES", 8 * 64 * 16)
    for N, rows in ((31, [31]), (32, [16, 16]), (160, [32] * 5)):
        seen.clear()
        FusedLinearCrossEntropy.apply(*inputs(N=N, V=64), None)
        assert seen == rows


def test_targets_that_are_all_ignored_cost_nothing():
    x, w, targets = inputs()
    loss = FusedLinearCrossEntropy.apply(x, w, torch.full_like(targets, -1), None)
    assert loss.item() == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, (x, w)))


def test_bfloat16_is_near_float64():
    x, w, targets = inputs(N=64, C=32, V=100)
    expected = torch.autograd.grad(plain(x, w, targets, None), (x, w))
    low = x.detach().bfloat16().requires_grad_(), w.detach().float().requires_grad_()
    got = torch.autograd.grad(FusedLinearCrossEntropy.apply(*low, targets, None), low)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_family_trains_through_it(case, monkeypatch):
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


def test_a_head_of_a_family_s_own_is_left_alone(monkeypatch):
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
def test_it_is_compiled_as_one_graph(monkeypatch):
    monkeypatch.setattr(cross_entropy, "should_fuse", lambda x: True)
    torch.manual_seed(0)
    model = build({"arch": "tinystar", "vocab_size": 50, "block_size": 16, "n_embd": 32}).train()
    idx = torch.randint(50, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(idx, idx)[1]
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(idx, idx)[1]
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)

"""The optimizer: groups, schedule, Muon against torch's own, and a state that comes back bit for bit."""

import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import optimizer as optimizer_module
from optimizer import (
    HIDDEN,
    JORDAN,
    AdamW,
    Muon,
    build_optimizer,
    lr_at,
    map_by_gram,
    momentum_at,
    newton_schulz,
)
from strawberry.common import UserError
from strawberry.run_config import OptimizerHyperparams


class Small(nn.Module):
    """Two hidden matrices of one shape and one of the transposed shape, a tied embedding, and the small ones."""

    def __init__(self, roles=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.a = nn.Parameter(torch.randn(8, 6))
        self.b = nn.Parameter(torch.randn(8, 6))
        self.c = nn.Parameter(torch.randn(6, 8))
        self.router = nn.Parameter(torch.randn(6, 2))
        self.scale = nn.Parameter(torch.ones(6))
        self.unembed = nn.Linear(6, 11, bias=False)
        self.unembed.weight = self.embed.weight
        names = {"embed.weight": "embedding", "a": "matrix", "b": "matrix", "c": "residual"}
        self._roles = names | {"router": "router", "scale": "norm"} if roles is None else roles

    def roles(self):
        return self._roles

    def loss(self, step):
        x = self.embed(torch.arange(11).roll(step)) * self.scale
        hidden = (torch.tanh(x @ self.a.T) + torch.sin(x @ self.b.T)) @ self.c.T * (x @ self.router).sum(-1, True)
        return self.unembed(hidden).square().mean()


def hyper(**changes):
    return OptimizerHyperparams(**changes)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.set_lr(1 / (1 + step))
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_muon", [False, True])
def test_every_parameter_is_in_exactly_one_group(use_muon):
    model = Small()
    optimizer = build_optimizer(model, hyper(use_muon=use_muon), 1e-3, "cpu")
    members = [id(p) for part in optimizer.parts.values() for group in part.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert sum(row["parameters"] for row in optimizer.groups) == sum(p.numel() for p in model.parameters())
    assert sum(row["tensors"] for row in optimizer.groups) == len(list(model.parameters()))


@pytest.mark.parametrize("use_muon", [False, True])
def test_decay_is_on_matrices_and_embeddings_only_and_muon_on_hidden_matrices_only(use_muon):
    optimizer = build_optimizer(Small(), hyper(use_muon=use_muon, weight_decay=0.3, muon_lr=0.02), 1e-3, "cpu")
    for row in optimizer.groups:
        assert row["weight_decay"] == (0.3 if row["role"] in ("matrix", "residual", "embedding") else 0.0), row
        muon = use_muon and row["role"] in HIDDEN
        assert (row["optimizer"], row["lr"]) == (("muon", 0.02) if muon else ("adamw", 1e-3)), row
    for part in optimizer.parts.values():
        for group in part.param_groups:
            assert all((group["weight_decay"] > 0) == (p.ndim == 2 and p.shape[1] != 2) for p in group["params"])
    assert [line.split()[0] for line in optimizer.table().splitlines()] == [
        "role", "matrix", "residual", "embedding", "router", "norm"
    ]  # fmt: skip


def test_a_hidden_tensor_that_is_no_matrix_belongs_to_adamw():
    model = nn.Module()
    model.experts, model.w = nn.Parameter(torch.zeros(2, 3, 4)), nn.Parameter(torch.zeros(3, 4))
    model.roles = lambda: {"experts": "matrix", "w": "matrix"}
    optimizer = build_optimizer(model, hyper(use_muon=True), 1e-3, "cpu")
    assert {(row["optimizer"], row["parameters"]) for row in optimizer.groups} == {("adamw", 24), ("muon", 12)}
    assert optimizer.parts["adamw"].param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "leaves out: a"),
        ({"ghost": "norm"}, "no parameter: ghost"),
        ({"a": "matrixx"}, "unknown roles: a: matrixx"),
        ({"unembed.weight": "head"}, "twice: embed.weight = unembed.weight"),
    ],
)
def test_roles_that_are_not_the_parameters_are_named(change, message):
    roles = {name: role for name, role in (Small().roles() | change).items() if role}
    with pytest.raises(RuntimeError, match=message):
        build_optimizer(Small(roles), hyper(), 1e-3, "cpu")


def test_a_tied_parameter_may_be_named_either_way():
    roles = Small().roles()
    roles["unembed.weight"] = roles.pop("embed.weight")
    assert "embedding" in build_optimizer(Small(roles), hyper(), 1e-3, "cpu").table()


def test_adamw_is_the_formula():
    """Three steps of one matrix and one vector in double-precision scalars, as in arXiv 1711.05101."""
    model = Small()
    optimizer = build_optimizer(model, hyper(eps=1e-8), 0.01, "cpu")
    watched = [(model.a, 0.1), (model.scale, 0.0)]
    w, m, v = [p.item() for p in (model.a[2, 3], model.scale[4])], [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 4):
        train(model, optimizer, [t - 1])
        lr = 0.01 / t
        for i, (p, decay) in enumerate(watched):
            g = (p.grad[2, 3] if p.ndim == 2 else p.grad[4]).item()
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            w[i] -= lr * decay * w[i]
            w[i] -= lr * m[i] / (1 - 0.9**t) / (math.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
    assert [p.item() for p in (model.a[2, 3], model.scale[4])] == pytest.approx(w, abs=1e-6)


# ---- learning rate ---------------------------------------------------------------------------------------------------


def schedule(**changes):
    values = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 4, "lr_decay_iters": 20, "decay_lr": True}
    return SimpleNamespace(**values | {"cooldown_frac": 0.5} | changes)


def test_learning_rate_warms_up_stays_cools_down_and_stays_low():
    run = schedule()
    assert [lr_at(step, run) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(lr_at(step, run) == 1.0 for step in range(4, 11))
    assert lr_at(15, run) == pytest.approx(0.55)  # half way down
    assert lr_at(11, run) == pytest.approx(0.1 + 0.9 * (1 + math.cos(0.1 * math.pi)) / 2)
    assert [lr_at(step, run) for step in (20, 21, 10**6)] == [0.1, 0.1, 0.1]
    falling = [lr_at(step, run) for step in range(10, 21)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == 11


def test_cooldown_of_the_whole_run_is_the_classic_warmup_and_cosine():
    run = schedule(cooldown_frac=1)
    for step in range(4, 20):
        classic = 0.1 + 0.5 * (1.0 + math.cos(math.pi * (step - 4) / (20 - 4))) * 0.9
        assert lr_at(step, run) == pytest.approx(classic), step


def test_without_decay_the_rate_is_constant_after_the_warmup():
    assert [lr_at(step, schedule(decay_lr=False)) for step in (4, 12, 20, 500)] == [1.0] * 4


@pytest.mark.parametrize("changes", [{"warmup_iters": 30}, {"cooldown_frac": 0}, {"warmup_iters": 20}])
def test_no_room_for_a_cooldown_is_a_drop_and_no_error(changes):
    run = schedule(**changes)
    start = max(run.warmup_iters, 20)
    assert [lr_at(start - 1, run) > 0.9, lr_at(start, run)] == [True, 0.1]


def test_no_warmup_starts_at_the_full_rate():
    assert lr_at(0, schedule(warmup_iters=0)) == 1.0


def test_every_group_follows_the_schedule_in_its_own_ratio():
    optimizer = build_optimizer(Small(), hyper(use_muon=True, muon_lr=0.02), 0.001, "cpu")
    optimizer.set_lr(0.5)
    optimizer.set_lr(0.25)
    assert {g["lr"] for g in optimizer.parts["adamw"].param_groups} == {0.00025}
    assert {g["lr"] for g in optimizer.parts["muon"].param_groups} == {0.005}


# ---- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5, 9), (2, 9, 5), (1, 7, 7)])
def test_newton_schulz_is_the_quintic_on_the_singular_values(shape):
    torch.manual_seed(1)
    stack = torch.randn(shape, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e5])[: shape[0], None, None]
    for matrix, result in zip(stack, newton_schulz(stack), strict=True):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(result, u @ torch.diag(s) @ vt, atol=1e-10, rtol=0)


def test_newton_schulz_makes_matrices_orthogonal():
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(4, 16, 16))[0] for _ in range(2))
    stack = left @ torch.diag_embed(torch.linspace(0.1, 1.0, 16).expand(4, 16)) @ right
    for dtype, low, high in [(torch.float32, 0.67, 1.14), (torch.bfloat16, 0.65, 1.16)]:
        result = newton_schulz(stack.to(dtype)).float()
        assert torch.linalg.svdvals(result).min() > low and torch.linalg.svdvals(result).max() < high
        along = torch.diagonal(left.mT @ result @ right.mT, dim1=1, dim2=2)  # the same singular vectors, the same signs
        assert along.min() > low
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_muon_is_torchs_muon_once_the_momentum_is_warm(shape):
    torch.manual_seed(3)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    mine = Muon([ours], **settings, warmup=0, ns_dtype=torch.bfloat16)  # torch's always uses bfloat16
    reference = torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for _ in range(6):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).abs().max().item()
    assert moved > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5 * moved, rtol=0)
    torch.testing.assert_close(mine.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def test_muon_is_the_formula_through_the_warmup():
    """Scalar momentum, loops and an SVD: nothing that Muon itself uses."""
    torch.manual_seed(4)
    w = torch.randn(5, 3, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    muon = Muon([p], lr=0.1, weight_decay=0.2, momentum=0.95, warmup=4, ns_dtype=torch.float64)
    m = torch.zeros(5, 3, dtype=torch.float64)
    for mu in [0.85, 0.875, 0.9, 0.925, 0.95, 0.95]:
        p.grad = torch.randn(5, 3, dtype=torch.float64)
        assert momentum_at(muon.param_groups[0]) == pytest.approx(mu)
        for i in range(5):
            for j in range(3):
                m[i, j] = mu * m[i, j] + (1 - mu) * p.grad[i, j]
        u, s, vt = torch.linalg.svd(mu * m + (1 - mu) * p.grad, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        w = (1 - 0.1 * 0.2) * w - 0.1 * 0.2 * math.sqrt(5) * u @ torch.diag(s) @ vt
        muon.step()
        torch.testing.assert_close(p.detach(), w, atol=1e-10, rtol=0)


def test_momentum_warms_up_over_300_steps_by_default_and_a_small_momentum_is_kept():
    group = Muon([nn.Parameter(torch.zeros(2, 2))], momentum=0.95).param_groups[0]
    assert [momentum_at(group | {"step": s}) for s in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert momentum_at(group | {"momentum": 0.5, "step": 0}) == 0.5


def test_orthogonalizing_a_stack_equals_orthogonalizing_each_matrix():
    torch.manual_seed(5)
    together = [nn.Parameter(torch.randn(8, 6)) for _ in range(3)] + [nn.Parameter(torch.randn(6, 8))]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together), *(Muon([p]) for p in alone)]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_a_parameter_without_a_gradient_is_unchanged():
    used, unused = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    used.grad = torch.ones(3, 4)
    Muon([used, unused]).step()
    assert torch.equal(unused, torch.ones(3, 4)) and not torch.equal(used, torch.ones(3, 4))


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


# ---- options ---------------------------------------------------------------------------------------------------------

ALL = {"use_muon": True, "muon_lr": 0.02, "muon_beta2": 0.9,
       "weight_decay_schedule": "lr", "embedding_lr": 0.03, "head_lr": 0.004, "scalar_lr": 0.05}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 16)])
def test_wide_matrices_by_their_gram_matrix_are_the_polynomials(shape, monkeypatch):
    monkeypatch.setattr(optimizer_module, "MIN_GRAM_ROWS", 16)
    torch.manual_seed(10)
    left, right = (torch.linalg.qr(torch.randn(2, side, 16, dtype=torch.float64))[0] for side in shape[1:])
    for lowest in (1e-4, 1e-2, 0.5):
        spectrum = torch.logspace(math.log10(lowest), 0, 16, dtype=torch.float64)
        stack = left @ torch.diag_embed(spectrum.expand(2, 16)) @ right.mT
        exact = torch.stack([orthogonal(matrix) for matrix in stack])
        wide = (stack if shape[1] < shape[2] else stack.mT) / spectrum.norm()
        by_gram = map_by_gram(wide)
        torch.testing.assert_close(by_gram if shape[1] < shape[2] else by_gram.mT, exact, atol=1e-9, rtol=0)
        got = newton_schulz((1e-6 * stack).bfloat16())  # too small for float16 before the division
        plain = wide.bfloat16()
        for a, b, c in JORDAN:
            gram = plain @ plain.mT
            plain = a * plain + (b * gram + c * gram @ gram) @ plain
        plain = plain if shape[1] < shape[2] else plain.mT
        off = [(x.double() - exact).norm().item() for x in (got, plain)]
        assert got.dtype == torch.bfloat16 and off[0] < 1.2 * off[1]


def orthogonal(matrix):
    """newton_schulz by an SVD."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for a, b, c in JORDAN:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("schedule", ["constant", "lr"])
@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_muon_with_its_options_is_the_formulas(beta2, schedule):
    """Loops over scalars, and an SVD: NorMuon (arXiv 2510.05491, Algorithm 1, which sets the norm to that of an
    orthogonal matrix, where ours keeps it), and the schedule of weight decay."""
    torch.manual_seed(8)
    w = torch.randn(4, 3, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    muon = Muon([p], lr=0.1, weight_decay=0.2, warmup=0, ns_dtype=torch.float64, beta2=beta2,
                decay_schedule=schedule)  # fmt: skip
    m, v = torch.zeros(4, 3, dtype=torch.float64), [0.0] * 4
    for lr in (0.1, 0.05, 0.08):
        muon.param_groups[0]["lr"] = lr
        p.grad = torch.randn(4, 3, dtype=torch.float64) * torch.tensor([[1.0], [10.0], [0.1], [0.0]])
        m = 0.95 * m + 0.05 * p.grad
        u = orthogonal(0.95 * m + 0.05 * p.grad)
        if beta2:
            norm = u.norm()
            for i in range(4):
                v[i] = beta2 * v[i] + (1 - beta2) * sum(x * x for x in u[i].tolist()) / 3
                u[i] /= math.sqrt(max(v[i], 1e-10))
            u *= norm / u.norm()
        rate = lr * 0.2 * (lr / 0.1 if schedule == "lr" else 1)
        for i in range(4):
            for j in range(3):
                w[i, j] -= rate * w[i, j] + lr * 0.2 * 2 * u[i, j]
        muon.step()
        torch.testing.assert_close(p.detach(), w, atol=1e-10, rtol=0)


def test_adamw_with_scheduled_decay_is_the_formulas():
    """Scalars, with gradients that the fused kernel scales in passing, as on a GPU."""
    torch.manual_seed(9)
    w = torch.randn(9, dtype=torch.float64)
    p, m, v = nn.Parameter(w.clone()), [0.0] * 9, [0.0] * 9
    group = {"params": [p], "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.3}
    adamw = AdamW([group], betas=(0.9, 0.95), eps=1e-8, fused=True)
    for t, lr in enumerate((0.1, 0.05, 0.08), 1):
        adamw.param_groups[0]["lr"] = lr
        p.grad = torch.randn(9, dtype=torch.float64)
        adamw.grad_scale = torch.tensor(2.0)
        rate = lr * 0.3 * lr / 0.1
        for i, g in enumerate((p.grad / 2).tolist()):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g
            w[i] -= rate * w[i]
            w[i] -= lr * m[i] / (1 - 0.9**t) / (math.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
        adamw.step()
        torch.testing.assert_close(p.detach(), w, atol=1e-6, rtol=0)
        assert adamw.param_groups[0]["weight_decay"] == 0.3


def test_scheduled_decay_at_the_peak_rate_is_torchs():
    ours, theirs = (nn.Parameter(torch.arange(-3.0, 4.0)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.3, "fused": True}
    optimizers = (AdamW([{"params": [ours], "base_lr": 0.1}], **settings), torch.optim.AdamW([theirs], **settings))
    for _ in range(3):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.sin(p.detach())
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_each_group_has_its_own_rate():
    roles = {"embed.weight": "input", "a": "matrix", "b": "head", "c": "position", "router": "router", "scale": "norm"}
    about = hyper(use_muon=True, muon_lr=0.02, embedding_lr=0.03, head_lr=0.004, scalar_lr=0.05)
    optimizer = build_optimizer(Small(roles), about, 1e-3, "cpu")
    rates = {row["role"]: row["lr"] for row in optimizer.groups}
    assert rates == {"input": 0.03, "matrix": 0.02, "head": 0.004, "position": 1e-3, "router": 1e-3, "norm": 0.05}
    optimizer.set_lr(0.5)
    assert {g["lr"] / g["base_lr"] for part in optimizer.parts.values() for g in part.param_groups} == {0.5}


def test_a_step_skipped_on_the_device_changes_nothing_and_others_equal_the_hosts():
    """With all options, as a CUDA graph has it: learning rates and the decision are tensors."""
    host, device = Small(), Small()
    optimizers = [build_optimizer(model, hyper(**ALL), 0.01, "cpu") for model in (host, device)]
    found_inf = torch.ones(())
    optimizers[1].to_device(found_inf)
    for step in range(4):
        for model, optimizer in zip((host, device), optimizers, strict=True):
            optimizer.set_lr(1 / (1 + step))
            optimizer.count(0) if model is device else None
            optimizer.zero_grad()
            model.loss(step).backward()
        good = [p.grad.clone() for p in device.parameters()]
        before = copy.deepcopy([device.state_dict(), optimizers[1].state_dict()["state"]])
        for p in device.parameters():
            p.grad.fill_(math.nan)
        found_inf.fill_(1.0)
        optimizers[1].step()
        optimizers[1].count(-1)
        after = [device.state_dict(), optimizers[1].state_dict()["state"]]
        assert all(torch.equal(before[0][name], after[0][name]) for name in after[0])
        for name, state in before[1].items():
            assert all(torch.equal(t, after[1][name][key]) for key, t in state.items()), name
        for p, grad in zip(device.parameters(), good, strict=True):
            p.grad.copy_(grad)
        found_inf.fill_(0.0)
        optimizers[1].count(0)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("then", "now"), [({}, ALL), (ALL, {"use_muon": True})])
def test_a_run_resumes_with_other_optimizer_options(then, now):
    model = Small()
    saved = build_optimizer(model, hyper(**{"use_muon": True} | then), 0.01, "cpu")
    train(model, saved, range(2))
    state = copy.deepcopy(saved.state_dict())
    optimizer = build_optimizer(model, hyper(**now), 0.01, "cpu")
    optimizer.load_state_dict(state)
    before = model.a.detach().clone()
    train(model, optimizer, range(2, 4))
    assert torch.isfinite(model.a).all() and not torch.equal(model.a, before)


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_muon": True}, ALL])
def test_the_optimizer_state_is_restored_bit_for_bit(options):
    whole, settings = Small(), (hyper(**options), 0.01, "cpu")
    optimizer = build_optimizer(whole, *settings)
    train(whole, optimizer, range(5))  # inside the momentum's warmup
    weights, file = copy.deepcopy(whole.state_dict()), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    train(whole, optimizer, range(5, 10))

    resumed = Small()
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, *settings)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, again, range(5, 10))

    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    first, second = optimizer.state_dict(), again.state_dict()
    assert (first["kinds"], first["muon_step"]) == (second["kinds"], second["muon_step"])
    assert first["muon_step"] == (10 if options else 0)
    assert ("row_moment" in first["state"]["a"]) == ("muon_beta2" in options)
    for name, state in first["state"].items():
        assert state.keys() == second["state"][name].keys() != set()
        assert all(torch.equal(state[key], second["state"][name][key]) for key in state), name


def test_a_resumed_run_follows_its_own_settings():
    saved = build_optimizer(Small(), hyper(), 0.01, "cpu").state_dict()
    optimizer = build_optimizer(Small(), hyper(weight_decay=0.5), 0.07, "cpu")
    optimizer.load_state_dict(saved)
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.parts["adamw"].param_groups} == {(0.07, 0.5), (0.07, 0.0)}


def test_the_state_of_another_model_is_refused_by_name():
    model = Small()
    optimizer = build_optimizer(model, hyper(use_muon=True), 0.01, "cpu")
    train(model, optimizer, range(1))
    good = optimizer.state_dict()

    def refused(saved, message, use_muon=True):
        other = build_optimizer(Small(), hyper(use_muon=use_muon), 0.01, "cpu")
        with pytest.raises(UserError, match=message):
            other.load_state_dict(saved)
        assert not any(other.state_dict()["state"].values())

    refused(good, "a was trained with muon and would continue with adamw", use_muon=False)
    refused({"anything": 1}, "not one that this program wrote")
    renamed = copy.deepcopy(good)
    renamed["kinds"]["ghost"] = "adamw"
    refused(renamed, "ghost")
    reshaped = copy.deepcopy(good)
    reshaped["state"]["c"]["momentum_buffer"] = torch.zeros(6, 7)
    refused(reshaped, r"of c has shape \(6, 7\), the parameter \(6, 8\)")


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_muon", [False, True])
@pytest.mark.parametrize("fused_clipping", [False, True])
def test_clipping_is_torchs(use_muon, fused_clipping):
    """Done in a pass of its own or by AdamW in passing, as on a GPU; and none is left over for a step that has none."""
    runs = []
    for ours in (True, False):
        torch.manual_seed(1)
        model = Small()
        optimizer = build_optimizer(model, hyper(use_muon=use_muon, eps=1e-2), 1e-2, "cpu")
        optimizer._fused_clipping = fused_clipping
        for step, limit in enumerate((0.01, 1e9, 0.02, 0, None)):
            optimizer.zero_grad()
            model.loss(step).backward()
            grads = [p.grad for p in model.parameters()]
            if limit is not None and ours:
                optimizer.clip(nn.utils.get_total_norm(grads), limit)
            elif limit:
                nn.utils.clip_grad_norm_(list(model.parameters()), limit)
            optimizer.step()
            if limit in (0.01, 0.02):
                assert nn.utils.get_total_norm(grads).item() == pytest.approx(limit, rel=1e-3)
        runs.append([p.detach() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

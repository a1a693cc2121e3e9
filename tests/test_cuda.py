"""What only a GPU can show: bfloat16 training, compiled. `pytest --cuda`."""

import copy
from types import SimpleNamespace

import pytest
import torch
from decoding import SMALL as TINY
from decoding import collect, every_model, requests_for, small_model, wishful_requests
from ports import free_port

from model import AFTS, build
from strawberry.cache import LayerCache
from strawberry.context import ForwardContext
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import quantize_model
from strawberry.inference.step import compile_step
from strawberry.ops import cross_entropy, float8, memory
from strawberry.ops.activations import ACTIVATIONS
from strawberry.ops.aft import aft_simple
from strawberry.ops.attention import flex_sliding_window, sdpa
from strawberry.ops.float8 import (
    act_quantize,
    act_quantize_backward,
    concat_quantize,
    quantize_fp8,
    transpose_fp8,
)
from strawberry.ops.fused_linear import NO_NORM, Norm, fused_linear, fused_linear_plain
from strawberry.ops.linear import prepare_weights, quantize_int8
from strawberry.ops.masks import AttentionPattern
from strawberry.ops.qkv import no_transform
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton import memory_step, rope
from strawberry.ops.triton.rope import can_fuse_rope, fused_qk_rope_norm, qkv_grad_quantize
from strawberry.run_config import load_run
from strawberry.training import cuda_graph, plot
from strawberry.training.signals import Signals
from strawberry.training.step import TrainStep

pytestmark = pytest.mark.cuda
eight_bits = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="has no 8 bits")  # fmt: skip

SMALL = {"vocab_size": 64, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
MODELS = [
    {},
    {"retention": "none"},
    {"retention_rule": "delta", "retention_chunk": 16},
    {"n_experts": 2},
    {"arch": "strawberry-silia"},
    {"arch": "strawberry-v0"},
    {"arch": "palm"},
    {"arch": "tinystar"},
    {"arch": "transformer", "kind": "decoder"},
]


@pytest.mark.parametrize("hyper", MODELS, ids=str)
def test_compiled_bfloat16_agrees_with_float32_on_the_cpu(hyper):
    torch.manual_seed(0)
    model = build(SMALL | hyper)
    idx = torch.randint(64, (4, 64))
    expected = model(idx, idx)[1].item()
    model.cuda()
    forward = torch.compile(model, dynamic=False)
    with torch.autocast("cuda", torch.bfloat16):
        loss = forward(idx.cuda(), idx.cuda())[1]
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("hyper", MODELS, ids=str)
def test_the_cache_equals_the_full_pass_on_a_gpu(hyper):
    torch.manual_seed(0)
    model = build(SMALL | hyper).cuda().eval()
    idx = torch.randint(64, (2, 50), device="cuda")
    cache = model.new_cache(2, 50)
    parts = [model(part, cache=cache)[0] for part in idx.split([20, 1, 29], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx)[0], rtol=0, atol=1e-3)


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_captured_steps_make_the_texts_that_the_cpu_makes(name, dtype):
    model = small_model(name).to(dtype)
    requests = requests_for(model, 9)
    expected = collect(Decoder(model, 3, 64), requests)
    model.cuda()
    for rows in (1, 3, 8):
        assert collect(Decoder(model, rows, 64), requests) == expected


@every_model
@pytest.mark.parametrize("fuse", [False, True])
def test_compiled_steps_make_the_texts_that_the_cpu_makes(name, fuse):
    model = small_model(name).float()
    requests = requests_for(model, 5)
    expected = collect(Decoder(model, 4, 64), requests)
    assert collect(Decoder(model.cuda(), 4, 64, compile=True, fuse=fuse), requests) == expected


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("K, widths, norm, activation", [
    (768, [768, 768, 768], "layer", "identity"), (768, [3072], "layer", "gelu"), (3072, [768], "none", "identity"),
    (768, [4096], "rms", "swiglu"), (768, [50304], "rms", "identity"), (100, [33, 7], "rms", "relu2"),
])  # fmt: skip
def test_fused_linear_by_its_kernel(K, widths, norm, activation, int8):
    """Near the plain version in float64, and each row's bits are the same in any company."""
    torch.manual_seed(0)
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, weights = torch.randn(64, K, **bf16), [torch.randn(n, K, **bf16) * K**-0.5 for n in widths]
    scales = []
    if int8:
        weights, scales = zip(*map(quantize_int8, weights), strict=True)
    biases, gain, shift = [torch.randn(n, **bf16) for n in widths], torch.randn(K, **bf16), torch.randn(K, **bf16)
    norm = {"none": NO_NORM, "rms": Norm("rms", gain, None, 1e-6), "layer": Norm("layer", gain, shift, 1e-5)}[norm]
    residual = torch.randn(64, sum(widths) // (2 if activation == "swiglu" else 1), **bf16)
    args = (weights, scales, biases, norm, activation)
    exact = fused_linear_plain(x.double(), *args, residual)
    assert relative(fused_linear(x, *args, residual), exact) < 6e-3
    y = fused_linear(x[:16], *args, residual[:16])
    assert relative(y, exact[:16]) < 4e-3
    for rows in (slice(0, 1), slice(5, 7), slice(4, 16)):
        assert torch.equal(fused_linear(x[rows], *args, residual[rows]), y[rows])


def test_penalties_in_a_cuda_graph_are_those_of_a_cpu():
    """Rows of all settings, before and after others that ask for nothing; in float64, so that no rounding decides."""
    model = small_model("tinystar")
    requests, plain = wishful_requests(model), requests_for(model, 5)
    expected = collect(Decoder(model, 3, 64), [*plain, *requests, *plain])
    decoder = Decoder(model.cuda(), 3, 64)
    assert collect(decoder, [*plain, *requests, *plain]) == expected
    graphs = decoder.device_step.launch.__self__.graphs
    assert {filters.processes for _, _, filters in graphs} == {True, False}


def test_a_step_is_one_launch():
    """Under the profiler: a step replays one graph and launches no kernel of its own."""
    decoder = Decoder(build(TINY | {"arch": "tinystar"}).cuda().eval(), 2, 200)
    for request in requests_for(decoder.model, 2):
        request.max_new_tokens, request.stop = 150, frozenset()
        decoder.admit(request)
    for _ in range(10):
        decoder.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(20):
            decoder.step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["cudaGraphLaunch"] == 20
    assert counts.get("cudaLaunchKernel", 0) == 0 and counts.get("cudaMalloc", 0) == 0


@pytest.mark.parametrize("name", ["tinystar", "tinystar, latent", "palm", "strawberry, adaptive", "strawberry-silia"])
def test_eight_bits_are_near_sixteen(name):
    model = small_model(name).float().cuda()
    idx = torch.randint(31, (2, 50), device="cuda")
    exact = model(idx, idx)[1].item()
    assert quantize_model(model)(idx, idx)[1].item() == pytest.approx(exact, rel=0.05)
    collect(Decoder(model, 2, 64), requests_for(model, 4))


# ---- AFT and windows by kernels --------------------------------------------------------------------------------------


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def mix_twice(mix, shape: tuple[int, ...], keys: float, dtype: torch.dtype) -> list[tuple]:
    """Result and gradients by the kernel, each beside those of the plain path in float64."""
    torch.manual_seed(0)
    q, k, v, slope = (torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    k = k.sign() * keys if keys > 1 else k
    at, results = ForwardContext(torch.arange(shape[1], device="cuda")[None]), []
    for mixer, kind in [(mix, dtype), (copy.deepcopy(mix).double(), torch.float64)]:
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        y = mixer(*inputs, inputs[0], at, None)
        results.append([y, *torch.autograd.grad(y, [*inputs, *mixer.parameters()], slope.to(kind))])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("keys, shape", [
    (80, (1, 65536, 40)), (1, (1, 65536, 40)), (1, (3, 1027, 100)), (1, (40, 300, 768)),
])  # fmt: skip
def test_aft_simple_by_its_kernel(shape, keys, dtype, bound):
    mix = AFTS["simple"](SimpleNamespace(n_qkv=shape[-1], n_head=2), no_transform)
    for got, exact in mix_twice(mix, shape, keys, dtype):
        assert got.dtype == dtype and relative(got, exact) < bound


@pytest.mark.parametrize("kind", ["conv", "local", "full"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_aft_with_positions_by_its_kernel(kind, dtype, bound):
    mix = AFTS[kind](SimpleNamespace(n_qkv=48, n_head=2, window=300, block_size=1100), no_transform).cuda()
    for p in mix.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for got, exact in mix_twice(mix, (2, 1030, 48), 1, dtype):
        assert relative(got, exact) < bound


def test_aft_gives_the_same_bits_each_time():
    """Also where programs wait for each other: which of them is first must not matter."""
    q, k, v = (torch.randn(2, 20000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(5):
        y = aft_simple(q, k, v, ForwardContext(torch.arange(q.size(1), device="cuda")[None]))
        runs.append([y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("windows, kv_heads", [((100, 100, 400, 13), 4), ((200,), 2), ((130,), 1)])
@pytest.mark.parametrize("T", [1024, 1000])
@pytest.mark.parametrize(("d", "dtype", "bound"), [(32, torch.float32, 2e-3), (64, torch.bfloat16, 1e-2)])
def test_blocks_are_windows_on_a_gpu(T, windows, kv_heads, d, dtype, bound):
    """FlexAttention, compiled, and its gradients beside a mask in float64; heads of 64 in half types have own tiles."""
    torch.manual_seed(0)
    about = {"device": "cuda", "dtype": dtype}
    q, k, v = (torch.randn(2, T, n, d, **about, requires_grad=True) for n in (4, kv_heads, kv_heads))
    at, slope = ForwardContext(torch.arange(T, device="cuda")[None]), torch.randn(2, T, 4, d, **about)
    patterns = [AttentionPattern(w) for w in windows * (4 // len(windows))]
    mask = torch.cat([pattern.mask(at.positions, at.positions) for pattern in patterns], dim=1)
    torch._dynamo.reset()
    by_blocks = torch.compile(
        lambda *qkv: flex_sliding_window(*qkv, windows, ForwardContext(at.positions), scale=0.2), fullgraph=True)
    y = by_blocks(q, k, v)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = sdpa(*exact, mask, scale=0.2)
    assert relative(y, expected) < bound  # TF32 or not
    for got, its in zip(torch.autograd.grad(y, (q, k, v), slope), torch.autograd.grad(expected, exact, slope.double())):
        assert relative(got, its) < bound


# ---- the linear memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("d", [24, 64, 128])
def test_a_memory_is_its_recurrence(d, dtype, bound):
    """o, the last state and every gradient, by kernels and, for heads of 128 in float32, without."""
    torch.manual_seed(0)
    z, v, grad = (torch.randn(2, n, 3, d, device="cuda").to(dtype) for n in (301, 300, 300))
    inputs = memory.unit(z), v, -torch.rand(2, 300, 3, device="cuda") / 8, torch.rand(2, 300, 3, device="cuda")
    found = []
    for cast in (torch.clone, torch.Tensor.double):
        z, v, *gates = (cast(x).requires_grad_() for x in inputs)
        o, last = memory.read_memory(z[:, 1:], z[:, :-1], v, *gates, size=64)
        found.append((o, last, *torch.autograd.grad(o, (z, v, *gates), cast(grad))))
    for got, exact in zip(*found, strict=True):
        assert relative(got, exact) < bound


def memory_cache(B: int, H: int, d: int, dtype: torch.dtype) -> LayerCache:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return LayerCache(B, "cuda", state=((H, d, d), 0.0, exact), tail=((4, H * d), 0.0, dtype))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("H", "d"), [(12, 64), (3, 24), (5, 128), (1, 6)])
def test_memory_steps_by_their_kernel(H, d, dtype, bound):
    """200 tokens, near the plain version in float64. Some rows have no token at some steps, and some tokens are frozen.
    A row is bit for bit the same whatever the other rows contain."""
    torch.manual_seed(0)
    B, T, M, on_gpu = 5, 200, H * d, {"device": "cuda"}
    z, v, gates = torch.randn(B, T, 2 * M + 3 * H, **on_gpu).to(dtype).split((M, M, 3 * H), dim=-1)
    weights = torch.randn(3 * H, **on_gpu).to(dtype), torch.randn(4, M, **on_gpu).to(dtype)
    valid, active = torch.rand(2, T, B, 1, **on_gpu) < 0.9

    def run(rows: slice, kind: torch.dtype):
        cache, outputs = memory_cache(len(z[rows]), H, d, kind), []
        for t in range(T):
            ctx = ForwardContext(torch.zeros(1, 1, **on_gpu), lengths=valid[t, rows, 0].long(), active=active[t, rows])
            with torch.no_grad():
                token = (x[rows, t : t + 1].to(kind) for x in (z, v, gates))
                outputs.append(memory.delta_memory(*token, *(w.to(kind) for w in weights), 64, ctx, cache))
        return torch.cat(outputs, dim=1), cache.state, cache.tail

    everyone, exact = run(slice(0, B), dtype), run(slice(0, B), torch.float64)
    assert everyone[0].dtype == dtype and everyone[1].dtype == torch.float32
    assert relative(everyone[0], exact[0]) < bound and relative(everyone[1], exact[1]) < 1e-5
    assert torch.equal(everyone[2].double(), exact[2])
    for b in (0, B - 1):
        for alone, together in zip(run(slice(b, b + 1), dtype), everyone, strict=True):
            assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize(("dtype", "passes", "bound"), [
    (torch.float32, {}, 2e-5), (torch.float32, {"recursions": 2, "adaptive": True}, 2e-5), (torch.bfloat16, {}, 1e-3),
], ids=["float32", "frozen tokens", "bfloat16"])  # fmt: skip
def test_compiled_steps_of_a_memory_are_as_near_to_float64_as_plain_ones(dtype, passes, bound, monkeypatch):
    """Logits of 20 tokens with the fused backend."""
    torch.manual_seed(0)
    hyper = SMALL | {"retention_rule": "delta", "memory_head": 16, "r_layer": 1} | passes
    model = build(hyper).to("cuda", dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    idx, launches, found = torch.randint(64, (3, 30), device="cuda"), [], []
    can_fuse, fused_step = memory_step.can_fuse_step, memory_step.fused_step
    monkeypatch.setattr(memory_step, "fused_step", lambda *inputs: launches.append(1) or fused_step(*inputs))
    for m, by_kernel in ((copy.deepcopy(model).double(), False), (model, True), (model, False)):
        monkeypatch.setattr(memory_step, "can_fuse_step", can_fuse if by_kernel else lambda *inputs: False)
        torch._dynamo.reset()
        launches.clear()
        step, cache, logits = compile_step(m.decode_step, 3, fuse=True), m.new_cache(3, 64), []
        with torch.inference_mode():
            m.logits_after(idx[:, :10], cache)
            for t in range(10, 30):
                logits.append(step(idx[:, t], cache, 64).double())
                cache.advance([1] * 3)
        assert bool(launches) == by_kernel
        found.append(torch.stack(logits))
    errors = [relative(got, found[0]) for got in found[1:]]
    assert errors[0] < 1.2 * errors[1] + bound, errors


# ---- queries and keys by their kernel --------------------------------------------------------------------------------

TURNING = [
    {"window": 128, "r_layer": 2},
    {"window": 128, "n_experts": 2, "retention": "none"},
    {"arch": "tinystar", "attention_type": "GQA", "n_kv_head": 2},
    {"arch": "transformer", "kind": "decoder", "attention_type": "MHA", "pos_encoding": "RoPE"},
]


@pytest.mark.parametrize("hyper", TURNING, ids=str)
def test_gradients_of_fused_rope_are_the_plain_ones(hyper, monkeypatch):
    """Compiled, in bfloat16: as near to float64 as those without the kernel."""
    torch.manual_seed(0)
    model = build({"vocab_size": 64, "block_size": 512, "n_layer": 2, "n_head": 4, "n_embd": 128} | hyper).cuda()
    idx, plain = torch.randint(64, (4, 512), device="cuda"), copy.deepcopy(model).double()
    can_fuse, fused, errors, calls = can_fuse_rope, fused_qk_rope_norm, [], []
    monkeypatch.setattr(rope, "fused_qk_rope_norm", lambda *args, **rest: calls.append(1) or fused(*args, **rest))
    exact = gradients(plain, plain, idx)
    assert not calls
    for by_kernel in (True, False):
        monkeypatch.setattr(rope, "can_fuse_rope", can_fuse if by_kernel else lambda *args: False)
        calls.clear()
        torch._dynamo.reset()
        with torch.autocast("cuda", torch.bfloat16):
            got = gradients(model, torch.compile(model, dynamic=False), idx)
        assert bool(calls) == by_kernel
        errors.append(relative(got, exact))
    assert errors[0] < 1.2 * errors[1] + 1e-3, errors


def gradients_of(model: torch.nn.Module, call, idx: torch.Tensor) -> list[torch.Tensor]:
    """Of the loss by all weights."""
    call(idx, idx)[1].backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def gradients(model: torch.nn.Module, call, idx: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients_of(model, call, idx)])


# ---- whole training -------------------------------------------------------------------------------------------------


def words_of(folder, monkeypatch, config: str = "air.json", **keys) -> list[str]:
    """The command line of a short run on a small corpus, both in `folder`, which is then the working directory."""
    import numpy as np

    import encoder as encoders
    from strawberry.data.token_file import TokenFileWriter

    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz .")
    with TokenFileWriter("data.bin", encoders.load("chars:text.txt")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 28, 20000))
    words = {"dataset.path": "data.bin", "encoder_path": "chars:text.txt", "device": "cuda", "seed": 1, "max_iters": 12,
             "warmup_iters": 2, "log_interval": 4, "eval_interval": 100, "eval_iters": 2, "sample_length": 0,
             "compile": "false", "model_hyperparams.vocab_size": 64} | keys  # fmt: skip
    return ["--config", config, *(f"--{key}={value}" for key, value in words.items())]


def trainer_of(folder, monkeypatch, config: str = "air.json", **keys):
    """A trainer on the GPU, ready to train."""
    from model import CONFIGS
    from train import Trainer

    trainer = Trainer(load_run(words_of(folder, monkeypatch, config, **keys), CONFIGS), Signals())
    trainer.prepare()
    return trainer


MUON = {"optimizer_hyperparams.use_muon": "true"}
MUON_OPTIONS = MUON | {f"optimizer_hyperparams.{key}": value for key, value in {
    "muon_beta2": 0.95, "weight_decay_schedule": "lr",
    "scalar_lr": 1e-2,
}.items()}  # fmt: skip


@pytest.mark.parametrize("keys", [
    {}, MUON | {"dtype": "float32", "gradient_accumulation_steps": 3}, MUON_OPTIONS | {"dtype": "float32"},
    {"model_hyperparams.n_experts": 2, "model_hyperparams.dropout": 0.1},
], ids=str)  # fmt: skip
def test_captured_training_is_training(tmp_path, monkeypatch, keys):
    """One graph does what the host's steps do: the same losses, the same weights."""

    weights, losses = [], []
    for graph in ("auto", "false"):
        (tmp_path / graph).mkdir()
        trainer = trainer_of(tmp_path / graph, monkeypatch, cuda_graph=graph, **keys)
        assert bool(trainer.graph_step) == (graph == "auto")
        trainer.train()
        trainer.close()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append([line["loss"] for line in plot.read_metrics(trainer.metrics.path) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert (weights[0] - weights[1]).norm() / weights[1].norm() < 1e-2


def test_a_captured_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):

    trainer = trainer_of(tmp_path, monkeypatch, log_interval=100)
    take, before = cuda_graph.CudaGraphStep.launch, []

    def set_weight_to_nan(self, batches, step, lr):
        if step == 7:
            with torch.no_grad():
                trainer.model.embed.weight[3, 1] = torch.nan
            before[:] = [p.clone() for p in trainer.model.parameters()]
        take(self, batches, step, lr)

    monkeypatch.setattr(cuda_graph.CudaGraphStep, "launch", set_weight_to_nan)
    with pytest.raises(cuda_graph.NonFinite, match="step 7"):
        trainer.train()
    assert trainer.progress.step == 6
    for p, then in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p.nan_to_num(), then.nan_to_num())


def test_what_cannot_be_captured_leaves_everything_usable(tmp_path, monkeypatch, capsys):

    accumulate = TrainStep.accumulate

    def waits(self, batches):
        loss = accumulate(self, batches)
        loss.item()  # the host may not wait in a recording
        return loss

    monkeypatch.setattr(TrainStep, "accumulate", waits)
    trainer = trainer_of(tmp_path, monkeypatch, **{"model_hyperparams.dropout": 0.1})
    assert trainer.graph_step is None and "cannot be captured as a CUDA graph" in capsys.readouterr().err
    trainer.train()
    assert trainer.progress.step == 12 and torch.rand(3, device="cuda").isfinite().all()


@pytest.mark.parametrize("arch", [{}, {"arch": "palm"}, {"arch": "tinystar"}, {"logit_softcap": 5.0}], ids=str)
def test_the_fused_head_is_the_plain_one(arch, monkeypatch):

    torch.manual_seed(0)
    net = build(SMALL | {"vocab_size": 61} | arch).cuda().train()
    idx = torch.randint(61, (4, 64), device="cuda")
    found = []
    for fused in (True, False):
        monkeypatch.setattr(cross_entropy, "should_fuse", lambda x, fused=fused: fused)
        loss = net(idx, idx)[1]
        learned = [p for p in net.parameters() if p.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, learned, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@eight_bits
@pytest.mark.parametrize(("config", "hyper"), [
    ("tinystar-v0.1-baseline.json", {"norm_type": "RMSNorm", "n_layer": 2, "block_size": 64}),
    ("tinystar-v0.2-modernbase.json", {"n_layer": 2, "block_size": 64}),
    ("air.json", {"retention": "none"}), ("air.json", {"retention_scope": "batch"}),
], ids=str)  # fmt: skip
def test_training_in_8_bits_is_training(tmp_path, monkeypatch, config, hyper):
    """The same losses as in bfloat16, where steps are captured."""

    monkeypatch.setattr(float8, "MIN_DIM", 16)
    keys = {f"model_hyperparams.{key}": value for key, value in hyper.items()}
    losses = []
    for dtype in ("float8", "bfloat16"):
        (tmp_path / dtype).mkdir()
        trainer = trainer_of(tmp_path / dtype, monkeypatch, config, dtype=dtype, **keys)
        trainer.train()
        trainer.close()
        losses.append([line["loss"] for line in plot.read_metrics(trainer.metrics.path) if "loss" in line])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def directions(hyper: dict, device: str, backend: str) -> dict[str, float]:
    """The cosine of each matrix's gradient in 8 bits with that in bfloat16, compiled, where no matrix is zero."""
    torch.manual_seed(0)
    model = build({"vocab_size": 64, "block_size": 512, "n_layer": 2, "n_head": 4, "n_embd": 128} | hyper).to(device)
    for p in model.parameters():
        if not p.any():  # as projections start, which nothing behind them then has a gradient through
            torch.nn.init.normal_(p, std=0.1)
    idx, found = torch.randint(64, (4, 512), device=device), []
    for on in (True, False):
        prepare_weights(model, "float8" if on else None, torch.device(device))
        torch._dynamo.reset()
        with torch.autocast(device, torch.bfloat16):
            found.append(gradients_of(model, torch.compile(model, dynamic=False, backend=backend), idx))
    names = (name for name, _ in model.named_parameters())
    return {name: torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
            for name, a, b in zip(names, *found, strict=True) if a.ndim == 2 and b.any()}  # fmt: skip


@eight_bits
@pytest.mark.parametrize("hyper", [*TURNING, {"arch": "tinystar", "pos_encoding": "Learned"}], ids=str)
def test_gradients_in_8_bits_point_where_those_in_bfloat16_do(hyper, monkeypatch):
    monkeypatch.setattr(float8, "MIN_DIM", 4)
    found = directions(hyper, "cuda", "inductor")
    assert min(found.values()) > 0.95, found


@eight_bits
def test_concatenated_float8_gradients_are_those_of_the_plain_path_on_a_gpu(monkeypatch):
    wide = torch.randn(1000, 2304, device="cuda").bfloat16()
    parts = wide[:, :768], torch.randn(1000, 256, device="cuda").bfloat16(), wide[:, 1536:]
    got, transposed = concat_quantize(parts, 4.0, torch.float8_e5m2)
    monkeypatch.setattr(kernels, "can_run", lambda *tensors: False)
    exact, _ = concat_quantize(parts, 4.0, torch.float8_e5m2)
    assert torch.equal(got.view(torch.uint8), exact.view(torch.uint8))
    assert torch.equal(got.view(torch.uint8).t(), transposed.view(torch.uint8))


@eight_bits
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("d", [16, 64, 128, 256])
def test_gradients_of_fused_rope_are_those_of_the_wider_kernel_on_a_gpu(d, normed):
    B, T, n_q, n_k = 2, 301, 4 * d, d
    wide, qkv = (torch.randn(B, T, n_q + 2 * n_k, device="cuda").bfloat16() for _ in range(2))
    grads = wide[..., :n_q], torch.randn(B, T, n_k, device="cuda").bfloat16(), wide[..., n_q + n_k :]
    angle = torch.randn(1, T, 1, d // 2, device="cuda")
    about = (*grads, qkv if normed else None, angle.cos(), angle.sin())
    got, transposed = qkv_grad_quantize(*about, 4.0, torch.float8_e5m2)
    exact = torch.ops.strawberry.qk_rope_norm_backward(*(x if x is None else x.float() for x in about)).flatten(0, 1)
    exact = quantize_fp8(exact, 4.0, torch.float8_e5m2)
    assert torch.equal(got.view(torch.uint8).t(), transposed.view(torch.uint8))
    assert (got.float() != exact.float()).float().mean() < 2e-3


@eight_bits
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bytes_are_those_of_the_plain_path_on_a_gpu(kind, dtype, monkeypatch):
    width = 192 * (2 if kind == "swiglu" else 1)
    h, grad, more = (torch.randn(1000, n, device="cuda").bfloat16() for n in (width, 192, width))
    found = [act_quantize(h, kind, 4.0, dtype), act_quantize_backward(h, grad, kind, 4.0, dtype),
             act_quantize_backward(h, grad, kind, 4.0, dtype, more)]  # fmt: skip
    flipped = transpose_fp8(found[0][0])
    monkeypatch.setattr(kernels, "can_run", lambda *tensors: False)
    wanted = [act_quantize(h, kind, 4.0, dtype), act_quantize_backward(h, grad, kind, 4.0, dtype),
              act_quantize_backward(h, grad, kind, 4.0, dtype, more)]  # fmt: skip
    assert torch.equal(flipped.view(torch.uint8), found[0][1].view(torch.uint8))
    for (got, transposed), (exact, _) in zip(found, wanted, strict=True):
        assert torch.equal(got.view(torch.uint8).t(), transposed.view(torch.uint8))
        assert (got.float() != exact.float()).float().mean() < 1e-3


# ---- several GPUs ----------------------------------------------------------------------------------------------------


def train_on_two(folder, monkeypatch, **keys) -> tuple[list[dict], str]:
    """(metrics.jsonl, what was said) of a run on two GPUs."""
    import subprocess
    import sys
    from pathlib import Path

    folder.mkdir()
    words = words_of(folder, monkeypatch, **keys)
    script = Path(__file__).parent.parent / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return plot.read_metrics(folder / "checkpoints" / "metrics.jsonl"), ended.stdout + ended.stderr


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.parametrize("keys", [
    {"compile": "true"}, {"model_hyperparams.dropout": 0.1, "eval_interval": 5},
    {"parallel": "fsdp"}, {"parallel": "fsdp"} | MUON, {"parallel": "fsdp"} | MUON_OPTIONS,
    {"dtype": "float32", "gradient_accumulation_steps": 3} | MUON, {"dtype": "float32"} | MUON_OPTIONS,
], ids=str)  # fmt: skip
def test_captured_training_on_two_gpus_is_training(tmp_path, monkeypatch, keys):
    # a few steps: Muon's options amplify the last bit, in which two runs differ, to 3 % of the norm of step 12
    keys = {"checkpoints.path": "checkpoints", "batch_size": 8, "max_iters": 8} | keys
    runs = [train_on_two(tmp_path / graph, monkeypatch, cuda_graph=graph, **keys) for graph in ("true", "false")]
    for what in ("loss", "val_loss", "grad_norm"):
        captured, called = ([line[what] for line in lines if what in line] for lines, _ in runs)
        assert captured and captured == pytest.approx(called, rel=2e-3 if what != "grad_norm" else 2e-2)
    assert not any("cannot be captured" in output for _, output in runs)


def start_ranks(words: list[str], log: str) -> list:
    """A process of train.py for each of two GPUs, as torchrun would start them, but without torchrun, which ends all
    once one has ended. Rank r's output is in <log><r>.txt."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
           "PYTHONFAULTHANDLER": "1"}  # fmt: skip
    script, processes = Path(__file__).parent.parent / "train.py", []
    for rank in "01":
        with open(f"{log}{rank}.txt", "w") as file:
            own = os.environ | env | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen([sys.executable, str(script), *words], stdout=file, stderr=file, env=own))
    return processes


@two_gpus
@pytest.mark.parametrize("keys", [{}, {"cuda_graph": "false"}, {"parallel": "fsdp"}], ids=str)
def test_a_rank_killed_under_nccl_ends_the_other_and_the_run_resumes(tmp_path, monkeypatch, keys):
    import contextlib
    import signal
    import subprocess
    import time
    from pathlib import Path

    keys = {"checkpoints.path": "checkpoints", "checkpoints.interval": 50, "batch_size": 8, "cuda_graph": "true",
            "max_iters": 10**6, "log_interval": 20} | keys  # fmt: skip
    processes = start_ranks(words_of(tmp_path, monkeypatch, **keys), "log")
    try:
        metrics, end = Path("checkpoints/metrics.jsonl"), time.monotonic() + 200
        while not metrics.exists() or not any(line["step"] >= 400 for line in plot.read_metrics(metrics)):  # replays
            output = Path("log0.txt").read_text()
            assert time.monotonic() < end and processes[0].poll() is None, output
            time.sleep(0.1)
        assert "cannot be captured" not in Path("log0.txt").read_text()
        processes[1].kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(30)
        if processes[0].poll() is None:
            processes[0].send_signal(signal.SIGABRT)  # the log then says where it waits
            processes[0].wait(30)
        assert processes[0].returncode == 4, Path("log0.txt").read_text()
    finally:
        for process in processes:
            process.kill()
    output = Path("log0.txt").read_text()
    assert "another process of this run has ended" in output and "--init_from=resume" in output
    reached = max(int(path.name.split("_")[1]) for path in Path("checkpoints").glob("step_*"))
    assert reached >= 350  # of the last checkpoint before it
    resumed = words_of(tmp_path, monkeypatch, **keys | {"max_iters": reached + 40, "init_from": "resume"})
    processes = start_ranks(resumed, "resumed")
    assert [process.wait(200) for process in processes] == [0, 0], Path("resumed0.txt").read_text()
    assert plot.read_metrics(metrics)[-1]["step"] == reached + 40

"""What only a GPU can show: bfloat16 training, compiled. `pytest --cuda`."""

import pytest
import torch
from test_decode import SMALL as TINY
from test_decode import collect, every_model, made, requests_for

from decode import Decoder, quantize
from model import build

pytestmark = pytest.mark.cuda

SMALL = {"vocab_size": 64, "block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64}
MODELS = [
    {},
    {"retention": "none"},
    {"n_experts": 2},
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
def test_recorded_steps_make_the_texts_that_the_cpu_makes(name, dtype):
    model = made(name).to(dtype)
    requests = requests_for(model, 9)
    expected = collect(Decoder(model, 3, 64), requests)
    model.cuda()
    for rows in (1, 3, 8):
        assert collect(Decoder(model, rows, 64), requests) == expected


@every_model
def test_compiled_steps_make_the_texts_that_the_cpu_makes(name):
    model = made(name).float()
    requests = requests_for(model, 5)
    expected = collect(Decoder(model, 4, 64), requests)
    assert collect(Decoder(model.cuda(), 4, 64, compile=True), requests) == expected


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


@pytest.mark.parametrize("name", ["tinystar", "tinystar, latent", "palm", "strawberry, adaptive"])
def test_eight_bits_are_near_sixteen(name):
    model = made(name).float().cuda()
    idx = torch.randint(31, (2, 50), device="cuda")
    exact = model(idx, idx)[1].item()
    assert quantize(model)(idx, idx)[1].item() == pytest.approx(exact, rel=0.05)
    collect(Decoder(model, 2, 64), requests_for(model, 4))

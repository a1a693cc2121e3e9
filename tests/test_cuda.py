"""What only a GPU can show: bfloat16 training, compiled. `pytest --cuda`."""

import pytest
import torch

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

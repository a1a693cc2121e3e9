"""The linear memory in chunks, against its recurrence token by token; its gradients."""

from dataclasses import replace

import pytest
import torch

from model import build
from strawberry.ops.memory import read_memory, unit

torch.set_num_threads(1)


def make_inputs(T: int, d: int = 6, e: int = 5, B: int = 2, H: int = 3) -> list[torch.Tensor]:
    """q, k, v, log_decay, beta."""
    generator = torch.Generator().manual_seed(T)
    shapes = ((B, T, H, d), (B, T, H, d), (B, T, H, e), (B, T, H), (B, T, H))
    q, k, v, decay, beta = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return [unit(q), unit(k), v, -decay.abs(), beta.sigmoid()]


def naive_recurrence(q, k, v, log_decay, beta, state):
    """The formula, one token, row and head at a time."""
    B, T, H, _ = q.shape
    o, state = torch.zeros_like(v), state.clone()
    for b in range(B):
        for h in range(H):
            for t in range(T):
                S = log_decay[b, t, h].exp() * state[b, h]
                state[b, h] = S + beta[b, t, h] * torch.outer(k[b, t, h], v[b, t, h] - S.T @ k[b, t, h])
                o[b, t, h] = state[b, h].T @ q[b, t, h]
    return o, state


@pytest.mark.parametrize("size", [1, 4, 7, 16, 64])
def test_chunks_compute_the_recurrence(size):
    inputs, state = make_inputs(37), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = naive_recurrence(*inputs, state)
    for got, exact in zip(read_memory(*inputs, size=size, state=state), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    empty = naive_recurrence(*inputs, torch.zeros_like(state))
    for got, exact in zip(read_memory(*inputs, size=size), empty, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


def test_tokens_with_zero_gates_do_not_change_the_state():
    """log α = β = 0, as frozen tokens and padding have."""
    q, k, v, log_decay, beta = make_inputs(9)
    beta[:, 3:6] = log_decay[:, 3:6] = 0
    last = read_memory(q, k, v, log_decay, beta, size=4)[1]
    rest = [torch.cat((x[:, :3], x[:, 6:]), dim=1) for x in (q, k, v, log_decay, beta)]
    torch.testing.assert_close(last, read_memory(*rest, size=4)[1], rtol=0, atol=1e-12)


def test_read_memory_passes_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(7, 2, 3, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: read_memory(*x, size=3)[0], inputs)


@pytest.mark.parametrize("decay", [0.0, -1e-4, -30.0])
def test_equal_keys_and_extreme_decays_in_float32(decay):
    """The same key at every token, β = 1: float32 is within 1e-4 of float64, relative to the largest element."""
    q, k, v, _, _ = make_inputs(256, B=1, H=1)
    k, log_decay, beta = k[:, :1].expand_as(k), torch.full((1, 256, 1), decay).double(), torch.ones(1, 256, 1).double()
    exact = naive_recurrence(q, k, v, log_decay, beta, torch.zeros(1, 1, 6, 5, dtype=torch.float64))[0]
    got = read_memory(*(x.float() for x in (q, k, v, log_decay, beta)), size=64)[0]
    assert (got.double() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_dropout_applies_to_the_memory_output():
    """The block's steps add zero, so its output is that of the memory, which is zero at the first token."""
    keys = {"n_embd": 8, "n_qkv": 8, "n_head": 2, "n_layer": 1, "r_layer": 1, "vocab_size": 11, "block_size": 16}
    model = build({"arch": "strawberry", "retention_rule": "delta", "dropout": 0.5, **keys}).double()
    block = model.blocks[0]
    with torch.no_grad():
        block.w_attn_out.zero_()
        block.memory.out.normal_()
    x, ctx = torch.randn(2, 16, 8, dtype=torch.float64), model.make_context(torch.zeros(2, 16, dtype=torch.int64))
    ctx = replace(ctx, rope=model.rope(ctx.positions))
    full, dropped = ((block.train(training)(x, ctx, None) - x).detach()[:, 1:] for training in (False, True))
    nonzero = dropped != 0
    assert 0.3 < nonzero.double().mean() < 0.7 and full.abs().min() > 0
    torch.testing.assert_close(dropped[nonzero], 2 * full[nonzero])

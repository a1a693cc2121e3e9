"""int8_linear on a CPU, with PyTorch's kernel and without, against the product of dequantized weights."""

import pytest
import torch

from strawberry.ops.linear import int8_linear, quantize_int8


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("M, N, K", [(1, 7, 64), (3, 64, 128), (64, 5, 64), (65, 7, 64), (2, 6, 24), (1, 3, 13)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_linear_equals_the_dequantized_product(dtype, M, N, K, biased):
    torch.manual_seed(0)
    w, scale = quantize_int8(torch.randn(N, K))
    x, bias = torch.randn(M, 1, K).to(dtype), torch.randn(N).to(dtype) if biased else None
    expected = x.double() @ (w.double() * scale.double().unsqueeze(1)).T + (bias.double() if biased else 0)
    got = int8_linear(x, w, scale, bias)
    assert got.shape == expected.shape and got.dtype == dtype
    tolerance = expected.abs().max() * (2**-7 if dtype == torch.bfloat16 else 1e-6)  # rounded after product and scale
    assert (got.double() - expected).abs().max() <= tolerance


def test_int8_kernel_is_called_only_for_widths_that_it_supports(monkeypatch):
    """PyTorch's kernel reads whole vectors: other widths would crash it."""
    calls = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(args[1].size(1)) or kernel(*args))
    for width, dtype in ((64, torch.bfloat16), (32, torch.bfloat16), (13, torch.bfloat16), (64, torch.float32)):
        int8_linear(torch.ones(1, width, dtype=dtype), torch.ones(3, width, dtype=torch.int8), torch.ones(3))
    assert calls == [64]

"""Linear maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops.triton import common as kernels


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """w (N, K) as int8 with a float32 scale (N,) for each output channel, symmetric, rounded to nearest: the error of a
    weight is at most half a scale. A row of zeros has scale 1.

    >>> quantize_int8(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
    (tensor([[127, -64], [0, 0]], dtype=torch.int8), tensor([0.0079, 1.0000]))
    """
    w = w.detach().float()
    largest = w.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (w / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x @ wᵀ) · scale + bias for x (…, K), w (N, K) int8, scale (N,) float32, bias (N,). Returns (…, N) in x's dtype.

    int8 is exact in bfloat16, sums are float32. Up to 64 rows of x a kernel reads w once: N·K bytes, the floor. More
    rows are limited by arithmetic, and go through PyTorch's matrix product.
    """
    rows = x.numel() // x.size(-1)
    if rows > 64 or not kernels.can_run(x, w):
        y = F.linear(x, w.to(x.dtype)) * scale
        return (y if bias is None else y + bias).to(x.dtype)
    return torch.ops.strawberry.int8_linear(x.reshape(rows, -1), w, scale, bias).view(*x.shape[:-1], -1)

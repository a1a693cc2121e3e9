"""Linear maps and embeddings, int8 weights, and the precision of a model's products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strawberry.ops import float8
from strawberry.ops.common import to_autocast_dtype
from strawberry.ops.triton import common as kernels


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize w (N, K) to int8 with a float32 scale (N,) per output channel: symmetric, rounded to nearest, so the
    error of a weight is at most half a scale. A row of zeros has scale 1.

    >>> [t.tolist() for t in quantize_int8(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))]
    [[[127, -64], [0, 0]], [0.007874015718698502, 1.0]]
    """
    w = w.detach().float()
    largest = w.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (w / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x @ wᵀ) · scale + bias for x (…, K), w (N, K) int8, scale (N,) float32, bias (N,). Returns (…, N) in x's dtype.

    int8 values are exact in bfloat16; sums are float32. For up to 64 rows of x, a kernel reads w once: N·K bytes, the
    minimum; on a CPU it is PyTorch's, for x in bfloat16 only. More rows are compute-bound and use PyTorch's matrix
    product.
    """
    rows = x.numel() // x.size(-1)
    if rows <= 64 and can_use_cpu_kernel(x, w):
        one = torch.ones(len(w), dtype=x.dtype)  # the scale is float32, which this kernel does not take
        y = torch._weight_int8pack_mm(x.reshape(rows, -1), w, one).view(*x.shape[:-1], -1) * scale
        return (y if bias is None else y + bias).to(x.dtype)
    if rows > 64 or not kernels.can_run(x, w):
        y = F.linear(x, w.to(x.dtype)) * scale
        return (y if bias is None else y + bias).to(x.dtype)
    return torch.ops.strawberry.int8_linear(x.reshape(rows, -1), w, scale, bias).view(*x.shape[:-1], -1)


def can_use_cpu_kernel(x: Tensor, w: Tensor) -> bool:
    """Whether PyTorch's product of bfloat16 and int8 on a CPU takes them: it reads whole vectors of w's rows."""
    return x.dtype == torch.bfloat16 and w.size(1) % 64 == 0 and x.device.type == "cpu" and not kernels.can_run(x, w)


class Int8Weight(NamedTuple):
    """A matrix (out, in) in int8, with a float32 scale for each row; see `quantize_int8`."""

    w: Tensor  # int8
    scale: Tensor  # (out,)

    def size(self, axis: int) -> int:
        return self.w.size(axis)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.w[index] * self.scale[index].unsqueeze(-1)).to(dtype)


def linear(x: Tensor, w: Tensor | Int8Weight, bias: Tensor | None = None, precision: str | None = None) -> Tensor:
    """x Wᵀ (+ b), W (out, in); with precision "float8", in FP8 where it is eligible."""
    if bias is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return linear(x, w) + bias  # Inductor fuses the sum with later operations, and with a product of one row
    if precision == "float8" and float8.is_eligible(x, w):
        y = float8.Float8Linear.apply(to_autocast_dtype(x).flatten(0, -2), w).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias.to(y.dtype)
    return int8_linear(x, w.w, w.scale, bias) if isinstance(w, Int8Weight) else F.linear(x, w, bias)


def embedding(idx: Tensor, w: Tensor | Int8Weight, dtype: torch.dtype) -> Tensor:
    """Table lookup, (B, T) int64 → (B, T, C); `dtype` is the result's dtype for an int8 table."""
    return w.rows(idx, dtype) if isinstance(w, Int8Weight) else F.embedding(idx, w)


def prepare_weights(model: nn.Module, precision: str | None, device: torch.device) -> None:
    """Set the precision of a model's matrix products in training: "float8" uses FP8 for eligible products, None uses
    autocast's dtype. Modules that own matrices store it as `precision` and pass it to the operations."""
    if precision == "float8":
        float8.prepare(device)
    for module in model.modules():
        if hasattr(module, "precision"):
            module.precision = precision

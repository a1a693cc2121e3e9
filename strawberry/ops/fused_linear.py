"""A norm, linear maps, an activation and a residual sum as one operation, for the few rows of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops.activations import ACTIVATIONS
from strawberry.ops.common import to_accum_dtype
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.fused_linear import MAX_GEMV_ROWS, MAX_WEIGHTS

MAX_ROWS = 64  # with more, a matrix product is bound by arithmetic, not by reading W


class Norm(NamedTuple):
    """A norm over the last axis: "rms" (arXiv 1910.07467), "layer" (arXiv 1607.06450) or "none"."""

    kind: str = "none"
    gain: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0


NO_NORM = Norm()


def fused_linear(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] = (), biases: Sequence[Tensor] = (),
    norm: Norm = NO_NORM, activation: str = "identity", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """f(norm(x) Wᵀ · scale + b) + residual, where f is `activation`, a name in ACTIVATIONS.

    x (M, K), M ≤ 64; `weights`: up to three W (N, K), whose results are concatenated, or one W (M, N, K) with a matrix
    for each row, M ≤ 16; in x's dtype or in int8, then with `scales` (N,) float32; `biases` (N,); residual (M, ΣN).
    "swiglu" requires a single W, and halves N. Returns (M, ΣN) in x's dtype. Other inputs, and other devices, use
    `fused_linear_plain`.

    All sums are float32. With up to 16 rows, nothing between the norm and the result is rounded, and a row's result
    does not depend on the other rows or on M. With more rows, the norm is a separate operation, because otherwise each
    program would compute it for all rows, and tensor cores multiply the normalized rows in x's dtype.

    Bytes moved: W once. Lower bound on the time: its bytes divided by the copy bandwidth.
    """
    tensors = (x, *weights, *scales, *biases, *(t for t in (norm.gain, norm.shift, residual) if t is not None))
    most = MAX_GEMV_ROWS if weights[0].dim() == 3 else MAX_ROWS
    if x.size(0) > most or len(weights) > MAX_WEIGHTS or not kernels.can_run(*tensors):
        return fused_linear_plain(x, weights, scales, biases, norm, activation, residual)
    if x.size(0) > MAX_GEMV_ROWS:
        x, norm = normalize(x, norm).to(x.dtype), NO_NORM
    return torch.ops.strawberry.fused_linear(
        x, list(weights), list(scales), list(biases), norm.kind, norm.gain, norm.shift, norm.eps, activation, residual)


def fused_linear_plain(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor], norm: Norm,
    activation: str, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`fused_linear` in plain PyTorch. tests/ops/kernels_in_interpreter.py compares the two."""
    h, w = normalize(x, norm), torch.cat(list(weights), dim=-2)
    h = torch.einsum("mk,mnk->mn", h, w.to(h.dtype)) if w.dim() == 3 else h @ w.to(h.dtype).mT
    h = h * torch.cat(list(scales)) if scales else h
    h = h + torch.cat(list(biases)) if biases else h
    h = ACTIVATIONS[activation][0](h)
    return (h if residual is None else h + residual).to(x.dtype)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """norm(x), in float32 or wider."""
    h = to_accum_dtype(x)
    gain, shift = (None if t is None else t.to(h.dtype) for t in (norm.gain, norm.shift))
    if norm.kind == "rms":
        return F.rms_norm(h, h.shape[-1:], gain, eps=norm.eps)
    return F.layer_norm(h, h.shape[-1:], gain, shift, norm.eps) if norm.kind == "layer" else h

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

MAX_ROWS = 64  # beyond it a matrix product is bound by arithmetic, not by reading W


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
    """f(norm(x) Wᵀ · scale + b) + residual, with a name f of ACTIVATIONS. x (M, K), M ≤ 64; up to three W (N, K), whose
    results are concatenated, in x's dtype or in int8, then with a scale (N,) float32 for each; W (M, N, K) is a matrix
    for each row, M ≤ 16; residual (M, ΣN). "swiglu" takes one W. Returns (M, ΣN) in x's dtype; all sums are float32. Up
    to 16 rows, nothing between the norm and the result is rounded, and a row's result does not depend on the other rows
    or on M. With more, the norm is an operation of its own, because each of the programs would compute it for all rows,
    and tensor cores multiply the normed rows in x's dtype.

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
    """`fused_linear` in plain PyTorch."""
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

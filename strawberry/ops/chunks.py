"""Weights that change from chunk to chunk: matrix products with them, and sums over chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.cache import ChunkCache
from strawberry.context import ForwardContext
from strawberry.ops.common import no_autocast, to_accum_dtype
from strawberry.ops.linear import Int8Weight, linear
from strawberry.ops.triton.common import HALF_DTYPES


def to_chunks(x: Tensor, slot: int) -> Tensor:
    """(B, T, ·) → (B, J, slot, ·), with zeros after the last token."""
    if x.size(1) % slot:  # otherwise a view, since F.pad by zero would copy
        x = F.pad(x, (0, 0, 0, -x.size(1) % slot))
    return x.unflatten(1, (-1, slot))


class ScaledWeight(NamedTuple):
    """The matrix scale · raw. The operation that uses it applies the scale, which saves a pass over the matrix."""

    raw: Tensor  # (out, in), or a matrix for each of n chunks of each row, (B, n, out, in)
    scale: Tensor  # (), or (B, n, 1, 1); float32 or wider


class ChunkWeights(NamedTuple):
    """A matrix for each chunk of each row of whole sequences. The first chunk's matrix is the same in all rows."""

    first: ScaledWeight
    later: ScaledWeight


Weight = Tensor | Int8Weight | ScaledWeight | ChunkWeights


def chunked_linear(x: Tensor, w: Weight, ctx: ForwardContext, precision: str | None = None) -> Tensor:
    """x Wᵀ for x (B, T, in) and w (out, in), or the w of each token's chunk: (B, J, out, in) or ChunkWeights."""
    if isinstance(w, ChunkWeights):
        (first, one), (later, scale) = w
        scale = torch.cat((one.expand(len(x), 1, 1, 1), scale), dim=1)
        x = (to_chunks(x, ctx.chunk_size) * scale).flatten(1, 2)[:, : x.size(1)].to(later.dtype)
        return ChunkedLinear.apply(x, first.to(later.dtype), later, ctx.chunk_size)
    w = materialize(w)
    if isinstance(w, Int8Weight) or w.dim() == 2:
        return linear(x, w, precision=precision)
    if x.size(1) == w.size(1) == 1:  # a decode step
        return x @ w[:, 0].mT.to(x.dtype)
    y = to_chunks(x, ctx.chunk_size) @ w.mT.to(x.dtype)  # (B, J, slot, out)
    return y.flatten(1, 2)[:, : x.size(1)]


def materialize(w: Weight) -> Weight:
    """A ScaledWeight as a tensor; others unchanged. For many tokens, the gradient of the scale is cheaper to compute
    from the matrix than from the tokens."""
    return w.raw * w.scale if isinstance(w, ScaledWeight) else w


class ChunkedLinear(torch.autograd.Function):
    """x Wᵀ for x (B, T, in), with W = first (out, in) in the first chunk and later (B, J − 1, out, in) in the others.
    Where copying tokens costs more than launching several products, the products read and write slices of x and y."""

    @staticmethod
    def forward(ctx, x: Tensor, first: Tensor, later: Tensor, slot: int) -> Tensor:
        ctx.save_for_backward(x, first, later)
        ctx.chunk_size = slot
        with no_autocast(x):
            return (chunked_matmul if use_bmm_slices(x) else chunked_matmul_plain)(x, first, later, slot)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, first, later = ctx.saved_tensors
        gradients = chunked_matmul_backward if use_bmm_slices(x) else chunked_matmul_backward_plain
        with no_autocast(x):
            return *gradients(grad, x, first, later, ctx.chunk_size), None


def use_bmm_slices(x: Tensor) -> bool:
    return x.is_cuda and x.numel() >= 2**21


def chunked_matmul_plain(x: Tensor, first: Tensor, later: Tensor, slot: int) -> Tensor:
    y = to_chunks(x, slot) @ stack_chunks(first, later).mT
    return y.flatten(1, 2)[:, : x.size(1)]


def chunked_matmul_backward_plain(
    grad: Tensor, x: Tensor, first: Tensor, later: Tensor, slot: int
) -> tuple[Tensor, ...]:
    dx = chunked_matmul_plain(grad, first.mT, later.mT, slot)
    dw = to_chunks(grad, slot).mT @ to_chunks(x, slot)
    return dx, to_accum_dtype(dw[:, 0]).sum(dim=0).to(first.dtype), dw[:, 1:]


def stack_chunks(first: Tensor, later: Tensor) -> Tensor:
    """first (·, ·) and later (B, J − 1, ·, ·), concatenated: (B, J, ·, ·)."""
    return torch.cat((first.expand(len(later), 1, -1, -1), later), dim=1)


def iter_chunk_batches(
    slot: int, T: int, tokens: Sequence[Tensor], matrices: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """Yields the chunks after the first in as few batches as possible without a copy: tokens (B, T, ·) as (n, slot, ·)
    and matrices (B, J − 1, ·, ·) as (n, ·, ·). A batch has one chunk of all rows, or all full chunks of one row."""
    B, later = matrices[0].shape[:2]
    num_full = T // slot - 1 if later > B else 0  # full chunks, which are yielded row by row
    for b in range(B if num_full else 0):
        rows = [x[b, slot : (num_full + 1) * slot].unflatten(0, (num_full, slot)) for x in tokens]
        yield [*rows, *(w[b, :num_full] for w in matrices)]
    for j in range(num_full, later):
        yield [*(x[:, (j + 1) * slot : (j + 2) * slot] for x in tokens), *(w[:, j] for w in matrices)]


@torch.library.custom_op("strawberry::chunk_product", mutates_args=())
def chunked_matmul(x: Tensor, first: Tensor, later: Tensor, slot: int) -> Tensor:
    y = x.new_empty(*x.shape[:2], len(first))
    torch.bmm(x[:, :slot], first.mT.expand(len(x), -1, -1), out=y[:, :slot])
    for part, result, w in iter_chunk_batches(slot, x.size(1), (x, y), (later,)):
        torch.bmm(part, w.mT, out=result)
    return y


@chunked_matmul.register_fake
def _(x, first, later, slot):
    return x.new_empty(*x.shape[:2], len(first))


@torch.library.custom_op("strawberry::chunk_gradients", mutates_args=())
def chunked_matmul_backward(
    grad: Tensor, x: Tensor, first: Tensor, later: Tensor, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx = chunked_matmul(grad, first.mT, later.mT, slot)
    d_first = torch.bmm(grad[:, :slot].mT, x[:, :slot])
    d_first = d_first.sum(dim=0, dtype=to_accum_dtype(d_first[:0]).dtype).to(first.dtype)
    d_later = later.new_empty(later.shape)
    for g, part, result in iter_chunk_batches(slot, x.size(1), (grad, x), (d_later,)):
        torch.bmm(g.mT, part, out=result)
    return dx, d_first, d_later


@chunked_matmul_backward.register_fake
def _(grad, x, first, later, slot):
    return x.new_empty(x.shape), first.new_empty(first.shape), later.new_empty(later.shape)


def build_per_chunk(
    u: Tensor, v: Tensor, ctx: ForwardContext, cache: ChunkCache | None, build: Callable
) -> Sequence[Tensor]:
    """The weights of each chunk of each row, computed from earlier chunks only.

    u, v (B, T, C); u is zero for invalid tokens. build(before) returns tensors (B, J, ·, ·), where
    before (B, J, C, C) = Σ uᵀ v over the chunks before each. A chunk that is already open keeps its weights.
    """
    if ctx.chunk_weights_ready:
        with no_autocast(u):
            cache.partial += to_accum_dtype(u).mT @ to_accum_dtype(v)
        return cache.weights()
    sums = chunk_sums(u, v, ctx.chunk_size)
    if cache is None:
        return build(exclusive_cumsum(sums))
    before = (cache.finished + cache.partial).unsqueeze(1) + exclusive_cumsum(sums)
    weights = build(before)
    cache.store(ctx, before, sums, weights)
    return weights


def chunk_sums(u: Tensor, v: Tensor, slot: int) -> Tensor:
    """Σ uᵀ v over each chunk, (B, J, C, C), float32 or wider."""
    return ChunkSums.apply(u, v.to(u.dtype), slot)


class ChunkSums(torch.autograd.Function):
    """`chunk_sums`. Half types are multiplied without a cast and accumulated in float32, which is ten times as fast on
    a GPU."""

    @staticmethod
    def forward(ctx, u: Tensor, v: Tensor, slot: int) -> Tensor:
        ctx.save_for_backward(u, v)
        ctx.chunk_size = slot
        return matmul_accum(to_chunks(u, slot).mT, to_chunks(v, slot))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, v = ctx.saved_tensors
        grad = grad.to(u.dtype)
        with no_autocast(u):
            du, dv = to_chunks(v, ctx.chunk_size) @ grad.mT, to_chunks(u, ctx.chunk_size) @ grad
        return du.flatten(1, 2)[:, : u.size(1)], dv.flatten(1, 2)[:, : u.size(1)], None


def matmul_accum(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider, (B, J, ·, ·) each."""
    with no_autocast(a):
        if a.is_cuda and a.dtype in HALF_DTYPES:
            y = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
            return y.unflatten(0, a.shape[:2])
        return to_accum_dtype(a) @ to_accum_dtype(b)


def exclusive_cumsum(sums: Tensor) -> Tensor:
    """Σ over the chunks before each one, (B, J, C, C)."""
    return F.pad(sums, (0, 0, 0, 0, 1, -1)).cumsum(dim=1)

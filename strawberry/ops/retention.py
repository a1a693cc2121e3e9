"""Retention: the context rewrites a block's matrices ("fast weights"). `retention_update` is the update rule; the other
functions compute it for each chunk of each row in few passes over the weights."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.context import ForwardContext
from strawberry.ops.chunks import ChunkWeights, ScaledWeight, chunk_sums
from strawberry.ops.common import no_autocast, norm, to_accum_dtype
from strawberry.ops.triton.retention import can_fuse_update


def gated_update(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, ...]:
    """raw + h outᵀ with z = raw oa and h = z ⊙ σ(scale · z), for each of n chunks of each row.

    raw (B, n, M, N), or (M, N) shared by all; scale (B, n, 1, 1), float32; oa (B, n, C, C); out (C, C). N = C; `viewed`
    matrices are stored transposed, M = C: z = oaᵀ raw and raw + out h. Returns the sum and z, (B, n, M, N) in raw's
    dtype, and mean and variance of each matrix of the sum, (B, n, 1, 1), float32 or wider.

    FLOPs: 4·M·N·C per chunk. Bytes moved per matrix element in half types: 6 to compute z and h from raw, 6 to compute
    the sum and its moments from h and raw; plain PyTorch moves 8 more.
    """
    if not can_fuse_update(raw, oa):
        return gated_update_plain(raw, scale, oa, out, viewed)
    new, z, moments = torch.ops.strawberry.gated_update(raw, scale, oa, out, viewed)
    count = new[0, 0].numel()
    total, squares = (x[..., None, None] for x in moments.sum(dim=2).unbind(-1))
    mean = total / count
    return new, z, mean, (squares - total * mean).clamp(min=0) / (count - 1)


def gated_update_plain(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, ...]:
    """`gated_update` in plain PyTorch."""
    z = right_multiply(raw, oa, viewed)
    h = (to_accum_dtype(z) * torch.sigmoid(scale * z)).to(z.dtype)
    new = raw + right_multiply(h, out.mT, viewed)
    variance, mean = torch.var_mean(to_accum_dtype(new), dim=(-2, -1), keepdim=True)
    return new, z, mean, variance


def gated_update_backward(
    grad: Tensor, raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, ...]:
    """Gradients of raw, for each chunk (B, n, M, N), of scale, oa and out from the gradient of `gated_update`'s sum.

    FLOPs: 8·M·N·C per chunk. Bytes moved per matrix element in half types: 8 to compute dz and h from grad and z, 6 to
    compute raw's gradient from dz and grad, 4 each for the gradients of oa and out; plain PyTorch moves 8 more.
    """
    way = torch.ops.strawberry.gated_update_backward if can_fuse_update(raw, oa) else gated_update_backward_plain
    d_raw, d_scale, dz, h = way(grad, scale, oa, out, z, viewed)
    if viewed:
        d_out = to_accum_dtype(inner_product(grad, h, viewed)).sum(dim=(0, 1)).to(out.dtype)
    else:  # the rows of all chunks are contiguous, so one product sums over them
        d_out = grad.flatten(0, 2).mT @ h.flatten(0, 2)
    return d_raw, d_scale, inner_product(raw, dz, viewed), d_out


def gated_update_backward_plain(
    grad: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, ...]:
    """Gradients of raw, scale and z, and the recomputed h."""
    dh, z_wide = to_accum_dtype(right_multiply(grad, out, viewed)), to_accum_dtype(z)
    gate = torch.sigmoid(scale * z_wide)
    gate_slope = z_wide * gate * (1 - gate)
    dz = (dh * (gate + scale * gate_slope)).to(z.dtype)
    d_scale = (dh * gate_slope * z_wide).sum(dim=(-2, -1), keepdim=True)
    return grad + right_multiply(dz, oa.mT, viewed), d_scale, dz, (z_wide * gate).to(z.dtype)


def right_multiply(a: Tensor, b: Tensor, viewed: bool) -> Tensor:
    """a b; for matrices stored transposed, (aᵀ b)ᵀ."""
    if viewed:  # explicit expand, since broadcasting would transpose and copy the larger operand
        return b.mT.expand(*(a.shape[:-2] if a.dim() == 4 else b.shape[:-2]), -1, -1) @ a
    return a @ b


def inner_product(a: Tensor, b: Tensor, viewed: bool) -> Tensor:
    """aᵀ b; for matrices stored transposed, a bᵀ."""
    a = a.expand(*b.shape[:-2], -1, -1)
    return a @ b.mT if viewed else a.mT @ b


def rescale_std(w: Tensor, n: int, gain: Tensor | float = 1.0) -> Tensor:
    """Rescale each matrix (…, rows, columns) to standard deviation gain·n^(−1/2), unbiased, one number per matrix."""
    return w * (gain * n**-0.5 / (to_accum_dtype(w).std(dim=(-2, -1), keepdim=True) + 1e-8)).to(w.dtype)


class BlockWeights(NamedTuple):
    """The three matrices of a block that retention updates: each shared, (rows, columns), or one for each chunk of each
    row, (B, J, rows, columns); for whole sequences, as ScaledWeight or ChunkWeights."""

    qkv: Tensor | ScaledWeight | ChunkWeights  # (3D, C)
    swiglu: Tensor | ScaledWeight | ChunkWeights  # (2C, D)
    out: Tensor | ScaledWeight | ChunkWeights  # (C, C)


def rescale_weights(w: BlockWeights, tao: Tensor) -> BlockWeights:
    """Each matrix rescaled to its usual standard deviation times |tao|. This is the update rule with oa = 0."""
    C, D = w.qkv.size(-1), w.swiglu.size(-1)
    alpha, beta, gamma = tao.abs().unbind(dim=-1)
    return BlockWeights(rescale_std(w.qkv, C, alpha), rescale_std(w.swiglu, D, beta), rescale_std(w.out, C, gamma))


def retention_update(w: BlockWeights, oa: Tensor, out: Tensor, tao: Tensor) -> BlockWeights:
    """The update rule: w + f(w), f(w) = silu(w @ oa) @ outᵀ, rescaled.

    `retention_update_scaled` is the same function for training; tests/model/test_model_proofs.py checks that they are
    equal.
    """

    def f(m: Tensor) -> Tensor:
        return F.silu(m @ oa.to(m.dtype)) @ out.mT

    C, D = w.qkv.size(-1), w.swiglu.size(-1)
    view = w.swiglu.unflatten(-2, (C, 2)).flatten(-2).mT  # (…, 2C, D) → (…, C, 2D) → (…, 2D, C)
    swiglu = w.swiglu + f(view).mT.unflatten(-1, (2, D)).flatten(-3, -2)  # and back
    return rescale_weights(BlockWeights(w.qkv + f(w.qkv), swiglu, w.out + f(w.out)), tao)


def retention_update_scaled(w: BlockWeights, oa: Tensor | None, out: Tensor, tao: Tensor) -> BlockWeights:
    """`retention_update` for whole sequences and ScaledWeight: the same function, with the fewest passes over the
    weights or the fewest launches. oa (B, n, C, C) for n chunks of each row; with None, the weights are only rescaled.

    The scale is applied by the operations that use the weights: with w = scale · raw, z = raw oa and
    h = z ⊙ σ(scale · z), w + silu(w oa) outᵀ = scale · (raw + h outᵀ).
    """
    raws, scales = zip(*w, strict=True)
    if oa is None:
        deviations = [to_accum_dtype(raw).std(dim=(-2, -1)) for raw in raws]
    else:
        raws, scales = [raw.to(oa.dtype) for raw in raws], [scale.expand(*oa.shape[:2], 1, 1) for scale in scales]
        update = update_separately if can_fuse_update(raws[0], oa) else update_concatenated
        raws, deviations = update(BlockWeights(*raws), scales, oa, out.to(oa.dtype))
    sizes = (w.qkv.raw.size(-1), w.swiglu.raw.size(-1), w.out.raw.size(-1))
    gains = [gain * n**-0.5 for gain, n in zip(tao[0].abs(), sizes, strict=True)]
    changed = zip(raws, scales, gains, deviations, strict=True)
    return BlockWeights(*(ScaledWeight(raw, s * gain / (s * deviation + 1e-8)) for raw, s, gain, deviation in changed))


def update_concatenated(
    raws: BlockWeights, scales: list[Tensor], oa: Tensor, out: Tensor
) -> tuple[BlockWeights, list[Tensor]]:
    """raw + h outᵀ and its standard deviations, with the rows of the three matrices concatenated: few launches, for
    small matrices."""
    C, D = raws.qkv.size(-1), raws.swiglu.size(-1)
    view = raws.swiglu.unflatten(-2, (C, 2)).flatten(-2).mT  # (…, 2C, D) → (…, C, 2D) → (…, 2D, C)
    rows = (3 * D, 2 * D, C)
    raw = torch.cat((raws.qkv, view, raws.out), dim=-2)
    scale = torch.cat([scale.expand(-1, -1, n, 1) for scale, n in zip(scales, rows, strict=True)], dim=2)
    z = raw.expand(*oa.shape[:2], -1, -1) @ oa
    h = (z * torch.sigmoid(scale * z)).to(z.dtype)
    qkv, view, w_out = (raw + h @ out.mT).split(rows, dim=-2)
    deviations = [to_accum_dtype(m).std(dim=(-2, -1), keepdim=True) for m in (qkv, view, w_out)]
    return BlockWeights(qkv, view.mT.unflatten(-1, (2, D)).flatten(-3, -2), w_out), deviations


def update_separately(
    raws: BlockWeights, scales: list[Tensor], oa: Tensor, out: Tensor
) -> tuple[BlockWeights, list[Tensor]]:
    """The same as `update_concatenated`, matrix by matrix, for large matrices: nothing is transposed, and elementwise
    passes are fused with the products."""
    C = len(out)
    views = (raws.qkv, raws.swiglu.unflatten(-2, (C, 2)).flatten(-2), raws.out)  # (…, 2C, D) → (…, C, 2D)
    kinds = zip(views, scales, (False, True, False), strict=True)
    updated, deviations = zip(
        *(GatedUpdate.apply(m, scale, oa, out, viewed) for m, scale, viewed in kinds), strict=True
    )
    swiglu = updated[1].view(*oa.shape[:2], *raws.swiglu.shape[-2:])
    return BlockWeights(updated[0], swiglu, updated[2]), list(deviations)


class GatedUpdate(torch.autograd.Function):
    """raw + h outᵀ with z = raw oa and h = z ⊙ σ(scale · z), and the standard deviation of each matrix. A matrix that
    the update rule reads as a view is stored as the view's transpose, which avoids a transposition: z = oaᵀ raw,
    raw + out h.

    Saves 2 bytes of `raw` and 2 of `z` per matrix element for backward, in half types. `gated_update` and
    `gated_update_backward` state bytes moved and FLOPs; one more pass adds the gradient of the standard deviation to
    that of the other uses.
    """

    @staticmethod
    def forward(ctx, raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, Tensor]:
        with no_autocast(raw):
            new, z, mean, variance = gated_update(raw, scale, oa, out, viewed)
        ctx.save_for_backward(raw, scale, oa, out, z, new, mean, variance)
        ctx.viewed = viewed
        return new, variance.sqrt()

    @staticmethod
    def backward(ctx, grad: Tensor, grad_deviation: Tensor) -> tuple:
        raw, scale, oa, out, z, new, mean, variance = ctx.saved_tensors
        factor = torch.where(variance > 0, grad_deviation * variance.rsqrt(), 0.0) / (new[0, 0].numel() - 1)
        grad = (to_accum_dtype(grad) + factor * (to_accum_dtype(new) - mean)).to(new.dtype)
        with no_autocast(raw):
            d_raw, *others = gated_update_backward(grad, raw, scale, oa, out, z, ctx.viewed)
        if raw.dim() == 2:
            d_raw = to_accum_dtype(d_raw).sum(dim=(0, 1)).to(raw.dtype)
        return d_raw, *others, None


def as_scaled(w: BlockWeights, u: Tensor) -> BlockWeights:
    """Tensors as ScaledWeight with scale 1; others unchanged."""
    one = to_accum_dtype(u).new_ones(())
    return BlockWeights(*(ScaledWeight(m, one) if isinstance(m, Tensor) else m for m in w))


def causal_retention_update(
    w: BlockWeights, u: Tensor, g: Tensor, scale: float, out: Tensor, tao: Tensor, ctx: ForwardContext
) -> BlockWeights:
    """The weights of each chunk of whole sequences, with oa_j = scale · norm(Σ uᵀ g over the chunks before j): u, g
    (B, T, C). The weights of chunk 0, whose oa is zero, are only rescaled."""
    size = ctx.chunk_size
    J, n, w = -(-u.size(1) // size), num_summed_chunks(u.size(1), size), as_scaled(w, u)
    first, later = zip(*((m, m) if isinstance(m, ScaledWeight) else m for m in w), strict=True)
    first = retention_update_scaled(BlockWeights(*first), None, out, tao)
    if J == 1:
        return first
    sums = chunk_sums(*(x[:, : n * size] for x in (u, g)), size)
    before = sums.cumsum(dim=1)[:, : J - 1] if J > 2 else sums
    later = retention_update_scaled(BlockWeights(*later), (scale * norm(before)).to(g.dtype), out, tao)
    return BlockWeights(*map(ChunkWeights, first, later))


def num_summed_chunks(T: int, size: int) -> int:
    """The number of chunks of T tokens that are summed. The last chunk's sum is not used, but excluding it from several
    full chunks would copy them."""
    J = -(-T // size)
    return J if J > 2 and T % size == 0 else J - 1


def batch_retention_update(
    w: BlockWeights, u: Tensor, g: Tensor, scale: float, out: Tensor, tao: Tensor
) -> BlockWeights:
    """The weights shared by all rows, with oa = scale · norm(mean over rows of Σ uᵀ g over all T): u, g (B, T, C)."""
    B = len(u)
    u, g = (x.flatten(0, 1).unsqueeze(0) for x in (u, g))  # (1, B · T, C)
    sums = chunk_sums(u, g, -(-u.size(1) // BATCH_SHARES))
    oa = scale * norm(sums.sum(dim=1, keepdim=True) / B)  # (1, 1, C, C)
    updated = retention_update_scaled(as_scaled(w, u), oa.to(g.dtype), out, tao)
    return BlockWeights(*(ScaledWeight(raw[0, 0], scale.view(())) for raw, scale in updated))


BATCH_SHARES = 8  # parts of the tokens that are summed in parallel

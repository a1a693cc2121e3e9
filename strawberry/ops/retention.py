"""Retention."""

import torch
from torch import Tensor

from strawberry.ops.common import to_accum_dtype
from strawberry.ops.triton.retention import can_fuse_update


def gated_update(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, ...]:
    """raw + h outᵀ with z = raw oa and h = z ⊙ σ(scale · z), for each of n chunks of each row.

    raw (B, n, M, N), or (M, N) for all; scale (B, n, 1, 1), float32; oa (B, n, C, C); out (C, C). N = C; matrices that
    are `viewed` are kept transposed, M = C: z = oaᵀ raw and raw + out h. Returns the sum and z, (B, n, M, N) in raw's
    dtype; mean and variance of each matrix of the sum, (B, n, 1, 1), float32 or wider.

    Operations: 4·M·N·C a chunk. Bytes moved for each number in half types: 6 to make z and h of raw, 6 to make the sum
    of h and raw, with the moments on the way; plain PyTorch moves 8 more.
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
    """Gradients of raw, for each chunk, (B, n, M, N), of scale, oa and out from that of `gated_update`'s sum.

    Operations: 8·M·N·C a chunk. Bytes moved for each number in half types: 8 to make dz and h of grad and z, 6 for
    raw's gradient of dz and grad, 4 each for those of oa and out; plain PyTorch moves 8 more.
    """
    way = torch.ops.strawberry.gated_update_backward if can_fuse_update(raw, oa) else gated_update_backward_plain
    d_raw, d_scale, dz, h = way(grad, scale, oa, out, z, viewed)
    if viewed:
        d_out = to_accum_dtype(inner_product(grad, h, viewed)).sum(dim=(0, 1)).to(out.dtype)
    else:  # all chunks' rows lie one after another
        d_out = grad.flatten(0, 2).mT @ h.flatten(0, 2)
    return d_raw, d_scale, inner_product(raw, dz, viewed), d_out


def gated_update_backward_plain(
    grad: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, ...]:
    """Gradients of raw, scale and z, and h once more."""
    dh, wide = to_accum_dtype(right_multiply(grad, out, viewed)), to_accum_dtype(z)
    gate = torch.sigmoid(scale * wide)
    turn = wide * gate * (1 - gate)
    dz = (dh * (gate + scale * turn)).to(z.dtype)
    d_scale = (dh * turn * wide).sum(dim=(-2, -1), keepdim=True)
    return grad + right_multiply(dz, oa.mT, viewed), d_scale, dz, (wide * gate).to(z.dtype)


def right_multiply(a: Tensor, b: Tensor, viewed: bool) -> Tensor:
    """a b; of those that are kept transposed, aᵀ b, transposed."""
    if viewed:  # not left to broadcasting, which would transpose and copy the larger one
        return b.mT.expand(*(a.shape[:-2] if a.dim() == 4 else b.shape[:-2]), -1, -1) @ a
    return a @ b


def inner_product(a: Tensor, b: Tensor, viewed: bool) -> Tensor:
    """aᵀ b, of those that are kept transposed too."""
    a = a.expand(*b.shape[:-2], -1, -1)
    return a @ b.mT if viewed else a.mT @ b

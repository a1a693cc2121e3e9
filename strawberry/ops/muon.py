"""Muon's operations. Each has a plain version here and a Triton kernel in ops/triton/muon.py; tests/ops compares both
with float64.

    symmetric_product    the symmetric products of Newton–Schulz
    move_and_look_ahead  the update of the momentum, and the Nesterov momentum
    decay_and_add        weight decay and update
"""

import torch
from torch import Tensor

from strawberry.ops.triton import muon as kernels


def symmetric_product(
    x: Tensor, y: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · x yᵀ + beta · c, (n, rows, rows), for x and y (n, rows, cols) whose product is symmetric, and a symmetric
    c (n, rows, rows); without c, alpha · x yᵀ."""
    if kernels.can_use_symmetry(x):
        return kernels.launch_symmetric_product(x, y, c, alpha, beta)
    return torch.bmm(x, y.mT) if c is None else torch.baddbmm(c, x, y.mT, beta=beta, alpha=alpha)


def move_and_look_ahead(
    grads: list[Tensor], buffers: list[Tensor], weight: Tensor, found_inf: Tensor, dtype: torch.dtype
) -> Tensor:
    """Update the momentum m ← m + w (g − m) in place, and return m + w (g − m) of the new m, Nesterov's, as one stack
    (n, rows, cols) of `dtype`. w and found_inf are (). If found_inf is 1, m is unchanged and is returned."""
    if kernels.can_fuse_passes(*grads, *buffers):
        ahead = torch.empty((len(grads), *grads[0].shape), dtype=dtype, device=grads[0].device)
        for grad, buffer, out in zip(grads, buffers, ahead.unbind(), strict=True):
            kernels.launch_look_ahead(grad, buffer, out, weight, found_inf)
        return ahead
    grad, old = torch.stack(grads), torch.stack(buffers)
    grad = torch.where(found_inf.bool(), old, grad)
    new = torch.lerp(old, grad, weight)
    torch._foreach_copy_(buffers, list(new.unbind()))
    return torch.lerp(new, grad, weight).to(dtype)


def decay_and_add(params: list[Tensor], update: Tensor, step: float | Tensor, rate: float | Tensor) -> None:
    """w ← w − rate · w + step · u in place, u a matrix of `update` (n, rows, cols)."""
    if isinstance(step, Tensor) and isinstance(rate, Tensor) and kernels.can_fuse_passes(*params, update):
        for p, u in zip(params, update.unbind(), strict=True):
            kernels.launch_decay_and_add(p, u, step, rate)
        return
    torch._foreach_mul_(params, 1 - rate)
    torch._foreach_add_(params, list((update.to(params[0].dtype) * step).unbind()))

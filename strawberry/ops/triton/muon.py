"""Muon's kernels: products that are symmetric, and the passes over momentum and weights."""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import HALF_DTYPES, INTERPRETED, dot_dtype, jit, tl, triton

SYMMETRIC_TILE = {"TILE": 16, "STEP": 16} if INTERPRETED else {"TILE": 128, "STEP": 64}
SYMMETRIC_LAUNCH = {"num_warps": 8, "num_stages": 3}  # 96 KiB of shared memory, which smaller GPUs have too
PASS_TILE = 1024  # elements per program of a pass


def can_use_symmetry(x: Tensor) -> bool:
    """Whether to use `symmetric_product_kernel`: for half types, with more than one tile per side, since a single tile
    has no mirror image to skip."""
    fits = INTERPRETED or (x.dtype in HALF_DTYPES and x.size(1) > SYMMETRIC_TILE["TILE"])
    return fits and kernels.can_run(x) and x.numel() > 0


def launch_symmetric_product(x: Tensor, y: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha · x yᵀ + beta · c for x and y (n, rows, cols) whose product is symmetric, and a symmetric c (n, rows, rows)
    or none.

    Computes the tiles on and below the diagonal, and stores each of the latter transposed too: (t + 1) / 2t of the work
    with t tiles per side, 58 % for 768 rows. x and y may be transposed views.
    """
    n, rows, cols = x.shape
    out = torch.empty((n, rows, rows), dtype=x.dtype, device=x.device)
    across = triton.cdiv(rows, SYMMETRIC_TILE["TILE"])
    even = rows % SYMMETRIC_TILE["TILE"] == 0 and cols % SYMMETRIC_TILE["STEP"] == 0
    symmetric_product_kernel[(across * (across + 1) // 2, n)](
        x, y, x if c is None else c, out, rows, cols, *x.stride(), *y.stride(), alpha, beta, c is not None, even,
        dot_dtype(x), **SYMMETRIC_TILE, **SYMMETRIC_LAUNCH,
    )  # fmt: skip
    return out


@jit
def triangle_tile(number):
    """(row, column) of a tile on or below the diagonal, numbered row by row: 0 → (0, 0), 1 → (1, 0), 2 → (1, 1)."""
    row = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)  # where the root was rounded up
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    return row, number - row * (row + 1) // 2


@jit
def symmetric_product_kernel(
    x, y, c, out, R, K, x_each, x_row, x_col, y_each, y_row, y_col, alpha, beta,
    HAS_C: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of a matrix per program, and its mirror image across the diagonal."""
    down, across = triangle_tile(tl.program_id(0))
    each = tl.program_id(1).to(tl.int64)
    i, j = down * TILE + tl.arange(0, TILE), across * TILE + tl.arange(0, TILE)
    k = tl.arange(0, STEP)
    left = x + each * x_each + i[:, None] * x_row + k[None, :] * x_col
    right = y + each * y_each + k[:, None] * y_col + j[None, :] * y_row
    total = tl.zeros((TILE, TILE), tl.float32)
    for done in range(0, K, STEP):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=(i[:, None] < R) & (k[None, :] < K - done), other=0.0)
            b = tl.load(right, mask=(k[:, None] < K - done) & (j[None, :] < R), other=0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total)
        left += STEP * x_col
        right += STEP * y_col
    here = (i[:, None] < R) & (j[None, :] < R)
    at = each * R * R + i[:, None] * R + j[None, :]
    total *= alpha
    if HAS_C:
        total += beta * tl.load(c + at, mask=here, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=here)
    if down != across:
        mirrored = each * R * R + j[:, None] * R + i[None, :]
        tl.store(out + mirrored, tl.trans(result), mask=(j[:, None] < R) & (i[None, :] < R))


def can_fuse_passes(*tensors: Tensor) -> bool:
    """Whether to use the elementwise kernels below: each tensor is contiguous, on a GPU, and not empty."""
    return kernels.can_run(*tensors) and all(t.is_contiguous() and t.numel() > 0 for t in tensors)


def launch_look_ahead(grad: Tensor, buffer: Tensor, out: Tensor, weight: Tensor, found_inf: Tensor) -> None:
    """m ← m + w (g − m), and out ← m + w (g − m) of the new m. If found_inf () is 1, m is unchanged and is the result.
    Bytes moved per element: 12, and those of `out`."""
    n = grad.numel()
    look_ahead_kernel[(triton.cdiv(n, PASS_TILE),)](grad, buffer, out, weight, found_inf, n, PASS_TILE)


@jit
def look_ahead_kernel(grad, buffer, out, weight, found_inf, N, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = at < N
    w, skipped = tl.load(weight), tl.load(found_inf) != 0
    m = tl.load(buffer + at, mask=here, other=0.0)
    g = tl.load(grad + at, mask=here, other=0.0)
    g = tl.where(skipped, m, g)  # g may be NaN
    m += w * (g - m)
    tl.store(buffer + at, m, mask=here)
    tl.store(out + at, (m + w * (g - m)).to(out.dtype.element_ty), mask=here)


def launch_decay_and_add(p: Tensor, update: Tensor, step: Tensor, rate: Tensor) -> None:
    """w ← w − rate · w + step · u; step and rate are (). Bytes moved per element: 8, and those of `update`."""
    n = p.numel()
    decay_and_add_kernel[(triton.cdiv(n, PASS_TILE),)](p, update, step, rate, n, PASS_TILE)


@jit
def decay_and_add_kernel(p, update, step, rate, N, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = at < N
    w = tl.load(p + at, mask=here, other=0.0)
    u = tl.load(step) * tl.load(update + at, mask=here, other=0.0).to(tl.float32)
    tl.store(p + at, w - tl.load(rate) * w + u, mask=here)

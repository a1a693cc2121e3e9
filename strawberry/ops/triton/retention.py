"""Retention's weight update, for each chunk of each row."""

import torch
from torch import Tensor

from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import HALF_DTYPES, INTERPRETED, dot_dtype, fast_exp, fast_reciprocal, jit, tl

UPDATE_TILE = {"ROWS": 128, "COLS": 128, "STEP": 64}
UPDATE_LAUNCH = {"num_warps": 8, "num_stages": 3}


def can_fuse_update(raw: Tensor, oa: Tensor) -> bool:
    """Whether to use the kernels: for half types, which use tensor cores; for more than one matrix, since fewer passes
    over a single one save less time than compiling the kernels takes; and for C ≥ 128, since a pass over a small matrix
    takes no longer than its launch (at C 64, air.json's step took 1.41 ms with the kernels and 1.33 ms without)."""
    taken = INTERPRETED or (raw.dtype == oa.dtype in HALF_DTYPES and oa.size(-1) >= 128)
    return kernels.can_run(raw, oa) and taken and oa.shape[:2].numel() > 1


@jit
def matmul_tile(
    a, square, tile, M, N, C, s_row, s_col,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of `right_multiply(a, square)` in float32, a (M, N) and square (C, C) with these strides; the tile's
    offsets and its mask."""
    across = tl.cdiv(N, COLS)
    i = tile // across * ROWS + tl.arange(0, ROWS)[:, None]
    c = tile % across * COLS + tl.arange(0, COLS)[None, :]
    down, along = tl.arange(0, STEP)[:, None], tl.arange(0, STEP)[None, :]
    if VIEWED:
        left, left_step = square + i * s_col + along * s_row, STEP * s_row
        right, right_step = a + down * N + c, STEP * N
    else:
        left, left_step = a + i * C + along, STEP
        right, right_step = square + down * s_row + c * s_col, STEP * s_row
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, C, STEP):
        if EVEN:
            x, y = tl.load(left), tl.load(right)
        else:
            x = tl.load(left, mask=(i < M) & (along < C - k), other=0.0)
            y = tl.load(right, mask=(down < C - k) & (c < N), other=0.0)
        total = tl.dot(x.to(DOT), y.to(DOT), total)
        left += left_step
        right += right_step
    return total, i * N + c, (i < M) & (c < N)


@jit
def gate_kernel(
    raw, oa, scale, z, h, M, N, C, apart,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store z and h; one tile of a matrix per program."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    product, at, here = matmul_tile(
        raw + each * apart, oa + each * C * C, tile, M, N, C, C, 1, VIEWED, EVEN, DOT, ROWS, COLS, STEP
    )
    at += each * M * N
    product = product.to(z.dtype.element_ty)
    tl.store(z + at, product, mask=here)
    product = product.to(tl.float32)
    gate = fast_reciprocal(1.0 + fast_exp(-product * tl.load(scale + each)))
    tl.store(h + at, (product * gate).to(h.dtype.element_ty), mask=here)


@jit
def add_kernel(
    raw, out, h, new, moments, M, N, C, apart,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store raw + h outᵀ, and the tile's sum and sum of squares; one tile of a matrix per program."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    product, at, here = matmul_tile(h + each * M * N, out, tile, M, N, C, 1, C, VIEWED, EVEN, DOT, ROWS, COLS, STEP)
    x = (product + tl.load(raw + each * apart + at, mask=here, other=0.0)).to(new.dtype.element_ty)
    tl.store(new + each * M * N + at, x, mask=here)
    x = tl.where(here, x.to(tl.float32), 0.0)
    mine = moments + (each * tl.num_programs(0) + tile) * 2
    tl.store(mine, tl.sum(x))
    tl.store(mine + 1, tl.sum(x * x))


@jit
def gate_backward_kernel(
    grad, out, scale, z, h, dz, d_scale, M, N, C,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """From dh = grad out, store the recomputed h, dz, and the tile's part of the gradient of scale."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dh, at, here = matmul_tile(grad + each * M * N, out, tile, M, N, C, C, 1, VIEWED, EVEN, DOT, ROWS, COLS, STEP)
    s, at = tl.load(scale + each), each * M * N + at
    x = tl.load(z + at, mask=here, other=0.0).to(tl.float32)
    gate = fast_reciprocal(1.0 + fast_exp(-x * s))
    turn = x * gate * (1.0 - gate)
    tl.store(h + at, (x * gate).to(h.dtype.element_ty), mask=here)
    tl.store(dz + at, (dh * (gate + s * turn)).to(dz.dtype.element_ty), mask=here)
    tl.store(d_scale + each * tl.num_programs(0) + tile, tl.sum(dh * turn * x))


@jit
def add_backward_kernel(
    grad, oa, dz, d_raw, M, N, C,
    VIEWED: tl.constexpr, EVEN: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store grad + dz oaᵀ; one tile of a matrix per program."""
    tile, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    product, at, here = matmul_tile(
        dz + each * M * N, oa + each * C * C, tile, M, N, C, 1, C, VIEWED, EVEN, DOT, ROWS, COLS, STEP
    )
    at += each * M * N
    x = product + tl.load(grad + at, mask=here, other=0.0)
    tl.store(d_raw + at, x.to(d_raw.dtype.element_ty), mask=here)


def update_launch_config(raw: Tensor, C: int, viewed: bool) -> tuple[int, dict]:
    """The number of tiles in a matrix, and the kernel's constants."""
    M, N = raw.shape[-2:]
    rows, cols, step = UPDATE_TILE.values()
    even = M % rows == 0 and N % cols == 0 and C % step == 0
    return -(-M // rows) * -(-N // cols), {"VIEWED": viewed, "EVEN": even, "DOT": dot_dtype(raw)} | UPDATE_TILE


@torch.library.custom_op("strawberry::gated_update", mutates_args=())
def gated_update_op(raw: Tensor, scale: Tensor, oa: Tensor, out: Tensor, viewed: bool) -> tuple[Tensor, Tensor, Tensor]:
    (B, n, C, _), (M, N) = oa.shape, raw.shape[-2:]
    raw, oa, out, scale = (x.contiguous() for x in (raw, oa, out, scale))
    tiles, shape = update_launch_config(raw, C, viewed)
    new, z, h = (torch.empty(B, n, M, N, dtype=raw.dtype, device=raw.device) for _ in range(3))
    moments = torch.empty(B, n, tiles, 2, dtype=torch.float32, device=raw.device)
    sizes = (M, N, C, 0 if raw.dim() == 2 else M * N)
    gate_kernel[(tiles, B * n)](raw, oa, scale, z, h, *sizes, **shape, **UPDATE_LAUNCH)
    add_kernel[(tiles, B * n)](raw, out, h, new, moments, *sizes, **shape, **UPDATE_LAUNCH)
    return new, z, moments


@gated_update_op.register_fake
def _(raw, scale, oa, out, viewed):
    (B, n, C, _), (M, N) = oa.shape, raw.shape[-2:]
    moments = raw.new_empty(B, n, update_launch_config(raw, C, viewed)[0], 2, dtype=torch.float32)
    return raw.new_empty(B, n, M, N), raw.new_empty(B, n, M, N), moments


@torch.library.custom_op("strawberry::gated_update_backward", mutates_args=())
def gated_update_backward_op(
    grad: Tensor, scale: Tensor, oa: Tensor, out: Tensor, z: Tensor, viewed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, n, M, N), C = grad.shape, oa.size(-1)
    grad, oa, out, z, scale = (x.contiguous() for x in (grad, oa, out, z, scale))
    tiles, shape = update_launch_config(grad, C, viewed)
    h, dz, d_raw = (torch.empty(B, n, M, N, dtype=z.dtype, device=z.device) for _ in range(3))
    d_scale = torch.empty(B, n, tiles, dtype=torch.float32, device=z.device)
    gate_backward_kernel[(tiles, B * n)](grad, out, scale, z, h, dz, d_scale, M, N, C, **shape, **UPDATE_LAUNCH)
    add_backward_kernel[(tiles, B * n)](grad, oa, dz, d_raw, M, N, C, **shape, **UPDATE_LAUNCH)
    return d_raw, d_scale.sum(-1)[..., None, None], dz, h


@gated_update_backward_op.register_fake
def _(grad, scale, oa, out, z, viewed):
    like = [z.new_empty(z.shape) for _ in range(3)]
    return like[0], scale.new_empty(scale.shape), *like[1:]

"""FP8 kernels: transpose, activation and quantization in one pass, concatenation and quantization in one pass."""

import torch
from torch import Tensor

from strawberry.ops.triton.common import NATIVE, fast_exp, fast_reciprocal, jit, tl


@jit
def transpose_kernel(x, y, ROWS, COLUMNS, TALL: tl.constexpr, WIDE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    tile = tl.load(x + r[:, None] * COLUMNS + c[None, :], mask=here, other=0)
    tl.store(y + c[:, None] * ROWS + r[None, :], tl.trans(tile), mask=tl.trans(here))


@torch.library.custom_op("strawberry::transpose_fp8", mutates_args=())
def transpose_op(x: Tensor) -> Tensor:
    x = x.contiguous()
    y, (grid, shape) = x.new_empty(x.size(1), x.size(0)), tile_grid(*x.shape, 64, 128)
    transpose_kernel[grid](x, y, *x.shape, **shape)
    return y


@transpose_op.register_fake
def _(x):
    return x.new_empty(x.size(1), x.size(0))


def tile_grid(rows: int, columns: int, tall: int = 128, wide: int = 64) -> tuple[tuple[int, int], dict]:
    """The grid of tiles, and the kernel's constants. The larger side of a tile gives coalesced memory access."""
    return (-(-rows // tall), -(-columns // wide)), {"TALL": tall, "WIDE": wide, "num_warps": 8}


# KIND in the kernels below
ACTIVATION_IDS = {"gelu": 0, "relu": 1, "relu2": 2, "swiglu": 3, "identity": 4, "gelu_tanh": 5}


@jit
def normal_cdf_pdf(x):
    """Φ(x) within 1e-7 (Abramowitz and Stegun 7.1.26) and φ(x) of the standard normal distribution."""
    z = tl.abs(x) * 0.7071067811865476
    t, e = fast_reciprocal(1.0 + 0.3275911 * z), fast_exp(-z * z)
    p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * p * t * e
    return tl.where(x >= 0, 1.0 - tail, tail), 0.3989422804014327 * e


@jit
def gelu_tanh_gate(x):
    """(s, x s') of GELU's approximation x s, s = σ(2 √(2/π) (x + 0.044715 x³)) = (1 + tanh(…)) / 2."""
    s = fast_reciprocal(1.0 + fast_exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    return s, x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit
def activation_value(x, g, KIND: tl.constexpr):
    if KIND == 0:
        return x * normal_cdf_pdf(x)[0]
    if KIND == 3:
        return x * g * fast_reciprocal(1.0 + fast_exp(-g))
    if KIND == 4:
        return x
    if KIND == 5:
        return x * gelu_tanh_gate(x)[0]
    x = tl.maximum(x, 0.0)
    return x * x if KIND == 2 else x


@jit
def pack_bytes(byte):
    """The same bytes, packed four to a register. Without this they stay in the halves of registers that the conversion
    gives, and ptxas 12.8 loses some of them in the transpose."""
    if NATIVE:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    return byte


@jit
def store_with_transpose(y, flipped, value, r, c, ROWS, COLUMNS, here, most):
    """Store a tile of `value`, clamped to ± most, in y's 8-bit dtype in y (ROWS, COLUMNS) and in its transpose."""
    byte = pack_bytes(tl.minimum(tl.maximum(value, -most), most).to(y.dtype.element_ty).to(tl.int8, bitcast=True))
    y, flipped = y.to(tl.pointer_type(tl.int8)), flipped.to(tl.pointer_type(tl.int8))
    tl.store(y + r[:, None] * COLUMNS + c[None, :], byte, mask=here)
    tl.store(flipped + c[:, None] * ROWS + r[None, :], tl.trans(byte), mask=tl.trans(here))


@jit
def act_quantize_kernel(
    h, y, flipped, scale, most, ROWS, COLUMNS, KIND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    at = h + r[:, None] * ((2 if KIND == 3 else 1) * COLUMNS) + c[None, :]
    x = tl.load(at, mask=here, other=0.0).to(tl.float32)
    g = tl.load(at + COLUMNS, mask=here, other=0.0).to(tl.float32) if KIND == 3 else x
    store_with_transpose(y, flipped, activation_value(x, g, KIND) * scale, r, c, ROWS, COLUMNS, here, most)


@jit
def act_quantize_backward_kernel(
    h, grad, more, y, flipped, scale, most, ROWS, COLUMNS, KIND: tl.constexpr, MORE: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    c = tl.program_id(1).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < COLUMNS)[None, :]
    WIDTH = (2 if KIND == 3 else 1) * COLUMNS
    at = h + r[:, None] * WIDTH + c[None, :]
    x = tl.load(at, mask=here, other=0.0).to(tl.float32)
    slope = tl.load(grad + r[:, None] * COLUMNS + c[None, :], mask=here, other=0.0).to(tl.float32) * scale
    if KIND == 0:
        below, density = normal_cdf_pdf(x)
        slope *= below + x * density
    elif KIND == 3:
        g = tl.load(at + COLUMNS, mask=here, other=0.0).to(tl.float32)
        s = fast_reciprocal(1.0 + fast_exp(-g))
        other = slope * x * s * (1.0 + g * (1.0 - s))
        if MORE:
            at = more + r[:, None] * WIDTH + COLUMNS + c[None, :]
            other += scale * tl.load(at, mask=here, other=0.0).to(tl.float32)
        store_with_transpose(y, flipped, other, r, COLUMNS + c, ROWS, WIDTH, here, most)
        slope *= g * s
    elif KIND == 2:
        slope *= 2.0 * tl.maximum(x, 0.0)
    elif KIND == 1:
        slope = tl.where(x > 0, slope, 0.0)
    elif KIND == 5:
        gate, change = gelu_tanh_gate(x)
        slope *= gate + change
    if MORE:
        slope += scale * tl.load(more + r[:, None] * WIDTH + c[None, :], mask=here, other=0.0).to(tl.float32)
    store_with_transpose(y, flipped, slope, r, c, ROWS, WIDTH, here, most)


@jit
def concat_quantize_kernel(
    first, second, third, y, flipped, scale, most, ROWS, A, B, C, a_row, b_row, c_row, TALL: tl.constexpr,
    WIDE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TALL + tl.arange(0, TALL)
    begin = tl.program_id(1) * WIDE  # a tile lies within one of the three
    c = begin.to(tl.int64) + tl.arange(0, WIDE)
    here = (r < ROWS)[:, None] & (c < A + B + C)[None, :]
    if begin < A:
        value = tl.load(first + r[:, None] * a_row + c[None, :], mask=here, other=0.0)
    elif begin < A + B:
        value = tl.load(second + r[:, None] * b_row + (c - A)[None, :], mask=here, other=0.0)
    else:
        value = tl.load(third + r[:, None] * c_row + (c - A - B)[None, :], mask=here, other=0.0)
    store_with_transpose(y, flipped, value.to(tl.float32) * scale, r, c, ROWS, A + B + C, here, most)


@torch.library.custom_op("strawberry::act_quantize", mutates_args=())
def act_quantize_op(h: Tensor, kind: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    h, number = h.contiguous(), ACTIVATION_IDS[kind]
    y, flipped = empty_with_transpose(h, h.size(1) // (2 if kind == "swiglu" else 1), dtype)
    grid, shape = tile_grid(*y.shape)
    act_quantize_kernel[grid](h, y, flipped, scale, torch.finfo(dtype).max, *y.shape, KIND=number, **shape)
    return y.view(torch.uint8), flipped.view(torch.uint8)


@torch.library.custom_op("strawberry::act_quantize_backward", mutates_args=())
def act_quantize_backward_op(
    h: Tensor, grad: Tensor, more: Tensor | None, kind: str, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    h, grad, other = h.contiguous(), grad.contiguous(), h if more is None else more.contiguous()
    y, flipped = empty_with_transpose(h, h.size(1), dtype)
    grid, shape = tile_grid(*grad.shape)
    shape |= {"KIND": ACTIVATION_IDS[kind], "MORE": more is not None}
    act_quantize_backward_kernel[grid](h, grad, other, y, flipped, scale, torch.finfo(dtype).max, *grad.shape, **shape)
    return y.view(torch.uint8), flipped.view(torch.uint8)


@torch.library.custom_op("strawberry::concat_quantize", mutates_args=())
def concat_quantize_op(
    first: Tensor, second: Tensor, third: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in (first, second, third)]
    widths = [part.size(1) for part in parts]
    if any(n % 64 for n in widths):  # otherwise a tile would lie in two parts
        raise ValueError(f"widths {widths}: each must be a multiple of 64")
    y, flipped = empty_with_transpose(first, sum(widths), dtype)
    grid, shape = tile_grid(*y.shape)
    rows = [part.stride(0) for part in parts]
    concat_quantize_kernel[grid](*parts, y, flipped, scale, torch.finfo(dtype).max, y.size(0), *widths, *rows, **shape)
    return y.view(torch.uint8), flipped.view(torch.uint8)


@concat_quantize_op.register_fake
def _(first, second, third, scale, dtype):
    return empty_with_transpose(first, first.size(1) + second.size(1) + third.size(1), torch.uint8)


def empty_with_transpose(h: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.size(0), columns, dtype=dtype), h.new_empty(columns, h.size(0), dtype=dtype)


@act_quantize_op.register_fake
def _(h, kind, scale, dtype):
    return empty_with_transpose(h, h.size(1) // (2 if kind == "swiglu" else 1), torch.uint8)


@act_quantize_backward_op.register_fake
def _(h, grad, more, kind, scale, dtype):
    return empty_with_transpose(h, h.size(1), torch.uint8)

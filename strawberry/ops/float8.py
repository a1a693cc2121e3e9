"""Matrix products in FP8."""

from collections.abc import Sequence

import torch
from torch import Tensor

from strawberry.ops.activations import ACTIVATIONS
from strawberry.ops.triton import common as kernels


def transpose_fp8(x: Tensor) -> Tensor:
    """x (n, m), one byte a number, as (m, n), contiguous."""
    if not kernels.can_run(x):
        return x.t().contiguous()
    return torch.ops.strawberry.transpose_fp8(x.view(torch.uint8)).view(x.dtype)


# What is between two products of a feed-forward: its values are wanted in 8 bits only, once as they lie, for the next
# product, and once transposed, for the gradient of its matrix; the gradients too. A kernel reads what there is once.


def act_quantize(h: Tensor, kind: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale · f(h), the same transposed) in 8 bits, f as in ACTIVATIONS: h (n, m), or (n, 2m) for "swiglu"."""
    if not kernels.can_run(h):
        y = quantize_fp8(ACTIVATIONS[kind][0](h.float()), scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.act_quantize(h, kind, scale, dtype))


def act_quantize_backward(
    h: Tensor, grad: Tensor, kind: str, scale: float, dtype: torch.dtype, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scale · the gradient of h, the same transposed) in 8 bits, `grad` (n, m) being that of f(h); `more`, shaped as
    h, is the gradient that h has from elsewhere."""
    if not kernels.can_run(h, grad):
        slope = ACTIVATIONS[kind][1](h.float(), grad.float())
        y = quantize_fp8(slope if more is None else slope + more, scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.act_quantize_backward(h, grad, more, kind, scale, dtype))


def concat_quantize(parts: Sequence[Tensor], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale · the parts side by side, the same transposed) in 8 bits: three (n, ·), of widths that are multiples of
    64."""
    if not kernels.can_run(*parts):
        y = quantize_fp8(torch.cat(parts, dim=1).float(), scale, dtype)
        return y, y.t().contiguous()
    return tuple(y.view(dtype) for y in torch.ops.strawberry.concat_quantize(*parts, scale, dtype))


def quantize_fp8(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """scale · x, the scale a power of 2, which changes no digit; what is beyond the type's numbers is cut."""
    most = torch.finfo(dtype).max
    return (x * scale).clamp(-most, most).to(dtype)

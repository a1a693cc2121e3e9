"""Count floating-point operations on the meta device, where tensors have shapes and no data.

`count_flops` runs a model there under torch's FlopCounterMode, which counts every matrix product of the plain path. An
operation whose plain path computes products and then masks them would be counted too high, so it reports its own count:
attention by its pattern, 4 · pairs · d per head, and a scan once per token. No architecture needs its own formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula


@torch.library.custom_op("strawberry::counted", mutates_args=())
def counted(y: Tensor, flops: float) -> Tensor:
    """Returns y, and adds `flops` operations to the count under FlopCounterMode."""
    return y.clone()


@counted.register_fake
def _(y, flops):
    return torch.empty_like(y)


@register_flop_formula(torch.ops.strawberry.counted)
def _flops_of_counted(y_shape, flops: float, *args, out_shape=None, **kwargs) -> int:
    return round(flops)


def count_flops(build: Callable[[], nn.Module], *inputs: Tensor, **named: Tensor | None) -> dict[str, int]:
    """Module path → floating-point operations of one forward pass of build() on inputs of these shapes; "" is the
    total."""
    with torch.device("meta"):
        model = build().eval()
    inputs = [x.to("meta") for x in inputs]
    named = {name: x if x is None else x.to("meta") for name, x in named.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs, **named)
    counts = {path.partition(".")[2]: sum(found.values()) for path, found in counter.get_flop_counts().items()}
    return counts | {"": counter.get_total_flops()}

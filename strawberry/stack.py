"""A stack of blocks, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from strawberry.context import ForwardContext


def run_blocks(
    blocks: Sequence[nn.Module], x: Tensor | tuple, ctx: ForwardContext, caches: list | None, partitions: int = 1
) -> Tensor | tuple:
    """Run all blocks on x: (B, T, C), or what else the blocks take and return. Under torch.compile and without caches,
    they become about `partitions` graphs."""
    if caches is None and partitions > 1 and torch.compiler.is_compiling():
        from strawberry.compile import run_compiled_blocks, run_compiled_partitions

        run = run_compiled_blocks if partitions == len(blocks) else run_compiled_partitions
        return run(blocks, x, ctx, partitions)
    for i, block in enumerate(blocks):
        x = block(x, ctx, None if caches is None else caches[i])
    return x

"""How torch.compile is given a stack of blocks in several graphs.

Imported only where it compiles: torch.compiler.disable loads all of torch._dynamo, which takes most of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from strawberry.context import ForwardContext


@torch.compiler.disable(recursive=False)
def run_compiled_partitions(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, n: int) -> Tensor:
    """Each n-th of the blocks is a graph of its own."""
    blocks = list(blocks)
    size = -(-len(blocks) // n)
    for i in range(0, len(blocks), size):
        x = run_partition(blocks[i : i + size], x, without_masks(ctx))
    return x


def run_partition(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext) -> Tensor:
    for block in blocks:
        x = block(x, ctx, None)
    return x


@torch.compiler.disable(recursive=False)
def run_compiled_blocks(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, n: int) -> Tensor:
    """Each block, or each step of one, is compiled by itself, so that what was compiled for the first serves them all;
    a stack as one graph would take as many times as long."""
    for block in blocks:
        retention = getattr(block, "retention", None)
        run = run_compiled_steps if retention is not None and retention.compile_steps else type(block).__call__
        x = run(block, x, without_masks(ctx), None)
    return x


@torch.compiler.disable(recursive=False)
def run_compiled_steps(block: nn.Module, x: Tensor, ctx: ForwardContext, caches: None) -> Tensor:
    """StrawberryBlock.forward, each step and each update of the weights a graph of its own."""
    w = block.weights()
    for i, kind in enumerate(block.steps):
        x, ug = block.step(getattr(block, kind), x, w, without_masks(ctx), None, i + 1 < len(block.steps))
        if i + 1 < len(block.steps):
            w = block.retention.update(w, ug, block, ctx, None)
    return x


def without_masks(ctx: ForwardContext) -> ForwardContext:
    """The context with no mask built yet: a graph that adds one would make the next call another, and compile again."""
    return replace(ctx, mask_cache={})

"""Compile a stack of blocks as several graphs.

Imported only by processes that compile: torch.compiler.disable loads all of torch._dynamo, which takes almost a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from strawberry.context import ForwardContext


@torch.compiler.disable(recursive=False)
def run_compiled_partitions(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, n: int) -> Tensor:
    """Run the blocks as about n graphs of ⌈len(blocks) / n⌉ consecutive blocks each."""
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
    """Compile each block, or each step of a block, as its own graph, so that all blocks share the code compiled for the
    first. Compiling the stack as one graph would take as many times as long as there are blocks."""
    for block in blocks:
        retention = getattr(block, "retention", None)
        run = run_compiled_steps if retention is not None and retention.compile_steps else type(block).__call__
        x = run(block, x, without_masks(ctx), None)
    return x


@torch.compiler.disable(recursive=False)
def run_compiled_steps(block: nn.Module, x: Tensor, ctx: ForwardContext, caches: None) -> Tensor:
    """StrawberryBlock.forward, with each step and each weight update as its own graph."""
    w = block.weights()
    for i, kind in enumerate(block.steps):
        x, ug = block.step(getattr(block, kind), x, w, without_masks(ctx), None, i + 1 < len(block.steps))
        if i + 1 < len(block.steps):
            w = block.retention.update(w, ug, block, ctx, None)
    return x


def without_masks(ctx: ForwardContext) -> ForwardContext:
    """The context with an empty mask cache: masks added by one graph would change the next call's guards and make it
    recompile."""
    return replace(ctx, mask_cache={})

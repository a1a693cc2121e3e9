"""How torch.compile is given a stack of blocks: as one graph, or in several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from strawberry.context import ForwardContext


def run_blocks(
    blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, caches: list | None, partitions: int = 1
) -> Tensor:
    """x (B, T, C) through all blocks; under torch.compile, without caches, in about as many graphs as `partitions`."""
    if caches is None and partitions > 1 and torch.compiler.is_compiling():
        run = run_compiled_blocks if partitions == len(blocks) else run_compiled_partitions
        return run(blocks, x, ctx, partitions)
    for i, block in enumerate(blocks):
        x = block(x, ctx, None if caches is None else caches[i])
    return x


@torch.compiler.disable(recursive=False)
def run_compiled_partitions(blocks: Sequence[nn.Module], x: Tensor, ctx: ForwardContext, n: int) -> Tensor:
    """Each n-th of the blocks is a graph of its own."""
    blocks = list(blocks)
    size = -(-len(blocks) // n)
    for i in range(0, len(blocks), size):
        x = run_blocks(blocks[i : i + size], x, without_masks(ctx), None)
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

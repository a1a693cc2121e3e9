"""Describe a model as text: modules, shapes, parameters, FLOPs per token, cache size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn


def summarize(model: nn.Module) -> str:
    """The model as a tree: modules, shapes, parameters, forward FLOPs per token; then the size of its cache."""
    T = model.config.block_size
    flops = {path: count / T for path, count in model.count_flops(T).items()}
    step = 3 * flops[""]  # backward costs twice the forward pass
    total, inner = model.num_params(non_embedding=False), model.num_params()
    lines = [
        f"{model.config.arch}: {total:,} parameters, {inner:,} without embeddings; "
        f"{step / 1e6:,.2f} MFLOP per token in a training step at T = {T}",
        *summarize_children(model, flops, "", ""),
    ]
    if model.causal:
        lines.append(describe_cache(model))
    return "\n".join(lines)


def summarize_children(module: nn.Module, flops: dict[str, float], prefix: str, indent: str) -> Iterator[str]:
    """Yields a line for each child, with its parameters' shapes; identical neighbours in a ModuleList share one."""
    if hasattr(module, "steps"):
        yield f"{indent}  steps: {' → '.join(module.steps)}"
    children = [
        (name, child, describe(child, flops.get(prefix + name)))
        for name, child in module.named_children() if is_shown(child)
    ]  # fmt: skip
    groups = [[row] for row in children]
    if isinstance(module, nn.ModuleList):
        groups = [list(group) for _, group in itertools.groupby(children, key=lambda row: row[2])]
    for group in groups:
        (name, child, line), last = group[0], group[-1][0]
        yield f"{indent}  {name if len(group) == 1 else f'{name} … {last}'}: {line}"
        yield from summarize_children(child, flops, f"{prefix}{name}.", indent + "    ")


def is_shown(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Dropout, nn.Identity)) and type(module).__name__ != "Rope"


def describe(module: nn.Module, flops: float | None) -> str:
    """One line: the module's type, sizes, parameter shapes and kFLOPs per token."""
    if isinstance(module, nn.ModuleList):
        return f"{len(module)}, one after the other"
    words = [type(module).__name__]
    if hasattr(module, "n_head") and hasattr(module, "d"):
        words.append(f"{module.n_head} heads of {module.d}")
    patterns = getattr(module, "patterns", None) or [getattr(module, "pattern", None)]
    windows = [str(pattern.size) for pattern in patterns if pattern is not None and pattern.size]
    if windows:
        words.append(f"window {', '.join(windows)}")
    words += [f"{name} {tuple(p.shape)}" for name, p in module.named_parameters(recurse=False)]
    if flops:
        words.append(f"{flops / 1e3:,.1f} kFLOP")
    return ", ".join(words)


def describe_cache(model: nn.Module) -> str:
    """The cache's bytes per row: a constant part, and a part for each token of context."""
    T = model.config.block_size
    source = torch.zeros(1, 1, dtype=torch.int64) if model.takes_source else None
    half, whole = (model.new_cache(1, n, source).nbytes() for n in (T // 2, T))
    each = (whole - half) / (T - T // 2)
    return f"cache of a row in float32: {whole - each * T:,.0f} bytes, and {each:,.0f} for each token up to {T}"

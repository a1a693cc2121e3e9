"""The blocks of a model, and operations on each of them: compilation, sharding and activation checkpointing."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def iterate_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules of the outermost ModuleLists: the model's blocks."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else iterate_blocks(child)


def compile_blocks(model: nn.Module, wanted: bool) -> None:
    """Compile each block and the head's loss separately, or undo that. Identical blocks are compiled once."""
    model.compile_loss = wanted
    if wanted:  # blocks that read all branches so far differ; each also has code with and without gradients
        n = 4 * sum(1 for _ in iterate_blocks(model))
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, n)
    for block in iterate_blocks(model):
        plain = type(block).forward.__get__(block)
        run = torch.compile(plain, dynamic=False) if wanted else plain
        if isinstance(block.forward, ActivationCheckpoint):
            block.forward.run = run
        elif wanted:
            block.forward = run
        else:
            vars(block).pop("forward", None)


def has_only_matmul_weights(block: nn.Module) -> bool:
    """Whether only matrix products read a block's matrices. These round their operands to half precision, so the
    all-gather may send the block's parameters in half precision. Routers' matrices are exempt, since they are small;
    norm scales and biases are rounded too."""
    for module in block.modules():
        roles, products = getattr(module, "roles", {}), getattr(module, "products", ())
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1 and name not in products and roles.get(name) != "router":
                return False
    return True


class ActivationCheckpoint:
    """Activation checkpointing: replaces a block's forward, saves only its input and recomputes the rest in backward.

    The recomputation does not change the routers' load counters.
    """

    def __init__(self, block: nn.Module):
        self.block, self.run = block, block.forward
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p for m in block.modules())
        block.forward = self

    def __call__(self, *args):
        if not torch.is_grad_enabled():
            return self.run(*args)
        contexts = {"context_fn": lambda: (contextlib.nullcontext(), self.uncounted())}
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=self.has_dropout, **contexts)

    @contextlib.contextmanager
    def uncounted(self):
        loads = [buffer for name, buffer in self.block.named_buffers() if name.rpartition(".")[2] == "load"]
        before = [load.clone() for load in loads]
        try:
            yield
        finally:
            for load, value in zip(loads, before, strict=True):
                load.copy_(value)

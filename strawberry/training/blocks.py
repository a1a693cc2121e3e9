"""The blocks of a model, for what is done to each: compiling, sharding and activation checkpointing."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def iterate_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the outermost lists: what a model has many of."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else iterate_blocks(child)


def compile_blocks(model: nn.Module, wanted: bool) -> None:
    """Compile each block by itself, and the head's loss, or undo it. Equal blocks are compiled once."""
    model.compile_loss = wanted
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
    """Whether a block's matrices are read by matrix products alone, which round them to half precision anyway: then
    they may travel in it. A router's are small, and the norms' scales and the biases are rounded with them."""
    for module in block.modules():
        roles, products = getattr(module, "roles", {}), getattr(module, "products", ())
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1 and name not in products and roles.get(name) != "router":
                return False
    return True


class ActivationCheckpoint:
    """Takes the place of a block's forward: what it keeps for the way back is its input, and it computes the rest anew.

    What routers count is counted once.
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

"""Memory of a training run: the device's, a step's, and the largest batch that fits."""

import contextlib
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strawberry import machine
from strawberry.common import UserError
from strawberry.data.loader import MAX_BATCH
from strawberry.sharding import divide_batch, to_local
from strawberry.training import cuda_graph, evaluation
from strawberry.training.console import format_bytes

MAX_CPU_TOKENS = 4096  # in a batch of batch_size "auto" on a CPU, where larger batches do not make a token cheaper
STATE_BYTES = {"adamw": 8, "muon": 4}  # of an optimizer's state per parameter


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device is out of memory. Only CUDA has an exception class for it."""
    signs = ("DefaultCPUAllocator: can't", "DefaultCPUAllocator: not enough", "MPS backend out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in signs)


def device_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that this process can still allocate, bytes in total)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return machine.memory()


def saved_for_backward(model: nn.Module, forward: Callable[[], object]) -> list[int]:
    """The sizes in bytes of the tensors that `forward()` saves for the backward pass, in order, except the model's
    parameters and buffers."""
    # by the address of the storage object, not of its data: tensors on the meta device have no data
    own = {to_local(t).untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
    saved = {}

    def add(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
        result = forward()
    del result
    return list(saved.values())


def refuse_large_model(model: nn.Module, run, device: torch.device) -> None:
    """Raises UserError if weights, gradients and optimizer take more than a CPU's machine has. The system would kill
    the process, and nothing would say why. `model` is on the meta device."""
    state = STATE_BYTES["muon" if run.optimizer_hyperparams.use_muon else "adamw"]  # at least
    n, there = sum(p.numel() for p in model.parameters()), machine.capacity()
    if device.type == "cpu" and n * (8 + state) > there:
        sizes = ", ".join(f"model_hyperparams.{key} ({getattr(run.model_hyperparams, key)})" for key in SIZES)
        raise UserError(f"the model has {n:,} parameters, which take {format_bytes(n * (8 + state))} with their "
                        f"gradients and the optimizer's state, and this machine has {format_bytes(there)} of memory. "
                        f"Lower {sizes}.")  # fmt: skip


SIZES = ("n_embd", "n_layer", "vocab_size")
SAFE_TOKENS = 1 << 16  # of a batch: below, activations are not estimated unless the model is large
TRANSIENT_COPIES = 3  # of the largest saved tensor, for temporary ones: the logits and their gradients


@dataclass
class MemoryEstimate:
    """An estimate of the bytes that training needs.

    It includes few of the temporary tensors of an operation. On a CPU, for a step of 4 or 16 rows, it was 0.60 of the
    measured growth of the process for config/tiny.json, 0.85 for strawberry-large.json and 1.02 for
    tinystar-v0.1-baseline.json.
    """

    weights: int
    gradients: int
    optimizer: int
    row: int  # saved for the backward pass for one row, plus TRANSIENT_COPIES times the largest saved tensor

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def describe(self, rows: int, block_size: int) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        text = ", ".join(f"{what} {format_bytes(n)}" for what, n in parts.items())
        return f"{text}, activations of {rows:,} rows of {block_size:,} tokens about {format_bytes(rows * self.row)}"


def largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n ≤ limit for which fits(n) is true; 0 if fits(1) is false. If n fits, every smaller n must fit too.

    >>> largest_fitting(lambda n: n <= 11, limit=100)  # tries 1, 2, 4, 8, 16, 12, 10, 11
    11
    """
    good, bad, n = 0, limit + 1, 1
    while bad - good > 1:
        good, bad = (n, bad) if fits(n) else (good, n)
        n = min(2 * n, limit) if bad > limit else (good + bad) // 2
    return good


class MemoryPlanner:
    """Finds the batch size that fits, and suggests keys to lower if memory is short."""

    def __init__(self, state, steps):
        self.state, self.steps = state, steps

    def choose_batch_size(self) -> None:
        """Check that the batch can be divided among the ranks. If batch_size is "auto", set it to the largest that
        fits."""
        run, world = self.state.run, self.state.ranks.world
        if run.batch_size == "auto":
            if self.state.ranks.sharded:  # the other ranks would wait for one that ran out of memory
                raise UserError(
                    f'batch_size = "auto": cannot be found with parallel "fsdp" on {world} processes; '
                    f"give a number, such as {world}"
                )
            run.batch_size = self.find_batch_size() * world
            print(f"batch_size   {run.batch_size:,}, the largest that fits; write it into the JSON to keep it")
        divide_batch(run.batch_size, run.gradient_accumulation_steps, self.state.ranks.rank, world)

    def refuse_large_batch(self) -> None:
        """Raises UserError if a step takes, by estimate, more than a CPU's machine has, for which the system would kill
        the process. Estimates nothing where a small model has a small batch."""
        if self.state.device.type != "cpu" or self.state.ranks.world > 1:
            return
        rows, T, there = self.state.rows, self.state.run.model_hyperparams.block_size, machine.capacity()
        if rows * T < SAFE_TOKENS and self.estimate(row=0).fixed < there // 4:
            return
        need = self.estimate()
        if (total := need.fixed + rows * need.row) > there:
            raise UserError(f"a step needs about {format_bytes(total)} of memory ({need.describe(rows, T)}), and this "
                            f"machine has {format_bytes(there)}. {self.suggest_memory_cuts()}")  # fmt: skip

    def find_batch_size(self) -> int:
        """The largest number of rows for which a rank has memory, at most one epoch.

        On a GPU, steps of more and more rows are tried. A CPU does not report the end of its memory, since the system
        then swaps or kills the process: there the estimate may be at most half of the free memory, and the batch at
        most MAX_CPU_TOKENS.
        """
        limit = max(1, min(self.state.corpus.train.n_windows, MAX_BATCH) // self.state.ranks.world)
        if self.state.device.type == "cpu":
            need, T = self.estimate(), self.state.run.model_hyperparams.block_size
            room = device_memory(self.state.device)[0] // 2 - need.fixed
            limit = max(1, int(self.state.ranks.broadcast_object(min(limit, MAX_CPU_TOKENS // T, room // need.row))))
        found = largest_fitting(self.fits, limit)
        if not found:
            raise torch.OutOfMemoryError("not even one row fits")
        return found

    def fits(self, rows: int) -> bool:
        """Whether every rank has memory for a step of so many rows, the optimizer's state, and 5 % more on a GPU."""
        spare = device_memory(self.state.device)[1] // 20 if self.state.device.type == "cuda" else 0
        fit = True
        try:
            need = self.estimate(row=0)
            buckets = need.gradients if self.state.ranks.world > 1 else 0  # of the all-reduce
            self.dry_run(rows, need.optimizer + buckets + spare)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fit = False
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.state.ranks.sum_numbers(fit)[0] == self.state.ranks.world

    def dry_run(self, rows: int, reserve: int) -> None:
        """Run a step's and an evaluation's passes over so many rows, with `reserve` bytes allocated. Raises an
        out-of-memory error if they do not fit."""
        reserved = torch.empty(reserve, dtype=torch.uint8, device=self.state.device)
        with self.steps.preserve_model():
            batch = evaluation.make_batch(
                self.state.objective, self.state.corpus.train, self.state.run.seed, 0, rows, self.state.device
            )
            self.steps.forward_backward(batch, min(self.state.run.gradient_accumulation_steps, 2))
        del reserved

    def estimate(self, row: int | None = None) -> MemoryEstimate:
        """The memory that training needs. `row`: that of one row, if it is known or does not matter."""
        weights = sum(
            to_local(p).nbytes for p in itertools.chain(self.state.model.parameters(), self.state.model.buffers())
        )
        optimizer = sum(STATE_BYTES[group["optimizer"]] * group["parameters"] for group in self.state.optimizer.groups)
        optimizer //= self.state.ranks.world if self.state.ranks.sharded else 1
        gradients = sum(to_local(p).nbytes for p in self.state.model.parameters())
        if row is None:
            with self.steps.preserve_model():  # of the second row only: casts of weights and tables are saved once
                one, two = (
                    saved_for_backward(self.state.model, lambda n=n: self.steps.forward_loss(n)) for n in (1, 2)
                )
            growth = [b - a for a, b in zip(one, two, strict=False)]
            row = max(sum(two) - sum(one) + TRANSIENT_COPIES * max(growth, default=0), 1)
        return MemoryEstimate(weights, gradients, optimizer, row)

    def out_of_memory_advice(self, status: str) -> str:
        """The message of an out-of-memory error: what needs how much memory, and which keys to lower."""
        when = f"at step {self.state.progress.step + 1:,}" if self.state.claimed else "before the first step"
        message = f"{self.state.device.type} is out of memory {when}"
        with contextlib.suppress(Exception):  # the advice is right even if the estimate fails
            gc.collect()
            if self.state.device.type == "cuda":
                torch.cuda.empty_cache()
            free, total = device_memory(self.state.device)
            rows, T = self.state.run.batch_size, self.state.run.model_hyperparams.block_size
            rows = 1 if rows == "auto" else self.state.rows
            need = self.estimate(row=1 if self.state.ranks.sharded else None)  # sharded passes need all ranks
            message += f", of {format_bytes(total)}: {need.describe(rows, T)}"
        return f"{message}; {status}. {self.suggest_memory_cuts()}"

    def suggest_memory_cuts(self) -> str:
        """The sentence that says which keys to lower if memory is short."""
        run, hyper = self.state.run, self.state.run.model_hyperparams
        rows, advice = run.batch_size, "Lower"
        if rows != "auto" and rows > self.state.ranks.world:
            numbers = f"{max(rows // 2, 1)} and {run.gradient_accumulation_steps * 2}"
            advice = (
                f"Halve batch_size and double gradient_accumulation_steps (to {numbers}), which computes the same, or "
                'set batch_size to "auto", or lower'
            )
        sizes = (f"model_hyperparams.{key} ({getattr(hyper, key)})" for key in ("block_size", "n_embd", "n_layer"))
        graph = ", or set cuda_graph to false" if run.cuda_graph and cuda_graph.can_capture(self.state.device) else ""
        return f"{advice} {', '.join(sizes)}{graph}."

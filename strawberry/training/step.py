"""One optimizer step: forward and backward, clipping, update; eager, compiled or as one CUDA graph."""

import contextlib
import math
import time
import warnings

import numpy as np
import torch
from torch import Tensor

from strawberry.common import first_line
from strawberry.data.objectives import Batch
from strawberry.data.order import derive_keys
from strawberry.sharding import divide_batch
from strawberry.training import cuda_graph, distributed, evaluation, memory, setup
from strawberry.training.console import warn


class TrainStep:
    """Optimizer steps. `take` has the same interface for eager steps, compiled steps and CUDA graphs."""

    def __init__(self, state):
        self.state = state

    def take(self, micro_batches: list[Batch], start: float) -> list[tuple[int, float, float, float]]:
        """Run the next optimizer step, eager, compiled or as a CUDA graph. Returns (step, loss, gradient norm, learning
        rate) of each step that has completed: this one, except that a CUDA graph's steps complete some calls later.
        Raises NonFinite if a loss or gradient is not finite."""
        state = self.state
        with state.ranks.device_step():
            if state.graph_step:
                return self.launch(micro_batches, start)
            loss, grad_norm = self.compute_gradients(micro_batches)
            lr = self.update_weights(loss, grad_norm)
        state.count(time.perf_counter() - start)
        return [(state.progress.step, loss, grad_norm, lr)]

    def launch(self, micro_batches: list[Batch], start: float) -> list[tuple[int, float, float, float]]:
        """Launch a step. Waits for it only if a log line, an evaluation or a checkpoint is due."""
        run, step = self.state.run, self.state.progress.step + 1
        self.draw_dropout()
        self.state.graph_step.launch(micro_batches, step, self.state.lr())
        self.state.count(0.0)
        intervals = run.log_interval, run.eval_interval, run.checkpoints.interval
        waits = step == 1 or any(map(self.state.due, intervals))
        completed = list(self.state.graph_step.completed(0 if waits else cuda_graph.MAX_QUEUED_STEPS))
        self.state.progress.seconds += time.perf_counter() - start
        return [(pending.step, loss, grad_norm, pending.lr) for pending, loss, grad_norm in completed]

    def compute_gradients(self, micro_batches: list[Batch]) -> tuple[float, float]:
        """(loss, gradient norm before clipping) over all ranks."""
        self.draw_dropout()
        loss = self.accumulate(micro_batches)
        self.state.ranks.all_reduce_([loss, *self.state.loads])
        norm = self.clip()
        # The only host synchronization of a step: a gradient that is not finite must not update the weights.
        return tuple(torch.stack((loss, norm)).tolist())

    def accumulate(self, micro_batches: list[Batch]) -> Tensor:
        """Accumulate the gradients of the mean loss over all targets of all micro-batches, as in one large batch: each
        micro-batch's mean is weighted by its share of the targets that are not ignored. With several ranks, the
        gradients are those of all ranks, and the returned loss is this rank's part of the mean."""
        total = self.state.ranks.total_targets(sum(batch.n_targets for batch in micro_batches))
        loss = torch.zeros((), device=self.state.device)
        for i, batch in enumerate(micro_batches, 1):
            if not self.state.ranks.stops_together:
                self.state.signals.raise_if_late()  # no state has changed yet
            with self.state.ranks.sync_context(last=i == len(micro_batches)):
                with self.state.autocast():
                    _, mean = self.state.forward(batch.x, batch.y, source=batch.source)
                share = mean * (batch.n_targets / total)
                share.backward(self.state.ranks.grad_seed)
            loss += share.detach()
        return loss

    def clip(self) -> Tensor:
        """Clip the gradients to `grad_clip`, and return their norm before clipping. AdamW on CUDA clips in its step."""
        norm = self.state.ranks.grad_norm(list(self.state.model.parameters()))
        self.state.optimizer.clip(norm, self.state.run.grad_clip)
        return norm

    def update_weights(self, loss: float, grad_norm: float) -> float:
        """Update the weights, and return the step's learning rate. Raises NonFinite, before any change, if the loss or
        the gradient is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise cuda_graph.NonFinite(cuda_graph.describe_non_finite(self.state.progress.step + 1, loss, grad_norm))
        lr = self.state.lr()
        self.state.optimizer.set_lr(lr / self.state.run.learning_rate)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.state.model.after_step()
        return lr

    def draw_dropout(self) -> None:
        """Seed dropout from (seed, position, rank)."""
        if not self.state.run.model_hyperparams.dropout:  # nothing is drawn, and seeding would slow down short steps
            return
        key = self.state.progress.position + (self.state.ranks.rank << 40)
        torch.manual_seed(int(derive_keys(self.state.run.seed, np.array([key]))[0]))

    def synchronize(self) -> None:
        """Wait for pending steps."""
        if self.state.graph_step:
            for _ in self.state.graph_step.completed(0):
                pass

    # -- before the first step

    def warm_up(self, compile: bool | str) -> float:
        """Run one forward and backward pass and discard the gradients: this compiles the model and detects errors
        before any file is changed, and outside the measured time. Returns the loss.

        An evaluation's pass is compiled at the first evaluation, since that takes as long again; here only the memory
        for its logits is tried.
        """
        batch = evaluation.make_batch(
            self.state.objective, self.state.corpus.train, self.state.run.seed, 0, self.state.rows, self.state.device
        )
        with self.preserve_model(), self.state.ranks.detect_peer_loss():
            if compile:
                print("compiling …", flush=True)
                # a warning of Inductor about one of its kernels, which users cannot act on
                warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled on the fly")
                self.state.forward = self.state.ranks.make_forward(
                    self.state.model, compile, self.has_unused_parameters
                )
                try:
                    loss = self.accumulate([batch])
                    self.try_memory_of_logits(batch)
                except Exception as error:
                    if memory.is_out_of_memory(error):
                        raise
                    reason = first_line(error)
                    warn(f"torch.compile failed, so that steps take longer ({type(error).__name__}: {reason})")
                    compile = False
            if not compile:
                self.state.forward = self.state.ranks.make_forward(self.state.model, False, self.has_unused_parameters)
                loss = self.forward_backward(batch)
            self.state.compiled = compile
            return self.state.ranks.sum_numbers(loss.item())[0]

    def try_memory_of_logits(self, batch: Batch) -> None:
        """Raises OutOfMemoryError if an evaluation's logits and their float32 copy do not fit. Steps need none, since
        their head computes the loss without logits."""
        if self.state.device.type == "cuda":
            torch.empty(batch.y.numel() * self.state.run.model_hyperparams.vocab_size * 6, dtype=torch.uint8,
                        device=self.state.device)  # fmt: skip

    def has_unused_parameters(self) -> bool:
        """Whether a step leaves parameters without a gradient, such as retention's if no chunk has an earlier chunk."""
        self.forward_loss(1).backward()
        return any(p.grad is None for p in self.state.model.parameters())

    def forward_backward(self, batch: Batch, times: int = 1) -> Tensor:
        """Run a step's forward and backward passes and an evaluation's forward pass, which needs more memory for its
        logits. Returns the loss."""
        loss = self.accumulate([batch] * times)
        with evaluation.evaluation_mode(self.state.model), self.state.autocast():
            self.state.forward(batch.x, batch.y, source=batch.source)
        return loss

    def forward_loss(self, rows: int) -> Tensor:
        batch = evaluation.make_batch(
            self.state.objective, self.state.corpus.train, self.state.run.seed, 0, rows, self.state.device
        )
        with self.state.autocast():
            return self.state.model(batch.x, batch.y, source=batch.source)[1]

    @contextlib.contextmanager
    def preserve_model(self):
        """A context that restores the model's buffers, such as the routers' load counters, and drops all gradients."""
        buffers = {name: buffer.clone() for name, buffer in self.state.model.named_buffers()}
        try:
            yield
        finally:
            self.state.optimizer.zero_grad()
            with torch.no_grad():
                for name, buffer in self.state.model.named_buffers():
                    buffer.copy_(buffers[name])

    def capture(self) -> None:
        """Capture a step as a CUDA graph for all steps from now on, if `cuda_graph` is set and the device supports it.
        If the capture fails, warns and continues without a graph."""
        run = self.state.run
        ranks = self.state.ranks
        if not run.cuda_graph or self.state.graph_step or not cuda_graph.can_capture(self.state.device):
            return
        rows, firsts = divide_batch(run.batch_size, run.gradient_accumulation_steps, ranks.rank, ranks.world)
        batches = [
            evaluation.make_batch(self.state.objective, self.state.corpus.train, run.seed, 0, rows, self.state.device)
        ] * len(firsts)
        graph_step, why = cuda_graph.CudaGraphStep(self, ranks.can_capture), ""
        try:
            with ranks.detect_peer_loss():
                graph_step.capture(batches)
        except Exception as error:
            graph_step.close()
            if memory.is_out_of_memory(error) or isinstance(error, distributed.PeerLost):
                raise
            reason = first_line(error)
            why = f"{type(error).__name__}: {reason}"
        if ranks.world > 1 and ranks.max_signal(bool(why)) and not why:  # all ranks use a graph, or none
            graph_step.close()
            why = "another process could not"
        if not why:
            self.state.graph_step = graph_step
            return
        del graph_step  # frees its memory before the next steps
        warn(f"a step cannot be captured as a CUDA graph, so that steps take longer ({why})")
        self.do_without_graph()

    def do_without_graph(self) -> None:
        """Continue without a graph. With several ranks, steps are called without a graph but still without host
        synchronization. A single process returns to synchronous steps."""
        if self.state.ranks.world == 1 or not self.state.ranks.can_capture:
            self.state.run.cuda_graph = False
            return
        self.state.forward = self.state.model
        self.state.ranks.reset()
        self.warm_up(setup.should_compile(self.state.run, self.state.device))
        self.state.ranks.can_capture = False
        self.capture()

    def release_graph(self) -> None:
        if self.state.graph_step:
            self.state.graph_step.close()
            self.state.graph_step = None

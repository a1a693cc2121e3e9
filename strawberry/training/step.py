"""One optimizer step: forward and backward, clipping, update; eager, compiled or as one CUDA graph."""

import contextlib
import math
import time

import numpy as np
import torch
from torch import Tensor

from strawberry.data.objectives import Batch
from strawberry.data.order import derive_keys
from strawberry.sharding import divide_batch
from strawberry.training import cuda_graph, distributed, evaluation, memory, setup
from strawberry.training.console import warn


class TrainStep:
    """Optimizer steps, behind one call: `take` does not tell whether a step is eager, compiled or one CUDA graph."""

    def __init__(self, state):
        self.state = state

    def take(self, micro_batches: list[Batch], start: float) -> list[tuple[int, float, float, float]]:
        """The next optimizer step, eager, compiled or as a CUDA graph: (step, loss, gradient norm, learning rate) of
        each step that has completed: this one, except that a CUDA graph's steps complete some calls later."""
        state = self.state
        if state.graph_step:
            return self.launch(micro_batches, start)
        loss, grad_norm = self.compute_gradients(micro_batches)
        lr = self.update_weights(loss, grad_norm)
        state.count(time.perf_counter() - start)
        return [(state.progress.step, loss, grad_norm, lr)]

    def launch(self, micro_batches: list[Batch], start: float) -> list[tuple[int, float, float, float]]:
        """A step that is launched, and not waited for unless something is due that needs it done."""
        run, step = self.state.run, self.state.progress.step + 1
        self.draw_dropout()
        self.state.graph_step.launch(micro_batches, step, self.state.lr())
        self.state.count(0.0)
        waits = step == 1 or any(map(self.state.due, (run.log_interval, run.eval_interval, run.checkpoints.interval)))
        completed = list(self.state.graph_step.completed(0 if waits else cuda_graph.MAX_QUEUED_STEPS))
        self.state.progress.seconds += time.perf_counter() - start
        return [(pending.step, loss, grad_norm, pending.lr) for pending, loss, grad_norm in completed]

    def compute_gradients(self, micro_batches: list[Batch]) -> tuple[float, float]:
        """(loss, norm of the gradient before clipping), of all ranks together."""
        self.draw_dropout()
        loss = self.accumulate(micro_batches)
        self.state.ranks.all_reduce_([loss, *self.state.loads])
        norm = self.clip()
        # Here, once in a step, the host waits for the device: no update by a gradient that is not finite.
        return tuple(torch.stack((loss, norm)).tolist())

    def accumulate(self, micro_batches: list[Batch]) -> Tensor:
        """The gradients of the mean loss over all targets of all micro-batches, as one large batch would give them:
        each micro-batch's mean is weighted by its share of the targets that are not ignored. Of several ranks, the
        gradients are all ranks' together, and the loss is this rank's part of it."""
        total = self.state.ranks.total_targets(sum(batch.n_targets for batch in micro_batches))
        loss = torch.zeros((), device=self.state.device)
        for i, batch in enumerate(micro_batches, 1):
            if not self.state.ranks.stops_together:
                self.state.signals.raise_if_late()  # nothing has changed yet
            with self.state.ranks.sync_context(last=i == len(micro_batches)):
                with self.state.autocast():
                    _, mean = self.state.forward(batch.x, batch.y, source=batch.source)
                share = mean * (batch.n_targets / total)
                share.backward(self.state.ranks.grad_seed)
            loss += share.detach()
        return loss

    def clip(self) -> Tensor:
        """The norm of the gradients, which the optimizer will bring to `grad_clip`."""
        norm = self.state.ranks.grad_norm(list(self.state.model.parameters()))
        self.state.optimizer.clip(norm, self.state.run.grad_clip)
        return norm

    def update_weights(self, loss: float, grad_norm: float) -> float:
        """One optimizer step; returns its learning rate. Raises NonFinite, before anything changes, where it must."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise cuda_graph.NonFinite(cuda_graph.describe_non_finite(self.state.progress.step + 1, loss, grad_norm))
        lr = self.state.lr()
        self.state.optimizer.set_lr(lr / self.state.run.learning_rate)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.state.model.after_step()
        return lr

    def draw_dropout(self) -> None:
        """Dropout is drawn from (seed, position), on each rank its own."""
        if not self.state.run.model_hyperparams.dropout:  # nothing is drawn, and a quick step would be slower for it
            return
        key = self.state.progress.position + (self.state.ranks.rank << 40)
        torch.manual_seed(int(derive_keys(self.state.run.seed, np.array([key]))[0]))

    def synchronize(self) -> None:
        """Wait for the steps that are on their way."""
        if self.state.graph_step:
            for _ in self.state.graph_step.completed(0):
                pass

    # -- before the first step

    def warm_up(self, compile: bool | str) -> float:
        """One forward and backward whose results are thrown away: compiles, and finds what won't work, before any file
        is touched and outside the time that is measured. Returns the loss."""
        batch = evaluation.make_batch(
            self.state.objective, self.state.corpus.train, self.state.run.seed, 0, self.state.rows, self.state.device
        )
        with self.preserve_model(), self.state.ranks.detect_peer_loss():
            if compile:
                print("compiling …", flush=True)
                self.state.forward = self.state.ranks.make_forward(
                    self.state.model, compile, self.has_unused_parameters
                )
                try:
                    loss = self.forward_backward(batch)
                except Exception as error:
                    if memory.is_out_of_memory(error):
                        raise
                    reason = str(error).strip().partition("\n")[0]
                    warn(f"torch.compile failed, so that steps take longer ({type(error).__name__}: {reason})")
                    compile = False
            if not compile:
                self.state.forward = self.state.ranks.make_forward(self.state.model, False, self.has_unused_parameters)
                loss = self.forward_backward(batch)
            return self.state.ranks.sum_numbers(loss.item())[0]

    def has_unused_parameters(self) -> bool:
        """Whether a step leaves parameters without a gradient, as retention's where no chunk has an earlier one."""
        self.forward_loss(1).backward()
        return any(p.grad is None for p in self.state.model.parameters())

    def forward_backward(self, batch: Batch, times: int = 1) -> Tensor:
        """The loss of a batch, after a step's passes and an evaluation's, which needs more memory for its logits."""
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
        """Whatever is computed in this block, model and gradients are then as before: routers have counted nothing."""
        buffers = {name: buffer.clone() for name, buffer in self.state.model.named_buffers()}
        try:
            yield
        finally:
            self.state.optimizer.zero_grad()
            with torch.no_grad():
                for name, buffer in self.state.model.named_buffers():
                    buffer.copy_(buffers[name])

    def capture(self) -> None:
        """Take steps as one CUDA graph from now on, where `cuda_graph` asks for it and this machine can."""
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
            reason = str(error).strip().partition("\n")[0]
            why = f"{type(error).__name__}: {reason}"
        if ranks.world > 1 and ranks.max_signal(bool(why)) and not why:  # all of them, or none
            graph_step.close()
            why = "another process could not"
        if not why:
            self.state.graph_step = graph_step
            ranks.start_heartbeat()
            return
        del graph_step  # frees its memory before the steps that follow
        warn(f"a step cannot be captured as a CUDA graph, so that steps take longer ({why})")
        self.do_without_graph()

    def do_without_graph(self) -> None:
        """Of several ranks the steps are called one by one, and the host still waits for none. One process takes them
        in the old way."""
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

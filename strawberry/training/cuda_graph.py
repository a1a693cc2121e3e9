"""Optimizer steps as one CUDA graph, launched without synchronizing with the device."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from strawberry.data.loader import map_tensors
from strawberry.data.objectives import Batch

MAX_QUEUED_STEPS = 4  # maximum number of launched steps that have not completed


def can_capture(device: torch.device) -> bool:
    """Whether the device supports steps without host synchronization, as one CUDA graph or called one by one."""
    return device.type == "cuda"


class NonFinite(Exception):
    """The loss, the gradient or a weight is NaN or infinite."""


class PendingStep(NamedTuple):
    """A step that was launched and has not completed."""

    step: int
    lr: float
    answer: Tensor  # (3,) in pinned memory: loss, gradient norm, and 1.0 if this and all earlier steps were finite
    ready: torch.cuda.Event | None  # recorded after the copy to `answer`


class CudaGraphStep:
    """Optimizer steps without host synchronization: forward, backward, clipping and update as one CUDA graph.

    A small model's step has some hundred kernels of a few microseconds each, which the host cannot launch fast enough.
    A large model's step ends with a host synchronization to check that the loss is finite. Here the device makes that
    check: if the loss or gradient is NaN or infinite, the update is skipped on the device, and so are all queued steps
    after it. The host sees this some steps later, when weights and optimizer state are still those before the step.

    `step` is captured. On devices other than CUDA, or if `graph` is False, it is called without a graph. Each rank
    launches its own graph, which contains its NCCL collectives, so all ranks must launch the same steps.
    """

    WARM_UP = 2  # steps before the capture, in which memory is allocated and kernels are selected
    WARM_UP_TOGETHER = 11  # DDP forms its buckets in the second step, and synchronizes to measure times in ten

    def __init__(self, steps, graph: bool = True):
        self.steps, self.state = steps, steps.state
        self.optimizer, device = self.state.optimizer, self.state.device
        self.all_finite = torch.zeros((), device=device)  # 1.0 while all losses and gradients have been finite
        self.found_inf = torch.ones((), device=device)
        self.answer = torch.zeros(3, device=device)
        self.graph = torch.cuda.CUDAGraph() if graph and device.type == "cuda" else None
        self.pending: collections.deque[PendingStep] = collections.deque()
        self.step_calls = 0  # calls of step() since the capture began
        self.captured = False

    def capture(self, micro_batches: list[Batch]) -> None:
        """Capture a step for batches of these shapes. It does not train, because `all_finite` is still zero."""
        self.inputs = [map_tensors(batch, torch.clone) for batch in micro_batches]
        self.optimizer.to_device(self.found_inf)
        if self.graph is not None:
            warm_up = self.WARM_UP if self.state.ranks.world == 1 else self.WARM_UP_TOGETHER
            here = torch.cuda.current_stream()
            aside = torch.cuda.Stream() if here == torch.cuda.default_stream() else here
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(warm_up):
                    self.step()
            here.wait_stream(aside)
            # thread_local: CUDA calls of other threads, such as NCCL's watchdog, do not invalidate the capture
            with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
                self.step()
            self.optimizer.count(-self.step_calls)
        self.optimizer.count(0)
        self.all_finite.fill_(1.0)
        self.captured = True

    def step(self) -> None:
        state = self.state
        self.optimizer.zero_grad()
        loss = self.steps.accumulate([batch._replace(n_targets=(batch.y >= 0).sum()) for batch in self.inputs])
        state.ranks.all_reduce_([loss, *state.loads])
        norm = self.steps.clip()  # the same on all ranks, as is the loss, so all ranks decide alike
        self.all_finite *= torch.isfinite(loss + norm)
        self.found_inf.copy_(1 - self.all_finite)
        self.optimizer.step()
        self.step_calls += 1
        state.model.after_step(self.all_finite)
        self.answer.copy_(torch.stack((loss, norm, self.all_finite)))

    def launch(self, micro_batches: list[Batch], step: int, lr: float) -> None:
        """Launch the step numbered `step` over these batches."""
        for mine, new in zip(self.inputs, micro_batches, strict=True):
            for a, b in zip(mine[:3], new[:3], strict=True):
                if a is not None:
                    a.copy_(b, non_blocking=True)
        self.optimizer.set_lr(lr / self.state.run.learning_rate)
        if self.graph is None:
            self.step()
            self.optimizer.count(0)
        else:
            self.graph.replay()
            self.optimizer.count(1)
        if not self.answer.is_cuda:
            self.pending.append(PendingStep(step, lr, self.answer.clone(), None))
            return
        answer, ready = torch.empty(3, pin_memory=True), torch.cuda.Event()
        answer.copy_(self.answer, non_blocking=True)
        ready.record()
        self.pending.append(PendingStep(step, lr, answer, ready))

    def completed(self, lag: int) -> Iterator[tuple[PendingStep, float, float]]:
        """Yields (pending step, loss, gradient norm) of each completed step, in order; waits until at most `lag` steps
        are pending. Raises NonFinite at the first step that was skipped. All ranks must raise it after the same launch,
        so with several ranks the host never polls for steps that complete earlier."""
        ranks = self.state.ranks
        while self.pending and (len(self.pending) > lag or self.pending[0].ready is None or (
                ranks.world == 1 and self.pending[0].ready.query())):  # fmt: skip
            pending = self.pending[0]
            if pending.ready is not None:
                ranks.wait_for(pending.ready)
            self.pending.popleft()
            loss, norm, good = pending.answer.tolist()
            if not good:
                self.optimizer.count(-len(self.pending) - 1)
                self.pending.clear()
                self.state.rewind_progress(pending.step)
                raise NonFinite(describe_non_finite(pending.step, loss, norm))
            yield pending, loss, norm

    def close(self) -> None:
        """Release the graph and return the optimizer to host control."""
        if self.step_calls and not self.captured:
            self.optimizer.count(-self.step_calls)
        self.optimizer.to_host()
        self.optimizer.zero_grad()
        # after a failed capture, torch's generator would wait for its end forever
        if self.graph is not None and not self.captured:
            device = self.all_finite.device.index or 0
            torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator(self.all_finite.device))
        self.graph = None


def describe_non_finite(step: int, loss: float, norm: float) -> str:
    found = f"the loss is {loss:g} and the norm of the gradient {norm:g}"
    return f"step {step:,}: {found}, so the weights were not updated"


NON_FINITE_ADVICE = "Try a lower learning_rate, a longer warmup_iters or a lower grad_clip."

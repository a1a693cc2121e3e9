"""The state of a run, which its components read and write.

Progress    the run's position: saved in a checkpoint besides weights, optimizer state and configuration
TrainState  configuration, device, processes, data, model, optimizer and progress, and values derived from them
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from optimizer import lr_at
from strawberry.data.loader import Loader
from strawberry.sharding import batch_parts
from strawberry.training import distributed
from strawberry.training.console import Console
from strawberry.training.lock import Lock
from strawberry.training.metrics import METRICS, Metrics
from strawberry.training.signals import Signals


@dataclass
class Progress:
    """A run's position: all that a checkpoint saves besides weights, optimizer state and configuration."""

    step: int = 0  # completed optimizer steps
    tokens: int = 0
    seconds: float = 0.0  # time in steps, without evaluations and saves
    skipped: int = 0  # steps whose data was skipped by rollbacks
    rollbacks: list[dict] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The next step's position in the data, in steps. It determines the step's batches and dropout."""
        return self.step + self.skipped


class TrainState:
    """A run's state. train.py's Trainer is one; steps, checkpoints, evaluation and memory planning share it.

    Set by the constructor: run (the configuration), signals, config (the path that it was read from), console,
    metrics, root (checkpoints.path). Set by Trainer.set_up: device, dtype, ranks, lock, encoder, corpus, objective,
    model, forward (the model as steps call it: compiled, or wrapped in DDP), loads (the routers' load counters),
    optimizer, lengths (bytes of each token).
    """

    def __init__(self, run, signals: Signals, config: str | None = None, quiet: bool = False):
        self.run, self.signals, self.config = run, signals, config
        self.console = Console(quiet)
        self.root = Path(run.checkpoints.path)
        self.metrics = Metrics(self.root / METRICS)
        self.ranks: distributed.SingleProcess | distributed.ProcessGroup = distributed.SingleProcess()
        self.lock: Lock | None = None
        self.progress = Progress()
        self.evaluated = self.saved = -1  # the last step that was evaluated or saved
        self.val_loss: float | None = None
        self.save_failed = False
        self.claimed = False  # whether checkpoints.path is this run's
        self.compiled: bool | str = False  # whether steps are compiled; "blocks": block by block
        self.graph_step = None  # a CudaGraphStep, once steps are captured
        self.command: str | None = None  # the command line that repeats the run, where it has one
        self.on_loss: Callable[[distributed.PeerLost], object] | None = None  # see distributed.Heartbeat

    @property
    def rows(self) -> int:
        """Rows of a micro-batch on this rank."""
        return self.run.batch_size // batch_parts(self.run.batch_size, self.ranks.world)[0]

    @property
    def tokens_per_step(self) -> int:
        return self.run.gradient_accumulation_steps * self.run.batch_size * self.run.model_hyperparams.block_size

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Of a training step. Counting them builds the model once more, without memory."""
        return self.model.flops_per_token(self.run.model_hyperparams.block_size)

    def due(self, interval: int) -> bool:
        """Whether an action is due: every `interval` steps, and after the last step."""
        return self.progress.step % interval == 0 or self.progress.step >= self.run.max_iters

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def batches(self) -> Loader:
        run = self.run
        order = (run.seed, run.batch_size, run.gradient_accumulation_steps)
        place = (self.device, self.progress.position, self.ranks.rank, self.ranks.world)
        return Loader(self.corpus.train, *order, *place, objective=self.objective)

    def lr(self) -> float:
        """The next step's learning rate."""
        return lr_at(self.progress.step, self.run) * 0.5 ** len(self.progress.rollbacks)

    def count(self, seconds: float) -> None:
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.seconds += seconds

    def rewind_progress(self, step: int) -> None:
        """Undo the count of this step and of those after it, whose updates were skipped."""
        p = self.progress
        p.tokens -= (p.step - step + 1) * self.tokens_per_step
        p.step = step - 1

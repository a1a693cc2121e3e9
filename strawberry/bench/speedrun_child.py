"""One run of `bench.py speedrun`: nanoGPT's train.py or this one, and its validation loss at regular steps.

Both are measured by the same Stopwatch: it waits for the device, is paused during evaluations, and separates
compilation from steps. nanoGPT's files are not changed: calls of its model's eval() and train() mark the beginning and
the end of its own evaluation.
"""

import contextlib
import importlib
import json
import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from model import CONFIGS
from strawberry.bench import hardware
from strawberry.bench.train import BenchmarkTrainer, enter_nanogpt_folder
from strawberry.common import atomic_write
from strawberry.data.objectives import Batch
from strawberry.device import choose_device
from strawberry.run_config import Run, load_run
from strawberry.training.cuda_graph import NonFinite
from strawberry.training.evaluation import Evaluator, evaluation_mode, mean_loss
from strawberry.training.signals import Signals

EVAL_ROWS = 8  # windows of a pass of nanoGPT's evaluation, which is not compiled
PROBED = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "max_iters",
          "learning_rate", "min_lr", "warmup_iters", "dropout", "dtype")  # fmt: skip


class Stopwatch:
    """Seconds of training, from its creation on, except between pause() and resume()."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.first_step = device, 0.0, 0.0
        self.paused = False
        self.since = hardware.synchronized_time(device)

    def read(self) -> float:
        """Seconds up to now, after the device has finished all that is queued."""
        return self.seconds if self.paused else self.seconds + hardware.synchronized_time(self.device) - self.since

    def pause(self) -> None:
        self.seconds, self.paused = self.read(), True

    def resume(self) -> None:
        self.since, self.paused = hardware.synchronized_time(self.device), False

    def end_first_step(self) -> None:
        self.first_step = self.read()


@dataclass
class Point:
    """An evaluation: `seconds` are those of the Stopwatch, with compilation."""

    step: int
    seconds: float
    loss: float


def summarize(points: list[Point], first_step: float, tokens_per_step: int) -> dict:
    """{"curve": [[step, tokens, seconds in steps, loss], …], "compile_s": seconds of compilation, "step_s": seconds of
    a step}.

    Compilation is the stopwatch's time at the end of the first step, minus the mean time of a later step. `loss` is
    None where it is not finite.
    """
    last = points[-1] if points else Point(0, 0.0, math.nan)
    step_s = (last.seconds - first_step) / (last.step - 1) if last.step > 1 else first_step
    compile_s = first_step - step_s
    curve = [[p.step, p.step * tokens_per_step, p.seconds - compile_s if p.step else 0.0,
              p.loss if math.isfinite(p.loss) else None] for p in points]  # fmt: skip
    return {"curve": curve, "compile_s": compile_s, "step_s": step_s}


def write_result(path: str, result: dict, device: torch.device) -> None:
    about = {"machine": hardware.describe_device(device), "torch": torch.__version__}
    atomic_write(Path(path), json.dumps(result | about).encode())


# ---- nanoGPT --------------------------------------------------------------------------------------------------------


class NanogptMeter:
    """Counts the optimizer steps of a nanoGPT train.py, and evaluates its model on our windows where it evaluates."""

    def __init__(self, watch: Stopwatch, windows: np.ndarray, context):
        self.watch, self.windows, self.context = watch, windows, context
        self.steps, self.points = 0, []

    def install(self, model_class: type[nn.Module]) -> None:
        """Pause the stopwatch from model.eval() until model.train(), with which nanoGPT's estimate_loss begins and
        ends, and add a point of our evaluation before it continues.
        """
        set_mode = model_class.train

        def train(model: nn.Module, mode: bool = True) -> nn.Module:
            if not mode and not self.watch.paused:
                self.watch.pause()
            elif mode and self.watch.paused:
                set_mode(model, False)
                self.add_point(model)
                set_mode(model, True)
                self.watch.resume()
                return model
            return set_mode(model, mode)

        model_class.train = train
        register_optimizer_step_post_hook(self.count_step)

    def count_step(self, *_) -> None:
        self.steps += 1
        if self.steps == 1:
            self.watch.end_first_step()

    def add_point(self, model: nn.Module) -> None:
        with self.context:
            loss = measure_loss(model, self.windows, self.watch.device)
        self.points.append(Point(self.steps, self.watch.read(), loss))
        print(f"speedrun: step {self.steps}, {self.points[-1].seconds:.2f} s, validation loss {loss:.4f}", flush=True)


@torch.no_grad()
def measure_loss(model: nn.Module, windows: np.ndarray, device: torch.device) -> float:
    """nats per token over all targets of the windows (n, block_size + 1), of a model with nanoGPT's interface."""
    total = 0.0
    for first in range(0, len(windows), EVAL_ROWS):
        rows = torch.from_numpy(windows[first : first + EVAL_ROWS].astype(np.int64)).to(device)
        total += model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1].item() * len(rows)
    return total / len(windows)


def shift_seeds(by: int) -> None:
    """Make torch.manual_seed add `by` to its seed, since that of nanoGPT's train.py is fixed."""
    original = torch.manual_seed
    torch.manual_seed = lambda seed: original(seed + by)


def nanogpt_child(argv: list[str]) -> None:
    """The main function of a child: run nanoGPT's train.py, and write its curve."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    windows, device = np.load(job["windows"]), torch.device(job["device"])
    enter_nanogpt_folder(job["folder"], job["words"])
    model_class = importlib.import_module("model").GPT
    context = contextlib.nullcontext()  # as its own `ctx`
    if device.type != "cpu":
        context = torch.autocast(device.type, getattr(torch, job["dtype"]))
    shift_seeds(job["seed"] - 1)
    torch.save = lambda *_, **__: None  # neither side writes checkpoints
    meter = NanogptMeter(Stopwatch(device), windows, context)
    meter.install(model_class)
    runpy.run_path("train.py", run_name="__main__")
    write_result(job["result"], summarize(meter.points, meter.watch.first_step, job["tokens_per_step"]), device)


class Probed(BaseException):
    """Raised to end train.py once its settings are known. A BaseException, so that no handler of its own catches it."""


def probe_child(argv: list[str]) -> None:
    """The main function of a child: run nanoGPT's train.py up to its model, without memory for it, and print its
    settings and the number of its parameters.
    """
    folder, *words = argv
    enter_nanogpt_folder(folder, words)
    model_class, found = importlib.import_module("model").GPT, {}
    make = model_class.__init__

    def init(model: nn.Module, *arguments) -> None:
        with torch.device("meta"):
            make(model, *arguments)
        scope = sys._getframe(1).f_globals  # of train.py
        found.update({name: scope[name] for name in PROBED})
        found.update(count_params(model))
        raise Probed

    model_class.__init__ = init
    with contextlib.suppress(Probed):
        runpy.run_path("train.py", run_name="__main__")
    print("\n" + json.dumps(found), flush=True)


def count_params(model: nn.Module) -> dict[str, int]:
    """All parameters, and those that are neither an embedding's nor a head's. A matrix that two modules share is
    counted once.
    """
    total = sum(p.numel() for p in model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    tables |= {id(head.weight): head.weight.numel()} if head is not None else {}
    return {"params_total": total, "params": total - sum(tables.values())}


# ---- ours -----------------------------------------------------------------------------------------------------------


class HeldOut:
    """Held-out windows (n, block_size + 1), as both a split and an objective. The last batch is padded with rows
    without targets, so that all batches have the shape of a training batch and nothing is compiled again.
    """

    has_bits_per_byte = True

    def __init__(self, windows: np.ndarray, rows: int):
        self.windows, self.n_batches = windows.astype(np.int64), -(-len(windows) // rows)
        self.n_windows = self.n_batches * rows

    def make_batch(self, split, seed: int, first: int, count: int) -> Batch:
        """Rows first … first + count − 1. `split` and `seed` are not read."""
        rows = self.windows[first : first + count]
        missing = count - len(rows)
        x = np.concatenate((rows[:, :-1], np.repeat(self.windows[:1, :-1], missing, axis=0)))
        y = np.concatenate((rows[:, 1:], np.full_like(self.windows[:1, 1:], -1).repeat(missing, axis=0)))
        return Batch(x, y, None, rows[:, 1:].size)


class HeldOutEvaluator(Evaluator):
    """The loss of held-out windows, compiled as train.py's evaluations are."""

    def __init__(self, state, windows: np.ndarray):
        super().__init__(state)
        self.windows = windows

    def sum_losses(self) -> dict:
        rows = self.state.run.batch_size
        held_out = HeldOut(self.windows, rows)
        with self.state.autocast(), self.stance():
            loss = mean_loss(self.state.forward, held_out, held_out.n_batches, rows, self.state.lengths, held_out)[0]
        return {"val_loss": loss}


class SpeedrunTrainer(BenchmarkTrainer):
    """train.py's own loop until the loss of the held-out windows is at most `target`."""

    def __init__(self, run: Run, windows: np.ndarray, target: float):
        super().__init__(run, Signals())
        self.evaluator = HeldOutEvaluator(self, windows)
        self.target, self.points = target, []

    def train_to_target(self) -> None:
        self.watch = Stopwatch(choose_device(self.run.device))
        self.prepare()
        with contextlib.suppress(NonFinite):  # the points up to then are the result
            self.train()

    def evaluate(self) -> None:
        self.watch.pause()
        with evaluation_mode(self.model):
            loss = self.evaluator.compute_losses()["val_loss"]
        self.evaluated = self.progress.step
        self.points.append(Point(self.progress.step, self.watch.read(), loss))
        print(f"speedrun: step {self.progress.step}, {self.watch.read():.2f} s, validation loss {loss:.4f}", flush=True)
        if loss <= self.target:
            self.run.max_iters = self.progress.step  # the schedule depends on lr_decay_iters, not on this
        self.watch.resume()

    def log(self, bar, step: int, loss: float, *about) -> None:
        super().log(bar, step, loss, *about)
        if step == 1:
            self.watch.end_first_step()


def strawberry_child(argv: list[str]) -> None:
    """The main function of a child: train a config up to the target, and write its curve."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    run = load_run(["--config", job["config"]], CONFIGS)
    trainer = SpeedrunTrainer(run, np.load(job["windows"]), job["target"])
    trainer.train_to_target()
    found = summarize(trainer.points, trainer.watch.first_step, trainer.tokens_per_step)
    about = {"compiled": bool(trainer.compiled), "cuda_graph": bool(trainer.graph_step)}
    write_result(job["result"], found | about, trainer.device)
    trainer.close()

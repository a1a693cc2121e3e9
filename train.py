"""Trains a language model: a token file and a JSON file in, one model file out.

    python train.py --config tiny.json                        # from scratch
    python train.py --config tiny.json --init_from=resume     # go on from the newest good checkpoint
    python train.py --help                                    # every key

Each step is a pure function of the weights, the optimizer's state, the seed and the step's number: batches and dropout
are drawn from (seed, step). So a resumed run is, on a CPU, the uninterrupted run bit for bit.

What it writes:  checkpoints.path/step_…         to resume from
                 checkpoints.path/metrics.jsonl  every logged step and every evaluation, one JSON object a line
                 img_path/*.png                  the curves, redrawn at each evaluation
                 model_path                      the trained model, when all steps are done
A run from scratch moves what an earlier run left in checkpoints.path to earlier_1, earlier_2, … in there.

Exit codes:  0 all steps done · 2 a mistake to mend, nothing changed · 3 the loss or the gradient was not finite, the
weights were not touched · 130 SIGINT, 143 SIGTERM: the step was finished and saved. A second signal leaves at once.

Index:  signals · metrics.jsonl · evaluation · getting ready · the trainer · the command
"""

import os
import signal
import sys

if __name__ == "__main__":  # importing torch takes seconds, in which there is nothing to save yet
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))

import contextlib
import itertools
import json
import math
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import dataset
import encoder as encoders
import plot
from checkpoint import newest, save_checkpoint, save_model, set_aside, write_model, write_state
from dataset import Batch, Corpus, Loader, NextToken, Split
from model import CONFIGS, build
from optimizer import build_optimizer, lr_at
from options import UserError, atomic_write, load_run, run_cli, to_dict

METRICS = "metrics.jsonl"
EVAL_SEED = 0  # of the windows that evaluations read: the same whatever the run's seed is
STRICT_POSITIONS = 512
COMPILE_ON_CPU_FROM = 5000  # steps; see worth_compiling

# ---- signals -------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. A BaseException, so that nobody on the way takes it for an error of their own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Lets SIGINT and SIGTERM arrive where nothing is half done, by raising Interrupted there.

    The first one is raised at once, wherever the program is, unless it is inside `with signals.held():`; then it is
    raised at the end of that block. A second one ends the process.
    """

    def __init__(self):
        self.received: int | None = None
        self.heard = False  # Interrupted was caught: from here on, nothing is raised again
        self.depth = 0  # of held() blocks

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if not self.depth:
            raise Interrupted(number)

    @contextlib.contextmanager
    def held(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.received is not None and not self.depth and not self.heard:
            raise Interrupted(self.received)


# ---- metrics.jsonl -------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: one JSON object a line, in order of steps. A full disk costs no line: it is written later."""

    def __init__(self, path: Path):
        self.path, self.pending = path, []

    def rewind(self, step: int) -> list[dict]:
        """Drop what an interrupted run logged after `step`, which is about to be done again; returns what is left."""
        lines = plot.read_metrics(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        return kept

    def add(self, **values) -> None:
        self.pending.append(json.dumps({key: plain(value) for key, value in values.items()}) + "\n")
        try:
            with open(self.path, "ab") as file:
                end = file.tell()
                try:
                    file.write("".join(self.pending).encode())
                    file.flush()
                except OSError:
                    file.truncate(end)  # no half line
                    raise
            self.pending = []
        except OSError as error:
            warn(f"cannot write {self.path} ({error.strerror}); its lines are kept and written later")


def plain(value):
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Without dropout and gradients, and back to training whatever happens."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def byte_lengths(encoder, vocab_size: int) -> Tensor:
    """(vocab_size,) how many bytes of text each id stands for: none for specials and for ids that nothing uses."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for i in range(encoder.vocab_size):
        lengths[i] = len(encoder.token_bytes(i))
    lengths[list(encoder.specials.values())] = 0
    return lengths


def make_batch(objective, split, seed: int, first: int, count: int, device) -> Batch:
    """The batch of samples first … first + count − 1, on the device."""
    return dataset.tensors(objective.batch(split, seed, first, count), lambda part: torch.from_numpy(part).to(device))


def mean_loss(forward, split, batches: int, rows: int, lengths: Tensor, objective=None) -> tuple[float, float]:
    """(nats per token, bits per byte) over the targets of the first samples of a split, at most all of them, each once;
    the same in every evaluation of every run.

    bits per byte = nats / ln 2 · tokens / bytes, where bytes are those of the target tokens' text: unlike the loss, it
    can be compared between vocabularies. NaN where the objective's targets are no text.
    """
    objective = objective or NextToken()
    nats, n_bytes, count = [], [], 0
    for i in range(min(batches, max(1, split.n_windows // rows))):
        batch = make_batch(objective, split, EVAL_SEED, i * rows, rows, lengths.device)
        nats.append(forward(batch.x, batch.y, source=batch.source)[1].detach().float() * batch.n_targets)
        n_bytes.append((lengths[batch.y.clamp(min=0)] * (batch.y >= 0)).sum())
        count += batch.n_targets
    total, n_bytes = (sum(torch.stack(values).tolist()) for values in (nats, n_bytes))
    return total / max(count, 1), total / math.log(2) / n_bytes if n_bytes and objective.in_bytes else math.nan


def strict_loss(model: nn.Module, split: Split, positions: int = STRICT_POSITIONS, rows: int = 16, device="cpu"):
    """(strict, plain) mean loss in nats over the same target tokens, one each from the first windows of a split.

    strict: each token is predicted from its own prefix, alone, in a batch of one: what the model can really do.
    plain: the loss that evaluations show, of whole windows in batches of `rows`. For a causal model the two are equal;
    a model that sees the future (`model.causal` is False) looks better in the plain one than it is.
    """
    step = (math.sqrt(5) - 1) / 2  # the golden ratio's multiples are spread evenly over the places of a window
    strict, plain_loss = [], []
    for first in range(0, positions, rows):
        count = min(rows, positions - first)
        x, y, *_ = make_batch(NextToken(), split, EVAL_SEED, first, rows, device)
        log_p = model(x)[0].float().log_softmax(dim=-1)
        for row in range(count):
            t = int((first + row) * step % 1 * split.block_size)
            alone = model(x[row : row + 1, : t + 1])[0][0, -1].float().log_softmax(dim=-1)
            strict.append(-alone[y[row, t]])
            plain_loss.append(-log_p[row, t, y[row, t]])
    return torch.stack(strict).mean().item(), torch.stack(plain_loss).mean().item()


def sample_text(model: nn.Module, encoder, prompt: str, length: int, seed: int, device) -> str:
    """The prompt and `length` tokens after it; without a prompt, the start of a document."""
    start = encoder.encode(prompt) or [encoder.eot]
    tokens = sample_tokens(model, start, length, seed, device)
    tokens = tokens if prompt else tokens[1:]
    return encoder.decode([token for token in tokens if token < encoder.vocab_size])  # the model may have spare ids


def sample_answer(model: nn.Module, encoder, source: list[int], length: int, seed: int, device) -> str:
    """A source, and what an encoder-decoder makes of it: up to its end, or `length` tokens."""
    tokens = sample_tokens(model, [encoder.eot], length, seed, device, source)[1:]
    answer = list(itertools.takewhile(lambda token: token != encoder.eot, tokens))
    return f"{dataset.spell(encoder, source)}\n→ {dataset.spell(encoder, answer)}"


def sample_tokens(model: nn.Module, start: list[int], length: int, seed: int, device, source=None) -> list[int]:
    generator = torch.Generator(device).manual_seed(seed)
    idx, given = torch.tensor([start], device=device), None if source is None else torch.tensor([source], device=device)
    return model.generate(idx, length, temperature=0.8, top_k=50, generator=generator, source=given)[0].tolist()


# ---- getting ready -------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in there.items() if found)
    if not there[name]:
        raise UserError(f'device = "{name}": torch finds none on this machine; use "auto" or "cpu"')
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What activations are computed in; weights, gradients and the optimizer's state are float32 anyway."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def load_data(run) -> tuple:
    """(encoder, corpus), once they fit each other and the model."""
    encoder = encoders.load(run.encoder_path)
    hyper = run.model_hyperparams
    if encoder.vocab_size > hyper.vocab_size:
        raise UserError(
            f"model_hyperparams.vocab_size = {hyper.vocab_size}: encoder_path {run.encoder_path} has "
            f"{encoder.vocab_size} tokens; set it to {encoder.vocab_size} or more, or use a smaller encoder"
        )
    encoder.encode(run.sample_prompt)  # a character that it lacks is told now, not at the first sample
    return encoder, Corpus(run.dataset, encoder.fingerprint, hyper.block_size)


def choose_objective(run, encoder, corpus: Corpus):
    """What the run learns, once it fits model and data. Writes into `run` what was left open: objective and pad_id."""
    hyper = run.model_hyperparams
    about = (getattr(hyper, "kind", "decoder"), hyper.vocab_size, hyper.block_size)
    run.objective, objective = dataset.make_objective(run.objective, *about, encoder, corpus)
    if objective.pads:
        hyper.pad_id = encoder.pad if hyper.pad_id is None else hyper.pad_id
        if hyper.pad_id != encoder.pad:
            told = f"the encoder pads with {encoder.pad}; set it to that or to null"
            raise UserError(f"model_hyperparams.pad_id = {hyper.pad_id}: {told}")
    return objective


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`learning_rate: 0.003 → 0.001` for each key that differs."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} → {json.dumps(b)}")
    return found


def start_from(path: str, model: nn.Module, encoder) -> None:
    """Copy the weights of a model file into `model`, which must be of the same shapes and vocabulary."""
    other, its_encoder, _ = checkpoint.load_model(path)
    if its_encoder.fingerprint != encoder.fingerprint:
        raise UserError(
            f"init_from: {path} was trained with encoder {its_encoder.fingerprint[:12]}…, and encoder_path is "
            f"{encoder.fingerprint[:12]}…: set encoder_path to the one it was trained with"
        )
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as error:
        changed = differences(to_dict(other.config), to_dict(model.config), "model_hyperparams.")
        raise UserError(f"init_from: {path} is of another shape ({'; '.join(changed)}): set them as it has") from error


def worth_compiling(run, device: torch.device) -> bool:
    """Whether `compile: "auto"` compiles.

    On CUDA it does: every step gains. On a CPU it does for runs of COMPILE_ON_CPU_FROM steps or more: with a model like
    config/tiny.json's on two slow cores, compiling took 160 s and made a step of 0.61 s one of 0.42 s, so that it was
    paid for after 850 steps; smaller models gain less. The rule looks at max_iters, not at a clock, so that a resumed
    run computes as the first one did. On MPS it does not.
    """
    if run.compile != "auto":
        return run.compile
    if device.type != "cpu" or run.max_iters < COMPILE_ON_CPU_FROM:
        return device.type == "cuda"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")):
        warn("no C++ compiler is installed, so that the model is not compiled and steps take longer")
        return False
    return True


# ---- the trainer ---------------------------------------------------------------------------------------------------


class NonFinite(Exception):
    """The loss, the gradient or a weight is NaN or infinite."""


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides weights, optimizer state and configuration."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # spent in steps: without evaluations and saves


class Trainer:
    """A run, from its configuration to its model file: prepare(), train(), finish()."""

    def __init__(self, run, signals: Signals):
        self.run, self.signals = run, signals
        self.root = Path(run.checkpoints.path)
        self.metrics = Metrics(self.root / METRICS)
        self.progress = Progress()
        self.evaluated = self.saved = -1  # the step that each was last done at
        self.val_loss: float | None = None
        self.save_failed = False
        self.claimed = False  # whether checkpoints.path is this run's

    # -- getting ready

    def prepare(self) -> None:
        """Everything before the first step. Nothing on disk is touched before all of it is known to work."""
        run = self.run
        if Path(run.model_path).is_dir():
            raise UserError(f"model_path = {run.model_path}: is a directory; name a file")
        self.device = choose_device(run.device)
        self.dtype = choose_dtype(run.dtype, self.device)
        self.encoder, self.corpus = load_data(run)
        self.objective = choose_objective(run, self.encoder, self.corpus)
        found = self.find_checkpoint() if run.init_from == "resume" else None
        if run.seed == "auto":
            run.seed = found.meta["run"]["seed"] if found else secrets.randbits(31)
        torch.manual_seed(run.seed)
        model = build(run.model_hyperparams)
        if run.pretrained:
            start_from(run.pretrained, model, self.encoder)
        self.model = model.to(self.device).train()
        self.forward = self.model
        hyper = run.optimizer_hyperparams
        self.optimizer = build_optimizer(self.model, hyper, run.learning_rate, self.device.type)
        self.lengths = byte_lengths(self.encoder, run.model_hyperparams.vocab_size).to(self.device)
        if found:
            self.restore(found)
        self.introduce()
        self.rehearse()
        with self.signals.held():
            self.claim_directory()

    def find_checkpoint(self) -> checkpoint.Checkpoint:
        """The newest good one, which must be of the same encoder and the same data."""
        found = newest(self.root)
        now = {"encoder": ("encoder_path", self.encoder.fingerprint), "dataset": ("dataset", self.corpus.fingerprint)}
        for what, (key, fingerprint) in now.items():
            if (then := found.meta.get(what)) != fingerprint:
                raise UserError(
                    f"{key}: the {what} has changed since {found.path}: it was {str(then)[:12]}…, and is now "
                    f"{fingerprint[:12]}…; bring the old one back, or start with --init_from=scratch"
                )
        return found

    def restore(self, found: checkpoint.Checkpoint) -> None:
        changed = differences(found.meta["run"], to_dict(self.run) | {"init_from": found.meta["run"]["init_from"]})
        try:
            found.load_weights(self.model)
        except UserError as error:
            shape = [line for line in changed if line.startswith("model_hyperparams.")]
            raise UserError(f"{error}; a resumed run keeps its model ({'; '.join(shape) or 'none changed'})") from error
        state = found.load_state()
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.saved = self.progress.step
        self.val_loss = found.val_loss
        print("\n    ".join([f"resuming {found.path}" + (", with changed keys:" if changed else ""), *changed]))

    def introduce(self) -> None:
        """One block that says what is about to be trained, on what, and how."""
        run, model, corpus = self.run, self.model, self.corpus
        T, accumulation = run.model_hyperparams.block_size, run.gradient_accumulation_steps
        stacks = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks")
        blocks = list(itertools.chain.from_iterable(stacks))  # of encoder and decoder
        pattern = f" of {' → '.join(blocks[0].steps)}" if hasattr(blocks[0], "steps") else ""
        threads = f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else ""
        name = f" ({torch.cuda.get_device_name()})" if self.device.type == "cuda" else threads
        rows = {
            "model": f"{model.config.arch}, {len(blocks)} blocks{pattern}",
            "parameters": f"{model.num_params(non_embedding=False):,}, {model.num_params():,} without embeddings",
            "data": f"{run.dataset.path}: {corpus.train.n_tokens:,} tokens to train on, {corpus.val.n_tokens:,} to "
                    f"validate; {self.encoder.vocab_size:,} token ids from {run.encoder_path}",
            "objective": run.objective + self.cut_short(),
            "step": f"{accumulation} × {run.batch_size} rows of {T} = {self.tokens_per_step:,} tokens of "
                    f"{model.flops_per_token(T) / 1e6:,.2f} MFLOP each",
            "machine": f"{self.device.type}{name}, {str(self.dtype).removeprefix('torch.')}",
            "seed": str(run.seed),
            "checkpoints": f"{self.root}, every {run.checkpoints.interval:,} steps"
                           if run.checkpoints.create_checkpoints else "none",
        }
        print("\n".join(f"{key:<12} {text}" for key, text in rows.items()))
        print("\n" + self.optimizer.table() + "\n", flush=True)

    def cut_short(self) -> str:
        """How many pairs block_size cuts short, where it does."""
        splits = (self.corpus.train, self.corpus.val)
        n_cut, n = (sum(getattr(split, what, 0) for split in splits) for what in ("n_cut", "n_windows"))
        return f"; {n_cut:,} of {n:,} are cut to {splits[0].block_size} tokens" if n_cut else ""

    def rehearse(self) -> None:
        """One forward and backward whose results are thrown away: compiles, and finds what won't work, before any file
        is touched and outside the time that is measured."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        batch = make_batch(self.objective, self.corpus.train, self.run.seed, 0, self.run.batch_size, self.device)
        if worth_compiling(self.run, self.device):
            print("compiling …", flush=True)
            self.forward = torch.compile(self.model, dynamic=False)
            try:
                self.accumulate([batch])
                with evaluating(self.model), self.autocast():
                    self.forward(batch.x, batch.y, source=batch.source)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                warn(f"torch.compile failed, so that steps take longer ({type(error).__name__}: {reason})")
                self.forward = self.model
        if self.forward is self.model:
            self.accumulate([batch])
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():  # what routers have counted
                buffer.copy_(buffers[name])

    def claim_directory(self) -> None:
        """Make checkpoints.path this run's: another run's files there are moved aside, a resumed run's are gone on."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            Path(self.run.model_path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {error.filename}: {error.strerror}; name another path") from error
        if self.run.init_from != "resume":
            aside = set_aside(self.root)
            if aside:
                print(f"the checkpoints of an earlier run are now in {aside}")
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.metrics.path, aside / METRICS)
        kept = self.metrics.rewind(self.progress.step if self.run.init_from == "resume" else -1)
        for line in kept:
            if line["step"] == self.progress.step and "val_loss" in line:
                self.evaluated, self.val_loss = line["step"], line["val_loss"]
        self.claimed = True

    # -- the steps

    def train(self) -> None:
        run = self.run
        if self.progress.step and self.due(run.eval_interval) and self.evaluated != self.progress.step:
            self.evaluate()  # a signal came first
        with self.progress_bar() as bar, self.batches() as loader:
            while self.progress.step < run.max_iters:
                with self.signals.held():
                    start = time.perf_counter()
                    micro_batches = next(loader)
                    loss, grad_norm = self.compute_gradients(micro_batches)
                    lr = self.update_weights(loss, grad_norm)
                    self.count(time.perf_counter() - start)
                    self.log(bar, loss, grad_norm, lr)
                if self.due(run.eval_interval):
                    self.evaluate()
                if self.due(run.checkpoints.interval) or (self.save_failed and self.due(run.log_interval)):
                    self.save()

    def compute_gradients(self, micro_batches: list[Batch]) -> tuple[float, float]:
        """(loss, norm of the gradient before clipping). Dropout is drawn from (seed, step)."""
        torch.manual_seed(int(dataset.keys(self.run.seed, np.array([self.progress.step]))[0]))
        loss = self.accumulate(micro_batches)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.run.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.run.grad_clip, norm)
        # Here, once in a step, the host waits for the device: no update by a gradient that is not finite.
        # On an H100 a step with and without it took the same time within noise, at 12 ms and more.
        return tuple(torch.stack((loss, norm)).tolist())

    def accumulate(self, micro_batches: list[Batch]) -> Tensor:
        """The gradients of the mean loss over all targets of all micro-batches, as one large batch would give them:
        each micro-batch's mean is weighted by its share of the targets that are not ignored."""
        total = max(sum(batch.n_targets for batch in micro_batches), 1)
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            with self.autocast():
                _, mean = self.forward(batch.x, batch.y, source=batch.source)
            share = mean * (batch.n_targets / total)
            share.backward()
            loss += share.detach()
        return loss

    def update_weights(self, loss: float, grad_norm: float) -> float:
        """One optimizer step; returns its learning rate. Raises NonFinite, before anything changes, where it must."""
        step = self.progress.step
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            found = f"the loss is {loss:g} and the norm of the gradient {grad_norm:g}"
            raise NonFinite(f"step {step + 1:,}: {found}, so the weights were not updated")
        lr = lr_at(step, self.run)
        self.optimizer.set_lr(lr / self.run.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        return lr

    def count(self, seconds: float) -> None:
        self.progress.step += 1
        self.progress.tokens += self.tokens_per_step
        self.progress.seconds += seconds

    def due(self, interval: int) -> bool:
        """Every `interval` steps, and after the last one."""
        return self.progress.step % interval == 0 or self.progress.step >= self.run.max_iters

    @property
    def tokens_per_step(self) -> int:
        return self.run.gradient_accumulation_steps * self.run.batch_size * self.run.model_hyperparams.block_size

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def batches(self) -> Loader:
        run = self.run
        order = (run.seed, run.batch_size, run.gradient_accumulation_steps)
        return Loader(self.corpus.train, *order, self.device, self.progress.step, objective=self.objective)

    # -- telling

    def progress_bar(self) -> tqdm:
        style = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
        self.logged = (self.progress.tokens, self.progress.seconds)
        every = 0.2 if sys.stderr.isatty() else 5  # seconds: a log file need not be redrawn as often as a screen
        total, done = self.run.max_iters, self.progress.step
        return tqdm(total=total, initial=done, bar_format=style, mininterval=every, maxinterval=60, dynamic_ncols=True)

    def log(self, bar: tqdm, loss: float, grad_norm: float, lr: float) -> None:
        """The bar at every step, a line of metrics.jsonl at each log_interval and at the first step."""
        p = self.progress
        tokens, seconds = p.tokens - self.logged[0], p.seconds - self.logged[1]  # since the last line
        speed = tokens / max(seconds, 1e-9)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if self.due(self.run.log_interval) or p.step == 1:
            rates = {"lr": lr, "grad_norm": grad_norm, "tokens_per_s": speed, "seconds": p.seconds}
            self.metrics.add(step=p.step, tokens=p.tokens, loss=loss, **rates)
            self.logged = (p.tokens, p.seconds)

    def evaluate(self) -> None:
        """Losses of both splits, the strict one where the model sees the future, a sample of text, the curves."""
        run = self.run
        with evaluating(self.model):
            with self.autocast():
                results = {}
                for name, split in (("train", self.corpus.train), ("val", self.corpus.val)):
                    asked = (split, run.eval_iters, run.batch_size, self.lengths, self.objective)
                    results[f"{name}_loss"], results[f"{name}_bpb"] = mean_loss(self.forward, *asked)
                if self.model.generates and not self.model.causal:
                    found = strict_loss(self.model, self.corpus.val, rows=run.batch_size, device=self.device)
                    results["strict_loss"], results["plain_at_strict"] = found
            text = self.sample() if run.sample_length and self.model.generates else ""
        with self.signals.held():
            self.evaluated, self.val_loss = self.progress.step, results["val_loss"]
            self.metrics.add(step=self.progress.step, tokens=self.progress.tokens, **results)
            tqdm.write(report(self.progress.step, results, text))
        self.draw()

    def sample(self) -> str:
        run = self.run
        asked = (run.sample_length, run.seed, self.device)
        if not self.model.takes_source:
            return sample_text(self.model, self.encoder, run.sample_prompt, *asked)
        source = [*dataset.read_spelled(self.encoder, run.sample_prompt), self.encoder.eot]
        if not run.sample_prompt:
            first = self.objective.batch(self.corpus.val, EVAL_SEED, 0, 1).source[0].tolist()
            source = [token for token in first if token != self.encoder.pad]
        return sample_answer(self.model, self.encoder, source, *asked)

    def draw(self) -> None:
        try:
            plot.curves(self.metrics.path, self.run.img_path)
        except Exception as error:
            warn(f"cannot draw the curves in {self.run.img_path} ({type(error).__name__}: {error})")

    # -- saving

    def save(self) -> None:
        """A checkpoint of this step, if there is none yet. What goes wrong is told, and tried again at the next log."""
        step = self.progress.step
        if not self.run.checkpoints.create_checkpoints or self.saved == step:
            return
        self.check_weights()
        fingerprints = {"dataset": self.corpus.fingerprint, "encoder": self.encoder.fingerprint}
        state = {"optimizer": self.optimizer.state_dict(), "progress": vars(self.progress)}
        parts = {checkpoint.MODEL: write_model(self.model, self.encoder, self.record()),
                 checkpoint.STATE: write_state(state)}
        val_loss = self.val_loss if self.evaluated == step else None
        keep = self.run.checkpoints.keep
        with self.signals.held():
            try:
                save_checkpoint(self.root, step, parts, val_loss, keep, {**fingerprints, "run": to_dict(self.run)})
                self.saved, self.save_failed = step, False
            except UserError as error:
                self.save_failed = True
                warn(f"{error}; trying again later")

    def check_weights(self) -> None:
        finite = {name: torch.isfinite(p).all() for name, p in self.model.named_parameters()}
        if not torch.stack(list(finite.values())).all():
            bad = ", ".join(name for name, good in finite.items() if not good)
            raise NonFinite(f"step {self.progress.step:,}: these weights are not finite, and are not saved: {bad}")

    def record(self) -> dict:
        """What a model file tells about its training."""
        p = self.progress
        about = {"step": p.step, "tokens": p.tokens, "seconds": round(p.seconds, 3), "val_loss": self.val_loss}
        return {**about, "dataset": self.corpus.fingerprint, "torch": torch.__version__, "run": to_dict(self.run)}

    def finish(self) -> None:
        """After the last step: the model file."""
        self.check_weights()
        with self.signals.held():
            save_model(self.run.model_path, self.model, self.encoder, self.record())
        p = self.progress
        print(f"{p.step:,} steps, {p.tokens:,} tokens in {p.seconds:,.0f} s; the model is in {self.run.model_path}")

    def save_where_it_stands(self) -> bool:
        """Save on the way out; whether there is something to resume. A run without a step has nothing to lose."""
        self.signals.heard = True
        if self.claimed:
            try:
                self.save()
            except NonFinite as error:
                warn(str(error))
        return self.claimed and self.saved >= 0

    def standing(self) -> str:
        """What is on disk, for the last line that a user reads."""
        if not self.claimed:
            return "nothing was changed"
        if self.saved < 0:
            return "there is no checkpoint yet"
        return f"step {self.saved:,} is saved in {self.root}"


def report(step: int, results: dict, text: str) -> str:
    """What an evaluation prints."""
    line = f"step {step:,}: loss {results['train_loss']:.4f} in training, {results['val_loss']:.4f} in validation"
    line += " (nats per token)"
    if not math.isnan(results["val_bpb"]):
        line += f"; {results['train_bpb']:.4f} and {results['val_bpb']:.4f} bits per byte"
    if "strict_loss" in results:
        strict, plain_loss = results["strict_loss"], results["plain_at_strict"]
        line += f"\n    strict loss in validation, the honest one: {strict:.4f} (the plain one there: {plain_loss:.4f})"
    return line + "".join(f"\n    | {row}" for row in text.splitlines())


# ---- the command ---------------------------------------------------------------------------------------------------


def command(argv: list[str], resume: bool) -> str:
    """The command line of this run, or the one that goes on with it."""
    if resume:
        kept, rest = [], list(argv)
        while rest:
            word = rest.pop(0)
            if word == "--init_from":
                rest = rest[1:]
            elif not word.startswith("--init_from="):
                kept.append(word)
        argv = [*kept, "--init_from=resume"]
    words = [short(sys.executable), short(os.path.abspath(__file__)), *argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def short(path: str) -> str:
    """Relative where the path is inside the working directory."""
    with contextlib.suppress(ValueError):  # another drive, on Windows
        relative = os.path.relpath(path)
        return path if relative.startswith(os.pardir) else relative
    return path


def main(argv: list[str]) -> int:
    trainer = Trainer(load_run(argv, CONFIGS), Signals())
    try:
        with trainer.signals:
            trainer.prepare()
            trainer.train()
            trainer.finish()
        return 0
    except Interrupted as interrupted:
        saved = trainer.save_where_it_stands()
        print(f"\n{interrupted}: {trainer.standing()}; to {'go on' if saved else 'start again'}:")
        print(f"    {command(argv, resume=saved)}", flush=True)
        return 128 + interrupted.number
    except NonFinite as error:
        print(f"error: {error}; {trainer.standing()}. {MEND_NON_FINITE}", file=sys.stderr)
        if trainer.saved > 0:
            print(f"    {command(argv, resume=True)}", file=sys.stderr)
        return 3
    except torch.OutOfMemoryError as error:  # perhaps in the middle of an update: what there is, is not saved
        raise UserError(f"{trainer.device.type} is out of memory; {trainer.standing()}. {MEND_MEMORY}") from error
    except UserError:
        trainer.save_where_it_stands()
        raise


MEND_NON_FINITE = "Try a lower learning_rate, a longer warmup_iters or a lower grad_clip."
MEND_MEMORY = (
    "Halve batch_size and double gradient_accumulation_steps, which computes the same, or lower "
    "model_hyperparams.block_size or the model's size."
)

if __name__ == "__main__":
    run_cli(main)

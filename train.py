"""Trains a language model: a token file and a JSON file in, one model file out.

    python train.py --config tiny.json                        # from scratch
    python train.py --config tiny.json --init_from=resume     # go on from the newest good checkpoint
    python train.py --config tiny.json --check                # would it work? says so in seconds, and writes nothing
    python train.py --config tiny.json --quiet                # prints nothing but warnings and errors
    torchrun --nproc_per_node=2 train.py --config tiny.json   # each batch divided among two processes: see ranks.py
    python train.py --help                                    # every key

Each step is a pure function of the weights, the optimizer's state, the seed and the step's number: batches and dropout
are drawn from (seed, step). So a resumed run is, on a CPU, the uninterrupted run bit for bit.

What it writes:  checkpoints.path/step_…         to resume from
                 checkpoints.path/metrics.jsonl  every logged step and every evaluation, one JSON object a line
                 img_path/*.png                  the curves, redrawn at each evaluation
                 model_path                      the trained model, when all steps are done
A run from scratch moves what an earlier run left in checkpoints.path to earlier_1, earlier_2, … in there.

Exit codes:  0 all steps done · 2 a mistake to mend, nothing changed · 3 the loss or the gradient was not finite, the
weights were not touched · 4 another process of this run was lost · 130 SIGINT, 143 SIGTERM: the step was finished and
saved. A second signal leaves at once.

Index:  signals · metrics.jsonl · the console · evaluation · getting ready · memory · recorded steps · the trainer ·
        the command
"""

import os
import signal
import sys

if __name__ == "__main__":  # importing torch takes seconds, in which there is nothing to save yet
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))

import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import encoder as encoders
import plot
from checkpoint import Lock, newest, own_tensors, save_checkpoint, save_model, set_aside, write_model, write_state
from model import CONFIGS, build
from optimizer import build_optimizer, lr_at
from options import (
    UserError,
    atomic_write,
    find_config,
    is_first_to_report,
    load_run,
    parse_arguments,
    run_cli,
    to_dict,
)
from ranks import Alone, Lost, Ranks, join
from strawberry import ops, status_file
from strawberry.common import CHECKPOINTS, Input, Output, check_outputs, encoder_inputs, is_same_file
from strawberry.data.dataset import Corpus, Split, find_token_files
from strawberry.data.loader import MAX_BATCH, Loader, map_tensors
from strawberry.data.objectives import Batch, NextToken, decode_with_sentinels, encode_with_sentinels, make_objective
from strawberry.data.order import derive_keys
from strawberry.ops import float8
from strawberry.sharding import batch_parts, divide_batch, to_local

METRICS = "metrics.jsonl"
EVAL_SEED = 0  # of the windows that evaluations read: the same whatever the run's seed is
STRICT_POSITIONS = 512
COMPILE_ON_CPU_FROM = 5000  # steps; see worth_compiling
MAX_ROLLBACKS = 3
INSIST = 1.0  # seconds after which a signal that nobody heard is raised again
GRACE = 3.0  # seconds after a signal in which a step may still be finished
LAG = 4  # recorded steps that a GPU may be behind the host
CPU_TOKENS = 4096  # in a batch, at most, that batch_size "auto" makes on a CPU: more makes no token cheaper there
VERIFIED = 2 << 30  # bytes of token file that --check reads whole: seconds
STATUS = status_file.StatusFile(os.environ.get(status_file.VARIABLE))  # of a run that serve.py has started

# ---- signals -------------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. A BaseException, so that nobody on the way takes it for an error of their own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Lets SIGINT and SIGTERM arrive where nothing is half done, by raising Interrupted there.

    The first one is raised at once, wherever the program is, unless it is inside `with signals.held():`; then it is
    raised at the end of that block. A second one ends the process. An exception that comes in the middle of a callback
    gets lost (torch.compile has many), so that it is raised again each INSIST seconds until somebody hears it.
    """

    def __init__(self):
        self.received: int | None = None
        self.at = 0.0  # when, by time.monotonic()
        self.heard = False  # Interrupted was caught: from here on, nothing is raised again
        self.depth = 0  # of held() blocks
        self.told = False  # another process of this run was signalled, and what it told counts for this one

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
            if hasattr(signal, "SIGALRM"):  # on Windows there is none
                self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.insist)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if self.told:  # its own comes later, and is no second one
            self.told = False
            return
        if self.received is not None:
            os._exit(128 + number)
        self.received, self.at = number, time.monotonic()
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, INSIST, INSIST)
        if not self.depth:
            raise Interrupted(number)

    def insist(self, number: int, frame) -> None:
        if not self.depth and not self.heard:
            raise Interrupted(self.received)

    def give_up_late(self) -> None:
        """To be called in a held() block at places where its work can be given up: raises once GRACE is over."""
        if self.received is not None and not self.heard and time.monotonic() - self.at > GRACE:
            raise Interrupted(self.received)

    def tell(self, number: int) -> None:
        """What a signal that another process got leads to in this one: raises Interrupted, held or not."""
        self.told = self.received is None
        self.received = self.received or number
        raise Interrupted(self.received)

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


# ---- the console ---------------------------------------------------------------------------------------------------

COLUMNS = {"step": 8, "loss": 8, "learning rate": 13, "grad norm": 9, "tokens/s": 10, "elapsed": 8, "remaining": 9}
HEADER_EVERY = 20  # printed lines


class Console:
    """What a run prints on stdout, each line at once: a table with a row for each logged step, and its evaluations.

    On a terminal a bar stays on stderr, below the lines; it writes nothing to a file. The header of the table is
    printed again once HEADER_EVERY lines of any kind have followed it. Elapsed and remaining are wall-clock time from
    this start's first step on, evaluations and checkpoints included.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.since_header = HEADER_EVERY
        self.began: float | None = None  # of the first step
        self.resumed, self.first_step = 0.0, 0  # where the pace is counted from: there, or where a rollback led to

    def start(self, step: int, total: int, hidden: bool) -> tqdm:
        """The bar of a run that goes on after `step`."""
        self.resumed, self.first_step = time.monotonic(), step
        self.began = self.began or self.resumed
        style = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
        shown = {"bar_format": style, "mininterval": 0.2, "maxinterval": 60, "dynamic_ncols": True, "leave": False}
        return tqdm(total=total, initial=step, disable=hidden or self.quiet or not sys.stderr.isatty(), **shown)

    def print(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)  # above the bar
            sys.stdout.flush()
            self.since_header += text.count("\n") + 1

    def print_step(self, step: int, total: int, loss: float, lr: float, grad_norm: float, speed: float) -> None:
        now = time.monotonic()
        remaining = (now - self.resumed) / max(step - self.first_step, 1) * (total - step)
        times = (tqdm.format_interval(seconds) for seconds in (now - self.began, remaining))
        cells = (f"{step:,}", format_decimal(loss), f"{lr:.2e}", format_decimal(grad_norm), f"{speed:,.0f}", *times)
        if self.since_header >= HEADER_EVERY:
            self.print(format_row(COLUMNS))
            self.since_header = 0
        self.print(format_row(cells))


def format_row(cells: Iterable[str]) -> str:
    """One line of the table, each cell at the right end of its column."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))


def format_decimal(value: float) -> str:
    """Four decimals, or four digits where these would not show the number: 0.1234, 1.234e-05"""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1000 else f"{value:.3g}"


class Sturdy:
    """A stream whose full disk ends no run: what cannot be written is lost, or comes when there is room again.

    Warnings, and that the stream cannot be written, go to STATUS too.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        if text.startswith("warning: "):
            STATUS.warn(text.removeprefix("warning: ").strip())
        with self.sparing():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.sparing():
            self.stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def sparing():
        try:
            yield
        except BrokenPipeError:  # its reader left on purpose
            raise
        except OSError as error:
            STATUS.warn(f"cannot write the log ({error.strerror}); lines of it are lost")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


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
    return map_tensors(objective.make_batch(split, seed, first, count), lambda part: torch.from_numpy(part).to(device))


def mean_loss(
    forward, split, batches: int, rows: int, lengths: Tensor, objective=None, ranks=None
) -> tuple[float, float]:
    """(nats per token, bits per byte) over the targets of the first samples of a split, at most all of them, each once;
    the same in every evaluation of every run. Of several ranks each takes its part of each batch.

    bits per byte = nats / ln 2 · tokens / bytes, where bytes are those of the target tokens' text: unlike the loss, it
    can be compared between vocabularies. NaN where the objective's targets are no text.
    """
    objective, ranks = objective or NextToken(), ranks or Alone()
    nats, n_bytes, count = [], [], 0
    row_parts, groups = batch_parts(rows, ranks.world)
    n = min(batches, max(1, split.n_windows // rows))
    share, (first, *_) = divide_batch(rows, groups, ranks.rank, ranks.world)
    for i in range(0, n, groups):  # as many passes on each rank, since sharded ones take them together
        batch = make_batch(objective, split, EVAL_SEED, i * rows + first, share, lengths.device)
        loss = forward(batch.x, batch.y, source=batch.source)[1].detach().float()
        if i * rows + first < n * rows:
            nats.append(loss * batch.n_targets)
            n_bytes.append((lengths[batch.y.clamp(min=0)] * (batch.y >= 0)).sum())
            count += batch.n_targets
    total, n_bytes = (sum(torch.stack(values).tolist()) if values else 0 for values in (nats, n_bytes))
    total, n_bytes, count = ranks.total(total, n_bytes, count)
    return total / max(count, 1), total / math.log(2) / n_bytes if n_bytes and objective.has_bits_per_byte else math.nan


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
    return f"{decode_with_sentinels(encoder, source)}\n→ {decode_with_sentinels(encoder, answer)}"


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
    if name == "float8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        about = f"{torch.cuda.get_device_name(device)} does not multiply in 8 bits"
        raise UserError(f'dtype = "float8": {about}, which takes compute capability 8.9 or more; use "bfloat16"')
    if name == "float8" and device.type not in ("cuda", "cpu"):
        raise UserError(f'dtype = "float8": {device.type} does not multiply in 8 bits; use "bfloat16"')
    return torch.bfloat16 if name == "float8" else getattr(torch, name)


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
    run.objective, objective = make_objective(run.objective, *about, encoder, corpus)
    if objective.has_padding:
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


def start_from(path: str | Path, model: nn.Module, encoder) -> None:
    """Copy the weights of a model file, or of the newest checkpoint in a directory, into `model`, which must be of the
    same shapes and vocabulary."""
    path = checkpoint.find_model(path, "init_from")
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


def worth_compiling(run, device: torch.device) -> bool | str:
    """Whether to compile, True for the whole model, "blocks" for its blocks; this is what `compile: "auto"` comes to.

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


def can_record(device: torch.device) -> bool:
    """Whether steps can be left to the device, as one CUDA graph or called one by one."""
    return device.type == "cuda"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() or folder == folder.parent else existing(folder.parent)


def check_writable(key: str, path: str, folder: Path) -> None:
    """Raises UserError, naming key and path, unless things can be made in `folder` or in what is there of its parents.
    Makes nothing itself."""
    try:
        folder = existing(folder)
        good, reason = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK), f"{folder} cannot be written to"
    except OSError as error:  # a name that is too long, a folder that may not be searched
        good, reason = False, f"{error.strerror} ({folder})"
    if not good:
        raise UserError(f"{key} = {path}: {reason}; name another path, or change the rights")


def list_outputs(run) -> list[Output]:
    """Every file that a run writes, and the directory of its checkpoints."""
    root = Path(run.checkpoints.path)
    files = {METRICS: "metrics", checkpoint.LOCK: "lock", checkpoint.LATEST: "latest"}
    outputs = [Output("model_path", run.model_path, "model"), Output("checkpoints.path", root, CHECKPOINTS)]
    outputs += [Output("checkpoints.path", root / name, kind) for name, kind in files.items()]
    return outputs + ([] if run.img_path is None else plot.picture_outputs("img_path", run.img_path))


def list_inputs(run, config: str | None = None) -> list[Input]:
    """Every file that a run reads, its --config among them. A model that is trained further into its own path is one of
    the outputs, and checkpoints that a run starts from are set aside, not replaced."""
    inputs = [Input("--config", find_config(config))] if config else []
    inputs += [Input("dataset.path", path) for path in find_token_files(run.dataset)]
    inputs += encoder_inputs("encoder_path", run.encoder_path)
    if run.pretrained and not is_own_checkpoint(run) and not is_same_file(run.pretrained, run.model_path):
        inputs.append(Input("init_from", run.pretrained))
    return inputs


def is_own_checkpoint(run) -> bool:
    """Whether the model that a run starts from is one of the checkpoints in its own checkpoints.path."""
    path, root = Path(os.path.realpath(run.pretrained)), Path(os.path.realpath(run.checkpoints.path))
    return path == root or (path.is_relative_to(root) and path.relative_to(root).parts[0].startswith("step_"))


# ---- memory --------------------------------------------------------------------------------------------------------

STATE_BYTES = {"adamw": 8, "muon": 4}  # of an optimizer's state, for each parameter


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left; only CUDA has a class of its own for it."""
    told = ("DefaultCPUAllocator: can't", "DefaultCPUAllocator: not enough", "MPS backend out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in told)


def device_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that this process could still take, bytes that there are)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
        free, total = pages // 2, pages
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def kept_for_backward(model: nn.Module, forward: Callable[[], object]) -> list[int]:
    """The sizes in bytes of what `forward()` keeps for a backward pass, in order, the model's own tensors left out."""
    own = {to_local(t).untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return list(kept.values())


PASSING = 3  # of the largest tensor that is kept: the logits and their gradients, which come and go


@dataclass
class Footprint:
    """Bytes that training takes, by what.

    An estimate: what an operation needs only while it runs is hardly in it. Compared with the growth of a process on a
    CPU in a step of 4 or 16 rows, it said 0.60 of it for config/tiny.json, 0.85 for strawberry-large.json and 1.02 for
    tinystar-v0.1-baseline.json.
    """

    weights: int
    gradients: int
    optimizer: int
    row: int  # what a forward pass keeps of one row for the backward pass, and PASSING times the largest part of it

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def told(self, rows: int, block_size: int) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        text = ", ".join(f"{what} {size(n)}" for what, n in parts.items())
        return f"{text}, activations of {rows:,} rows of {block_size:,} tokens about {size(rows * self.row)}"


def size(n: float) -> str:
    """1_500_000_000 → 1.5 GB"""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if n >= scale:
            return f"{n / scale:,.1f} {unit}"
    return f"{n / 1e3:,.1f} kB"


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` that fits, where what fits leaves room for all that is smaller; 0: not even 1 does.

    >>> largest(lambda n: n <= 11, limit=100)  # asks for 1, 2, 4, 8, 16, 12, 10, 11
    11
    """
    good, bad, n = 0, limit + 1, 1
    while bad - good > 1:
        good, bad = (n, bad) if fits(n) else (good, n)
        n = min(2 * n, limit) if bad > limit else (good + bad) // 2
    return good


# ---- recorded steps ------------------------------------------------------------------------------------------------


class NonFinite(Exception):
    """The loss, the gradient or a weight is NaN or infinite."""


class Taken(NamedTuple):
    """A step that is on its way."""

    step: int
    lr: float
    answer: Tensor  # (3,) in pinned memory: loss, norm of the gradient, and 1.0 while all has been finite
    there: torch.cuda.Event | None  # when the answer is


class Recorded:
    """Optimizer steps without a word from the host: passes, clipping and update as one CUDA graph, launched at once.

    A small model's step is some hundred launches of a few microseconds each, which a host cannot keep up with, and a
    large one's ends with the host waiting to hear whether the loss was finite. Here the device judges that itself: a
    step whose loss or gradient is not finite changes nothing, and nor does any step after it, so that the host may
    hear of it some steps late and still find all as it was before.

    `step` is what is recorded; on a device other than CUDA, and where `graph` is False, it is simply called. Of several
    ranks each launches its own graph, and their sums over NCCL are in it: all of them must launch the same steps.
    """

    WARM_UP = 2  # steps before the recording, which allocate and choose kernels
    WARM_UP_TOGETHER = 11  # DDP forms its buckets in the second and takes times, waiting for the device, in ten

    def __init__(self, trainer: "Trainer", graph: bool = True):
        self.trainer, self.optimizer, device = trainer, trainer.optimizer, trainer.device
        self.good = torch.zeros((), device=device)  # 1.0 as long as everything has been finite
        self.bad = torch.ones((), device=device)
        self.answer = torch.zeros(3, device=device)
        self.graph = torch.cuda.CUDAGraph() if graph and device.type == "cuda" else None
        self.taken: collections.deque[Taken] = collections.deque()
        self.called = 0  # step(), since the recording began
        self.done = False  # recording

    def record(self, micro_batches: list[Batch]) -> None:
        """Record a step over batches of these shapes. Nothing is trained by it, since `good` is still zero."""
        self.inputs = [map_tensors(batch, torch.clone) for batch in micro_batches]
        self.optimizer.to_device(self.bad)
        if self.graph is not None:
            warm_up = self.WARM_UP if self.trainer.ranks.world == 1 else self.WARM_UP_TOGETHER
            here = torch.cuda.current_stream()
            aside = torch.cuda.Stream() if here == torch.cuda.default_stream() else here
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(warm_up):
                    self.step()
            here.wait_stream(aside)
            # what other threads ask of CUDA meanwhile (NCCL's watchdog) does not disturb
            with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
                self.step()
                self.trainer.ranks.join_streams()
            self.optimizer.count(-self.called)
        self.optimizer.count(0)
        self.good.fill_(1.0)
        self.done = True

    def step(self) -> None:
        trainer = self.trainer
        self.optimizer.zero_grad()
        loss = trainer.accumulate([batch._replace(n_targets=(batch.y >= 0).sum()) for batch in self.inputs])
        trainer.ranks.sum_([loss, *trainer.loads])
        norm = trainer.clip()  # the same on all ranks, as the loss now is: so all of them judge alike
        self.good *= torch.isfinite(loss + norm)
        self.bad.copy_(1 - self.good)
        self.optimizer.step()
        self.called += 1
        trainer.model.after_step(self.good)
        self.answer.copy_(torch.stack((loss, norm, self.good)))

    def take(self, micro_batches: list[Batch], step: int, lr: float) -> None:
        """Launch the step numbered `step` over these batches."""
        for mine, new in zip(self.inputs, micro_batches, strict=True):
            for a, b in zip(mine[:3], new[:3], strict=True):
                if a is not None:
                    a.copy_(b, non_blocking=True)
        self.optimizer.set_lr(lr / self.trainer.run.learning_rate)
        if self.graph is None:
            self.step()
            self.optimizer.count(0)
        else:
            self.graph.replay()
            self.optimizer.count(1)
        if not self.answer.is_cuda:
            self.taken.append(Taken(step, lr, self.answer.clone(), None))
            return
        answer, there = torch.empty(3, pin_memory=True), torch.cuda.Event()
        answer.copy_(self.answer, non_blocking=True)
        there.record()
        self.taken.append(Taken(step, lr, answer, there))

    def heard(self, lag: int) -> Iterator[tuple[Taken, float, float]]:
        """(what was taken, loss, norm) of each step that is done, in order; waits until at most `lag` are on the way.
        Raises NonFinite at the first that changed nothing: of several ranks in all after the same launch, which is why
        none of them looks whether an answer is there sooner."""
        ranks = self.trainer.ranks
        while self.taken and (len(self.taken) > lag or self.taken[0].there is None or (
                ranks.world == 1 and self.taken[0].there.query())):  # fmt: skip
            taken = self.taken[0]
            if taken.there is not None:
                ranks.wait(taken.there)
            self.taken.popleft()
            loss, norm, good = taken.answer.tolist()
            if not good:
                self.optimizer.count(-len(self.taken) - 1)
                self.taken.clear()
                self.trainer.stand_before(taken.step)
                raise NonFinite(not_finite(taken.step, loss, norm))
            yield taken, loss, norm

    def close(self) -> None:
        """From here on, steps are taken by the host again."""
        if self.called and not self.done:
            self.optimizer.count(-self.called)
        self.optimizer.to_host()
        self.optimizer.zero_grad()
        if self.graph is not None and not self.done:  # torch's generator would wait for the recording's end for ever
            device = self.good.device.index or 0
            torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator(self.good.device))
        self.graph = None


def not_finite(step: int, loss: float, norm: float) -> str:
    found = f"the loss is {loss:g} and the norm of the gradient {norm:g}"
    return f"step {step:,}: {found}, so the weights were not updated"


# ---- the trainer ---------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides weights, optimizer state and configuration."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # spent in steps: without evaluations and saves
    skipped: int = 0  # steps whose data rollbacks have passed over
    rollbacks: list[dict] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the next step stands in the data, in steps; its batches and its dropout are drawn from this number."""
        return self.step + self.skipped


class Trainer:
    """A run, from its configuration to its model file: prepare(), train(), finish(), close()."""

    def __init__(self, run, signals: Signals, config: str | None = None, quiet: bool = False):
        self.run, self.signals, self.config = run, signals, config
        self.console = Console(quiet)
        self.root = Path(run.checkpoints.path)
        self.metrics = Metrics(self.root / METRICS)
        self.ranks: Alone | Ranks = Alone()
        self.lock: Lock | None = None
        self.progress = Progress()
        self.evaluated = self.saved = -1  # the step that each was last done at
        self.val_loss: float | None = None
        self.save_failed = False
        self.claimed = False  # whether checkpoints.path is this run's
        self.recorded: Recorded | None = None

    # -- getting ready

    def prepare(self) -> None:
        """Everything before the first step. Nothing on disk is touched before all of it is known to work."""
        self.get_ready()
        self.rehearse(worth_compiling(self.run, self.device))
        self.record_steps()
        with self.signals.held():
            self.claim_directory()

    def get_ready(self) -> None:
        """All that the first step needs, in memory."""
        run = self.run
        self.check_paths()
        self.device = choose_device(run.device)
        self.dtype = choose_dtype(run.dtype, self.device)
        self.ranks = join(self.device, run.parallel)
        if self.ranks.main and self.root.is_dir():
            self.lock = Lock(self.root)
        self.encoder, self.corpus = load_data(run)
        self.objective = choose_objective(run, self.encoder, self.corpus)
        found = self.find_checkpoint() if run.init_from == "resume" else None
        if run.seed == "auto":
            run.seed = self.ranks.agree(found.meta["run"]["seed"] if found else secrets.randbits(31))
        torch.manual_seed(run.seed)
        model = build(run.model_hyperparams)
        if run.pretrained:
            start_from(run.pretrained, model, self.encoder)
        ops.prepare_weights(model, "float8" if run.dtype == "float8" else None, self.device)
        self.model = self.ranks.place(model, self.device, self.dtype).train()
        self.forward = self.model
        self.loads = [router.load for router in self.model.routers().values()]
        hyper = run.optimizer_hyperparams
        self.optimizer = build_optimizer(self.model, hyper, run.learning_rate, self.device.type, self.ranks)
        self.lengths = byte_lengths(self.encoder, run.model_hyperparams.vocab_size).to(self.device)
        if run.batch_size == "auto" and found:
            run.batch_size = found.meta["run"]["batch_size"]
        if found:
            self.restore(found)
        self.choose_batch_size()
        if run.dtype == "float8" and self.ranks.main and not float8.has_eligible_weight(self.model):
            warn(f'dtype = "float8": this model has no matrix (m, n) with m · n ≥ {float8.MIN_DIM} · (m + n), so that '
                 'it trains as with "bfloat16"')  # fmt: skip
        self.introduce()

    def check_paths(self) -> None:
        run = self.run
        if os.path.isdir(run.model_path):
            raise UserError(f"model_path = {run.model_path}: is a directory; name a file")
        check_writable("model_path", run.model_path, Path(run.model_path).parent)
        check_writable("checkpoints.path", run.checkpoints.path, self.root)
        check_outputs(list_outputs(run), list_inputs(run, self.config))

    def choose_batch_size(self) -> None:
        """Check that the batch can be divided among the ranks; where it is "auto", find the largest that fits."""
        run, world = self.run, self.ranks.world
        if run.batch_size == "auto":
            if self.ranks.sharded:  # one that ran out of memory would leave the others waiting for it
                raise UserError(f'batch_size = "auto": cannot be found with parallel "fsdp" on {world} processes; '
                                f"give a number, such as {world}")
            run.batch_size = self.find_batch_size() * world
            print(f'batch_size   {run.batch_size:,}, the largest that fits; write it into the JSON to keep it')
        divide_batch(run.batch_size, run.gradient_accumulation_steps, self.ranks.rank, world)

    @property
    def rows(self) -> int:
        """Of a micro-batch, on this rank."""
        return self.run.batch_size // batch_parts(self.run.batch_size, self.ranks.world)[0]

    def find_batch_size(self) -> int:
        """The most rows that a rank has memory for, and at most one epoch.

        A GPU is asked, by steps of more and more rows. A CPU's memory has no such edge, since a system that is out of
        it slows down or kills: there half of what is free is taken, by estimate, and no more than CPU_TOKENS.
        """
        limit = max(1, min(self.corpus.train.n_windows, MAX_BATCH) // self.ranks.world)
        if self.device.type == "cpu":
            need, T = self.footprint(), self.run.model_hyperparams.block_size
            room = device_memory(self.device)[0] // 2 - need.fixed
            limit = max(1, int(self.ranks.agree(min(limit, CPU_TOKENS // T, room // need.row))))
        found = largest(self.fits, limit)
        if not found:
            raise torch.OutOfMemoryError("not even one row fits")
        return found

    def fits(self, rows: int) -> bool:
        """Whether every rank can take a step of so many rows, with room for the optimizer's state and 5 % to spare."""
        spare = device_memory(self.device)[1] // 20 if self.device.type == "cuda" else 0
        fit = True
        try:
            need = self.footprint(row=0)
            buckets = need.gradients if self.ranks.world > 1 else 0  # what gradients travel in
            self.dry_run(rows, need.optimizer + buckets + spare)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fit = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.ranks.total(fit)[0] == self.ranks.world

    def dry_run(self, rows: int, reserve: int) -> None:
        """A step's and an evaluation's passes over so many rows, with so many bytes taken besides."""
        besides = torch.empty(reserve, dtype=torch.uint8, device=self.device)
        with self.untouched():
            batch = make_batch(self.objective, self.corpus.train, self.run.seed, 0, rows, self.device)
            self.try_out(batch, min(self.run.gradient_accumulation_steps, 2))
        del besides

    def footprint(self, row: int | None = None) -> Footprint:
        """What training takes. `row`: what one row does, where that is known or does not matter."""
        weights = sum(to_local(p).nbytes for p in itertools.chain(self.model.parameters(), self.model.buffers()))
        optimizer = sum(STATE_BYTES[group["optimizer"]] * group["parameters"] for group in self.optimizer.groups)
        optimizer //= self.ranks.world if self.ranks.sharded else 1
        gradients = sum(to_local(p).nbytes for p in self.model.parameters())
        if row is None:
            with self.untouched():  # the second row's alone: casts of weights and tables are made once
                one, two = (kept_for_backward(self.model, lambda n=n: self.one_forward(n)) for n in (1, 2))
            growth = [b - a for a, b in zip(one, two, strict=False)]
            row = max(sum(two) - sum(one) + PASSING * max(growth, default=0), 1)
        return Footprint(weights, gradients, optimizer, row)

    def one_forward(self, rows: int) -> Tensor:
        batch = make_batch(self.objective, self.corpus.train, self.run.seed, 0, rows, self.device)
        with self.autocast():
            return self.model(batch.x, batch.y, source=batch.source)[1]

    def find_checkpoint(self) -> checkpoint.Checkpoint:
        """The newest good one, which must be of the same encoder and the same data."""
        found = newest(self.root)
        if self.ranks.agree(found.path.name) != found.path.name:
            raise UserError(f"checkpoints.path = {self.root}: the processes of this run find different ones there; "
                            "give them one that all of them see")
        run = found.meta.get("run")
        if not isinstance(run, dict) or not all(type(run.get(key)) is int for key in ("seed", "batch_size")):
            raise UserError(f"{found.path / checkpoint.MANIFEST} is not one that train.py wrote; "
                            "start with --init_from=scratch")
        now = {"encoder": ("encoder_path", self.encoder.fingerprint), "dataset": ("dataset", self.corpus.fingerprint)}
        for what, (key, fingerprint) in now.items():
            if (then := found.meta.get(what)) != fingerprint:
                raise UserError(
                    f"{key}: the {what} has changed since {found.path}: it was {str(then)[:12]}…, and is now "
                    f"{fingerprint[:12]}…; bring the old one back, or start with --init_from=scratch"
                )
        return found

    def restore(self, found: checkpoint.Checkpoint) -> None:
        then = found.meta["run"]
        changed = differences(then, to_dict(self.run) | {"init_from": then.get("init_from")})
        try:
            self.load(found)
        except UserError as error:
            shape = [line for line in changed if line.startswith("model_hyperparams.")]
            raise UserError(f"{error}; a resumed run keeps its model ({'; '.join(shape) or 'none changed'})") from error
        print("\n    ".join([f"resuming {found.path}" + (", with changed keys:" if changed else ""), *changed]))

    def load(self, found: checkpoint.Checkpoint) -> None:
        self.stop_recording()  # the optimizer's state will lie elsewhere
        found.load_weights(self.model)
        state = found.load_state()
        try:
            progress = Progress(**state["progress"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{found.path / checkpoint.STATE} holds no state that this program wrote") from error
        self.progress = progress
        self.saved = found.step
        self.val_loss = found.val_loss

    def introduce(self) -> None:
        """One block that says what is about to be trained, on what, and how."""
        run, model, corpus = self.run, self.model, self.corpus
        T, accumulation = run.model_hyperparams.block_size, run.gradient_accumulation_steps
        stacks = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "blocks")
        blocks = list(itertools.chain.from_iterable(stacks))  # of encoder and decoder
        pattern = f" of {' → '.join(blocks[0].steps)}" if hasattr(blocks[0], "steps") else ""
        threads = f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else ""
        name = f" ({torch.cuda.get_device_name()})" if self.device.type == "cuda" else threads
        dtype = "float8" if run.dtype == "float8" else str(self.dtype).removeprefix("torch.")
        rows = {
            "model": f"{model.config.arch}, {len(blocks)} blocks{pattern}",
            "parameters": f"{model.num_params(non_embedding=False):,}, {model.num_params():,} without embeddings",
            "data": f"{run.dataset.path}: {corpus.train.n_tokens:,} tokens to train on, {corpus.val.n_tokens:,} to "
                    f"validate; {self.encoder.vocab_size:,} token ids from {run.encoder_path}",
            "objective": run.objective + self.cut_short(),
            "step": f"{accumulation} × {run.batch_size} rows of {T} = {self.tokens_per_step:,} tokens of "
                    f"{model.flops_per_token(T) / 1e6:,.2f} MFLOP each",
            "machine": f"{self.device.type}{name}, {dtype}" + (
                f"; {self.ranks.world} processes, {run.parallel}" if self.ranks.world > 1 else ""),
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

    @contextlib.contextmanager
    def untouched(self):
        """Whatever is computed in this block, model and gradients are then as before: routers have counted nothing."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            yield
        finally:
            self.optimizer.zero_grad()
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])

    def rehearse(self, compile: bool | str) -> float:
        """One forward and backward whose results are thrown away: compiles, and finds what won't work, before any file
        is touched and outside the time that is measured. Returns the loss."""
        batch = make_batch(self.objective, self.corpus.train, self.run.seed, 0, self.rows, self.device)
        with self.untouched(), self.ranks.listening():
            if compile:
                print("compiling …", flush=True)
                self.forward = self.ranks.forward(self.model, compile, self.leaves_idle)
                try:
                    loss = self.try_out(batch)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    reason = str(error).strip().partition("\n")[0]
                    warn(f"torch.compile failed, so that steps take longer ({type(error).__name__}: {reason})")
                    compile = False
            if not compile:
                self.forward = self.ranks.forward(self.model, False, self.leaves_idle)
                loss = self.try_out(batch)
            return self.ranks.total(loss.item())[0]

    def leaves_idle(self) -> bool:
        """Whether a step leaves parameters without a gradient, as retention's where no chunk has an earlier one."""
        self.one_forward(1).backward()
        return any(p.grad is None for p in self.model.parameters())

    def try_out(self, batch: Batch, times: int = 1) -> Tensor:
        """The loss of a batch, after a step's passes and an evaluation's, which needs more memory for its logits."""
        loss = self.accumulate([batch] * times)
        with evaluating(self.model), self.autocast():
            self.forward(batch.x, batch.y, source=batch.source)
        return loss

    def record_steps(self) -> None:
        """Have steps recorded from now on, where `record` asks for it and this machine can."""
        run = self.run
        ranks = self.ranks
        if not run.record or self.recorded or not can_record(self.device):
            return
        rows, firsts = divide_batch(run.batch_size, run.gradient_accumulation_steps, ranks.rank, ranks.world)
        batches = [make_batch(self.objective, self.corpus.train, run.seed, 0, rows, self.device)] * len(firsts)
        recorded, why = Recorded(self, ranks.graphs), ""
        try:
            with ranks.listening():
                recorded.record(batches)
        except Exception as error:
            recorded.close()
            if is_out_of_memory(error) or isinstance(error, Lost):
                raise
            reason = str(error).strip().partition("\n")[0]
            why = f"{type(error).__name__}: {reason}"
        if ranks.world > 1 and ranks.heard(bool(why)) and not why:  # all of them, or none
            recorded.close()
            why = "another process could not"
        if not why:
            self.recorded = recorded
            ranks.watch()
            return
        del recorded
        warn(f"steps cannot be recorded, so that they take longer ({why})")
        self.do_without_a_graph()

    def do_without_a_graph(self) -> None:
        """Of several ranks the steps are called one by one, and the host still waits for none. One process takes them
        in the old way."""
        if self.ranks.world == 1 or not self.ranks.graphs:
            self.run.record = False
            return
        self.forward = self.model
        self.ranks.renew()
        self.rehearse(worth_compiling(self.run, self.device))
        self.ranks.graphs = False
        self.record_steps()

    def stop_recording(self) -> None:
        if self.recorded:
            self.recorded.close()
            self.recorded = None

    def claim_directory(self) -> None:
        """Make checkpoints.path this run's: another run's files there are moved aside, a resumed run's are gone on."""
        if self.ranks.main:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                Path(self.run.model_path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {error.filename}: {error.strerror}; name another path") from error
            self.lock = self.lock or Lock(self.root)
            if self.run.init_from != "resume":
                aside = set_aside(self.root)
                if aside:
                    print(f"the checkpoints of an earlier run are now in {aside}")
                    with contextlib.suppress(FileNotFoundError):
                        os.replace(self.metrics.path, aside / METRICS)
        self.rewind(self.progress.step if self.run.init_from == "resume" else -1)
        self.claimed = True

    def rewind(self, step: int) -> None:
        """Bring metrics.jsonl back to a step, and with it what is known of that step's evaluation."""
        self.evaluated = -1
        for line in self.metrics.rewind(step) if self.ranks.main else ():
            if line["step"] == step and "val_loss" in line:
                self.evaluated, self.val_loss = step, line["val_loss"]
        self.evaluated, self.val_loss = self.ranks.agree([self.evaluated, self.val_loss])

    # -- the steps

    def train(self) -> None:
        # sharded ranks can only save together, and GPUs only take steps together: there a signal waits until all have
        # heard of it
        held = self.signals.held() if self.ranks.stop_together else contextlib.nullcontext()
        with self.ranks.listening(), held:
            if self.run.on_nan == "rollback" and self.saved < 0:
                self.save()  # what there is to go back to before the first interval is over
            while self.progress.step < self.run.max_iters:
                try:
                    self.take_steps()
                except NonFinite as error:
                    self.roll_back(error)
            self.stop_together()

    def stop_together(self) -> None:
        """Where ranks can only stop together, a signal that one of them got is one for all, after the same step."""
        if self.ranks.stop_together and (number := self.ranks.heard(self.signals.received or 0)):
            self.signals.tell(number)

    def take_steps(self) -> None:
        run = self.run
        if self.progress.step and self.due(run.eval_interval) and self.evaluated != self.progress.step:
            self.evaluate()  # a signal came first
        self.record_steps()  # anew, after a rollback
        with self.progress_bar() as bar, self.batches() as loader:
            while self.progress.step < run.max_iters:
                with self.signals.held():
                    start = time.perf_counter()
                    micro_batches = next(loader)
                    if self.recorded:
                        self.take_recorded(micro_batches, start, bar)
                    else:
                        loss, grad_norm = self.compute_gradients(micro_batches)
                        lr = self.update_weights(loss, grad_norm)
                        self.count(time.perf_counter() - start)
                        self.log(bar, self.progress.step, loss, grad_norm, lr)
                self.stop_together()
                if self.due(run.eval_interval):
                    self.evaluate()
                if self.due(run.checkpoints.interval) or (self.save_failed and self.due(run.log_interval)):
                    self.save()

    def draw_dropout(self) -> None:
        """Dropout is drawn from (seed, position), on each rank its own."""
        if not self.run.model_hyperparams.dropout:  # nothing is drawn, and a quick step would be slower for it
            return
        key = self.progress.position + (self.ranks.rank << 40)
        torch.manual_seed(int(derive_keys(self.run.seed, np.array([key]))[0]))

    def take_recorded(self, micro_batches: list[Batch], start: float, bar: tqdm) -> None:
        """A step that is launched, and not waited for unless something is due that needs it done."""
        run, step = self.run, self.progress.step + 1
        self.draw_dropout()
        self.recorded.take(micro_batches, step, self.lr())
        self.count(0.0)
        waits = step == 1 or any(map(self.due, (run.log_interval, run.eval_interval, run.checkpoints.interval)))
        heard = list(self.recorded.heard(0 if waits else LAG))
        self.progress.seconds += time.perf_counter() - start
        for taken, loss, grad_norm in heard:
            self.log(bar, taken.step, loss, grad_norm, taken.lr)

    def settle(self) -> None:
        """Wait for the steps that are on their way."""
        if self.recorded:
            for _ in self.recorded.heard(0):
                pass

    def stand_before(self, step: int) -> None:
        """This step changed nothing, and nor did those after it."""
        p = self.progress
        p.tokens -= (p.step - step + 1) * self.tokens_per_step
        p.step = step - 1

    def compute_gradients(self, micro_batches: list[Batch]) -> tuple[float, float]:
        """(loss, norm of the gradient before clipping), of all ranks together."""
        self.draw_dropout()
        loss = self.accumulate(micro_batches)
        self.ranks.sum_([loss, *self.loads])
        norm = self.clip()
        # Here, once in a step, the host waits for the device: no update by a gradient that is not finite.
        return tuple(torch.stack((loss, norm)).tolist())

    def clip(self) -> Tensor:
        """The norm of the gradients, which the optimizer will bring to `grad_clip`."""
        norm = self.ranks.norm(list(self.model.parameters()))
        self.optimizer.clip(norm, self.run.grad_clip)
        return norm

    def accumulate(self, micro_batches: list[Batch]) -> Tensor:
        """The gradients of the mean loss over all targets of all micro-batches, as one large batch would give them:
        each micro-batch's mean is weighted by its share of the targets that are not ignored. Of several ranks, the
        gradients are all ranks' together, and the loss is this rank's part of it."""
        total = self.ranks.targets(sum(batch.n_targets for batch in micro_batches))
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches, 1):
            if not self.ranks.stop_together:
                self.signals.give_up_late()  # nothing has changed yet
            with self.ranks.together(last=i == len(micro_batches)):
                with self.autocast():
                    _, mean = self.forward(batch.x, batch.y, source=batch.source)
                share = mean * (batch.n_targets / total)
                share.backward(self.ranks.seed)
            loss += share.detach()
        return loss

    def update_weights(self, loss: float, grad_norm: float) -> float:
        """One optimizer step; returns its learning rate. Raises NonFinite, before anything changes, where it must."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFinite(not_finite(self.progress.step + 1, loss, grad_norm))
        lr = self.lr()
        self.optimizer.set_lr(lr / self.run.learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        return lr

    def lr(self) -> float:
        """The next step's learning rate."""
        return lr_at(self.progress.step, self.run) * 0.5 ** len(self.progress.rollbacks)

    def roll_back(self, error: NonFinite) -> None:
        """Back to the last good checkpoint, past all data up to here, at half the learning rate.

        Where `on_nan` does not ask for it, or it was done MAX_ROLLBACKS times, the error is raised again. The
        checkpoint is then written anew with the rollback in it, so that a resumed run knows of it too.
        """
        reached = self.progress
        number = len(reached.rollbacks) + 1
        if self.run.on_nan != "rollback" or number > MAX_ROLLBACKS:
            raise error
        with self.signals.held():
            self.optimizer.zero_grad()
            self.load(self.find_checkpoint())
            for load in self.loads:  # no checkpoint has what routers have counted since the last update
                load.zero_()
            step = self.progress.step
            about = {"rollback": number, "from_step": reached.step + 1, "lr_factor": 0.5**number, "why": str(error)}
            self.progress.skipped = reached.position + 1 - step
            self.progress.rollbacks = [*reached.rollbacks, {"step": step, **about}]
            self.rewind(step)  # every rank has loaded by then
            if self.ranks.main:
                warn(f"{error}; going back to step {step:,}, past the data since then, with the learning rate times "
                     f"{0.5**number:g} (rollback {number} of at most {MAX_ROLLBACKS})")
                self.metrics.add(step=step, tokens=self.progress.tokens, **about)
            self.saved = -1
            self.save()

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
        place = (self.device, self.progress.position, self.ranks.rank, self.ranks.world)
        return Loader(self.corpus.train, *order, *place, objective=self.objective)

    # -- telling

    def progress_bar(self) -> tqdm:
        self.logged = (self.progress.tokens, self.progress.seconds)
        return self.console.start(self.progress.step, self.run.max_iters, hidden=not self.ranks.main)

    def log(self, bar: tqdm, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """The bar at every step; a line of metrics.jsonl and of the console at each log_interval and at the first step.
        Recorded steps are told some steps late, but no line is due before all are done."""
        p = self.progress
        tokens, seconds = p.tokens - self.logged[0], p.seconds - self.logged[1]  # since the last line
        speed = tokens / max(seconds, 1e-9)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if p.step == step and (self.due(self.run.log_interval) or step == 1):
            rates = {"lr": lr, "grad_norm": grad_norm, "tokens_per_s": speed, "seconds": p.seconds}
            self.logged = (p.tokens, p.seconds)
            if self.ranks.main:
                self.metrics.add(step=p.step, tokens=p.tokens, loss=loss, **rates)
                self.console.print_step(step, self.run.max_iters, loss, lr, grad_norm, speed)

    def evaluate(self) -> None:
        """Losses of both splits, the strict one where the model sees the future, a sample of text, the curves."""
        run = self.run
        with evaluating(self.model):
            with self.autocast():
                results = {}
                for name, split in (("train", self.corpus.train), ("val", self.corpus.val)):
                    asked = (split, run.eval_iters, run.batch_size, self.lengths, self.objective, self.ranks)
                    results[f"{name}_loss"], results[f"{name}_bpb"] = mean_loss(self.forward, *asked)
            text = self.examine(results) if self.model.generates else ""
        with self.signals.held():
            self.evaluated, self.val_loss = self.progress.step, results["val_loss"]
            if self.ranks.main:
                self.metrics.add(step=self.progress.step, tokens=self.progress.tokens, **results)
                self.console.print(report(self.progress.step, results, text))
        if self.ranks.main:
            self.draw()

    def examine(self, results: dict) -> str:
        """What rank 0 does by itself: the strict loss, into `results`, and a sample of text, which it returns."""
        if self.model.causal and not self.run.sample_length:
            return ""
        with self.ranks.whole(self.model) as model:
            if model is None:
                return ""
            if not model.causal:
                with self.autocast():
                    found = strict_loss(model, self.corpus.val, rows=self.run.batch_size, device=self.device)
                results["strict_loss"], results["plain_at_strict"] = found
            return self.sample(model) if self.run.sample_length else ""

    def sample(self, model: nn.Module) -> str:
        run = self.run
        asked = (run.sample_length, run.seed, self.device)
        if not model.takes_source:
            return sample_text(model, self.encoder, run.sample_prompt, *asked)
        source = [*encode_with_sentinels(self.encoder, run.sample_prompt), self.encoder.eot]
        if not run.sample_prompt:
            first = self.objective.make_batch(self.corpus.val, EVAL_SEED, 0, 1).source[0].tolist()
            source = [token for token in first if token != self.encoder.pad]
        return sample_answer(model, self.encoder, source, *asked)

    def draw(self) -> None:
        if self.run.img_path is None:
            return
        try:
            plot.curves(self.metrics.path, self.run.img_path)
        except Exception as error:
            warn(f"cannot draw the curves in {self.run.img_path} ({type(error).__name__}: {error})")

    # -- saving

    def save(self) -> None:
        """A checkpoint of this step, if there is none yet. What goes wrong is told, and tried again at the next log."""
        self.settle()
        step = self.progress.step
        if not self.run.checkpoints.create_checkpoints or self.saved == step:
            return
        self.check_weights()
        tensors, optimizer = self.ranks.gather(own_tensors(self.model)), self.ranks.gather(self.optimizer.state_dict())
        if self.ranks.main:
            self.write(step, tensors, optimizer)
        else:
            self.saved, self.save_failed = step, False
        if self.ranks.sharded:  # where it failed, they try again together
            self.saved, self.save_failed = self.ranks.agree([self.saved, self.save_failed])

    def write(self, step: int, tensors: dict[str, Tensor], optimizer: dict) -> None:
        """A checkpoint of whole tensors."""
        fingerprints = {"dataset": self.corpus.fingerprint, "encoder": self.encoder.fingerprint}
        state = {"optimizer": optimizer, "progress": vars(self.progress)}
        files = {checkpoint.MODEL: write_model(self.model, self.encoder, self.record(), tensors),
                 checkpoint.STATE: write_state(state)}
        val_loss = self.val_loss if self.evaluated == step else None
        keep = self.run.checkpoints.keep
        with self.signals.held():
            try:
                save_checkpoint(self.root, step, files, val_loss, keep, {**fingerprints, "run": to_dict(self.run)})
                self.saved, self.save_failed = step, False
            except UserError as error:
                self.save_failed = True
                warn(f"{error}; trying again later")
        STATUS.update(step=step, saved=self.saved)

    def check_weights(self) -> None:
        found = torch.stack([(~torch.isfinite(to_local(p))).any() for p in self.model.parameters()]).float()
        if self.ranks.sharded:
            self.ranks.sum_([found])
        if found.any():
            bad = ", ".join(name for (name, _), n in zip(self.model.named_parameters(), found, strict=True) if n)
            raise NonFinite(f"step {self.progress.step:,}: these weights are not finite, and are not saved: {bad}")

    def record(self) -> dict:
        """What a model file tells about its training."""
        p = self.progress
        about = {"step": p.step, "tokens": p.tokens, "seconds": round(p.seconds, 3), "val_loss": self.val_loss}
        about |= {"rollbacks": p.rollbacks, "dataset": self.corpus.fingerprint, "torch": torch.__version__}
        return about | {"run": to_dict(self.run)}

    def finish(self) -> None:
        """After the last step: the model file."""
        self.check_weights()
        tensors = self.ranks.gather(own_tensors(self.model))
        if not self.ranks.main:
            return
        with self.signals.held():
            save_model(self.run.model_path, self.model, self.encoder, self.record(), tensors)
        p = self.progress
        print(f"{p.step:,} steps, {p.tokens:,} tokens in {p.seconds:,.0f} s; the model is in {self.run.model_path}")

    def save_where_it_stands(self) -> bool:
        """Save on the way out; whether there is something to resume. A run without a step has nothing to lose."""
        self.signals.heard = True
        if self.claimed and self.ranks.can_save:
            for work in (self.settle, self.save):  # what was saved before a step that was not finite is as it was
                try:
                    if self.ranks.can_save:
                        work()
                except (NonFinite, Lost) as error:
                    warn(str(error))
        return self.claimed and self.saved >= 0

    def standing(self) -> str:
        """What is on disk, for the last line that a user reads."""
        if not self.claimed:
            return "nothing was changed"
        if self.saved < 0:
            return "there is no checkpoint yet"
        return f"step {self.saved:,} is saved in {self.root}"

    def close(self) -> None:
        if self.recorded:
            self.recorded.graph = None  # NCCL would wait for it
        self.ranks.close()
        self.release()

    def release(self) -> None:
        if self.lock:
            self.lock.release()
            self.lock = None

    def memory_advice(self) -> str:
        """What took the memory that there was, and which keys to lower."""
        when = f"at step {self.progress.step + 1:,}" if self.claimed else "before the first step"
        told = f"{self.device.type} is out of memory {when}"
        with contextlib.suppress(Exception):  # whatever goes wrong in counting, the advice holds
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            free, total = device_memory(self.device)
            rows, T = self.run.batch_size, self.run.model_hyperparams.block_size
            rows = 1 if rows == "auto" else self.rows
            need = self.footprint(row=1 if self.ranks.sharded else None)  # no passes where the others take no part
            told += f", of {size(total)}: {need.told(rows, T)}"
        return f"{told}; {self.standing()}. {self.lower()}"

    def lower(self) -> str:
        """Which keys to lower where memory is short."""
        run, hyper = self.run, self.run.model_hyperparams
        rows, mend = run.batch_size, "Lower"
        if rows != "auto" and rows > self.ranks.world:
            numbers = f"{max(rows // 2, 1)} and {run.gradient_accumulation_steps * 2}"
            mend = (
                f"Halve batch_size and double gradient_accumulation_steps (to {numbers}), which computes the same, or "
                'set batch_size to "auto", or lower'
            )
        sizes = (f"model_hyperparams.{key} ({getattr(hyper, key)})" for key in ("block_size", "n_embd", "n_layer"))
        free = ", or set record to false" if run.record and can_record(self.device) else ""  # a recorded step's memory
        return f"{mend} {', '.join(sizes)}{free}."

    # -- checking

    def check(self) -> None:
        """What --check does: all that a run does before its first file, and what takes seconds. Writes nothing."""
        run = self.run
        self.get_ready()
        start = time.perf_counter()
        loss = self.rehearse(compile=False)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"the loss of the first batch is {loss}: {MEND_NON_FINITE}")
        read = sum(os.path.getsize(file.path) for file in self.corpus.files)
        for file in self.corpus.files if read <= VERIFIED else ():
            file.verify()
        need, rows = self.footprint(), self.rows
        total, (free, there) = need.fixed + rows * need.row, device_memory(self.device)
        saved, disk = need.weights + need.optimizer, shutil.disk_usage(existing(self.root))
        saved *= self.ranks.world if self.ranks.sharded else 1
        wanted = (run.checkpoints.keep + 2) * saved if run.checkpoints.create_checkpoints else 0
        lines = {
            "paths": f"{run.model_path} and {self.root} can be written",
            "fingerprints": f"dataset {self.corpus.fingerprint[:12]}…"
                            f"{' (read whole)' if read <= VERIFIED else ''}, encoder {self.encoder.fingerprint[:12]}…",
            "memory": f"about {size(total)} ({need.told(rows, run.model_hyperparams.block_size)}); {size(free)} of "
                      f"{size(there)} are free",
            "disk": f"{size(saved)} a checkpoint, {size(wanted)} for those that are kept; {size(disk.free)} are free",
            "first batch": f"loss {loss:.3f}, after {seconds:.2f} s, not compiled",
        }
        print("\n".join(f"{key:<12} {text}" for key, text in lines.items()))
        for message in run.warnings() if self.ranks.main else ():
            warn(message)
        if total > free:
            warn(f"that may be more memory than there is. {self.lower()}")
        if wanted > disk.free:
            warn("the checkpoints may fill the disk; lower checkpoints.keep, or name another checkpoints.path")
        print("all is well, and nothing was written")


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
    world, machines = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
    start = [short(sys.executable)]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        start = ["torchrun", f"--nproc_per_node={world}"]
    if machines != "1":  # the same on each of them
        start += [f"--nnodes={machines}", "--rdzv_backend=c10d", "--rdzv_endpoint=FIRST_MACHINE:29400"]
    words = [*start, short(os.path.abspath(__file__)), *argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def short(path: str) -> str:
    """Relative where the path is inside the working directory."""
    with contextlib.suppress(ValueError):  # another drive, on Windows
        relative = os.path.relpath(path)
        return path if relative.startswith(os.pardir) else relative
    return path


def main(argv: list[str], last: bool = False) -> int:
    """Train as the command line says; the exit code. `last`: nothing is to come after it in this process."""
    with contextlib.ExitStack() as streams:
        talks = os.environ.get("RANK", "0") == "0" and "--quiet" not in argv  # of several processes, the first one
        out = sys.stdout if talks else streams.enter_context(open(os.devnull, "w"))
        streams.enter_context(contextlib.redirect_stdout(Sturdy(out)))
        streams.enter_context(contextlib.redirect_stderr(Sturdy(sys.stderr)))
        return carry_out(argv, last)


def carry_out(argv: list[str], last: bool) -> int:
    checking, argv = "--check" in argv, [word for word in argv if word != "--check"]
    words = [word for word in argv if word != "--quiet"]
    run = load_run(words, CONFIGS)
    trainer = Trainer(run, Signals(), parse_arguments(words)[0], quiet="--quiet" in argv)
    for message in run.warnings() if os.environ.get("RANK", "0") == "0" and not checking else ():
        warn(message)
    try:
        with trainer.signals:
            if checking:
                trainer.check()
                return 0
            trainer.prepare()
            trainer.train()
            trainer.finish()
        return 0
    except (Interrupted, Lost) as stop:
        code = leave(trainer, stop, argv)
        if last:
            trainer.release()
            trainer.ranks.vanish(code)
        return code
    except NonFinite as error:
        tried = f" {MAX_ROLLBACKS} rollbacks did not help." if trainer.progress.rollbacks else ""
        message = f"error: {error}; {trainer.standing()}.{tried} {MEND_NON_FINITE}"
        if trainer.saved > 0:
            message += f"\n    {command(argv, resume=True)}"
        if is_first_to_report(message):
            print(message, file=sys.stderr)
        return 3
    except UserError as error:
        trainer.save_where_it_stands()
        STATUS.update(error=str(error)[:status_file.MAX_LENGTH])
        raise
    except BrokenPipeError:  # the reader of stdout left: `train.py … | head`
        if not trainer.ranks.sharded:  # sharded ranks only save together, and the others know nothing of it
            trainer.save_where_it_stands()
        raise
    except Exception as error:  # out of memory, perhaps in the middle of an update: what there is, is not saved
        if is_out_of_memory(error):
            raise UserError(trainer.memory_advice()) from error
        raise
    finally:
        trainer.close()


def leave(trainer: Trainer, stop: Interrupted | Lost, argv: list[str]) -> int:
    """Save, say how to go on, and return the exit code, after a signal or the loss of another process."""
    number = trainer.signals.received  # torchrun sends one to all when it has lost one
    saved = trainer.save_where_it_stands()
    told = f"\n{signal.Signals(number).name}" if number else f"error: {stop}"
    out = sys.stdout if number and not trainer.console.quiet else sys.stderr
    print(f"{told}: {trainer.standing()}; to {'go on' if saved else 'start again'}:", file=out)
    print(f"    {command(argv, resume=saved)}", file=out, flush=True)
    return 128 + number if number else 4


MEND_NON_FINITE = "Try a lower learning_rate, a longer warmup_iters or a lower grad_clip."

if __name__ == "__main__":
    run_cli(functools.partial(main, last=True))

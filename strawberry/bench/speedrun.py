"""`bench.py speedrun`: nanoGPT's best validation loss, and our time to the same loss.

Both train on the same tokens, each by its own train.py in a child process, and the same held-out windows judge both:
see strawberry/bench/speedrun_child.py. A finished run is a small file in --out/runs, and is not repeated.
"""

import argparse
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import encoder as encoders
from model import build
from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process, hardware
from strawberry.bench.common import (
    FIXED_VALUES,
    MANAGED_KEYS,
    format_command,
    list_results,
    list_spec_inputs,
    load_spec,
    parse_assignment,
    parse_quantity,
    split_list,
)
from strawberry.bench.compare import interrupt_on_signals, parse_learning_rates
from strawberry.bench.speedrun_report import (
    NANOGPT,
    STRAWBERRY,
    find_best_point,
    find_reached_point,
    make_row,
    write_speedrun,
)
from strawberry.bench.sweep import dump_without_comments, hash_code, hash_json, read_result_file
from strawberry.bench.train import find_nanogpt, make_nanogpt_folder, read_splits
from strawberry.common import UserError, atomic_write
from strawberry.config import to_dict
from strawberry.data.dataset import Corpus
from strawberry.data.token_file import TokenFileWriter
from strawberry.device import choose_device
from strawberry.outputs import Input, check_outputs, encoder_inputs
from strawberry.run_config import Run
from strawberry.training import setup

RESULT_FORMAT = 1  # format of the files in runs/; files of another format are not read
POLL_SECONDS = 0.3  # between polls of the children
ROLES = {NANOGPT: "_speedrun_nanogpt", STRAWBERRY: "_speedrun_strawberry"}
SIZE_TOLERANCE = 0.01  # of --kind gpt2: how far the non-embedding parameters may differ, as a share
SHARE_OF_STEPS = 0.4  # --steps, as a share of nanoGPT's, where it is not given
MAX_JOBS = 64


@dataclass(frozen=True)
class Kind:
    """A configuration of nanoGPT: the words of its command line, and how data is split and vocabularies are padded."""

    words: tuple[str, ...]
    division: float
    vocab_multiple: int  # of our vocabulary
    lrs: str | None  # None: its own


GPT2_WORDS = {"n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False, "dropout": 0.0, "block_size": 1024,
              "batch_size": 32, "gradient_accumulation_steps": 1, "max_iters": 1500, "lr_decay_iters": 1500,
              "warmup_iters": 100, "learning_rate": 6e-4, "min_lr": 6e-5, "log_interval": 10}  # fmt: skip
KINDS = {
    "char": Kind(("config/train_shakespeare_char.py",), 0.9, 8, None),
    "gpt2": Kind(tuple(f"--{key}={value}" for key, value in GPT2_WORDS.items()), 0.95, 64, "3e-4,6e-4,1e-3"),
}
# Keys of nanoGPT that the command sets itself, and the option for each.
NANOGPT_KEYS = {"learning_rate": "--nanogpt_lrs", "min_lr": "--nanogpt_lrs", "dataset": "--data", "device": "--device",
                "eval_interval": "--evaluations", "eval_iters": "--evaluations", "max_iters": "--nanogpt_steps",
                "lr_decay_iters": "--nanogpt_steps"}  # fmt: skip
NANOGPT_FIXED = ("init_from", "out_dir", "eval_only", "always_save_checkpoint", "wandb_log")
STRAWBERRY_KEYS = {key: option for key, option in MANAGED_KEYS.items()
                   if key not in ("learning_rate", "min_lr", "warmup_iters", "cooldown_frac")}  # fmt: skip
STRAWBERRY_KEYS |= {"max_iters": "--steps", "lr_decay_iters": "--steps", "eval_interval": "--evaluations",
                    "log_interval": "--evaluations", "dataset.path": "--data", "encoder_path": "--encoder",
                    "dataset.data_division": "--data_division", "dataset.load_from_file": "--data",
                    "model_hyperparams.block_size": "--nanogpt_set block_size=…"}  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py speedrun",
        "Train with nanoGPT's own train.py, and a config until its validation loss is as low as nanoGPT's best. The "
        "same command goes on after an interruption.",
    )
    add = parser.add_argument
    add("--nanogpt_path", type=Path, required=True, help="a checkout of nanoGPT")
    add("--kind", choices=list(KINDS), default="char", help="nanoGPT's configuration: train_shakespeare_char, or GPT-2 "
        "124M at 32 × 1,024 tokens a step (default char)")  # fmt: skip
    add("--config", required=True, help="our config; file.json:key=value,key=value changes its keys")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of our config; may be repeated")
    add("--data", type=Path, required=True, help="with char a text file, with gpt2 a token file of prepare.py")
    add("--encoder", help="encoder of the token file, with gpt2")
    add("--data_division", type=float, help="share of the tokens for training (default 0.9 for char, 0.95 for gpt2)")
    add("--steps", type=parse_quantity, help="our steps at most, over which our learning rate falls (default 0.4 of "
        "nanoGPT's)")  # fmt: skip
    add("--lrs", help="our learning rates to choose from, by seed 1 (default: the config's)")
    add("--nanogpt_lrs", help="nanoGPT's learning rates to choose from, by seed 1 (default: its own with char, "
        "3e-4,6e-4,1e-3 with gpt2)")  # fmt: skip
    add("--nanogpt_steps", type=parse_quantity, help="nanoGPT's steps (default 5000 with char, 1500 with gpt2)")
    add("--nanogpt_set", action="append", default=[], metavar="KEY=VALUE", help="a key of nanoGPT; may be repeated")
    add("--seeds", type=parse_quantity, default=3, help="runs of each side with its best learning rate (default 3)")
    add("--evaluations", type=parse_quantity, default=50, help="of each run (default 50)")
    add("--eval_tokens", type=parse_quantity, default=500_000, help="held-out tokens of an evaluation, at most "
        "(default 500k)")  # fmt: skip
    add("--jobs", type=parse_quantity, default=1, help="runs at once, each on a GPU of its own (default 1)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: cuda, else cpu")
    add("--out", default="img/speedrun", type=Path, help="directory of the results (default img/speedrun)")
    arguments = parser.parse_args(argv)
    for name in ("lrs", "nanogpt_lrs"):
        text = getattr(arguments, name)
        setattr(arguments, name, None if text is None else parse_rates(f"--{name}", text))
    if arguments.kind == "gpt2" and arguments.encoder is None:
        raise UserError("--kind gpt2: needs --encoder, the encoder of the token file --data")
    if arguments.kind == "char" and arguments.encoder is not None:
        raise UserError(f"--encoder {arguments.encoder}: --kind char has a token for each character; leave it out")
    if arguments.data_division is None:
        arguments.data_division = KINDS[arguments.kind].division
    if not 0 < arguments.data_division < 1:
        raise UserError(f"--data_division {arguments.data_division}: is a share of the tokens, between 0 and 1")
    return arguments


def parse_rates(option: str, text: str) -> list[float]:
    try:
        return parse_learning_rates(text)
    except UserError as error:
        raise UserError(str(error).replace("--lrs", option, 1)) from error


def check_keys(arguments: argparse.Namespace) -> None:
    """Raises UserError for keys of either side that the command sets itself."""
    _, _, changes = arguments.config.partition(".json:")
    for text in [*arguments.set, *(split_list(changes) if changes else [])]:
        key, _ = parse_assignment(text)
        if key in STRAWBERRY_KEYS:
            raise UserError(f"{text!r}: speedrun sets {key} itself; use {STRAWBERRY_KEYS[key]}")
        if key in FIXED_VALUES or key.startswith("checkpoints."):
            raise UserError(f"{text!r}: speedrun sets {key} itself; leave it out")
    for text in arguments.nanogpt_set:
        key, equals, _ = text.partition("=")
        if not equals:
            raise UserError(f"--nanogpt_set {text}: write key=value")
        if key in NANOGPT_KEYS:
            raise UserError(f"--nanogpt_set {text}: speedrun sets {key} itself; use {NANOGPT_KEYS[key]}")
        if key in NANOGPT_FIXED:
            raise UserError(f"--nanogpt_set {text}: speedrun sets {key} itself; leave it out")


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The tokens that both sides see, and our keys that name them."""

    splits: dict[str, np.ndarray]  # "train" and "val"
    vocab_size: int  # of the encoder
    nanogpt_vocab_size: int
    keys: dict  # of our run

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.nanogpt_vocab_size}".encode())
        for name in ("train", "val"):
            digest.update(self.splits[name].astype("<u2").tobytes() + b"|")
        return digest.hexdigest()


def encode_text(path: Path, division: float, folder: Path) -> Data:
    """A token for each character of a text, divided at the character where nanoGPT's prepare.py divides it. Our token
    file has an end token behind the last one; nanoGPT's has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--data {path}: cannot be read as text ({error})") from error
    if len(text) < 2:
        raise UserError(f"--data {path}: has {len(text)} characters; name a text file")
    encoder = encoders.from_characters(set(text))
    encoder.save(folder / "encoder.bin")
    tokens = np.array(encoder.encode(text))
    with TokenFileWriter(folder / "tokens.bin", encoder) as writer:
        writer.add(tokens)
    cut = int(division * len(tokens))
    keys = {"dataset.path": folder / "tokens.bin", "dataset.load_from_file": "true",
            "dataset.data_division": cut / (len(tokens) + 1), "encoder_path": folder / "encoder.bin"}  # fmt: skip
    return Data({"train": tokens[:cut], "val": tokens[cut:]}, encoder.vocab_size, len(set(text)), keys)


def read_token_file(path: Path, encoder_path: str, division: float) -> Data:
    """The splits of a token file. Raises UserError if nanoGPT cannot store its tokens."""
    encoder = encoders.load(encoder_path)
    multiple = KINDS["gpt2"].vocab_multiple
    vocab_size = -(-encoder.vocab_size // multiple) * multiple
    if encoder.vocab_size > 1 << 16:
        raise UserError(f"--encoder {encoder_path}: has {encoder.vocab_size:,} tokens, and nanoGPT stores ids in 16 "
                        f"bits; use one of at most {1 << 16:,}")  # fmt: skip
    corpus = Corpus(path, encoder.fingerprint, 1, division)
    keys = {"dataset.path": path, "dataset.load_from_file": "true", "dataset.data_division": division,
            "encoder_path": encoder_path}  # fmt: skip
    return Data(read_splits(corpus), encoder.vocab_size, vocab_size, keys)


def choose_windows(tokens: np.ndarray, block_size: int, eval_tokens: int) -> np.ndarray:
    """Held-out windows (n, block_size + 1): of those that divide the tokens from their start on, so many that their
    targets are at most eval_tokens (one at least), at equal distances.
    """
    n = (len(tokens) - 1) // block_size
    if n < 1:
        raise UserError(f"--data: {len(tokens):,} held-out tokens are no window of {block_size + 1:,}; give more text, "
                        "or a lower --data_division")  # fmt: skip
    starts = np.linspace(0, n - 1, min(max(eval_tokens // block_size, 1), n)).astype(np.int64) * block_size
    return np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[starts].astype(np.uint16)


# ---- the runs -------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """The settings that all runs share."""

    arguments: argparse.Namespace
    device: torch.device
    work: Path  # folder of the files that children read; nanoGPT's train.py runs in work/nanogpt
    data: Data
    words: list[str] = field(default_factory=list)  # of nanoGPT's command line, without learning rate
    nanogpt: dict = field(default_factory=dict)  # its settings and sizes
    run: Run | None = None  # ours
    ours: dict = field(default_factory=dict)  # its sizes
    steps: int = 0  # ours
    n_windows: int = 0
    prints: dict[str, str] = field(default_factory=dict)  # fingerprints of data and code

    @property
    def runs(self) -> Path:
        return self.arguments.out / "runs"

    @property
    def nanogpt_tokens_per_step(self) -> int:
        keys = ("batch_size", "gradient_accumulation_steps", "block_size")
        return math.prod(self.nanogpt[key] for key in keys)

    @property
    def nanogpt_lrs(self) -> list[float]:
        default = KINDS[self.arguments.kind].lrs
        own = [self.nanogpt["learning_rate"]] if default is None else parse_learning_rates(default)
        return self.arguments.nanogpt_lrs or own

    @property
    def lrs(self) -> list[float]:
        return self.arguments.lrs or [self.run.learning_rate]


@dataclass(frozen=True)
class Trial:
    """One training run."""

    side: str
    lr: float
    seed: int
    job: dict  # what the child reads, without paths
    key: str  # hash of all that the result depends on; the name of its file

    def __str__(self) -> str:
        return f"{self.side}, lr {self.lr:g}, seed {self.seed}"


def make_plan(arguments: argparse.Namespace, work: Path) -> Plan:
    """Prepare data, nanoGPT's folder and our config. Raises UserError, before any training, if sizes do not match."""
    directory, device = find_nanogpt(arguments.nanogpt_path), choose_device(arguments.device)
    check_jobs(arguments.jobs, device)
    division = arguments.data_division
    data = encode_text(arguments.data, division, work) if arguments.kind == "char" else (
        read_token_file(arguments.data, arguments.encoder, division))  # fmt: skip
    (work / "nanogpt").mkdir()
    make_nanogpt_folder(directory, work / "nanogpt", data.splits, data.nanogpt_vocab_size)
    plan = Plan(arguments, device, work, data)
    probe_nanogpt(plan)
    windows = choose_windows(data.splits["val"], plan.nanogpt["block_size"], arguments.eval_tokens)
    np.save(work / "windows.npy", windows)
    plan.n_windows, plan.steps = len(windows), arguments.steps or round(SHARE_OF_STEPS * plan.nanogpt["max_iters"])
    load_config(plan)
    check_sizes(plan)
    names = ("train.py", "model.py", "configurator.py", *(word for word in plan.words if not word.startswith("--")))
    texts = [(directory / name).read_bytes() for name in names if (directory / name).is_file()]
    child = Path(__file__).with_name("speedrun_child.py").read_text(encoding="utf-8")
    plan.prints = {"data": data.fingerprint(), "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
                   "nanogpt": hashlib.sha256(b"\0".join(texts)).hexdigest(), "code": hash_code(),
                   "child": hash_json(dump_without_comments(child)),
                   "machine": f"{hardware.describe_device(device)}, torch {torch.__version__}"}  # fmt: skip
    return plan


def check_jobs(jobs: int, device: torch.device) -> None:
    most = torch.cuda.device_count() if device.type == "cuda" else 1
    if jobs > min(most, MAX_JOBS):
        where = f"{most} GPU{'s' * (most > 1)}" if device.type == "cuda" else "a CPU"
        raise UserError(f"--jobs {jobs}: at most {most} on {where}, so that no two runs that are timed share one")


def probe_nanogpt(plan: Plan) -> None:
    """Set plan.words and plan.nanogpt. Raises UserError if its train.py does not get as far as its model."""
    arguments = plan.arguments
    dtype = "float32" if plan.device.type == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    keys = {"dataset": "same", "device": plan.device.type, "compile": plan.device.type == "cuda", "dtype": dtype,
            "eval_iters": 1, "always_save_checkpoint": False, "wandb_log": False}  # fmt: skip
    if arguments.nanogpt_steps:
        keys |= {"max_iters": arguments.nanogpt_steps, "lr_decay_iters": arguments.nanogpt_steps}
    words = [*KINDS[arguments.kind].words, *(f"--{key}={value}" for key, value in keys.items())]
    words += [f"--{text}" for text in arguments.nanogpt_set]
    (found,) = child_process.run_in_turns("_speedrun_probe", [[str(plan.work / "nanogpt"), *words]])
    if "why" in found:
        raise UserError(f"nanoGPT's train.py failed before its first step: {found['why']}")
    if found["max_iters"] < 2:
        raise UserError(f"--nanogpt_steps {found['max_iters']}: at least 2, since the first one compiles")
    interval = choose_interval(found["max_iters"], arguments.evaluations)
    plan.words, plan.nanogpt = [*words, f"--eval_interval={interval}"], found


def choose_interval(steps: int, evaluations: int) -> int:
    """The steps between nanoGPT's evaluations: the divisor of its steps that comes nearest, so that the last step is
    evaluated.
    """
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n * evaluations / steps)))


def load_config(plan: Plan) -> None:
    """Set plan.run and plan.ours: our config, by default with nanoGPT's batch, on the same tokens and windows."""
    arguments, theirs = plan.arguments, plan.nanogpt
    multiple = KINDS[arguments.kind].vocab_multiple
    defaults = {"vocab_size": -(-plan.data.vocab_size // multiple) * multiple, "block_size": theirs["block_size"],
                "batch_size": theirs["batch_size"], "gradient_accumulation_steps":
                theirs["gradient_accumulation_steps"]}  # fmt: skip
    common = [parse_assignment(f"{key}={value}") for key, value in (defaults | plan.data.keys).items()]
    plan.run = run = load_spec(arguments.config, [*common, *map(parse_assignment, arguments.set)])
    if run.batch_size == "auto":
        raise UserError('batch_size = "auto": is another one on another machine; give a number, --set batch_size=32')
    if run.warmup_iters >= plan.steps:
        raise UserError(f"warmup_iters = {run.warmup_iters}: the run ends before that, --steps is {plan.steps:,}; "
                        f"give --set warmup_iters={plan.steps // 20}")  # fmt: skip
    with torch.device("meta"):  # shapes without memory
        model = build(run.model_hyperparams)
    if model.takes_source or not model.generates or not model.causal:
        raise UserError(f"--config {arguments.config}: predicts something else than the next token from those before "
                        "it; give a causal decoder")  # fmt: skip
    setup.load_data(run)
    rows = run.batch_size * run.gradient_accumulation_steps
    plan.ours = {"params": model.num_params(), "params_total": model.num_params(non_embedding=False),
                 "tokens_per_step": rows * theirs["block_size"]}  # fmt: skip


def check_sizes(plan: Plan) -> None:
    """Raises UserError if our model is larger than nanoGPT's (char), or not as large (gpt2)."""
    ours, theirs = plan.ours, plan.nanogpt
    if plan.arguments.kind == "char" and ours["params_total"] > theirs["params_total"]:
        raise UserError(f"--config {plan.arguments.config}: has {ours['params_total']:,} parameters, and nanoGPT's "
                        f"{theirs['params_total']:,}; make it no larger, by n_embd or n_layer")  # fmt: skip
    if plan.arguments.kind == "gpt2" and abs(ours["params"] / theirs["params"] - 1) > SIZE_TOLERANCE:
        raise UserError(f"--config {plan.arguments.config}: has {ours['params']:,} parameters without embeddings and "
                        f"head, and nanoGPT's {theirs['params']:,}; make them equal within {SIZE_TOLERANCE:.0%}, by "
                        "n_embd, n_layer or n_ffn")  # fmt: skip


def make_nanogpt_trial(plan: Plan, lr: float, seed: int) -> Trial:
    """A run of nanoGPT's train.py. Its last learning rate keeps its share of the highest."""
    low = plan.nanogpt["min_lr"] / plan.nanogpt["learning_rate"] * lr
    words = [*plan.words, f"--learning_rate={lr!r}", f"--min_lr={float(f'{low:.6g}')!r}"]
    job = {"words": words, "seed": seed, "tokens_per_step": plan.nanogpt_tokens_per_step,
           "device": plan.device.type, "dtype": plan.nanogpt["dtype"]}  # fmt: skip
    prints = {name: plan.prints[name] for name in ("data", "windows", "nanogpt", "child", "machine")}
    return Trial(NANOGPT, lr, seed, job, f"{NANOGPT}-{hash_json([RESULT_FORMAT, job, prints])}")


def make_trial(plan: Plan, lr: float, seed: int, target: float) -> Trial:
    """A run of our config up to the loss `target`. Muon's learning rate and the last one keep their proportions."""
    run = to_dict(plan.run)
    scale = lr / run["learning_rate"]
    if run["optimizer_hyperparams"]["muon_lr"] is not None:
        run["optimizer_hyperparams"]["muon_lr"] *= scale
    every = max(1, plan.steps // plan.arguments.evaluations)
    run |= FIXED_VALUES | {
        "max_iters": plan.steps, "lr_decay_iters": plan.steps, "learning_rate": lr,
        "min_lr": run["min_lr"] * scale, "seed": seed, "device": plan.device.type, "eval_interval": every,
        "log_interval": every,
    }  # fmt: skip
    places = ("checkpoints", "model_path", "img_path", "encoder_path", "dataset")
    matters = {key: value for key, value in run.items() if key not in places}
    job = {"run": run, "target": target}
    hashed = hash_json([RESULT_FORMAT, matters, target, plan.prints])
    return Trial(STRAWBERRY, lr, seed, job, f"{STRAWBERRY}-{hashed}")


def rank_nanogpt(result: dict) -> float:
    """Its best loss: the lower, the better."""
    point = find_best_point(result)
    return math.inf if point is None else point[3]


def rank_strawberry(result: dict, target: float) -> tuple[float, float]:
    """Its seconds to the target, then its best loss: the lower, the better."""
    point = find_reached_point(result, target)
    return math.inf if point is None else point[2], rank_nanogpt(result)


class Pool:
    """Simultaneous runs, each on a GPU of its own and in a folder of its own until its result is written."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.running: dict[str, tuple[Trial, subprocess.Popen, int]] = {}

    @property
    def n_free(self) -> int:
        return self.plan.arguments.jobs - len(self.running)

    def folder(self, trial: Trial) -> Path:
        return self.plan.runs / trial.key

    def start(self, trial: Trial) -> None:
        """Start a run. Its caches of compiled code are empty, so that each run's compilation takes as long."""
        folder, used = self.folder(trial), {number for _, _, number in self.running.values()}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        job = trial.job | {"windows": str(self.plan.work / "windows.npy"), "folder": str(self.plan.work / "nanogpt"),
                           "result": str((self.plan.runs / f"{trial.key}.json").absolute())}  # fmt: skip
        if trial.side == STRAWBERRY:
            job["config"] = self.write_config(folder, job.pop("run"))
        atomic_write(folder / "job.json", json.dumps(job).encode())
        number = next(i for i in itertools.count() if i not in used)
        extra = {"TORCHINDUCTOR_CACHE_DIR": str((folder / "inductor").absolute()),
                 "TRITON_CACHE_DIR": str((folder / "triton").absolute())}  # fmt: skip
        extra |= child_process.gpu_environment(number) if self.plan.device.type == "cuda" else {}
        command = child_process.make_command(ROLES[trial.side], str((folder / "job.json").absolute()))
        child = child_process.start(command, folder / "log.txt", self.plan.arguments.jobs, extra)
        self.running[trial.key] = (trial, child, number)

    def write_config(self, folder: Path, run: dict) -> str:
        none = {"path": str(folder / "ck"), "create_checkpoints": False}
        paths = {"checkpoints": none, "model_path": str(folder / "model"), "img_path": None}
        atomic_write(folder / "config.json", json.dumps(run | paths).encode())
        return str((folder / "config.json").absolute())

    def collect_finished(self) -> list[tuple[Trial, str]]:
        """(trial, reason of its failure or "") of the children that have ended since the last call."""
        finished = []
        for key, (trial, child, _) in list(self.running.items()):
            if child.poll() is None:
                continue
            del self.running[key]
            folder, why = self.folder(trial), ""
            if child.returncode == 0 and (self.plan.runs / f"{key}.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                reason = child_process.read_failure(folder / "log.txt")
                why = f"exit code {child.returncode}, {reason}; see {folder}/log.txt"
            finished.append((trial, why))
        return finished

    def stop(self) -> None:
        child_process.stop_all([child for _, child, _ in self.running.values()])


class Speedrun:
    """The order of the runs: nanoGPT's learning rates with seed 1, its other seeds and ours to its loss; without
    finished runs.
    """

    def __init__(self, plan: Plan):
        self.plan, self.pool = plan, Pool(plan)
        self.results: dict[str, dict] = {}
        self.failures: dict[str, str] = {}
        self.nanogpt_grid = [make_nanogpt_trial(plan, lr, 1) for lr in plan.nanogpt_lrs]

    def get_result(self, trial: Trial) -> dict | None:
        """The result of a trial, from this command or an earlier one."""
        path = self.plan.runs / f"{trial.key}.json"
        if trial.key not in self.results and path.exists():
            self.results[trial.key] = read_result_file(path)
        return self.results.get(trial.key)

    def find_best(self, grid: list[Trial], rank) -> Trial | None:
        """The trial of a grid with the lowest rank; None until all of it is done."""
        results = [self.get_result(trial) for trial in grid]
        if not grid or None in results:
            return None
        ranks = [rank(result) for result in results]
        return grid[ranks.index(min(ranks))]

    def list_nanogpt_seeds(self) -> list[Trial]:
        """nanoGPT's runs that the table averages; none until its learning rate is chosen."""
        best = self.find_best(self.nanogpt_grid, rank_nanogpt)
        return [make_nanogpt_trial(self.plan, best.lr, seed) for seed in self.seeds] if best else []

    @property
    def seeds(self) -> range:
        return range(1, self.plan.arguments.seeds + 1)

    def find_target(self, seed: int) -> float | None:
        """nanoGPT's best loss with that seed; None until its run is done. Raises UserError if all losses diverged."""
        trials = self.list_nanogpt_seeds()
        result = self.get_result(trials[seed - 1]) if trials else None
        if result is None:
            return None
        point = find_best_point(result)
        if point is None:
            raise UserError(f"{trials[seed - 1]}: no validation loss is finite; give lower --nanogpt_lrs")
        return point[3]

    def list_grid(self) -> list[Trial]:
        """Our runs with seed 1; none until the loss that they must reach is known."""
        target = self.find_target(1)
        return [] if target is None else [make_trial(self.plan, lr, 1, target) for lr in self.plan.lrs]

    def list_seeds(self) -> list[Trial]:
        """Our runs that the table averages, as far as the losses that they must reach are known."""
        target = self.find_target(1)
        best = self.find_best(self.list_grid(), lambda result: rank_strawberry(result, target))
        targets = {seed: self.find_target(seed) for seed in self.seeds} if best else {}
        return [make_trial(self.plan, best.lr, seed, loss) for seed, loss in targets.items() if loss is not None]

    def list_pending(self) -> list[Trial]:
        """The runs that can start now."""
        known = [*self.nanogpt_grid, *self.list_nanogpt_seeds(), *self.list_grid(), *self.list_seeds()]
        waiting = {t.key: t for t in known if self.get_result(t) is None and t.key not in self.failures}
        return [trial for key, trial in waiting.items() if key not in self.pool.running]

    @property
    def total(self) -> int:
        return len(self.nanogpt_grid) + len(self.plan.lrs) + 2 * (self.plan.arguments.seeds - 1)

    def run(self) -> None:
        """Train all runs without a result. A run that fails is reported; those that do not need it continue."""
        try:
            while (waiting := self.list_pending()) or self.pool.running:
                for trial in waiting[: self.pool.n_free]:
                    print(f"{trial}: started", flush=True)
                    self.pool.start(trial)
                while not (finished := self.pool.collect_finished()):
                    time.sleep(POLL_SECONDS)
                for trial, why in finished:
                    self.failures |= {trial.key: why} if why else {}
                    print(f"{trial}: {f'failed: {why}' if why else self.describe(trial)}", flush=True)
        except BaseException:
            self.pool.stop()
            self.pool.collect_finished()
            raise

    def list_rows(self) -> list[dict]:
        """The finished runs of all seeds, as plain data."""
        spec, rows = self.plan.arguments.config, []
        for trial in self.list_nanogpt_seeds():
            rows.append(self.make_row(trial, self.find_target(trial.seed), NANOGPT) | self.get_sizes(NANOGPT))
        for trial in self.list_seeds():
            rows.append(self.make_row(trial, trial.job["target"], spec) | self.get_sizes(STRAWBERRY))
        return rows

    def list_grid_rows(self) -> list[dict]:
        rows = []
        for trial in self.nanogpt_grid:
            rows.append(self.make_row(trial, rank_nanogpt(self.get_result(trial)), NANOGPT))
        return rows + [self.make_row(trial, trial.job["target"], self.plan.arguments.config)
                       for trial in self.list_grid()]  # fmt: skip

    def make_row(self, trial: Trial, target: float, config: str) -> dict:
        return make_row(trial.side, config, trial.lr, trial.seed, target, self.get_result(trial))

    def get_sizes(self, side: str) -> dict:
        sizes = self.plan.nanogpt if side == NANOGPT else self.plan.ours
        return {key: sizes[key] for key in ("params", "params_total")}

    def describe(self, trial: Trial) -> str:
        result = self.get_result(trial)
        best = find_best_point(result)
        if best is None:
            return "no validation loss was finite"
        if trial.side == NANOGPT or (reached := find_reached_point(result, trial.job["target"])) is None:
            text = f"best validation loss {best[3]:.4f} at step {best[0]:,}, after {best[2]:,.1f} s in steps"
            missed = "" if trial.side == NANOGPT else f"{best[3] - trial.job['target']:.4f} above nanoGPT's: "
            return missed + text
        return f"validation loss {reached[3]:.4f} at step {reached[0]:,}, after {reached[2]:,.1f} s in steps"


def describe_plan(plan: Plan) -> list[str]:
    """Sentences that state what is compared."""
    theirs, ours, run = plan.nanogpt, plan.ours, plan.run
    train, val = (len(plan.data.splits[name]) for name in ("train", "val"))
    their_tokens = theirs["max_iters"] * plan.nanogpt_tokens_per_step
    our_tokens = plan.steps * ours["tokens_per_step"]
    return [
        f"nanoGPT: {theirs['params']:,} parameters without embeddings and head, {theirs['params_total']:,} in all; "
        f"{theirs['max_iters']:,} steps of {plan.nanogpt_tokens_per_step:,} tokens, "
        f"{their_tokens / train:.2f} times its training tokens.",
        f"strawberry: {plan.arguments.config}, {ours['params']:,} parameters without embeddings and head, "
        f"{ours['params_total']:,} in all; at most {plan.steps:,} steps of {ours['tokens_per_step']:,} tokens, "
        f"{our_tokens / train:.2f} times its training tokens; "
        f"{'Muon' if run.optimizer_hyperparams.use_muon else 'AdamW'}.",
        f"Data: {plan.arguments.data}, {train:,} tokens for training and {val:,} held out, the same for both. Both are "
        f"judged by the same {plan.n_windows * theirs['block_size']:,} of these, in windows of "
        f"{theirs['block_size']:,}.",
    ]  # fmt: skip


def run(argv: list[str]) -> int | None:
    """Train to nanoGPT's best validation loss: seconds and tokens of nanoGPT's train.py, and of a config."""
    arguments = parse_arguments(argv)
    check_keys(arguments)
    find_nanogpt(arguments.nanogpt_path)
    names = ("train.py", "model.py", "configurator.py")
    checked = [Input("--nanogpt_path", arguments.nanogpt_path / name) for name in names]
    checked += [Input("--data", arguments.data), *(encoder_inputs("--encoder", arguments.encoder or "chars:"))]
    check_outputs(list_results("speedrun", arguments.out),
                  [*checked, *list_spec_inputs("--config", [arguments.config])])  # fmt: skip
    runs = arguments.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix="work-") as folder:
        speedrun = Speedrun(make_plan(arguments, Path(folder).absolute()))
        print("\n".join(describe_plan(speedrun.plan)))
        done = [trial for trial in speedrun.nanogpt_grid if speedrun.get_result(trial)]
        known = f"{len(done)} of nanoGPT's are done already"
        print(f"{speedrun.total} runs, {arguments.jobs} at once; {known}\n", flush=True)
        try:
            with interrupt_on_signals():
                speedrun.run()
        except KeyboardInterrupt:
            again = format_command(setup.relative_path(sys.executable), "speedrun", argv)
            print(f"\ninterrupted: finished runs are kept in {runs}; to go on:\n    {again}", flush=True)
            return 130
    if speedrun.failures:
        raise UserError(f"{len(speedrun.failures)} runs failed: {'; '.join(speedrun.failures.values())}")
    rows, grid = speedrun.list_rows(), speedrun.list_grid_rows()
    command = format_command("python", "speedrun", argv)
    print("\n" + write_speedrun(arguments.out, rows, grid, describe_plan(speedrun.plan), command))
    print(f"\nthe table and the picture are in {arguments.out}")
    return None

"""Measures models against each other.

    python bench.py compare air.json air.json:retention=none tinystar_v0.2.json --tokens 5M --seeds 3 --match params

compare trains each config on the same data, in the same order, with the same tokens per step, budget and schedule, the
learning rate tuned over the same grid for each, and writes what came out to img/compare: compare.md and compare.json, a
table; compare.png, validation bits per byte against tokens, FLOPs and seconds; runs/, a small file for each finished
run, by which the same command goes on after an interruption and redoes nothing.

`config.json:key=value,key=value` changes keys of one config, `--set key=value` of all. Keys of the model need no
prefix: `air.json:r_layer=0` is `air.json:model_hyperparams.r_layer=0`.

    python bench.py decode air.json tinystar-v0.2-modernbase.json bin/air.strawberry --batches 1,64 --contexts 128,8k

decode measures how fast text is made: tokens/s at each batch and context, beside the floor that reading weights and
cache sets at the speed at which this machine copies memory; a table and a picture in img/decode.
`decode --against nanogpt --nanogpt_path ~/nanoGPT` measures beside a nanoGPT checkout's generate.

    python bench.py train --config air.json strawberry-large.json:batch_size=16 --profile --json speed.json

train measures how fast configs train, in train.py's own loop: tokens/s, a step's parts, arithmetic beside what a large
matrix product reaches, memory, and with --profile what the GPU does. `train --against nanogpt --nanogpt_path ~/nanoGPT`
runs a nanoGPT checkout's own train.py and this one on the same text.

    python bench.py growth --jobs 6

growth measures and draws how tokens/s and memory of training change with the window and with the width.

    python bench.py nanogpt --nanogpt_path ~/nanoGPT [--compile]

times training steps of a nanoGPT checkout's model and of tinystar in its manner, in turns.

    python bench.py scale --config air.json --processes 1,2,4 --parallel ddp,fsdp

scale measures how training speeds up with processes, one for each GPU: tokens/s, memory, the link between them.

    python bench.py serve air.json --clients 16 --rows 16

asks serve.py for texts from many clients at once, in turns with a server that makes one text at a time.

compare's runs are child processes: train.py's own Trainer, told by a JSON file. So one that fails takes no other along,
and several share a device (--jobs). Speed is measured apart from them, while nothing else runs.

Index:  numbers and names · configs · equal sizes · runs · children · speed · training them all · the table ·
        the picture · compare · nanogpt · decode: bytes, timing, table and picture, the command, against nanoGPT ·
        train: one config's speed, the command, against nanoGPT · growth · scale · serve · the command
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import http.client
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import decode
import encoder as encoders
import plot
import train
from checkpoint import load_model, save_model
from model import CONFIGS, Embedding, LanguageModel, LearnedPositions, build
from optimizer import build_optimizer
from options import (
    OptimizerHyperparams,
    Run,
    UserError,
    atomic_write,
    declared,
    find_config,
    load_run,
    nearest,
    run_cli,
    to_dict,
)
from strawberry.cache import Cache, ChunkCache, iter_layer_caches
from strawberry.common import Input, Output, check_outputs
from strawberry.data.dataset import Corpus
from strawberry.ops.linear import Int8Weight
from train import Signals, Trainer

EVALUATIONS = 20  # in each run: the points of its curve
MIN_LR = 0.1  # the learning rate at the end, as a share of the highest
TOLERANCE = 0.02  # of --match params
FORMAT = 1  # of the files in runs/: those of another are not read
POLL_SECONDS = 0.3  # between looks at the children
CODE = ("model.py", "optimizer.py", "train.py", "strawberry/**/*.py")  # what a run's result depends on

# Keys that are the same for all, as the first config has them: what is seen, in which portions, and how it is judged.
SHARED = ("dataset.path", "dataset.load_from_file", "dataset.data_division", "encoder_path",
          "model_hyperparams.vocab_size", "model_hyperparams.block_size", "batch_size", "gradient_accumulation_steps",
          "eval_iters", "grad_clip", "dtype", "compile")  # fmt: skip

# Keys that compare sets itself, and how it is told to.
MANAGED = {
    "max_iters": "--tokens", "lr_decay_iters": "--tokens", "warmup_iters": "--warmup", "cooldown_frac": "--cooldown",
    "learning_rate": "--lrs", "min_lr": "--lrs", "seed": "--seeds", "device": "--device", "model_path": "--out",
    "img_path": "--out", "checkpoints.path": "--out",
}  # fmt: skip
FIXED = {  # and those that have one value here
    "decay_lr": True, "init_from": "scratch", "objective": "next", "sample_length": 0, "sample_prompt": "",
}  # fmt: skip

# ---- numbers and names ---------------------------------------------------------------------------------------------


def quantity(text: str) -> int:
    """A positive whole number, short or long.

    >>> quantity("5M"), quantity("1.5B"), quantity("100k"), quantity("2e6")
    (5000000, 1500000000, 100000, 2000000)
    """
    sizes = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
    digits, size = (text[:-1], sizes[text[-1].lower()]) if text[-1:].lower() in sizes else (text, 1)
    try:
        number = float(digits) * size
    except ValueError:
        number = math.nan
    if not 1 <= number < 2**63:
        raise UserError(f"{text!r} is no positive number; write one like 5M, 100k or 2e6")
    return round(number)


def short(number: float) -> str:
    """Three digits and a letter: 4_012_345 → 4.01M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def split_list(text: str) -> list[str]:
    """The parts between commas that stand in no brackets and no quotes.

    >>> split_list('windows=[64,32],aft="conv"')
    ['windows=[64,32]', 'aft="conv"']
    """
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def full_name(key: str) -> str:
    """The dotted name of a key: those of the model and of the optimizer may be given without their section.

    >>> full_name("r_layer"), full_name("use_muon"), full_name("batch_size")
    ('model_hyperparams.r_layer', 'optimizer_hyperparams.use_muon', 'batch_size')
    """
    if "." in key or key in declared(Run):
        return key
    model_keys = set().union(*(declared(cls) for cls in CONFIGS.values()))
    for section, keys in (("model_hyperparams", model_keys), ("optimizer_hyperparams", declared(OptimizerHyperparams))):
        if key in keys:
            return f"{section}.{key}"
    return key


def parse_override(text: str) -> tuple[str, str]:
    """`r_layer=0` → ("model_hyperparams.r_layer", "0"). Refuses what compare sets itself."""
    key, equals, value = text.partition("=")
    name = full_name(key.strip().removeprefix("--"))
    if not equals or not name:
        raise UserError(f"{text!r} is no override; write key=value")
    if name in MANAGED:
        raise UserError(f"{text!r}: compare sets {name} for all alike; use {MANAGED[name]}")
    if name in FIXED or name in ("eval_interval", "log_interval") or name.startswith("checkpoints."):
        raise UserError(f"{text!r}: compare sets {name} itself; leave it out")
    return name, value.strip()


def list_results(name: str, out: Path, table: Path | None = None) -> list[Output]:
    """What a command writes into the directory --out; `table`: another place for its JSON, which --json names."""
    json_file = Output("--out", out / f"{name}.json", "benchmark") if table is None else json_output(table)[0]
    return [json_file, Output("--out", out / f"{name}.md", "report"), Output("--out", out / f"{name}.png", "picture")]


def json_output(path: Path | None) -> list[Output]:
    """The file of --json, where it is given."""
    return [] if path is None else [Output("--json", path, "benchmark")]


def list_read(option: str, specs: Iterable[str], runs: Iterable[Run] = ()) -> list[Input]:
    """The files that a command reads: the configs and models that an option names, and what the runs train on."""
    inputs = []
    for spec in specs:
        match = re.fullmatch(r"(.+?\.json5?)(?::(.*))?", spec, re.DOTALL)
        inputs.append(Input(option, find_config(match[1]) if match else spec))
    return inputs + [given for run in runs for given in train.list_inputs(run)]


# ---- configs -------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One line of the table: a config file, what is changed in it, and the model that it makes."""

    label: str
    file: str
    overrides: list[tuple[str, str]]  # its own, which win over --set
    run: Run | None = None
    changes: list[str] = field(default_factory=list)  # what compare changed, in words
    params: int = 0  # without embeddings
    params_total: int = 0
    flops: float = 0.0  # of a training step, per token
    causal: bool = True
    failure: str | None = None

    def load(self, common: list[tuple[str, str]]) -> None:
        """Read the config with `common` overrides under its own. Raises UserError, naming the config."""
        words = [f"--{key}={value}" for key, value in (*common, *self.overrides)]
        try:
            self.run = load_run(["--config", self.file, *words], CONFIGS)
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from error

    def measure(self) -> None:
        """Count what needs no training."""
        with torch.device("meta"):  # shapes without memory
            model = build(self.run.model_hyperparams)
        if model.takes_source or not model.generates:
            raise UserError(f"{self.label}: kind = {model.config.kind!r} predicts something else than the next token; "
                            "only models that do can be compared: try :kind=decoder")
        self.params, self.params_total = model.num_params(), model.num_params(non_embedding=False)
        self.flops, self.causal = model.flops_per_token(model.config.block_size), model.causal


def read_specs(specs: list[str]) -> list[Entry]:
    """`file.json:key=value,key=value` for each entry."""
    entries = []
    for spec in specs:
        match = re.fullmatch(r"(.+?\.json5?)(?::(.*))?", spec, re.DOTALL)
        file, texts = (match[1], split_list(match[2]) if match[2] else []) if match else (spec, [])
        label = " ".join([Path(file).stem, *(text.removeprefix("model_hyperparams.") for text in texts)])
        overrides = [parse_override(text) for text in texts]
        if (twice := next((key for key, _ in overrides if key in SHARED), None)) and len(specs) > 1:
            raise UserError(f"{spec}: {twice} must be the same for all; use --set {twice}=…")
        entries.append(Entry(label, file, overrides))
    for label in {entry.label for entry in entries}:
        same = [entry for entry in entries if entry.label == label]
        for entry in same if len(same) > 1 else ():
            entry.label = f"{Path(entry.file).parent.name}/{label}"
        if len({entry.label for entry in same}) < len(same):
            raise UserError(f"{label} is given twice; give each config once, under names that differ")
    return entries


def value_of(run: Run, dotted: str):
    for name in dotted.split("."):
        run = getattr(run, name)
    return run


def load_entries(specs: list[str], common: list[tuple[str, str]]) -> list[Entry]:
    """The entries, all with the first one's SHARED keys."""
    entries = read_specs(specs)
    first = entries[0]
    first.load(common)
    shared = {key: value_of(first.run, key) for key in SHARED}
    alike = [*common, *((key, json.dumps(value)) for key, value in shared.items())]
    for entry in entries:
        entry.load(common)
        differ = [key for key in SHARED if value_of(entry.run, key) != shared[key]]
        entry.changes += [f"{key} {value_of(entry.run, key)} → {shared[key]}" for key in differ]
        entry.load(alike if differ else common)
        entry.measure()
    return entries


# ---- equal sizes ---------------------------------------------------------------------------------------------------

# What widths are multiples of, from what a GPU likes best to the finest: (n_embd, channels of a head, other widths).
# n_embd is a multiple of its heads too, as n_qkv must be; but for the finest.
GRAINS = ((64, 16, 64), (32, 8, 32), (16, 8, 16), (8, 8, 8), (8, 2, 8), (2, 2, 2))
CLOSE = 0.005  # near enough to look no further
FAIR = 0.015  # near enough not to try the finest
STRETCH = 0.15  # how far one width may leave its proportion to n_embd, to meet the number


counted: dict[str, int] = {}  # what count has found: a search asks for the same again


def count(config) -> int:
    """Non-embedding parameters."""
    if repr(config) not in counted:
        with torch.device("meta"):
            counted[repr(config)] = build(config).num_params()
    return counted[repr(config)]


def to_multiple(value: float, of: int) -> int:
    return max(1, round(value / of)) * of


def other_widths(config, grain: tuple[int, int, int]) -> dict[str, tuple[float, int]]:
    """The widths that grow with n_embd: name → (now, what it must be a multiple of)."""
    _, head, step = grain
    found = {"n_qkv": (config.n_qkv, head * config.n_head)}
    if hasattr(config, "n_ffn"):
        gated = getattr(config, "ffn_type", "SwiGLU").lower() == "swiglu"
        found["n_ffn"] = (config.n_ffn or (8 / 3 if gated else 4) * config.n_embd, step)
    if getattr(config, "d_rank", None):
        found["d_rank"] = (config.d_rank, min(step, 8))
    if getattr(config, "attention_type", "").startswith("MHLA"):
        found |= {"kv_rank": (config.kv_rank, min(step, 8)), "rope_dim": (config.rope_dim, 2)}
    return found


def resized(config, n_embd: int, grain: tuple[int, int, int]):
    """The config with this n_embd and the other widths in proportion."""
    ratio = n_embd / config.n_embd
    others = {name: to_multiple(now * ratio, of) for name, (now, of) in other_widths(config, grain).items()}
    return dataclasses.replace(config, n_embd=n_embd, **others)


def meet(config, target: int, grain: tuple[int, int, int]):
    """The config with one width, the feed-forward's or else the attention's, moved to come nearest to the target."""
    widths, now = other_widths(config, grain), count(config)
    for name in ("n_ffn", "n_qkv"):
        width, of = widths.get(name, (0, 1))
        slope = (count(dataclasses.replace(config, **{name: int(width) + of})) - now) / of if width else 0
        if slope:
            wanted = min(max(width + (target - now) / slope, width * (1 - STRETCH)), width * (1 + STRETCH))
            return dataclasses.replace(config, **{name: to_multiple(wanted, of)})
    return config


def candidates(config, target: int, grain: tuple[int, int, int]) -> Iterator:
    """Configs of nearly `target` parameters: of the last n_embd below it and of the first one above."""
    heads = grain[1] * config.n_head if grain != GRAINS[-1] else 1
    step = math.lcm(grain[0], heads, config.n_ffn_experts)

    def small(n: int) -> bool:
        return n < 1 or count(resized(config, n * step, grain)) < target

    guess = max(1, round(config.n_embd * math.sqrt(target / count(config)) / step))  # matrices grow with the square
    low, high = guess - 1, guess  # in steps, until small(low) and not small(high)
    while small(high):
        low, high = high, 2 * high
    while not small(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if small(middle) else (low, middle)
    for n in {max(low, 1), high}:
        same = resized(config, n * step, grain)
        yield from (same, meet(same, target, grain))


def fit_params(config, target: int):
    """The config resized to `target` non-embedding parameters: (config, how far off, as a share)."""

    def off(c) -> float:
        return abs(count(c) / target - 1)

    best = config
    for grain in GRAINS:
        if off(best) <= (FAIR if grain == GRAINS[-1] else CLOSE):
            break
        valid = [c for c in candidates(config, target, grain) if not list(c.problems())]
        best = min([best, *valid], key=off)
    return best, count(best) / target - 1


def match_params(entries: list[Entry], target: int, common: list[tuple[str, str]]) -> None:
    """Resize every entry to `target` non-embedding parameters, within TOLERANCE. Raises UserError where none fits."""
    for entry in entries:
        old = entry.run.model_hyperparams
        new, off = fit_params(old, target)
        widths = {name: getattr(new, name) for name in ("n_embd", "n_qkv", "n_ffn", "d_rank", "kv_rank", "rope_dim")
                  if getattr(new, name, None) != getattr(old, name, None)}  # fmt: skip
        if abs(off) > TOLERANCE:
            nearest_widths = ", ".join(f"{name} {width}" for name, width in widths.items()) or "as it is"
            raise UserError(f"{entry.label}: no widths give {target:,} non-embedding parameters within "
                            f"{TOLERANCE:.0%}; the nearest ({nearest_widths}) gives {count(new):,}; change its n_layer "
                            "or n_head, or give another --params")
        entry.overrides += [(f"model_hyperparams.{name}", str(width)) for name, width in widths.items()]
        entry.changes += [f"{name} {getattr(old, name) or 'default'} → {width}" for name, width in widths.items()]
        shared = [(key, json.dumps(value_of(entries[0].run, key))) for key in SHARED]
        entry.load([*common, *shared])
        entry.measure()


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What all runs have in common."""

    steps: int
    tokens_per_step: int
    warmup: float  # share of the steps
    cooldown: float
    lrs: list[float]
    seeds: int
    jobs: int
    device: torch.device
    out: Path
    data: dict[str, str]  # fingerprints of the data, the encoder and the code

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Trial:
    """One training run."""

    label: str
    lr: float
    seed: int
    config: dict  # what train.py is told, but for the paths
    key: str  # the name of its result's file: all that the result depends on, hashed

    def __str__(self) -> str:
        return f"{self.label}, lr {self.lr:g}, seed {self.seed}"


def meaning(source: str) -> str:
    """A Python file without comments, docstrings and layout, which change no result."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree)


def code_fingerprint() -> str:
    """SHA-256 of the code that trains."""
    paths = sorted(path for name in CODE for path in Path(__file__).resolve().parent.glob(name))
    texts = [meaning(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def hashed(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def make_trial(entry: Entry, plan: Plan, lr: float, seed: int) -> Trial:
    """The run of one config with one learning rate and one seed."""
    run, steps = to_dict(entry.run), plan.steps
    every = max(1, steps // EVALUATIONS)
    if every >= 5:
        every -= every % 5  # so that an evaluation has a logged line, with the seconds, at its step
    muon_lr = run["optimizer_hyperparams"]["muon_lr"]
    if muon_lr is not None:  # goes with the learning rate, in the config's own proportion
        run["optimizer_hyperparams"]["muon_lr"] = muon_lr * lr / run["learning_rate"]
    run |= FIXED | {
        "max_iters": steps, "lr_decay_iters": steps, "warmup_iters": round(plan.warmup * steps),
        "cooldown_frac": plan.cooldown, "learning_rate": lr, "min_lr": MIN_LR * lr, "seed": seed,
        "device": plan.device.type, "eval_interval": every, "log_interval": max(1, every // 5),
    }  # fmt: skip
    places = ("checkpoints", "model_path", "img_path", "encoder_path")
    matters = {key: value for key, value in run.items() if key not in places}
    matters["dataset"] = {key: value for key, value in run["dataset"].items() if key != "path"}
    prints = {name: plan.data[name] for name in ("dataset", "encoder")}
    return Trial(entry.label, lr, seed, run, f"{hashed([FORMAT, matters, prints])}-{plan.data['code'][:8]}")


def read_result(plan: Plan, trial: Trial) -> dict | None:
    """What an earlier call found, or None."""
    path = plan.runs / f"{trial.key}.json"
    return read_result_file(path) if path.exists() else None


def read_result_file(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and its run is done again") from error


def honest_bpb(line: dict) -> float | None:
    """Validation bits per byte of an evaluation; of a model that sees the future, as it would be without.

    Such a model's evaluation also has the strict loss of some positions, and the plain one of the same positions: what
    seeing the future gains there is taken off.
    """
    bpb = line.get("val_bpb")
    if bpb is None or line.get("strict_loss") is None:
        return bpb
    return bpb * (1 + (line["strict_loss"] - line["plain_at_strict"]) / line["val_loss"])


def make_result(trial: Trial, lines: list[dict], diverged: bool) -> dict:
    """A finished run, from its metrics.jsonl. bits per byte is None where it diverged."""
    points = {line["step"]: line for line in lines if "val_bpb" in line}
    curve = [[line["tokens"], honest_bpb(line)] for _, line in sorted(points.items())]
    bpb = curve[-1][1] if curve and not diverged else None
    seconds = max((line["seconds"] for line in lines if "seconds" in line), default=None)
    return {"label": trial.label, "lr": trial.lr, "seed": trial.seed, "bpb": bpb, "seconds_in_steps": seconds,
            "curve": curve, "torch": torch.__version__, "run": trial.config}  # fmt: skip


# ---- children ------------------------------------------------------------------------------------------------------


def child_command(role: str, *arguments: str) -> list[str]:
    return [sys.executable, os.path.abspath(__file__), role, *arguments]


def start_child(command: list[str], log: Path, plan: Plan, **pipes) -> subprocess.Popen:
    """A child out of the terminal's reach: Ctrl-C is for this process, which passes it on once."""
    threads = str(max(1, (os.cpu_count() or 1) // plan.jobs))
    env = dict(os.environ)
    if plan.jobs > 1:
        env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **env}
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    with open(log, "ab") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file} | pipes
        return subprocess.Popen(command, stderr=file, env=env, **pipes, **apart)


def stop_children(children: list[subprocess.Popen], patience: float = 60) -> None:
    """Let each finish its step and save; a second Ctrl-C, or the end of patience, ends them."""
    try:
        for child in children:
            if child.poll() is None:
                child.terminate() if os.name == "nt" else child.send_signal(signal.SIGINT)
        end = time.monotonic() + patience
        for child in children:
            child.wait(max(0.0, end - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for child in children:
            child.kill()


def reason(log: Path) -> str:
    """Why a child failed: the last `error:` of its log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


def write_config(folder: Path, trial: Trial, **changes) -> Path:
    """The JSON file that a child reads; everything that it writes goes into the folder."""
    checkpoints = {"path": str(folder / "ck"), "interval": trial.config["max_iters"], "create_checkpoints": True,
                   "keep": 1}  # fmt: skip
    paths = {"checkpoints": checkpoints, "model_path": str(folder / "model"), "img_path": str(folder)}
    atomic_write(folder / "config.json", json.dumps(trial.config | paths | changes, indent=1).encode())
    return folder / "config.json"


def train_child(argv: list[str]) -> int | None:
    """A child's main: train.py, but for the curves that it draws at each evaluation, for which nobody looks here."""
    Trainer.draw = lambda self: None
    return train.main(argv)


class Pool:
    """Up to plan.jobs runs at once, each in a folder of its own until its result is written."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.running: dict[str, tuple[Trial, subprocess.Popen]] = {}

    def folder(self, trial: Trial) -> Path:
        return self.plan.runs / trial.key

    def start(self, trial: Trial) -> None:
        folder = self.folder(trial)
        config = write_config(folder, trial)
        resume = ["--init_from=resume"] if any((folder / "ck").glob("step_*")) else []
        command = child_command("_train", "--config", str(config), *resume)
        self.running[trial.key] = (trial, start_child(command, folder / "log.txt", self.plan))

    def finished(self) -> Iterator[tuple[Trial, dict | None, str]]:
        """(trial, its result or None, why not) of each child that has ended since. Writes the results."""
        for key, (trial, child) in list(self.running.items()):
            if child.poll() is None:
                continue
            del self.running[key]
            folder = self.folder(trial)
            lines = self.metrics(trial)
            evaluated = any(line["step"] == self.plan.steps and "val_bpb" in line for line in lines)
            done = child.returncode == 0 and evaluated
            if done or child.returncode == 3:  # train.py's code for a loss that is not finite
                result = make_result(trial, lines, diverged=not done)
                atomic_write(self.plan.runs / f"{key}.json", json.dumps(result).encode())
                shutil.rmtree(folder, ignore_errors=True)
                yield trial, result, ""
            else:
                yield trial, None, f"exit code {child.returncode}, {reason(folder / 'log.txt')}; see {folder}/log.txt"

    def metrics(self, trial: Trial) -> list[dict]:
        path = self.folder(trial) / "ck" / train.METRICS
        return plot.read_metrics(path) if path.exists() else []

    def steps_done(self) -> int:
        lines = [self.metrics(trial) for trial, _ in self.running.values()]
        return sum(metrics[-1]["step"] for metrics in lines if metrics)

    def stop(self) -> None:
        stop_children([child for _, child in self.running.values()])


# ---- speed ---------------------------------------------------------------------------------------------------------

MEASURED_SECONDS = 3.0


class Timer(Trainer):
    """A Trainer that is only measured: train.py's own loop, without evaluations."""

    def evaluate(self) -> None:
        pass

    def advance(self, steps: int, every: int) -> list[float]:
        """Train for `steps`; tokens/s of each `every` of them."""
        first = self.progress.step
        self.run.max_iters, self.run.log_interval = first + steps, every
        self.train()
        lines = plot.read_metrics(self.metrics.path)
        return [line["tokens_per_s"] for line in lines if line["step"] > first + (first == 0)]

    def measure(self) -> dict:
        self.advance(6, 3)  # the first steps allocate and choose kernels
        pace = statistics.median(self.advance(4, 2)) / self.tokens_per_step  # steps per second
        steps = min(max(round(MEASURED_SECONDS * pace), 10), 1000) // 10 * 10
        speed = statistics.median(self.advance(steps, steps // 10))
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        compiled = self.forward is not self.model
        return {"tokens_per_s": speed, "steps": steps, "memory": memory, "resident": resident(), "compiled": compiled}


def resident() -> int | None:
    """Bytes that this process had in memory at most, torch included; None where the system does not tell."""
    with contextlib.suppress(OSError, AttributeError):
        line = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(line[1]) * 1024
    return None


def speed_child(argv: list[str]) -> None:
    """A child's main: get ready, say so, and measure when told: by then nothing else runs."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        timer = Timer(load_run(["--config", *argv], CONFIGS), Signals())
        timer.prepare()
        print("ready", file=answers, flush=True)
        if sys.stdin.readline():
            print(json.dumps(timer.measure()), file=answers, flush=True)


def machine(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = ""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1].strip() if found else ""
    return f"{device.type}{f' {model}' if model else ''}, {os.cpu_count()} cores"


def speed_trial(entry: Entry, plan: Plan) -> Trial:
    """What a speed depends on: the run but for its learning rate and seed, the machine and torch's version."""
    trial = make_trial(entry, plan, entry.run.learning_rate, 1)
    return dataclasses.replace(trial, key=f"speed-{hashed([trial.key, machine(plan.device), torch.__version__])}")


def measure_speeds(entries: list[Entry], plan: Plan) -> dict[str, dict]:
    """label → tokens/s and memory of each config, alone on the device. Children get ready --jobs at a time, compiling
    included, then take turns. A config that fails here gets its `failure`."""
    trials = {entry.label: speed_trial(entry, plan) for entry in entries}
    found = {label: result for label, trial in trials.items() if (result := read_result(plan, trial))}
    missing = [entry for entry in entries if entry.label not in found]
    for first in range(0, len(missing), plan.jobs):
        group = missing[first : first + plan.jobs]
        found |= measure_group({entry.label: trials[entry.label] for entry in group}, plan)
        for entry in group:
            folder = plan.runs / trials[entry.label].key
            if entry.label in found:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                entry.failure = f"{reason(folder / 'log.txt')}; see {folder}/log.txt"
                tqdm.write(f"{entry.label}: failed: {entry.failure}")
    return found


def measure_group(trials: dict[str, Trial], plan: Plan) -> dict[str, dict]:
    children, found = {}, {}
    try:
        for label, trial in trials.items():
            folder = plan.runs / trial.key
            none = {"path": str(folder / "ck"), "create_checkpoints": False}
            command = child_command("_speed", str(write_config(folder, trial, checkpoints=none)))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            children[label] = start_child(command, folder / "log.txt", plan, **pipes)
        ready = [label for label, child in children.items() if child.stdout.readline() == "ready\n"]
        for label in ready:
            answer = children[label].communicate("go\n")[0]
            if children[label].returncode == 0:
                found[label] = json.loads(answer) | {"label": label, "machine": machine(plan.device)}
                path = plan.runs / f"{trials[label].key}.json"
                atomic_write(path, json.dumps(found[label]).encode())
                tqdm.write(f"{label}: {found[label]['tokens_per_s']:,.0f} tokens/s alone on the device")
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    return found


# ---- training them all ---------------------------------------------------------------------------------------------


class Contest:
    """Which runs there are to do, given those that are done: the grid of each config, then its other seeds."""

    def __init__(self, entries: list[Entry], plan: Plan):
        self.entries, self.plan = entries, plan
        self.grid = {entry.label: [make_trial(entry, plan, lr, 1) for lr in plan.lrs] for entry in entries}
        self.results: dict[str, dict] = {}
        self.pool = Pool(plan)

    def best(self, entry: Entry) -> float | None:
        """The learning rate with the lowest bits per byte, once the grid is done; the lowest where all diverged."""
        found = [self.results.get(trial.key) for trial in self.grid[entry.label]]
        if None in found:
            return None
        return min(found, key=lambda result: (math.inf if result["bpb"] is None else result["bpb"], result["lr"]))["lr"]

    def seeds(self, entry: Entry) -> list[Trial]:
        """The runs of the table: the winner of the grid, which is seed 1, and the other seeds."""
        lr = self.best(entry)
        seeds = range(1, self.plan.seeds + 1) if lr is not None else ()
        return [make_trial(entry, self.plan, lr, seed) for seed in seeds]

    def recall(self, trial: Trial) -> bool:
        """Whether the result is there, from this call or an earlier one."""
        if trial.key not in self.results and (result := read_result(self.plan, trial)):
            self.results[trial.key] = result
        return trial.key in self.results

    def waiting(self) -> list[Trial]:
        """What could be started now."""
        found = []
        for entry in (entry for entry in self.entries if not entry.failure):
            grid = [trial for trial in self.grid[entry.label] if not self.recall(trial)]
            found += grid or [trial for trial in self.seeds(entry) if not self.recall(trial)]
        return [trial for trial in found if trial.key not in self.pool.running]

    def done(self) -> int:
        """How many results there are, by now or from earlier calls."""
        for entry in self.entries:
            grid = [self.recall(trial) for trial in self.grid[entry.label]]
            for trial in self.seeds(entry) if all(grid) else ():
                self.recall(trial)
        return len(self.results)

    @property
    def total(self) -> int:
        return len(self.entries) * (len(self.plan.lrs) + self.plan.seeds - 1)

    def run(self) -> None:
        """Train what is not trained yet. A run that fails is told and left out; the others go on."""
        style = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
        total, done = self.total * self.plan.steps, len(self.results) * self.plan.steps
        every = 1 if sys.stderr.isatty() else 30  # seconds
        with tqdm(total=total, initial=done, bar_format=style, dynamic_ncols=True, mininterval=every) as bar:
            try:
                while (waiting := self.waiting()) or self.pool.running:
                    for trial in waiting[: self.plan.jobs - len(self.pool.running)]:
                        self.pool.start(trial)
                    while not self.collect():
                        self.show(bar)
                        time.sleep(POLL_SECONDS)
                self.show(bar)
            except KeyboardInterrupt:
                self.pool.stop()
                self.collect(stopped=True)
                raise

    def collect(self, stopped: bool = False) -> int:
        """Take in what has finished since; returns how many runs that were. Those that were stopped have not failed."""
        finished = list(self.pool.finished())
        for trial, result, why in finished:
            if result is None and stopped:
                continue
            if result is None:
                entry = next(entry for entry in self.entries if entry.label == trial.label)
                entry.failure = why
                tqdm.write(f"{trial}: failed: {why}")
            else:
                self.results[trial.key] = result
                bpb = "diverged" if result["bpb"] is None else f"{result['bpb']:.4f} bits per byte"
                tqdm.write(f"{trial}: {bpb}")
        return len(finished)

    def show(self, bar: tqdm) -> None:
        done = len(self.results)
        bar.set_postfix_str(f"{done}/{self.total} runs done, {len(self.pool.running)} running", refresh=False)
        bar.update(done * self.plan.steps + self.pool.steps_done() - bar.n)


# ---- the table -----------------------------------------------------------------------------------------------------


def mean_and_deviation(values: list[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard deviation of a sample (divided by n − 1), None of a single value."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def mean_curve(results: list[dict]) -> list[list[float]]:
    """[tokens, mean, standard deviation] wherever every seed was evaluated."""
    curves = [dict(map(tuple, result["curve"])) for result in results]
    places = [t for t in curves[0] if all(curve.get(t) is not None for curve in curves)] if curves else []
    return [[t, mean, deviation or 0.0]
            for t in places for mean, deviation in [mean_and_deviation([curve[t] for curve in curves])]]  # fmt: skip


def make_row(entry: Entry, grid: list[dict], seeds: list[dict], speed: dict | None) -> dict:
    """All that is known of one config, in plain data. bpb is None if a seed diverged or a run failed."""
    values = [result["bpb"] for result in seeds]
    mean, deviation = mean_and_deviation(values) if values and None not in values else (None, None)
    return {
        "label": entry.label, "arch": entry.run.model_hyperparams.arch,
        "optimizer": "Muon" if entry.run.optimizer_hyperparams.use_muon else "AdamW",
        "params": entry.params, "params_total": entry.params_total, "flops_per_token": entry.flops,
        "tokens_per_s": speed and speed["tokens_per_s"], "memory": speed and speed["memory"],
        "compiled": speed and speed["compiled"],
        "lr": seeds[0]["lr"] if seeds else None, "bpb": mean, "bpb_sd": deviation, "bpb_seeds": values,
        "grid": {f"{result['lr']:g}": result["bpb"] for result in grid},
        "curve": mean_curve(seeds), "changes": entry.changes, "failure": entry.failure,
        "model_hyperparams": to_dict(entry.run.model_hyperparams),
        "optimizer_hyperparams": to_dict(entry.run.optimizer_hyperparams),
    }  # fmt: skip


def bpb_text(row: dict) -> str:
    if row["failure"]:
        return "failed"
    if row["bpb"] is None:
        return f"diverged ({row['bpb_seeds'].count(None)} of {len(row['bpb_seeds'])})"
    return f"{row['bpb']:.4f}" + ("" if row["bpb_sd"] is None else f" ± {row['bpb_sd']:.4f}")


def ranked(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: math.inf if row["bpb"] is None else row["bpb"])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(rows: list[dict]) -> str:
    """The models, the best first."""
    memory = any(row["memory"] for row in rows)
    header = ["model", "optimizer", "learning rate", "parameters, non-embedding", "total", "MFLOP / token", "tokens/s"]
    header += ["memory, GB"] * memory + ["validation, bits per byte"]
    lines = []
    for row in ranked(rows):
        line = [row["label"], row["optimizer"], f"{row['lr']:g}" if row["lr"] else "–", f"{row['params']:,}",
                f"{row['params_total']:,}", f"{row['flops_per_token'] / 1e6:.1f}",
                f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "–"]  # fmt: skip
        line += [f"{row['memory'] / 1e9:.2f}" if row["memory"] else "–"] * memory
        lines.append([*line, bpb_text(row)])
    return markdown_table(header, lines)


def grid_table(rows: list[dict], lrs: list[float]) -> str:
    """Bits per byte of every run of the grid."""
    lines = []
    for row in ranked(rows):
        cells = [row["grid"].get(f"{lr:g}", "–") for lr in lrs]
        lines.append([row["label"], *("diverged" if c is None else c if c == "–" else f"{c:.4f}" for c in cells)])
    return markdown_table(["learning rate, seed 1", *(f"{lr:g}" for lr in lrs)], lines)


def settings(entries: list[Entry], plan: Plan) -> list[str]:
    """How everything was measured, a sentence each."""
    run = entries[0].run
    T, rows = run.model_hyperparams.block_size, run.batch_size * run.gradient_accumulation_steps
    evaluated = run.eval_iters * run.batch_size * T
    rate = f"{plan.lrs[0]:g} for all, not tuned." if len(plan.lrs) == 1 else (
        f"for each model the best of {', '.join(f'{lr:g}' for lr in plan.lrs)} by the last validation bits per byte "
        "with seed 1; that run is also the first of the mean, which flatters all models alike.")  # fmt: skip
    return [
        f"Data: {run.dataset.path}, encoder {run.encoder_path} ({run.model_hyperparams.vocab_size:,} tokens); the same "
        "order for all, given the seed.",
        f"Budget: {plan.tokens:,} tokens = {plan.steps:,} steps of {rows} rows of {T} tokens.",
        f"Schedule: warmup {plan.warmup:g} and cooldown {plan.cooldown:g} of the steps, down to {MIN_LR:g} of the "
        "learning rate.",
        f"Learning rate: {rate}",
        f"Validation: the same {evaluated:,} tokens at most, for all; ± is the standard deviation over "
        f"{plan.seeds} seeds (n − 1)." if plan.seeds > 1 else
        f"Validation: the same {evaluated:,} tokens at most, for all; one seed, so nothing is known of the noise.",
        f"Speed: training steps of each model alone on {machine(plan.device)}, torch {torch.__version__}, the median "
        "of ten stretches; seconds in the picture are tokens by this speed, without evaluation and compilation.",
        "FLOPs: matrix products of forward and backward, attention counted in full (T²).",
    ]  # fmt: skip


def own_choices(entries: list[Entry]) -> Iterator[str]:
    """What differs though it is no part of the architecture."""
    muon = any(entry.run.optimizer_hyperparams.use_muon for entry in entries)
    names = [name for name in declared(OptimizerHyperparams) if muon or name not in ("momentum", "muon_lr")]
    keys = [("optimizer_hyperparams", name) for name in names]
    for section, name in [*keys, ("model_hyperparams", "dropout")]:
        labels: dict[str, list[str]] = {}
        for entry in entries:
            value = getattr(getattr(entry.run, section), name)
            labels.setdefault(json.dumps(value), []).append(entry.label)
        if len(labels) > 1:
            told = "; ".join(f"{value} for {', '.join(those)}" for value, those in labels.items())
            yield f"{name} is each config's own: {told}. --set {name}=… makes it the same."
    if muon and any(entry.run.optimizer_hyperparams.muon_lr for entry in entries):
        yield "muon_lr, where a config sets it, keeps its proportion to the learning rate."


def caveats(entries: list[Entry], rows: list[dict], plan: Plan) -> list[str]:
    """What a reader should know before believing the table."""
    found = [f"{entry.label}: changed: {', '.join(entry.changes)}." for entry in entries if entry.changes]
    found += own_choices(entries)
    sizes = [entry.params for entry in entries]
    if max(sizes) > min(sizes) * (1 + 2 * TOLERANCE):
        found.append(f"Sizes differ: from {min(sizes):,} to {max(sizes):,} non-embedding parameters; --match params "
                     "makes them the same.")
    for edge, what in ((min(plan.lrs), "smallest"), (max(plan.lrs), "largest")):
        at_edge = [row["label"] for row in rows if row["lr"] == edge]
        if at_edge and len(plan.lrs) > 1:
            found.append(f"The best learning rate is the grid's {what} for {', '.join(at_edge)}: a better one may lie "
                         "beyond.")
    eager = [row["label"] for row in rows if row["compiled"] is False]
    if 0 < len(eager) < len(rows):
        found.append(f"Not compiled, unlike the others, and slower for it: {', '.join(eager)}.")
    cheats = [entry.label for entry in entries if not entry.causal]
    if cheats:
        found.append(f"{', '.join(cheats)}: sees the future, so that its bits per byte are those of the strict loss, "
                     "estimated from 512 positions.")
    found += [f"{row['label']}: failed: {row['failure']}" for row in rows if row["failure"]]
    return found


def report(entries: list[Entry], rows: list[dict], plan: Plan, command: str) -> str:
    """compare.md."""
    parts = [main_table(rows), "![validation bits per byte against tokens, FLOPs and seconds](compare.png)"]
    parts.append("\n".join(f"- {line}" for line in settings(entries, plan) + caveats(entries, rows, plan)))
    if len(plan.lrs) > 1:
        parts.append(grid_table(rows, plan.lrs))
    return "\n\n".join([*parts, f"```\n{command}\n```"]) + "\n"


# ---- the picture ---------------------------------------------------------------------------------------------------

PANELS = {  # what the x axis counts, and how much of it a token takes
    "training tokens": lambda row: 1.0,
    "training FLOPs": lambda row: row["flops_per_token"],
    "training time, alone on the device (s)": lambda row: row["tokens_per_s"] and 1 / row["tokens_per_s"],
}
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


def draw(rows: list[dict], title: str, seeds: int):
    """One sheet, three panels: bits per byte against tokens, FLOPs and seconds, the band one standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in ranked(rows) if row["curve"]]
    columns = 2 if max((len(row["label"]) for row in shown), default=0) > 34 else 3
    fig = Figure(figsize=(11, 4.3 + 0.2 * math.ceil(len(shown) / columns)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, 3, sharey=True)
    order = {row["label"]: i for i, row in enumerate(rows)}  # colours follow the command line, not the result
    for ax, (xlabel, per_token) in zip(panels, PANELS.items(), strict=True):
        for row in shown:
            if per_token(row):
                draw_curve(ax, row, per_token(row), order[row["label"]])
        style_panel(ax, xlabel)
    panels[0].set_ylabel("validation (bits per byte)", fontsize=11)
    limit(panels, shown)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    if shown:
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9,
                   frameon=False, title=f"final value, {'one seed' if seeds == 1 else f'mean ± sd of {seeds} seeds'}",
                   title_fontsize=9)  # fmt: skip
    return fig


def line_style(number: int) -> dict:
    """Colour, dashes and marker of the line of that number, unlike all others' up to three times the colours."""
    colour = plot.COLOURS[number % len(plot.COLOURS)]
    return {"color": colour, "linestyle": DASHES[number // len(plot.COLOURS) % len(DASHES)], "linewidth": 1.5,
            "marker": plot.MARKERS[number % len(plot.MARKERS)], "markersize": 5,
            "markerfacecolor": colour if number < len(plot.COLOURS) else "white"}  # fmt: skip


def draw_curve(ax, row: dict, scale: float, number: int) -> None:
    tokens, mean, deviation = zip(*row["curve"], strict=True)
    xs, style = [t * scale for t in tokens], line_style(number)
    ax.plot(xs, mean, **style, markevery=[len(xs) - 1], label=f"{row['label']}  {bpb_text(row)}")
    low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
    ax.fill_between(xs, low, high, color=style["color"], alpha=0.18, linewidth=0)


def style_panel(ax, xlabel: str) -> None:
    ax.set_xlabel(xlabel, fontsize=11)
    ax.tick_params(labelsize=9.5, color="0.5", which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.5")
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    log_scale(ax)


def log_scale(ax) -> None:
    """x on a log scale."""
    ax.set_xscale("log")
    log_ticks(ax.xaxis, [x for line in ax.lines for x in line.get_xdata() if x > 0])


def log_ticks(axis, values: list[float]) -> None:
    """Ticks at 1, 2 and 5 of each decade, in short numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values)) if values else 1
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=12))
    big = bool(values) and max(values) >= 1e10
    axis.set_major_formatter(FuncFormatter(power if big else plot.short_number))
    axis.set_minor_formatter(NullFormatter())


def power(value: float, position=None) -> str:
    """2e14 → 2·10¹⁴, in mathtext."""
    exponent = math.floor(math.log10(value) + 1e-9)
    front = round(value / 10**exponent)
    return f"$10^{{{exponent}}}$" if front == 1 else f"${front}{{\\cdot}}10^{{{exponent}}}$"


def limit(panels, rows: list[dict]) -> None:
    """From the best value to where the slowest learner stands after a tenth of the budget: until then, all fall."""
    curves = [[mean for _, mean, _ in row["curve"]] for row in rows]
    if not curves:
        return
    low = min(mean - deviation for row in rows for _, mean, deviation in row["curve"])
    high = max(curve[min(len(curve) // 10, len(curve) - 1)] for curve in curves)
    margin = 0.05 * (high - low or 1)
    panels[0].set_ylim(low - margin, high + margin)
    for ax in panels:
        seen = [x for line in ax.lines for x, y in line.get_xydata() if y <= high]
        if seen and min(seen) < max(seen):
            ax.set_xlim(min(seen) * 0.85, max(seen) * 1.18)


# ---- compare -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def compare_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py compare", allow_abbrev=False, description=(
        "Train several configs under equal conditions; write a table and a picture. The same command goes on after an "
        "interruption."))  # fmt: skip
    add = parser.add_argument
    add("configs", nargs="+", help="config files; file.json:key=value,key=value changes keys of one")
    add("--tokens", type=quantity, default=quantity("5M"), help="training tokens of each run (default 5M)")
    add("--seeds", type=quantity, default=3, help="runs of each config with its best learning rate (default 3)")
    add("--lrs", default="1e-3,3e-3,1e-2", help="learning rates to choose from (default 1e-3,3e-3,1e-2)")
    add("--warmup", type=float, default=0.05, help="share of the steps with rising learning rate (default 0.05)")
    add("--cooldown", type=float, default=0.4, help="share of the steps with falling learning rate (default 0.4)")
    add("--match", choices=["params"], help="resize widths until all have as many non-embedding parameters")
    add("--params", type=quantity, help="how many, with --match params (default: as many as the first config has)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key for all configs; may be repeated")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: cuda, else mps, else cpu")
    add("--jobs", type=quantity, default=1, help="runs at once, when a small model leaves a GPU idle (default 1)")
    add("--out", default="img/compare", type=Path, help="directory of the results (default img/compare)")
    arguments = parser.parse_args(argv)
    for name in ("warmup", "cooldown"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: is a share of the steps, between 0 and 1")
    if arguments.params and not arguments.match:
        raise UserError(f"--params {arguments.params}: says what --match params aims at; add --match params")
    arguments.lrs = learning_rates(arguments.lrs)
    return arguments


def learning_rates(text: str) -> list[float]:
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < lr < math.inf for lr in found):
        raise UserError(f"--lrs {text}: must be numbers above 0 between commas, like 1e-3,3e-3")
    return found


def make_plan(arguments, entries: list[Entry]) -> Plan:
    """Checks that the data fit; raises UserError before anything is trained."""
    run = entries[0].run
    if run.batch_size == "auto":
        raise UserError('batch_size = "auto": what is compared has equal batches; give a number, --set batch_size=32')
    device = train.choose_device(arguments.device)
    encoder, corpus = train.load_data(run)
    per_step = run.batch_size * run.gradient_accumulation_steps * run.model_hyperparams.block_size
    steps = round(arguments.tokens / per_step)
    if steps < 10:
        raise UserError(f"--tokens {arguments.tokens:,}: is {steps} steps of {per_step:,} tokens, too few to compare "
                        f"anything; give at least {10 * per_step:,}, or --set batch_size=… smaller")
    prints = {"dataset": corpus.fingerprint, "encoder": encoder.fingerprint, "code": code_fingerprint()}
    return Plan(steps, per_step, arguments.warmup, arguments.cooldown, arguments.lrs, arguments.seeds, arguments.jobs,
                device, arguments.out, prints)  # fmt: skip


def introduce(entries: list[Entry], contest: Contest) -> None:
    """What is about to be done, before it takes hours."""
    plan = contest.plan
    rows = [[e.label, f"{e.params:,}", f"{e.params_total:,}", f"{e.flops / 1e6:.1f}"] for e in entries]
    print(markdown_table(["model", "parameters, non-embedding", "total", "MFLOP / token"], rows))
    print("\n".join(["", *settings(entries, plan), *caveats(entries, [], plan)]))
    amount = f"{contest.total} runs of {short(plan.tokens)} tokens, {plan.jobs} at once"
    print(f"{amount}; {contest.done()} of them are done already")
    grid = [trial for trials in contest.grid.values() for trial in trials if trial.key not in contest.results]
    stale = sum(bool(list(plan.runs.glob(f"{trial.key.partition('-')[0]}-*.json"))) for trial in grid)
    if stale:
        print(f"{stale} results in {plan.runs} were made by other code than this, and are not used")
    print(flush=True)


def command_line(python: str, command: str, argv: list[str]) -> str:
    words = [python, train.short(os.path.abspath(__file__)), command, *argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


@contextlib.contextmanager
def ctrl_c_for_all_signals():
    """SIGTERM and a closed terminal end this as Ctrl-C does: children are told."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), interrupt) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def write_all(contest: Contest, speeds: dict[str, dict], command: str) -> str:
    """compare.md, compare.json and compare.png; returns the table."""
    entries, plan = contest.entries, contest.plan
    rows = []
    for entry in entries:
        grid = [contest.results[trial.key] for trial in contest.grid[entry.label] if trial.key in contest.results]
        seeds = [contest.results[trial.key] for trial in contest.seeds(entry) if trial.key in contest.results]
        rows.append(make_row(entry, grid, seeds, speeds.get(entry.label)))
    text = report(entries, rows, plan, command)
    about = {"tokens": plan.tokens, "steps": plan.steps, "tokens_per_step": plan.tokens_per_step, "lrs": plan.lrs,
             "seeds": plan.seeds, "warmup": plan.warmup, "cooldown": plan.cooldown, "device": machine(plan.device),
             "torch": torch.__version__, "fingerprints": plan.data, "command": command}  # fmt: skip
    notes = settings(entries, plan) + caveats(entries, rows, plan)
    atomic_write(plan.out / "compare.json", json.dumps(about | {"rows": rows, "notes": notes}, indent=1).encode())
    atomic_write(plan.out / "compare.md", text.encode())
    block = entries[0].run.model_hyperparams.block_size
    title = f"{short(plan.tokens)} tokens, context {block}, {short(plan.tokens_per_step)} tokens a step"
    plot.save(draw(rows, title, plan.seeds), plan.out / "compare.png")
    return main_table(rows)


def compare(argv: list[str]) -> int | None:
    """Train several configs under equal conditions; write a table and a picture."""
    arguments = compare_arguments(argv)
    common = [parse_override(text) for text in arguments.set]
    entries = load_entries(arguments.configs, common)
    if arguments.match:
        match_params(entries, arguments.params or entries[0].params, common)
    read = list_read("configs", (entry.file for entry in entries), (entry.run for entry in entries))
    check_outputs(list_results("compare", arguments.out), read)
    plan = make_plan(arguments, entries)
    contest = Contest(entries, plan)
    introduce(entries, contest)
    try:
        with ctrl_c_for_all_signals():
            speeds = measure_speeds(entries, plan)
            contest.run()
    except KeyboardInterrupt:
        again = command_line(train.short(sys.executable), "compare", argv)
        print(f"\ninterrupted: {contest.done()} of {contest.total} runs are finished and kept in {plan.runs}; "
              f"to go on:\n    {again}", flush=True)
        return 130
    text = write_all(contest, speeds, command_line("python", "compare", argv))
    print(f"\n{text}\n\nthe table and the picture are in {plan.out}")
    failed = [f"{entry.label} ({entry.failure})" for entry in entries if entry.failure]
    if failed:
        raise UserError(f"{len(failed)} of {len(entries)} configs failed: {'; '.join(failed)}")
    return 0


# ---- nanogpt -------------------------------------------------------------------------------------------------------

GPT2 = {"norm_type": "LayerNorm", "attention_type": "MHA", "ffn_type": "GELU", "pos_encoding": "Learned"}


def nanogpt(argv: list[str]) -> None:
    """Time training steps of a nanoGPT checkout's model and of tinystar in its manner, in turns, on the CPU."""
    parser = argparse.ArgumentParser(prog="bench.py nanogpt", description=nanogpt.__doc__)
    parser.add_argument("--nanogpt_path", required=True, help="directory that holds nanoGPT's model.py")
    parser.add_argument("--compile", action="store_true", help="compile both")
    parser.add_argument("--steps", type=int, default=15)
    for name, size in (("n_layer", 4), ("n_head", 4), ("n_embd", 128), ("batch_size", 8), ("block_size", 256)):
        parser.add_argument(f"--{name}", type=int, default=size)
    a = parser.parse_args(argv)
    shape = {name: getattr(a, name) for name in ("block_size", "n_layer", "n_head", "n_embd")} | {"vocab_size": 8192}
    theirs = load_nanogpt(Path(a.nanogpt_path) / "model.py", shape)
    their_optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    ours = build({"arch": "tinystar", **shape, **GPT2})
    our_optimizer = build_optimizer(ours, OptimizerHyperparams(eps=1e-8), 1e-3, "cpu")
    batch = torch.randint(8192, (2, a.batch_size, a.block_size))
    contestants = [(theirs, their_optimizer), (ours, our_optimizer)]
    if a.compile:
        contestants = [(torch.compile(model), optimizer) for model, optimizer in contestants]
    times = [[timed_step(*each, *batch) for each in contestants] for _ in range(3 + a.steps)][3:]
    ratios = [their / our for their, our in times]
    speeds = [batch[0].numel() / statistics.median(column) for column in zip(*times, strict=True)]
    print(f"tokens/s: nanoGPT {speeds[0]:,.0f}, tinystar {speeds[1]:,.0f}; "
          f"step by step {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def load_nanogpt(path: Path, shape: dict) -> torch.nn.Module:
    """The user's own checkout: its code is run, as `python train.py` in it would."""
    if not path.is_file():
        raise UserError(f"--nanogpt_path: there is no {path}; name a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=True))


def timed_step(model, optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x, y)[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


# ---- decode: bytes -------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model to make text with: a config's, freshly initialised, or a trained file's."""

    label: str
    make: Callable[[], LanguageModel]


def read_subjects(specs: list[str]) -> list[Subject]:
    """`config.json:key=value` as in compare, or the path of a model file."""
    configs = [spec for spec in specs if re.match(r".+\.json5?(:|$)", spec)]
    entries = dict(zip(configs, read_specs(configs), strict=True))
    for entry in entries.values():
        entry.load([])
        entry.measure()  # refuses what makes no text
    subjects = [
        Subject(entries[spec].label, partial(fresh, entries[spec].run.model_hyperparams)) if spec in entries
        else Subject(Path(spec).stem, partial(trained, spec)) for spec in specs
    ]  # fmt: skip
    labels = [subject.label for subject in subjects]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{twice[0]} is given twice; give each model once, under names that differ")
    return subjects


def fresh(config) -> LanguageModel:
    """A model as it starts, but with a little in the place of zeros, so that no part of it is idle."""
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return model.eval()


def trained(path: str) -> LanguageModel:
    model, _, _ = load_model(path)
    if model.takes_source or not model.generates:
        raise UserError(f"{path}: kind = {model.config.kind!r} does not continue text; give a model that does")
    return model


def weight_bytes(model: LanguageModel, rows: int) -> int:
    """Bytes of weights that a step for `rows` texts has to read: every one once, and of tables that are only looked up
    (input embeddings, learned positions) a line for each text. A table that is also the head is read whole."""
    total = 0
    for module in model.modules():
        table = isinstance(module, Embedding) and module.roles["weight"] == "input"
        looked_up = table or isinstance(module, LearnedPositions)
        in_8_bits = [t for value in vars(module).values() if isinstance(value, Int8Weight) for t in value]  # and scales
        for t in (*module.parameters(recurse=False), *in_8_bits):
            total += rows * t.size(-1) * t.element_size() if looked_up else t.nbytes
    return total


def empty_cache(config, dtype: torch.dtype, length: int) -> Cache | None:
    """A text's cache as shapes without memory; None of a model that has none, and computes all anew."""
    with torch.device("meta"):
        model = build(config).to(dtype)
        return model.new_cache(1, length) if model.causal else None


def cache_bytes(config, dtype: torch.dtype, length: int) -> int:
    """Bytes that are kept for a text of `length` tokens."""
    cache = empty_cache(config, dtype, length)
    return cache.nbytes() if cache else 0


def cache_bytes_read(config, dtype: torch.dtype, length: int) -> int:
    """Bytes of them that a step has to read: all but the sums over finished chunks, which only a border asks for."""
    cache = empty_cache(config, dtype, length)
    states = iter_layer_caches(cache.layers if cache else None)
    return sum(state.nbytes() - (state.finished.nbytes if isinstance(state, ChunkCache) else 0) for state in states)


def cache_line(config, dtype: torch.dtype, length: int) -> tuple[float, float]:
    """(constant, per token): the bytes of a text's cache around `length` tokens, or half of where positions end."""
    with torch.device("meta"):
        end = build(config).max_positions
    n = length if end is None else min(length, end // 2)
    one, two = (cache_bytes(config, dtype, size) for size in (n, 2 * n))
    return 2 * one - two, (two - one) / n


COPIED = (2**28, 2**30)  # bytes, on a CPU and on a GPU: many times what their caches hold


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor that no cache holds: the median of ten."""
    source = torch.ones(COPIED[device.type == "cuda"] // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        began = clock(device)
        target.copy_(source)
        times.append(clock(device) - began)
    return 2 * source.nbytes / statistics.median(times[2:])


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had; without end where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, TypeError):
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return math.inf


# ---- decode: timing ------------------------------------------------------------------------------------------------

WARM_STEPS = 8
STEPS = 256  # timed at most
FEWEST_STEPS = 16  # at least, or a context is said not to fit
SECONDS = 8.0  # of timed steps, about


class DoesNotFit(Exception):
    """Why a batch at a context cannot be measured, in words for the table."""


@dataclass
class Bench:
    """What all measurements of a call have in common."""

    device: torch.device
    dtype: torch.dtype
    quantize: str | None
    compile: bool
    bandwidth: float  # bytes per second

    def ready(self, model: LanguageModel) -> LanguageModel:
        model = model.to(self.device, self.dtype).eval()
        return decode.quantize(model, self.quantize) if self.quantize else model

    def cell(self, model: LanguageModel, batch: int, context: int) -> dict:
        """Tokens/s and all that belongs to it, in plain data; where it does not fit, `why` not."""
        row = {"batch": batch, "context": context, "why": None}
        try:
            row |= self.timed(model, batch, context)
            bytes_moved = weight_bytes(model, batch) / batch + cache_bytes_read(model.config, self.dtype, context)
        except (DoesNotFit, UserError) as error:
            return row | {"why": str(error)}
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            return row | {"why": "not enough memory"}
        finally:
            self.clean_up()
        seconds, floor = 1 / row["tokens_per_s"], bytes_moved / self.bandwidth
        return row | {"bytes_per_token": bytes_moved, "floor_s": floor, "times_floor": seconds / floor}

    def clean_up(self) -> None:
        gc.collect()
        if self.compile:
            torch.compiler.reset()  # it compiles one function for a few shapes only
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, model: LanguageModel, batch: int, context: int) -> dict:
        """Seconds from a prompt of `context` tokens to its first token, and tokens/s of `batch` such texts after it."""
        steps = steps_that_fit(model, context)
        self.check_memory(model, batch, context + steps)
        decoder = decode.Decoder(model, batch, context + steps, compile=self.compile)
        prompts = (random_text(model, context, steps, seed) for seed in itertools.count())
        decoder.release(first_token(decoder, next(prompts)))  # the first one chooses and compiles kernels
        began = clock(self.device)
        decoder.release(first_token(decoder, next(prompts)))
        seconds = clock(self.device) - began
        n = steps - WARM_STEPS - 2  # the device may be a step ahead
        if self.device.type == "cuda":  # steps are recorded as texts grow: none while the time is taken
            n, _ = self.steps(decoder, itertools.islice(prompts, batch), n)
        done, took = self.steps(decoder, itertools.islice(prompts, batch), n)
        return {"first_token_s": seconds, "tokens_per_s": batch * done / took, "steps": done}

    def steps(self, decoder: decode.Decoder, prompts: Iterable[decode.Request], n: int) -> tuple[int, float]:
        """(steps, seconds) of n steps after these prompts, or of fewer if they take long."""
        handles = [decoder.admit(prompt) for prompt in prompts]
        for _ in range(WARM_STEPS):
            decoder.step()
        began, done = clock(self.device), 0
        while done < n and (done < FEWEST_STEPS or time.perf_counter() - began < SECONDS):
            decoder.step()
            done += 1
        took = clock(self.device) - began
        for handle in handles:
            decoder.release(handle)
        return done, took

    def check_memory(self, model: LanguageModel, batch: int, length: int) -> None:
        need, free = batch * cache_bytes(model.config, self.dtype, length), free_memory(self.device)
        if need > 0.9 * free:
            raise DoesNotFit(f"needs {need / 1e9:,.1f} GB of cache, and {free / 1e9:,.1f} GB are free")


def steps_that_fit(model: LanguageModel, context: int) -> int:
    """How many tokens to make after a context: fewer where positions end soon after it."""
    steps, end = WARM_STEPS + STEPS + 2, model.max_positions
    if end is None or context + steps <= end:
        return steps
    if end - context < WARM_STEPS + FEWEST_STEPS + 2:
        raise DoesNotFit(f"its positions end at {end:,}")
    return end - context


def random_text(model: LanguageModel, context: int, steps: int, seed: int) -> decode.Request:
    generator = torch.Generator().manual_seed(int(seed > 0))  # the same for all but the first: it is read once
    prompt = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
    return decode.Request(prompt, steps, seed=seed)


def first_token(decoder: decode.Decoder, request: decode.Request) -> int:
    """Has the prompt read and waits for the first token after it. Returns the text's handle."""
    handle = decoder.admit(request)
    while all(handle != given for given, _, _ in decoder.step()):
        pass
    return handle


def measure(subject: Subject, bench: Bench, batches: list[int], contexts: list[int]) -> dict:
    """All that is found of one model, in plain data."""
    model = subject.make()
    config, params = model.config, model.num_params(non_embedding=False)
    model = bench.ready(model)
    constant, each = cache_line(config, bench.dtype, max(contexts)) if model.causal else (0, 0)
    cells = []
    for context, batch in itertools.product(contexts, batches):
        cells.append(bench.cell(model, batch, context))
        tqdm.write(f"{subject.label}: batch {batch}, context {short(context)}: {cell_text(cells[-1])}")
    return {"label": subject.label, "arch": config.arch, "params": params, "weight_bytes": weight_bytes(model, 1),
            "cache_constant": constant, "cache_per_token": each, "causal": model.causal, "cells": cells,
            "model_hyperparams": to_dict(config)}  # fmt: skip


def cell_text(cell: dict) -> str:
    if cell["why"]:
        return f"— ({cell['why']})"
    return f"{cell['tokens_per_s']:,.0f} tokens/s, {cell['times_floor']:.1f} times the floor"


# ---- decode: table and picture -------------------------------------------------------------------------------------


def models_table(rows: list[dict], contexts: list[int]) -> str:
    """What does not depend on the batch: sizes, and the seconds until a prompt's first token."""
    header = ["model", "parameters", "weights read, MB", "cache, constant, bytes", "and per token",
              *(f"first token after {short(context)}, ms" for context in contexts)]  # fmt: skip
    lines = []
    for row in rows:
        first = {cell["context"]: cell["first_token_s"] for cell in reversed(row["cells"]) if not cell["why"]}
        times = [f"{1e3 * first[context]:,.1f}" if context in first else "—" for context in contexts]
        cache = [f"{row[name]:,.0f}" if row["causal"] else "none" for name in ("cache_constant", "cache_per_token")]
        lines.append([row["label"], f"{row['params']:,}", f"{row['weight_bytes'] / 1e6:,.2f}", *cache, *times])
    return markdown_table(header, lines)


def cells_of(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(row["label"], cell) for row in rows for cell in row["cells"]]


def speeds_table(rows: list[dict]) -> str:
    """tokens/s of each model, and how many times the floor's time a token takes."""
    columns = sorted({(cell["batch"], cell["context"]) for _, cell in cells_of(rows)})
    lines = []
    for row in rows:
        cells = {(cell["batch"], cell["context"]): cell for cell in row["cells"]}
        lines.append([row["label"], *(
            "—" if cell["why"] else f"{cell['tokens_per_s']:,.0f} ({cell['times_floor']:,.1f}×)"
            for cell in map(cells.__getitem__, columns))])  # fmt: skip
    return markdown_table(["tokens/s (times the floor)", *(f"{b:,} × {short(c)}" for b, c in columns)], lines)


def details_table(rows: list[dict]) -> str:
    """Every batch at every context, with what the floor is made of."""
    header = ["model", "batch", "context", "tokens/s", "µs per token", "floor, µs", "times the floor", "MB per token"]
    lines = []
    for label, cell in cells_of(rows):
        numbers = ["—"] * 5
        if not cell["why"]:
            numbers = [f"{cell['tokens_per_s']:,.0f}", f"{1e6 / cell['tokens_per_s']:,.1f}",
                       f"{1e6 * cell['floor_s']:,.2f}", f"{cell['times_floor']:,.1f}",
                       f"{cell['bytes_per_token'] / 1e6:,.3f}"]  # fmt: skip
        lines.append([label, f"{cell['batch']:,}", short(cell["context"]), *numbers])
    return markdown_table(header, lines)


def missing_cells(rows: list[dict]) -> list[str]:
    """Why there is a — in the table, a line for each reason."""
    batches: dict[tuple, list[str]] = {}
    for label, cell in cells_of(rows):
        if cell["why"]:
            batches.setdefault((label, cell["why"], cell["context"]), []).append(f"{cell['batch']:,}")
    contexts: dict[tuple, list[str]] = {}
    for (label, why, context), found in batches.items():
        contexts.setdefault((label, why, ", ".join(found)), []).append(short(context))
    return [f"— {label}, context {', '.join(found)}, batch {those}: {why}."
            for (label, why, those), found in contexts.items()]  # fmt: skip


def about_machine(bench: Bench) -> str:
    words = [machine(bench.device), f"torch {torch.__version__}", str(bench.dtype).removeprefix("torch.")]
    words[1:1] = [f"{n} thread{'s' * (n > 1)}"] if (n := torch.get_num_threads()) and bench.device.type == "cpu" else []
    words += [f"{bench.quantize} weights"] if bench.quantize else []
    return ", ".join([*words, "compiled" if bench.compile else "not compiled"])


def decode_notes(bench: Bench, rows: list[dict]) -> list[str]:
    """How it was measured, a sentence each, and what is missing."""
    recomputing = [row["label"] for row in rows if not row["causal"]]
    return [
        f"{about_machine(bench)}.",
        f"Floor: bytes per token over {bench.bandwidth / 1e9:,.1f} GB/s, at which this machine copies a large tensor, "
        "bytes read and written. The bytes are those of the weights, read once for the whole batch, and of the cache "
        "of a text of that context, read once; of an embedding that is no head, a line. Experts that a token does not "
        "choose are counted.",
        f"Columns are batch × context. Speed: all rows' tokens together, up to {STEPS} each, after prompts of that "
        "context, drawn at temperature 1. First token: a prompt alone is read, and the first token after it is there.",
        *([f"Sees the future, has no cache and computes the last block_size tokens anew for each: "
           f"{', '.join(recomputing)}."] if recomputing else []),
        *missing_cells(rows),
    ]  # fmt: skip


def draw_speeds(rows: list[dict], batches: list[int], title: str):
    """One sheet, a panel for each batch: tokens/s against context, both on log scales."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if max(len(row["label"]) for row in rows) > 34 else 3
    fig = Figure(figsize=(11, 4.3 + 0.2 * math.ceil(len(rows) / columns)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, len(batches), squeeze=False)[0]
    contexts = sorted({cell["context"] for row in rows for cell in row["cells"]})
    for ax, batch in zip(panels, batches, strict=True):
        for number, row in enumerate(rows):
            cells = [cell for cell in row["cells"] if cell["batch"] == batch and not cell["why"]]
            ax.plot([cell["context"] for cell in cells], [cell["tokens_per_s"] for cell in cells],
                    **line_style(number), label=row["label"])  # fmt: skip
        style_panel(ax, "context (tokens)")
        ax.set_xticks(contexts, map(short, contexts))
        ax.set_yscale("log")
        log_ticks(ax.yaxis, [y for line in ax.lines for y in line.get_ydata()])
        ax.set_title(f"batch {batch:,}", fontsize=11, loc="left")
    panels[0].set_ylabel("tokens/s, all rows together", fontsize=11)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9,
               frameon=False)  # fmt: skip
    return fig


# ---- decode --------------------------------------------------------------------------------------------------------


def decode_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py decode", allow_abbrev=False, description=(
        "Measure how fast models make text, beside the floor that reading their weights and caches sets."))  # fmt: skip
    add = parser.add_argument
    add("models", nargs="*", help="config files (file.json:key=value,key=value changes keys) and trained model files")
    add("--batches", default="1,8,64", help="texts at once (default 1,8,64)")
    add("--contexts", default="128,1k,8k", help="tokens before those that are timed (default 128,1k,8k)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: cuda, else mps, else cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on cuda, else float32")
    add("--quantize", choices=["int8"], help="matrices in 8 bits")
    add("--compile", action="store_true", help="torch.compile the step")
    add("--out", default="img/decode", type=Path, help="directory of decode.md, .json and .png (default img/decode)")
    add("--json", type=Path, help="another place for decode.json")
    add("--against", choices=["nanogpt"], help="measure tinystar in GPT-2's manner beside nanoGPT's generate instead")
    add("--nanogpt_path", type=Path, help="directory that holds nanoGPT's model.py")
    for name, size in GPT2_SHAPE.items():
        add(f"--{name}", type=quantity, default=size, help=f"of both, with --against (default {size})")
    arguments = parser.parse_args(argv)
    arguments.batches, arguments.contexts = (
        sorted({quantity(part) for part in text.split(",")}) for text in (arguments.batches, arguments.contexts))
    if bool(arguments.models) == bool(arguments.against):
        raise UserError("name configs or model files, or --against nanogpt, one of the two")
    if arguments.against and arguments.nanogpt_path is None:
        raise UserError("--against nanogpt: needs --nanogpt_path, a directory that holds nanoGPT's model.py")
    return arguments


def make_bench(arguments: argparse.Namespace) -> Bench:
    device = train.choose_device(arguments.device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if arguments.dtype == "auto" else arguments.dtype)
    if arguments.compile and device.type != "cuda":
        raise UserError(f"--compile: steps are compiled on cuda only, and this is {device.type}; leave it out")
    return Bench(device, dtype, arguments.quantize, arguments.compile, copy_bandwidth(device))


def decode_command(argv: list[str]) -> None:
    """Measure how fast models make text; write a table and a picture."""
    arguments = decode_arguments(argv)
    if arguments.against:
        against_nanogpt(arguments)
        return
    subjects = read_subjects(arguments.models)
    check_outputs(list_results("decode", arguments.out, arguments.json), list_read("models", arguments.models))
    bench = make_bench(arguments)
    print(f"{machine(bench.device)} copies {bench.bandwidth / 1e9:,.1f} GB/s", flush=True)
    rows, command = [], command_line("python", "decode", argv)
    for subject in subjects:
        rows.append(measure(subject, bench, arguments.batches, arguments.contexts))
        told = write_speeds(rows, bench, arguments, command)  # so far
    print(f"\n{told}\n\nthe tables and the picture are in {arguments.out}")


def write_speeds(rows: list[dict], bench: Bench, arguments: argparse.Namespace, command: str) -> str:
    """decode.md, decode.json and decode.png; returns the tables and what is to be known of them."""
    notes = decode_notes(bench, rows)
    tables = f"{speeds_table(rows)}\n\n{models_table(rows, arguments.contexts)}"
    told = "\n".join(f"- {note}" for note in notes)
    parts = [tables, "![tokens/s against context](decode.png)", told, details_table(rows), f"```\n{command}\n```"]
    atomic_write(arguments.out / "decode.md", ("\n\n".join(parts) + "\n").encode())
    about = {"device": machine(bench.device), "torch": torch.__version__, "dtype": str(bench.dtype),
             "quantize": bench.quantize, "compile": bench.compile, "bandwidth": bench.bandwidth, "notes": notes,
             "command": command, "rows": rows}  # fmt: skip
    atomic_write(arguments.json or arguments.out / "decode.json", json.dumps(about, indent=1).encode())
    plot.save(draw_speeds(rows, arguments.batches, about_machine(bench)), arguments.out / "decode.png")
    return f"{tables}\n\n{told}"


# ---- decode: against nanoGPT ---------------------------------------------------------------------------------------

GPT2_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 1024}  # GPT-2, 124M
ROUNDS = 3


def against_nanogpt(arguments: argparse.Namespace) -> None:
    """Tokens/s of tinystar in GPT-2's manner and of nanoGPT's generate, in turns."""
    shape = {name: getattr(arguments, name) for name in GPT2_SHAPE}
    theirs = load_nanogpt(arguments.nanogpt_path / "model.py", shape)
    bench = make_bench(arguments)
    theirs = theirs.to(bench.device, bench.dtype).eval()
    ours = bench.ready(fresh(CONFIGS["tinystar"](arch="tinystar", **shape, **GPT2)))
    print(f"{machine(bench.device)}, {bench.dtype}, {sum(p.numel() for p in theirs.parameters()):,} parameters, "
          f"copies {bench.bandwidth / 1e9:,.1f} GB/s", flush=True)
    for context, batch in itertools.product(arguments.contexts, arguments.batches):
        print(f"batch {batch}, context {short(context)}: {beside_nanogpt(bench, ours, theirs, batch, context)}")


def beside_nanogpt(bench: Bench, ours: LanguageModel, theirs, batch: int, context: int) -> str:
    """A line: tokens/s of both in ROUNDS turns, and how many times as fast ours is, after the prompt and with it."""
    found = []
    for _ in range(ROUNDS):
        cell = bench.cell(ours, batch, context)
        if cell["why"]:
            return cell_text(cell)
        found.append((nanogpt_speed(bench, theirs, batch, context), cell["tokens_per_s"], cell["first_token_s"]))
    their, our, first = (statistics.median(column) for column in zip(*found, strict=True))
    ratios = [b / a for a, b, _ in found]
    with_prompt = 64 * batch / (64 * batch / our + first * batch) / their
    share = our * cell["floor_s"]
    return (f"nanoGPT {their:,.1f} tokens/s, tinystar {our:,.1f} ({share:.0%} of what the floor allows), "
            f"{statistics.median(ratios):.1f} times as many ({min(ratios):.1f} to {max(ratios):.1f}); the first token "
            f"after {1e3 * first:,.1f} ms, so that 64 tokens come {with_prompt:.1f} times as fast with the reading of "
            "the prompt")


@torch.no_grad()
def nanogpt_speed(bench: Bench, model, batch: int, context: int) -> float:
    """Tokens/s of nanoGPT's own generate, after a text of `context` tokens."""
    idx = torch.randint(model.config.vocab_size, (batch, context), device=bench.device)
    began = clock(bench.device)
    model.generate(idx, 2)  # the first chooses kernels, and tells how many to measure
    n = min(64, max(4, round(2 * 2 / (clock(bench.device) - began))))
    began = clock(bench.device)
    model.generate(idx, n)
    return batch * n / (clock(bench.device) - began)


# ---- train: one config's speed ---------------------------------------------------------------------------------------

PARTS = ("data", "forward", "backward", "optimizer")
TIMED = 20  # steps whose parts are timed
PRODUCT = (1024, 8192)  # rows and columns of the matrices whose product sets the ceiling, on a CPU and on a GPU


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product of random numbers: the median of ten."""
    n = PRODUCT[device.type == "cuda"]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(13):
        began = clock(device)
        torch.mm(a, b)
        times.append(clock(device) - began)
    return 2 * n**3 / statistics.median(times[3:])


class Marks:
    """Moments in the device's own time, a row of them for each step."""

    def __init__(self, device: torch.device):
        self.cuda, self.rows = device.type == "cuda", []

    def row(self) -> None:
        self.rows.append([])
        self()

    def __call__(self) -> None:
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.rows[-1].append(mark)

    def between(self) -> list[float]:
        """The median over the rows of the milliseconds between each mark and the next."""
        if self.cuda:
            torch.cuda.synchronize()
        spans = [[a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in itertools.pairwise(row)]
                 for row in self.rows]  # fmt: skip
        return [statistics.median(column) for column in zip(*spans, strict=True)]


class StepTimer(Timer):
    """What a step of training takes, as a whole in train.py's own loop, and part by part."""

    def parts(self, steps: int = TIMED) -> dict[str, float]:
        """Milliseconds of each part, taken one after another and not recorded: together they may be more than a step.
        `data` is what the loop waits for the loader."""
        self.stop_recording()
        marks, waits = Marks(self.device), []
        with self.batches() as loader:
            for _ in range(3 + steps):
                began = time.perf_counter()
                micro_batches = next(loader)
                waits.append(1e3 * (time.perf_counter() - began))
                self.marked_step(micro_batches[0], marks)
        marks.rows, waits = marks.rows[3:], waits[3:]
        forward, backward, update = marks.between()
        n = self.run.gradient_accumulation_steps
        return dict(zip(PARTS, (statistics.median(waits), n * forward, n * backward, update), strict=True))

    def marked_step(self, batch, marks: Marks) -> None:
        marks.row()
        with self.autocast():
            loss = self.forward(batch.x, batch.y, source=batch.source)[1]
        marks()
        loss.backward()
        marks()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        marks()

    def kernels(self, steps: int = 3) -> list[dict]:
        """What a GPU does in a step, the longest first: name, launches and milliseconds."""
        if self.device.type != "cuda":
            return []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.advance(steps, steps)
            torch.cuda.synchronize()
        rows = [{"name": event.key, "launches": event.count / steps, "ms": event.self_device_time_total / 1e3 / steps}
                for event in profile.key_averages() if event.self_device_time_total]  # fmt: skip
        return sorted(rows, key=lambda row: -row["ms"])

    def whole(self, profile: bool) -> dict:
        """All that `bench.py train` tells of a config."""
        found = self.measure()
        found |= {"step_ms": 1e3 * self.tokens_per_step / found["tokens_per_s"], "recorded": bool(self.recorded),
                  "tokens_per_step": self.tokens_per_step, "kernels": self.kernels() if profile else []}  # fmt: skip
        found["parts_ms"] = self.parts()
        flops = self.model.flops_per_token(self.run.model_hyperparams.block_size, self.rows)
        found |= {"params": self.model.num_params(non_embedding=False), "flops_per_token": flops}
        ceiling = matrix_ceiling(self.device, self.dtype)
        found |= {"flops_per_s": flops * found["tokens_per_s"], "ceiling": ceiling}
        return found | {"share": found["flops_per_s"] / ceiling, "machine": machine(self.device)}


def step_child(argv: list[str]) -> None:
    """A child's main: measure one config, told by a JSON file, and print what came out."""
    file, profile = argv
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        timer = StepTimer(load_run(["--config", file], CONFIGS), Signals())
        began = time.perf_counter()
        timer.prepare()
        ready = time.perf_counter() - began
        print("ready", file=answers, flush=True)
        if sys.stdin.readline():
            print(json.dumps(timer.whole(profile == "1") | {"ready_s": ready}), file=answers, flush=True)


# ---- train -----------------------------------------------------------------------------------------------------------


def train_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py train", allow_abbrev=False, description=(
        "Measure how fast configs train, in train.py's own loop: whole steps and their parts, arithmetic, memory."))
    add = parser.add_argument
    add("--config", nargs="+", default=[], help="config files; file.json:key=value,key=value changes keys of one")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of all")
    add("--profile", action="store_true", help="also list the GPU's kernels, the longest first")
    add("--jobs", type=quantity, default=1, help="get so many ready at once; they are measured in turns (default 1)")
    add("--json", type=Path, help="write what was measured there, too")
    add("--against", choices=["nanogpt"], help="train tinystar in GPT-2's shape beside nanoGPT's own train.py instead")
    add("--nanogpt_path", type=Path, help="a checkout of nanoGPT")
    add("--steps", type=quantity, default=500, help="of each, with --against (default 500)")
    add("--batch_size", type=quantity, default=32, help="of both, with --against (default 32)")
    for name, size in GPT2_SHAPE.items():
        add(f"--{name}", type=quantity, default=size, help=f"of both, with --against (default {size})")
    arguments = parser.parse_args(argv)
    if bool(arguments.config) == bool(arguments.against):
        raise UserError("name configs after --config, or --against nanogpt, one of the two")
    if arguments.against and arguments.nanogpt_path is None:
        raise UserError("--against nanogpt: needs --nanogpt_path, a checkout of nanoGPT")
    return arguments


def train_command(argv: list[str]) -> int | None:
    """Measure how fast configs train: whole steps and their parts, arithmetic, memory."""
    arguments = train_arguments(argv)
    if arguments.against:
        names = ("train.py", "model.py", "configurator.py")
        checked = [Input("--nanogpt_path", arguments.nanogpt_path / name) for name in names]
        check_outputs(json_output(arguments.json), checked)
        found = train_beside_nanogpt(arguments)
    else:
        found = measured_steps(arguments)
    if arguments.json:
        atomic_write(arguments.json, json.dumps(found, indent=1).encode())
        print(f"\nwritten to {arguments.json}")
    return 2 if any("why" in row for row in found if isinstance(row, dict)) else None


def changed_key(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r}: write key=value")
    return full_name(key.strip()), value.strip()


def loaded(spec: str, common: list[tuple[str, str]], last: bool = False) -> Run:
    """The run of `file.json:key=value,key=value`; `common` keys are under its own, or over them where they come last.
    Sizes that its file states and another key makes impossible go back to their defaults."""
    file, _, changes = spec.partition(".json:")
    own = [changed_key(text) for text in split_list(changes)] if changes else []
    words = [*own, *common] if last else [*common, *own]
    file = f"{file}.json" if changes else file
    return load_run(["--config", file, *(f"--{key}={value}" for key, value in words)], CONFIGS)


def measured_steps(arguments: argparse.Namespace) -> list[dict]:
    """A row for each config, measured in a process of its own and printed."""
    common = [changed_key(text) for text in arguments.set]
    runs, rows = [loaded(spec, common) for spec in arguments.config], []
    check_outputs(json_output(arguments.json), list_read("--config", arguments.config, runs))
    for first in range(0, len(runs), arguments.jobs):
        specs = arguments.config[first : first + arguments.jobs]
        with tempfile.TemporaryDirectory() as folder:
            files = [write_quiet_config(Path(folder) / str(i), run)
                     for i, run in enumerate(runs[first : first + arguments.jobs])]  # fmt: skip
            found = in_turns("_step", [[file, str(int(arguments.profile))] for file in files])
        for spec, row in zip(specs, found, strict=True):
            rows.append({"config": spec, **row})
            print(step_text(rows[-1]), flush=True)
    return rows


def write_quiet_config(folder: Path, run: Run, **changes) -> str:
    """A JSON file of this run, of which nothing is kept."""
    config = to_dict(run) | {"init_from": "scratch"} | {
        "checkpoints": {"path": str(folder / "ck"), "create_checkpoints": False},
        "model_path": str(folder / "model"), "img_path": str(folder)}  # fmt: skip
    folder.mkdir(exist_ok=True)
    atomic_write(folder / "config.json", json.dumps(config | changes).encode())
    return str(folder / "config.json")


def in_turns(role: str, arguments: list[list[str]]) -> list[dict]:
    """What child processes print, a JSON object each. All get ready at once, then one after another is told to go on;
    of one that fails, {"why": …}."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = dict(os.environ)
    if len(arguments) > 1:
        threads = str(max(1, (os.cpu_count() or 1) // len(arguments)))
        env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **env}
    children = [subprocess.Popen(child_command(role, *words), env=env, **pipes) for words in arguments]
    rows = []
    try:
        told = [until_ready(child) for child in children]
        for child, lines in zip(children, told, strict=True):
            lines += child.communicate("go\n" if child.poll() is None else None)[0].splitlines()
            rows.append(last_object(lines, child.returncode))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return rows


def until_ready(child: subprocess.Popen) -> list[str]:
    """What a child prints before it is ready, or all if it ends."""
    return list(itertools.takewhile(lambda line: line != "ready\n", child.stdout))


def last_object(lines: list[str], code: int) -> dict:
    lines = [line.strip() for line in lines if line.strip()]
    if code == 0 and lines:
        return json.loads(lines[-1])
    why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return {"why": why.removeprefix("error: ")}


def step_text(row: dict) -> str:
    if "why" in row:
        return f"{row['config']}: {row['why']}"
    parts = ", ".join(f"{name} {ms:,.2f}" for name, ms in row["parts_ms"].items())
    how = ", ".join(name for name in ("compiled", "recorded") if row[name]) or "neither compiled nor recorded"
    memory = f"{row['memory'] / 2**30:,.2f} GiB at most" if row["memory"] else "memory not measured"
    lines = [
        f"{row['config']} on {row['machine']}, {row['params']:,} parameters, {row['tokens_per_step']:,} tokens a step",
        f"    {row['tokens_per_s']:,.0f} tokens/s: {row['step_ms']:,.3f} ms a step, {how}; {row['ready_s']:,.0f} s to "
        "get ready",
        f"    one after another, not recorded: {parts} ms",
        f"    {row['flops_per_s'] / 1e12:,.2f} TFLOP/s, {row['share']:.1%} of the {row['ceiling'] / 1e12:,.1f} of a "
        f"large product; {memory}",
    ]
    shown = row["kernels"][:25]
    lines += [f"    {k['ms']:8.3f} ms {k['launches']:7.1f} × {k['name'][:100]}" for k in shown]
    return "\n".join(lines)


# ---- train: against nanoGPT ------------------------------------------------------------------------------------------

# GPT-2's manner with what nanoGPT leaves out by default, biases, left out: as many parameters as its own
GPT2_LEAN = GPT2 | {"norm_type": "RMSNorm"}
SAME = {"learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 100}  # of both
EVERY = 10  # steps between the lines that are timed


def train_beside_nanogpt(arguments: argparse.Namespace) -> dict:
    """Both train.py on the same text, one after the other: tokens/s, memory, losses."""
    directory = arguments.nanogpt_path.resolve()
    if not (directory / "train.py").is_file():
        raise UserError(f"--nanogpt_path: there is no {directory / 'train.py'}; name a checkout of nanoGPT")
    shape = {name: getattr(arguments, name) for name in GPT2_SHAPE}
    keys = {**SAME, "lr_decay_iters": arguments.steps, "batch_size": arguments.batch_size}
    keys |= {**shape, **GPT2_LEAN, "arch": "tinystar"}
    words = [f"--{full_name(key)}={value}" for key, value in (*keys.items(), *map(changed_key, arguments.set))]
    words += ["--cooldown_frac=1", "--optimizer_hyperparams.eps=1e-8"]
    run = load_run(["--config", "tinystar-v0.1-baseline.json", *words], CONFIGS)
    with tempfile.TemporaryDirectory() as folder:
        theirs = nanogpt_run(directory, Path(folder), run, arguments.steps)
        (ours,) = in_turns("_race", [[write_quiet_config(Path(folder), run, max_iters=arguments.steps,
                                                         log_interval=EVERY)]])  # fmt: skip
    if "why" in ours:
        raise UserError(f"train.py failed: {ours['why']}")
    found = {"nanogpt": theirs, "strawberry": ours, "tokens_per_step": run.batch_size * shape["block_size"]}
    print(race_text(found))
    return found


def race_child(argv: list[str]) -> None:
    """A child's main: train a config without evaluations; print speed, losses and memory."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        timer = Timer(load_run(["--config", *argv], CONFIGS), Signals())
        timer.prepare()
        print("ready", file=answers, flush=True)
        sys.stdin.readline()
        timer.train()
        lines = plot.read_metrics(timer.metrics.path)
    memory = torch.cuda.max_memory_allocated() if timer.device.type == "cuda" else None
    times = [[line["step"], line["seconds"]] for line in lines if line["step"] > 1]
    losses = [[line["step"], line["loss"]] for line in lines if line["step"] > 1]
    told = {"params": timer.model.num_params(non_embedding=False), "memory": memory, "losses": losses}
    print(json.dumps(told | {"step_s": pace(times)}), file=answers, flush=True)


def pace(times: list[list[float]]) -> float:
    """Seconds of a step: the median over the later half of the times (step, seconds) between lines."""
    spans = [(b - a) / (n - m) for (m, a), (n, b) in itertools.pairwise(times)]
    return statistics.median(spans[len(spans) // 2 :])


def nanogpt_run(directory: Path, folder: Path, run: Run, steps: int) -> dict:
    """nanoGPT's own train.py, in a folder of links to its files, on the same tokens in its format."""
    for name in ("train.py", "model.py", "configurator.py"):
        os.symlink(directory / name, folder / name)
    (folder / "data" / "same").mkdir(parents=True)
    corpus = Corpus(run.dataset, None, run.model_hyperparams.block_size)
    for name, split in (("train", corpus.train), ("val", corpus.val)):
        tokens = np.concatenate([file.tokens[start:stop] for file, start, stop in split.pieces])
        tokens.astype(np.uint16).tofile(folder / "data" / "same" / f"{name}.bin")
    hyper, device = run.model_hyperparams, train.choose_device(run.device).type
    keys = {name: getattr(hyper, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    keys |= {name: getattr(run, name) for name in (*SAME, "lr_decay_iters", "batch_size")}
    (folder / "data" / "same" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": hyper.vocab_size}))
    keys |= {"dataset": "same", "gradient_accumulation_steps": 1, "max_iters": steps, "log_interval": EVERY,
             "eval_interval": 10**9, "eval_iters": 1, "always_save_checkpoint": False, "device": device,
             "compile": train.worth_compiling(run, torch.device(device))}  # fmt: skip
    if device == "cpu":
        keys["dtype"] = "float32"
    words = [f"--{key}={value}" for key, value in keys.items()]
    command = child_command("_nanogpt", str(folder), *words)
    times, losses, memory, params = [], [], None, None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as child:
        tail = collections.deque(maxlen=20)
        for line in child.stdout:
            tail.append(line)
            if found := re.match(r"iter (\d+): loss ([\d.]+)", line):
                times.append([int(found[1]), time.perf_counter()])
                losses.append([int(found[1]), float(found[2])])
            elif line.startswith("{"):
                memory, params = json.loads(line).values()
    if child.returncode:
        raise UserError(f"nanoGPT's train.py failed: {''.join(tail).strip()}")
    return {"params": params, "memory": memory, "losses": losses, "step_s": pace(times[1:])}


def nanogpt_child(argv: list[str]) -> None:
    """A child's main: run the train.py of a folder as its own command would, then tell the memory that it took."""
    folder, *words = argv
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name in ("model", "train"):  # theirs, not this repository's
        sys.modules.pop(name, None)
    sys.argv = ["train.py", *words]
    scope = runpy.run_path("train.py", run_name="__main__")
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    params = sum(p.numel() for p in scope["raw_model"].parameters())
    print("\n" + json.dumps({"memory": memory, "params": params}), flush=True)


def race_text(found: dict) -> str:
    tokens, lines = found["tokens_per_step"], []
    for name in ("nanogpt", "strawberry"):
        row = found[name]
        memory = f", {row['memory'] / 2**30:,.2f} GiB" if row["memory"] else ""
        lines.append(f"{name:<11} {tokens / row['step_s']:>10,.0f} tokens/s, {1e3 * row['step_s']:,.2f} ms a step"
                     f"{memory}, {row['params']:,} parameters")  # fmt: skip
    ratio = found["nanogpt"]["step_s"] / found["strawberry"]["step_s"]
    lines.append(f"{ratio:.3f} times as fast; mean training losses of 50 steps up to each step:")
    last = found["strawberry"]["losses"][-1][0]
    for step in range(last // 5, last + 1, max(last // 5, 1)):
        means = [statistics.fmean([loss for n, loss in found[name]["losses"] if step - 50 < n <= step] or [math.nan])
                 for name in ("nanogpt", "strawberry")]  # fmt: skip
        lines.append(f"    step {step:>5}: {means[0]:.3f} and {means[1]:.3f}")
    return "\n".join(lines)


# ---- growth ----------------------------------------------------------------------------------------------------------

GROWING = (  # what is compared unless configs are named: one shape, three ways to mix
    "strawberry-large.json:n_layer=4,n_embd=512,n_qkv=512,n_head=8,r_layer=1,window=256",
    "palm-aft.json:n_layer=4,n_embd=512,n_qkv=512,n_head=8,d_rank=null,use_muon=false",
    "palm-aft.json:n_layer=4,n_embd=512,n_qkv=512,n_head=8,d_rank=null,use_muon=false,attention_type=mha",
)
HEAD = 64  # channels of a head, whatever the width
AXES = {"T": "tokens in a window", "C": "channels (n_embd)"}


def growth_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py growth", allow_abbrev=False, description=(
        "Measure how tokens/s and memory of training change with the window T and with the width C; draw them."))
    add = parser.add_argument
    add("configs", nargs="*", default=GROWING,
        help="config files, with changed keys; default: strawberry, attention-free mixing alone, full attention")
    add("--contexts", default="256,1024,4096,16384,32768", help="windows T (default 256,1024,4096,16384,32768)")
    add("--widths", default="64,256,512,1024,2048",
        help="widths C, multiples of 64, at windows of 1,024 tokens (default 64,256,512,1024,2048)")
    add("--tokens", type=quantity, default=32768, help="in a step, at least one window (default 32768)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of all")
    add("--jobs", type=quantity, default=1, help="get so many ready at once; they are measured in turns (default 1)")
    add("--out", default="img/growth", type=Path, help="directory of growth.md, .json and .png (default img/growth)")
    arguments = parser.parse_args(argv)
    arguments.contexts, arguments.widths = (
        sorted({quantity(part) for part in text.split(",") if part}) for text in (arguments.contexts, arguments.widths))
    if wrong := [width for width in arguments.widths if width % HEAD]:
        raise UserError(f"--widths: {wrong[0]} is no multiple of {HEAD}, the channels of a head; 1k is 1000, not 1024")
    return arguments


def growth_points(arguments: argparse.Namespace) -> list[dict]:
    """What is measured: a config's label, the axis, its value, and the run."""
    common, points = [changed_key(text) for text in arguments.set], []
    for spec in arguments.configs:
        values = [("T", T) for T in arguments.contexts] + [("C", C) for C in arguments.widths]
        for axis, value in values:
            T = value if axis == "T" else min(1024, arguments.tokens)
            keys = [("block_size", T), ("batch_size", max(1, arguments.tokens // T))]
            if axis == "C":
                keys += [("n_embd", value), ("n_qkv", value), ("n_head", max(1, value // HEAD))]
            run = loaded(spec, [*common, *((full_name(key), str(v)) for key, v in keys)], last=True)
            points.append({"config": growth_label(spec), "axis": axis, "value": value, "run": run})
    return points


def growth_label(spec: str) -> str:
    """What tells it from the others: the arch, and how it mixes where that was said.

    >>> growth_label("palm-aft.json:n_layer=4,attention_type=mha")
    'palm-aft attention_type=mha'
    """
    file, _, changes = spec.partition(".json:")
    sizes = ("n_layer=", "n_embd=", "n_qkv=", "n_head=", "d_rank=", "use_muon=", "window=")
    told = [change for change in split_list(changes) if change and not change.startswith(sizes)]
    return " ".join([Path(file).stem, *told])


def growth_command(argv: list[str]) -> None:
    """Measure how training's speed and memory change with window and width; draw them."""
    arguments = growth_arguments(argv)
    points = growth_points(arguments)
    read = list_read("configs", arguments.configs, (point["run"] for point in points))
    check_outputs(list_results("growth", arguments.out), read)
    for first in range(0, len(points), arguments.jobs):
        group = points[first : first + arguments.jobs]
        with tempfile.TemporaryDirectory() as folder:
            files = [write_quiet_config(Path(folder) / str(i), point["run"]) for i, point in enumerate(group)]
            for point, row in zip(group, in_turns("_speed", [[file] for file in files]), strict=True):
                point |= row
                if "why" not in point:  # on a CPU what the process had in memory
                    point["memory"] = point["memory"] or point["resident"]
                print(growth_line(point), flush=True)
    rows = [{key: value for key, value in point.items() if key != "run"} for point in points]
    write_growth(rows, arguments.out, command_line("python", "growth", argv))


def growth_line(point: dict) -> str:
    if "why" in point:
        return f"{point['config']}, {point['axis']} {point['value']:,}: {point['why']}"
    memory = f", {point['memory'] / 2**30:,.2f} GiB" if point["memory"] else ""
    return f"{point['config']}, {point['axis']} {point['value']:,}: {point['tokens_per_s']:,.0f} tokens/s{memory}"


def write_growth(rows: list[dict], out: Path, command: str) -> None:
    """growth.json, growth.md and growth.png."""
    where = machine(train.choose_device("auto"))
    table = [[row["config"], row["axis"], f"{row['value']:,}",
              *((row["why"], "") if "why" in row else
                (f"{row['tokens_per_s']:,.0f}", f"{row['memory'] / 2**30:,.2f}" if row["memory"] else "–"))]
             for row in rows]  # fmt: skip
    text = markdown_table(["config", "axis", "value", "tokens/s", "memory, GiB"], table)
    atomic_write(out / "growth.md", f"{text}\n\n![growth](growth.png)\n\n{where}\n\n```\n{command}\n```\n".encode())
    atomic_write(out / "growth.json", json.dumps({"command": command, "rows": rows}, indent=1).encode())
    plot.save(draw_growth(rows, f"Training, {where}, torch {torch.__version__}"), out / "growth.png")
    print(f"\n{text}\n\nthe table and the picture are in {out}")


def draw_growth(rows: list[dict], title: str):
    """Tokens/s above, memory below where it was measured; against the window on the left, the width on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = {"tokens_per_s": ("tokens/s", 1.0), "memory": ("memory (GiB)", 2.0**-30)}
    measures = {key: about for key, about in measures.items() if any(row.get(key) for row in rows)}
    fig = Figure(figsize=(10, 0.8 + 3.1 * max(len(measures), 1)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(max(len(measures), 1), 2, sharex="col", squeeze=False)
    labels = list(dict.fromkeys(row["config"] for row in rows))
    for i, (key, (ylabel, scale)) in enumerate(measures.items()):
        line = panels[i]
        line[0].set_ylabel(ylabel, fontsize=11)
        for panel, (axis, name) in zip(line, AXES.items(), strict=True):
            for number, label in enumerate(labels):
                found = [(row["value"], row[key] * scale) for row in rows
                         if row["config"] == label and row["axis"] == axis and row.get(key)]  # fmt: skip
                if found:
                    panel.plot(*zip(*found, strict=True), **line_style(number), label=label)
            style_panel(panel, name if i + 1 == len(measures) else "")
            values = sorted({row["value"] for row in rows if row["axis"] == axis})
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels), fontsize=9,
               frameon=False)  # fmt: skip
    return fig


# ---- scale ---------------------------------------------------------------------------------------------------------

LINK_BYTES = 256 << 20  # of the tensor whose sum over all processes is timed


def scale_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py scale", allow_abbrev=False, description=(
        "Measure train.py's own loop on one process and on several of this machine, which torchrun starts."))
    add = parser.add_argument
    add("--config", required=True, help="a config file; file.json:key=value,key=value changes keys of it")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    add("--processes", default="1,2", help="how many, with commas (default 1,2)")
    add("--parallel", default="ddp", help="ddp, fsdp or both, with a comma (default ddp)")
    add("--steps", type=quantity, default=30, help="measured, after 10 others or as many (default 30)")
    add("--same_batch", action="store_true", help="divide the config's batch, instead of as many rows for each process")
    add("--json", type=Path, help="write what was measured there, too")
    arguments = parser.parse_args(argv)
    arguments.processes = [quantity(part) for part in arguments.processes.split(",")]
    arguments.parallel = arguments.parallel.split(",")
    return arguments


def scale_command(argv: list[str]) -> None:
    """Measure how training speeds up with processes, one for each GPU."""
    arguments = scale_arguments(argv)
    file, _, changes = arguments.config.partition(".json:")
    words = [changed_key(text) for text in (*arguments.set, *(split_list(changes) if changes else ()))]
    words = [f"--{key}={value}" for key, value in words]
    rows: list[dict] = []
    config = f"{file}.json" if changes else file
    read = list_read("--config", [config], [load_run(["--config", config, *words], CONFIGS)])
    check_outputs(json_output(arguments.json), read)
    for n, parallel in itertools.product(arguments.processes, arguments.parallel):
        if n == 1 and any(row["processes"] == 1 for row in rows):
            continue  # one process divides nothing
        run = load_run(["--config", config, *words, f"--parallel={parallel}"], CONFIGS)
        if not arguments.same_batch and run.batch_size != "auto":
            run.batch_size *= n
        rows.append({"parallel": parallel if n > 1 else "", **scaled(run, n, arguments.steps)})
        print(scale_text(rows), flush=True)
        if arguments.json:
            atomic_write(arguments.json, json.dumps({"config": arguments.config, "rows": rows}, indent=1).encode())


def scaled(run: Run, processes: int, steps: int) -> dict:
    """One row: what so many processes make of a run, or why they do not."""
    command = [sys.executable, os.path.abspath(__file__)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, os.path.abspath(__file__)]
    with tempfile.TemporaryDirectory() as folder:
        file = write_quiet_config(Path(folder), run, log_interval=10**6)
        child = subprocess.run([*command, "_scale", file, str(steps)], capture_output=True, text=True)
    answers = [line for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode or not answers:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        told = [line for line in lines if "rror: " in line and "ChildFailed" not in line]
        return {"processes": processes, "why": (told or lines or ["no output"])[0][:300]}
    warnings = sorted({line for line in child.stderr.splitlines() if line.startswith("warning: ")})
    return json.loads(answers[-1]) | {"warnings": warnings}


def scale_child(argv: list[str]) -> None:
    """One of the processes: measure, and where it is the first of them, say what came out."""
    file, steps = argv
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("RANK", "0") == "0" else open(os.devnull, "w")):
        timer = ScaleTimer(load_run(["--config", file], CONFIGS), Signals())
        began = time.perf_counter()
        timer.prepare()
        found = timer.scale(int(steps)) | {"ready_s": time.perf_counter() - began}
        if timer.ranks.main:
            print(json.dumps(found), file=answers, flush=True)
        timer.close()


class ScaleTimer(Timer):
    """What several processes make of a run together."""

    def log(self, bar, step: int, loss: float, *about) -> None:
        super().log(bar, step, loss, *about)
        self.loss = loss

    def scale(self, steps: int) -> dict:
        self.advance(min(10, steps), 10**6)
        before = self.progress.seconds
        self.advance(steps, 10**6)
        seconds = self.progress.seconds - before
        compiled = train.worth_compiling(self.run, self.device)
        return {
            "processes": self.ranks.world, "machine": machine(self.device), "torch": torch.__version__,
            "params": self.model.num_params(non_embedding=False), "tokens_per_step": self.tokens_per_step,
            "tokens_per_s": steps * self.tokens_per_step / seconds, "step_ms": 1e3 * seconds / steps,
            "loss": self.loss, "memory": self.most_memory(), "compile": compiled,
            "recorded": bool(self.recorded and self.recorded.graph),
            "link_bytes_per_s": self.link(),
        }  # fmt: skip

    def most_memory(self) -> int | None:
        """Bytes at most, the rehearsal included: what a recorded step uses is counted when it is recorded, and only
        then. On a CPU all that the process had in memory, torch included."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident()

    def link(self) -> float | None:
        """Bytes per second on each process's way out, in a sum over all processes that goes around a ring: of n
        processes each sends 2 (n − 1) / n of the bytes."""
        if self.ranks.world == 1:
            return None
        numbers = (LINK_BYTES if self.device.type == "cuda" else LINK_BYTES >> 5) // 4
        tensor, times = torch.zeros(numbers, device=self.device), []
        for _ in range(8):
            began = clock(self.device)
            torch.distributed.all_reduce(tensor)
            times.append(clock(self.device) - began)
        n = self.ranks.world
        return 2 * (n - 1) / n * 4 * numbers / statistics.median(times[3:])


def scale_text(rows: list[dict]) -> str:
    """The last row; its efficiency is against as many single processes, where there is one."""
    row, first = rows[-1], rows[0]
    name = f"{row['processes']} {row['parallel']}".strip()
    if "why" in row:
        return f"{name:<8} {row['why']}"
    alone = row["processes"] * first.get("tokens_per_s", math.nan) if first["processes"] == 1 else math.nan
    share = "" if math.isnan(alone) else f"{row['tokens_per_s'] / alone:.1%} of {row['processes']} × one, "
    memory = f", {row['memory'] / 2**30:,.2f} GiB at most" if row["memory"] else ""
    link = f", {row['link_bytes_per_s'] / 1e9:,.1f} GB/s between them" if row["link_bytes_per_s"] else ""
    how = {True: "compiled", False: "not compiled"}.get(row["compile"], "blocks compiled")
    line = (f"{name:<8} {row['tokens_per_s']:>11,.0f} tokens/s, {share}"
            f"{row['step_ms']:,.2f} ms a step of {row['tokens_per_step']:,} tokens, loss {row['loss']:.6f}{memory}"
            f"{link}; {how}{', recorded' if row['recorded'] else ''}, ready after {row['ready_s']:,.0f} s")
    return "\n".join([line, *(f"         {warning}" for warning in row["warnings"])])


# ---- serve ---------------------------------------------------------------------------------------------------------


class Server:
    """serve.py as a child process with one model, for a with statement."""

    def __init__(self, folder: Path, name: str, rows: int, arguments: argparse.Namespace):
        self.name, self.rows = name, rows
        program = str(Path(__file__).with_name("serve.py"))
        options = {"models": folder, "port": 0, "rate": 0, "batch": rows, "queue": arguments.queue, "memory": 1e6,
                   "data": tempfile.mkdtemp(dir=folder), "device": arguments.device}  # fmt: skip
        self.command = [sys.executable, program, *(f"--{option}={value}" for option, value in options.items())]

    def __enter__(self):
        self.child = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        told = []
        for line in self.child.stderr:
            told.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                threading.Thread(target=self.child.stderr.read, daemon=True).start()  # so that it never waits for us
                return self
        self.__exit__()
        raise UserError(f"serve.py did not start: {''.join(told[-3:]).strip()}")

    def __exit__(self, *error):
        self.child.terminate()
        self.child.wait()

    def ask(self, seed: int, arguments: argparse.Namespace) -> tuple[int, str, int]:
        """(status, text, tokens made) of one completion; each seed has a prompt of its own."""
        prompt = [(seed * 7919 + i * 104729) % 256 for i in range(arguments.prompt)]
        body = {"model": self.name, "prompt": prompt, "max_tokens": arguments.tokens, "seed": seed}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = json.loads(answer.read())
        if answer.status == 429 and int(answer.getheader("Retry-After")) > 0:
            return 429, "", 0
        if answer.status != 200:
            raise UserError(f"the server answered {answer.status}: {told['error']['message']}")
        return 200, told["choices"][0]["text"], told["usage"]["completion_tokens"]

    def all_at_once(self, arguments: argparse.Namespace) -> tuple[float, list[tuple[int, str, int]]]:
        """(tokens/s, what each client was answered)."""
        with concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
            began = time.perf_counter()
            answers = list(pool.map(lambda seed: self.ask(seed, arguments), range(arguments.clients)))
            seconds = time.perf_counter() - began
        return sum(tokens for _, _, tokens in answers) / seconds, answers


def serve_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.py serve", allow_abbrev=False, description=(
        "Measure how many tokens/s serve.py makes for clients that ask at once, beside a server without batches, and "
        "compare each answer with what its client is told alone."))  # fmt: skip
    add = parser.add_argument
    add("model", help="config file (file.json:key=value,key=value changes keys) or trained model file")
    add("--clients", type=quantity, default=16, help="that ask at once (default 16)")
    add("--rows", type=quantity, default=16, help="texts that are made at once (default 16)")
    add("--queue", type=quantity, default=64, help="clients that may wait (default 64)")
    add("--prompt", type=quantity, default=32, help="tokens of a prompt (default 32)")
    add("--tokens", type=quantity, default=128, help="tokens that are made (default 128)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: cuda, else mps, else cpu")
    return parser.parse_args(argv)


def serve_command(argv: list[str]) -> None:
    """Measure how fast many clients of serve.py are served at once, and whether each gets its own text."""
    arguments = serve_arguments(argv)
    subject = read_subjects([arguments.model])[0]
    with tempfile.TemporaryDirectory() as folder:
        model = subject.make()
        name = f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', subject.label)}.{model.config.arch}"
        save_model(Path(folder, name), model, encoders.train(["x"], 258), {})
        batch = Server(Path(folder), name, arguments.rows, arguments)
        single = Server(Path(folder), name, 1, arguments)
        with batch, single:
            print(f"{subject.label}, {machine(train.choose_device(arguments.device))}", flush=True)
            alone = [batch.ask(seed, arguments)[1] for seed in range(arguments.clients)]
            single.ask(0, arguments)
            found = [(single.all_at_once(arguments), batch.all_at_once(arguments)) for _ in range(ROUNDS)]
    print(served_text(found, alone, arguments))


def served_text(found: list[tuple], alone: list[str], arguments: argparse.Namespace) -> str:
    """What came out of the turns: tokens/s without batches and with, and how often a client got what it gets alone."""
    ratios = [batched[0] / single[0] for single, batched in found]
    slow, fast = (statistics.median(speed for speed, _ in column) for column in zip(*found, strict=True))
    answers = [answer for _, (_, answers) in found for answer in enumerate(answers)]
    served = [(seed, text) for seed, (status, text, _) in answers if status == 200]
    same = sum(text == alone[seed] for seed, text in served)
    return (f"{arguments.clients} clients at once, {arguments.tokens} tokens each: {slow:,.0f} tokens/s a text at a "
            f"time, {fast:,.0f} with {arguments.rows} rows, {statistics.median(ratios):.1f} times as many "
            f"({min(ratios):.1f} to {max(ratios):.1f})\n{len(served)} of {len(answers)} requests were served, "
            f"{len(answers) - len(served)} told to come again; {same} of the {len(served)} texts are exactly those "
            "that their clients get alone")


def kernels_command(argv: list[str]) -> int:
    """Each Triton kernel against float64 on a GPU, and against its floor."""
    from strawberry.bench import kernels

    if argv:
        raise UserError(f"bench.py kernels takes no arguments, not {' '.join(argv)}")
    return kernels.main()


# ---- the command ---------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare, "train": train_command, "growth": growth_command, "scale": scale_command,
    "decode": decode_command, "nanogpt": nanogpt, "serve": serve_command, "kernels": kernels_command}  # fmt: skip
CHILDREN: dict[str, Callable[[list[str]], int | None]] = {
    "_train": train_child, "_speed": speed_child, "_step": step_child, "_race": race_child, "_nanogpt": nanogpt_child,
    "_scale": scale_child,
}  # fmt: skip


def main(argv: list[str]) -> int | None:
    known = "\n".join(f"  {name:<10} {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: bench.py COMMAND …; bench.py COMMAND --help says more\n\n{known}")
        return 0
    name, *rest = argv
    if name not in COMMANDS | CHILDREN:
        raise UserError(f"{name!r} is no command; there are: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    return (COMMANDS | CHILDREN)[name](rest)


if __name__ == "__main__":
    run_cli(main)

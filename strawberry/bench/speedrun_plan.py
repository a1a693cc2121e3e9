"""What `bench.py speedrun` trains: the tokens of both sides, nanoGPT's settings, our config, and the runs of both."""

import argparse
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import encoder as encoders
from model import build
from strawberry.bench import child_process, hardware
from strawberry.bench.common import FIXED_VALUES, load_spec, parse_assignment, parse_learning_rates
from strawberry.bench.speedrun_report import NANOGPT, STRAWBERRY
from strawberry.bench.sweep import dump_without_comments, hash_code, hash_json, scale_own_rates
from strawberry.bench.train import find_nanogpt, make_nanogpt_folder, read_splits
from strawberry.common import UserError
from strawberry.config import to_dict
from strawberry.data.dataset import Corpus
from strawberry.data.token_file import TokenFileWriter
from strawberry.device import choose_device
from strawberry.run_config import Run
from strawberry.training import setup

RESULT_FORMAT = 1  # format of the files in runs/; files of another format are not read
SIZE_TOLERANCE = 0.01  # of --kind gpt2: how far the non-embedding parameters may differ, as a share
SHARE_OF_STEPS = 0.4  # --steps, as a share of nanoGPT's, where it is not given
MAX_JOBS = 64


@dataclass(frozen=True)
class Kind:
    """A configuration of nanoGPT, and how data is split and vocabularies are padded for it."""

    words: tuple[str, ...]  # of its command line
    division: float  # share of the tokens for training
    vocab_multiple: int  # our vocabulary is padded to a multiple of it
    lrs: str | None  # nanoGPT's learning rates to choose from; None: the one of its configuration


GPT2_WORDS = {"n_layer": 12, "n_head": 12, "n_embd": 768, "bias": False, "dropout": 0.0, "block_size": 1024,
              "batch_size": 32, "gradient_accumulation_steps": 1, "max_iters": 1500, "lr_decay_iters": 1500,
              "warmup_iters": 100, "learning_rate": 6e-4, "min_lr": 6e-5, "log_interval": 10}  # fmt: skip
KINDS = {
    "char": Kind(("config/train_shakespeare_char.py",), 0.9, 8, None),
    "gpt2": Kind(tuple(f"--{key}={value}" for key, value in GPT2_WORDS.items()), 0.95, 64, "3e-4,6e-4,1e-3"),
}


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The tokens that both sides see, and our keys that name them."""

    splits: dict[str, np.ndarray]  # "train" and "val"
    vocab_size: int  # of the encoder
    nanogpt_vocab_size: int
    keys: dict  # of our run: dataset and encoder

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
    """Held-out windows (n, block_size + 1): the tokens divided into windows, of which n at equal distances are taken,
    so that n · block_size is at most eval_tokens, but n at least 1. Raises UserError if there is no whole window.
    """
    n = (len(tokens) - 1) // block_size
    if n < 1:
        raise UserError(f"--data: {len(tokens):,} held-out tokens are fewer than a window of {block_size + 1:,}; give "
                        "more text, or a lower --data_division")  # fmt: skip
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
    n_windows: int = 0  # held-out windows of an evaluation
    fingerprints: dict[str, str] = field(default_factory=dict)  # of data, code and machine

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
    plan.fingerprints = {
        "data": data.fingerprint(), "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "nanogpt": hashlib.sha256(b"\0".join(texts)).hexdigest(), "code": hash_code(),
        "child": hash_json(dump_without_comments(child)),
        "machine": f"{hardware.describe_device(device)}, torch {torch.__version__}",
    }  # fmt: skip
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
        raise UserError('batch_size = "auto": depends on the machine; give a number, --set batch_size=32')
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
    fingerprints = {name: plan.fingerprints[name] for name in ("data", "windows", "nanogpt", "child", "machine")}
    return Trial(NANOGPT, lr, seed, job, f"{NANOGPT}-{hash_json([RESULT_FORMAT, job, fingerprints])}")


def make_trial(plan: Plan, lr: float, seed: int, target: float) -> Trial:
    """A run of our config up to the loss `target`. The rates of groups and the last one keep their proportions."""
    run = to_dict(plan.run)
    scale = lr / run["learning_rate"]
    scale_own_rates(run, scale)
    every = max(1, plan.steps // plan.arguments.evaluations)
    run |= FIXED_VALUES | {
        "max_iters": plan.steps, "lr_decay_iters": plan.steps, "learning_rate": lr,
        "min_lr": run["min_lr"] * scale, "seed": seed, "device": plan.device.type, "eval_interval": every,
        "log_interval": every,
    }  # fmt: skip
    paths = ("checkpoints", "model_path", "img_path", "encoder_path", "dataset")
    hashed_keys = {key: value for key, value in run.items() if key not in paths}
    job = {"run": run, "target": target}
    hashed = hash_json([RESULT_FORMAT, hashed_keys, target, plan.fingerprints])
    return Trial(STRAWBERRY, lr, seed, job, f"{STRAWBERRY}-{hashed}")


def describe_plan(plan: Plan) -> list[str]:
    """Sentences that state what is compared."""
    theirs, ours, run = plan.nanogpt, plan.ours, plan.run
    train, val = (len(plan.data.splits[name]) for name in ("train", "val"))
    their_tokens = theirs["max_iters"] * plan.nanogpt_tokens_per_step
    our_tokens = plan.steps * ours["tokens_per_step"]
    return [
        f"nanoGPT: {theirs['params']:,} parameters without embeddings and head, {theirs['params_total']:,} in all; "
        f"{theirs['max_iters']:,} steps of {plan.nanogpt_tokens_per_step:,} tokens, "
        f"{their_tokens / train:.2f} epochs.",
        f"strawberry: {plan.arguments.config}, {ours['params']:,} parameters without embeddings and head, "
        f"{ours['params_total']:,} in all; at most {plan.steps:,} steps of {ours['tokens_per_step']:,} tokens, "
        f"{our_tokens / train:.2f} epochs; "
        f"{'Muon' if run.optimizer_hyperparams.use_muon else 'AdamW'}.",
        f"Data: {plan.arguments.data}, {train:,} tokens for training and {val:,} held out, the same for both. Both are "
        f"judged by the same {plan.n_windows * theirs['block_size']:,} of these, in windows of "
        f"{theirs['block_size']:,}.",
    ]  # fmt: skip

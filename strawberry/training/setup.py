"""Set-up of a run: device, dtype, data, objective, initial weights, and checks of every path."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import encoder as encoders
from strawberry.common import UserError
from strawberry.config import to_dict
from strawberry.data.dataset import Corpus, find_token_files
from strawberry.data.objectives import make_objective
from strawberry.device import has_cxx_compiler
from strawberry.huggingface import gpt2
from strawberry.model_file import load_model, read_about
from strawberry.outputs import CHECKPOINTS, Input, Output, check_outputs, encoder_inputs, is_same_file
from strawberry.run_config import find_config
from strawberry.training import checkpoint, plot
from strawberry.training.blocks import iterate_blocks
from strawberry.training.checkpoint import LATEST
from strawberry.training.console import warn
from strawberry.training.lock import LOCK
from strawberry.training.metrics import METRICS
from strawberry.training.record import RECORD

COMPILE_ON_CPU_FROM = 5000  # steps; see should_compile
# arch → validation bits per byte with AdamW and with Muon, tokens, and Muon's rate; 4 M parameters; of `transformer` a
# decoder. See docs/measurements.md, "Muon's options" and "All families compared"
BETTER_WITH_MUON = {
    "strawberry": (1.569, 1.156, "13 M", 6e-3), "tinystar": (1.220, 1.097, "13 M", 6e-3),
    "transformer": (0.896, 0.797, "20 M", 6e-3), "strawberry-silia": (0.849, 0.770, "20 M", 1.2e-2),
    "strawberry-v0": (1.238, 0.886, "20 M", 6e-3),
}  # fmt: skip
# (arch, whether the embedding is also the head) → validation bits per byte without a rate for it, with one, and that
# rate, of 4 M parameters after 20 M tokens; "Rates of groups", in the same place
BETTER_WITH_EMBEDDING_LR = {
    ("tinystar", True): (0.8345, 0.7953, 2e-2), ("strawberry", True): (0.8768, 0.8369, 6e-3),
    ("tinystar", False): (1.0955, 0.7843, 0.1), ("palm", False): (1.4273, 1.3706, 0.1),
}  # fmt: skip
MAX_VERIFIED_BYTES = 2 << 30  # maximum bytes of token files that --check reads whole, in seconds


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations; weights, gradients and optimizer state are always float32. Raises UserError if the
    device does not support it."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if name == "float8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        about = f"{torch.cuda.get_device_name(device)} does not multiply in 8 bits"
        raise UserError(f'dtype = "float8": {about}, which takes compute capability 8.9 or more; use "bfloat16"')
    if name == "float8" and device.type not in ("cuda", "cpu"):
        raise UserError(f'dtype = "float8": {device.type} does not multiply in 8 bits; use "bfloat16"')
    return torch.bfloat16 if name == "float8" else getattr(torch, name)


def load_data(run) -> tuple:
    """(encoder, corpus). Raises UserError if they do not match each other or the model."""
    encoder = encoders.load(run.encoder_path)
    hyper = run.model_hyperparams
    if encoder.vocab_size > hyper.vocab_size:
        raise UserError(
            f"model_hyperparams.vocab_size = {hyper.vocab_size}: encoder_path {run.encoder_path} has "
            f"{encoder.vocab_size} tokens; set it to {encoder.vocab_size} or more, or use a smaller encoder"
        )
    encoder.encode(run.sample_prompt)  # fails now for a character that it cannot encode, not at the first sample
    return encoder, Corpus(run.dataset, encoder.fingerprint, hyper.block_size)


def choose_objective(run, encoder, corpus: Corpus):
    """The training objective. Sets run.objective and pad_id where they were not given. Raises UserError if they do not
    match model and data."""
    hyper = run.model_hyperparams
    about = (getattr(hyper, "kind", "decoder"), hyper.vocab_size, hyper.block_size)
    run.objective, objective = make_objective(run.objective, *about, encoder, corpus)
    if objective.has_padding:
        hyper.pad_id = encoder.pad if hyper.pad_id is None else hyper.pad_id
        if hyper.pad_id != encoder.pad:
            message = f"the encoder pads with {encoder.pad}; set it to that or to null"
            raise UserError(f"model_hyperparams.pad_id = {hyper.pad_id}: {message}")
    return objective


def changed_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`learning_rate: 0.003 → 0.001` for each key that differs."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} → {json.dumps(b)}")
    return found


def load_initial_weights(run, model: nn.Module, encoder) -> None:
    """Copy the weights that init_from names into `model`, if it names any. Raises UserError if they do not fit."""
    if run.pretrained:
        load_pretrained(run.pretrained, model, encoder)
    elif run.foreign:
        gpt2.copy_weights(gpt2.read_checkpoint(*run.foreign), model, encoder)


def load_pretrained(path: str | Path, model: nn.Module, encoder) -> None:
    """Copy the weights of a model file, or of the newest checkpoint in a directory, into `model`. Raises UserError if
    its shapes or encoder differ."""
    path = checkpoint.find_model(path, "init_from")
    other, its_encoder, _ = load_model(path)
    if its_encoder.fingerprint != encoder.fingerprint:
        raise UserError(
            f"init_from: {path} was trained with encoder {its_encoder.fingerprint[:12]}…, and encoder_path is "
            f"{encoder.fingerprint[:12]}…: set encoder_path to the one it was trained with"
        )
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as error:
        changed = changed_keys(to_dict(other.config), to_dict(model.config), "model_hyperparams.")
        raise UserError(f"init_from: {path} is of another shape ({'; '.join(changed)}): set them as it has") from error


def should_compile(run, device: torch.device) -> bool | str:
    """Whether to compile: True for the whole model, "blocks" for each block, False. Resolves `compile: "auto"`.

    "auto" compiles on CUDA, where every step is faster. On a CPU it compiles for runs of at least COMPILE_ON_CPU_FROM
    steps: with a model like config/tiny.json's on two slow cores, compilation took 160 s and reduced a step from 0.61 s
    to 0.42 s, so it paid off after 850 steps; smaller models gain less. The rule uses max_iters and no measurement, so
    that a resumed run computes the same as the first one. "auto" does not compile on MPS.
    """
    if run.compile != "auto":
        return run.compile
    if device.type != "cpu" or run.max_iters < COMPILE_ON_CPU_FROM:
        return device.type == "cuda"
    if not has_cxx_compiler():
        warn("no C++ compiler is installed, so that the model is not compiled and steps take longer")
        return False
    return True


def nearest_existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return folder if folder.exists() or folder == folder.parent else nearest_existing(folder.parent)


def check_writable(key: str, path: str, folder: Path) -> None:
    """Raises UserError, which names key and path, if files cannot be created in `folder` or its nearest existing
    parent. Creates nothing."""
    reason, fix = None, "name another path, or change the rights"
    try:
        folder = nearest_existing(folder)
        if not folder.is_dir():
            reason, fix = f"{folder} is a file, not a directory", "name another path"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = f"{folder} cannot be written to"
    except OSError as error:  # for example a name that is too long, or a folder without search permission
        reason = f"{error.strerror} ({folder})"
    if reason:
        raise UserError(f"{key} = {path}: {reason}; {fix}")


def list_outputs(run) -> list[Output]:
    """Every file that a run writes, and the directory of its checkpoints."""
    root = Path(run.checkpoints.path)
    files = {METRICS: "metrics", RECORD: "record", LOCK: "lock", LATEST: "latest"}
    outputs = [Output("model_path", run.model_path, "model"), Output("checkpoints.path", root, CHECKPOINTS)]
    outputs += [Output("checkpoints.path", root / name, kind) for name, kind in files.items()]
    return outputs + ([] if run.img_path is None else plot.picture_outputs("img_path", run.img_path))


def list_inputs(run, config: str | None = None) -> list[Input]:
    """Every file that a run reads, including its --config. Excluded are a model that is trained further into its own
    path, which is an output, and checkpoints that a run starts from, which are moved, not replaced."""
    inputs = [Input("--config", find_config(config))] if config else []
    inputs += [Input("dataset.path", path) for path in find_token_files(run.dataset)]
    inputs += encoder_inputs("encoder_path", run.encoder_path)
    if run.pretrained and not is_own_checkpoint(run) and not is_same_file(run.pretrained, run.model_path):
        inputs.append(Input("init_from", run.pretrained))
    if run.foreign:
        inputs += [Input("init_from", path) for path in gpt2.list_files(*run.foreign)]
    return inputs


def is_own_checkpoint(run) -> bool:
    """Whether the run's initial model is a checkpoint in its own checkpoints.path."""
    path, root = Path(os.path.realpath(run.pretrained)), Path(os.path.realpath(run.checkpoints.path))
    return path == root or (path.is_relative_to(root) and path.relative_to(root).parts[0].startswith("step_"))


TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def command_line(argv: list[str], resume: bool) -> str:
    """The command line of this run, or the one that resumes it."""
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
    start = [relative_path(sys.executable)]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        start = ["torchrun", f"--nproc_per_node={world}"]
    if machines != "1":  # the same command on each machine
        start += [f"--nnodes={machines}", "--rdzv_backend=c10d", "--rdzv_endpoint=FIRST_MACHINE:29400"]
    words = [*start, relative_path(str(TRAIN)), *argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def relative_path(path: str) -> str:
    """The path, relative if it is inside the working directory."""
    with contextlib.suppress(ValueError):  # another drive, on Windows
        relative = os.path.relpath(path)
        return path if relative.startswith(os.pardir) else relative
    return path


def print_summary(state) -> None:
    """Print a summary of model, data, objective, machine and optimizer before training."""
    run, model, corpus = state.run, state.model, state.corpus
    T, accumulation = run.model_hyperparams.block_size, run.gradient_accumulation_steps
    blocks = list(iterate_blocks(model))  # of encoder and decoder
    pattern = f" of {' → '.join(blocks[0].steps)}" if blocks and hasattr(blocks[0], "steps") else ""
    threads = f" ({torch.get_num_threads()} threads)" if state.device.type == "cpu" else ""
    name = f" ({torch.cuda.get_device_name()})" if state.device.type == "cuda" else threads
    dtype = "float8" if run.dtype == "float8" else str(state.dtype).removeprefix("torch.")
    rows = {
        "model": f"{model.config.arch}, {len(blocks)} blocks{pattern}",
        "parameters": f"{model.num_params(non_embedding=False):,}, {model.num_params():,} without embeddings",
        "data": f"{run.dataset.path}: {corpus.train.n_tokens:,} tokens to train on, {corpus.val.n_tokens:,} to "
        f"validate; {state.encoder.vocab_size:,} token ids from {run.encoder_path}",
        "objective": run.objective + describe_truncation(state),
        "step": f"{accumulation} × {run.batch_size} rows of {T} = {state.tokens_per_step:,} tokens of "
        f"{state.flops_per_token / 1e6:,.2f} MFLOP each",
        "machine": f"{state.device.type}{name}, {dtype}"
        + (f"; {state.ranks.world} processes, {run.parallel}" if state.ranks.world > 1 else ""),
        "seed": str(run.seed),
        "checkpoints": f"{state.root}, every {run.checkpoints.interval:,} steps"
        if run.checkpoints.create_checkpoints
        else "none",
    }
    print("\n".join(f"{key:<12} {text}" for key, text in rows.items()))
    print("\n" + state.optimizer.table() + "\n" + suggest_muon(run) + suggest_embedding_lr(run, model), flush=True)


def suggest_muon(run) -> str:
    """A line for a run with AdamW of a family that is known to learn better with Muon; "" for others."""
    hyper = run.model_hyperparams
    measured = hyper.arch in BETTER_WITH_MUON and getattr(hyper, "kind", "decoder") == "decoder"
    if run.optimizer_hyperparams.use_muon or not measured:
        return ""
    adamw, muon, tokens, rate = BETTER_WITH_MUON[hyper.arch]
    return (f"{hyper.arch} learned better with Muon, {muon:.3f} bits per byte instead of {adamw:.3f} with 4 M "
            f"parameters and {tokens} tokens (docs/measurements.md): try --optimizer_hyperparams.use_muon=true "
            f"--optimizer_hyperparams.muon_lr={rate:g}\n")  # fmt: skip


def suggest_embedding_lr(run, model: torch.nn.Module) -> str:
    """A line for a run whose embedding has the common rate and learns better with a higher one; "" for others, and for
    what was not measured: other families, and tied embeddings without Muon. An untied table starts with a standard
    deviation of 1, which a step of the common rate hardly changes."""
    hyper = run.optimizer_hyperparams
    tied = "input" not in model.roles().values()
    common, own, rate = BETTER_WITH_EMBEDDING_LR.get((run.model_hyperparams.arch, tied), (0, 0, 0))
    if hyper.embedding_lr or run.learning_rate >= rate or (tied and not hyper.use_muon):
        return ""
    kind = f"{run.model_hyperparams.arch} with {'a tied' if tied else 'an untied'} embedding"
    return (f"{kind} learned better with a rate of its own for it, {own:.3f} bits per byte instead of {common:.3f} "
            f"with 4 M parameters and 20 M tokens (docs/measurements.md): try "
            f"--optimizer_hyperparams.embedding_lr={rate:g}\n")  # fmt: skip


def describe_truncation(state) -> str:
    """The number of pairs that block_size truncates, as text; "" if there are none."""
    splits = (state.corpus.train, state.corpus.val)
    n_cut, n = (sum(getattr(split, what, 0) for split in splits) for what in ("n_cut", "n_windows"))
    return f"; {n_cut:,} of {n:,} are cut to {splits[0].block_size} tokens" if n_cut else ""


def check_paths(run, root: Path, config: str | None) -> None:
    if os.path.isdir(run.model_path):
        raise UserError(f"model_path = {run.model_path}: is a directory; name a file")
    check_writable("model_path", run.model_path, Path(run.model_path).parent)
    check_writable("checkpoints.path", run.checkpoints.path, root)
    check_outputs(list_outputs(run), list_inputs(run, config))
    check_default_model(run)


def check_default_model(run) -> None:
    """Raises UserError if nothing names model_path, and the file at its default is a model of another architecture or
    size, or was trained on other data."""
    if "model_path" in run.given or run.init_from == "resume" or not os.path.exists(run.model_path):
        return
    try:
        found = read_about(run.model_path)[1].get("run") or {}
    except UserError:  # damaged
        return
    now = json.loads(json.dumps(to_dict(run)))
    if any(found.get(key) != now[key] for key in ("model_hyperparams", "dataset", "encoder_path")):
        raise UserError(f"model_path: {run.model_path}, the default, is there, and was trained with another model, "
                        f"dataset or tokenizer; name a new file, or replace it with --model_path={run.model_path}")

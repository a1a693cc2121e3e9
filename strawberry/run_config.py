"""The keys of a training run, with their defaults, and how a run is read from a file and a command line.

Index:  the keys · loading · command line · help
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from strawberry.common import UserError, nearest, show
from strawberry.config import (
    JsonObject,
    check,
    declared,
    dotted_names,
    find_bad_escape,
    find_repeated_keys,
    join_problems,
    option,
    parse_config,
    sections,
)

# ---- the keys --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Dataset:
    data_division: float = option(
        0.8, "share of the tokens used for training; the rest is for validation", above=0, below=1)
    load_from_file: bool = option(True, "true: path is a token file; false: path is a directory of token files")
    path: str = option("data/webtext.bin", "token file, or directory of token files, from prepare.py", path=True)


@dataclasses.dataclass
class Checkpoints:
    path: str = option("bin/ck", "directory of the checkpoints; each is a directory step_…", path=True)
    interval: int = option(2000, "steps between checkpoints", low=1)
    create_checkpoints: bool = option(True, "false: write none; the run cannot be resumed")
    keep: int = option(3, "number of newest checkpoints to keep, besides the one with the best validation loss", low=1)


@dataclasses.dataclass
class OptimizerHyperparams:
    eps: float = option(1e-10, "AdamW's epsilon", above=0)
    beta1: float = option(0.9, "AdamW's decay rate of the first moment", low=0, below=1)
    beta2: float = option(0.95, "AdamW's decay rate of the second moment", low=0, below=1)
    weight_decay: float = option(0.1, "decoupled weight decay, of embeddings and hidden matrices only", low=0)
    use_muon: bool = option(False, "true: Muon for hidden matrices, AdamW for the rest; false: AdamW for all")
    momentum: float = option(0.95, "Muon's momentum; it rises from 0.85 over 300 steps", low=0, below=1)
    muon_lr: float | None = option(None, "Muon's learning rate; null: learning_rate", above=0)
    muon_beta2: float = option(
        0.0, "NorMuon: decay rate of the second moment of each row of Muon's update, which divides the row, 0.95 in "
        "the paper; 0: off", low=0, below=1,
    )
    weight_decay_schedule: str = option(
        "constant", "weight decay over the steps, each multiplied by the learning rate; constant: weight_decay; lr: "
        "weight_decay in proportion to the learning rate, 0 at its end", choices=["constant", "lr"],
    )
    embedding_lr: float | None = option(None, "AdamW's learning rate of embeddings; null: learning_rate", above=0)
    head_lr: float | None = option(
        None, "AdamW's learning rate of a head that is not the embedding; null: learning_rate", above=0)
    scalar_lr: float | None = option(
        None, "AdamW's learning rate of norms, biases, gates, tao and tau; null: learning_rate", above=0)


FOREIGN = ("hf", "nanogpt")  # formats of other programs' checkpoints; see strawberry/huggingface/gpt2.py


@dataclasses.dataclass
class Run:
    """The whole configuration of a run of train.py. `run_class` gives model_hyperparams the class of its arch."""

    dataset: Dataset = option(Dataset(), "the token file, and how it is split")
    checkpoints: Checkpoints = option(Checkpoints(), "checkpoints, from which a stopped run resumes")
    model_hyperparams: Any = option(None, "the model; arch picks the family, and each family has its own keys")
    optimizer_hyperparams: OptimizerHyperparams = option(OptimizerHyperparams(), "AdamW and Muon")
    model_path: str = option(
        "bin/air.strawberry", "output: the trained model in one file, with config and encoder", path=True
    )
    encoder_path: str = option("bin/cl8k.bin", "encoder file, or tiktoken:<name>, or chars:<text file>", path=True)
    init_from: str = option(
        "scratch",
        'scratch; resume: continue from the newest intact checkpoint; "<path>,pretrained": start from the '
        'weights of that model file or checkpoint directory; "hf:<directory>", "nanogpt:<ckpt.pt>": from those of a '
        "GPT-2 of Hugging Face or of a checkpoint of nanoGPT", path=True,
    )
    objective: str = option(
        "auto",
        "training objective: next token, span corruption, the target of a pair, or masked tokens; auto: next "
        "for a decoder, masked for an encoder, pairs or spans for an encoder-decoder, depending on "
        "dataset.path",
        choices=["auto", "next", "spans", "pairs", "masked"],
    )
    seed: int | str = option("auto", "random seed; auto: drawn, and stored with the run", low=0, choices=["auto"])
    gradient_accumulation_steps: int = option(
        1, "batches whose gradients are accumulated in one optimizer step", low=1, high=2**20)
    batch_size: int | str = option(
        4,
        "sequences of block_size tokens in a batch; auto: as many as fit into the GPU's memory, on a CPU up "
        "to 4096 tokens",
        low=1, high=2**20, choices=["auto"],
    )
    parallel: str = option(
        "ddp",
        "how several processes under torchrun share the work; ddp: each has the whole model and a part of the"
        " batch; fsdp: weights, gradients and optimizer state are sharded too, for models that do not fit; "
        "activations are then computed twice", choices=["ddp", "fsdp"],
    )
    max_iters: int = option(50000, "total number of optimizer steps", low=1)
    eval_interval: int = option(2000, "steps between evaluations; each prints a sample of text", low=1)
    log_interval: int = option(200, "steps between log lines", low=1)
    eval_iters: int = option(200, "batches of each split per evaluation", low=1)
    decay_lr: bool = option(True, "false: keep the learning rate constant after the warm-up")
    lr_decay_iters: int | None = option(None, "step at which the learning rate reaches min_lr; null: max_iters", low=1)
    learning_rate: float = option(3e-3, "peak learning rate", above=0)
    cooldown_frac: float = option(
        0.4,
        "last share of lr_decay_iters, in which the learning rate falls by a cosine; 1: the classic warm-up "
        "and cosine", low=0, high=1
    )
    warmup_iters: int = option(2000, "steps of linear warm-up", low=0)
    min_lr: float = option(3e-4, "final learning rate", low=0)
    grad_clip: float = option(1.0, "maximum global norm of the gradient; 0: no clipping", low=0)
    on_nan: str = option(
        "stop",
        "reaction to a NaN or infinite loss or gradient; stop: end with exit code 3; rollback: return to the "
        "last checkpoint, skip the data since then, halve the learning rate, at most 3 times",
        choices=["stop", "rollback"],
    )
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto",
        "type of activations; auto: bfloat16 on cuda, float32 elsewhere; float8: bfloat16, with the large "
        "matrix products of training in 8 bits", choices=["auto", "float32", "bfloat16", "float8"]
    )
    compile: bool | str = option(
        "auto",
        "torch.compile; blocks: compile each block separately; auto: on cuda, and on cpu if max_iters is at "
        "least 5000 and there is a C++ compiler, because it takes minutes there; if it fails, train without",
        choices=["auto", "blocks"],
    )
    cuda_graph: bool | str = option(
        "auto", "capture a training step as one CUDA graph; auto: on GPUs; if it fails, train without",
        choices=["auto"]
    )
    img_path: str | None = option(
        "img", "output: directory of the curves, or one .png, .svg or .pdf file for all of them; null: none", path=True
    )
    log_to: str | list[str] | None = option(
        None,
        "where metrics.jsonl is copied to, or a list of both; each has a package of its own, which "
        "requirements.txt names under logging; null: nowhere",
        choices=["tensorboard", "wandb"],
    )
    sample_length: int = option(200, "tokens in the sample of each evaluation; 0: no sample", low=0, high=2**20)
    sample_prompt: str = option(
        "",
        "prompt of the sample, or source for an encoder-decoder; empty: the start of a document, or a source "
        "of the validation split"
    )

    renamed: ClassVar[tuple[str, ...]] = ()  # of an instance: a sentence for each key that has its old name
    given: ClassVar[frozenset[str]] = frozenset()  # of an instance: the keys that are not left to their defaults

    def __post_init__(self):
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters

    @property
    def pretrained(self) -> str | None:
        """The model file that init_from names, `"<path>,pretrained"` in either order; else None."""
        before, after = self.init_from.removesuffix(",pretrained"), self.init_from.removeprefix("pretrained,")
        return next((path.strip() for path in (before, after) if path != self.init_from), None)

    @property
    def foreign(self) -> tuple[str, str] | None:
        """(format, path) of another program's checkpoint that init_from names, `hf:<directory>` or
        `nanogpt:<ckpt.pt>`; else None."""
        scheme, _, path = self.init_from.partition(":")
        return (scheme, path) if scheme in FOREIGN and path and not self.pretrained else None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.init_from not in ("scratch", "resume") and not self.pretrained and not self.foreign:
            hint = nearest(self.init_from, ["scratch", "resume"])
            foreign = " or ".join(f'"{name}:<path>"' for name in FOREIGN)
            yield "init_from", f'must be "scratch", "resume", "<path>,pretrained", {foreign}{hint}'
        if self.decay_lr and self.min_lr > self.learning_rate:
            yield "min_lr", f"must be <= learning_rate ({self.learning_rate:g}), since decay_lr is true"
        if self.on_nan == "rollback" and not self.checkpoints.create_checkpoints:
            yield "on_nan", "needs checkpoints.create_checkpoints: there is nothing else to return to"
        others = {"encoder_path": self.encoder_path, "dataset.path": self.dataset.path,
                  "checkpoints.path": self.checkpoints.path}  # fmt: skip
        for key, path in others.items():
            if os.path.normpath(self.model_path) == os.path.normpath(path):
                yield "model_path", f"is {key} too, which the trained model would replace; name another file"
        if self.img_path and (problem := explain_picture_path(self.img_path)):
            yield "img_path", problem

    def warnings(self) -> Iterator[str]:
        """What is allowed and hardly intended: old names of keys, and a schedule that does not fit max_iters. Each
        names keys and values that would do."""
        yield from self.renamed
        warmup, decay, end = self.warmup_iters, self.lr_decay_iters, self.max_iters
        if end <= warmup:
            yield self._short_warmup_warning()
        elif self.decay_lr and decay <= warmup:
            yield (f"lr_decay_iters = {decay}: the learning rate drops to min_lr right after the warm-up "
                   f"(warmup_iters = {warmup}); set lr_decay_iters to {end}, or warmup_iters to {decay // 20}")
        elif self.decay_lr and self.cooldown_frac and decay > end:
            falls = max(warmup, (1 - self.cooldown_frac) * decay) < end - 1
            yield (f"max_iters = {end}: the run ends {'while' if falls else 'before'} the learning rate falls "
                   f"(lr_decay_iters = {decay}); set lr_decay_iters to {end}, or max_iters to {decay}")  # fmt: skip
        if self.checkpoints.create_checkpoints and self.checkpoints.interval > end:
            yield (f"checkpoints.interval = {self.checkpoints.interval}: more than max_iters ({end}), so that a crash "
                   f"before the last step loses the whole run; set checkpoints.interval to {max(1, end // 10)}")

    def _short_warmup_warning(self) -> str:
        warmup, decay, end = self.warmup_iters, self.lr_decay_iters, self.max_iters
        shorter, longer = f"warmup_iters to {end // 20}", f"max_iters to {10 * warmup}"
        if self.decay_lr:
            shorter += f" and lr_decay_iters to {end}" if decay != end else ""
            longer = f"max_iters to {decay}" if decay > warmup else f"max_iters and lr_decay_iters to {10 * warmup}"
        reached = f"{100 * end / (warmup + 1):.2g}"
        return (f"max_iters = {end}: the run ends during its warm-up (warmup_iters = {warmup}), at {reached} % of "
                f"learning_rate; set {shorter}, or {longer}")  # fmt: skip


PICTURES = (".png", ".svg", ".pdf")
OTHER_PICTURES = (".bmp", ".eps", ".gif", ".jpeg", ".jpg", ".ps", ".tif", ".tiff", ".webp")


def explain_picture_path(path: str) -> str | None:
    """What is wrong with a path for pictures: a directory, or a file that ends in one of PICTURES."""
    suffix = Path(path).suffix.lower()
    allowed = f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}"
    return f"cannot be drawn as {suffix}; name a directory or a {allowed} file" if suffix in OTHER_PICTURES else None


def run_class(archs: dict[str, type], arch: str) -> type[Run]:
    """Run, with model_hyperparams of the class that `arch` names."""
    return make_run_class(archs[arch])


@functools.cache  # what is kept of each config class, its validator above all, would grow with every config read
def make_run_class(model: type) -> type[Run]:
    section = option(model(), declared(Run)["model_hyperparams"].doc)
    return dataclasses.make_dataclass("Run", [("model_hyperparams", model, section)], bases=(Run,))


# ---- loading ---------------------------------------------------------------------------------------------------------

DEFAULT_ARCH = "strawberry"
CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "config"


RENAMED = {"record": "cuda_graph"}  # old name of a key → its name
# removed keys of optimizer_hyperparams → the value that means what is computed now; other values are refused
REMOVED = {"newton_schulz": "jordan", "cautious_decay": False}


def update_old_keys(raw: dict) -> tuple[list[str], list[str]]:
    """Give the keys of RENAMED their names, in place: (a warning for each, a problem where both names are given). Keys
    of REMOVED with the value there, which earlier versions wrote into each model file and checkpoint, are dropped.

    >>> update_old_keys({"record": False})
    (['record is now called cuda_graph: write cuda_graph = false'], [])
    """
    warnings, problems = [], []
    for old, new in RENAMED.items():
        if old in raw and new in raw:
            problems.append(f"{old} = {show(raw.pop(old))}: is the old name of {new}, which is given too; keep {new}")
        elif old in raw:
            raw[new] = raw.pop(old)
            warnings.append(f"{old} is now called {new}: write {new} = {show(raw[new])}")
    section = raw.get("optimizer_hyperparams")
    for name, value in REMOVED.items() if isinstance(section, dict) else ():
        if name in section and show(section[name]) == show(value):  # 0 is not false
            del section[name]
    return warnings, problems


def refuse_removed_keys(raw: dict) -> list[str]:
    """Take the keys of REMOVED out of raw: a problem for each."""
    section = raw.get("optimizer_hyperparams")
    names = [name for name in REMOVED if isinstance(section, dict) and name in section]
    return [f"optimizer_hyperparams.{name} = {show(section.pop(name))}: this key was removed, and every run does what "
            f"{show(REMOVED[name])} did; leave it out" for name in names]  # fmt: skip


def load_run(argv: list[str], archs: dict[str, type]) -> Run:
    """The run that a command line describes: defaults, then the file of --config, then --key=value overrides.

    Every problem of file and command line is in one UserError. `--help` prints every key and exits.
    """
    names = set(RENAMED).union(*(dotted_names(run_class(archs, arch)) for arch in archs))
    config, overrides, problems = parse_arguments(argv, names, own=OWN_OPTIONS)
    misspelt = [(name, hint) for name, _ in overrides if (hint := own_option_like(name, names))]
    overrides = [(name, text) for name, text in overrides if name not in dict(misspelt)]
    problems += [f"--{name}: unknown option{hint}" for name, hint in misspelt]
    raw: dict[str, Any] = {}
    if config is not None:
        try:
            raw = parse_config(find_config(config))
        except UserError as error:
            problems.append(str(error))
    raw.pop("$schema", None)  # for editors
    texts = set().union(*(text_keys(run_class(archs, arch)) for arch in archs))
    problems += apply_overrides(raw, overrides, texts) + find_repeated_keys(raw)
    if asks_for_help(argv, names):
        arch, _ = take_arch(raw, archs)
        print(help_text(run_class(archs, arch), arch, archs))
        raise SystemExit(0)
    return make_run(raw, archs, problems, f"{config}: " if raw and not overrides and not problems else "")


def make_run(raw: dict, archs: dict[str, type], problems: Iterable[str] = (), source: str = "") -> Run:
    """The run that plain data describes. Raises UserError with every problem, those known before included."""
    warnings, old_problems = update_old_keys(raw)
    old_problems += refuse_removed_keys(raw)
    arch, arch_problems = take_arch(raw, archs)
    run, found = check(run_class(archs, arch), raw)
    if problems := [*problems, *old_problems, *arch_problems, *found]:
        raise UserError(join_problems(problems, source))
    run.renamed, run.given = tuple(warnings), frozenset(raw)
    return run


# ---- command line ----------------------------------------------------------------------------------------------------

OWN_OPTIONS = ("config", "check", "quiet", "help")  # of train.py, beside the keys


def own_option_like(name: str, keys: Iterable[str]) -> str:
    """The hint for a name that is no key and is closer to one of train.py's own options than to any key, or nothing.

    >>> own_option_like("confg", ["compile"]), own_option_like("compil", ["compile"])
    (" (did you mean '--config'?)", '')
    """
    last_parts = {key.rpartition(".")[2] for key in keys}
    if name.rpartition(".")[2] in last_parts:
        return ""
    hint = nearest(f"--{name}", [f"--{option}" for option in (*OWN_OPTIONS, *last_parts)])
    return hint if any(f"'--{option}'" in hint for option in OWN_OPTIONS) else ""


def parse_arguments(
    argv: list[str], names: Iterable[str] = (), flags: Iterable[str] = (), own: Iterable[str] = ("help",),
    bare: str | Callable[[str], str] = "",
) -> tuple:
    """(config file, overrides as (dotted name, text), problems) of `--name=value` and `--name value`.

    `names` are the options that there are, `flags` those of them that take no value, `own` further options that a hint
    may name. `bare` is the option that a word without one is most likely meant for, or a function of the word; "": a
    config, or any key. In
    `--name value` any word is a value, with dashes at its start too, unless it is one of the options.
    """
    config, overrides, problems, names = None, [], [], list(names)
    for word, name, text in split_arguments(argv, names, flags):
        if name in HELP:
            continue
        if name is None:
            named = bare(word) if callable(bare) else bare
            option = named or ("config" if word.endswith(".json") else "")
            mend = f"--{option} {shlex.quote(word)}" if option else "--key=value"
            problems.append(f"{show(word)} on the command line: must be an option; write {mend}")
        elif text is None and names and name not in (*names, "config"):
            last_parts = {known.rpartition(".")[2] for known in names}
            hint = nearest(f"--{name}", [f"--{known}" for known in (*own, *last_parts, *names)])
            problems.append(f"{word}: unknown option{hint or '; --help lists them'}")
        elif text is None:
            problems.append(f"{word}: has no value; write {word}=value")
        elif name == "config":
            problems += [f"--config {config}: given twice; keep one"] if config is not None else []
            config = text
        else:
            overrides.append((name, text))
    return config, overrides, problems


HELP = ("-h", "--help")


def asks_for_help(argv: list[str], names: Iterable[str] = (), flags: Iterable[str] = ()) -> bool:
    """Whether -h or --help is an option of the command line, not the value of one."""
    return any(name in HELP for _, name, _ in split_arguments(argv, names, flags))


def split_arguments(
    argv: list[str], names: Iterable[str], flags: Iterable[str]
) -> Iterator[tuple[str, str | None, str | None]]:
    """(word, option's name, value) of a command line: name None for a word that is no option, value None where it is
    missing. The name of -h and --help is the word itself."""
    names, flags, rest = {*names, *flags, "config"}, set(flags), list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if word in HELP:
            yield word, word, None
        elif not word.startswith("--") or not name:
            yield word, None, None
        elif equals:
            yield word, name, text
        elif name in flags:
            yield word, name, "true"
        elif not rest or (rest[0].startswith("--") and rest[0][2:].partition("=")[0] in names):
            yield word, name, None
        else:
            yield word, name, rest.pop(0)


def find_config(name: str) -> Path:
    """The file of that name in the working directory, else in config/ beside this file."""
    for path in (Path(name), CONFIG_FOLDER / name):
        with contextlib.suppress(OSError, ValueError):
            if path.exists() and not path.is_dir():
                return path
    known = sorted(path.name for path in CONFIG_FOLDER.glob("*.json") if path.name != "schema.json")
    found = "is a directory; name a JSON file" if os.path.isdir(name) else "no such file"
    raise UserError(
        f"--config {show(name)}: {found} here or in config/{nearest(Path(name).name, known)}; "
        f"config/ has {', '.join(known) or 'none'}"
    )


def apply_overrides(raw: dict, overrides: list[tuple[str, str]], text_keys: set[str]) -> list[str]:
    """Set each `a.b` of the command line in the nested data; returns the problems. An object given for a section is
    merged with the section's keys, as in strawberry.train."""
    problems = []
    for dotted, text in overrides:
        *sections, name = dotted.split(".")
        target: Any = raw
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            try:
                value = _value(text, dotted in text_keys)
            except UserError as error:
                problems.append(f"{dotted} = {text}: {error}")
                continue
            if not sections and isinstance(value, dict) and isinstance(target.get(name), dict):
                problems += find_repeated_keys(value, f"{name}.")
                target[name].update(value)
            else:
                target[name] = value
        else:
            problems.append(f"{dotted} = {text}: {'.'.join(sections)} is a value, not a section")
    return problems


def _value(text: str, is_text: bool) -> Any:
    """A command line's value: JSON, else the text itself. Keys that hold text only keep `123` and `true` as text.
    Raises UserError for JSON with a backslash that escapes nothing."""
    import json5

    if text in ("True", "False", "None") and not is_text:  # Python's spelling comes easily to the fingers
        return {"True": True, "False": False, "None": None}[text]
    if is_text and not text.startswith('"') and text != "null":
        return text
    try:
        value = json5.loads(text, object_pairs_hook=JsonObject)
    except (ValueError, RecursionError):
        return text
    if found := find_bad_escape(text):
        raise UserError(found[1])
    return value


def text_keys(cls: type, prefix: str = "") -> set[str]:
    names = set()
    for name, key in declared(cls).items():
        names |= text_keys(key.section, f"{prefix}{name}.") if key.section else set()
        names |= {prefix + name} if str in key.kinds and not set(key.kinds) - {str, type(None)} else set()
    return names


def take_arch(raw: dict, archs: dict[str, type]) -> tuple[str, list[str]]:
    """(the arch that the model's keys are judged by, problems)."""
    default = DEFAULT_ARCH if DEFAULT_ARCH in archs else next(iter(archs))
    model = raw.get("model_hyperparams", {})
    arch = model.get("arch", default) if isinstance(model, dict) else default
    if isinstance(arch, str) and arch in archs:
        return arch, []
    raw["model_hyperparams"] = {}  # without its arch no other key of it can be judged
    allowed = f"must be one of {', '.join(map(show, archs))}{nearest(str(arch), archs)}"
    return default, [f"model_hyperparams.arch = {show(arch)}: {allowed}"]


# ---- help ------------------------------------------------------------------------------------------------------------


def help_text(cls: type, arch: str, archs: dict[str, type]) -> str:
    """What `train.py --help` prints: every key with its default, what is allowed, and its meaning."""
    lines = [
        f"usage: python {Path(sys.argv[0]).name} [--check] [--quiet] [--config FILE] [--key=value …]",
        "",
        "--check says in seconds whether the run would work, and writes nothing.",
        "--quiet prints nothing but warnings and errors.",
        "FILE is JSON, comments and trailing commas welcome; it is looked for here, then in config/.",
        "Any key can be given on the command line too: --learning_rate=1e-3 --model_hyperparams.n_layer=4",
    ]
    for prefix, doc, keys in sections(cls):
        title = f"{prefix.rstrip('.')} ({doc})" if prefix else "the run"
        lines += ["", title + (f", for arch {arch}" if prefix == "model_hyperparams." else "")]
        for name, key in keys.items():
            lines.append(f"  --{prefix}{name}={key.default if isinstance(key.default, str) else show(key.default)}")
            lines += textwrap.indent(textwrap.fill(f"{key.doc} [{key.allowed}]", 92), " " * 8).splitlines()
    lines += ["", f"The keys of another model: --help --model_hyperparams.arch=NAME, one of {', '.join(archs)}"]
    return "\n".join(lines)

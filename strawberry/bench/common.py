"""What the commands of bench.py share: numbers as users write them, configs with changed keys, tables, pictures."""

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import CONFIGS, ValueEmbedding, build
from strawberry.common import UserError, atomic_write
from strawberry.config import declared, to_dict
from strawberry.outputs import Input, Output, check_outputs
from strawberry.run_config import OptimizerHyperparams, Run, find_config, load_run
from strawberry.training import plot, setup

ROOT = Path(os.path.abspath(__file__)).parents[2]
SCRIPT = str(ROOT / "bench.py")

# Keys of which all configs get the first one's values: data, batch size and evaluation.
SHARED_KEYS = ("dataset.path", "dataset.load_from_file", "dataset.data_division", "encoder_path",
               "model_hyperparams.vocab_size", "model_hyperparams.block_size", "batch_size",
               "gradient_accumulation_steps", "eval_iters", "grad_clip", "dtype", "compile")  # fmt: skip

# Keys that compare sets itself, and the option for each.
MANAGED_KEYS = {
    "max_iters": "--tokens", "lr_decay_iters": "--tokens", "warmup_iters": "--warmup", "cooldown_frac": "--cooldown",
    "learning_rate": "--lrs", "min_lr": "--lrs", "seed": "--seeds", "device": "--device", "model_path": "--out",
    "img_path": "--out", "checkpoints.path": "--out",
}  # fmt: skip

# Keys that have the same value in each run of compare.
FIXED_VALUES = {
    "decay_lr": True, "init_from": "scratch", "objective": "next", "sample_length": 0, "sample_prompt": "",
}  # fmt: skip

GPT2_KEYS = {"norm_type": "LayerNorm", "attention_type": "MHA", "ffn_type": "GELU", "pos_encoding": "Learned"}
GPT2_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 1024}  # GPT-2, 124M


def parse_quantity(text: str) -> int:
    """A positive whole number, with or without a suffix k, M, B or G. Raises UserError for other text.

    >>> parse_quantity("5M"), parse_quantity("1.5B"), parse_quantity("100k"), parse_quantity("2e6")
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


MAX_COUNT = 10_000


def parse_count(text: str) -> int:
    """The number of runs, processes or clients that an option asks for."""
    if (count := parse_quantity(text)) > MAX_COUNT:
        raise UserError(f"{text!r} is more than {MAX_COUNT:,}; give fewer")
    return count


def parse_quantities(option: str, text: str, limit: int = 2**63) -> tuple[int, ...]:
    """Whole numbers between commas, ascending. Raises UserError for others and for those above the limit."""
    try:
        found = sorted({parse_quantity(part.strip()) for part in text.split(",")})
    except UserError as error:
        raise UserError(f"{option} {text}: {error}") from error
    if found[-1] > limit:
        raise UserError(f"{option} {text}: at most {limit:,}; give fewer")
    return tuple(found)


def format_quantity(number: float) -> str:
    """Three digits and a letter: 4_012_345 → 4.01M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def parse_learning_rates(text: str, option: str = "--lrs") -> list[float]:
    """Learning rates between commas, ascending. Raises UserError, naming the option."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < lr < math.inf for lr in found):
        raise UserError(f"{option} {text}: must be numbers above 0 between commas, like 1e-3,3e-3")
    return found


def split_list(text: str) -> list[str]:
    """The parts between commas; commas inside brackets or quotes do not divide.

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


def split_spec(spec: str) -> tuple[str, list[str]]:
    """(file, changes) of a config's `file.json:key=value,key=value`. Any other text is a file without changes.

    >>> split_spec("air.json:r_layer=0,window=64"), split_spec("bin/air.strawberry")
    (('air.json', ['r_layer=0', 'window=64']), ('bin/air.strawberry', []))
    """
    match = re.fullmatch(r"(.+?\.json5?)(?::(.*))?", spec, re.DOTALL)
    return (match[1], split_list(match[2]) if match[2] else []) if match else (spec, [])


def qualify_key(key: str) -> str:
    """The dotted name of a key: those of the model and of the optimizer may be given without their section.

    >>> qualify_key("r_layer"), qualify_key("use_muon"), qualify_key("batch_size")
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
    """`r_layer=0` → ("model_hyperparams.r_layer", "0"). Raises UserError for a key that compare sets itself."""
    key, equals, value = text.partition("=")
    name = qualify_key(key.strip().removeprefix("--"))
    if not equals or not name:
        raise UserError(f"{text!r} is no override; write key=value")
    if name in MANAGED_KEYS:
        raise UserError(f"{text!r}: compare sets {name} for all configs; use {MANAGED_KEYS[name]}")
    if name in FIXED_VALUES or name in ("eval_interval", "log_interval") or name.startswith("checkpoints."):
        raise UserError(f"{text!r}: compare sets {name} itself; leave it out")
    return name, value.strip()


def list_results(name: str, out: Path, table: Path | None = None) -> list[Output]:
    """The files that a command writes into the directory --out. `table`: the path of --json, instead of name.json."""
    json_file = Output("--out", out / f"{name}.json", "benchmark") if table is None else list_json_output(table)[0]
    return [json_file, Output("--out", out / f"{name}.md", "report"), Output("--out", out / f"{name}.png", "picture")]


def check_results(name: str, out: Path, argv: list[str], inputs: Iterable[Input], table: Path | None = None) -> None:
    """check_outputs for list_results. Also raises UserError if argv does not name --out, and the results in its default
    directory are those of another command."""
    outputs = list_results(name, out, table)
    check_outputs(outputs, inputs)
    report = outputs[1].path
    if any(word.partition("=")[0] == "--out" for word in argv) or not os.path.exists(report):
        return
    lines = Path(report).read_text("utf-8", "replace").rstrip().removesuffix("```").rstrip().splitlines()
    if lines and lines[-1] != format_command("python", name, argv):
        raise UserError(f"--out: {report}, in the default directory, has the results of another command: {lines[-1]}; "
                        f"name a new directory, or replace them with --out {out}")  # fmt: skip


def list_json_output(path: Path | None) -> list[Output]:
    """The file of --json; none without that option."""
    return [] if path is None else [Output("--json", path, "benchmark")]


def list_spec_inputs(option: str, specs: Iterable[str], runs: Iterable[Run] = ()) -> list[Input]:
    """The files that a command reads: the configs and models that an option names, and what the runs train on."""
    inputs = []
    for file, _ in map(split_spec, specs):
        inputs.append(Input(option, find_config(file) if file.endswith((".json", ".json5")) else file))
    return inputs + [given for run in runs for given in setup.list_inputs(run)]


def format_command(python: str, command: str, argv: list[str]) -> str:
    words = [python, setup.relative_path(SCRIPT), command, *argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


@dataclass
class Entry:
    """A row of the table: a config file, the changes to it, and the size of its model."""

    label: str
    file: str
    overrides: list[tuple[str, str]]  # its own, which win over --set
    run: Run | None = None
    changes: list[str] = field(default_factory=list)  # `key old → new` of each key of SHARED_KEYS that was changed
    params: int = 0  # without embeddings
    params_total: int = 0
    params_tables: int = 0  # of tables by token that are added to values; embeddings, so not in `params`
    flops: float = 0.0  # of a training step, per token
    causal: bool = True
    failure: str | None = None  # the reason why a run or a measurement failed

    def load(self, common: list[tuple[str, str]]) -> None:
        """Read the config with `common` overrides under its own. Raises UserError, naming the config."""
        words = [f"--{key}={value}" for key, value in (*common, *self.overrides)]
        try:
            self.run = load_run(["--config", self.file, *words], CONFIGS)
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from error

    def measure(self) -> None:
        """Set the sizes, the FLOPs and `causal`. Raises UserError if the model does not predict the next token."""
        with torch.device("meta"):  # shapes without memory
            model = build(self.run.model_hyperparams)
        if model.takes_source or not model.generates:
            raise UserError(
                f"{self.label}: kind = {model.config.kind!r} predicts something else than the next token; "
                "only models that do can be compared: try :kind=decoder"
            )
        self.params, self.params_total = model.num_params(), model.num_params(non_embedding=False)
        self.params_tables = sum(m.table.numel() for m in model.modules() if isinstance(m, ValueEmbedding))
        self.flops, self.causal = model.flops_per_token(model.config.block_size), model.causal


def read_specs(specs: list[str], shared: Collection[str] = SHARED_KEYS) -> list[Entry]:
    """`file.json:key=value,key=value` for each entry. Raises UserError where one of several sets a key of `shared`."""
    entries = []
    for spec in specs:
        file, texts = split_spec(spec)
        label = " ".join([Path(file).stem, *(text.removeprefix("model_hyperparams.") for text in texts)])
        overrides = [parse_override(text) for text in texts]
        if (twice := next((key for key, _ in overrides if key in shared), None)) and len(specs) > 1:
            raise UserError(f"{spec}: {twice} must be the same for all; use --set {twice}=…")
        entries.append(Entry(label, file, overrides))
    for label in {entry.label for entry in entries}:
        same = [entry for entry in entries if entry.label == label]
        for entry in same if len(same) > 1 else ():
            entry.label = f"{Path(entry.file).parent.name}/{label}"
        refuse_repeats(entry.label for entry in same)
    return entries


def get_value(run: Run, dotted: str):
    for name in dotted.split("."):
        run = getattr(run, name)
    return run


def load_entries(specs: list[str], common: list[tuple[str, str]]) -> list[Entry]:
    """The entries of --configs, all with the first one's values of SHARED_KEYS."""
    entries = read_specs(specs)
    first = entries[0]
    first.load(common)
    shared = {key: get_value(first.run, key) for key in SHARED_KEYS}
    alike = [*common, *((key, json.dumps(value)) for key, value in shared.items())]
    for entry in entries:
        entry.load(common)
        differ = [key for key in SHARED_KEYS if get_value(entry.run, key) != shared[key]]
        entry.changes += [f"{key} {get_value(entry.run, key)} → {shared[key]}" for key in differ]
        entry.load(alike if differ else common)
        entry.measure()
    return entries


def refuse_repeats(labels: Iterable[str]) -> None:
    """Raises UserError for a config or model that is given twice."""
    labels = list(labels)
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"{twice[0]} is given twice; give each once, under names that differ")


def parse_assignment(text: str) -> tuple[str, str]:
    """(dotted key, value) of `key=value`. Raises UserError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r}: write key=value")
    return qualify_key(key.strip()), value.strip()


def load_spec(spec: str, common: list[tuple[str, str]], last: bool = False, defaults: Sequence = ()) -> Run:
    """The run of `file.json:key=value,key=value`. In order of precedence, lowest first: the file, `defaults`, `common`
    and the spec's own keys; with `last`, `common` replaces the spec's own keys. As in load_run, sizes of the file that
    another key makes impossible get their defaults."""
    file, changes = split_spec(spec)
    own = [parse_assignment(text) for text in changes]
    words = [*defaults, *(own + common if last else common + own)]
    return load_run(["--config", file, *(f"--{key}={value}" for key, value in words)], CONFIGS)


def write_benchmark_config(folder: Path, run: Run, **changes) -> str:
    """Write the config of a run that starts from scratch and saves no checkpoint, with all outputs in the folder.
    Returns its path."""
    config = to_dict(run) | {"init_from": "scratch"} | {
        "checkpoints": {"path": str(folder / "ck"), "create_checkpoints": False},
        "model_path": str(folder / "model"), "img_path": str(folder)}  # fmt: skip
    folder.mkdir(exist_ok=True)
    atomic_write(folder / "config.json", json.dumps(config | changes).encode())
    return str(folder / "config.json")


def format_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


def make_line_style(number: int) -> dict:
    """Colour, dashes and marker of the line of that number, different for three times as many lines as colours."""
    colour = plot.COLOURS[number % len(plot.COLOURS)]
    return {"color": colour, "linestyle": DASHES[number // len(plot.COLOURS) % len(DASHES)], "linewidth": 1.5,
            "marker": plot.MARKERS[number % len(plot.MARKERS)], "markersize": 5,
            "markerfacecolor": colour if number < len(plot.COLOURS) else "white"}  # fmt: skip


def style_panel(ax, xlabel: str) -> None:
    """Label and style a panel whose lines are drawn already, with x on a log scale."""
    style_axes(ax, xlabel)
    set_log_scale(ax)


def style_axes(ax, xlabel: str) -> None:
    ax.set_xlabel(xlabel, fontsize=11)
    ax.tick_params(labelsize=9.5, color="0.5", which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.5")
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)


def set_log_scale(ax) -> None:
    """Set x to a log scale, with ticks for the lines that are drawn already."""
    ax.set_xscale("log")
    set_log_ticks(ax.xaxis, [x for line in ax.lines for x in line.get_xdata() if x > 0])


def set_log_ticks(axis, values: list[float]) -> None:
    """Ticks at 1, 2 and 5 of each decade, in short numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = math.log10(max(values) / min(values)) if values else 1
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=12))
    big = bool(values) and max(values) >= 1e10
    axis.set_major_formatter(FuncFormatter(format_power if big else plot.short_number))
    axis.set_minor_formatter(NullFormatter())


def format_power(value: float, position=None) -> str:
    """2e14 → 2·10¹⁴, in mathtext."""
    exponent = math.floor(math.log10(value) + 1e-9)
    front = round(value / 10**exponent)
    return f"$10^{{{exponent}}}$" if front == 1 else f"${front}{{\\cdot}}10^{{{exponent}}}$"

"""Configuration: every key of the JSON files, declared once.

A config is a dataclass whose fields are made with `option(default, doc, bounds …)`. Type (the annotation), default,
bounds and meaning stand there and nowhere else; validation, `train.py --help`, the README's table and
config/schema.json are all made from them.

Index:  shared helpers · declaring · reading JSON · checking · the run's keys · loading · help, table and schema
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import json
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# ---- shared helpers ------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can mend: the message names the value, the limit and the mend."""


def run_cli(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` as a program and exit: 2 with `error: …` on a UserError, 130 on Ctrl-C, else what it returns."""
    for stream in (sys.stdout, sys.stderr):
        set_encoding(stream)
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        with contextlib.suppress(OSError):  # a log on a full disk
            report_error(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader (`| head`) left: point stdout elsewhere, or the exit's flush complains again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def temporary_path(target: Path) -> Path:
    """Where a file is written before it gets its name."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def set_encoding(stream: Any) -> None:
    """UTF-8 for what goes to a file or a pipe, whatever the locale or PYTHONIOENCODING says. A terminal keeps its own
    encoding, and shows "?" for a character that it lacks."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")


def report_error(message: str) -> None:
    """Print `error: message` on stderr. Of several processes of torchrun that find the same error, one prints it."""
    if is_first_to_report(message):
        print(f"error: {message}", file=sys.stderr)


def is_first_to_report(message: str) -> bool:
    """Whether no other process that this machine's torchrun has started has reported the message before this one.

    Every rank finds the same mistake in a config, but a full GPU may be an error of one rank alone, and torchrun ends
    all ranks when the first one fails. So the first one to find an error reports it, and torchrun's own store counts.
    """
    env = os.environ
    if env.get("WORLD_SIZE", "1") == "1" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        from torch.distributed import TCPStore

        limit = datetime.timedelta(seconds=5)
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), wait_for_workers=False, timeout=limit)
        launch = f"{env.get('GROUP_RANK')}/{env.get('TORCHELASTIC_RESTART_COUNT')}"
        digest = hashlib.sha256(message.encode("utf-8", "backslashreplace")).hexdigest()
        return store.add(f"strawberry/error/{launch}/{digest}", 1) == 1
    except Exception:  # without the store, an error printed twice is better than one that nobody sees
        return True


def atomic_write(path: str | os.PathLike, data: bytes | Callable) -> None:
    """Replace the file at `path` with `data`, or with what `data(file)` writes, wholly or not at all, through power
    cuts too. Makes missing folders.

    Raises UserError, naming the path, where it cannot be written.
    """
    target = Path(os.path.realpath(path))  # through a symbolic link, which stays one
    temporary = temporary_path(target)
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write {path}: it is there and is not a regular file; name another path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            data(file) if callable(data) else file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        if os.name != "nt":  # the rename itself is on disk once the folder is
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def nearest(name: str, valid: Iterable[str]) -> str:
    """The hint for a misspelt name, or nothing.

    >>> nearest("n_layers", ["n_layer", "n_head"])
    " (did you mean 'n_layer'?)"
    """
    by_lower = {str(v).lower(): str(v) for v in valid}
    close = difflib.get_close_matches(str(name).lower()[:200], by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
NO_PATH = "a path has no control characters, which \\n and \\t in quotes are; write / or \\\\ instead of \\"


def has_control_character(path: str) -> bool:
    r"""Whether a path has a character that none has on purpose; "C:\table" in JSON has one, for \t is a tab."""
    return CONTROL.search(path) is not None


def check_path_arguments(given: Any, *names: str) -> None:
    """Raises UserError where an option of an argparse namespace, or one of its texts, cannot be a path."""
    for name in names:
        value = getattr(given, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and has_control_character(text):
                raise UserError(f"--{name} {show(text)}: {NO_PATH}")


# ---- declaring -----------------------------------------------------------------------------------------------------


def option(default: Any, doc: str, *, low=None, high=None, above=None, below=None, choices=None, path=False) -> Any:
    """A dataclass field with its meaning and bounds: low and high inclusive, above and below exclusive.

    On a list the bounds hold for each item; a list, dict or dataclass given as default is copied for each instance.
    `choices` are the valid strings (other types in the annotation are bounded as usual: `int | str`, choices ["auto"]).
    `path`: its text names a file or a directory, which no one but the machine's owner may choose.
    """
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "below": below, "choices": choices, "path": path}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: dataclasses.replace(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """What a config class declares about one key; `kinds` are the members of its annotation, `int | None` has two."""

    kinds: tuple
    default: Any
    doc: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    path: bool = False

    @property
    def section(self) -> type | None:
        """The dataclass of a nested object, else None."""
        return next((kind for kind in self.kinds if dataclasses.is_dataclass(kind)), None)

    @property
    def allowed(self) -> str:
        """What may stand there, in words: `integer >= 1 or null`."""
        words = {type(None): "null", bool: "true or false", int: "integer", float: "number", str: "text"}
        signs = {">=": self.low, ">": self.above, "<=": self.high, "<": self.below}
        bounds = " and ".join(f"{sign} {limit}" for sign, limit in signs.items() if limit is not None)
        parts = []
        for kind in self.kinds:
            item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind
            word = "{ section }" if dataclasses.is_dataclass(kind) else words.get(item, "anything")
            if item is str and self.choices:
                word = " or ".join(map(show, self.choices))
            if item in (int, float) and bounds:
                word += f" {bounds}"
            parts.append(word if item is kind else f"list of {word}")
        return " or ".join(parts) or "anything"


@functools.cache
def declared(cls: type) -> dict[str, Option]:
    """Every key of a config class, in order."""
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint, meta = hints[field.name], dict(field.metadata)
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else () if hint is Any else (hint,)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        meta["choices"] = tuple(meta.get("choices") or ())
        found[field.name] = Option(kinds, default, **meta)
    return found


def dotted_names(cls: type, prefix: str = "") -> list[str]:
    """The dotted names of every key, sections included: `dataset`, `dataset.path`, …"""
    names = []
    for name, key in declared(cls).items():
        names.append(prefix + name)
        names += dotted_names(key.section, f"{prefix}{name}.") if key.section else []
    return names


def path_names(cls: type, prefix: str = "") -> list[str]:
    """The dotted names of the keys that name files or directories."""
    names = []
    for name, key in declared(cls).items():
        names += [prefix + name] if key.path else path_names(key.section, f"{prefix}{name}.") if key.section else []
    return names


def to_dict(config: Any) -> dict:
    """The config as plain JSON-able data; `check(type(config), to_dict(config))` gives it back."""
    return dataclasses.asdict(config)


# ---- reading JSON --------------------------------------------------------------------------------------------------

MAX_CONFIG_BYTES = 65_536


class _Object(dict):
    """A JSON object that remembers the values of names that it was given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        values: dict[str, list] = {}
        for name, value in pairs:
            values.setdefault(name, []).append(value)
        self.repeated = {name: given for name, given in values.items() if len(given) > 1}


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file that may have `//` and `/* */` comments and trailing commas.

    Raises UserError with the line where it is no JSON, and with every key that is given twice in one object.
    """
    raw = _parse(path)
    if problems := _repeated(raw):
        raise UserError(_message(problems, f"{path}: "))
    return raw


def _parse(path: str | os.PathLike) -> dict:
    import json5  # only reading configs needs it: a loaded model brings its config as plain data

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, so it is no config; name a JSON file")
        text = data.decode("utf-8")
        if found := _find_bad_escape(text):
            raise UserError(f"{path}, line {found[0]}: {found[1]}")
        raw = json5.loads(text, object_pairs_hook=_Object)
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeError) else error.strerror or error
        raise UserError(f"cannot read {path}: {reason}; name a JSON file") from error
    except RecursionError as error:
        raise UserError(f"{path}: brackets are nested too deeply; a config has two levels") from error
    except ValueError as error:  # "<string>:3 Unexpected "x" at column 7"
        line, _, what = str(error).removeprefix("<string>:").partition(" ")
        where = f"{path}, line {line}: {what}" if line.isdigit() else f"{path}: {error}"
        raise UserError(f"{' '.join(where.split())}; mend the JSON there") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {show(raw)}, but a config is an object, {{ … }}")
    return raw


_COMMENT_OR_STRING = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""", re.DOTALL)
_ESCAPE = re.compile(r"""\\(?:["'\\/bfnrtv0\n\r]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|(?P<bad>.))""", re.DOTALL)


def _find_bad_escape(text: str) -> tuple[int, str] | None:
    r"""(line, message) of the first backslash in a string of JSON5 that escapes nothing and that JSON5 would drop, as
    "C:\data" has; None where there is none."""
    for token in _COMMENT_OR_STRING.finditer(text):
        for escape in _ESCAPE.finditer(token[0]) if token[0][0] in "\"'" else ():
            if escape["bad"]:
                line = text.count("\n", 0, token.start() + escape.start()) + 1
                return line, f"\\{escape['bad']} is no escape; write / or \\\\ instead of \\"
    return None


def _repeated(raw: Any, prefix: str = "") -> list[str]:
    problems = []
    for name, given in getattr(raw, "repeated", {}).items():
        problems.append(f"{prefix}{name} = {', '.join(map(show, given))}: given {len(given)} times; keep one")
    for name, value in raw.items() if isinstance(raw, dict) else ():
        problems += _repeated(value, f"{prefix}{name}.")
    return problems


def show(value: Any) -> str:
    """A value as JSON spells it, short enough for a message, in characters that every stream can carry."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    text = CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # those that JSON does not escape
    return text if len(text) <= 80 else text[:77] + "…"


def _message(problems: list[str], source: str = "") -> str:
    if len(problems) == 1:
        return source + problems[0]
    return f"{source}{len(problems)} problems:\n" + "\n".join(f"  {line}" for line in problems)


# ---- checking ------------------------------------------------------------------------------------------------------

_WRONG = object()


def check(cls: type, raw: Any, prefix: str = "") -> tuple[Any, list[str]]:
    """A config object made of plain data: (instance, []) or (None, every problem).

    A problem names the key by its dotted name (`prefix` and a dot go before it), the value, and what is allowed.
    A class may define `problems(self)`, an iterator of (key, message), for rules between its keys.

    >>> check(Dataset, {"data_division": 2, "pth": "x"})
    (None, ["data_division = 2: must be number > 0 and < 1", "pth = \\"x\\": unknown key (did you mean 'path'?)"])
    """
    return _check(cls, raw, f"{prefix.rstrip('.')}." if prefix else "", dotted_names(cls))


def _check(cls: type, raw: Any, prefix: str, names: list[str]) -> tuple[Any, list[str]]:
    if not isinstance(raw, dict):
        return None, [f"{prefix.rstrip('.') or 'the config'} = {show(raw)}: must be an object, {{ … }}"]
    known, values, wrong, problems = declared(cls), {}, set(), []
    for name, value in raw.items():
        label = f"{prefix}{name} = {show(value)}"
        if name not in known:
            hint = _hint(str(name), list(known), names) if len(problems) < 20 else ""  # which takes a while
            problems.append(f"{label}: unknown key{hint}")
            continue
        key = known[name]
        if key.section and not (value is None and type(None) in key.kinds):
            values[name], found = _check(key.section, value, f"{prefix}{name}.", names)
        else:
            values[name] = next((fit for kind in key.kinds if (fit := _fit(value, kind, key)) is not _WRONG), _WRONG)
            values[name] = value if not key.kinds else values[name]
            found = [f"{label}: {_explain(value, key)}"] if values[name] is _WRONG else []
        problems += found
        wrong |= {name} if found else set()
    config = cls(**{name: value for name, value in values.items() if name not in wrong})
    for name, message in config.problems() if hasattr(config, "problems") else ():
        # a rule that mentions a key that is wrong in itself has judged its default: say nothing yet
        if not wrong & set(re.findall(r"\w+", f"{name} {message}")):
            value = functools.reduce(getattr, name.split("."), config)
            problems.append(f"{prefix}{name} = {show(value)}: {message}")
    return (None, problems) if problems else (config, [])


def _fit(value: Any, kind: Any, key: Option) -> Any:
    """The value as `kind`, or _WRONG. An integer passes as a float and 2e3 as an integer; a bool is neither."""
    if kind in (bool, type(None)):
        return value if isinstance(value, kind) else _WRONG
    if kind is str:
        return value if isinstance(value, str) and _good_text(value, key) else _WRONG
    if typing.get_origin(kind) is list:
        items = [_fit(item, typing.get_args(kind)[0], key) for item in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if any(item is _WRONG for item in items) else items
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _WRONG
    try:
        number = kind(value)
        if not math.isfinite(number) or (kind is int and (number != value or abs(number) >= 2**63)):
            return _WRONG
    except (OverflowError, ValueError):  # NaN, Infinity, or too large for a float
        return _WRONG
    low, high = -math.inf if key.low is None else key.low, math.inf if key.high is None else key.high
    above, below = -math.inf if key.above is None else key.above, math.inf if key.below is None else key.below
    return number if low <= number <= high and above < number < below else _WRONG


def _good_text(value: str, key: Option) -> bool:
    if key.choices:
        return value in key.choices
    try:
        os.fsencode(value)  # half a surrogate pair is neither text nor a path
    except UnicodeEncodeError:
        return False
    if key.path and has_control_character(value):
        return False
    return "\0" not in value and (value != "" or key.default == "")  # empty only where that is the default


def _explain(value: Any, key: Option) -> str:
    """Why a value is refused."""
    items = value if isinstance(value, list) else [value]
    if key.path and any(isinstance(item, str) and has_control_character(item) for item in items):
        return NO_PATH
    return f"must be {_must_be(value, key)}"


def _must_be(value: Any, key: Option) -> str:
    if isinstance(value, (int, float)) and not abs(value) < 2**63:  # NaN and Infinity too
        return f"{key.allowed}, finite" + (" and < 2**63" if int in key.kinds else "")
    return key.allowed + (nearest(value, key.choices) if isinstance(value, str) else "")


def _hint(name: str, siblings: list[str], names: list[str]) -> str:
    """Where an unknown key may belong: the same name in another section, one spelt alike here or there, or the list."""
    moved = [dotted for dotted in names if dotted.rpartition(".")[2] == name.rpartition(".")[2]]
    if moved:
        return f" (did you mean {moved[0]!r}?)"
    places = {dotted.rpartition(".")[2]: dotted for dotted in reversed(names)} | {key: key for key in siblings}
    close = difflib.get_close_matches(name.lower()[:200], places, n=1, cutoff=0.6)
    return f" (did you mean {places[close[0]]!r}?)" if close else f"; valid here: {', '.join(siblings)}"


# ---- the run's keys ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Dataset:
    data_division: float = option(0.8, "share of the tokens that trains; the rest validates", above=0, below=1)
    load_from_file: bool = option(True, "true: path is a token file; false: a directory, each token file in it is read")
    path: str = option("data/webtext.bin", "token file or directory, made by prepare.py", path=True)


@dataclasses.dataclass
class Checkpoints:
    path: str = option("bin/ck", "directory of the checkpoints, one directory a step", path=True)
    interval: int = option(2000, "steps between checkpoints", low=1)
    create_checkpoints: bool = option(True, "false: none are written, and the run cannot be resumed")
    keep: int = option(3, "newest checkpoints kept, besides the best by validation loss", low=1)


@dataclasses.dataclass
class OptimizerHyperparams:
    eps: float = option(1e-10, "AdamW's epsilon", above=0)
    beta1: float = option(0.9, "AdamW's decay of the mean of gradients", low=0, below=1)
    beta2: float = option(0.95, "AdamW's decay of the mean of squared gradients", low=0, below=1)
    weight_decay: float = option(0.1, "decoupled weight decay, on embeddings and hidden matrices only", low=0)
    use_muon: bool = option(False, "true: Muon for hidden matrices, AdamW for the rest; false: AdamW for all")
    momentum: float = option(0.95, "Muon's momentum, reached from 0.85 by warmup", low=0, below=1)
    muon_lr: float | None = option(None, "Muon's learning rate; null: learning_rate", above=0)


@dataclasses.dataclass
class Run:
    """Everything that train.py is told. `run_class` gives model_hyperparams the class of its arch."""

    dataset: Dataset = option(Dataset(), "what is learned from")
    checkpoints: Checkpoints = option(Checkpoints(), "what a run that stopped goes on from")
    model_hyperparams: Any = option(None, "the model; its key arch picks the family, which has its own keys")
    optimizer_hyperparams: OptimizerHyperparams = option(OptimizerHyperparams(), "AdamW and Muon")
    model_path: str = option(
        "bin/air.strawberry", "the trained model: one file, with its config and its encoder", path=True
    )
    encoder_path: str = option("bin/cl8k.bin", "encoder file, or tiktoken:<name>, or chars:<text file>", path=True)
    init_from: str = option(
        "scratch", 'scratch; "<path>,pretrained": start from the weights of that model file or checkpoint directory; '
        "resume: newest good checkpoint", path=True,
    )
    objective: str = option(
        "auto",
        "what is learned: the next token, spans that the source lacks, the target of a pair, or masked tokens; auto: "
        "next, but for an encoder masked, for an encoder-decoder pairs or spans, by what dataset.path holds",
        choices=["auto", "next", "spans", "pairs", "masked"],
    )
    seed: int | str = option("auto", "auto: drawn, then recorded", low=0, choices=["auto"])
    gradient_accumulation_steps: int = option(1, "batches summed into one optimizer step", low=1, high=2**20)
    batch_size: int | str = option(
        4, "rows of block_size tokens in a batch; auto: as many as the GPU has memory for, on a CPU up to 4096 tokens",
        low=1, high=2**20, choices=["auto"],
    )
    parallel: str = option(
        "ddp", "what several processes under torchrun divide, apart from batches; ddp: nothing, each has the whole "
        "model; fsdp: weights, gradients and optimizer state, for models that do not fit, at the price of computing "
        "activations twice", choices=["ddp", "fsdp"],
    )
    max_iters: int = option(50000, "optimizer steps in all", low=1)
    eval_interval: int = option(2000, "steps between evaluations, each with a sample of text", low=1)
    log_interval: int = option(200, "steps between logged lines", low=1)
    eval_iters: int = option(200, "batches of each split in an evaluation", low=1)
    decay_lr: bool = option(True, "false: the learning rate is constant after warmup")
    lr_decay_iters: int | None = option(None, "step at which min_lr is reached; null: max_iters", low=1)
    learning_rate: float = option(3e-3, "highest learning rate", above=0)
    cooldown_frac: float = option(
        0.4, "share of lr_decay_iters spent falling, by cosine; 1: the classic warmup-cosine", low=0, high=1
    )
    warmup_iters: int = option(2000, "steps of linear warmup", low=0)
    min_lr: float = option(3e-4, "learning rate at the end and after", low=0)
    grad_clip: float = option(1.0, "largest norm of all gradients together; 0: no clipping", low=0)
    on_nan: str = option(
        "stop", "what follows a loss or gradient that is not finite; stop: the end, with code 3; rollback: back to the "
        "last checkpoint, past the data since then, at half the learning rate, at most 3 times",
        choices=["stop", "rollback"],
    )
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto", "activations; auto: bfloat16 on cuda, float32 elsewhere; float8: bfloat16, and training's large matrix "
        "products in 8 bits", choices=["auto", "float32", "bfloat16", "float8"]
    )
    compile: bool | str = option(
        "auto", "torch.compile; blocks: each block by itself; auto: on cuda, and on cpu from max_iters 5000 on where a "
        "C++ compiler is there, since compiling takes minutes there; where it fails, training goes on without",
        choices=["auto", "blocks"],
    )
    record: bool | str = option(
        "auto", "a step as one CUDA graph, launched at once; auto: on GPUs; where it cannot be, training goes on "
        "without", choices=["auto"]
    )
    img_path: str | None = option(
        "img", "directory of the curves, or a file for all of them, ending in .png, .svg or .pdf; null: none", path=True
    )
    sample_length: int = option(200, "tokens of the sample at each evaluation; 0: no sample", low=0, high=2**20)
    sample_prompt: str = option(
        "", "text that the sample continues, or an encoder-decoder's source; empty: a document's start, or a source of "
        "the validation split"
    )

    def __post_init__(self):
        if self.lr_decay_iters is None:
            self.lr_decay_iters = self.max_iters

    @property
    def pretrained(self) -> str | None:
        """The model file that init_from names, `"<path>,pretrained"` in either order; else None."""
        before, after = self.init_from.removesuffix(",pretrained"), self.init_from.removeprefix("pretrained,")
        return next((path.strip() for path in (before, after) if path != self.init_from), None)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.init_from not in ("scratch", "resume") and not self.pretrained:
            hint = nearest(self.init_from, ["scratch", "resume"])
            yield "init_from", f'must be "scratch", "resume" or "<path>,pretrained"{hint}'
        if self.decay_lr and self.min_lr > self.learning_rate:
            yield "min_lr", f"must be <= learning_rate ({self.learning_rate:g}), since decay_lr is true"
        if self.on_nan == "rollback" and not self.checkpoints.create_checkpoints:
            yield "on_nan", "needs checkpoints.create_checkpoints: there is nothing else to return to"
        taken = {"encoder_path": self.encoder_path, "dataset.path": self.dataset.path}
        for key, path in {**taken, "checkpoints.path": self.checkpoints.path}.items():
            if os.path.normpath(self.model_path) == os.path.normpath(path):
                yield "model_path", f"is {key} too, which the trained model would replace; name another file"
        if self.img_path and (problem := explain_picture_path(self.img_path)):
            yield "img_path", problem

    def warnings(self) -> Iterator[str]:
        """What is allowed and hardly intended: a schedule that does not fit max_iters. Each names keys and values that
        would do."""
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
    model = option(archs[arch](), declared(Run)["model_hyperparams"].doc)
    return dataclasses.make_dataclass("Run", [("model_hyperparams", archs[arch], model)], bases=(Run,))


# ---- loading -------------------------------------------------------------------------------------------------------

DEFAULT_ARCH = "strawberry"
CONFIG_FOLDER = Path(__file__).resolve().parent / "config"


def load_run(argv: list[str], archs: dict[str, type]) -> Run:
    """The run that a command line describes: defaults, then the file of --config, then --key=value overrides.

    Every problem of file and command line is in one UserError. `--help` prints every key and exits.
    """
    names = set().union(*(dotted_names(run_class(archs, arch)) for arch in archs))
    config, overrides, problems = parse_arguments(argv, names)
    raw: dict[str, Any] = {}
    if config is not None:
        try:
            raw = _parse(find_config(config))
        except UserError as error:
            problems.append(str(error))
    raw.pop("$schema", None)  # for editors
    texts = set().union(*(_text_keys(run_class(archs, arch)) for arch in archs))
    problems += apply_overrides(raw, overrides, texts) + _repeated(raw)
    if asks_for_help(argv, names):
        arch, _ = take_arch(raw, archs)
        print(help_text(run_class(archs, arch), arch, archs))
        raise SystemExit(0)
    return make_run(raw, archs, problems, f"{config}: " if raw and not overrides else "")


def make_run(raw: dict, archs: dict[str, type], problems: Iterable[str] = (), source: str = "") -> Run:
    """The run that plain data describes. Raises UserError with every problem, those known before included."""
    arch, arch_problems = take_arch(raw, archs)
    run, found = check(run_class(archs, arch), raw)
    if problems := [*problems, *arch_problems, *found]:
        raise UserError(_message(problems, source))
    return run


def parse_arguments(argv: list[str], names: Iterable[str] = (), flags: Iterable[str] = ()) -> tuple:
    """(config file, overrides as (dotted name, text), problems) of `--name=value` and `--name value`.

    `names` are the options that there are, `flags` those of them that take no value. In `--name value` any word is a
    value, with dashes at its start too, unless it is one of the options.
    """
    config, overrides, problems = None, [], []
    for word, name, text in split_arguments(argv, names, flags):
        if name in HELP:
            continue
        if name is None:
            mend = f"--config {word}" if word.endswith(".json") else "--key=value"
            problems.append(f"{show(word)} on the command line: must be an option; write {mend}")
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
    raise UserError(
        f"--config {show(name)}: no such file here or in config/{nearest(Path(name).name, known)}; "
        f"config/ has {', '.join(known) or 'none'}"
    )


def apply_overrides(raw: dict, overrides: list[tuple[str, str]], text_keys: set[str]) -> list[str]:
    """Set each `a.b` of the command line in the nested data; returns the problems."""
    problems = []
    for dotted, text in overrides:
        *sections, name = dotted.split(".")
        target: Any = raw
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):
            try:
                target[name] = _value(text, dotted in text_keys)
            except UserError as error:
                problems.append(f"{dotted} = {text}: {error}")
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
        value = json5.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        return text
    if found := _find_bad_escape(text):
        raise UserError(found[1])
    return value


def _text_keys(cls: type, prefix: str = "") -> set[str]:
    names = set()
    for name, key in declared(cls).items():
        names |= _text_keys(key.section, f"{prefix}{name}.") if key.section else set()
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


# ---- help and schema ----------------------------------------------------------------------------------------------


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, str, dict[str, Option]]]:
    """(dotted name, doc, plain keys) of the config itself, then of each nested object."""
    yield prefix, "", {name: key for name, key in declared(cls).items() if not key.section}
    for name, key in declared(cls).items():
        if key.section:
            for dotted, doc, keys in sections(key.section, f"{prefix}{name}."):
                yield dotted, doc or key.doc, keys


def help_text(cls: type, arch: str, archs: dict[str, type]) -> str:
    """What `train.py --help` prints: every key with its default, what is allowed, and its meaning."""
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--check] [--quiet] [--config FILE] [--key=value …]",
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


def object_schema(cls: type) -> dict:
    """The JSON schema of a config class."""
    properties = {}
    for name, key in declared(cls).items():
        variants = [_kind_schema(kind, key) for kind in key.kinds]
        found = dict(variants[0]) if len(variants) == 1 else {"anyOf": variants} if variants else {}
        if not key.section:
            found["default"] = key.default
        properties[name] = {**found, "description": key.doc}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _kind_schema(kind: Any, key: Option) -> dict:
    if dataclasses.is_dataclass(kind):
        return object_schema(kind)
    if typing.get_origin(kind) is list:
        return {"type": "array", "items": _kind_schema(typing.get_args(kind)[0], key)}
    if kind is str:
        if key.choices:
            return {"enum": list(key.choices)}
        shape = {"pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$"} if key.path else {}
        return {"type": "string", "minLength": int(key.default != ""), **shape}
    if kind in (bool, type(None)):
        return {"type": "boolean" if kind is bool else "null"}
    bounds = {"minimum": key.low, "maximum": key.high, "exclusiveMinimum": key.above, "exclusiveMaximum": key.below}
    limits = {word: limit for word, limit in bounds.items() if limit is not None}
    return {"type": "integer" if kind is int else "number", **limits}

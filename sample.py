"""Text from a trained model, printed as it is made; or how well the model predicts a text of yours.

    python sample.py                                             the newest model in bin/; prompts are typed in
    python sample.py --prompt "The cat" --length 100 --stop "."
    python sample.py --model bin/air.strawberry --prompt_file start.txt --num_samples 3 --seed 7
    python sample.py --model bin/pairs.transformer --source "The larger of two numbers."     from an encoder-decoder
    python sample.py --prompts_file prompts.jsonl --out texts.jsonl      many texts at once; the same command goes on
    python sample.py --score book.txt                            loss and bits per byte

Text goes to stdout; what model, which seed and how fast goes to stderr. decode.py makes the tokens.

Index:  settings · what is read · the model · making text · samples and conversation · bulk: prompts · bulk: results ·
        score · the command
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import checkpoint
import decode
from checkpoint import load_model
from decode import Decoder, Request
from model import MODELS
from options import (
    UserError,
    asks_for_help,
    atomic_write,
    check,
    declared,
    nearest,
    option,
    parse_arguments,
    run_cli,
    show,
)
from strawberry.common import Input, Output, check_outputs
from strawberry.data import documents
from strawberry.data.documents import InputFile
from strawberry.data.objectives import decode_with_sentinels, encode_with_sentinels

# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    model: str | None = option(None, "model file or checkpoint directory; default: the newest model in bin/", path=True)
    prompt: Any = option(None, 'text to continue; "" starts a new text')
    source: Any = option(
        None, "what an encoder-decoder reads; a prompt then begins its answer. Where it learned spans, <|0|>, <|1|>, … "
        "stand for what is missing"
    )
    prompt_file: str | None = option(
        None, "file that holds the prompt; - is standard input, of which one final line end is dropped, as of a pipe",
        path=True,
    )
    length: int = option(256, "tokens to make at most", low=1, high=2**20)
    temperature: float = option(0.8, "0 takes the likeliest token each time; higher is more surprising", low=0)
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that make up this probability", above=0, high=1)
    min_p: float = option(0.0, "draw from tokens at least this many times as likely as the likeliest", low=0, high=1)
    seed: int | None = option(None, "sample n is drawn with seed + n, from n = 0; default: drawn and printed", low=0)
    num_samples: int = option(1, "samples of each prompt", low=1)
    stop: list[str] = option(
        [], "text that ends a sample and is not printed; may be given several times. In it \\n is a line end, \\t a "
        "tab, \\r a carriage return, \\\\ a backslash"
    )
    on_full: str = option(
        "stop", "where learned positions end: stop there, or slide: read the newer half of the text anew and go on",
        choices=["stop", "slide"],
    )
    prompts_file: str | None = option(
        None, 'JSON lines, or a .json list, of {"prompt": …}: many texts at once, into --out; beside the prompt may be '
        "source, id, max_tokens, temperature, top_k, top_p, min_p, seed, stop: its own, in place of the command's",
        path=True,
    )
    out: str | None = option(
        None, "file for a line of JSON of each finished text of --prompts_file; the same command goes on where it was",
        path=True,
    )
    batch: int | None = option(
        None, "texts made at once at most; default: 64 on cuda, 8 elsewhere. A --prompts_file on a CPU without --fast "
        "always takes 8", low=1, high=2**16
    )
    fast: bool = option(
        False, "with --prompts_file on a CPU: compute only the rows and the part of the cache that are in use, "
        "and as many rows as --batch says. A text may then differ with --batch, the other prompts and an interruption"
    )
    score: str | None = option(
        None, "file whose loss and bits per byte are printed, instead of samples; - is stdin", path=True
    )
    stride: int = option(0, "tokens that --score's window moves each time; 0: half the model's block_size", low=0)
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto", "of the weights; auto: bfloat16 on cuda, float32 elsewhere", choices=["auto", "float32", "bfloat16"]
    )
    quantize: str | None = option(None, "int8: matrices in 8 bits, half of bfloat16's bytes to read", choices=["int8"])
    compile: str = option(
        "auto", "torch.compile, which takes a minute first; auto: on cuda where many tokens are to be made",
        choices=["auto", "true", "false"],
    )


def read_settings(argv: list[str], cls: type = Settings) -> Any:
    """The settings of a command line, of the class `cls`; an option whose value is a list may be given several times.

    Raises UserError with all that is wrong with them, in one line.
    """
    known, raw = declared(cls), {}
    config, words, problems = parse_arguments(argv, known, flags_of(cls))
    words += [] if config is None else [("config", config)]  # train.py's; unknown here
    for name, text in words:
        repeats = name in known and list[str] in known[name].kinds
        if name not in known:
            problems.append(f"--{name}: unknown option{nearest(name, known) or '; --help lists them'}")
        elif name in raw and not repeats:
            problems.append(f"--{name}: given twice; keep one")
        elif text == "" and known[name].kinds:  # the others take any text
            problems.append(f"--{name}: is empty; give it a value or leave it out")
        elif repeats:
            raw.setdefault(name, []).append(text)
        else:
            raw[name] = value_of(text, known[name].kinds)
    problems += combinations(raw)
    if cls is Settings and "stop" in raw:
        raw["stop"] = [unescape(text, problems) for text in raw["stop"]]
    settings, found = check(cls, raw)
    if problems := problems + [f"--{problem.removesuffix(' or null')}" for problem in found]:
        raise UserError("; ".join(problems))
    return settings


def flags_of(cls: type) -> list[str]:
    """The options that take no value."""
    return [name for name, key in declared(cls).items() if key.kinds == (bool,)]


def value_of(text: str, kinds: tuple) -> Any:
    """The number or truth value that a text spells, where the option has one; else the text, which `check` judges."""
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    return number(text) if {int, float} & set(kinds) else text


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str, problems: list[str]) -> str:
    r"""The text that a --stop stands for; one backslash at its end is itself. Adds what is wrong to `problems`.

    >>> unescape(r"a\\n\n", [])
    'a\\n\n'
    """

    def character(match: re.Match) -> str:
        letter = match[1]
        if letter not in ESCAPES:
            problems.append(f"--stop {text}: \\{letter} is no escape; write \\\\{letter} for a backslash before "
                            f"{letter}; escapes are \\n, \\t, \\r and \\\\")  # fmt: skip
        return ESCAPES.get(letter, match[0])

    return re.sub(r"\\(.)", character, text, flags=re.DOTALL)


def combinations(raw: dict) -> Iterator[str]:
    """What is wrong with options that are given together."""
    texts = [f"--{name}" for name in ("prompt", "prompt_file", "prompts_file", "score") if name in raw]
    if len(texts) > 1:
        yield f"{' and '.join(texts)} exclude each other; keep one"
    if "prompts_file" in raw and "out" not in raw:
        yield "--prompts_file: needs a file for the texts; name one with --out"
    if "out" in raw and "prompts_file" not in raw:
        yield "--out: takes the texts of a --prompts_file; name one, or leave --out away"
    if "fast" in raw and "prompts_file" not in raw:
        yield "--fast: is about a --prompts_file; name one, or leave --fast away"
    if "prompts_file" in raw and "num_samples" in raw:
        yield "--num_samples: a --prompts_file has one text for each line; repeat a line for more of it"


def number(text: str) -> int | float | str:
    """The number that a text spells, else the text, which `check` then refuses."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def help_text(program: str = "sample.py", cls: type = Settings, end: str | None = None) -> str:
    """What --help prints: every option of the class with its meaning, what is allowed, and its default."""
    lines = [f"usage: python {program} [--option value …]", ""]
    for name, key in declared(cls).items():
        default = "" if key.default in (None, []) else f"; default {key.default}"
        any_text = not key.kinds or list[str] in key.kinds
        allowed = "text" if any_text else key.allowed.removesuffix(" or null")
        limits = "no value" if name in flags_of(cls) else f"{allowed}{default}"
        lines.append(f"  --{name:<12} {key.doc} [{limits}]")
    end = end or "Without a prompt: standard input is one; at a terminal, prompts are typed in."
    return "\n".join([*lines, "", end])


# ---- what is read --------------------------------------------------------------------------------------------------


def read_prompt(settings: Settings) -> str | None:
    """The prompt, from wherever it comes; None where it is to be typed in."""
    if settings.prompt is not None:
        return settings.prompt
    if settings.prompt_file is not None:
        return read_prompt_file(settings.prompt_file)
    if settings.source is not None:
        return ""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    return None if at_terminal else "" if sys.stdin is None else read_prompt_file("-")


def read_prompt_file(path: str) -> str:
    """The text of a file as it is; of a pipe or standard input, without the line end that `echo` adds."""
    file = InputFile(path)
    text = documents.read_text(file)
    if not file.is_stream or not text.endswith("\n"):
        return text
    return text.removesuffix("\n").removesuffix("\r")


def encode(encoder, text: str, spelled: bool = False) -> list[int]:
    """The tokens of a text, in which <|0|>, <|1|>, … are sentinels if they are `spelled` there.

    Raises UserError where it has characters that no UTF-8, or not this encoder, can spell.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python passes on arguments that are not UTF-8
        raise UserError(f"the text is not UTF-8 (character {error.start}); convert it first") from error
    return encode_with_sentinels(encoder, text) if spelled else encoder.encode(text)


def read_source(text: str | None, model, encoder, record: dict, name: str = "--source") -> list[int] | None:
    """The tokens that an encoder-decoder is to read, with <|eot|> at the end; None for other models.

    `name` is what the source is called where it was given.
    """
    if not model.takes_source:
        if text is not None:
            raise UserError(f"{name}: this {model.config.arch} reads none; leave it out, or make it the prompt")
        return None
    if text is None:
        raise UserError(f"this model is an encoder-decoder, which answers to a text; give it one with {name}")
    spans = record.get("run", {}).get("objective") == "spans"
    tokens = encode(encoder, text, spelled=spans)
    if max(tokens, default=0) >= model.config.vocab_size:
        n = model.config.vocab_size - encoder.vocab_size
        raise UserError(f"{name}: <|{max(tokens) - encoder.vocab_size}|> is one of too many; the model knows {n}")
    return [*tokens, encoder.eot]


# ---- the model -----------------------------------------------------------------------------------------------------


def load(path: Path, settings: Settings):
    """(model, encoder, training record) of a model file, ready on the device that the settings name."""
    device = pick_device(settings.device)
    model, encoder, record = load_model(path, device)
    if settings.compile == "true" and device != "cuda":
        raise UserError(f"--compile true: steps are compiled on cuda only, and this is {device}; leave it out")
    if not model.generates:
        raise UserError(f"{path}: this {model.config.arch} is an encoder: it guesses masked tokens and makes no text")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: the model predicts NaN: its weights are ruined; use an earlier checkpoint")
    dtype = dtype_name(settings, device)
    model = model.to(getattr(torch, dtype))
    about = f"{path}: {model.config.arch}, {model.num_params(non_embedding=False):,} parameters, {device} {dtype}"
    if settings.quantize:
        model, about = decode.quantize(model, settings.quantize), f"{about}, {settings.quantize}"
    print(about, file=sys.stderr)
    return model, encoder, record


def dtype_name(settings: Settings, device: str) -> str:
    return {"auto": "bfloat16" if device == "cuda" else "float32"}.get(settings.dtype, settings.dtype)


MODEL_SUFFIXES = (".safetensors", *(f".{arch}" for arch in MODELS))


def find_model(name: str | None) -> Path:
    """The file that --model names, or is in the checkpoint directory that it names; the newest in bin/ for None."""
    if name is None:
        found = [path for path in Path("bin").glob("*") if path.suffix in MODEL_SUFFIXES and path.is_file()]
        if not found:
            raise UserError("there is no model in bin/; train one (python train.py --config tiny.json), or name "
                            "a model file or a checkpoint directory with --model")
        return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return checkpoint.find_model(name, "--model")


def pick_device(name: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this torch, has none; use --device auto")
    return name


# ---- making text ---------------------------------------------------------------------------------------------------


class Until:
    """Lets text through until one of the stop strings stands in it, wherever its pieces are cut.

    What may be the beginning of a stop string is held back until that is decided. The stop string that is complete
    first counts.

    >>> until = Until(["END"])
    >>> [until.push(piece) for piece in ("the E", "very E", "ND.")], until.found
    (['the ', 'Every ', ''], True)
    """

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str, last: bool = False) -> str:
        """What can be printed now; with `last`, nothing more comes and so nothing is held back."""
        if not self.stops:
            return text
        self.held += text
        places = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        self.found = bool(places)
        keep = 0 if last else max(map(self.overlap, self.stops), default=0)
        cut = min(places)[1] if self.found else len(self.held) - keep
        ready, self.held = self.held[:cut], self.held[cut:]
        return ready

    def overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin the stop string."""
        for n in range(min(len(stop) - 1, len(self.held)), 0, -1):
            if self.held.endswith(stop[:n]):
                return n
        return 0


class Text:
    """A text under way: what decode.py is asked for, and what of the tokens that come can be printed.

    `made` counts its tokens; `why` says why it ended: "stop" (<|eot|> or a stop string), "length" (as many tokens as
    asked for), "full" (no positions are left). `label` is the caller's.
    """

    def __init__(self, encoder, request: Request, stops: list[str], label: Any = None):
        self.encoder, self.request, self.label = encoder, request, label
        self.decoder, self.until = encoder.stream(), Until(stops)
        self.made, self.why = 0, None

    def push(self, token: int, why: str | None) -> str:
        """The piece that can be printed now, "" while a character or a stop string may be under way.

        `why` is what ends the text with this token, else None.
        """
        self.made += 1
        if token in self.request.stop:
            piece = ""
        elif token < self.encoder.vocab_size:
            piece = self.decoder.push(token)
        else:  # a sentinel, or in a decoder an id that nothing uses
            sentinel = self.request.source is not None
            piece = self.decoder.flush() + decode_with_sentinels(self.encoder, [token]) if sentinel else ""
        last = why is not None
        piece = self.until.push(piece + (self.decoder.flush() if last else ""), last)
        self.why = "stop" if self.until.found else why
        return piece


def make_request(settings: Settings, encoder, prompt: list[int], source: list[int] | None, seed: int) -> Request:
    """What decode.py is asked for. An empty prompt stands for a text's beginning; an answer begins where one does."""
    start = prompt or [encoder.eot] if source is None else [encoder.eot, *prompt]
    return Request(
        start, settings.length,
        temperature=settings.temperature if settings.temperature > 1e-6 else 0.0,  # logits / 1e-40 are infinite
        top_k=settings.top_k or None, top_p=max(settings.top_p, 1e-30) if settings.top_p < 1 else None,
        min_p=settings.min_p or None, seed=seed, stop=frozenset({encoder.eot, encoder.pad}), source=source,
    )  # fmt: skip


def check_fits(model, request: Request, on_full: str) -> None:
    """Raises UserError where the prompt leaves no position for a text."""
    n, end = len(request.prompt), model.max_positions
    if end is not None and n > end and on_full == "stop":
        raise UserError(f"the prompt has {n:,} tokens, and the model's positions end at {end:,}; give a shorter one, "
                        "or --on_full slide, which reads its end alone")


MANY_TOKENS = 200_000  # from here on compiling pays


@dataclass
class Work:
    """How much is to be made, at most."""

    texts: int = 0
    tokens: int = 0
    longest: int = 0  # tokens of a text, prompt included
    longest_source: int = 0
    indexes: set[int] = field(default_factory=set)  # of --prompts_file's lines

    def add(self, request: Request, index: int | None = None) -> None:
        self.texts += 1
        self.indexes |= set() if index is None else {index}
        self.tokens += request.max_new_tokens
        self.longest = max(self.longest, len(request.prompt) + request.max_new_tokens)
        self.longest_source = max(self.longest_source, len(request.source or ()))


def make_decoder(model, settings: Settings, work: Work) -> Decoder:
    on_cuda = model.device.type == "cuda"
    compiled = settings.compile == "true" or (settings.compile == "auto" and on_cuda and work.tokens >= MANY_TOKENS)
    return Decoder(model, rows_at_once(model, settings, work.texts), work.longest, on_full=settings.on_full,
                   compile=compiled, max_source=work.longest_source or None)  # fmt: skip


def rows_at_once(model, settings: Settings, n: int) -> int:
    """How many of n texts are made at once."""
    return min(n, settings.batch or (64 if model.device.type == "cuda" else 8))


Piece = tuple[Text, str, str | None]  # what can be printed of a text now, and why it ended if it did


def make(decoder: Decoder, texts: Iterable[Text]) -> Iterator[Piece]:
    """The pieces of as many texts at once as there are rows, one for each token as it comes.

    A text that ends leaves its row to the next one.
    """
    waiting, running = iter(texts), {}
    while True:
        while decoder.free and (text := next(waiting, None)) is not None:
            running[decoder.admit(text.request)] = text
        if not running:
            return
        for handle, token, why in decoder.step():
            text = running[handle]
            piece = text.push(token, why)
            if text.why:
                del running[handle]
                if why is None:  # a stop string, of which the decoder does not know
                    decoder.release(handle)
            yield text, piece, text.why


def in_turn(pieces: Iterable[Piece], texts: list[Text]) -> Iterator[Piece]:
    """The pieces of one text after the other: the first one's as they come, those of each other are held back until the
    texts before it have ended."""
    held: dict[int, deque[Piece]] = {id(text): deque() for text in texts}
    turn = 0
    for piece in pieces:
        held[id(piece[0])].append(piece)
        while turn < len(texts) and held[id(texts[turn])]:
            ready = held[id(texts[turn])].popleft()
            yield ready
            turn += ready[2] is not None


@contextmanager
def clear_errors(n_tokens: int, rows: int = 1):
    """What torch says of too little memory and of a ruined model, as a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "memory" in str(error):
            what = f"{n_tokens:,} tokens" if rows == 1 else f"{rows} texts of up to {n_tokens:,} tokens at once"
            mend = "give fewer, or a smaller --length" if rows == 1 else "give a smaller --batch or --length"
            raise UserError(f"not enough memory for {what}; {mend}") from error
        if "probability tensor" in str(error):
            raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint") from error
        raise


# ---- samples and conversation --------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Prints samples, each with the next seed; counts their tokens and the time that they take."""

    model: Any
    encoder: Any
    settings: Settings
    seeds: Iterator[int]
    source: list[int] | None = None
    decoder: Decoder | None = None  # kept from prompt to prompt, in a conversation
    longest: int = 0  # tokens that it has room for
    tokens: int = 0
    seconds: float = 0.0

    def samples(self, prompt: str, echo: bool) -> None:
        """Prints num_samples continuations, each behind its prompt if `echo`, with a line of dashes between them.

        All are made at once; the first is printed as it comes, the others each in its turn.
        """
        tokens = encode(self.encoder, prompt)
        seeds = itertools.islice(self.seeds, self.settings.num_samples)
        requests = [make_request(self.settings, self.encoder, tokens, self.source, seed) for seed in seeds]
        check_fits(self.model, requests[0], self.settings.on_full)
        warn_of_length(self.model, len(tokens))
        texts, work = [Text(self.encoder, request, self.settings.stop) for request in requests], Work()
        for request in requests:
            work.add(request)
        head = prompt if echo else ""
        print(head, end="", flush=True)
        try:
            with clear_errors(work.longest, min(work.texts, 2)):
                self.show(texts, head, self.room_for(work))
        except BaseException:  # Ctrl-C among them: its rows are in no state to go on
            self.decoder = None
            raise

    def show(self, texts: list[Text], head: str, decoder: Decoder) -> None:
        began = time.perf_counter()
        try:
            for text, piece, why in in_turn(make(decoder, texts), texts):
                print(piece, end="", flush=True)
                if why is not None:
                    print(flush=True)
                    tell_of_end(why, self.model)
                    if text is not texts[-1]:
                        print(f"---------------\n{head}", end="", flush=True)
        finally:
            self.tokens += sum(text.made for text in texts)
            self.seconds += time.perf_counter() - began

    def room_for(self, work: Work) -> Decoder:
        """The decoder of the last prompt, or one with more room."""
        if self.decoder is None or work.longest > self.longest:
            self.decoder = None  # its memory first
            self.longest = work.longest = -(-work.longest // 256) * 256  # the next prompts may be a little longer
            self.decoder = make_decoder(self.model, self.settings, work)
        return self.decoder

    def report(self) -> None:
        print(rate(self.tokens, self.seconds), file=sys.stderr)


def rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"


def tell_of_end(why: str, model, n: int = 1) -> None:
    """A note where texts end because the model has no more positions."""
    if why == "full":
        what = "the text ends" if n == 1 else f"{n:,} texts end"
        print(f"note: {what} where the model's positions do, at {model.max_positions:,} tokens with the prompt; "
              "--on_full slide goes on", file=sys.stderr)


def warn_of_length(model, n: int) -> None:
    limit = model.config.block_size
    if n > limit:
        how = "was trained on no more than" if model.causal and model.max_positions is None else "reads only the last"
        print(f"note: the prompt has {n:,} tokens, and the model {how} {limit:,} at a time", file=sys.stderr)


def warn_of_source(model, source: list[int] | None) -> None:
    if source is not None and len(source) > model.config.block_size:
        print(f"note: the source has {len(source):,} tokens, and the model was trained on no more than "
              f"{model.config.block_size:,}", file=sys.stderr)


def converse(writer: Writer) -> None:
    """Prompts typed in at a terminal, each with its continuation, until Ctrl-D."""
    with suppress(ImportError):  # Windows has none: its terminal brings its own history
        import readline  # noqa: F401 (history and editing of the line for `input`)
    print("Type a prompt; an empty line starts a new text. Ctrl-C stops a text, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            writer.samples(input("> "), echo=False)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except UnicodeDecodeError as error:
            print(f"error: the prompt is not UTF-8 text ({error.reason})", file=sys.stderr)


# ---- bulk: prompts -------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """What a line of --prompts_file may say; what it leaves out is as the command has it."""

    prompt: Any = option(None, "text to continue")
    source: Any = option(None, "what an encoder-decoder reads")
    id: Any = option(None, "text or integer, given back")
    max_tokens: int | None = option(None, "tokens to make at most", low=1, high=2**20)
    length: int | None = option(None, "the same", low=1, high=2**20)
    temperature: float | None = option(None, "as --temperature", low=0)
    top_k: int | None = option(None, "as --top_k", low=0)
    top_p: float | None = option(None, "as --top_p", above=0, high=1)
    min_p: float | None = option(None, "as --min_p", low=0, high=1)
    seed: int | None = option(None, "default: the command's, plus the line's index", low=0)
    stop: list[str] | None = option(None, "as --stop")

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("prompt", "source"):
            if not isinstance(getattr(self, name), (str, type(None))):
                yield name, "must be text"
        if isinstance(self.id, bool) or not isinstance(self.id, (str, int, type(None))):
            yield "id", "must be text or integer"
        if self.max_tokens is not None and self.length is not None:
            yield "length", f"is max_tokens too, which is {self.max_tokens}; keep one"


TOLD = 10  # bad lines that are told; of more, only how many


class PromptEntry(NamedTuple):
    """An entry of --prompts_file: its index from 0, its place for messages, and what gives its value."""

    index: int
    place: str
    parse: Callable[[], Any]


class PromptsFile:
    """--prompts_file: JSON lines, or a list in a .json, packed with gzip or not; a pipe is read once."""

    def __init__(self, path: str):
        self.file = InputFile(path)
        with self.file.open() as stream:
            scan = documents.scan_bytes(stream)
        if kind := documents.find_other_kind(self.file, scan.head):
            raise UserError(f'{self.file.label} is {kind}; write a line {{"prompt": "…"}} for each text')
        self.sha256 = scan.sha256
        has_list = re.match(rb"(\xef\xbb\xbf)?\s*\[", scan.head)  # some name JSON lines .json
        is_list = documents.find_format(self.file, scan.head) == "json" and has_list
        if is_list and scan.bad_byte:
            raise UserError(f"{self.file.label}, line {scan.bad_byte.line}: {scan.bad_byte} is not UTF-8; convert it")
        self.entries = self._list_entries if is_list else self._line_entries

    def _line_entries(self) -> Iterator[PromptEntry]:
        """Blank lines count, and are left out."""
        with self.file.open() as stream:
            for line in documents.read_lines(stream, self.file.label):
                yield PromptEntry(line.number - 1, f"line {line.number}", partial(parse_prompt, line))

    def _list_entries(self) -> Iterator[PromptEntry]:
        with self.file.open() as stream:
            for index, value in enumerate(documents.read_json_list(stream, self.file.label)):
                yield PromptEntry(index, f"entry {index + 1}", lambda value=value: value)


def parse_prompt(line: documents.Line) -> Any:
    try:
        return documents.parse_json(line.data.decode(), mend='write {"prompt": "…"}')
    except UnicodeDecodeError as error:
        bad_byte = documents.BadByte(line.number, line.offset + error.start, line.data[error.start])
        raise UserError(f"{bad_byte} is not UTF-8; convert the file to UTF-8") from error
    except ValueError as error:
        raise UserError(str(error)) from error


class Prompts:
    """The entries of --prompts_file, read twice: all are checked before any text is made."""

    def __init__(self, settings: Settings, prompts: PromptsFile, seed: int, model, encoder, record: dict):
        self.settings, self.prompts, self.seed = settings, prompts, seed
        self.model, self.encoder, self.record = model, encoder, record

    def text(self, entry: PromptEntry) -> Text:
        """What an entry asks for. Raises UserError, which names its file and place."""
        try:
            return self.asked_for(entry.index, entry.parse())
        except UserError as error:
            raise UserError(f"{self.prompts.file.label}, {entry.place}: {error}") from error

    def asked_for(self, index: int, data: Any) -> Text:
        if not isinstance(data, dict):
            raise UserError(f'holds {show(data)}; write an object, {{"prompt": "…"}}')
        line, problems = check(Line, data)
        if problems:
            raise UserError("; ".join(problems))
        s = self.settings
        source = read_source(s.source if line.source is None else line.source, self.model, self.encoder, self.record,
                             "source")
        if line.prompt is None and source is None:
            raise UserError('has no prompt; give it one, "" for the beginning of a text')
        own = {"length": line.max_tokens, **{name: getattr(line, name) for name in OWN if name in data}}
        s = dataclasses.replace(s, **{name: value for name, value in own.items() if value is not None})
        seed = self.seed + index if line.seed is None else line.seed
        request = make_request(s, self.encoder, encode(self.encoder, line.prompt or ""), source, seed)
        check_fits(self.model, request, s.on_full)
        known = {"id": line.id, "source": line.source, "prompt": line.prompt}
        label = {"index": index, **{name: value for name, value in known.items() if value is not None}}
        return Text(self.encoder, request, s.stop, label)

    def check(self, done: set[int]) -> tuple[int, dict[Any, Work]]:
        """(texts in all, what is to be made of them, by size class). Raises UserError, naming the wrong lines."""
        bad, count, groups = [], 0, defaultdict(Work)
        for entry in self.prompts.entries():
            count += 1
            try:
                request = self.text(entry).request
            except UserError as error:
                bad.append(str(error))
                continue
            if entry.index not in done:
                groups[size_class(self.model, self.settings, request)].add(request, entry.index)
        if bad:
            more = [f"… and {len(bad) - TOLD:,} more"] if len(bad) > TOLD else []
            problems = "\n  ".join([*bad[:TOLD], *more])
            raise UserError(bad[0] if len(bad) == 1 else f"{len(bad):,} of {count:,} lines are wrong:\n  {problems}")
        if not count:
            raise UserError(f'{self.prompts.file.label} has no prompts; write a line {{"prompt": "…"}} for each')
        return count, dict(sorted(groups.items()))

    def texts(self, indexes: set[int]) -> Iterator[Text]:
        """Those of these entries."""
        return (self.text(entry) for entry in self.prompts.entries() if entry.index in indexes)


OWN = ("length", "temperature", "top_k", "top_p", "min_p", "stop")  # what a line may have of its own, besides its seed

# ---- bulk: results -------------------------------------------------------------------------------------------------


class Results:
    """--out: a line for each finished text, in the order of finishing. Beside it OUT.from.json says what it was made
    from, so that nothing else is ever added to it."""

    def __init__(self, path: str):
        self.path, self.beside = Path(path), Path(f"{path}.from.json")

    def origin(self) -> dict | None:
        """What the results that are there were made from; None where there are none."""
        try:
            if not self.path.exists() or not self.path.stat().st_size:
                return None
            return dict(json.loads(self.beside.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.path} is there, but {self.beside}, which would say what it was made from, cannot "
                            "be read; name another --out") from error

    def agree(self, origin: dict, before: dict) -> None:
        """Raises UserError, naming what differs, where the results come from something else."""
        files, before = {"prompts_file": "the prompts file", "model": "the model"}, {"fast": True, **before}
        differ = [f"{files[name]} is another, or was changed" if name in files else
                  f"--{name} was {show(before.get(name))} and is {show(value)}"
                  for name, value in origin.items() if before.get(name) != value]  # fmt: skip
        if differ:
            raise UserError(f"{self.path} was made otherwise: {'; '.join(differ)}. Give the same again, or name "
                            "another --out")

    def done(self) -> set[int]:
        """Indexes of the texts that are there. A last line that a kill tore is removed."""
        found, end = set(), 0
        with self.opened("r+b") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(raw)
                try:
                    found.add(int(json.loads(raw)["index"]))
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(f"{self.path}, line {number}: is no text that sample.py wrote; remove the line, or "
                                    "name another --out") from error
        return found

    def begin(self, origin: dict) -> None:
        atomic_write(self.beside, json.dumps(origin, indent=1).encode())
        with self.opened("wb"):
            pass

    def add(self, line: dict) -> None:
        """One write to the file, so that a kill tears no line but the last."""
        with self.opened("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    @contextmanager
    def opened(self, mode: str):
        try:
            with open(self.path, mode) as file:
                yield file
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; what is in it stays, and the same "
                            "command goes on") from error


def file_hash(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def origin_of(settings: Settings, prompts: PromptsFile, path: Path, model, seed: int) -> dict:
    """All that the texts depend on."""
    files = {"prompts_file": prompts.sha256, "model": file_hash(path)}
    options = {name: getattr(settings, name) for name in (*OWN, "source", "on_full", "quantize", "fast")}
    dtype = dtype_name(settings, model.device.type)
    return {**files, "seed": seed, "dtype": dtype, **options}


def bulk(settings: Settings) -> None:
    """Make the texts of --prompts_file that are not in --out yet."""
    results, path = Results(settings.out), find_model(settings.model)
    outputs = [Output("--out", results.path, "texts"), Output("--out", results.beside, "texts origin")]
    check_outputs(outputs, [Input("--prompts_file", settings.prompts_file), Input("--model", path)])
    prompts = PromptsFile(settings.prompts_file)
    before = results.origin()
    model, encoder, record = load(path, settings)
    seed = settings.seed if settings.seed is not None else before["seed"] if before else drawn_seed()
    origin = origin_of(settings, prompts, path, model, seed)
    if before:
        results.agree(origin, before)
    done = results.done() if before else set()
    entries = Prompts(settings, prompts, seed, model, encoder, record)
    count, groups = entries.check(done)
    texts = sum(work.texts for work in groups.values())
    if not texts:
        print(f"all {count:,} texts are in {results.path} already", file=sys.stderr)
        return
    print(f"seed {seed}; {texts:,} of {count:,} texts are to be made", file=sys.stderr)
    tell_of_batch(model, settings)
    if not before:
        results.begin(origin)
    reasons = write_results(make_groups(model, settings, entries, groups), results, count - texts, count)
    if reasons["full"]:
        tell_of_end("full", model, reasons["full"])


def make_groups(model, settings: Settings, prompts: Prompts, groups: dict[Any, Work]) -> Iterator[Piece]:
    """The pieces of all texts, one size class after the other, each with a decoder of its own."""
    for size, work in groups.items():
        rows = INVARIANT_ROWS if size else rows_at_once(model, settings, work.texts)
        with clear_errors(work.longest, rows):
            if size:
                tokens, source = size
                decoder = Decoder(model, rows, tokens, on_full=settings.on_full, batch_invariant=True, smallest=tokens,
                                  max_source=source)  # fmt: skip
            else:
                decoder = make_decoder(model, settings, work)
            yield from make(decoder, prompts.texts(work.indexes))
        del decoder  # its memory before the next one's


# On a CPU a text of --prompts_file is bit for bit the same whatever --batch, the other prompts or an interruption: its
# own line fixes the shape of all that is computed for it. Every step computes INVARIANT_ROWS rows, and a decoder makes
# texts of one size class only, whose cache it reads whole; see decode.py for the rest.
INVARIANT_ROWS = 8


def is_batch_invariant(model, settings: Settings) -> bool:
    return model.device.type == "cpu" and not settings.fast


def size_class(model, settings: Settings, request: Request) -> tuple[int, int] | None:
    """(tokens, source tokens) that the decoder of a text has room for, by what the request alone asks for: powers of
    two, so that texts of different lengths share decoders. None where texts of all sizes share one."""
    if not is_batch_invariant(model, settings):
        return None
    tokens, source = len(request.prompt) + request.max_new_tokens, len(request.source or ())
    tokens, source = (max(low, 1 << (n - 1).bit_length()) for low, n in ((256, tokens), (32, source or 1)))
    return min(tokens, model.max_positions or tokens), source


def tell_of_batch(model, settings: Settings) -> None:
    """A note where texts depend on --batch, or --batch is not followed."""
    if settings.fast:
        print("note: --fast: a text may differ with --batch, with the other prompts and after an interruption, by "
              "rounding", file=sys.stderr)
    elif is_batch_invariant(model, settings) and settings.batch not in (None, INVARIANT_ROWS):
        print(f"note: on a CPU {INVARIANT_ROWS} texts are made at once, so that no text depends on --batch; "
              f"--fast takes {settings.batch}", file=sys.stderr)


def write_results(pieces: Iterable[Piece], results: Results, done: int, count: int) -> dict[str, int]:
    """Adds each text to the results when it has ended, under a bar. Returns how many ended why."""
    said: dict[int, str] = defaultdict(str)
    began, tokens, reasons = time.perf_counter(), 0, Counter()
    with tqdm(total=count, initial=done, unit=" texts", dynamic_ncols=True, disable=None) as bar:
        try:
            for text, piece, why in pieces:
                tokens += 1
                said[text.label["index"]] += piece
                if why is not None:
                    words = said.pop(text.label["index"])
                    results.add(text.label | {"text": words, "finish_reason": why, "tokens": text.made})
                    reasons[why] += 1
                    speed = tokens / max(time.perf_counter() - began, 1e-9)
                    bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            bar.close()
            print(f"interrupted: {done + reasons.total():,} of {count:,} texts are in {results.path}; "
                  "the same command goes on", file=sys.stderr)
            raise
    print(rate(tokens, time.perf_counter() - began), file=sys.stderr)
    return reasons


# ---- score ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model, encoder, text: str, stride: int = 0, source: list[int] | None = None) -> tuple[float, float]:
    """(loss in nats per token, bits per byte) of a text, the end of the text not among what is predicted.

    Every token is predicted once, from at most block_size tokens before it; at the text's start from <|eot|>.
    Bits per byte can be compared between models with different encoders.
    """
    size = model.config.block_size
    if stride > size:
        raise UserError(f"--stride {stride}: exceeds the model's block_size {size}, so tokens would be left out")
    if not text:
        raise UserError("there is nothing to score: the text is empty")
    ids = torch.tensor([[encoder.eot, *encode(encoder, text)]], device=model.device)
    n, total = ids.size(1) - 1, 0.0
    given = None if source is None else torch.tensor([source], device=ids.device)
    with tqdm(total=n, desc="scoring", unit=" tokens", leave=False, disable=None) as bar, clear_errors(size):
        for begin, done, end in windows(n, size, stride or max(1, size // 2), model.causal):
            targets = ids[:, begin + 1 : end + 1].clone()
            targets[:, : done - begin] = -1  # scored by the window before
            total += model(ids[:, begin:end], targets, source=given)[1].item() * (end - done)
            bar.update(end - done)
    return total / n, total / math.log(2) / len(text.encode())


def windows(n: int, size: int, stride: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(begin, done, end): tokens begin … end−1 are read, and of what they predict, done+1 … end is new.

    A model that sees the future gets no more of it than there is: each of its windows predicts its last token alone.

    >>> list(windows(10, size=4, stride=2, causal=True))
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    """
    first, stride = (size, stride) if causal else (1, 1)
    end = 0
    while end < n:
        done, end = end, min(end + (stride if end else first), n)
        yield max(0, end - size), done, end


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    if asks_for_help(argv, declared(Settings), flags_of(Settings)):
        print(help_text())
        return
    settings = read_settings(argv)
    if settings.prompts_file is not None:
        bulk(settings)
        return
    if settings.score is not None:
        text = documents.read_text(InputFile(settings.score))
        model, encoder, record = load(find_model(settings.model), settings)
        source = read_source(settings.source, model, encoder, record)
        loss, bits = score(model, encoder, text, settings.stride, source)
        print(f"loss {loss:.4f} nats per token, {bits:.4f} bits per byte")
        return
    prompt = read_prompt(settings)
    model, encoder, record = load(find_model(settings.model), settings)
    source = read_source(settings.source, model, encoder, record)
    warn_of_source(model, source)
    seed = drawn_seed() if settings.seed is None else settings.seed
    print(f"seed {seed}", file=sys.stderr)
    writer = Writer(model, encoder, settings, itertools.count(seed), source)
    if prompt is None:
        converse(writer)
    else:
        writer.samples(prompt, echo=True)
    writer.report()


def drawn_seed() -> int:
    return int.from_bytes(os.urandom(4))


if __name__ == "__main__":
    run_cli(main)

"""Text from a trained model, printed as it is made; or how well the model predicts a text of yours.

    python sample.py                                             the newest model in bin/; prompts are typed in
    python sample.py --prompt "The cat" --length 100 --stop "."
    python sample.py --model bin/air.strawberry --prompt_file start.txt --num_samples 3 --seed 7
    python sample.py --model bin/pairs.transformer --source "The larger of two numbers."     from an encoder-decoder
    python sample.py --score book.txt                            loss and bits per byte

Text goes to stdout; what model, which seed and how fast goes to stderr.

Index:  settings · what is read · the model · making text · samples and conversation · score · the command
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import MODEL, load_model, newest
from dataset import read_spelled, spell
from model import MODELS
from options import UserError, check, declared, nearest, option, parse_arguments, run_cli

# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    model: str | None = option(None, "model file or checkpoint directory; default: the newest model in bin/")
    prompt: Any = option(None, 'text to continue; "" starts a new text')
    source: Any = option(
        None, "what an encoder-decoder reads; a prompt then begins its answer. Where it learned spans, <|0|>, <|1|>, … "
        "stand for what is missing"
    )
    prompt_file: str | None = option(None, "file that holds the prompt; - is standard input")
    length: int = option(256, "tokens to make at most", low=1, high=2**20)
    temperature: float = option(0.8, "0 takes the likeliest token each time; higher is more surprising", low=0)
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that make up this probability", above=0, high=1)
    min_p: float = option(0.0, "draw from tokens at least this many times as likely as the likeliest", low=0, high=1)
    seed: int | None = option(None, "sample n is drawn with seed + n, from n = 0; default: drawn and printed", low=0)
    num_samples: int = option(1, "samples of each prompt", low=1)
    stop: list[str] = option([], "text that ends a sample and is not printed; may be given several times")
    score: str | None = option(None, "file whose loss and bits per byte are printed, instead of samples; - is stdin")
    stride: int = option(0, "tokens that --score's window moves each time; 0: half the model's block_size", low=0)
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto", "of the weights; auto: bfloat16 on cuda, float32 elsewhere", choices=["auto", "float32", "bfloat16"]
    )


def read_settings(argv: list[str]) -> Settings:
    """The settings of a command line. Raises UserError with all that is wrong with them, in one line."""
    config, words, problems = parse_arguments(argv)
    words += [] if config is None else [("config", config)]  # train.py's; unknown here
    known, raw = declared(Settings), {}
    for name, text in words:
        if name not in known:
            problems.append(f"--{name}: unknown option{nearest(name, known) or '; --help lists them'}")
        elif name in raw and name != "stop":
            problems.append(f"--{name}: given twice; keep one")
        elif text == "" and name not in ("prompt", "source"):
            problems.append(f"--{name}: is empty; give it a value or leave it out")
        elif name == "stop":
            raw.setdefault(name, []).append(text)
        else:
            raw[name] = number(text) if {int, float} & set(known[name].kinds) else text
    texts = [f"--{name}" for name in ("prompt", "prompt_file", "score") if name in raw]
    problems += [f"{' and '.join(texts)} exclude each other; keep one"] if len(texts) > 1 else []
    settings, found = check(Settings, raw)
    if problems := problems + [f"--{problem.removesuffix(' or null')}" for problem in found]:
        raise UserError("; ".join(problems))
    return settings


def number(text: str) -> int | float | str:
    """The number that a text spells, else the text, which `check` then refuses."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def help_text() -> str:
    lines = ["usage: python sample.py [--option value …]", ""]
    for name, key in declared(Settings).items():
        default = "" if key.default in (None, []) else f"; default {key.default}"
        allowed = "text" if name in ("prompt", "source", "stop") else key.allowed.removesuffix(" or null")
        lines.append(f"  --{name:<12} {key.doc} [{allowed}{default}]")
    return "\n".join([*lines, "", "Without a prompt: standard input is one; at a terminal, prompts are typed in."])


# ---- what is read --------------------------------------------------------------------------------------------------


def read_prompt(settings: Settings) -> str | None:
    """The prompt, from wherever it comes; None where it is to be typed in."""
    if settings.prompt is not None:
        return settings.prompt
    if settings.prompt_file is not None:
        return read_text(settings.prompt_file)
    if settings.source is not None:
        return ""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    return None if at_terminal else read_text("-")


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-", to the last line end."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            data = b"" if sys.stdin is None else sys.stdin.buffer.read()
        else:
            data = Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason}, byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}; name a text file") from error


def encode(encoder, text: str, spelled: bool = False) -> list[int]:
    """The tokens of a text, in which <|0|>, <|1|>, … are sentinels if they are `spelled` there.

    Raises UserError where it has characters that no UTF-8, or not this encoder, can spell.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python passes on arguments that are not UTF-8
        raise UserError(f"the text is not UTF-8 (character {error.start}); convert it first") from error
    return read_spelled(encoder, text) if spelled else encoder.encode(text)


def read_source(settings: Settings, model, encoder, record: dict) -> list[int] | None:
    """The tokens that an encoder-decoder is to read, with <|eot|> at the end; None for other models."""
    text = settings.source
    if not model.takes_source:
        if text is not None:
            raise UserError(f"--source: this {model.config.arch} reads none; leave it out, or make it the --prompt")
        return None
    if text is None:
        raise UserError("this model is an encoder-decoder, which answers to a text; give it one with --source")
    spans = record.get("run", {}).get("objective") == "spans"
    tokens = encode(encoder, text, spelled=spans)
    if max(tokens, default=0) >= model.config.vocab_size:
        n = model.config.vocab_size - encoder.vocab_size
        raise UserError(f"--source: <|{max(tokens) - encoder.vocab_size}|> is one of too many; the model knows {n}")
    if len(tokens) >= model.config.block_size:
        print(f"note: the source has {len(tokens) + 1:,} tokens, and the model was trained on no more than "
              f"{model.config.block_size:,}", file=sys.stderr)
    return [*tokens, encoder.eot]


# ---- the model -----------------------------------------------------------------------------------------------------


def load(settings: Settings):
    """(model, encoder, source) of the settings, ready on the device."""
    path, device = find_model(settings.model), pick_device(settings.device)
    model, encoder, record = load_model(path, device)
    if not model.generates:
        raise UserError(f"{path}: this {model.config.arch} is an encoder: it guesses masked tokens and makes no text")
    source = read_source(settings, model, encoder, record)
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device == "cuda")
    model = model.to(torch.bfloat16 if half else torch.float32)
    about = f"{path}: {model.config.arch}, {model.num_params(non_embedding=False):,} parameters"
    print(f"{about}, {device} {'bfloat16' if half else 'float32'}", file=sys.stderr)
    return model, encoder, source


MODEL_SUFFIXES = (".safetensors", *(f".{arch}" for arch in MODELS))


def find_model(name: str | None) -> Path:
    """The file that --model names, or is in the checkpoint directory that it names; the newest in bin/ for None."""
    if name is None:
        found = [path for path in Path("bin").glob("*") if path.suffix in MODEL_SUFFIXES and path.is_file()]
        if not found:
            raise UserError("there is no model in bin/; train one (python train.py --config tiny.json), or name "
                            "a model file or a checkpoint directory with --model")
        return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    path = Path(name)
    if not path.is_dir():
        return path
    if (path / MODEL).is_file():
        return path / MODEL
    if not any(path.glob("*step_*")):
        raise UserError(f"--model {name} is a directory without checkpoints; name a model file or a run's checkpoints")
    return newest(path).path / MODEL


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
        self.held += text
        places = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        self.found = bool(places)
        keep = 0 if last else max(map(self.overlap, self.stops), default=0)
        cut = min(places)[1] if self.found else len(self.held) - keep
        ready, self.held = self.held[:cut], self.held[cut:]
        return ready

    def overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin the stop string."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


def continuation(model, encoder, prompt: list[int], settings: Settings, seed: int, source=None) -> Iterator[str]:
    """The text that follows the prompt, a piece for each token: "" while a character or a stop string may be under way.

    An empty prompt stands for a text's beginning. `source` are the tokens that an encoder-decoder reads.
    Ends after settings.length tokens, at <|eot|>, or at a stop string.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    start = prompt or [encoder.eot] if source is None else [encoder.eot, *prompt]
    idx = torch.tensor([start], device=device)
    ends, decoder, until = {encoder.eot, encoder.pad}, encoder.stream(), Until(settings.stop)
    temperature = settings.temperature if settings.temperature > 1e-6 else 0.0  # float32 logits / 1e-40 are infinite
    tokens = model.stream(idx, settings.length, temperature, settings.top_k or None, settings.top_p,
                          settings.min_p or None, ends, generator,
                          source=None if source is None else torch.tensor([source], device=device))
    for count, token in enumerate(map(int, tokens), 1):
        last = token in ends or count == settings.length
        if token >= encoder.vocab_size:  # a sentinel, or in a decoder an id that nothing uses
            text = "" if source is None else decoder.flush() + spell(encoder, [token])
        else:
            text = "" if token in ends else decoder.push(token)
        yield until.push(text + (decoder.flush() if last else ""), last)
        if last or until.found:
            return


@contextmanager
def clear_errors(n_tokens: int):
    """What torch says of too little memory and of a ruined model, as a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "memory" in str(error):
            raise UserError(f"not enough memory for {n_tokens:,} tokens; give fewer, or a smaller --length") from error
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
    tokens: int = 0
    seconds: float = 0.0

    def samples(self, prompt: str, echo: bool) -> None:
        """Prints num_samples continuations, each behind its prompt if `echo`, with a line of dashes between them."""
        tokens = encode(self.encoder, prompt)
        warn_of_length(self.model, len(tokens))
        for i in range(self.settings.num_samples):
            if i:
                print("---------------")
            if echo:
                print(prompt, end="", flush=True)
            self.sample(tokens, next(self.seeds))

    def sample(self, prompt: list[int], seed: int) -> None:
        began = time.perf_counter()
        try:
            with clear_errors(len(prompt) + self.settings.length):
                for text in continuation(self.model, self.encoder, prompt, self.settings, seed, self.source):
                    self.tokens += 1
                    print(text, end="", flush=True)
            print(flush=True)
        finally:
            self.seconds += time.perf_counter() - began

    def report(self) -> None:
        rate = self.tokens / max(self.seconds, 1e-9)
        print(f"{self.tokens:,} tokens in {self.seconds:.2f} s, {rate:,.0f} tokens/s", file=sys.stderr)


def warn_of_length(model, n: int) -> None:
    limit = model.config.block_size
    if n > limit:
        how = "was trained on no more than" if model.causal and model.max_positions is None else "reads only the last"
        print(f"note: the prompt has {n:,} tokens, and the model {how} {limit:,} at a time", file=sys.stderr)


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
    ids = torch.tensor([[encoder.eot, *encode(encoder, text)]], device=next(model.parameters()).device)
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
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return
    settings = read_settings(argv)
    if settings.score is not None:
        text = read_text(settings.score)
        model, encoder, source = load(settings)
        loss, bits = score(model, encoder, text, settings.stride, source)
        print(f"loss {loss:.4f} nats per token, {bits:.4f} bits per byte")
        return
    prompt = read_prompt(settings)
    model, encoder, source = load(settings)
    seed = int.from_bytes(os.urandom(4)) if settings.seed is None else settings.seed
    print(f"seed {seed}", file=sys.stderr)
    writer = Writer(model, encoder, settings, itertools.count(seed), source)
    if prompt is None:
        converse(writer)
    else:
        writer.samples(prompt, echo=True)
    writer.report()


if __name__ == "__main__":
    run_cli(main)

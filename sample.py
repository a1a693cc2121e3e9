"""Generate text with a trained model, or measure how well the model predicts a given text.

    python sample.py                                             the newest model in bin/; prompts are typed in
    python sample.py --prompt "The cat" --length 100 --stop "."
    python sample.py --model bin/air.strawberry --prompt_file start.txt --num_samples 3 --seed 7
    python sample.py --model bin/pairs.transformer --source "The larger of two numbers."     from an encoder-decoder
    python sample.py --prompts_file prompts.jsonl --out texts.jsonl      many texts at once; rerun it to resume
    python sample.py --score book.txt                            loss and bits per byte

The text goes to stdout, as it is generated. The model's path, the seed and the speed go to stderr.
strawberry/inference generates the text.

Index:  settings · the prompt · samples and conversation · the command
"""

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strawberry.command_line import flag_names, format_help, parse_settings
from strawberry.common import UserError, run_cli
from strawberry.config import declared, option
from strawberry.data import documents
from strawberry.data.inputs import InputFile
from strawberry.inference.bulk import run_bulk
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import MODEL_SUFFIXES, load_for_inference, resolve_model_path
from strawberry.inference.options import SamplingOptions
from strawberry.inference.scoring import score_text
from strawberry.inference.text import (
    TextStream,
    Workload,
    check_prompt_fits,
    draw_seed,
    encode_source_text,
    encode_text,
    explain_errors,
    format_rate,
    make_decoder,
    make_request,
    note_positions_end,
    stream_in_order,
    stream_texts,
)
from strawberry.run_config import asks_for_help

# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    model: str | None = option(None, "model file or checkpoint directory; default: the newest model in bin/", path=True)
    prompt: Any = option(None, 'text to continue; "": start a new text')
    source: Any = option(
        None,
        "input of an encoder-decoder; a prompt then starts its output. For span corruption write <|0|>, "
        "<|1|>, … where spans are missing"
    )
    prompt_file: str | None = option(
        None, "file with the prompt; -: standard input, without one final line end",
        path=True,
    )


@dataclass
class Settings(SamplingOptions, Inputs):  # fields in this order: those of Inputs, of SamplingOptions, its own
    num_samples: int = option(1, "samples per prompt", low=1, high=2**16)
    stop: list[str] = option(
        [],
        "stop string, which is not printed; may be repeated. \\n is a line end, \\t a tab, \\r a carriage "
        "return, \\\\ a backslash"
    )
    on_full: str = option(
        "stop", "at the end of learned positions: stop, or slide: recompute the newest half of the text and continue",
        choices=["stop", "slide"],
    )
    prompts_file: str | None = option(
        None,
        'JSON lines, or a .json list, of {"prompt": …}: generate many texts into --out; an entry may also set'
        " source, id, max_tokens, seed and the options from --temperature to --stop_token_ids and --stop",
        path=True,
    )
    out: str | None = option(
        None, "output of --prompts_file: one JSON line per finished text; run the same command again to continue",
        path=True,
    )
    batch: int | None = option(
        None,
        "maximum number of sequences generated at once; default: 64 on cuda, 8 elsewhere. --prompts_file on a"
        " CPU without --fast always uses 8", low=1, high=2**16
    )
    fast: bool = option(
        False,
        "with --prompts_file on a CPU: compute only the rows and cache slots in use, and use --batch rows. A "
        "text may then depend on --batch, the other prompts and an interruption"
    )
    score: str | None = option(
        None, "print loss and bits per byte of this file instead of sampling; -: standard input", path=True
    )
    stride: int = option(0, "tokens between the windows of --score; 0: half the model's block_size", low=0)
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto",
        "type of the weights; auto: bfloat16 on cuda, float32 elsewhere", choices=["auto", "float32", "bfloat16"]
    )
    quantize: str | None = option(None, "int8: store matrices in 8 bits, half of bfloat16's bytes", choices=["int8"])
    compile: str = option(
        "auto", "torch.compile, on cuda only, takes a minute; auto: if many tokens are requested",
        choices=["auto", "true", "false"],
    )


def read_settings(argv: list[str]) -> Settings:
    """Parse the settings of a command line. Raises UserError that lists all problems in one line."""
    return parse_settings(argv, Settings, name_option, finish_options)


def name_option(word: str) -> str:
    """The option that a word without one is most likely meant for."""
    if Path(word).suffix in MODEL_SUFFIXES or os.path.isdir(word):
        return "model"
    return "prompt_file" if os.path.isfile(word) else "prompt"


def finish_options(raw: dict) -> Iterator[str]:
    """Replace the escapes in stop strings, and parse --logit_bias. Yields the problems with the escapes, and those
    with options that exclude each other.
    """
    yield from find_conflicts(raw)
    problems: list[str] = []
    if "stop" in raw:
        raw["stop"] = [unescape(text, problems) for text in raw["stop"]]
    if "logit_bias" in raw:
        with suppress(ValueError):  # what is no JSON stays text, which is refused
            raw["logit_bias"] = json.loads(raw["logit_bias"])
    yield from problems


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str, problems: list[str]) -> str:
    r"""Replace the escapes in a --stop string. A single backslash at its end stays. Adds problems to `problems`.

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


def find_conflicts(raw: dict) -> Iterator[str]:
    """Yield a problem for each combination of options that is not allowed."""
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
    if "stride" in raw and "score" not in raw:
        yield "--stride: is about --score; name a file to score, or leave --stride away"
    for name in raw if "score" in raw and len(texts) == 1 else ():
        if name in declared(SamplingOptions) or name in ("num_samples", "on_full", "batch"):
            yield f"--{name}: changes nothing about --score, which makes no text; leave it away"


# ---- the prompt ----------------------------------------------------------------------------------------------------


def read_prompt(settings: Settings) -> str | None:
    """The prompt from --prompt, --prompt_file or standard input; None if the user types it at the terminal."""
    if settings.prompt is not None:
        return settings.prompt
    if settings.prompt_file is not None:
        return read_prompt_file(settings.prompt_file)
    if settings.source is not None:
        return ""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    return None if at_terminal else "" if sys.stdin is None else read_prompt_file("-")


def read_prompt_file(path: str) -> str:
    """The text of a file, unchanged; of a pipe or standard input, without the final line end that `echo` adds."""
    file = InputFile(path)
    text = documents.read_text(file)
    if not file.is_stream or not text.endswith("\n"):
        return text
    return text.removesuffix("\n").removesuffix("\r")


# ---- samples and conversation --------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Print samples, each with the next seed, and count their tokens and seconds."""

    model: Any
    encoder: Any
    settings: Settings
    seeds: Iterator[int]
    source: list[int] | None = None
    decoder: Decoder | None = None  # kept from prompt to prompt, in a conversation
    longest: int = 0  # tokens that it has room for
    tokens: int = 0
    seconds: float = 0.0

    def write_samples(self, prompt: str, echo: bool) -> None:
        """Print num_samples continuations, each after its prompt if `echo`, with a line of dashes between them.

        All samples are generated in one batch. The first is printed as it is generated, each of the others after the
        ones before it are complete.
        """
        tokens = encode_text(self.encoder, prompt)
        seeds = itertools.islice(self.seeds, self.settings.num_samples)
        requests = [make_request(self.settings, self.encoder, tokens, self.source, seed) for seed in seeds]
        check_prompt_fits(self.model, requests[0], self.settings.on_full)
        requests[0].check_tokens(self.model.config.vocab_size)
        warn_of_length(self.model, len(tokens))
        texts, work = [TextStream(self.encoder, request, self.settings.stop) for request in requests], Workload()
        for request in requests:
            work.add(request)
        head = prompt if echo else ""
        print(head, end="", flush=True)
        try:
            with explain_errors(work.longest, min(work.texts, 2)):
                self.write_texts(texts, head, self.get_decoder(work))
        except BaseException:  # Ctrl-C among them: its rows are in no state to go on
            self.decoder = None
            raise

    def write_texts(self, texts: list[TextStream], head: str, decoder: Decoder) -> None:
        began = time.perf_counter()
        try:
            for text, piece, reason in stream_in_order(stream_texts(decoder, texts), texts):
                print(piece, end="", flush=True)
                if reason is not None:
                    print(flush=True)
                    note_positions_end(reason, self.model)
                    if text is not texts[-1]:
                        print(f"---------------\n{head}", end="", flush=True)
        finally:
            self.tokens += sum(text.num_tokens for text in texts)
            self.seconds += time.perf_counter() - began

    def get_decoder(self, work: Workload) -> Decoder:
        """The decoder of the previous prompt, or a new one if that one's max_length is too small."""
        if self.decoder is None or work.longest > self.longest:
            self.decoder = None  # its memory first
            self.longest = work.longest = -(-work.longest // 256) * 256  # the next prompts may be a little longer
            self.decoder = make_decoder(self.model, self.settings, work)
        return self.decoder

    def report(self) -> None:
        print(format_rate(self.tokens, self.seconds), file=sys.stderr)


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
    """Read prompts from a terminal and print a continuation of each, until Ctrl-D."""
    with suppress(ImportError):  # not on Windows, where the terminal has its own history
        import readline  # noqa: F401 (history and editing of the line for `input`)
    print("Type a prompt; an empty line starts a new text. Ctrl-C stops a text, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            writer.write_samples(input("> "), echo=False)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except UnicodeDecodeError as error:
            print(f"error: the prompt is not UTF-8 text ({error.reason})", file=sys.stderr)


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    if asks_for_help(argv, declared(Settings), flag_names(Settings)):
        print(format_help("sample.py", Settings,
                        "Without a prompt: standard input is one; at a terminal, prompts are typed in."))  # fmt: skip
        return
    settings = read_settings(argv)
    if settings.prompts_file is not None:
        run_bulk(settings)
        return
    if settings.score is not None:
        text = documents.read_text(InputFile(settings.score))
        model, encoder, record = load_for_inference(resolve_model_path(settings.model), settings)
        source = encode_source_text(settings.source, model, encoder, record)
        loss, bits = score_text(model, encoder, text, settings.stride, source)
        print(f"loss {loss:.4f} nats per token, {bits:.4f} bits per byte")
        return
    prompt = read_prompt(settings)
    model, encoder, record = load_for_inference(resolve_model_path(settings.model), settings)
    source = encode_source_text(settings.source, model, encoder, record)
    warn_of_source(model, source)
    seed = draw_seed() if settings.seed is None else settings.seed
    print(f"seed {seed}", file=sys.stderr)
    writer = Writer(model, encoder, settings, itertools.count(seed), source)
    if prompt is None:
        converse(writer)
    else:
        writer.write_samples(prompt, echo=True)
    writer.report()


if __name__ == "__main__":
    run_cli(main)

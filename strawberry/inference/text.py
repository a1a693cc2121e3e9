"""Convert text to requests and generated tokens to text: stop strings, streaming, several texts at once.

Index:  tokens of a text · stop strings and streaming · requests · decoders · several texts at once · notes
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from strawberry.common import UserError
from strawberry.data.objectives import decode_with_sentinels, encode_with_sentinels
from strawberry.inference import engine
from strawberry.inference.sampling import Request

# ---- tokens of a text ----------------------------------------------------------------------------------------------

def encode_text(encoder, text: str, spelled: bool = False) -> list[int]:
    """The tokens of a text. If `spelled`, the strings <|0|>, <|1|>, … in it become sentinel tokens.

    Raises UserError if the text is not UTF-8 or has characters that the encoder does not have.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python passes arguments that are not UTF-8 as surrogates
        raise UserError(f"the text is not UTF-8 (character {error.start}); convert it first") from error
    return encode_with_sentinels(encoder, text) if spelled else encoder.encode(text)


def encode_source_text(text: str | None, model, encoder, record: dict, name: str = "--source") -> list[int] | None:
    """The source tokens of an encoder-decoder, with <|eot|> at the end; None for other models.

    `name` is the option or key that the source came from, for messages. Raises UserError if the source is missing, not
    allowed, or has a sentinel that the model does not have.
    """
    if not model.takes_source:
        if text is not None:
            raise UserError(f"{name}: this {model.config.arch} takes no source; leave it out, or make it the prompt")
        return None
    if text is None:
        raise UserError(f"this model is an encoder-decoder, which needs a source text; give one with {name}")
    spans = record.get("run", {}).get("objective") == "spans"
    tokens = encode_text(encoder, text, spelled=spans)
    if max(tokens, default=0) >= model.config.vocab_size:
        n = model.config.vocab_size - encoder.vocab_size
        raise UserError(f"{name}: <|{max(tokens) - encoder.vocab_size}|> is too high; the model has {n} sentinels")
    return [*tokens, encoder.eot]


# ---- stop strings and streaming ------------------------------------------------------------------------------------


class StopStringFilter:
    """Returns text until it contains one of the stop strings, however the text is divided into pieces.

    Text that may be the beginning of a stop string stays pending until the next pieces decide. If several stop strings
    match, the one that is complete first counts. A stop string does not count if its last character is in a piece that
    is pushed with `counts` False.

    >>> stop_filter = StopStringFilter(["END"])
    >>> [stop_filter.push(piece) for piece in ("the E", "very E", "ND.")], stop_filter.found
    (['the ', 'Every ', ''], True)
    """

    def __init__(self, stops: list[str]):
        self.stops, self.pending, self.found = stops, "", False
        self.num_ignored = 0  # characters of `pending` in which no stop string may end

    def push(self, text: str, last: bool = False, counts: bool = True) -> str:
        """Add a piece. Returns the text that can be printed now; with `last`, no text stays pending."""
        if not self.stops:
            return text
        self.pending += text
        if not counts:
            self.num_ignored = len(self.pending)
        places = [(at + len(stop), at) for stop in self.stops if (at := self.find(stop)) >= 0]
        self.found = bool(places)
        keep = 0 if last else max(map(self.overlap, self.stops), default=0)
        cut = min(places)[1] if self.found else len(self.pending) - keep
        ready, self.pending = self.pending[:cut], self.pending[cut:]
        self.num_ignored = max(self.num_ignored - cut, 0)
        return ready

    def find(self, stop: str) -> int:
        """Where the stop string begins in the pending text, at the first place at which it counts; −1: nowhere."""
        return self.pending.find(stop, max(self.num_ignored - len(stop) + 1, 0))

    def overlap(self, stop: str) -> int:
        """The number of characters at the end of the pending text that begin the stop string."""
        for n in range(min(len(stop) - 1, len(self.pending)), 0, -1):
            if self.pending.endswith(stop[:n]):
                return n
        return 0


class TextStream:
    """A text that is being generated: its request, and the conversion of its tokens to printable pieces.

    `num_tokens` counts its tokens. `finish_reason` says why it ended: "stop" (<|eot|> or a stop string), "length"
    (max_new_tokens), "full" (no positions are left). `label` is for the caller's use.
    """

    def __init__(self, encoder, request: Request, stops: list[str], label: Any = None):
        self.encoder, self.request, self.label = encoder, request, label
        self.detokenizer, self.stop_filter = encoder.stream(), StopStringFilter(stops)
        self.hidden = frozenset({encoder.eot, encoder.pad})  # tokens that are no text
        self.num_tokens, self.finish_reason = 0, None

    def push(self, token: int, reason: str | None) -> str:
        """Add a token. Returns the piece that can be printed now, "" while a character or a stop string may be
        incomplete.

        `reason` is the finish reason if the text ends with this token, else None.
        """
        self.num_tokens += 1
        if token in self.request.stop or token in self.hidden:
            piece = ""
        elif token < self.encoder.vocab_size:
            piece = self.detokenizer.push(token)
        else:  # a sentinel token, or, in a decoder, an unused token id
            sentinel = self.request.source is not None
            piece = self.detokenizer.flush() + decode_with_sentinels(self.encoder, [token]) if sentinel else ""
        last = reason is not None
        # as in vLLM, a stop string that is complete within the first min_tokens tokens does not count
        counts = not self.request.min_tokens or self.num_tokens > self.request.min_tokens
        piece = self.stop_filter.push(piece + (self.detokenizer.flush() if last else ""), last, counts)
        self.finish_reason = "stop" if self.stop_filter.found else reason
        return piece


# ---- requests ------------------------------------------------------------------------------------------------------


class SamplingSettings(Protocol):
    """The sampling settings of sample.py's command line or of an HTTP request."""

    length: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: list[int]


def make_request(
    settings: SamplingSettings, encoder, prompt: list[int], source: list[int] | None, seed: int
) -> Request:
    """The engine's request. An empty prompt becomes <|eot|>, the start of a text. With a source, the prompt follows
    <|eot|>.
    """
    start = prompt or [encoder.eot] if source is None else [encoder.eot, *prompt]
    ends = () if settings.ignore_eos else (encoder.eot, encoder.pad)
    return Request(
        start, settings.length,
        temperature=settings.temperature if settings.temperature > 1e-6 else 0.0,  # logits / 1e-40 would be infinite
        top_k=settings.top_k or None, top_p=max(settings.top_p, 1e-30) if settings.top_p < 1 else None,
        min_p=settings.min_p or None, seed=seed, stop=frozenset((*ends, *settings.stop_token_ids)), source=source,
        repetition_penalty=settings.repetition_penalty, presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty, min_tokens=settings.min_tokens,
        logit_bias={int(token): bias for token, bias in settings.logit_bias.items()},
    )  # fmt: skip


def check_prompt_fits(model, request: Request, on_full: str) -> None:
    """Raises UserError if the prompt has more tokens than the model has positions and on_full is "stop"."""
    n, end = len(request.prompt), model.max_positions
    if end is not None and n > end and on_full == "stop":
        raise UserError(
            f"the prompt has {n:,} tokens, and the model's positions end at {end:,}; give a shorter one, "
            "or --on_full slide, which prefills its end only"
        )


# ---- decoders ------------------------------------------------------------------------------------------------------

COMPILE_MIN_TOKENS = 200_000  # fewer tokens do not repay the time of torch.compile


class DecoderSettings(Protocol):
    compile: str
    on_full: str
    batch: int | None


@dataclass
class Workload:
    """Upper bounds of what is to be generated."""

    texts: int = 0
    tokens: int = 0
    longest: int = 0  # tokens of the longest text, with its prompt
    longest_source: int = 0
    indexes: set[int] = field(default_factory=set)  # entries of --prompts_file

    def add(self, request: Request, index: int | None = None) -> None:
        self.texts += 1
        self.indexes |= set() if index is None else {index}
        self.tokens += request.max_new_tokens
        self.longest = max(self.longest, len(request.prompt) + request.max_new_tokens)
        self.longest_source = max(self.longest_source, len(request.source or ()))


def make_decoder(model, settings: DecoderSettings, work: Workload) -> engine.Decoder:
    on_cuda = model.device.type == "cuda"
    compiled = settings.compile == "true" or (
        settings.compile == "auto" and on_cuda and work.tokens >= COMPILE_MIN_TOKENS
    )
    return engine.Decoder(model, choose_num_rows(model, settings, work.texts), work.longest, on_full=settings.on_full,
                   compile=compiled, max_source=work.longest_source or None)  # fmt: skip


def choose_num_rows(model, settings: DecoderSettings, n: int) -> int:
    """The number of rows for n texts: as many of them are generated at once."""
    return min(n, settings.batch or (64 if model.device.type == "cuda" else 8))


# ---- several texts at once -----------------------------------------------------------------------------------------

TextPiece = tuple[TextStream, str, str | None]  # (text, the part that can be printed now, finish reason or None)


def stream_texts(decoder: engine.Decoder, texts: Iterable[TextStream]) -> Iterator[TextPiece]:
    """Generate texts, as many at once as the decoder has rows. Yields a piece for each token when it arrives.

    The row of a text that ends goes to the next text.
    """
    waiting, running = iter(texts), {}
    while True:
        new = list(itertools.islice(waiting, decoder.free))
        running |= zip(decoder.admit_all([text.request for text in new]), new, strict=True)
        if not running:
            return
        for handle, token, reason in decoder.step():
            text = running[handle]
            piece = text.push(token, reason)
            if text.finish_reason:
                del running[handle]
                if reason is None:  # a stop string, which only the TextStream detects
                    decoder.release(handle)
            yield text, piece, text.finish_reason


def stream_in_order(pieces: Iterable[TextPiece], texts: list[TextStream]) -> Iterator[TextPiece]:
    """Sort the pieces by text: those of the first text pass immediately, those of each other text when the texts before
    it have ended.
    """
    waiting: dict[int, deque[TextPiece]] = {id(text): deque() for text in texts}
    current = 0
    for piece in pieces:
        waiting[id(piece[0])].append(piece)
        while current < len(texts) and waiting[id(texts[current])]:
            ready = waiting[id(texts[current])].popleft()
            yield ready
            current += ready[2] is not None


@contextmanager
def explain_errors(n_tokens: int, rows: int = 1):
    """Replace torch's errors for too little memory and for NaN probabilities by a UserError."""
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


# ---- notes ---------------------------------------------------------------------------------------------------------


def format_rate(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"


def note_positions_end(reason: str, model, n: int = 1) -> None:
    """Print a note if texts ended because the model has no more positions."""
    if reason == "full":
        what = "the text ends" if n == 1 else f"{n:,} texts end"
        print(
            f"note: {what} where the model's positions do, at {model.max_positions:,} tokens with the prompt; "
            "--on_full slide continues",
            file=sys.stderr,
        )


def draw_seed() -> int:
    return int.from_bytes(os.urandom(4))

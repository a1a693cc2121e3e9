"""Texts as the choices of OpenAI's completions, whole or piece by piece, with the log probabilities of their tokens."""

import time
import uuid
from typing import NamedTuple

from strawberry.data.objectives import decode_with_sentinels
from strawberry.serving.engine import Piece, RequestGroup, Sequence, decode_text, decode_token


class ScoredToken(NamedTuple):
    token: int
    logprob: float | None  # None for the first token of a prompt
    top: list[tuple[int, float]] | None


class TokenReader:
    """Reads the tokens of a sequence and their log probabilities, each once: the prompt's if it is echoed, then those
    that are generated.
    """

    def __init__(self, group: RequestGroup, sequence: Sequence):
        self.sequence, self.num_read = sequence, 0
        self.prompt: list[ScoredToken] = []
        if group.body.echo and (scores := sequence.prompt_scores) is not None:
            begin = len(sequence.request.prompt) - len(sequence.prompt_tokens)  # behind the start token
            prompt = zip(sequence.request.prompt, scores.logprobs, scores.best, strict=True)
            self.prompt = [ScoredToken(token, own, top if own is not None else None) for token, own, top in prompt]
            self.prompt = self.prompt[begin:]

    def read(self, num_tokens: int) -> list[ScoredToken]:
        """Those that have not been read yet, up to the generated token with this number."""
        found, self.prompt = self.prompt, []
        new, self.num_read = slice(self.num_read, num_tokens), num_tokens
        made = zip(self.sequence.tokens[new], self.sequence.request.logprobs[new], strict=True)
        return found + [ScoredToken(token, *logprob) for token, logprob in made]


class CompletionFormat:
    """The choices of one answer of /v1/completions. A subclass writes those of another route."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"  # of the id; names of the objects

    def __init__(self, group: RequestGroup):
        self.group, self.encoder = group, group.engine.encoder
        self.readers: dict[int, TokenReader] = {}
        self.offsets: dict[int, int] = {}  # characters of each text that are told
        self.decoders = {}
        name = self.chunk if group.body.stream else self.whole
        self.head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "object": name, "created": int(time.time()),
                     "model": group.engine.name}  # fmt: skip

    def format_whole(self, sequence: Sequence) -> dict:
        return self.format_piece(Piece(sequence, sequence.output, sequence.num_tokens, True))

    def format_begin(self) -> list[dict]:
        """The first choices of a stream, before any text."""
        return []

    def format_piece(self, piece: Piece) -> dict:
        logprobs, why = self.format_logprobs(piece), find_finish_reason(piece)
        return {"index": piece.sequence.index, "text": piece.text, "logprobs": logprobs, "finish_reason": why}

    def format_logprobs(self, piece: Piece) -> dict | None:
        """Those of the tokens since the last piece; None if the client does not ask for them."""
        if self.group.body.num_logprobs is None:
            return None
        index = piece.sequence.index
        if index not in self.readers:
            self.readers[index] = TokenReader(self.group, piece.sequence)
        return self.format_tokens(piece.sequence, self.readers[index].read(piece.num_tokens))

    def format_tokens(self, sequence: Sequence, scored: list[ScoredToken]) -> dict:
        if sequence.index not in self.decoders:
            self.decoders[sequence.index] = self.encoder.stream()
            before = [] if self.group.body.echo else sequence.prompt_tokens
            self.offsets[sequence.index] = len(decode_text(self.encoder, before))
        decoder, offsets = self.decoders[sequence.index], []
        for token, *_ in scored:
            offsets.append(self.offsets[sequence.index])
            self.offsets[sequence.index] += len(decoder.push(token)) if token < self.encoder.vocab_size else 0
        top = [None if own is None else sort_by_likelihood(self.encoder, [*likely, (token, own)])
               for token, own, likely in scored]  # fmt: skip
        texts, own = [decode_token(self.encoder, token) for token, *_ in scored], [own for _, own, _ in scored]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def find_finish_reason(piece: Piece) -> str | None:
    why = piece.sequence.finish_reason if piece.is_last else None
    return "length" if why == "full" else why


def sort_by_likelihood(encoder, tokens: list[tuple[int, float]]) -> dict[str, float]:
    """Each token's text and log probability, most likely first. Of tokens with the same text, only the most likely one.
    """
    found: dict[str, float] = {}
    for token, logprob in sorted(tokens, key=lambda item: -item[1]):
        found.setdefault(decode_token(encoder, token), logprob)
    return found


class ChatFormat(CompletionFormat):
    """The choices of one answer of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def format_whole(self, sequence: Sequence) -> dict:
        choice = self.format_piece(Piece(sequence, sequence.output, sequence.num_tokens, True))
        del choice["delta"]
        return {**choice, "message": {"role": "assistant", "content": sequence.output, "refusal": None}}

    def format_begin(self) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": sequence.index, "delta": delta, "logprobs": None, "finish_reason": None}
                for sequence in self.group.sequences]  # fmt: skip

    def format_piece(self, piece: Piece) -> dict:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.sequence.index, "delta": delta, "logprobs": self.format_logprobs(piece),
                "finish_reason": find_finish_reason(piece)}  # fmt: skip

    def format_tokens(self, sequence: Sequence, scored: list[ScoredToken]) -> dict:
        content = [
            {**self.format_token(token, own), "top_logprobs": [self.format_token(*likely) for likely in top]}
            for token, own, top in scored
        ]
        return {"content": content, "refusal": None}

    def format_token(self, token: int, logprob: float) -> dict:
        data = (self.encoder.token_bytes(token) if token < self.encoder.vocab_size
                else decode_with_sentinels(self.encoder, [token]).encode())  # fmt: skip
        return {"token": decode_token(self.encoder, token), "logprob": logprob, "bytes": list(data)}

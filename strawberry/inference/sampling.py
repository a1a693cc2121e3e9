"""Requests, and sampling of the next token of each row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from strawberry.common import UserError
from strawberry.inference.logprobs import LogprobBuffers, TokenLogprob
from strawberry.inference.penalties import LogitsProcessor
from strawberry.ops.sampling import sample


@dataclass
class Request:
    """A sequence to generate. Its random numbers depend on its seed alone."""

    prompt: list[int]  # at least one token
    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: frozenset[int] = frozenset()  # tokens that end the sequence; the one that ends it is returned too
    source: list[int] | None = None  # tokens that an encoder-decoder encodes
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token → what is added to its logit
    min_tokens: int = 0  # tokens of `stop` are not sampled before so many others
    top_logprobs: int | None = None  # return each token's log probability and those of so many likeliest; None: none
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the tokens that have arrived; the decoder appends

    @cached_property
    def processes_logits(self) -> bool:
        """Whether the logits are changed before temperature and filters."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)
        return not neutral or bool(self.logit_bias) or bool(self.min_tokens and self.stop)

    def check_tokens(self, vocab_size: int) -> None:
        """Raises UserError, which begins with the option's name, if logit_bias or stop_token_ids name a token that is
        not in the vocabulary, or if min_tokens is impossible because every token ends the text.
        """
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop)):
            if outside := [token for token in tokens if not 0 <= token < vocab_size]:
                raise UserError(f"{name}: token {outside[0]} is none of the {vocab_size} of the model's vocabulary")
        if self.min_tokens and len(self.stop) == vocab_size:
            raise UserError("stop_token_ids: has every token, so min_tokens is impossible; leave one out")


class Filters(NamedTuple):
    """The operations that sampling needs for a set of requests. A CUDA graph is captured for each combination."""

    draws: bool  # whether any request has a temperature above 0
    greedy: bool  # whether any request has temperature 0
    width: int | None  # number of largest logits to sort; None: no sort
    top_p: bool
    min_p: bool
    processes: bool = False  # whether any request has a bias, a minimum length or a penalty
    logprobs: bool = False  # whether any request has top_logprobs


class BatchSampler:
    """Each row's uniform random numbers in [0, 1) and filters, on the device. Samples a token for each row."""

    buffer_size = 1024  # random numbers of a row that are generated at a time

    def __init__(self, rows: int, vocab_size: int, device):
        self.vocab_size = vocab_size
        self.uniforms = torch.zeros(rows, self.buffer_size, device=device)
        self.num_drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p = (torch.zeros(rows, device=device) for _ in range(3))
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self.float_filters = (self.temperature, self.top_p, self.min_p)
        self.processor = LogitsProcessor(rows, vocab_size, device)
        self.logprobs = LogprobBuffers(rows, vocab_size, device)
        self.sample_all = sample  # samples all rows at once; may be compiled

    def set_row(self, row: int, r: Request) -> None:
        values = (max(r.temperature, 1e-6) if r.temperature else 0, r.top_p or 1.0, r.min_p or 0.0)
        for tensor, value in zip(self.float_filters, values, strict=True):
            tensor[row] = value
        self.top_k[row] = r.top_k or self.vocab_size
        self.num_drawn[row] = 0
        self.processor.set_row(row, r)
        if r.top_logprobs is not None and not self.logprobs.tensors:
            self.logprobs.allocate()

    def refill(self, row: int, generator: torch.Generator) -> None:
        self.uniforms[row] = torch.rand(self.buffer_size, generator=generator).to(self.uniforms.device)

    def move_row(self, source: int, target: int) -> None:
        for tensor in (self.uniforms, self.num_drawn, self.top_k, *self.float_filters):
            tensor[target] = tensor[source]
        self.processor.move_row(source, target)

    def select_filters(self, requests: Iterable[Request]) -> Filters:
        requests = list(requests)
        greedy = any(not r.temperature for r in requests)
        processes = any(r.processes_logits for r in requests)
        logprobs = any(r.top_logprobs is not None for r in requests)
        requests = [r for r in requests if r.temperature]
        limits = [r.top_k or self.vocab_size for r in requests]
        has_top_p = any(r.top_p is not None and r.top_p < 1 for r in requests)
        width = 1 << (max(limits, default=1) - 1).bit_length()
        if min(limits, default=self.vocab_size) >= self.vocab_size and not has_top_p:
            width = None  # no request needs a sort
        has_min_p = any(r.min_p for r in requests)
        width = width and min(width, self.vocab_size)
        return Filters(bool(requests), greedy, width, has_top_p, has_min_p, processes, logprobs)

    def draw(self, logits: Tensor, rows: slice, filters: Filters) -> Tensor:
        """Sample a token for each of the rows, (n,), from logits (n, V); −1 where the logits are NaN."""
        if filters.processes:
            logits = self.processor.process(logits, rows, self.num_drawn[rows])
        if not filters.draws:
            best, token = logits.max(dim=-1)
            return torch.where(best.isnan(), -1, token)
        u = self.uniforms[rows].gather(1, (self.num_drawn[rows] % self.buffer_size).unsqueeze(1)).squeeze(1)
        choose = self.sample_all if len(u) == len(self.num_drawn) else sample
        width = filters.width
        return choose(logits, u, self.temperature[rows], self.top_k[rows] if width else None,
                      self.top_p[rows] if filters.top_p else None, self.min_p[rows] if filters.min_p else None,
                      None if width == self.vocab_size else width, filters.greedy)  # fmt: skip

    def advance(self, rows: slice, logits: Tensor, token: Tensor, active: Tensor, filters: Filters) -> None:
        """Count the tokens (n,), at least 0, that the rows have drawn from logits (n, V), and store their log
        probabilities; active (n,) is 1 for rows that keep their token.
        """
        self.num_drawn[rows] += active
        if filters.processes:
            self.processor.count(rows, token, active)
        if filters.logprobs:
            self.logprobs.store(rows, logits, token)

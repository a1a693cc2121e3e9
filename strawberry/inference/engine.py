"""Text from a model as fast as the hardware reads its weights: many sequences at once, each as if it were alone.

    decoder = Decoder(model, rows=8, max_length=1024)
    for index, token, reason in generate(decoder, [Request([1, 2, 3], max_new_tokens=100, seed=7), …]):
        …

A sequence occupies a row of one cache that is allocated once. A new one joins at the next token, whatever positions the
others have reached, and its row is free again when it ends. A row draws from random numbers of its own seed, prefills
its prompt by itself, and is computed independently of the others, so its text depends on no other text: within
rounding, since matrix products and sums of other shapes add up in another order; exactly with batch_invariant, which
gives every step one shape.

On CUDA, a step for all rows, sampling included, is captured once as a CUDA graph and then replayed (step.py): one
launch for a token of each row, no decision on the host, no memory allocated. The device works one step ahead of what
the host has read. Where retention's weights change at a chunk's border, they are rebuilt for the rows concerned between
two steps.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import LanguageModel
from strawberry.common import UserError
from strawberry.inference.sampling import Request
from strawberry.inference.step import (
    DecodeStep,
    copy_to_host_async,
)


@dataclass
class RunningSequence:
    """A sequence that is being generated, as the host knows it."""

    handle: int
    request: Request
    tokens: list[int]  # the prompt, and what has arrived since
    generator: torch.Generator
    num_launched: int = 0  # new tokens that the device was asked for
    num_arrived: int = 0


class Decoder:
    """Decodes up to `rows` sequences at once with one model.

    model: in eval mode, on its device and in its dtype. max_length: tokens of a prompt and what follows it, at most.
    on_full says what happens where learned positions end: the sequence stops ("full"), or ("slide") its newest
    block_size / 2 tokens are prefilled anew and it goes on. compile makes a CUDA step faster, and takes up to a minute.
    When few rows are busy, only as many are computed (a power of two), and of the cache only what the longest row has
    filled.

    batch_invariant: a text is bit for bit the same whatever the other rows hold, on a CPU with a given number of
    threads. Every step computes all rows, reads a multiple of CACHE_ALIGNMENT slots of the cache, begins the chunks of
    one row at a time, and samples for each kind of filters separately. The number of rows and of slots still counts:
    compare texts of decoders with equal rows, max_length, max_source and min_bucket.

    min_bucket: cached tokens that a step of fixed shape (a captured one, or batch_invariant) reads at least; then twice
    as many, and so on. With batch_invariant, min_bucket = max_length makes all steps equal by construction; a lower one
    relies on kernels for which masked slots at the end change nothing, as tests show for every family.

    >>> decoder = Decoder(model, rows=2, max_length=64)
    >>> handle = decoder.admit(Request([5, 6, 7], max_new_tokens=3))
    >>> while decoder.busy:
    ...     for handle, token, reason in decoder.step(): ...     # reason: None, "stop", "length" or "full"
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, rows: int, max_length: int, *, on_full: str = "stop",
                 compile: bool = False, batch_invariant: bool = False, min_bucket: int = 256,
                 max_source: int | None = None):  # fmt: skip
        if not model.generates:
            raise UserError(f"a {model.config.arch} of kind encoder predicts masked tokens; it does not continue text")
        self.model, self.rows, self.slides = model, rows, on_full == "slide"
        self.device_step = DecodeStep(model, rows, max_length, max_source or model.config.block_size,
                                      batch_invariant=batch_invariant, min_bucket=min_bucket)  # fmt: skip
        self.batch_invariant = self.device_step.batch_invariant
        self.logits, self.sampler = self.device_step.logits, self.device_step.sampler
        self.sequences: list[RunningSequence | None] = [None] * rows
        self.handles, self.in_flight = itertools.count(1), deque()
        self.forget_prefill()
        self.lookahead = 0  # steps that the device is ahead of the host
        if model.causal and model.device.type == "cuda":
            self.lookahead = 1
            self.device_step.use_cuda_graphs(compile)

    @property
    def busy(self) -> int:
        return sum(sequence is not None for sequence in self.sequences)

    @property
    def free(self) -> int:
        return self.rows - self.busy

    @torch.no_grad()
    def admit(self, request: Request) -> int:
        """Prefill a request's prompt into a free row; its first token comes with the next step. Returns its handle."""
        check_request(self, request)
        row = self.sequences.index(None)
        generator = torch.Generator().manual_seed(request.seed)
        sequence = RunningSequence(next(self.handles), request, list(request.prompt), generator)
        self.sequences[row] = sequence
        try:
            self.sampler.set_row(row, request)
            self.start(row, sequence)
        except BaseException:
            self.free_row(row)
            raise
        return sequence.handle

    @torch.no_grad()
    def step(self) -> list[tuple[int, int, str | None]]:
        """One more token of every row. Returns (handle, token, reason) of those that have arrived; reason says why the
        sequence is over, or is None."""
        if self.in_flight and not self.lookahead:  # first tokens, there already: no need to wait for the second
            return self.collect_arrived(0)
        arrived = []
        if any(self.needs_reprefill(row) for row in range(self.rows)):
            arrived += self.collect_arrived(0)  # a row that is prefilled anew needs all its tokens
            for row in filter(self.needs_reprefill, range(self.rows)):
                self.start(row, self.sequences[row])
        if rows := list(filter(self.can_step, range(self.rows))):
            self.launch(self.compact(rows))
        return arrived + self.collect_arrived(self.lookahead if rows else 0)

    def release(self, handle: int) -> None:
        """End a sequence early: its row is free at once."""
        for row, sequence in enumerate(self.sequences):
            if sequence is not None and sequence.handle == handle:
                self.free_row(row)

    # -- beginning and ending

    def start(self, row: int, sequence: RunningSequence) -> None:
        """Prefill the sequence's tokens, the newest half of the capacity if there are too many, and draw the next."""
        tokens = sequence.tokens
        if len(tokens) > self.logits.capacity:
            tokens = tokens[-max(1, self.logits.capacity // 2) :]
        logits = self.prefill(row, tokens, sequence.request.source)
        self.refill_uniforms(row, sequence)
        token = self.device_step.sample_first(row, logits, sequence.request)
        sequence.num_launched += 1
        self.pause_if_done(row)
        self.in_flight.append(copy_to_host_async(token, [(0, sequence.handle)]))

    def prefill(self, row: int, tokens: list[int], source: list[int] | None) -> Tensor:
        """Logits (1, V) after these tokens, copied where the last row to be prefilled has just read the same."""
        other, *read, logits = self.last_prefill
        if read == [tokens, source] and self.logits.has_only(other, tokens):
            self.logits.copy_row(other, row)
        else:
            logits = self.logits.prefill(row, tokens, source)
        self.last_prefill = (row, list(tokens), source, logits)
        return logits

    def forget_prefill(self) -> None:
        """A step follows: no row is where its prompt ended any more."""
        self.last_prefill = (0, None, None, None)  # row, tokens, source, logits

    def free_row(self, row: int) -> None:
        self.sequences[row] = None
        self.device_step.free_row(row)

    def pause_if_done(self, row: int) -> None:
        """A row of which all tokens are launched waits for the last one to arrive."""
        if not self.can_step(row):
            self.device_step.active[row] = 0

    def wants_more(self, row: int) -> bool:
        sequence = self.sequences[row]
        return sequence is not None and sequence.num_launched < sequence.request.max_new_tokens

    def can_step(self, row: int) -> bool:
        return self.wants_more(row) and not self.logits.is_full(row)

    def needs_reprefill(self, row: int) -> bool:
        """Whether a row has come to where positions end, and goes on by reading its newest tokens anew."""
        return self.slides and self.wants_more(row) and self.logits.is_full(row)

    def finish_reason(self, row: int, sequence: RunningSequence, token: int) -> str | None:
        if token in sequence.request.stop:
            return "stop"
        if sequence.num_arrived == sequence.request.max_new_tokens:
            return "length"
        if sequence.num_arrived == sequence.num_launched and self.logits.is_full(row) and not self.slides:
            return "full"
        return None

    def collect_arrived(self, keep: int) -> list[tuple[int, int, str | None]]:
        """(handle, token, reason) of all steps in flight but the newest `keep`."""
        found = []
        while len(self.in_flight) > keep:
            for handle, token in self.in_flight.popleft().wait():
                row = next((i for i, s in enumerate(self.sequences) if s is not None and s.handle == handle), None)
                if row is None:  # it ended before
                    continue
                if token < 0:
                    raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint")
                sequence = self.sequences[row]
                sequence.tokens.append(token)
                sequence.num_arrived += 1
                if reason := self.finish_reason(row, sequence, token):
                    self.free_row(row)
                found.append((handle, token, reason))
        return found

    # -- a step

    def compact(self, rows: list[int]) -> list[int]:
        """Rows that are about to step, moved to the front where that makes the batch smaller."""
        n = 1 << (len(rows) - 1).bit_length()
        if not self.device_step.shrinks or max(rows) < n or self.busy > n:
            return rows
        free = [i for i in range(n) if self.sequences[i] is None]
        for source, target in zip([i for i in rows if i >= n], free, strict=False):
            self.device_step.move_row(source, target)
            self.sequences[target], self.sequences[source] = self.sequences[source], None
        return list(filter(self.can_step, range(n)))

    def launch(self, rows: list[int]) -> None:
        sequences = [self.sequences[row] for row in rows]
        for row, sequence in zip(rows, sequences, strict=True):
            self.refill_uniforms(row, sequence)
        self.forget_prefill()
        self.device_step.launch_rows(rows, [sequence.request for sequence in sequences])
        for row, sequence in zip(rows, sequences, strict=True):
            sequence.num_launched += 1
            self.pause_if_done(row)
        owners = [(row, sequence.handle) for row, sequence in zip(rows, sequences, strict=True)]
        self.in_flight.append(copy_to_host_async(self.device_step.sampled, owners))

    def refill_uniforms(self, row: int, sequence: RunningSequence) -> None:
        if sequence.num_launched % self.sampler.buffer_size == 0:
            self.sampler.refill(row, sequence.generator)


def check_request(decoder: Decoder, r: Request) -> None:
    """Raises UserError where the decoder's model or cache cannot take the request."""
    capacity, vocab_size = decoder.logits.capacity, decoder.model.config.vocab_size
    if not r.prompt or r.max_new_tokens < 1:
        raise UserError("a text needs a prompt of at least one token, and at least one token to be made")
    if decoder.model.takes_source and not r.source:
        raise UserError("an encoder-decoder needs a source of at least one token")
    if outside := [token for token in r.prompt if not 0 <= token < vocab_size]:
        raise UserError(f"token {outside[0]} is none of the {vocab_size} of the model's vocabulary")
    if decoder.model.max_positions is not None and decoder.model.causal:
        if len(r.prompt) > capacity and not decoder.slides:
            raise UserError(f"the prompt's {len(r.prompt)} tokens exceed {capacity}, where positions end; shorten "
                            "it, or slide on (--on_full slide), which reads the newest only")
    elif len(r.prompt) + r.max_new_tokens - 1 > capacity:
        raise UserError(f"a prompt of {len(r.prompt)} tokens and {r.max_new_tokens} new ones exceed max_length "
                        f"{capacity}; ask for less, or make a larger Decoder")


def generate(decoder: Decoder, requests: Iterable[Request]) -> Iterator[tuple[int, int, str | None]]:
    """(index of the request, token, reason why it ended or None) as they come; requests take rows that become free."""
    waiting, index = enumerate(requests), {}
    while True:
        for i, request in itertools.islice(waiting, decoder.free):
            index[decoder.admit(request)] = i
        if not index:
            return
        for handle, token, reason in decoder.step():
            yield index[handle], token, reason
            if reason:
                del index[handle]

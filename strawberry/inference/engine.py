"""The decoding engine: continuous batching of sequences whose texts do not depend on each other.

    decoder = Decoder(model, rows=8, max_length=1024)
    for index, token, reason in generate(decoder, [Request([1, 2, 3], max_new_tokens=100, seed=7), …]):
        …

A sequence occupies one row of a cache that is allocated once. A new sequence joins at any decode step, whatever the
positions of the others, and its row is free again when it ends. A row samples with random numbers from its own seed
and is computed independently of the other rows. So its text does not depend on other texts: up to rounding by default,
because matrix products and sums of other shapes add in another order; exactly with batch_invariant, which gives every
step the same shape and prefills each prompt alone.

On CUDA, a decode step of all rows, with sampling, is captured once as a CUDA graph and then replayed (step.py). One
launch generates a token for each row, without a host decision or an allocation. The device runs one step ahead of the
tokens that the host has read. Retention's chunk weights change at chunk boundaries: they are rebuilt between two steps,
for the rows at a boundary only.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import LanguageModel
from strawberry.common import UserError
from strawberry.inference.logprobs import read_logprob
from strawberry.inference.sampling import Request
from strawberry.inference.step import DecodeStep

PREFILL_TOKENS = 16384  # in one pass over the prompts of several rows, at most


@dataclass
class RunningSequence:
    """The host's state of a sequence that is being generated."""

    handle: int
    request: Request
    tokens: list[int]  # the prompt and the tokens that have arrived
    generator: torch.Generator
    num_launched: int = 0  # new tokens whose steps are launched
    num_arrived: int = 0


class Decoder:
    """Decodes up to `rows` sequences at once with one model.

    model: in eval mode, on its device and in its dtype. max_length: the largest number of tokens of a prompt and
    its continuation. on_full: the action at the last learned position. With "stop" the sequence ends (reason
    "full"); with "slide" its newest capacity / 2 tokens are prefilled again and decoding continues. If only some
    rows are busy, a step computes the first n rows, n a power of two. compile: makes a step on CUDA faster, and
    takes up to a minute. On a CPU, the operations of a step are recorded and then replayed: see recording.py. fuse:
    whether a compiled step on CUDA computes a product of up to 64 rows and the operations around it as one kernel;
    False is for comparison.

    batch_invariant: a text is bit for bit the same whatever the other rows contain, on a CPU with a given number of
    threads. Every step computes all rows, reads a multiple of CACHE_ALIGNMENT slots of the cache, begins the chunks of
    one row at a time, and samples separately for each combination of filters. The text still depends on the number of
    rows and slots: compare only decoders with equal rows, max_length, max_source and min_bucket.

    min_bucket: the smallest bucket, in cached tokens, of a step of fixed shape (a CUDA graph, a recorded step, or
    batch_invariant). Each further bucket is twice as large. With batch_invariant, min_bucket = max_length makes all
    steps equal by construction. A smaller one relies on kernels whose results do not change with masked slots at the
    end; tests check this for every model family.

    >>> decoder = Decoder(model, rows=2, max_length=64)
    >>> handle = decoder.admit(Request([5, 6, 7], max_new_tokens=3))
    >>> while decoder.busy:
    ...     for handle, token, reason in decoder.step(): ...     # reason: None, "stop", "length" or "full"
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, rows: int, max_length: int, *, on_full: str = "stop",
                 compile: bool = False, fuse: bool = True, batch_invariant: bool = False, min_bucket: int = 256,
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
        self.lookahead = 0  # steps that the device runs ahead of the host
        if model.causal and model.device.type == "cuda":
            self.lookahead = 1
            self.device_step.use_cuda_graphs(compile, fuse)
        elif model.causal and model.device.type == "cpu" and not self.batch_invariant:
            self.device_step.record_on_cpu()

    @property
    def busy(self) -> int:
        return sum(sequence is not None for sequence in self.sequences)

    @property
    def free(self) -> int:
        return self.rows - self.busy

    @torch.no_grad()
    def admit(self, request: Request) -> int:
        """Prefill a request's prompt into a free row. The next step returns its first token. Returns a handle."""
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
    def admit_all(self, requests: Sequence[Request]) -> list[int]:
        """`admit` for several requests, at most as many as rows are free. Prompts of similar lengths are prefilled in
        one pass, unless the decoder is batch_invariant. Returns the handles, in the order of the requests.
        """
        for request in requests:
            check_request(self, request)
        handles, order = {}, sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        while order:
            group = self.choose_prefill_group([requests[i] for i in order])
            chosen, order = order[: len(group)], order[len(group) :]
            admitted = self.admit_group(group) if len(group) > 1 else [self.admit(group[0])]
            handles |= dict(zip(chosen, admitted, strict=True))
        return [handles[i] for i in range(len(requests))]

    @torch.no_grad()
    def step(self) -> list[tuple[int, int, str | None]]:
        """Generate one more token of every row. Returns (handle, token, reason) of the tokens that have arrived; reason
        says why the sequence ended, None if it did not.
        """
        if self.in_flight and not self.lookahead:  # first tokens of prefills, available before the next step
            return self.collect_arrived(0)
        arrived = []
        if any(self.needs_reprefill(row) for row in range(self.rows)):
            arrived += self.collect_arrived(0)  # a row's second prefill needs all its tokens on the host
            for row in filter(self.needs_reprefill, range(self.rows)):
                self.start(row, self.sequences[row])
        if rows := list(filter(self.can_step, range(self.rows))):
            self.launch(self.compact(rows))
        return arrived + self.collect_arrived(self.lookahead if rows else 0)

    def release(self, handle: int) -> None:
        """End a sequence early. Its row is free immediately."""
        for row, sequence in enumerate(self.sequences):
            if sequence is not None and sequence.handle == handle:
                self.free_row(row)

    # -- beginning and ending

    def choose_prefill_group(self, requests: list[Request]) -> list[Request]:
        """The first of these requests, which are sorted by length, that one pass prefills: into rows that follow each
        other, with at most PREFILL_TOKENS tokens and at most twice as many as the prompts have. Equal prompts are
        prefilled once, one after the other.
        """
        first, most = self.sequences.index(None), 1
        while most < len(requests) and first + most < self.rows and self.sequences[first + most] is None:
            most += 1
        can_group = self.model.causal and not self.model.takes_source and not self.batch_invariant
        can_group &= requests[0].prompt != self.last_prefill[1]  # if equal, that row is copied
        n, total = 1, len(requests[0].prompt)
        while can_group and n < most:
            longest = len(requests[n].prompt)
            total += longest
            fits = (n + 1) * longest <= min(2 * total, PREFILL_TOKENS) and longest <= self.logits.capacity
            if not fits or requests[n].prompt == requests[n - 1].prompt:
                break
            n += 1
        return requests[:n]

    def admit_group(self, requests: list[Request]) -> list[int]:
        """Prefill these requests' prompts in one pass, into rows that follow each other. Returns the handles."""
        first = self.sequences.index(None)
        rows = range(first, first + len(requests))
        try:
            for row, request in zip(rows, requests, strict=True):
                generator = torch.Generator().manual_seed(request.seed)
                self.sequences[row] = RunningSequence(next(self.handles), request, list(request.prompt), generator)
                self.sampler.set_row(row, request)
            logits = self.logits.prefill_together(first, [request.prompt for request in requests])
            for row in rows:
                self.sample_first(row, self.sequences[row], logits[row - first : row - first + 1])
        except BaseException:
            for row in rows:
                self.free_row(row)
            raise
        self.last_prefill = (rows[-1], list(requests[-1].prompt), None, logits[-1:])
        return [self.sequences[row].handle for row in rows]

    def start(self, row: int, sequence: RunningSequence) -> None:
        """Prefill the sequence's tokens and sample the next one. If they exceed the capacity, prefill the newest
        capacity / 2.
        """
        tokens = sequence.tokens
        if len(tokens) > self.logits.capacity:
            tokens = tokens[-max(1, self.logits.capacity // 2) :]
        self.sample_first(row, sequence, self.prefill(row, tokens, sequence.request.source))

    def sample_first(self, row: int, sequence: RunningSequence, logits: Tensor) -> None:
        """Sample the token after a prefill from its logits (1, V)."""
        self.refill_uniforms(row, sequence)
        self.device_step.sample_first(row, logits, sequence.request)
        sequence.num_launched += 1
        self.pause_if_done(row)
        copy = self.device_step.copy_tokens(slice(row, row + 1), [sequence.request], [(0, sequence.handle)])
        self.in_flight.append(copy)

    def prefill(self, row: int, tokens: list[int], source: list[int] | None) -> Tensor:
        """Logits (1, V) after these tokens. If the most recently prefilled row has the same tokens and source, its
        cache row is copied.
        """
        other, *read, logits = self.last_prefill
        if read == [tokens, source] and self.logits.has_only(other, tokens):
            self.logits.copy_row(other, row)
        else:
            logits = self.logits.prefill(row, tokens, source)
        self.last_prefill = (row, list(tokens), source, logits)
        return logits

    def forget_prefill(self) -> None:
        """Invalidate last_prefill before a decode step, which appends tokens to the rows."""
        self.last_prefill = (0, None, None, None)  # row, tokens, source, logits

    def free_row(self, row: int) -> None:
        self.sequences[row] = None
        self.device_step.free_row(row)

    def pause_if_done(self, row: int) -> None:
        """Deactivate a row whose tokens are all launched, until the last one arrives."""
        if not self.can_step(row):
            self.device_step.active[row] = 0

    def wants_more(self, row: int) -> bool:
        sequence = self.sequences[row]
        return sequence is not None and sequence.num_launched < sequence.request.max_new_tokens

    def can_step(self, row: int) -> bool:
        return self.wants_more(row) and not self.logits.is_full(row)

    def needs_reprefill(self, row: int) -> bool:
        """Whether a row has reached the last position and continues from a prefill of its newest tokens."""
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
        """(handle, token, reason) of all steps in flight except the newest `keep`."""
        found = []
        while len(self.in_flight) > keep:
            copy = self.in_flight.popleft()
            for handle, token, index in copy.wait():
                row = next((i for i, s in enumerate(self.sequences) if s is not None and s.handle == handle), None)
                if row is None:  # the sequence ended at an earlier token
                    continue
                if token < 0:
                    raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint")
                sequence = self.sequences[row]
                sequence.tokens.append(token)
                sequence.num_arrived += 1
                if (num_top := sequence.request.top_logprobs) is not None:
                    sequence.request.logprobs.append(read_logprob(copy.logprobs, index, num_top))
                if reason := self.finish_reason(row, sequence, token):
                    self.free_row(row)
                found.append((handle, token, reason))
        return found

    # -- a step

    def compact(self, rows: list[int]) -> list[int]:
        """The rows of the next step, after moves to the front of the batch where these make the batch smaller."""
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
        requests = [sequence.request for sequence in sequences]
        self.device_step.launch_rows(rows, requests)
        for row, sequence in zip(rows, sequences, strict=True):
            sequence.num_launched += 1
            self.pause_if_done(row)
        owners = [(row, sequence.handle) for row, sequence in zip(rows, sequences, strict=True)]
        self.in_flight.append(self.device_step.copy_tokens(slice(0, self.rows), requests, owners))

    def refill_uniforms(self, row: int, sequence: RunningSequence) -> None:
        if sequence.num_launched % self.sampler.buffer_size == 0:
            self.sampler.refill(row, sequence.generator)


def check_request(decoder: Decoder, r: Request) -> None:
    """Raises UserError if the request does not fit the decoder's model or cache."""
    capacity, vocab_size = decoder.logits.capacity, decoder.model.config.vocab_size
    if not r.prompt or r.max_new_tokens < 1:
        raise UserError("a text needs a prompt of at least one token, and at least one new token")
    if decoder.model.takes_source and not r.source:
        raise UserError("an encoder-decoder needs a source of at least one token")
    if outside := [token for token in r.prompt if not 0 <= token < vocab_size]:
        raise UserError(f"token {outside[0]} is none of the {vocab_size} of the model's vocabulary")
    r.check_tokens(vocab_size)
    if decoder.model.max_positions is not None and decoder.model.causal:
        if len(r.prompt) > capacity and not decoder.slides:
            raise UserError(f"the prompt's {len(r.prompt)} tokens exceed {capacity}, the number of positions; shorten "
                            "it, or use --on_full slide, which prefills the newest tokens only")
    elif len(r.prompt) + r.max_new_tokens - 1 > capacity:
        raise UserError(f"a prompt of {len(r.prompt)} tokens and {r.max_new_tokens} new ones exceed max_length "
                        f"{capacity}; generate fewer, or give the Decoder a larger max_length")


def generate(decoder: Decoder, requests: Iterable[Request]) -> Iterator[tuple[int, int, str | None]]:
    """Yield (index of the request, token, finish reason or None) as tokens arrive. Waiting requests take free rows."""
    waiting, index = enumerate(requests), {}
    while True:
        new = list(itertools.islice(waiting, decoder.free))
        index |= zip(decoder.admit_all([request for _, request in new]), (i for i, _ in new), strict=True)
        if not index:
            return
        for handle, token, reason in decoder.step():
            yield index[handle], token, reason
            if reason:
                del index[handle]

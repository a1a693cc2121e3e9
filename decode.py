"""Text from a model as fast as the hardware reads its weights: many texts at once, each as if it were alone.

    decoder = Decoder(model, rows=8, max_length=1024)
    for index, token, ended in texts(decoder, [Request([1, 2, 3], max_new_tokens=100, seed=7), …]):
        …

A text sits in a row of one cache that is allocated once. A new one joins at the next token, wherever the others stand,
and its row is free again when it ends. A row draws from numbers of its own seed, reads its prompt by itself, and is
computed apart from the others, so its text depends on no other text: within rounding, since matrix products and sums of
other shapes add up in another order; exactly with batch_invariant, which gives every step one shape.

On CUDA, a step for all rows, the draw included, is recorded once as a graph and then replayed: one launch for a token
of each row, no decision on the host, no memory allocated. The device works one step ahead of what the host has read.
Where retention's weights change at a chunk's border, this is done for the rows concerned between two steps.

Index:  requests · drawing · how logits come about: through a cache, or anew · steps · the decoder · texts ·
        8-bit weights
"""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import LanguageModel
from options import UserError
from strawberry.cache import RingKVCache, iter_layer_caches
from strawberry.ops.common import to_accum_dtype
from strawberry.ops.linear import Int8Weight, quantize_int8
from strawberry.ops.sampling import sample

# ---- requests ------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A text to be made. What it draws depends on its seed alone."""

    prompt: list[int]  # at least one token
    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token each time
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    stop: frozenset[int] = frozenset()  # tokens that end it; the one that does is given out last
    source: list[int] | None = None  # what an encoder-decoder reads


@dataclass
class Row:
    """A text under way, as the host knows it."""

    handle: int
    request: Request
    tokens: list[int]  # the prompt, and what has arrived since
    numbers: torch.Generator
    asked: int = 0  # new tokens asked of the device
    arrived: int = 0


# ---- drawing -------------------------------------------------------------------------------------------------------


class Draws:
    """Each row's numbers in [0, 1) and filters, on the device, and which filters any row uses."""

    ahead = 1024  # numbers drawn at a time

    def __init__(self, rows: int, vocab_size: int, device):
        self.vocab_size = vocab_size
        self.numbers = torch.zeros(rows, self.ahead, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p = (torch.zeros(rows, device=device) for _ in range(3))
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)
        self.floats = (self.temperature, self.top_p, self.min_p)
        self.sample_all = sample  # for all rows at once; may be compiled

    def set(self, row: int, r: Request) -> None:
        for mine, value in zip(self.floats, (max(r.temperature, 1e-6) if r.temperature else 0, r.top_p or 1.0,
                                             r.min_p or 0.0), strict=True):  # fmt: skip
            mine[row] = value
        self.top_k[row] = r.top_k or self.vocab_size
        self.count[row] = 0

    def refill(self, row: int, generator: torch.Generator) -> None:
        self.numbers[row] = torch.rand(self.ahead, generator=generator).to(self.numbers.device)

    def move(self, source: int, target: int) -> None:
        for mine in (self.numbers, self.count, self.top_k, *self.floats):
            mine[target] = mine[source]

    def filters(self, requests: Iterable[Request]) -> tuple:
        """What has to be computed at all: (draws, greedy too, width or None, top_p, min_p). A recorded step is made for
        it."""
        greedy = any(not r.temperature for r in requests)
        requests = [r for r in requests if r.temperature]
        limits = [r.top_k or self.vocab_size for r in requests]
        by_p = any(r.top_p is not None and r.top_p < 1 for r in requests)
        width = 1 << (max(limits, default=1) - 1).bit_length()
        if min(limits, default=self.vocab_size) >= self.vocab_size and not by_p:
            width = None  # nobody sorts
        return bool(requests), greedy, width and min(width, self.vocab_size), by_p, any(r.min_p for r in requests)

    def draw(self, logits: Tensor, rows: slice, filters: tuple) -> Tensor:
        """A token for each of the rows (n,), −1 where logits (n, V) are NaN."""
        draws, greedy, width, by_p, by_min = filters
        if not draws:
            best, token = logits.max(dim=-1)
            return torch.where(best.isnan(), -1, token)
        u = self.numbers[rows].gather(1, (self.count[rows] % self.ahead).unsqueeze(1)).squeeze(1)
        choose = self.sample_all if len(u) == len(self.count) else sample
        return choose(logits, u, self.temperature[rows], self.top_k[rows] if width else None,
                      self.top_p[rows] if by_p else None, self.min_p[rows] if by_min else None,
                      None if width == self.vocab_size else width, greedy)  # fmt: skip


# ---- how logits come about -----------------------------------------------------------------------------------------


ALIGNMENT = 64  # cache slots: a multiple of every vector's length, so that sums over slots end alike


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Through:
    """Logits through a cache: each token is computed once."""

    def __init__(self, model: LanguageModel, rows: int, max_length: int, max_source: int, batch_invariant: bool):
        self.model, self.step, self.parts, self.batch_invariant = model, model.decode_step, {}, batch_invariant
        self.room = min(max_length, model.max_positions or max_length)
        size = round_up(self.room, ALIGNMENT) if batch_invariant else self.room
        size = min(size, model.max_positions or size)
        self.cache = model.new_cache(rows, size, max_source=max_source if model.takes_source else None)
        self.cache.positions[:] = -1  # nobody's

    def begin(self, row: int, tokens: list[int], source: list[int] | None) -> Tensor:
        """Logits (1, V) after a prompt, which the row reads from its start."""
        self.cache.reset(row)
        mine, device = self.cache.slice(slice(row, row + 1)), self.cache.positions.device
        if source is not None:
            self.model.set_source(torch.tensor([source], device=device), mine)
        logits = self.model.logits_after(torch.tensor([tokens], device=device), mine)
        self.cache.lengths[row] = len(tokens)
        return logits

    def smallest_bucket(self, smallest: int) -> int:
        """`smallest`, doubled until a ring whose size is no multiple of ALIGNMENT is read whole from the first step."""
        sizes = [state.size for state in iter_layer_caches(self.cache.layers) if isinstance(state, RingKVCache)]
        while smallest < max((size for size in sizes if size % ALIGNMENT), default=0):
            smallest *= 2
        return smallest

    def full(self, row: int) -> bool:
        return self.cache.lengths[row] >= self.room

    def ready(self, rows: list[int]) -> int:
        """To be called before a step of these rows: those at a border get their next chunk's weights. Returns how many
        tokens a row holds before the step, at most."""
        length, chunk = self.cache.lengths, self.model.chunk_size
        if chunk and (border := [row for row in rows if length[row] % chunk == 0]):
            for some in [[row] for row in border] if self.batch_invariant else [border]:
                self.model.begin_chunks(self.cache, some)
        held = max(length[row] for row in rows)
        for row in rows:
            length[row] += 1
        return held

    def after(self, token: Tensor, held: int) -> Tensor:
        """Logits (n, V) after one more token (n,) of the first n rows."""
        n = len(token)
        if n not in self.parts:
            self.parts[n] = self.cache.slice(slice(0, n))
        return self.step(token, self.parts[n], held)

    def advance(self, live: Tensor) -> None:
        self.cache.positions[: len(live)] += live

    def end(self, row: int) -> None:
        self.cache.positions[row], self.cache.lengths[row] = -1, 0

    def stands_after(self, row: int, tokens: list[int]) -> bool:
        """Whether a row that has read these tokens is still somebody's."""
        return self.cache.lengths[row] == len(tokens)

    def copy(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)

    def move(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)
        self.end(source)


class Anew:
    """Logits computed from the last block_size tokens each time, row by row: for models that see the future, or other
    rows, and so have no cache."""

    room = 2**62

    def __init__(self, model: LanguageModel, rows: int, max_length: int, max_source: int, batch_invariant: bool):
        self.model, self.texts = model, {}

    def begin(self, row: int, tokens: list[int], source: None) -> Tensor:
        self.texts[row] = list(tokens)
        return self.of(row)

    def of(self, row: int) -> Tensor:
        newest = self.texts[row][-self.model.config.block_size :]
        return to_accum_dtype(self.model(torch.tensor([newest], device=self.model.device))[0][:, -1])

    def smallest_bucket(self, smallest: int) -> int:
        return smallest

    def full(self, row: int) -> bool:
        return False

    def ready(self, rows: list[int]) -> int:
        return 0

    def after(self, token: Tensor, held: int) -> Tensor:
        logits = torch.zeros(len(token), self.model.config.vocab_size, device=token.device)
        for row, newest in enumerate(token.tolist()):
            if row in self.texts:
                self.texts[row].append(newest)
                logits[row] = self.of(row)[0]
        return logits

    def advance(self, live: Tensor) -> None:
        pass

    def end(self, row: int) -> None:
        self.texts.pop(row, None)

    def stands_after(self, row: int, tokens: list[int]) -> bool:
        return self.texts.get(row) == tokens

    def copy(self, source: int, target: int) -> None:
        self.texts[target] = list(self.texts[source])

    def move(self, source: int, target: int) -> None:
        self.texts[target] = self.texts.pop(source)


# ---- steps ---------------------------------------------------------------------------------------------------------


@dataclass
class Copy:
    """Tokens on their way to the host, and whose they are."""

    tokens: Tensor
    owners: list[tuple[int, int]]  # (place in tokens, handle)
    done: torch.cuda.Event | None = None

    def read(self) -> list[tuple[int, int]]:
        """(handle, token) of each."""
        if self.done is not None:
            self.done.synchronize()
        tokens = self.tokens.tolist()
        return [(handle, tokens[place]) for place, handle in self.owners]


def copied(tokens: Tensor, owners: list[tuple[int, int]]) -> Copy:
    if not tokens.is_cuda:
        return Copy(tokens.clone(), owners)
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return Copy(host, owners, done)


def compiled(function, rows: int):
    """Fewer, larger launches. With one row, products become sums that are computed along with what surrounds them."""
    return torch.compile(function, dynamic=False, options={"coordinate_descent_tuning": rows == 1})


class Graphs:
    """Steps recorded as CUDA graphs, one for each shape and kind, when first asked for. `rehearse` does, without any
    effect, what a kind does on its first call only."""

    def __init__(self, run, rehearse):
        self.run, self.rehearse = run, rehearse
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, *kind) -> None:
        if kind not in self.recorded:
            self.rehearse(*kind)
            self.recorded[kind] = self.record(kind)
        self.recorded[kind].replay()

    def record(self, kind: tuple) -> torch.cuda.CUDAGraph:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # another graph that is collected meanwhile would spoil this one
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.run(*kind)
        finally:
            if collects:
                gc.enable()
        return graph


# ---- the decoder ---------------------------------------------------------------------------------------------------


class Decoder:
    """Rows of text under way on one model.

    model: in eval mode, on its device and in its dtype. rows: texts at once. max_length: tokens of a prompt and what
    follows it, at most. on_full says what happens where learned positions end: the text stops ("full"), or ("slide")
    its newest block_size / 2 tokens are read anew and it goes on. compile makes a CUDA step faster, and takes up to a
    minute. When few rows are busy, only as many are computed (a power of two), and of the cache only what the longest
    row has filled.

    batch_invariant: a text is bit for bit the same whatever the other rows hold, on a CPU with a given number of
    threads. Every step computes all rows, reads a multiple of ALIGNMENT slots of the cache, opens the chunks of one row
    at a time, and draws for each kind of filters separately. The number of rows and of slots still counts: compare
    texts of decoders with equal rows, max_length, max_source and smallest.

    smallest: cached tokens that a step of fixed shape (one that is recorded, or batch_invariant) reads at least; then
    twice as many, and so on. With batch_invariant, smallest = max_length makes all steps equal by construction; a lower
    one relies on kernels for which masked slots at the end change nothing, as tests show for every family.

    >>> decoder = Decoder(model, rows=2, max_length=64)
    >>> handle = decoder.admit(Request([5, 6, 7], max_new_tokens=3))
    >>> while decoder.busy:
    ...     for handle, token, ended in decoder.step(): ...      # ended: None, "stop", "length" or "full"
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, rows: int, max_length: int, *, on_full: str = "stop",
                 compile: bool = False, batch_invariant: bool = False, smallest: int = 256,
                 max_source: int | None = None):  # fmt: skip
        if not model.generates:
            raise UserError(f"a {model.config.arch} of kind encoder predicts masked tokens; it does not continue text")
        device = model.device
        self.model, self.rows, self.slides = model, rows, on_full == "slide"
        way = Through if model.causal else Anew
        self.batch_invariant = batch_invariant and device.type == "cpu"
        self.logits = way(model, rows, max_length, max_source or model.config.block_size, self.batch_invariant)
        self.draws = Draws(rows, model.config.vocab_size, device)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # the newest of each row
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)  # the same, but −1 for NaN
        self.live = torch.zeros(rows, dtype=torch.int64, device=device)  # 1 where a row has a text under way
        self.at: list[Row | None] = [None] * rows
        self.handles, self.under_way = itertools.count(1), deque()
        self.forget()
        self.shrink, self.launch, self.ahead, self.smallest = not batch_invariant, self.run, 0, smallest
        self.bucket = self.logits.smallest_bucket(smallest) if self.batch_invariant else None
        if model.causal and device.type == "cuda":
            self.record(compile)

    def record(self, compile: bool) -> None:
        """From now on, steps are recorded and replayed. Whatever happens on a first call only happens here; all rows
        are nobody's yet, so it does no harm."""
        self.bucket, self.ahead = self.smallest, 1
        if compile:  # for one shape only: every further one would take as long again
            self.logits.step = compiled(self.model.decode_step, self.rows)
            self.draws.sample_all = compiled(sample, self.rows) if self.rows == 1 else sample
            self.bucket, self.shrink = self.logits.room, False
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run(*self.kind(self.rows, 0, []))
        torch.cuda.current_stream().wait_stream(stream)
        self.launch = Graphs(self.run, self.rehearse)

    # -- what a caller sees

    @property
    def busy(self) -> int:
        return sum(row is not None for row in self.at)

    @property
    def free(self) -> int:
        return self.rows - self.busy

    @torch.no_grad()
    def admit(self, request: Request) -> int:
        """Read a request's prompt into a free row; its first token comes with the next step. Returns its handle."""
        self.check(request)
        place = self.at.index(None)
        row = Row(next(self.handles), request, list(request.prompt), torch.Generator().manual_seed(request.seed))
        self.at[place] = row
        try:
            self.draws.set(place, request)
            self.begin(place, row)
        except BaseException:
            self.end(place)
            raise
        return row.handle

    @torch.no_grad()
    def step(self) -> list[tuple[int, int, str | None]]:
        """One more token of every row. Returns (handle, token, ended) of those that have arrived; ended says why the
        text is over, or None."""
        if self.under_way and not self.ahead:  # first tokens, there already: a reader need not wait for the second
            return self.arrivals(0)
        arrived = []
        if any(self.stuck(place) for place in range(self.rows)):
            arrived += self.arrivals(0)  # who reads anew must have read all
            for place in filter(self.stuck, range(self.rows)):
                self.begin(place, self.at[place])
        if places := list(filter(self.steps, range(self.rows))):
            self.go(self.gather(places))
        return arrived + self.arrivals(self.ahead if places else 0)

    def release(self, handle: int) -> None:
        """The text is over, as its reader knows."""
        for place, row in enumerate(self.at):
            if row is not None and row.handle == handle:
                self.end(place)

    # -- beginning and ending

    def check(self, r: Request) -> None:
        room, vocab_size = self.logits.room, self.model.config.vocab_size
        if not r.prompt or r.max_new_tokens < 1:
            raise UserError("a text needs a prompt of at least one token, and at least one token to be made")
        if self.model.takes_source and not r.source:
            raise UserError("an encoder-decoder needs a source of at least one token")
        if outside := [token for token in r.prompt if not 0 <= token < vocab_size]:
            raise UserError(f"token {outside[0]} is none of the {vocab_size} of the model's vocabulary")
        if self.model.max_positions is not None and self.model.causal:
            if len(r.prompt) > room and not self.slides:
                raise UserError(f"the prompt's {len(r.prompt)} tokens exceed {room}, where positions end; shorten it, "
                                "or slide on (--on_full slide), which reads the newest only")
        elif len(r.prompt) + r.max_new_tokens - 1 > room:
            raise UserError(f"a prompt of {len(r.prompt)} tokens and {r.max_new_tokens} new ones exceed max_length "
                            f"{room}; ask for less, or make a larger Decoder")

    def begin(self, place: int, row: Row) -> None:
        """Read the row's tokens, the newest half of the room if there are too many, and draw what follows."""
        tokens = row.tokens
        if len(tokens) > self.logits.room:
            tokens = tokens[-max(1, self.logits.room // 2) :]
        logits = self.read(place, tokens, row.request.source)
        self.refill(place, row)
        where = slice(place, place + 1)
        token = self.draws.draw(logits, where, self.draws.filters([row.request]))
        self.settle(where, token)
        self.live[place] = 1
        self.draws.count[place] += 1
        row.asked += 1
        self.pause(place)
        self.under_way.append(copied(token, [(0, row.handle)]))

    def read(self, place: int, tokens: list[int], source: list[int] | None) -> Tensor:
        """Logits (1, V) after these tokens, copied where the last row to begin has just read the same."""
        twin, *what, logits = self.newest
        if what == [tokens, source] and self.logits.stands_after(twin, tokens):
            self.logits.copy(twin, place)
        else:
            logits = self.logits.begin(place, tokens, source)
        self.newest = (place, list(tokens), source, logits)
        return logits

    def forget(self) -> None:
        """Nobody stands after its prompt any more."""
        self.newest = (0, None, None, None)  # the last row to begin: place, tokens, source, logits

    def end(self, place: int) -> None:
        self.at[place] = None
        self.live[place] = 0
        self.logits.end(place)

    def pause(self, place: int) -> None:
        """A row that has asked for all it may waits for the last token to arrive."""
        if not self.steps(place):
            self.live[place] = 0

    def steps(self, place: int) -> bool:
        row = self.at[place]
        return row is not None and row.asked < row.request.max_new_tokens and not self.logits.full(place)

    def stuck(self, place: int) -> bool:
        """Whether a row has come to where positions end, and goes on by reading anew."""
        row = self.at[place]
        return self.slides and row is not None and row.asked < row.request.max_new_tokens and self.logits.full(place)

    def why(self, place: int, row: Row, token: int) -> str | None:
        if token in row.request.stop:
            return "stop"
        if row.arrived == row.request.max_new_tokens:
            return "length"
        if row.arrived == row.asked and self.logits.full(place) and not self.slides:
            return "full"
        return None

    def arrivals(self, left: int) -> list[tuple[int, int, str | None]]:
        """Read back all but the newest `left` of what is under way."""
        found = []
        while len(self.under_way) > left:
            for handle, token in self.under_way.popleft().read():
                place = next((i for i, row in enumerate(self.at) if row is not None and row.handle == handle), None)
                if place is None:  # it ended before
                    continue
                if token < 0:
                    raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint")
                row = self.at[place]
                row.tokens.append(token)
                row.arrived += 1
                if why := self.why(place, row, token):
                    self.end(place)
                found.append((handle, token, why))
        return found

    # -- a step

    def gather(self, places: list[int]) -> list[int]:
        """Rows that are about to step, moved to the front where that makes the batch smaller."""
        n = 1 << (len(places) - 1).bit_length()
        if not self.shrink or max(places) < n or sum(row is not None for row in self.at) > n:
            return places
        holes = [i for i in range(n) if self.at[i] is None]
        for source, target in zip([i for i in places if i >= n], holes, strict=False):
            self.move(source, target)
        return list(filter(self.steps, range(n)))

    def move(self, source: int, target: int) -> None:
        self.logits.move(source, target)
        self.draws.move(source, target)
        for mine in (self.token, self.live):
            mine[target] = mine[source]
        self.live[source] = 0
        self.at[target], self.at[source] = self.at[source], None

    def go(self, places: list[int]) -> None:
        rows = [self.at[place] for place in places]
        for place, row in zip(places, rows, strict=True):
            if row.asked % self.draws.ahead == 0:
                self.refill(place, row)
        self.forget()
        held = self.logits.ready(places)
        n = 1 << max(places).bit_length() if self.shrink else self.rows
        kind = self.kind(min(n, self.rows), held, [row.request for row in rows])
        if self.batch_invariant:
            self.run_batch_invariant(kind[1], places)
        else:
            self.launch(*kind)
        owners = []
        for place, row in zip(places, rows, strict=True):
            row.asked += 1
            owners.append((place, row.handle))
            self.pause(place)
        self.under_way.append(copied(self.drawn, owners))

    def kind(self, n: int, held: int, requests: list[Request]) -> tuple:
        """What a recorded step is made for: how many rows, tokens held, filters."""
        if self.batch_invariant:
            held = (self.bucket << (held // self.bucket).bit_length()) - 1  # the step's own token makes it a bucket
        elif self.bucket is not None:
            held = min(self.bucket << (held // self.bucket).bit_length(), self.logits.room)
        return n, held, self.draws.filters(requests)

    def run(self, n: int, held: int, filters: tuple) -> None:
        """A step of the first n rows: nothing in it depends on what the host knows."""
        token = self.draws.draw(self.logits.after(self.token[:n], held), slice(0, n), filters)
        self.finish_step(n, token)

    def run_batch_invariant(self, held: int, places: list[int]) -> None:
        """A step of all rows in which each is drawn as its own filters alone would have it."""
        logits, token = self.logits.after(self.token, held), torch.zeros_like(self.token)
        groups: dict[tuple, list[int]] = {}
        for place in places:
            groups.setdefault(self.draws.filters([self.at[place].request]), []).append(place)
        for filters, some in groups.items():
            token[some] = self.draws.draw(logits, slice(0, self.rows), filters)[some]
        self.finish_step(self.rows, token)

    def finish_step(self, n: int, token: Tensor) -> None:
        live = self.live[:n]
        self.settle(slice(0, n), token)
        self.logits.advance(live)
        self.draws.count[:n] += live

    def rehearse(self, n: int, held: int, filters: tuple) -> None:
        vocab_size = self.model.config.vocab_size
        self.draws.draw(torch.zeros(n, vocab_size, device=self.token.device), slice(0, n), filters)

    def settle(self, rows: slice, token: Tensor) -> None:
        self.drawn[rows] = token
        self.token[rows] = token.clamp(min=0)

    def refill(self, place: int, row: Row) -> None:
        if row.asked % self.draws.ahead == 0:
            self.draws.refill(place, row.numbers)


# ---- texts ---------------------------------------------------------------------------------------------------------


def texts(decoder: Decoder, requests: Iterable[Request]) -> Iterator[tuple[int, int, str | None]]:
    """(index of the request, token, why the text ended or None) as they come; requests take rows that become free."""
    waiting, index = enumerate(requests), {}
    while True:
        for i, request in itertools.islice(waiting, decoder.free):
            index[decoder.admit(request)] = i
        if not index:
            return
        for handle, token, ended in decoder.step():
            yield index[handle], token, ended
            if ended:
                del index[handle]


# ---- 8-bit weights -------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(model: LanguageModel, kind: str = "int8") -> LanguageModel:
    """Store the matrices that are only ever multiplied with as int8, each row with a scale of its own (as arXiv
    2208.07339, without its outliers). In place: the model can then make text, not train. Norms, routers, positions and
    whatever else a model computes with its weights, as retention does, stay as they are."""
    if kind != "int8":
        raise UserError(f"--quantize {kind}: is not known; there is int8")
    for module in model.modules():
        for name in getattr(module, "products", ()):
            weight = getattr(module, name)
            if module.roles[name] != "input":  # of which a token reads one row
                delattr(module, name)
                setattr(module, name, Int8Weight(*quantize_int8(weight)))
    return model

"""A decode step on the device: logits of all rows (cached or recomputed), sampling, copies of tokens to the host.

Index:  logits · copies to the host · compiling and CUDA graphs · the step
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import LanguageModel
from strawberry.cache import CACHE_ALIGNMENT, RingKVCache, iter_layer_caches, round_up
from strawberry.inference.fusing import compile_fused
from strawberry.inference.recording import RecordedSteps
from strawberry.inference.sampling import BatchSampler, Filters, Request
from strawberry.ops.common import to_accum_dtype
from strawberry.ops.linear import Int8Weight
from strawberry.ops.sampling import sample

# ---- logits --------------------------------------------------------------------------------------------------------


class CachedLogits:
    """Logits through a KV cache: each token is computed once."""

    def __init__(self, model: LanguageModel, rows: int, max_length: int, max_source: int, batch_invariant: bool):
        self.model, self.batch_invariant = model, batch_invariant
        self.compute, self.slices = model.decode_step, {}  # slices: the cache's first n rows, by n
        self.capacity = min(max_length, model.max_positions or max_length)
        size = round_up(self.capacity, CACHE_ALIGNMENT) if batch_invariant else self.capacity
        size = min(size, model.max_positions or size)
        self.cache = model.new_cache(rows, size, max_source=max_source if model.takes_source else None)
        self.cache.positions[:] = -1  # −1: the row is free

    def prefill(self, row: int, tokens: list[int], source: list[int] | None) -> Tensor:
        """Reset the row and prefill a prompt into it. Returns the logits (1, V) after the prompt."""
        self.cache.reset(row)
        cache, device = self.cache.slice(slice(row, row + 1)), self.cache.positions.device
        if source is not None:
            self.model.set_source(torch.tensor([source], device=device), cache)
        logits = self.model.logits_after(torch.tensor([tokens], device=device), cache)
        self.cache.lengths[row] = len(tokens)
        return logits

    def prefill_together(self, first: int, prompts: list[list[int]]) -> Tensor:
        """Reset the rows from `first` on and prefill a prompt into each, in one pass. Returns the logits (n, V) after
        the prompts.
        """
        rows, counts = slice(first, first + len(prompts)), list(map(len, prompts))
        self.cache.reset(range(first, rows.stop))
        cache, device = self.cache.slice(rows), self.cache.positions.device
        idx = torch.tensor([prompt + [0] * (max(counts) - len(prompt)) for prompt in prompts], device=device)
        logits = self.model.logits_after(idx, cache, counts)
        self.cache.lengths[rows] = counts
        return logits

    def choose_min_bucket(self, smallest: int) -> int:
        """`smallest`, doubled until it covers every ring buffer whose size is not a multiple of CACHE_ALIGNMENT: such a
        ring is then read whole from the first step.
        """
        sizes = [state.size for state in iter_layer_caches(self.cache.layers) if isinstance(state, RingKVCache)]
        while smallest < max((size for size in sizes if size % CACHE_ALIGNMENT), default=0):
            smallest *= 2
        return smallest

    def is_full(self, row: int) -> bool:
        return self.cache.lengths[row] >= self.capacity

    def prepare_step(self, rows: list[int]) -> int:
        """Call this before a step of these rows. Rows at a chunk boundary get their next chunk's weights. Returns the
        number of tokens that the longest row has cached before the step.
        """
        length, chunk = self.cache.lengths, self.model.chunk_size
        if chunk and (border := [row for row in rows if length[row] % chunk == 0]):
            for some in [[row] for row in border] if self.batch_invariant else [border]:
                self.model.begin_chunks(self.cache, some)
        max_cached = max(length[row] for row in rows)
        for row in rows:
            length[row] += 1
        return max_cached

    def decode_step(self, token: Tensor, max_cached: int) -> Tensor:
        """Logits (n, V) after one more token (n,) of each of the first n rows."""
        n = len(token)
        if n not in self.slices:
            self.slices[n] = self.cache.slice(slice(0, n))
        return self.compute(token, self.slices[n], max_cached)

    def advance(self, active: Tensor) -> None:
        self.cache.positions[: len(active)] += active

    def free_row(self, row: int) -> None:
        self.cache.positions[row], self.cache.lengths[row] = -1, 0

    def has_only(self, row: int, tokens: list[int]) -> bool:
        """Whether a row that was prefilled with these tokens has no further ones."""
        return self.cache.lengths[row] == len(tokens)

    def copy_row(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)

    def move_row(self, source: int, target: int) -> None:
        self.cache.copy_row(source, target)
        self.free_row(source)


class RecomputedLogits:
    """Logits recomputed from the last block_size tokens at each step, row by row: for models that have no cache because
    their outputs depend on later tokens or on other rows.
    """

    capacity = 2**62

    def __init__(self, model: LanguageModel, rows: int, max_length: int, max_source: int, batch_invariant: bool):
        self.model, self.tokens = model, {}

    def prefill(self, row: int, tokens: list[int], source: None) -> Tensor:
        self.tokens[row] = list(tokens)
        return self.compute(row)

    def compute(self, row: int) -> Tensor:
        newest = self.tokens[row][-self.model.config.block_size :]
        return to_accum_dtype(self.model(torch.tensor([newest], device=self.model.device))[0][:, -1])

    def choose_min_bucket(self, smallest: int) -> int:
        return smallest

    def is_full(self, row: int) -> bool:
        return False

    def prepare_step(self, rows: list[int]) -> int:
        return 0

    def decode_step(self, token: Tensor, max_cached: int) -> Tensor:
        logits = torch.zeros(len(token), self.model.config.vocab_size, device=token.device)
        for row, newest in enumerate(token.tolist()):
            if row in self.tokens:
                self.tokens[row].append(newest)
                logits[row] = self.compute(row)[0]
        return logits

    def advance(self, active: Tensor) -> None:
        pass

    def free_row(self, row: int) -> None:
        self.tokens.pop(row, None)

    def has_only(self, row: int, tokens: list[int]) -> bool:
        return self.tokens.get(row) == tokens

    def copy_row(self, source: int, target: int) -> None:
        self.tokens[target] = list(self.tokens[source])

    def move_row(self, source: int, target: int) -> None:
        self.tokens[target] = self.tokens.pop(source)


# ---- copies to the host --------------------------------------------------------------------------------------------


@dataclass
class HostCopy:
    """An asynchronous copy of tokens to the host, with the handles of their sequences."""

    tokens: Tensor
    logprobs: tuple[Tensor, ...]  # copies of LogprobBuffers.tensors; () if no request has top_logprobs
    owners: list[tuple[int, int]]  # (index in tokens, handle)
    done: torch.cuda.Event | None = None

    def wait(self) -> list[tuple[int, int, int]]:
        """Wait for the copy. Returns (handle, token, index in the copy) of each sequence."""
        if self.done is not None:
            self.done.synchronize()
        tokens = self.tokens.tolist()
        return [(handle, tokens[index], index) for index, handle in self.owners]


def copy_to_host_async(tokens: Tensor, logprobs: tuple[Tensor, ...], owners: list[tuple[int, int]]) -> HostCopy:
    if not tokens.is_cuda:
        return HostCopy(tokens.clone(), tuple(tensor.clone() for tensor in logprobs), owners)
    host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in (tokens, *logprobs)]
    for copy, tensor in zip(host, (tokens, *logprobs), strict=True):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return HostCopy(host[0], tuple(host[1:]), owners, done)


# ---- compiling and CUDA graphs -------------------------------------------------------------------------------------


def compile_step(function, rows: int, fuse: bool):
    """Compile a step into fewer, larger kernels. fuse: products of up to 64 rows become kernels of their own, with the
    norm before (up to 16 rows) and the activation after them. Otherwise, with one row, they become reductions, which
    are fused with the operations around them.
    """
    if fuse:
        return torch.compile(function, dynamic=False, backend=compile_fused)
    return torch.compile(function, dynamic=False, options={"coordinate_descent_tuning": rows == 1})


class CudaGraphs:
    """One CUDA graph of a step for each key, captured at the key's first launch. `warm_up(*key)` runs before a capture:
    it does the one-time work of a key's first call, such as compilation, without an effect on the rows.
    """

    def __init__(self, run, warm_up):
        self.run, self.warm_up = run, warm_up
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def launch(self, *key) -> None:
        if key not in self.graphs:
            self.warm_up(*key)
            self.graphs[key] = self.capture(key)
        self.graphs[key].replay()

    def capture(self, key: tuple) -> torch.cuda.CUDAGraph:
        graph, gc_enabled = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # garbage collection of another graph would invalidate this capture
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.run(*key)
        finally:
            if gc_enabled:
                gc.enable()
        return graph


# ---- the step ------------------------------------------------------------------------------------------------------


# A CPU's step with fewer bytes of weights runs on one thread: what threads save in a product of microseconds, they lose
# when they wait for each other.
ONE_THREAD_BYTES = 8 * 2**20


def count_weight_bytes(model: LanguageModel) -> int:
    attributes = (value for module in model.modules() for value in vars(module).values())
    in_8_bits = sum(value.w.nbytes for value in attributes if isinstance(value, Int8Weight))
    return in_8_bits + sum(p.nbytes for p in model.parameters())


class StepKey(NamedTuple):
    """The properties of a step that a CUDA graph fixes."""

    rows: int  # the first `rows` rows are computed
    max_cached: int  # largest number of tokens that a row has cached before the step
    filters: Filters


SIMPLE_FILTERS = [Filters(draws, greedy, None, False, False) for draws in (False, True) for greedy in (False, True)]


class DecodeStep:
    """The tensors of all rows, and a decode step of them: logits, sampling, positions. A step reads its state from
    device tensors only, so that a CUDA graph can replay it.

    min_bucket: the smallest bucket, in cached tokens, of a step of fixed shape (a CUDA graph, a recorded step, or
    batch_invariant). Each further bucket is twice as large.
    """

    def __init__(self, model: LanguageModel, rows: int, max_length: int, max_source: int, *, batch_invariant: bool,
                 min_bucket: int):  # fmt: skip
        device = model.device
        self.model, self.rows = model, rows
        self.batch_invariant = batch_invariant and device.type == "cpu"
        kind = CachedLogits if model.causal else RecomputedLogits
        self.logits = kind(model, rows, max_length, max_source, self.batch_invariant)
        self.sampler = BatchSampler(rows, model.config.vocab_size, device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=device)  # last_token, but −1 for NaN
        self.active = torch.zeros(rows, dtype=torch.int64, device=device)  # 1 where a row generates tokens
        self.shrinks, self.launch, self.compiled_finish = not batch_invariant, self.run, None
        self.min_bucket = self.logits.choose_min_bucket(min_bucket) if self.batch_invariant else min_bucket
        self.uses_buckets = self.batch_invariant

    def use_cuda_graphs(self, compile: bool, fuse: bool) -> None:
        """Capture and replay steps as CUDA graphs from now on. Runs the step three times to initialize what its first
        call initializes; all rows must be free, so that this changes no sequence.
        """
        self.uses_buckets = True
        if compile:  # one shape only, because each further shape would compile as long
            self.logits.compute = compile_step(self.model.decode_step, self.rows, fuse)
            if fuse:
                self.compiled_finish = torch.compile(self.draw_and_finish, dynamic=False)
            elif self.rows == 1:
                self.sampler.sample_all = compile_step(sample, self.rows, fuse=False)
            self.min_bucket, self.shrinks = self.logits.capacity, False
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run(*self.choose_key(self.rows, 0, []))
        torch.cuda.current_stream().wait_stream(stream)
        self.launch = CudaGraphs(self.run, self.warm_up_sampling).launch

    def record_on_cpu(self) -> None:
        """Record steps and replay them from now on."""
        is_small = count_weight_bytes(self.model) < ONE_THREAD_BYTES
        self.uses_buckets, self.launch = True, RecordedSteps(self.run, 1 if is_small else None).launch

    def choose_key(self, rows: int, max_cached: int, requests: list[Request]) -> StepKey:
        if self.uses_buckets:
            bucket = self.min_bucket << (max_cached // self.min_bucket).bit_length()
            # a batch-invariant step's own token is the last of the bucket
            max_cached = bucket - 1 if self.batch_invariant else min(bucket, self.logits.capacity)
        return StepKey(rows, max_cached, self.sampler.select_filters(requests))

    def launch_rows(self, rows: list[int], requests: list[Request]) -> None:
        """Launch a step that generates one more token of these rows. requests[i] is the request of rows[i]."""
        max_cached = self.logits.prepare_step(rows)
        n = 1 << max(rows).bit_length() if self.shrinks else self.rows
        key = self.choose_key(min(n, self.rows), max_cached, requests)
        if self.batch_invariant:
            self.run_batch_invariant(key, rows, requests)
        else:
            self.launch(*key)

    def run(self, n: int, max_cached: int, filters: Filters) -> None:
        """Run a step of the first n rows."""
        logits = self.logits.decode_step(self.last_token[:n], max_cached)
        self.finish_step(n, logits, filters)

    def finish_step(self, n: int, logits: Tensor, filters: Filters) -> None:
        """Sample the tokens after logits (n, V), and advance the rows."""
        if self.compiled_finish is not None and (self.rows == 1 or filters in SIMPLE_FILTERS):
            self.compiled_finish(n, logits, filters)
        else:
            self.draw_and_finish(n, logits, filters)

    def draw_and_finish(self, n: int, logits: Tensor, filters: Filters) -> None:
        self.finish(n, logits, self.sampler.draw(logits, slice(0, n), filters), filters)

    def run_batch_invariant(self, key: StepKey, rows: list[int], requests: list[Request]) -> None:
        """Run a step of all rows. Each row is sampled with the filters of its own request only."""
        logits, token = self.logits.decode_step(self.last_token, key.max_cached), torch.zeros_like(self.last_token)
        groups: dict[Filters, list[int]] = {}
        for row, request in zip(rows, requests, strict=True):
            filters = self.sampler.select_filters([request])._replace(logprobs=False)  # sampling does not depend on it
            groups.setdefault(filters, []).append(row)
        for filters, some in groups.items():
            token[some] = self.sampler.draw(logits, slice(0, self.rows), filters)[some]
        self.finish(self.rows, logits, token, key.filters)

    def finish(self, n: int, logits: Tensor, token: Tensor, filters: Filters) -> None:
        active = self.active[:n]
        self.store_tokens(slice(0, n), token)
        self.logits.advance(active)
        self.sampler.advance(slice(0, n), logits, self.last_token[:n], active, filters)

    def warm_up_sampling(self, n: int, max_cached: int, filters: Filters) -> None:
        """Sample once with all rows inactive, so that no row changes."""
        state = (self.last_token, self.sampled, self.active)
        before = [tensor.clone() for tensor in state]
        self.active.zero_()
        logits = torch.zeros(n, self.model.config.vocab_size, device=self.active.device)
        self.finish_step(n, logits, filters)
        for tensor, values in zip(state, before, strict=True):
            tensor.copy_(values)

    def sample_first(self, row: int, logits: Tensor, request: Request) -> None:
        """Sample the token after a prompt from its logits (1, V), and activate the row for the next steps."""
        rows = slice(row, row + 1)
        filters = self.sampler.select_filters([request])
        token = self.sampler.draw(logits, rows, filters)
        self.store_tokens(rows, token)
        self.active[row] = 1
        self.sampler.advance(rows, logits, self.last_token[rows], self.active[rows], filters)

    def store_tokens(self, rows: slice, token: Tensor) -> None:
        self.sampled[rows] = token
        self.last_token[rows] = token.clamp(min=0)

    def copy_tokens(self, rows: slice, requests: list[Request], owners: list[tuple[int, int]]) -> HostCopy:
        """Copy the tokens that a step of these requests has generated in the rows to the host."""
        wanted = any(request.top_logprobs is not None for request in requests)
        logprobs = tuple(tensor[rows] for tensor in self.sampler.logprobs.tensors) if wanted else ()
        return copy_to_host_async(self.sampled[rows], logprobs, owners)

    def move_row(self, source: int, target: int) -> None:
        self.logits.move_row(source, target)
        self.sampler.move_row(source, target)
        for tensor in (self.last_token, self.active):
            tensor[target] = tensor[source]
        self.active[source] = 0

    def free_row(self, row: int) -> None:
        self.active[row] = 0
        self.logits.free_row(row)

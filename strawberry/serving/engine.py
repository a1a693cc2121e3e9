"""A model in memory and the thread that decodes with it: continuous batching, one token for each row in a step.

One HTTP request is a `RequestGroup` of one or more `Sequence`s. The event loop's thread submits groups. Each
`Engine.step` drops cancelled groups, schedules waiting sequences into free rows, decodes one token for each row, and
sends the events to the groups' queues.
"""

import asyncio
import heapq
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch

from strawberry.common import UserError, show
from strawberry.data.objectives import decode_with_sentinels
from strawberry.device import choose_device
from strawberry.inference import sampling
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import load_for_inference
from strawberry.inference.text import (
    TextStream,
    choose_num_rows,
)
from strawberry.serving import scoring
from strawberry.serving.errors import ApiError, replace_surrogates, to_api_error
from strawberry.serving.metrics import Metrics
from strawberry.serving.model_files import DamagedFile, ModelFile, hide_path
from strawberry.serving.protocol import CompletionRequest
from strawberry.serving.scoring import TokenScores
from strawberry.serving.settings import Settings

MAX_UNREAD = 100_000  # largest number of unread events of a client
log = logging.getLogger("uvicorn.error")
CUDA_LOCK = threading.Lock()  # on CUDA: no other thread may allocate while a graph is captured


class Sequence(TextStream):
    """One text of a request group, with the data that its choice in the response contains."""

    def __init__(self, encoder, request: sampling.Request, body: CompletionRequest, index: int, given: list[int]):
        super().__init__(encoder, request, body.stops)
        self.index, self.prompt_tokens = index, given  # index in the group; the prompt's tokens, without a start token
        self.tokens: list[int] = []
        self.echo = self.output = decode_text(encoder, given) if body.echo else ""
        self.prompt_scores: TokenScores | None = None  # if the prompt is echoed and logprobs are asked for

    def append_token(self, token: int, why: str | None) -> str:
        self.tokens.append(token)
        piece = replace_surrogates(self.push(token, why))
        self.output += piece
        return piece


class Piece(NamedTuple):
    """A piece of a sequence's text."""

    sequence: Sequence
    text: str
    num_tokens: int  # that the sequence had by then
    is_last: bool = False


class RequestGroup:
    """The sequences of one HTTP request. The queue `events` receives Pieces, the last one of each sequence too, or an
    ApiError instead, which ends the group.
    """

    def __init__(self, engine: "Engine", body: CompletionRequest, sequences: list[Sequence]):
        self.engine, self.body, self.sequences = engine, body, sequences
        self.waiting, self.active, self.unfinished = deque(sequences), 0, len(sequences)
        self.arrival_time = time.perf_counter()
        self.events: asyncio.Queue = asyncio.Queue()
        self.prompt_scores: dict[int, TokenScores] = {}  # of each prompt, by its index
        self.cancelled = False

    def cancel(self) -> None:
        """Cancel the group. The engine frees its rows at the next step."""
        self.cancelled = True
        self.engine.wake()


class QueueTimeEstimator:
    """Estimates the time until a new group gets its first row, from measured times.

    The model follows Engine.schedule: a group keeps one row until all its sequences have ended, and releases any
    others. The oldest group without a row gets a released row. A sequence takes one step for each of its tokens. The
    fraction of max_new_tokens that a text uses is measured too.
    """

    def __init__(self):
        self.step_seconds, self.steps = 0.0, 0  # of a step, including the prefills between steps
        self.share, self.texts = 1.0, 0  # mean fraction of max_new_tokens that a text uses

    def record_step(self, seconds: float) -> None:
        weight = max(0.01, 1 / max(self.steps, 1))  # the first step includes warm-up, so the second one replaces it
        self.step_seconds += weight * (seconds - self.step_seconds)
        self.steps += 1

    def record_sequence(self, sequence: Sequence) -> None:
        if sequence.request.max_new_tokens:
            self.texts += 1
            self.share += max(0.05, 1 / self.texts) * (
                sequence.num_tokens / sequence.request.max_new_tokens - self.share
            )

    def steps_waiting(self, group: RequestGroup) -> float:
        """Expected steps of the group's waiting sequences, which all have about the same length."""
        return self.share * len(group.waiting) * group.sequences[0].request.max_new_tokens

    def estimate(self, running: list[tuple[RequestGroup, Sequence]], groups: list[RequestGroup], rows: int) -> float:
        """Seconds until a new group, after all of `groups`, gets a row."""
        remaining: dict[int, list[float]] = {}  # steps of each group's running sequences
        for group, sequence in running:
            steps = self.share * (sequence.request.max_new_tokens - sequence.num_tokens)
            remaining.setdefault(id(group), []).append(steps)
        free_at, queue = [0.0] * (rows - len(running)), []  # in steps
        for group in groups:
            if id(group) in remaining:
                *others, last = sorted(remaining[id(group)])
                free_at += [*others, last + self.steps_waiting(group)]
            else:
                queue.append(self.steps_waiting(group))
        free_at = free_at or [0.0]
        heapq.heapify(free_at)
        for steps in queue:
            heapq.heapreplace(free_at, free_at[0] + steps)
        return free_at[0] * self.step_seconds


class ModelThread:
    """A thread that loads a model, runs steps until the model is not needed, and sends events to the event loop."""

    def __init__(self, file: ModelFile, settings: Settings, after: list["ModelThread"]):
        self.name, self.path, self.stamp, self.settings = file.name, file.path, file.stamp, settings
        self.bytes = file.stamp[1]  # an estimate until the model is loaded
        self.loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self.loop.create_future()
        self.condition, self.stopping, self.retired, self.ended = threading.Condition(), False, False, False
        on_cuda = choose_device(settings.device, "--device {}").type == "cuda"
        self.device_lock: Any = CUDA_LOCK if on_cuda else nullcontext()
        self.thread = threading.Thread(target=self.run, args=(after,), name=f"engine of {file.name}", daemon=True)

    def wake(self) -> None:
        with self.condition:
            self.condition.notify()

    def stop(self) -> None:
        """Stop now. Unfinished requests fail with a 503."""
        self.stopping = True
        self.wake()

    def retire(self) -> None:
        """Stop when no requests are left."""
        self.retired = True
        self.wake()

    def run(self, after: list["ModelThread"]) -> None:
        for engine in after:  # these engines must free their memory first
            engine.thread.join()
        try:
            with self.device_lock:
                self.load()
        except Exception as error:
            log.warning("cannot load %s: %s", self.path, error)
            self.ended = True
            self.call_in_loop(self.fail_loading, explain_loading_failure(self, error))
            return
        self.call_in_loop(self.ready.set_result, None)
        end = ApiError(503, "the server stops; come again", headers={"Retry-After": "10"})
        try:
            while self.step():
                pass
        except Exception as error:  # make_decoder failed too
            end = explain_failure(self, error)
        self.ended = True
        self.fail_all(end)
        self.decoder = self.model = None

    def call_in_loop(self, function: Callable, *args: Any) -> None:
        with suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(function, *args)

    def fail_loading(self, error: ApiError) -> None:
        self.bytes = 0
        self.ready.set_exception(error)
        self.ready.exception()  # mark it as retrieved, so that asyncio does not log it if no request waits


class Engine(ModelThread):
    """Continuous batching: sequences of many request groups share the rows of one decoder."""

    PREFILL_SECONDS = 0.2  # limit of the prefills in one step, while running sequences wait

    def __init__(self, file: ModelFile, settings: Settings, metrics: Metrics, after: list[ModelThread]):
        super().__init__(file, settings, after)
        self.metrics = metrics
        self.users = 0  # requests that have not submitted yet; the event loop's thread counts them
        self.groups: list[RequestGroup] = []  # guarded by condition
        self.running: dict[int, tuple[RequestGroup, Sequence]] = {}  # handle → the sequence in that row
        self.outbox: list[tuple[RequestGroup, Any]] = []
        self.queue_time = QueueTimeEstimator()
        self.thread.start()

    @property
    def busy(self) -> bool:
        return bool(self.users or self.groups)

    @property
    def queued(self) -> int:
        """The number of groups without a started sequence."""
        return sum(group.active == 0 and group.unfinished == len(group.sequences) for group in list(self.groups))

    def check_queue(self) -> None:
        """Raises ApiError (429) if the queue is full."""
        running = list(self.running.values())
        free = self.rows - len(running)
        if (queued := self.queued) >= self.settings.queue + free:
            wait = max(1, math.ceil(self.queue_time.estimate(running, list(self.groups), self.rows)))
            raise ApiError(429, f"{queued} completions wait already (--queue {self.settings.queue}); come again in "
                           f"{wait} s", code="queue_full", headers={"Retry-After": str(wait)})  # fmt: skip

    def submit(self, group: RequestGroup) -> None:
        self.check_queue()
        with self.condition:
            if self.ended:
                raise ApiError(503, "the model is being put away; come again", "model", headers={"Retry-After": "1"})
            self.groups.append(group)
            self.condition.notify()

    def load(self) -> None:
        self.model, self.encoder, self.record = load_for_inference(self.path, self.settings)
        self.rows = choose_num_rows(self.model, self.settings, 2**30)
        self.longest_token = max(len(self.encoder.token_bytes(token)) for token in range(self.encoder.vocab_size))
        self.make_decoder()
        held = [*self.model.parameters(), *self.model.buffers(), *find_tensors(self.decoder.logits)]
        self.bytes = sum({t.data_ptr(): t.nbytes for t in held}.values())

    def make_decoder(self) -> None:
        """Make a batch-invariant decoder: a text does not depend on the sequences in the other rows."""
        self.decoder = None  # free its memory first
        self.decoder = Decoder(self.model, self.rows, self.settings.context, batch_invariant=True,
                               compile=self.settings.compile == "true")  # fmt: skip

    @property
    def max_model_len(self) -> int:
        """The largest number of tokens of a prompt and its continuation."""
        return min(self.settings.context, self.model.max_positions or self.settings.context)

    def step(self) -> bool:
        """Drop cancelled groups, schedule waiting sequences, decode one token for each row. Returns False when the
        thread must end.
        """
        with self.condition:
            self.condition.wait_for(lambda: self.groups or self.stopping or (self.retired and not self.users))
            if self.stopping or not self.groups:
                return False
        began, decoded = time.perf_counter(), False
        with self.device_lock:
            try:
                self.drop_cancelled()
                self.schedule()
                decoded = bool(self.running)
                self.decode_step()
            except Exception as error:
                self.fail_all(explain_failure(self, error))
                self.make_decoder()
        if decoded:
            self.queue_time.record_step(time.perf_counter() - began)
        self.flush()
        return True

    def drop_cancelled(self) -> None:
        for handle, (group, _) in list(self.running.items()):
            if group.cancelled:
                del self.running[handle]
                self.decoder.release(handle)
        for group in [group for group in self.groups if group.cancelled]:
            self.remove_group(group)

    def schedule(self) -> None:
        """Move waiting sequences into free rows: first of the group with the fewest active sequences, of equal groups
        the oldest.
        """
        until = time.monotonic() + self.PREFILL_SECONDS
        while self.decoder.free and (groups := [o for o in list(self.groups) if o.waiting and not o.cancelled]):
            group = min(groups, key=lambda group: group.active)
            sequence = group.waiting.popleft()
            group.active += 1
            self.admit(group, sequence)
            if time.monotonic() > until:
                return

    def admit(self, group: RequestGroup, sequence: Sequence) -> None:
        """Give the sequence a row, or end it if nothing is to be generated."""
        try:
            if group.body.echo:
                self.echo(group, sequence)
            if sequence.request.max_new_tokens:
                self.running[self.decoder.admit(sequence.request)] = group, sequence
            else:
                sequence.finish_reason = "length"
                self.finish(group, sequence)
        except UserError as error:
            self.fail(group, ApiError(400, str(error), "prompt"))
        except Exception as error:
            self.fail(group, explain_failure(self, error))

    def echo(self, group: RequestGroup, sequence: Sequence) -> None:
        """Compute the log probabilities of the prompt's tokens if they are asked for, once for all its sequences. A
        stream begins with the prompt.
        """
        if (num_top := group.body.num_logprobs) is not None:
            request, index = sequence.request, sequence.index // group.body.n
            if index not in group.prompt_scores:
                group.prompt_scores[index] = scoring.score_tokens(self.model, request.prompt, request.source, num_top)
            sequence.prompt_scores = group.prompt_scores[index]
        if group.body.stream:
            self.outbox.append((group, Piece(sequence, sequence.echo, 0)))

    def decode_step(self) -> None:
        if not self.running:
            return
        began = time.perf_counter()
        new_tokens = self.decoder.step()
        for handle, token, why in new_tokens:
            group, sequence = self.running[handle]
            if not sequence.num_tokens:
                self.metrics.first.observe(time.perf_counter() - group.arrival_time)
            piece = sequence.append_token(token, why)
            if piece and group.body.stream:
                self.outbox.append((group, Piece(sequence, piece, sequence.num_tokens)))
            if sequence.finish_reason:
                del self.running[handle]
                if why is None:  # a stop string, which only the Sequence detects
                    self.decoder.release(handle)
                self.finish(group, sequence)
        self.metrics.tokens.labels("completion").inc(len(new_tokens))
        self.metrics.step.observe(time.perf_counter() - began)

    def finish(self, group: RequestGroup, sequence: Sequence) -> None:
        self.queue_time.record_sequence(sequence)
        group.active, group.unfinished = group.active - 1, group.unfinished - 1
        self.outbox.append((group, Piece(sequence, "", sequence.num_tokens, True)))
        if not group.unfinished:
            self.remove_group(group)

    def remove_group(self, group: RequestGroup) -> None:
        with self.condition:
            if group in self.groups:
                self.groups.remove(group)

    def fail(self, group: RequestGroup, error: ApiError) -> None:
        group.cancelled = True
        self.outbox.append((group, error))

    def fail_all(self, error: ApiError) -> None:
        with self.condition:
            groups, self.groups = self.groups, []
        self.running.clear()
        for group in groups:
            self.fail(group, error)
        self.flush()

    def flush(self) -> None:
        outbox, self.outbox = self.outbox, []
        if outbox:
            self.call_in_loop(dispatch, outbox)


def explain_failure(engine: "ModelThread", error: Exception) -> ApiError:
    """Log an error of the engine. Returns the ApiError for the waiting requests."""
    log.error("the engine of %s failed", engine.path, exc_info=error)
    if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
        message = "there is not enough memory; a smaller --context or --batch of the server takes less"
        return ApiError(503, message, headers={"Retry-After": "5"})
    return ApiError(500, str(error)) if isinstance(error, UserError) else to_api_error(error)


def explain_loading_failure(engine: "ModelThread", error: Exception) -> ApiError:
    """The ApiError for the requests that wait for a model that cannot be loaded."""
    if not engine.path.exists():
        return ApiError(404, f"model = {show(engine.name)}: was deleted", "model", "model_not_found")
    if isinstance(error, UserError) and str(engine.path) in str(error):
        return DamagedFile(engine.name, engine.stamp, hide_path(str(error), engine.path, engine.name)).error()
    failure = ApiError(500, str(error)) if isinstance(error, UserError) else explain_failure(engine, error)
    failure.message, failure.param = f"model = {show(engine.name)}: {failure.message}", "model"
    return failure


def dispatch(outbox: list[tuple[RequestGroup, Any]]) -> None:
    for group, event in outbox:
        if group.events.qsize() < MAX_UNREAD:
            group.events.put_nowait(event)
        elif not group.cancelled:
            group.events.put_nowait(ApiError(408, f"the client has left {MAX_UNREAD:,} pieces unread"))
            group.cancel()


def find_tensors(thing: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an object's attributes, lists and dicts, recursively, except those in modules."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from find_tensors(item)
    elif isinstance(thing, dict):
        yield from find_tensors(list(thing.values()))
    elif hasattr(thing, "__dict__") and not isinstance(thing, torch.nn.Module):
        yield from find_tensors(list(vars(thing).values()))


def decode_text(encoder, tokens: list[int]) -> str:
    """Decode tokens to text. Ids beyond the encoder's are skipped: a model's vocabulary may be larger than its
    encoder's.
    """
    return replace_surrogates(encoder.decode([token for token in tokens if token < encoder.vocab_size]))


def decode_token(encoder, token: int) -> str:
    """The text of one token. A token that is not valid UTF-8 is written as OpenAI does: bytes:\\xe2\\x82."""
    is_text = token < encoder.vocab_size
    data = encoder.token_bytes(token) if is_text else decode_with_sentinels(encoder, [token]).encode()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

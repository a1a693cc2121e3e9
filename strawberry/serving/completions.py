"""The text routes: completions, models, tokenizers."""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from encoder import EOT, PAD
from strawberry.common import UserError
from strawberry.config import type_schema
from strawberry.inference import sampling
from strawberry.inference.text import (
    draw_seed,
    encode_source_text,
    encode_text,
    make_request,
)
from strawberry.serving.engine import Engine, RequestGroup, Sequence, decode_text, decode_token
from strawberry.serving.errors import ApiError
from strawberry.serving.model_files import ModelFile
from strawberry.serving.protocol import (
    CompletionRequest,
    Deleted,
    Detokenized,
    DetokenizeRequest,
    Model,
    ModelList,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    prompt_type,
)
from strawberry.serving.service import Service, TheService


async def completions(body: CompletionRequest, request: Request, service: TheService) -> Any:
    """Generate text that continues a prompt. The choice with index i·n + j is text j of prompt i."""
    limit = min(body.timeout or math.inf, service.settings.timeout)
    until = asyncio.get_running_loop().time() + limit
    try:
        async with asyncio.timeout_at(until):
            group = await submit_request(body, service)
            head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
                    "model": group.engine.name}  # fmt: skip
            if body.stream:
                return CompletionStream(group, head, until, limit)
            async for _ in iterate_events(group, request.receive):
                pass
    except TimeoutError as error:
        raise timeout_error(limit) from error
    if group.unfinished:
        return Response(status_code=499)  # the client has disconnected
    choices = [format_choice(group, sequence, sequence.output, True) for sequence in group.sequences]
    return JSONResponse({**head, "choices": choices, "usage": count_usage(group)})


def timeout_error(limit: float) -> ApiError:
    return ApiError(408, f"the completion took more than {limit:g} seconds (timeout)", "timeout", "timeout")


async def submit_request(body: CompletionRequest, service: Service) -> RequestGroup:
    """Submit a completion to an engine. Raises ApiError if the model is unknown, a field does not fit it, or the queue
    is full.
    """
    if body.max_tokens > service.settings.context:
        raise ApiError(400, f"max_tokens = {body.max_tokens}: must be integer <= {service.settings.context}, the "
                       "server's --context", "max_tokens")  # fmt: skip
    async with service.models.use(body.model) as engine:
        engine.check_queue()
        group = await asyncio.to_thread(make_request_group, body, engine)
        engine.submit(group)
    tokens = sum(len(sequence.request.prompt) for sequence in group.sequences[:: body.n])
    service.metrics.tokens.labels("prompt").inc(tokens)
    return group


def make_request_group(body: CompletionRequest, engine: Engine) -> RequestGroup:
    """Encode the prompts and make the sequences, n for each prompt. Raises ApiError."""
    model, encoder = engine.model, engine.encoder
    seed, sequences = draw_seed() if body.seed is None else body.seed, []
    try:
        source = encode_source_text(body.source, model, encoder, engine.record, "source")
    except UserError as error:
        raise ApiError(400, str(error), "source") from error
    for prompt in body.prompts:
        if isinstance(prompt, str) and len(prompt) > engine.max_model_len * engine.longest_token:
            raise context_length_error(f"{len(prompt):,} characters", engine)
        try:
            given = encode_text(encoder, prompt) if isinstance(prompt, str) else prompt
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from error
        for i in range(body.n):
            request = make_request(body, encoder, given, source, seed + i)
            if i == 0:
                check_prompt(request.prompt, engine)
                check_options(request, engine)
            request.max_new_tokens = min(request.max_new_tokens, max(engine.settings.context - len(request.prompt), 0))
            sequences.append(Sequence(encoder, request, body, len(sequences), given))
    return RequestGroup(engine, body, sequences)


def check_prompt(tokens: list[int], engine: Engine) -> None:
    vocab_size = engine.model.config.vocab_size
    if len(tokens) > engine.max_model_len:
        raise context_length_error(f"{len(tokens):,} tokens", engine)
    if max(tokens) >= vocab_size:
        raise ApiError(400, f"prompt: token {max(tokens)} is none of the {vocab_size} of the model's vocabulary",
                       "prompt")  # fmt: skip


def check_options(request: sampling.Request, engine: Engine) -> None:
    vocab_size = engine.model.config.vocab_size
    if unknown := request.find_unknown_token(vocab_size):
        name, token = unknown
        raise ApiError(400, f"{name}: token {token} is none of the {vocab_size} of the model's vocabulary", name)
    if request.min_tokens and len(request.stop) == vocab_size:
        raise ApiError(400, "stop_token_ids: has every token of the vocabulary, so that no text has min_tokens",
                       "stop_token_ids")  # fmt: skip


def context_length_error(has: str, engine: Engine) -> ApiError:
    message = f"prompt: has {has}, and the context is of {engine.max_model_len:,} tokens; give a shorter one"
    return ApiError(400, message, "prompt", "context_length_exceeded")


async def iterate_events(group: RequestGroup, receive: Receive) -> AsyncIterator[list[tuple[Sequence, str | None]]]:
    """Yield the group's events in batches until all sequences have ended or the client disconnects. At the end the
    group is cancelled in any case, which frees its rows. Raises the ApiError with which the group failed.
    """
    watch = asyncio.create_task(watch_disconnect(group, receive))
    try:
        unfinished = len(group.sequences)
        while unfinished and (event := await group.events.get()) is not None:
            batch = [event]
            while not group.events.empty():
                batch.append(group.events.get_nowait())
            for event in batch:
                if isinstance(event, ApiError):
                    raise event
            if None in batch:
                return
            unfinished -= sum(piece is None for _, piece in batch)
            yield batch
    finally:
        watch.cancel()
        group.cancel()


async def watch_disconnect(group: RequestGroup, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    group.events.put_nowait(None)


class CompletionStream(Response):
    """A response that streams a group's texts as server-sent events in OpenAI's format."""

    def __init__(self, group: RequestGroup, head: dict, until: float, limit: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.group, self.head, self.until, self.limit = group, head, until, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with asyncio.timeout_at(self.until), aclosing(self.data(receive)) as pieces:
                async for data in pieces:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except (ApiError, TimeoutError) as error:
            error = error if isinstance(error, ApiError) else timeout_error(self.limit)
            if not begun:  # the status can still be set
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": encode_sse(error.body()), "more_body": True})
        if begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def data(self, receive: Receive) -> AsyncIterator[bytes]:
        group, options = self.group, self.group.body.stream_options
        tells_usage = bool(options and options.include_usage)
        continuous, ended = tells_usage and options.continuous_usage_stats, 0
        async with aclosing(iterate_events(group, receive)) as batches:
            begun = False
            async for batch in batches:
                chunks = []
                if not begun and group.body.echo:
                    chunks += [format_choice(group, sequence, sequence.echo, False) for sequence in group.sequences]
                begun = True
                for sequence, piece in batch:
                    chunks.append(format_choice(group, sequence, piece or "", piece is None))
                    ended += piece is None
                more = {"usage": count_usage(group) if continuous else None} if tells_usage else {}
                yield b"".join(encode_sse({**self.head, "choices": [chunk], **more}) for chunk in chunks)
        if ended == len(group.sequences):
            if tells_usage:
                yield encode_sse({**self.head, "choices": [], "usage": count_usage(group)})
            yield b"data: [DONE]\n\n"


def encode_sse(data: dict) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def format_choice(group: RequestGroup, sequence: Sequence, text: str, ended: bool) -> dict:
    why = {"full": "length"}.get(sequence.finish_reason, sequence.finish_reason) if ended else None
    logprobs = format_logprobs(group, sequence) if ended and sequence.token_scores is not None else None
    return {"index": sequence.index, "text": text, "logprobs": logprobs, "finish_reason": why}


def count_usage(group: RequestGroup) -> dict:
    """OpenAI's usage object. A prompt counts once for all its texts. The token that ended a text counts too."""
    read = sum(len(sequence.request.prompt) for sequence in group.sequences[:: group.body.n])
    made = sum(sequence.num_tokens for sequence in group.sequences)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def format_logprobs(group: RequestGroup, sequence: Sequence) -> dict:
    encoder, scored, begin = group.engine.encoder, sequence.token_scores, len(sequence.request.prompt)
    if group.body.echo:
        begin -= len(sequence.prompt_tokens)
    tokens = (sequence.request.prompt + sequence.tokens)[begin:]
    at, offsets, decoder = (
        len(decode_text(encoder, sequence.prompt_tokens)) if not group.body.echo else 0,
        [],
        encoder.stream(),
    )
    for token in tokens:
        offsets.append(at)
        at += len(decoder.push(token)) if token < encoder.vocab_size else 0
    own, best = scored.logprobs[begin:], scored.best[begin:]
    top = [None if p is None else sort_by_likelihood(encoder, [*likely, (token, p)])
           for token, p, likely in zip(tokens, own, best, strict=True)]  # fmt: skip
    return {"tokens": [decode_token(encoder, token) for token in tokens], "token_logprobs": own, "top_logprobs": top,
            "text_offset": offsets}  # fmt: skip


def sort_by_likelihood(encoder, tokens: list[tuple[int, float]]) -> dict[str, float]:
    """Each token's text and log probability, most likely first. Of tokens with the same text, only the most likely one.
    """
    found: dict[str, float] = {}
    for token, logprob in sorted(tokens, key=lambda item: -item[1]):
        found.setdefault(decode_token(encoder, token), logprob)
    return found


def update_completion_schema(service: Service, properties: dict) -> None:
    """Update the schema of a completion's body with the current models."""
    files = {name: file for name, file in service.models.scan().items() if file.generates}
    properties["max_tokens"]["anyOf"][0]["maximum"] = service.settings.context
    if files:
        known = [file.hyperparams for file in files.values()]
        properties["model"] = properties["model"] | {"enum": list(files)}
        properties["prompt"] |= type_schema(prompt_type(max(h["vocab_size"] for h in known) - 1))
        if not any(h.get("kind") == "encoder-decoder" for h in known):
            properties["source"] = {"type": "null", "description": "for encoder-decoders, of which there is none here"}


async def list_models(service: TheService) -> ModelList:
    """List the models: the files in the folder --models. A training run's model appears as soon as the run has
    finished.
    """
    return ModelList("list", [format_model(service, file) for file in (await service.models.list_files()).values()])


async def retrieve_model(model: str, service: TheService) -> Model:
    """Get a model."""
    return format_model(service, await service.models.find(model))


async def delete_model(model: str, service: TheService) -> Deleted:
    """Delete a model of the folder --models: its file, and its engine in memory. While it generates text, or an
    unfinished job writes or reads it, the answer is 409. A checkpoint is deleted with its run.
    """
    await service.models.delete(model)
    return Deleted(model, "model")


def format_model(service: Service, file: ModelFile) -> Model:
    h, size = file.hyperparams, file.stamp[1]
    return Model(file.name, "model", file.created, "strawberry", h["arch"], h["vocab_size"], h["block_size"], size,
                 size, file.name in service.models.loaded)  # fmt: skip


async def tokenize(body: TokenizeRequest, service: TheService) -> Tokens:
    """Encode a text to tokens, in vLLM's format, which lm-eval uses."""
    async with service.models.use(body.model or await service.models.find_latest()) as engine:
        try:
            special = engine.encoder.specials.get(body.prompt)
            tokens = await asyncio.to_thread(encode_text, engine.encoder, body.prompt) if special is None else [special]
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from error
        return Tokens(len(tokens), engine.max_model_len, tokens)


async def detokenize(body: DetokenizeRequest, service: TheService) -> Detokenized:
    """Decode tokens to text."""
    async with service.models.use(body.model or await service.models.find_latest()) as engine:
        tokens, limit = body.tokens, engine.model.config.vocab_size
        if max(tokens, default=0) >= limit:
            raise ApiError(400, f"tokens: {max(tokens)} is none of the {limit} of the model's vocabulary", "tokens")
        return Detokenized(decode_text(engine.encoder, tokens))


async def tokenizer_info(service: TheService, model: str | None = None) -> TokenizerInfo:
    """Get a model's encoder; by default the newest model's."""
    async with service.models.use(model or await service.models.find_latest()) as engine:
        return TokenizerInfo(engine.name, engine.encoder.vocab_size, EOT, EOT, PAD)


def update_tokenize_schema(service: Service, properties: dict) -> None:
    if files := {name: file for name, file in service.models.scan().items() if file.generates}:
        properties["model"] = {"enum": [*files, None], "description": properties["model"]["description"]}
        if "tokens" in properties:
            limit = min(file.hyperparams["vocab_size"] for file in files.values()) - 1
            properties["tokens"]["items"] = {"type": "integer", "minimum": 0, "maximum": limit}

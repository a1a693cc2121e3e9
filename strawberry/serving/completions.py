"""The text routes: completions, models, tokenizers."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
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
from strawberry.serving.engine import Engine, Piece, RequestGroup, Sequence, decode_text
from strawberry.serving.errors import ApiError
from strawberry.serving.formats import CompletionFormat
from strawberry.serving.model_files import ModelFile
from strawberry.serving.protocol import (
    CompletionRequest,
    Deleted,
    Detokenized,
    DetokenizeRequest,
    GenerationRequest,
    Model,
    ModelList,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    bias_schema,
    prompt_type,
)
from strawberry.serving.service import Service, TheService


async def completions(body: CompletionRequest, request: Request, service: TheService) -> Any:
    """Generate text that continues a prompt. The choice with index i·n + j is text j of prompt i."""
    return await answer_request(body, request, service, make_request_group, CompletionFormat)


async def answer_request(
    body: GenerationRequest, request: Request, service: Service, make_group: Callable, format: type[CompletionFormat]
) -> Any:
    """Generate the texts of a request, and answer with them at their end or stream them."""
    limit = min(body.timeout or math.inf, service.settings.timeout)
    until = asyncio.get_running_loop().time() + limit
    try:
        async with asyncio.timeout_at(until):
            group = await submit_request(body, service, make_group)
            answer = format(group)
            if body.stream:
                return CompletionStream(group, answer, until, limit)
            async for _ in iterate_events(group, request.receive):
                pass
    except TimeoutError as error:
        raise timeout_error(limit) from error
    if group.unfinished:
        return Response(status_code=499)  # the client has disconnected
    choices = [answer.format_whole(sequence) for sequence in group.sequences]
    return JSONResponse({**answer.head, "choices": choices, "usage": count_usage(group)})


def timeout_error(limit: float) -> ApiError:
    return ApiError(408, f"the completion took more than {limit:g} seconds (timeout)", "timeout", "timeout")


async def submit_request(body: GenerationRequest, service: Service, make_group: Callable) -> RequestGroup:
    """Submit a completion to an engine. Raises ApiError if the model is unknown, a field does not fit it, or the queue
    is full.
    """
    context = service.settings.context
    for name in ("max_tokens", "max_completion_tokens"):
        if (limit := getattr(body, name, None)) is not None and limit > context:
            raise ApiError(400, f"{name} = {limit}: must be an integer <= {context}, the server's --context", name)
    async with service.models.use(body.model) as engine:
        engine.check_queue()
        group = await asyncio.to_thread(make_group, body, engine)
        engine.submit(group)
    tokens = sum(len(sequence.request.prompt) for sequence in group.sequences[:: body.n])
    service.metrics.tokens.labels("prompt").inc(tokens)
    return group


def make_request_group(body: CompletionRequest, engine: Engine) -> RequestGroup:
    """Encode the prompts and make the sequences, n for each prompt. Raises ApiError."""
    encoder, prompts = engine.encoder, []
    try:
        source = encode_source_text(body.source, engine.model, encoder, engine.record, "source")
    except UserError as error:
        raise ApiError(400, str(error), "source") from error
    for prompt in body.prompts:
        if isinstance(prompt, str) and len(prompt) > engine.max_model_len * engine.longest_token:
            raise context_length_error(f"{len(prompt):,} characters", engine)
        try:
            prompts.append(encode_text(encoder, prompt) if isinstance(prompt, str) else prompt)
        except UserError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from error
    return RequestGroup(engine, body, make_sequences(body, engine, prompts, source))


def make_sequences(
    body: GenerationRequest, engine: Engine, prompts: list[list[int]], source: list[int] | None, name: str = "prompt"
) -> list[Sequence]:
    """n sequences for each prompt. `name` is the field that the prompts come from. Raises ApiError."""
    seed, sequences = draw_seed() if body.seed is None else body.seed, []
    for prompt in prompts:
        for i in range(body.n):
            request = make_request(body, engine.encoder, prompt, source, seed + i)
            if i == 0:
                check_prompt(request.prompt, engine, name)
                check_options(request, engine.model.config.vocab_size)
            request.top_logprobs = body.num_logprobs
            request.max_new_tokens = min(request.max_new_tokens, max(engine.settings.context - len(request.prompt), 0))
            sequences.append(Sequence(engine.encoder, request, body, len(sequences), prompt))
    return sequences


def check_prompt(tokens: list[int], engine: Engine, name: str) -> None:
    vocab_size = engine.model.config.vocab_size
    if len(tokens) > engine.max_model_len:
        raise context_length_error(f"{len(tokens):,} tokens", engine, name)
    if max(tokens) >= vocab_size:
        raise ApiError(400, f"prompt: token {max(tokens)} is none of the {vocab_size} of the model's vocabulary",
                       "prompt")  # fmt: skip


def check_options(request: sampling.Request, vocab_size: int) -> None:
    try:
        request.check_tokens(vocab_size)
    except UserError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from error


def context_length_error(has: str, engine: Engine, name: str = "prompt") -> ApiError:
    message = f"{name}: has {has}, and the context is of {engine.max_model_len:,} tokens; give a shorter one"
    return ApiError(400, message, name, "context_length_exceeded")


async def iterate_events(group: RequestGroup, receive: Receive) -> AsyncIterator[list[Piece]]:
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
            unfinished -= sum(piece.is_last for piece in batch)
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

    def __init__(self, group: RequestGroup, answer: CompletionFormat, until: float, limit: float):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.group, self.answer, self.until, self.limit = group, answer, until, limit

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
                chunks = [] if begun else self.answer.format_begin()
                begun = True
                chunks += [self.answer.format_piece(piece) for piece in batch]
                ended += sum(piece.is_last for piece in batch)
                more = {"usage": count_usage(group) if continuous else None} if tells_usage else {}
                yield b"".join(encode_sse({**self.answer.head, "choices": [chunk], **more}) for chunk in chunks)
        if ended == len(group.sequences):
            if tells_usage:
                yield encode_sse({**self.answer.head, "choices": [], "usage": count_usage(group)})
            yield b"data: [DONE]\n\n"


def encode_sse(data: dict) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def count_usage(group: RequestGroup) -> dict:
    """OpenAI's usage object. A prompt counts once for all its texts. The token that ended a text counts too."""
    read = sum(len(sequence.request.prompt) for sequence in group.sequences[:: group.body.n])
    made = sum(sequence.num_tokens for sequence in group.sequences)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def update_completion_schema(service: Service, properties: dict) -> None:
    """Update the schema of a completion's body with the current models."""
    files = {name: file for name, file in service.models.scan().items() if file.generates}
    properties["max_tokens"]["anyOf"][0]["maximum"] = service.settings.context
    if files:
        known = [file.hyperparams for file in files.values()]
        properties["model"] = properties["model"] | {"enum": list(files)}
        properties["prompt"] |= type_schema(prompt_type(max(h["vocab_size"] for h in known) - 1))
        update_token_schema(properties, min(h["vocab_size"] for h in known))
        if not any(h.get("kind") == "encoder-decoder" for h in known):
            properties["source"] = {"type": "null", "description": "for encoder-decoders, of which there is none here"}


def update_token_schema(properties: dict, vocab_size: int) -> None:
    """Update the schema of the fields that name tokens with the vocabulary of the current models."""
    properties["stop_token_ids"]["anyOf"][0]["items"]["maximum"] = vocab_size - 1
    properties["logit_bias"] |= bias_schema(vocab_size - 1)


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
                 size, file.name in service.models.loaded, file.chats)  # fmt: skip


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

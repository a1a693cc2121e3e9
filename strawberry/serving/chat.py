"""POST /v1/chat/completions: chats with models whose encoder has a chat template."""

from functools import partial
from typing import Any

from fastapi import Request

from strawberry.common import UserError, show
from strawberry.data.chat import check_messages, encode_parts, template_of
from strawberry.inference.text import encode_text
from strawberry.serving.completions import answer_request, context_length_error, make_sequences, update_token_schema
from strawberry.serving.engine import Engine, RequestGroup
from strawberry.serving.errors import ApiError
from strawberry.serving.formats import ChatFormat
from strawberry.serving.protocol import ChatRequest
from strawberry.serving.service import Service, TheService

NO_CHAT = ("models without a chat template are base models, which continue a text and are not trained to chat: send "
           "the text as `prompt` to POST /v1/completions (client.completions.create)")  # fmt: skip


async def chat_completions(body: ChatRequest, request: Request, service: TheService) -> Any:
    """Generate the assistant's answer to a chat, with a model whose encoder has a chat template. Choice i is drawn with
    seed + i.
    """
    return await answer_request(body, request, service, make_chat_group, ChatFormat)


def make_chat_group(body: ChatRequest, engine: Engine) -> RequestGroup:
    """Encode the messages and make n sequences, which end at the end of the assistant's turn. Raises ApiError."""
    encoder, template = engine.encoder, template_of(engine.encoder)
    if template is None or engine.model.takes_source:
        raise ApiError(404, f"model = {show(engine.name)}: has no chat template; {NO_CHAT}", "model")
    try:
        parts = template.split(check_messages(body.messages), add_generation_prompt=True)
        if sum(map(len, parts)) > engine.max_model_len * engine.longest_token:
            raise context_length_error(f"{sum(map(len, parts)):,} characters", engine, "messages")
        prompt = encode_parts(encoder, parts, partial(encode_text, encoder))
    except UserError as error:
        message = str(error)
        raise ApiError(400, message if "messages" in message else f"messages: {message}", "messages") from error
    sequences = make_sequences(body, engine, [prompt], None, "messages")
    for sequence in sequences:
        sequence.hidden = frozenset(encoder.specials.values())
        if not body.ignore_eos:
            sequence.request.stop |= {encoder.specials[template.end_of_turn]}
    return RequestGroup(engine, body, sequences)


def update_chat_schema(service: Service, properties: dict) -> None:
    """Update the schema of a chat's body with the current models."""
    properties["max_tokens"]["anyOf"][0]["maximum"] = service.settings.context
    properties["max_completion_tokens"]["anyOf"][0]["maximum"] = service.settings.context
    if files := {name: file for name, file in service.models.scan().items() if file.chats}:
        properties["model"] = properties["model"] | {"enum": list(files)}
        update_token_schema(properties, min(file.hyperparams["vocab_size"] for file in files.values()))

"""Bodies and answers of the routes of text, in the words of OpenAI and vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Query
from pydantic import Field

from strawberry.config import WHOLE, option
from strawberry.data.chat import MAX_MESSAGES
from strawberry.inference.logprobs import MAX_TOP
from strawberry.inference.penalties import BIAS_RULE, MAX_BIASES, LogitBias

MAX_PROMPTS, MAX_SAMPLES, MAX_STOPS, MAX_STOP_TOKENS, MAX_LOGPROBS = 64, 32, 16, 128, 5


def list_type(item: Any, low: int, high: int | None = None) -> Any:
    """A list of low to high items, which is refused at the first wrong one."""
    return Annotated[list[item], Field(min_length=low, max_length=high, fail_fast=True)]


def tokens_type(low: int, max_token: int = 2**31 - 1, high: int | None = None) -> Any:
    return list_type(Annotated[int, Field(strict=True, ge=0, le=max_token), WHOLE], low, high)


def prompt_type(max_token: int = 2**31 - 1) -> Any:
    """Text, or tokens, or a list of either."""
    tokens = tokens_type(1, max_token)
    return str | tokens | list_type(str, 1, MAX_PROMPTS) | list_type(tokens, 1, MAX_PROMPTS)


Prompt, TokenList, StopTokens = prompt_type(), tokens_type(0), tokens_type(0, high=MAX_STOP_TOKENS)
StopText = Annotated[str, Field(min_length=1)]
Stop = StopText | list_type(StopText, 0, MAX_STOPS) | None

# What OpenAI's and vLLM's clients may send to completions and nothing here implements, with the values besides null
# that ask for nothing: many clients send these defaults with every request. Other values are refused by name.
UNSUPPORTED_FIELDS: dict[str, tuple] = {
    # https://platform.openai.com/docs/api-reference/completions/create
    "suffix": ("",),
    # vLLM's CompletionRequest: sampling
    "use_beam_search": (False,), "early_stopping": (False,), "length_penalty": (1,), "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True, False), "truncation_side": (), "logits_processors": ([],),
    "repetition_detection": (), "thinking_token_budget": (),
    # vLLM's: what is read and answered
    "add_special_tokens": (True, False), "prompt_embeds": (), "prompt_logprobs": (), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,), "return_token_offsets": (False,),
    "request_id": (), "priority": (0,), "cache_salt": (), "vllm_xargs": ({},),
    "kv_transfer_params": ({},), "ec_transfer_params": ({},),
    # vLLM's: structured output
    "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "guided_decoding_backend": (), "guided_whitespace_pattern": (),
}  # fmt: skip


@dataclass
class StreamOptions:
    include_usage: bool | None = option(None, "whether a last piece tells how many tokens it were")
    include_obfuscation: bool | None = option(None, "of no effect: no piece is padded")
    continuous_usage_stats: bool | None = option(False, "whether, with include_usage, every piece tells it too")


def range_pattern(top: int) -> str:
    """A regular expression of the decimal numbers 0 to top.

    >>> range_pattern(257)
    '^(0|[1-9][0-9]{0,1}|1[0-9]{2}|2[0-4][0-9]{1}|25[0-6]|257)$'
    """
    digits = str(top)
    found = ["0", f"[1-9][0-9]{{0,{len(digits) - 2}}}"] if top > 9 else ["0"]
    for i, digit in enumerate(digits):
        low, high, rest = int(i == 0), int(digit) - 1, len(digits) - i - 1
        choice = f"[{low}-{high}]" if high > low else str(low)
        if high >= low:
            found.append(digits[:i] + choice + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"^({'|'.join([*found, digits])})$"


def bias_schema(top: int = 10**9 - 1) -> dict:
    """Of logit_bias, with tokens 0 to top."""
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    found = {"type": "object", "maxProperties": MAX_BIASES, "additionalProperties": False,
             "patternProperties": {range_pattern(top): bias}}  # fmt: skip
    return {"anyOf": [found, {"type": "null"}]}


@dataclass
class GenerationRequest:
    """What completions and chat completions share."""

    model: str = option(None, "name of a model of /v1/models")
    temperature: float | None = option(1.0, "0 takes the likeliest token each time", low=0, high=100)
    top_p: float | None = option(1.0, "draw from the likeliest tokens that make up this probability", above=0, high=1)
    top_k: int | None = option(0, "draw from the k likeliest tokens; 0 or -1: from all", low=-1, high=2**20)
    min_p: float | None = option(0.0, "draw from tokens at least so often as likely as the likeliest", low=0, high=1)
    repetition_penalty: float | None = option(
        1.0, "divide positive logits of tokens of the prompt and the text, multiply negative ones; 1: off",
        low=0.01, high=100,
    )
    presence_penalty: float | None = option(0.0, "subtract from the logits of tokens of the text", low=-2, high=2)
    frequency_penalty: float | None = option(
        0.0, "subtract from the logits of tokens of the text, times how often each is there", low=-2, high=2
    )
    logit_bias: LogitBias | None = option({}, "add to the logits of tokens", must=BIAS_RULE)
    min_tokens: int | None = option(0, "tokens before the first that may end the text; stop strings do not count "
                                    "before", low=0)  # fmt: skip
    ignore_eos: bool | None = option(False, "whether the text continues beyond <|eot|>")
    stop_token_ids: StopTokens | None = option(
        [], "tokens that end the text", must=f"a list of at most {MAX_STOP_TOKENS} tokens"
    )
    n: int | None = option(1, "texts for each prompt; text i is drawn with seed + i", low=1, high=MAX_SAMPLES)
    seed: int | None = option(None, "the same seed makes the same text; default, or -1: drawn", low=-1,
                              high=2**53 - 1)  # fmt: skip
    stop: Stop = option(
        None, f"text that ends a text and is not part of it, or a list of at most {MAX_STOPS}",
        must=f"text, not empty, or a list of at most {MAX_STOPS} of it",
    )
    stream: bool | None = option(False, "send the text as it is made, as server-sent events")
    stream_options: StreamOptions | None = option(None, "of a stream")
    timeout: float | None = option(None, "seconds until it is given up; the server's --timeout holds too", low=5)
    user: str | None = option("", "who asks; of no effect")

    def __post_init__(self) -> None:
        self.top_k = 0 if self.top_k == -1 else self.top_k
        self.seed = None if self.seed == -1 else self.seed

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop if self.stop is not None else []


@dataclass
class CompletionRequest(GenerationRequest):
    prompt: Prompt = option(
        None, f"text to continue, or its tokens, or a list of at most {MAX_PROMPTS} of either",
        must=f"text, or a list of tokens, or a list of at most {MAX_PROMPTS} of either",
    )
    source: str | None = option(None, "what an encoder-decoder reads; a prompt then begins its answer")
    max_tokens: int | None = option(16, "tokens to make at most; a text ends sooner where the context does", low=0)
    echo: bool | None = option(False, "whether the prompt is given back before what continues it")
    logprobs: int | None = option(None, "tell each token's log probability, and so many likeliest tokens'", low=0,
                                  high=MAX_LOGPROBS)  # fmt: skip
    best_of: int | None = option(None, "n, or 1, which is n: all texts are sent, and none is chosen among", low=1)

    required: ClassVar = ("model", "prompt")
    neutral: ClassVar = UNSUPPORTED_FIELDS
    schemas: ClassVar = {"best_of": {"enum": [None, 1]}, "logit_bias": bias_schema}

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.best_of not in (None, 1, self.n):
            yield "best_of", "is not supported; ask for n texts and choose, or leave it out"

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt

    @property
    def length(self) -> int:
        """What sample.py calls max_tokens."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell with each token's log probability; None: nothing."""
        return self.logprobs


# What OpenAI's and vLLM's clients may send to chat completions and nothing here implements, as above.
UNSUPPORTED_CHAT_FIELDS: dict[str, tuple] = {
    **{name: values for name, values in UNSUPPORTED_FIELDS.items() if name != "suffix"},
    # https://platform.openai.com/docs/api-reference/chat/create
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",), "store": (False,),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "audio": (), "prediction": (), "metadata": ({},),
    "service_tier": ("auto", "default"), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
    "safety_identifier": (), "prompt_cache_key": (),
    # vLLM's ChatCompletionRequest
    "echo": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,), "documents": ([],),
    "chat_template": (), "chat_template_kwargs": ({},), "mm_processor_kwargs": ({},),
    "include_reasoning": (True, False),
}  # fmt: skip
MESSAGE_FIELDS = ("role", "content", "name")
EMPTY_MESSAGE_FIELDS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id")
MESSAGE_RULE = f"a list of 1 to {MAX_MESSAGES} objects with role and content"
MESSAGES_SCHEMA = {
    "type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": {
        "type": "object", "required": ["role", "content"], "additionalProperties": False,
        "properties": {
            **{name: {"enum": [None, []]} for name in EMPTY_MESSAGE_FIELDS},
            "role": {"type": "string", "minLength": 1}, "name": {"type": ["string", "null"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {
                "type": "object", "required": ["type", "text"], "additionalProperties": False,
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}}]},
        },
    },
}  # fmt: skip


@dataclass
class ChatRequest(GenerationRequest):
    messages: list_type(dict[str, Any], 1, MAX_MESSAGES) = option(
        None, "the chat so far; the model's template makes text of it", must=MESSAGE_RULE
    )
    max_completion_tokens: int | None = option(None, "tokens to make at most; default: what the context leaves", low=0)
    max_tokens: int | None = option(None, "the same, by its older name; the smaller of both holds", low=0)
    logprobs: bool | None = option(None, "whether to tell each token's log probability; default: with top_logprobs")
    top_logprobs: int | None = option(None, "tell those of so many likeliest tokens too", low=0, high=MAX_TOP)

    required: ClassVar = ("model", "messages")
    neutral: ClassVar = UNSUPPORTED_CHAT_FIELDS
    schemas: ClassVar = {"messages": MESSAGES_SCHEMA, "logit_bias": bias_schema}
    echo: ClassVar = False

    def problems(self) -> Iterator[tuple[str, str]]:
        for i, message in enumerate(self.messages or ()):
            if not isinstance(message.get("name"), str | None):
                yield "messages", f"messages[{i}].name must be text or null"
            for name, value in message.items():
                if name not in MESSAGE_FIELDS and (name not in EMPTY_MESSAGE_FIELDS or value not in (None, [])):
                    yield "messages", f"messages[{i}].{name} is not supported; leave it out"

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to tell with each token's log probability; None: nothing."""
        asks = self.top_logprobs is not None if self.logprobs is None else self.logprobs
        return (self.top_logprobs or 0) if asks else None

    @property
    def length(self) -> int:
        """What sample.py calls max_tokens."""
        return min(n for n in (self.max_tokens, self.max_completion_tokens, 2**31) if n is not None)


@dataclass
class Logprobs:
    """Of each token; of a stream's piece, those since the last piece. The first of an echoed prompt has None."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass
class Choice:
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


@dataclass
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass
class Completion:
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


@dataclass
class TopLogprob:
    token: str
    logprob: float
    bytes: list[int]


@dataclass
class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


@dataclass
class ChatLogprobs:
    content: list[TokenLogprob]
    refusal: None


@dataclass
class ChatMessage:
    role: Literal["assistant"]
    content: str
    refusal: None


@dataclass
class ChatChoice:
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


@dataclass
class ChatCompletion:
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None


@dataclass
class Model:
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    arch: str
    vocab_size: int
    block_size: int
    bytes: int  # on disk
    size: int  # the older name of `bytes`
    loaded: bool
    chat: bool  # whether /v1/chat/completions takes it


@dataclass
class ModelList:
    object: Literal["list"]
    data: list[Model]


@dataclass
class TokenizeRequest:
    prompt: str = option(None, "text; that of a special token, and nothing else, is that token", must="text")
    model: str | None = option(None, "whose encoder; default: the newest model's")
    add_special_tokens: bool | None = option(False, "of no effect: there are none to add")

    required: ClassVar = ("prompt",)
    neutral: ClassVar = {"return_token_strs": (False,)}


@dataclass
class DetokenizeRequest:
    tokens: TokenList = option(None, "tokens of a text", must="a list of tokens")
    model: str | None = option(None, "whose encoder; default: the newest model's")

    required: ClassVar = ("tokens",)


@dataclass
class Tokens:
    count: int
    max_model_len: int
    tokens: list[int]


@dataclass
class Detokenized:
    prompt: str


@dataclass
class TokenizerInfo:
    model: str
    vocab_size: int
    eos_token: str
    bos_token: str
    pad_token: str


@dataclass
class Health:
    status: str


Limit = Annotated[int, Query(ge=1, le=100, description="how many at most")]


After = Annotated[str | None, Query(description="the id behind which the list goes on")]


@dataclass
class Deleted:
    id: str
    object: str
    deleted: bool = True

"""The options of sampling a text, shared by sample.py and notebooks."""

from collections.abc import Iterator
from dataclasses import dataclass

from strawberry.config import option
from strawberry.inference.penalties import BIAS_RULE, LogitBias


@dataclass
class SamplingOptions:
    length: int = option(256, "maximum number of new tokens", low=1, high=2**20)
    temperature: float = option(0.8, "sampling temperature; 0: always the most likely token", low=0)
    top_k: int = option(0, "sample from the k most likely tokens; 0: from all", low=0)
    top_p: float = option(1.0, "sample from the most likely tokens with this total probability", above=0, high=1)
    min_p: float = option(0.0, "sample from tokens with at least this share of the highest probability", low=0, high=1)
    repetition_penalty: float = option(
        1.0, "divide positive logits of tokens of the prompt and the text, multiply negative ones; 1: off",
        low=0.01, high=100,
    )
    presence_penalty: float = option(0.0, "subtract from the logits of tokens of the text", low=-2, high=2)
    frequency_penalty: float = option(
        0.0, "subtract from the logits of tokens of the text, times how often each is there", low=-2, high=2
    )
    logit_bias: LogitBias = option({}, 'add to the logits of tokens, such as {"17": -100}', must=BIAS_RULE)
    min_tokens: int = option(
        0, "tokens before the first that may end the text; a stop string does not count before", low=0
    )
    ignore_eos: bool = option(False, "continue beyond <|eot|>, up to --length")
    stop_token_ids: list[int] = option([], "token that ends the text; may be repeated", low=0)
    seed: int | None = option(None, "sample n uses seed + n, from n = 0; default: random, and printed", low=0)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.min_tokens > self.length:
            yield "min_tokens", f"is more than --length, which is {self.length}; give fewer, or a larger --length"

"""Change logits before sampling: logit bias, a minimum length, repetition, presence and frequency penalties.

Names, meanings and order are vLLM's: first the bias and the minimum length, then the repetition penalty, then the
frequency and presence penalties; temperature and filters follow (strawberry/ops/sampling.py).
"""

from __future__ import annotations

from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

MAX_BIASES = 512
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)]
BIAS_RULE = f'an object {{"token id": number from -100 to 100, …}} of at most {MAX_BIASES}'


class LogitsSettings(Protocol):
    """The fields of a sampling.Request that change its logits."""

    prompt: list[int]
    stop: frozenset[int]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    min_tokens: int
    processes_logits: bool


def apply_penalties(
    logits: Tensor, in_prompt: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Logits (n, V) after the penalties (n, 1) of each row.

    in_prompt: whether a token is in the prompt, (n, V). counts: how often it has been generated, (n, V).
    Repetition (arXiv 1909.05858, equation 2, as transformers and vLLM compute it): the logit of a token of the prompt
    or of the generated text is divided by the penalty if it is positive, else multiplied. Presence and frequency
    (OpenAI): logit − count · frequency − (count > 0) · presence. Penalties of 1, 0 and 0 change nothing.
    """
    generated = counts > 0
    penalty = torch.where(in_prompt | generated, repetition, 1.0)
    logits = torch.where(logits > 0, logits / penalty, logits * penalty)
    return logits - counts * frequency - generated * presence


class LogitsProcessor:
    """The bias, the minimum length, the penalties and the token counts of each row, on the device, in tensors of fixed
    shape and address that a CUDA graph can read. They are allocated for the first request that needs them.
    """

    def __init__(self, rows: int, vocab_size: int, device):
        self.rows, self.vocab_size, self.device = rows, vocab_size, device
        self.tensors: tuple[Tensor, ...] = ()

    def allocate(self) -> None:
        table, column = (self.rows, self.vocab_size), (self.rows, 1)
        self.bias = torch.zeros(table, device=self.device)
        self.in_prompt, self.is_stop = (torch.zeros(table, dtype=torch.bool, device=self.device) for _ in range(2))
        self.counts = torch.zeros(table, dtype=torch.int32, device=self.device)
        self.min_tokens = torch.zeros(column, dtype=torch.int64, device=self.device)
        self.repetition = torch.ones(column, device=self.device)
        self.presence, self.frequency = (torch.zeros(column, device=self.device) for _ in range(2))
        self.tensors = (self.bias, self.in_prompt, self.is_stop, self.counts, self.min_tokens, self.repetition,
                        self.presence, self.frequency)  # fmt: skip

    def set_row(self, row: int, r: LogitsSettings) -> None:
        """Set a row to the settings of its new request."""
        if r.processes_logits and not self.tensors:
            self.allocate()
        for tensor in self.tensors:
            tensor[row] = 0
        if self.tensors:
            self.repetition[row] = 1
        if r.processes_logits:
            self.bias[row] = self.spread(r.logit_bias, self.bias)
            self.in_prompt[row] = self.spread(dict.fromkeys(r.prompt, True), self.in_prompt)
            self.is_stop[row] = self.spread(dict.fromkeys(r.stop, True), self.is_stop)
            self.min_tokens[row] = r.min_tokens
            self.repetition[row], self.presence[row] = r.repetition_penalty, r.presence_penalty
            self.frequency[row] = r.frequency_penalty

    def spread(self, values: dict[int, float | bool], like: Tensor) -> Tensor:
        """The values (V,) of all tokens; 0 for those that are not given."""
        found = torch.zeros(self.vocab_size, dtype=like.dtype)
        if values:
            found[list(values)] = torch.tensor(list(values.values()), dtype=like.dtype)
        return found.to(like.device)

    def move_row(self, source: int, target: int) -> None:
        for tensor in self.tensors:
            tensor[target] = tensor[source]

    def process(self, logits: Tensor, rows: slice, num_generated: Tensor) -> Tensor:
        """Logits (n, V) of the rows, changed. num_generated (n,): tokens generated before this one. The logits
        of a row whose request changes nothing stay bitwise equal.
        """
        too_short = num_generated.unsqueeze(1) < self.min_tokens[rows]
        logits = (logits + self.bias[rows]).masked_fill(self.is_stop[rows] & too_short, -torch.inf)
        return apply_penalties(logits, self.in_prompt[rows], self.counts[rows], self.repetition[rows],
                               self.presence[rows], self.frequency[rows])  # fmt: skip

    def count(self, rows: slice, token: Tensor, active: Tensor) -> None:
        """Count the tokens (n,) of the rows that are active, (n,) of 0 and 1."""
        self.counts[rows].scatter_add_(1, token.unsqueeze(1), active.unsqueeze(1).to(self.counts.dtype))

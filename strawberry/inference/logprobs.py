"""Log probabilities of the tokens that a decoder generates, in the model's own distribution: before logit bias,
penalties, temperature and filters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_TOP = 20  # most likely tokens of a step that are kept; OpenAI's limit
LEAST = -9999.0  # instead of −∞, which JSON does not have


class TokenLogprob(NamedTuple):
    """A token's log probability in nats, and those of the most likely tokens at its position."""

    logprob: float
    top: list[tuple[int, float]]


class LogprobBuffers:
    """The log probabilities of each row's newest token, on the device, in tensors of fixed shape and address that a
    CUDA graph can write. They are allocated for the first request with top_logprobs.
    """

    def __init__(self, rows: int, vocab_size: int, device):
        self.rows, self.num_top, self.device = rows, min(MAX_TOP, vocab_size), device
        self.tensors: tuple[Tensor, ...] = ()

    def allocate(self) -> None:
        own, top = (torch.zeros(self.rows, n, device=self.device) for n in (1, self.num_top))
        self.tensors = (own, top, torch.zeros(self.rows, self.num_top, dtype=torch.int64, device=self.device))

    def store(self, rows: slice, logits: Tensor, token: Tensor) -> None:
        """Store the log probabilities of the rows' tokens (n,), which are at least 0, from the model's logits (n,
        V)."""
        logp = logits.log_softmax(dim=-1).clamp(min=LEAST)
        found = (logp.gather(1, token.unsqueeze(1)), *logp.topk(self.num_top))
        for tensor, value in zip(self.tensors, found, strict=True):
            tensor[rows] = value


def read_logprob(buffers: tuple[Tensor, ...], index: int, num_top: int) -> TokenLogprob:
    """The TokenLogprob of one row, from a copy of the buffers on the host."""
    own, top, places = (tensor[index].tolist() for tensor in buffers)
    return TokenLogprob(own[0], list(zip(places, top, strict=True))[:num_top])

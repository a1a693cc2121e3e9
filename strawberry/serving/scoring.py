"""The log probabilities of a text that is there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from strawberry.inference.scoring import iter_windows
from strawberry.ops.common import to_accum_dtype


@dataclass
class TokenScores:
    """How likely a model found each token of a text: None for the first, of which it says nothing."""

    logprobs: list[float | None]
    best: list[list[tuple[int, float]]]  # the likeliest tokens in that place, and their logprobs


@torch.no_grad()
def score_tokens(model, tokens: list[int], source: list[int] | None, k: int) -> TokenScores:
    """Log probabilities (nats) of the tokens, each after those before it, by one pass over all."""
    ids = torch.tensor([tokens], device=model.device)
    found = TokenScores([None], [[]])
    for logits, targets in predict_in_chunks(model, ids, source):
        logp = logits.log_softmax(dim=-1).clamp(min=-9999.0)  # JSON knows no infinity
        found.logprobs += logp.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
        values, places = logp.topk(min(k, logp.size(1)))
        found.best += [list(zip(*row)) for row in zip(places.tolist(), values.tolist())]
    return found


def predict_in_chunks(
    model, ids: torch.Tensor, source: list[int] | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits (n, V), the tokens (n,) that they are to predict), some positions at a time.

    A model that sees the future gets no more of it than there was when it made the text.
    """
    given = None if source is None else torch.tensor([source], device=ids.device)
    if model.causal:
        logits = model(ids[:, :-1], source=given)[0][0] if ids.size(1) > 1 else ids.new_zeros(0, 1)
        for begin in range(0, len(logits), 256):
            yield to_accum_dtype(logits[begin : begin + 256]), ids[0, begin + 1 : begin + 257]
    else:
        for begin, done, end in iter_windows(ids.size(1) - 1, model.config.block_size, 1, causal=False):
            yield to_accum_dtype(model(ids[:, begin:end])[0][0, done - end :]), ids[0, done + 1 : end + 1]

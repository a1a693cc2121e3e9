"""Log probabilities of the tokens of a given text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from strawberry.inference.scoring import iter_windows
from strawberry.ops.common import to_accum_dtype


@dataclass
class TokenScores:
    """Log probabilities of the tokens of a text; None for the first token, which has no prediction."""

    logprobs: list[float | None]
    best: list[list[tuple[int, float]]]  # the most likely tokens at that position, and their logprobs


@torch.no_grad()
def score_tokens(model, tokens: list[int], source: list[int] | None, k: int) -> TokenScores:
    """Log probabilities (nats) of the tokens, each given those before it, and the k most likely tokens at each
    position.
    """
    ids = torch.tensor([tokens], device=model.device)
    found = TokenScores([None], [[]])
    for logits, targets in predict_in_chunks(model, ids, source):
        logp = logits.log_softmax(dim=-1).clamp(min=-9999.0)  # JSON has no infinity
        found.logprobs += logp.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
        values, places = logp.topk(min(k, logp.size(1)))
        found.best += [list(zip(*row)) for row in zip(places.tolist(), values.tolist())]
    return found


def predict_in_chunks(
    model, ids: torch.Tensor, source: list[int] | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (logits (n, V), target tokens (n,)) for some positions at a time.

    A non-causal model predicts each token from the tokens before it, as in generation.
    """
    given = None if source is None else torch.tensor([source], device=ids.device)
    if model.causal:
        logits = model(ids[:, :-1], source=given)[0][0] if ids.size(1) > 1 else ids.new_zeros(0, 1)
        for begin in range(0, len(logits), 256):
            yield to_accum_dtype(logits[begin : begin + 256]), ids[0, begin + 1 : begin + 257]
    else:
        for begin, done, end in iter_windows(ids.size(1) - 1, model.config.block_size, 1, causal=False):
            yield to_accum_dtype(model(ids[:, begin:end])[0][0, done - end :]), ids[0, done + 1 : end + 1]

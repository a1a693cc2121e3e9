"""Loss and bits per byte of a text under a model."""

import math
from collections.abc import Iterator

import torch
from tqdm import tqdm

from strawberry.common import UserError
from strawberry.inference.text import encode_text, explain_errors


@torch.no_grad()
def score_text(model, encoder, text: str, stride: int = 0, source: list[int] | None = None) -> tuple[float, float]:
    """(loss in nats per token, bits per byte) of a text. The end of the text (<|eot|>) is not predicted.

    Every token is predicted once, from at most block_size tokens before it; the first one from <|eot|>. Bits per byte
    can be compared between models with different encoders. Raises UserError if the text is empty or the stride exceeds
    block_size.
    """
    size = model.config.block_size
    if stride > size:
        raise UserError(f"--stride {stride}: exceeds the model's block_size {size}, so tokens would be left out")
    if not text:
        raise UserError("there is nothing to score: the text is empty")
    ids = torch.tensor([[encoder.eot, *encode_text(encoder, text)]], device=model.device)
    n, total = ids.size(1) - 1, 0.0
    given = None if source is None else torch.tensor([source], device=ids.device)
    with tqdm(total=n, desc="scoring", unit=" tokens", leave=False, disable=None) as bar, explain_errors(size):
        for begin, done, end in iter_windows(n, size, stride or max(1, size // 2), model.causal):
            targets = ids[:, begin + 1 : end + 1].clone()
            targets[:, : done - begin] = -1  # the window before scored these
            total += model(ids[:, begin:end], targets, source=given)[1].item() * (end - done)
            bar.update(end - done)
    return total / n, total / math.log(2) / len(text.encode())


def iter_windows(n: int, size: int, stride: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, done, end): the window reads tokens begin … end−1, and its predictions of tokens done+1 … end are
    new.

    In a non-causal model, a prediction would depend on later tokens, so each window scores its last prediction only.

    >>> list(iter_windows(10, size=4, stride=2, causal=True))
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    """
    first, stride = (size, stride) if causal else (1, 1)
    end = 0
    while end < n:
        done, end = end, min(end + (stride if end else first), n)
        yield max(0, end - size), done, end

"""Sample a token from logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform_numbers(n: int, generator, device) -> Tensor:
    """(n,) random numbers in [0, 1) from one torch.Generator, from one generator for each number, or from torch's
    default generator."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generator]).to(device)
    return torch.rand(n, generator=generator, device=device if generator is None else generator.device).to(device)


def sample(logits: Tensor, u: Tensor, temperature, top_k=None, top_p=None, min_p=None, width: int | None = None,
           greedy: bool = True) -> Tensor:  # fmt: skip
    """Draw a token (B,) from logits (B, V): the one at which the cumulative probability exceeds u (B,) in [0, 1).

    Filters, in this order: top_k keeps the top_k most likely tokens, top_p the most likely tokens whose probabilities
    sum to top_p, min_p the tokens at least min_p times as likely as the most likely one; tied tokens are kept or
    dropped together. Each is a number or a tensor (B,); None turns it off. temperature 0 selects the most likely token;
    with `greedy` False, no row may have temperature 0. `width` is an upper bound of top_k. A row whose logits are NaN
    gets token −1. A row's token does not depend on the other rows or their parameters.
    """
    numbers = (temperature, top_k, top_p, min_p)
    temperature, top_k, top_p, min_p = (
        f if f is None else torch.as_tensor(f, device=logits.device).view(-1, 1) for f in numbers
    )
    divisor = temperature + (temperature == 0)  # 1 for rows with temperature 0
    p = ((logits - logits.amax(dim=-1, keepdim=True)) / divisor).exp()  # relative to the most likely token
    if top_k is not None or top_p is not None:
        ordered = p.topk(width).values if width else p.sort(descending=True).values
        if top_k is not None:
            ordered = ordered.masked_fill(torch.arange(ordered.size(1), device=p.device) >= top_k, 0.0)
        if top_p is not None:  # tokens after those that already sum to top_p
            beyond = ordered.cumsum(dim=-1) - ordered >= top_p * ordered.sum(dim=-1, keepdim=True)
            ordered = ordered.masked_fill(beyond & (top_p < 1), 0.0)
        p = p.masked_fill(p < ordered.masked_fill(ordered == 0, torch.inf).amin(dim=-1, keepdim=True), 0.0)
    if min_p is not None:
        p = p.masked_fill(p < min_p, 0.0)
    token = sample_inverse_cdf(p, u)
    return torch.where(temperature.squeeze(1) == 0, logits.argmax(dim=-1), token) if greedy else token


def sample_inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The index (B,) at which the cumulative sum of p (B, V), p ≥ 0, exceeds u (B,) times the total; −1 if p is NaN.

    Searches about 128 groups of neighbouring tokens first, then within one group, so that the cumulative sums are short
    and run in parallel.
    """
    size = -(-p.size(1) // 128)
    groups = F.pad(p, (0, -p.size(1) % size)).unflatten(1, (-1, size))  # (B, G, size)
    total = groups.sum(dim=-1).cumsum(dim=-1)
    u = u.clamp(max=1 - 2**-20).unsqueeze(1)  # so that rounding cannot exceed the last index
    goal = u * total[:, -1:]
    group = (total <= goal).sum(dim=-1, keepdim=True).clamp(max=total.size(1) - 1)
    inner = groups.gather(1, group.unsqueeze(2).expand(-1, -1, size)).squeeze(1).cumsum(dim=-1)
    goal = (goal - F.pad(total, (1, -1)).gather(1, group)).clamp(min=0)
    goal = torch.minimum(goal, inner[:, -1:] * (1 - 2**-20))
    place = group * size + (inner <= goal).sum(dim=-1, keepdim=True)
    return torch.where(total[:, -1].isnan(), -1, place.clamp(max=p.size(1) - 1).squeeze(1))

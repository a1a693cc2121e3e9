"""From logits to a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform_numbers(n: int, generator, device) -> Tensor:
    """(n,) numbers in [0, 1), from one torch.Generator, or one for each, or torch's own."""
    if isinstance(generator, (list, tuple)):
        return torch.cat([torch.rand(1, generator=g, device=g.device) for g in generator]).to(device)
    return torch.rand(n, generator=generator, device=device if generator is None else generator.device).to(device)


def sample(logits: Tensor, u: Tensor, temperature, top_k=None, top_p=None, min_p=None, width: int | None = None,
           greedy: bool = True) -> Tensor:  # fmt: skip
    """Draw a token (B,) from logits (B, V): the one at which the running sum of probabilities passes u (B,) in [0, 1).

    Left out are, one after the other, all but the top_k likeliest, all but the likeliest that make up top_p together,
    and those less than min_p times as likely as the likeliest; ties stay together. Each is a number or (B,), None is
    off; temperature 0 takes the likeliest token, unless `greedy` says that no row has it. `width`: how many tokens
    top_k leaves at most. A row whose logits are NaN gets token −1. What a row draws does not depend on the other rows,
    nor on what is asked for them.
    """
    numbers = (temperature, top_k, top_p, min_p)
    temperature, top_k, top_p, min_p = (
        f if f is None else torch.as_tensor(f, device=logits.device).view(-1, 1) for f in numbers
    )
    heat = temperature + (temperature == 0)
    p = ((logits - logits.amax(dim=-1, keepdim=True)) / heat).exp()  # as a share of the likeliest one's
    if top_k is not None or top_p is not None:
        ordered = p.topk(width).values if width else p.sort(descending=True).values
        if top_k is not None:
            ordered = ordered.masked_fill(torch.arange(ordered.size(1), device=p.device) >= top_k, 0.0)
        if top_p is not None:  # what stands before a token already makes up top_p
            beyond = ordered.cumsum(dim=-1) - ordered >= top_p * ordered.sum(dim=-1, keepdim=True)
            ordered = ordered.masked_fill(beyond & (top_p < 1), 0.0)
        p = p.masked_fill(p < ordered.masked_fill(ordered == 0, torch.inf).amin(dim=-1, keepdim=True), 0.0)
    if min_p is not None:
        p = p.masked_fill(p < min_p, 0.0)
    token = sample_inverse_cdf(p, u)
    return torch.where(temperature.squeeze(1) == 0, logits.argmax(dim=-1), token) if greedy else token


def sample_inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """The place (B,) at which the running sum of p (B, V), at least zero, passes its share u (B,), −1 where p is NaN.

    First among some 128 groups of neighbours, then within one of them: short sums, made side by side.
    """
    size = -(-p.size(1) // 128)
    groups = F.pad(p, (0, -p.size(1) % size)).unflatten(1, (-1, size))  # (B, G, size)
    total = groups.sum(dim=-1).cumsum(dim=-1)
    u = u.clamp(max=1 - 2**-20).unsqueeze(1)  # so that rounding never passes the last
    goal = u * total[:, -1:]
    group = (total <= goal).sum(dim=-1, keepdim=True).clamp(max=total.size(1) - 1)
    inner = groups.gather(1, group.unsqueeze(2).expand(-1, -1, size)).squeeze(1).cumsum(dim=-1)
    goal = (goal - F.pad(total, (1, -1)).gather(1, group)).clamp(min=0)
    goal = torch.minimum(goal, inner[:, -1:] * (1 - 2**-20))
    place = group * size + (inner <= goal).sum(dim=-1, keepdim=True)
    return torch.where(total[:, -1].isnan(), -1, place.clamp(max=p.size(1) - 1).squeeze(1))

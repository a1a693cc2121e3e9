"""Who sees whom: attention patterns, as masks for SDPA and as block masks for FlexAttention."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor


def pair_positions(q_pos: Tensor, k_pos: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (B, T) and (B, S), −1 where a slot is empty: shaped to compare, and whether s may be seen at all."""
    q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None, :]  # (B, 1, T, 1) and (B, 1, 1, S)
    return q_pos, k_pos, (k_pos >= 0) & (k_pos <= q_pos) if causal else k_pos >= 0


class AttentionPattern:
    """Attention to all, or to the newest `size` tokens, the token itself among them; in an encoder, to both sides."""

    def __init__(self, size: int | None = None):
        self.size = size
        self.key = ("window", size)

    def is_full(self, T: int) -> bool:
        """Whether, for T tokens, it is plain causal attention."""
        return self.size is None or self.size >= T

    def cache_size(self, max_length: int) -> int:
        """How many of the newest keys a cache must hold."""
        return max_length if self.size is None else min(self.size, max_length)

    def num_pairs(self, T: int, causal: bool = True) -> float:
        """How many of the T² pairs of tokens a head attends to, its heads' mean."""
        w = T if self.size is None else min(self.size, T)
        before = w * (w + 1) // 2 + (T - w) * w  # Σ min(t, w): the token itself and those before it
        return before if causal else 2 * before - T

    def mask(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        """(B, T) and (B, S) positions to (B, H or 1, T, S)."""
        q_pos, k_pos, allowed = pair_positions(q_pos, k_pos, causal)
        return allowed if self.size is None else allowed & ((q_pos - k_pos).abs() < self.size)


def count_pairs(pattern: AttentionPattern, T: int, causal: bool) -> float:
    """`num_pairs` by the mask, some queries at a time."""
    with torch.device("cpu"):
        k_pos, total = torch.arange(T)[None], 0.0
        for q_pos in k_pos.split(1024, dim=1):
            mask = pattern.mask(q_pos, k_pos, causal)
            total += mask.sum().item() / mask.size(1)
    return total


class LongformerPattern(AttentionPattern):
    """A window, and the first n_global tokens as globals (arXiv 2004.05150), which see s ≤ t like all."""

    def __init__(self, size: int, n_global: int):
        super().__init__(size)
        self.n_global = n_global
        self.key = ("longformer", size, n_global)

    def cache_size(self, max_length: int) -> int:
        return max_length

    def num_pairs(self, T: int, causal: bool = True) -> float:
        return count_pairs(self, T, causal)

    def mask(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        q_pos, k_pos, allowed = pair_positions(q_pos, k_pos, causal)
        near = (q_pos - k_pos).abs() < self.size
        return allowed & (near | (k_pos < self.n_global) | (q_pos < self.n_global))


class BigBirdPattern(AttentionPattern):
    """Longformer's, and n_random blocks of tokens, drawn for each head and block of queries from the blocks before it
    (arXiv 2007.14062). The draw goes by (seed, layer, head, block) alone: a longer text changes nothing."""

    def __init__(self, c, layer: int):
        super().__init__(c.window)
        self.base, self.block, self.n_random = LongformerPattern(c.window, c.n_global), c.sparse_block, c.n_random
        self.seed, self.layer, self.n_head = c.sparse_seed, layer, c.n_head
        self.key = ("bigbird", layer)
        self.table = self.draw(-(-c.block_size // c.sparse_block))

    def draw(self, n: int) -> Tensor:
        """(H, n, n): whether a block of queries sees a block of keys by lot."""
        table = torch.zeros(self.n_head, n, n, dtype=torch.bool, device="cpu")
        for head in range(self.n_head):
            for b in range(n):
                lots = random.Random(f"{self.seed},{self.layer},{head},{b}")
                table[head, b, lots.sample(range(b), min(self.n_random, b))] = True
        return table

    def cache_size(self, max_length: int) -> int:
        return max_length

    def num_pairs(self, T: int, causal: bool = True) -> float:
        return count_pairs(self, T, causal)

    def mask(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        blocks = -(-max(q_pos.size(1), k_pos.size(1)) // self.block)
        if blocks > self.table.size(1):  # a text longer than block_size
            self.table = self.draw(blocks)
        self.table = table = self.table.to(q_pos.device)
        q, k = ((p.clamp(min=0) // self.block).clamp(max=table.size(1) - 1) for p in (q_pos, k_pos))
        lot = table[:, q.unsqueeze(-1), k.unsqueeze(-2)].transpose(0, 1)  # (B, H, T, S)
        return self.base.mask(q_pos, k_pos, causal) | (lot & (k_pos >= 0)[:, None, None, :])


def sliding_window_mask(n: int, before: int, window: int, device) -> Tensor:
    """(1, 1, n, before + n): which of `before` earlier tokens and n own ones each of n tokens sees."""
    t, s = torch.arange(before, before + n, device=device), torch.arange(before + n, device=device)
    return AttentionPattern(window).mask(t[None], s[None])


def sliding_window_mask_mod(windows: tuple[int, ...]) -> Callable:
    """FlexAttention's mask for the window of each head, or of all heads where there is one number.

    The windows are constants of the graph: Inductor cannot lower a mask that reads a tensor of them by the head's
    number once that tensor is computed in the same graph (torch 2.11).
    """
    (first, n), *later = [(window, len(list(run))) for window, run in itertools.groupby(windows)]

    def mask_mod(b, h, t, s):
        window, start = first, n
        for other, count in later:
            window = torch.where(h >= start, other, window)
            start += count
        return (s <= t) & (t - s < window)

    return mask_mod


def sliding_window_block_mask(T: int, windows: tuple[int, ...], device, n: int = 128) -> tuple[Tensor, ...]:
    """BlockMask's tables for windows (H,): for each block of n queries how many blocks of keys it sees in part, which,
    how many whole, which; and the same for each block of keys. (1, H, J) and (1, H, J, J), by arithmetic alone."""
    J = -(-T // n)
    runs = itertools.groupby(windows)
    window = torch.cat([torch.full((len(list(run)),), w, dtype=torch.int32, device=device) for w, run in runs])
    w, i = window[:, None], torch.arange(J, dtype=torch.int32, device=device)
    ragged = 1 if T % n else 0  # the last block of queries has tokens that are not there: it sees no block whole
    first, whole = (i * n - w + 1).clamp(min=0) // n, ((i * n + 2 * n - 1 - w).clamp(min=0) // n).minimum(i)
    whole = torch.where(i < J - ragged, whole, i)  # first … whole − 1 and i in part, whole … i − 1 whole
    last, end = ((i * n + n + w - 2) // n).clamp(max=J - 1), (i + w // n - 1).clamp(max=J - 1 - ragged).maximum(i)
    return (
        *padded_block_indices(
            whole - first + 1, torch.where(i < (whole - first)[..., None], first[..., None] + i, i[:, None])
        ),
        *padded_block_indices(i - whole, whole[..., None] + i),
        *padded_block_indices(
            last - end + 1, torch.where(i > 0, end[..., None] + i, i[:, None])
        ),  # its own, end + 1 … last
        *padded_block_indices(end - i, (i[:, None] + 1 + i).expand(len(window), J, J)),
    )


def padded_block_indices(count: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(H, J) and (H, J, J) as BlockMask has them; what lies behind `count` is not read, but must be a block."""
    return count[None].contiguous(), index.clamp(max=index.size(-1) - 1)[None].contiguous()

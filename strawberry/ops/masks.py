"""Attention patterns, as masks for SDPA and as block masks for FlexAttention."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor


def pair_positions(q_pos: Tensor, k_pos: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query positions (B, T) and key positions (B, S), negative for empty slots, reshaped for broadcasting, and the
    mask of allowed pairs: not empty and, if causal, not later than the query."""
    q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None, :]  # (B, 1, T, 1) and (B, 1, 1, S)
    return q_pos, k_pos, (k_pos >= 0) & (k_pos <= q_pos) if causal else k_pos >= 0


class AttentionPattern:
    """Full attention, or attention to the newest `size` tokens including the token itself; in an encoder, to tokens
    less than `size` away on both sides."""

    def __init__(self, size: int | None = None):
        self.size = size
        self.key = ("window", size)

    def is_full(self, T: int) -> bool:
        """Whether the pattern is plain causal attention for T tokens."""
        return self.size is None or self.size >= T

    def cache_size(self, max_length: int) -> int:
        """The number of newest keys that a cache must hold."""
        return max_length if self.size is None else min(self.size, max_length)

    def num_pairs(self, T: int, causal: bool = True) -> float:
        """The number of the T² pairs of tokens that a head attends to, averaged over heads."""
        w = T if self.size is None else min(self.size, T)
        before = w * (w + 1) // 2 + (T - w) * w  # Σ min(t, w): the token itself and those before it
        return before if causal else 2 * before - T

    def mask(self, q_pos: Tensor, k_pos: Tensor, causal: bool = True) -> Tensor:
        """Boolean mask (B, H or 1, T, S) from positions (B, T) of queries and (B, S) of keys."""
        q_pos, k_pos, allowed = pair_positions(q_pos, k_pos, causal)
        return allowed if self.size is None else allowed & ((q_pos - k_pos).abs() < self.size)


def count_pairs(pattern: AttentionPattern, T: int, causal: bool) -> float:
    """`num_pairs` counted from the mask, 1024 queries at a time."""
    with torch.device("cpu"):
        k_pos, total = torch.arange(T)[None], 0.0
        for q_pos in k_pos.split(1024, dim=1):
            mask = pattern.mask(q_pos, k_pos, causal)
            total += mask.sum().item() / mask.size(1)
    return total


class LongformerPattern(AttentionPattern):
    """A window, and the first n_global tokens as global tokens (arXiv 2004.05150). In causal attention, global tokens
    attend to s ≤ t, as all tokens do."""

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
    """Longformer's pattern, and n_random blocks of keys for each head and block of queries, drawn from the blocks
    before it (arXiv 2007.14062). The draw depends only on (seed, layer, head, block), not on the sequence's length."""

    def __init__(self, c, layer: int):
        super().__init__(c.window)
        self.base, self.block, self.n_random = LongformerPattern(c.window, c.n_global), c.sparse_block, c.n_random
        self.seed, self.layer, self.n_head = c.sparse_seed, layer, c.n_head
        self.key = ("bigbird", layer)
        self.table = self.draw(-(-c.block_size // c.sparse_block))

    def draw(self, n: int) -> Tensor:
        """(H, n, n), True where a block of queries attends to a random block of keys."""
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
        if blocks > self.table.size(1):  # a sequence longer than block_size
            self.table = self.draw(blocks)
        self.table = table = self.table.to(q_pos.device)
        q, k = ((p.clamp(min=0) // self.block).clamp(max=table.size(1) - 1) for p in (q_pos, k_pos))
        lot = table[:, q.unsqueeze(-1), k.unsqueeze(-2)].transpose(0, 1)  # (B, H, T, S)
        return self.base.mask(q_pos, k_pos, causal) | (lot & (k_pos >= 0)[:, None, None, :])


def sliding_window_mask(n: int, before: int, window: int, device) -> Tensor:
    """Mask (1, 1, n, before + n) of n queries over `before` earlier tokens and their own n tokens."""
    t, s = torch.arange(before, before + n, device=device), torch.arange(before + n, device=device)
    return AttentionPattern(window).mask(t[None], s[None])


def sliding_window_mask_mod(windows: tuple[int, ...]) -> Callable:
    """FlexAttention's mask_mod for one window per head, or for one window for all heads.

    The windows are constants of the graph, because Inductor cannot lower a mask_mod that indexes a tensor of windows by
    head if that tensor is computed in the same graph (torch 2.11).
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
    """BlockMask's tensors for windows (H,): for each block of n queries, the number and indices of its partially masked
    key blocks, then of its full key blocks; the same for each block of keys. Counts (1, H, J), indices (1, H, J, J).
    They are computed arithmetically, without a dense mask."""
    J = -(-T // n)
    runs = itertools.groupby(windows)
    window = torch.cat([torch.full((len(list(run)),), w, dtype=torch.int32, device=device) for w, run in runs])
    w, i = window[:, None], torch.arange(J, dtype=torch.int32, device=device)
    ragged = 1 if T % n else 0  # the last block of queries is incomplete: none of its key blocks is full
    first, whole = (i * n - w + 1).clamp(min=0) // n, ((i * n + 2 * n - 1 - w).clamp(min=0) // n).minimum(i)
    whole = torch.where(i < J - ragged, whole, i)  # first … whole − 1 and i are partial, whole … i − 1 are full
    last, end = ((i * n + n + w - 2) // n).clamp(max=J - 1), (i + w // n - 1).clamp(max=J - 1 - ragged).maximum(i)
    return (
        *padded_block_indices(
            whole - first + 1, torch.where(i < (whole - first)[..., None], first[..., None] + i, i[:, None])
        ),
        *padded_block_indices(i - whole, whole[..., None] + i),
        *padded_block_indices(
            last - end + 1, torch.where(i > 0, end[..., None] + i, i[:, None])
        ),  # partial: its own, end + 1 … last
        *padded_block_indices(end - i, (i[:, None] + 1 + i).expand(len(window), J, J)),
    )


def padded_block_indices(count: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (H, J) and indices (H, J, J) in BlockMask's layout. Indices after the first `count` are not read, but must
    be valid block indices."""
    return count[None].contiguous(), index.clamp(max=index.size(-1) - 1)[None].contiguous()

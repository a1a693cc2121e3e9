"""The forward context: one immutable object that passes the positions, masks and sizes of a call to every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from strawberry.ops.masks import AttentionPattern


class Mode(Enum):
    """The kind of a forward call."""

    TRAIN = "train"  # whole sequences, without a cache; evaluation too
    PREFILL = "prefill"  # some tokens of each row, through a cache
    DECODE = "decode"  # one token of each row, through a cache; kernel launches do not depend on the rows' lengths
    ENCODE = "encode"  # whole sequences with bidirectional attention


class EncodedSource(NamedTuple):
    """The encoder's output for a source, and its padding mask. A cache holds the keys and values instead, and x is
    None."""

    x: Tensor | None  # (B, S, C)
    padding: Tensor  # (B, S), True where the source is padding


@dataclass(frozen=True)
class ForwardContext:
    """Positions, masks and sizes of one call. `dataclasses.replace` returns a changed copy."""

    positions: Tensor  # (1, T) or (B, T), counted from each row's start
    mode: Mode = Mode.TRAIN
    rope: tuple[Tensor, Tensor] | None = None  # cosines and sines of the positions
    lengths: Tensor | None = None  # (B,) valid tokens of each row, padding after them; None: all
    num_cached: int | None = None  # tokens of each row in the cache; None if the rows differ
    max_cached_tokens: int = 2**62  # upper bound of the ring-buffer slots that earlier calls have filled
    chunk_size: int = 0  # tokens that share weights, where weights change along the row
    chunk_weights_ready: bool = False  # whether the cache already holds the weights of all tokens' chunks
    active: Tensor | None = None  # (B, T) tokens whose recursion depth reaches this pass; None: all
    padding_mask: Tensor | None = None  # (B, T) padding in an encoder, masked for all tokens
    source: EncodedSource | None = None  # the input of cross-attention
    tokens: Tensor | None = None  # (B, T) token ids, for layers with value embeddings
    stack_input: Tensor | None = None  # (B, T, C) what entered the first block, for blocks with skip scalars
    mask_cache: dict = field(default_factory=dict)  # attention masks, built once per call for all layers

    @property
    def causal(self) -> bool:
        return self.mode is not Mode.ENCODE

    def valid_mask(self) -> Tensor | None:
        """(B, T), False for padding after a row's last token; None if there is no padding."""
        if self.lengths is None:
            return None
        return torch.arange(self.positions.size(1), device=self.positions.device) < self.lengths.unsqueeze(1)

    def at_token(self, t: int) -> ForwardContext:
        """The context of the call's t-th token alone, for layers that compute a call token by token."""
        lengths = None if self.lengths is None else (self.lengths > t).long()
        positions = self.positions[:, t : t + 1]
        return ForwardContext(positions, Mode.PREFILL, lengths=lengths, max_cached_tokens=self.max_cached_tokens + t)

    def attention_mask(self, pattern: AttentionPattern) -> Tensor | None:
        """Boolean mask of the call's tokens, (B, H or 1, T, T); None for plain causal attention."""
        if self.causal and pattern.is_full(self.positions.size(1)):
            return None
        if pattern.key not in self.mask_cache:
            mask = pattern.mask(self.positions, self.positions, self.causal)
            if self.padding_mask is not None:
                mask = mask & ~self.padding_mask[:, None, None, :]
            self.mask_cache[pattern.key] = mask
        return self.mask_cache[pattern.key]

    def cached_attention_mask(self, pattern: AttentionPattern, cache) -> Tensor | None:
        """Boolean mask of the keys that a RingKVCache's `update` returns, (B, H or 1, T, S); None if no mask is needed:
        causal attention over an empty cache, or one token that attends to all keys."""
        one_token = self.num_cached is not None and self.positions.size(1) == 1
        if self.num_cached == 0 or (one_token and type(pattern) is AttentionPattern):
            return self.attention_mask(pattern) if self.num_cached == 0 else None
        key = (*pattern.key, cache.size)
        if key not in self.mask_cache:
            self.mask_cache[key] = pattern.mask(self.positions, cache.positions(self))
        return self.mask_cache[key]

    def mask_invalid(self, u: Tensor) -> Tensor:
        """u (B, T, ·) with padding and frozen tokens set to zero, for a sum over tokens."""
        for mask in (self.valid_mask(), self.active):
            u = u if mask is None else u * mask.unsqueeze(-1)
        return u

    def keep_frozen(self, old: Tensor, new: Tensor) -> Tensor:
        """x (B, T, ·) after a step: `new`, except that frozen tokens keep `old`."""
        return new if self.active is None else torch.where(self.active.unsqueeze(-1), new, old)

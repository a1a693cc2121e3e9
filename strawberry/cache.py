"""The state of layers between calls: KV caches, running sums, weights of the open chunk.

Each layer allocates and owns its cache; the model only counts positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from strawberry.context import EncodedSource, ForwardContext

CACHE_ALIGNMENT = 64  # cache slots: a multiple of every vector length, so that all sums over slots end the same way


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class LayerCache:
    """The state of one layer between calls: named tensors (B, …) and their initial values."""

    def __init__(self, batch: int, device, **tensors: tuple[tuple[int, ...], float, torch.dtype]):
        self.initial = {name: value for name, (_, value, _) in tensors.items()}
        for name, (shape, value, dtype) in tensors.items():
            setattr(self, name, torch.full((batch, *shape), value, dtype=dtype, device=device))

    def reset(self, rows) -> None:
        for name, value in self.initial.items():
            getattr(self, name)[rows] = value

    def slice(self, rows: slice) -> LayerCache:
        """A cache of these rows, which shares this one's memory."""
        mine = copy.copy(self)
        for name in self.initial:
            setattr(mine, name, getattr(self, name)[rows])
        return mine

    def copy_row(self, source: int, target: int) -> None:
        for name in self.initial:
            getattr(self, name)[target] = getattr(self, name)[source]

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.initial)


class RingKVCache(LayerCache):
    """Ring buffer of the newest `size` tokens of each row, at slot `position % size`. One extra slot, which is never
    read, receives writes to discard."""

    def __init__(self, batch: int, device, dtype, size: int, **widths: int):
        self.size, self.names = size, tuple(widths)
        super().__init__(batch, device, **{name: ((size + 1, width), 0.0, dtype) for name, width in widths.items()})

    def filled_slots(self, n: int) -> tuple[Tensor, ...]:
        """The first n slots, (B, n, ·) each."""
        return tuple(getattr(self, name)[:, : min(n, self.size)] for name in self.names)

    def positions(self, ctx: ForwardContext) -> Tensor:
        """Positions of the tokens that `update` returns, (B or 1, S); negative for empty slots."""
        if ctx.positions.size(1) == 1:
            newest = ctx.positions if ctx.lengths is None else ctx.positions + ctx.lengths.unsqueeze(1) - 1
            return self.slot_positions(newest, ctx.max_cached_tokens + 1)
        return torch.cat((self.slot_positions(ctx.positions[:, :1] - 1, ctx.max_cached_tokens), ctx.positions), dim=1)

    def slot_positions(self, newest: Tensor, n: int) -> Tensor:
        """The positions in the first n slots, (B, n), where `newest` (B, 1) is each row's newest position."""
        slot = torch.arange(min(n, self.size), device=newest.device)
        return newest - (newest - slot) % self.size

    def update(self, ctx: ForwardContext, *new: Tensor) -> tuple[Tensor, ...]:
        """Write the call's tensors (B, T, ·). Returns each one after the cached tokens before it, (B, S, ·)."""
        if ctx.positions.size(1) == 1:  # overwrites the token that leaves the window, so all slots are visible
            self.write(ctx, new)
            return self.filled_slots(ctx.max_cached_tokens + 1)
        if ctx.num_cached == 0:
            self.write(ctx, new)
            return new
        cached = self.filled_slots(ctx.max_cached_tokens)
        both = tuple(torch.cat((o, n.to(o.dtype)), dim=1) for o, n in zip(cached, new, strict=True))
        self.write(ctx, new)
        return both

    def write(self, ctx: ForwardContext, new: tuple[Tensor, ...]) -> None:
        B, T = new[0].shape[:2]
        slot = ctx.positions % self.size
        if T > 1 or ctx.lengths is not None:  # padding and tokens that this call itself evicts go to the extra slot
            count = T if ctx.lengths is None else ctx.lengths.unsqueeze(1)
            index = torch.arange(T, device=slot.device)
            slot = torch.where((index < count) & (index >= count - self.size), slot, self.size)
        for name, tensor in zip(self.names, new, strict=True):
            mine = getattr(self, name)
            if slot.size(1) == 1:
                mine.index_put_((torch.arange(B, device=slot.device), slot.expand(B, 1).squeeze(1)),
                                tensor.squeeze(1).to(mine.dtype))  # fmt: skip
                continue
            mine.scatter_(1, slot.expand(B, T).unsqueeze(-1).expand_as(tensor), tensor.to(mine.dtype))


def iter_layer_caches(tree) -> Iterator[LayerCache]:
    """Yields every LayerCache in a nested list."""
    if isinstance(tree, LayerCache):
        yield tree
    elif tree is not None:
        for branch in tree:
            yield from iter_layer_caches(branch)


class Cache:
    """The caches of all layers, and the number of tokens in each row. The tensors are allocated once and keep their
    addresses.

    >>> cache = model.new_cache(batch_size=2, max_length=512)
    >>> logits, _ = model(prompt, cache=cache)      # the whole prompt, (2, T, V)
    >>> logits, _ = model(token, cache=cache)       # token (2, 1) continues each row
    >>> cache.reset([1])                            # row 1 is empty again, row 0 is unchanged
    """

    def __init__(self, layers: list, batch_size: int, max_length: int, device, source: EncodedSource | None = None):
        self.layers, self.max_length, self.source = layers, max_length, source
        self.lengths = [0] * batch_size  # a copy on the host, so that control flow never synchronizes with the device
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def reset(self, rows) -> None:
        rows = [rows] if isinstance(rows, int) else [int(row) for row in rows]
        for row in rows:
            self.lengths[row] = 0
        self.positions[rows] = 0
        for cache in iter_layer_caches(self.layers):
            cache.reset(rows)

    def slice(self, rows: slice) -> Cache:
        """A cache of these rows, which shares this one's memory except `lengths`."""
        mine = Cache(slice_rows(self.layers, rows), 0, self.max_length, self.positions.device)
        mine.source = None if self.source is None else EncodedSource(None, self.source.padding[rows])
        mine.positions, mine.lengths = self.positions[rows], self.lengths[rows]
        return mine

    def copy_row(self, source: int, target: int) -> None:
        """Copy the state of row `source` to row `target`."""
        for cache in iter_layer_caches(self.layers):
            cache.copy_row(source, target)
        for mine in (self.positions, self.lengths, *(() if self.source is None else (self.source.padding,))):
            mine[target] = mine[source]

    def advance(self, counts: list[int]) -> None:
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self.positions += counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=self.positions.device)

    def nbytes(self) -> int:
        return sum(cache.nbytes() for cache in iter_layer_caches(self.layers))


def slice_rows(tree, rows: slice):
    """The nested list, with every LayerCache sliced to these rows."""
    if tree is None or isinstance(tree, LayerCache):
        return tree and tree.slice(rows)
    return type(tree)(slice_rows(branch, rows) for branch in tree)


class ChunkCache(LayerCache):
    """The state of one use of `build_per_chunk`: Σ uᵀ v over the finished chunks and over the open chunk, (B, C, C)
    each, and the open chunk's weights."""

    def __init__(self, batch: int, device, dtype, C: int, shapes: list[tuple[int, ...]]):
        self.names = [f"weight{i}" for i in range(len(shapes))]
        tensors = {name: (shape, 0.0, dtype) for name, shape in zip(self.names, shapes, strict=True)}
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        square = ((C, C), 0.0, dtype)
        super().__init__(batch, device, finished=square, partial=square, **tensors)

    def begin_chunk(self, rows, build: Callable) -> list[Tensor]:
        """For rows at a chunk boundary: add the open chunk's sum to that of the finished chunks, then build and store
        the next chunk's weights. Idempotent."""
        self.finished[rows] += self.partial[rows]
        self.partial[rows] = 0.0
        weights = build(self.finished[rows].unsqueeze(1))
        for name, new in zip(self.names, weights, strict=True):
            getattr(self, name)[rows] = new.squeeze(1).to(getattr(self, name).dtype)
        return self.weights(rows)

    def weights(self, rows=slice(None)) -> list[Tensor]:
        return [getattr(self, name)[rows].unsqueeze(1) for name in self.names]

    def store(self, ctx: ForwardContext, before: Tensor, sums: Tensor, weights: Sequence[Tensor]) -> None:
        """Store the sums and weights of the chunk that has each row's last valid token."""
        rows = torch.arange(before.size(0), device=before.device)
        last = -1 if ctx.lengths is None else (ctx.lengths - 1).clamp(min=0) // ctx.chunk_size
        for mine, new in zip((self.finished, self.partial), (before, sums), strict=True):
            mine.copy_(new[rows, last])
        for name, new in zip(self.names, weights, strict=True):
            getattr(self, name).copy_(new.expand(len(rows), *new.shape[1:])[rows, last])


class CrossKVCache(LayerCache):
    """The source's keys and values, (B, S, ·) each. `reset` keeps them: a row that starts again reads the same
    source."""

    def __init__(self):
        self.initial, self.k, self.v = {}, None, None

    def allocate(self, batch: int, size: int, width: int, device, dtype) -> None:
        self.k, self.v = (torch.zeros(batch, size, width, device=device, dtype=dtype) for _ in range(2))

    def slice(self, rows: slice) -> CrossKVCache:
        mine = CrossKVCache()
        mine.k, mine.v = self.k[rows], self.v[rows]
        return mine

    def copy_row(self, source: int, target: int) -> None:
        for mine in (self.k, self.v):
            mine[target] = mine[source]

    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

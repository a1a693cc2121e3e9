"""The shard of each process: its rows of a batch, and its rows of a tensor that FSDP shards."""

import math

import torch
from torch import Tensor

from strawberry.common import UserError


def batch_parts(batch_size: int, world: int) -> tuple[int, int]:
    """(parts into which the rows of a batch are divided, groups of ranks among which the batches are divided).

    The first number is gcd(batch_size, world). The remaining factor of world is the number of groups, which take the
    batches in turn.

    >>> batch_parts(8, 2), batch_parts(3, 2), batch_parts(4, 8)
    ((2, 1), (1, 2), (4, 2))
    """
    rows = math.gcd(batch_size, world)
    return rows, world // rows


def divide_batch(batch_size: int, accumulation: int, rank: int = 0, world: int = 1) -> tuple[int, list[int]]:
    """(rows, firsts): a rank's part of a step. It takes `rows` samples from each index in `firsts`; the step's samples
    are numbered from 0.

    Raises UserError if the step cannot be divided among the ranks.

    >>> divide_batch(4, 2, rank=1, world=2), divide_batch(3, 2, rank=1, world=2), divide_batch(4, 4, rank=5, world=8)
    ((2, [2, 6]), (3, [3]), (1, [5, 13]))
    """
    row_parts, groups = batch_parts(batch_size, world)
    if accumulation % groups:
        better = -(-accumulation // groups) * groups
        near = max(batch_size // world, 1) * world
        message = f"with gradient_accumulation_steps {accumulation} it cannot be divided among {world} processes"
        raise UserError(
            f"batch_size = {batch_size}: {message}; set it to {near} or {near + world}, or "
            f"gradient_accumulation_steps to {better}"
        )
    rows = batch_size // row_parts
    micro_batches = range(rank // row_parts, accumulation, groups)
    return rows, [micro * batch_size + rank % row_parts * rows for micro in micro_batches]


# FSDP's parameters are DTensors. Each rank has the rows that torch.chunk would give it: the last ranks may have fewer
# rows, or none.


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_rows(rows: int, rank: int, world: int) -> int:
    """The number of rows that a rank has of a sharded tensor."""
    most = -(-rows // world)
    return min(max(rows - rank * most, 0), most)


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of `whole`, sharded as `like`, a tensor of the same shape."""
    if not hasattr(like, "to_local"):
        return whole
    rank, world = like.device_mesh.get_local_rank(), like.device_mesh.size()
    first = min(rank * -(-len(whole) // world), len(whole))
    return whole[first : first + shard_rows(len(whole), rank, world)]


@torch.no_grad()
def copy_to_shard(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a tensor that may be sharded."""
    to_local(target).copy_(shard_of(whole, target))


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like`; the tensor itself if `like` is not sharded or the tensor is a scalar."""
    if whole.ndim == 0 or not hasattr(like, "to_local"):
        return whole
    return to_dtensor(shard_of(whole, like).to(like.device, copy=True), like)


def to_dtensor(mine: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which `mine` is this rank's shard, in the same memory; `mine` itself if `like` is not sharded or
    `mine` is a scalar. It has the rows of `like`, and as many columns as `mine`."""
    if mine.ndim == 0 or not hasattr(like, "to_local"):
        return mine
    from torch.distributed.tensor import DTensor

    shape = torch.Size((len(like), *mine.shape[1:]))
    stride = like.stride() if shape == like.shape else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mine, like.device_mesh, like.placements, shape=shape, stride=stride)

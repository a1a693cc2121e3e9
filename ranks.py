"""The processes that train one model together: one of them, or several, each with its part of every batch.

    torchrun --nproc_per_node=2 train.py --config tiny.json

Data parallel at its plainest. Each rank has the whole model and takes its part of the rows of each batch; gradients are
averaged over all ranks before each update, so that the ranks' weights stay equal and `batch_size` means what it means
for one process. Rank 0 alone prints, draws and saves. `Alone` and `Ranks` have the same methods: train.py does not ask
how many there are.

    rank, world, main                 this one's number, how many there are, whether it is number 0
    mean_(tensors, weight)            in place: the mean over ranks, each weighted by its weight
    sum_(tensors)                     in place: the sum over ranks
    total(*numbers) -> list           the sum of each number over ranks
    agree(value) -> value             rank 0's value, plain data, for all; nobody returns before all have asked
    close()

What a rank hears nothing from is gone: a dead process closes its connections, which the others see at once, and after
TIMEOUT at the latest. They raise Lost.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from options import UserError

TIMEOUT = datetime.timedelta(minutes=30)  # longer than any evaluation or save for which the others wait
BUCKET = 1 << 24  # numbers that travel as one tensor


class Lost(Exception):
    """Another process of this run has ended, or is out of reach."""


def join(device: torch.device) -> "Alone | Ranks":
    """The ranks that torchrun has started, this one among them; Alone without torchrun."""
    return Ranks(device) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else Alone()


class Alone:
    rank, world, main = 0, 1, True

    def mean_(self, tensors: list[Tensor], weight: float) -> None:
        pass

    def sum_(self, tensors: list[Tensor]) -> None:
        pass

    def total(self, *numbers: float) -> list[float]:
        return list(numbers)

    def agree(self, value):
        return value

    def close(self) -> None:
        pass


class Ranks:
    """Several processes, over NCCL where each has a GPU of its own, else over gloo."""

    def __init__(self, device: torch.device):
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device.type == "mps":
            raise UserError('device = "mps": several processes need "cuda" or "cpu"')
        if device.type == "cuda":
            if local >= (there := torch.cuda.device_count()):
                raise UserError(f"torchrun has started more processes than GPUs: lower --nproc_per_node to {there}")
            torch.cuda.set_device(local)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot reach the other processes of torchrun: {reason}; start them all again") from error
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.main = self.rank == 0

    def mean_(self, tensors: list[Tensor], weight: float) -> None:
        total = torch.full((1,), float(weight), device=self.device)  # filled there: the host does not wait
        with listening():
            dist.all_reduce(total)
        self._reduce(tensors, weight / total.clamp(min=1))

    def sum_(self, tensors: list[Tensor]) -> None:
        self._reduce(tensors, None)

    @torch.no_grad()
    def _reduce(self, tensors: list[Tensor], factor: Tensor | None) -> None:
        for bucket in buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            if factor is not None:
                flat *= factor
            with listening():
                dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            for t, part in zip(bucket, parts, strict=True):
                t.copy_(part.view_as(t))

    def total(self, *numbers: float) -> list[float]:
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum_([totals])
        return totals.tolist()

    def agree(self, value):
        text = json.dumps(value if self.main else None).encode()
        (size,) = self.total(len(text) if self.main else 0)
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        with listening():
            dist.broadcast(data, 0)
        return json.loads(bytes(data.tolist()))

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, neighbours of one dtype together up to BUCKET numbers."""
    bucket: list[Tensor] = []
    room = 0
    for t in tensors:
        if bucket and (t.dtype != bucket[0].dtype or t.numel() > room):
            yield bucket
            bucket = []
        room = (room if bucket else BUCKET) - t.numel()
        bucket.append(t)
    if bucket:
        yield bucket


@contextlib.contextmanager
def listening():
    """Makes Lost of what the back ends raise when another process does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise Lost(f"another process of this run has ended or is out of reach ({reason})") from error

"""The loader: batches for training, made ahead on a thread.

python -m strawberry.data.loader --measure data/webtext.bin      # resident memory and speed of the loader
"""

from __future__ import annotations

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import contextlib
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import psutil

from strawberry.argument_parser import ArgumentParser
from strawberry.common import run_cli
from strawberry.data.dataset import Corpus, Split
from strawberry.data.objectives import Batch, NextToken

MAX_BATCH = 1 << 20  # rows


class Loader:
    """Batches for training, made ahead on a thread of their own.

    with Loader(corpus.train, seed, batch_size=4, accumulation=2, device="cpu") as loader:
        for micro_batches in loader:                  # one step: a list of `accumulation` batches
            for x, y, source, n_targets in micro_batches: ...      # x (rows, T) int64 on the device

    Step s takes samples s·batch_size·accumulation … and so on; micro-batch m is the m-th batch_size of them. Of several
    ranks each gets an equal part of each micro-batch, or of the micro-batches where rows do not come out even: see
    `divide_batch`. Position and order depend on nothing else, so that start_step alone resumes. An error on the thread
    is raised by next(). close() ends the thread; so do garbage collection and the end of the program. The batches of
    small steps are made many at once, since what one costs is mostly not its size: a GPU may take a step each
    millisecond.
    """

    QUEUED_STEPS = 2  # ready for the consumer
    AT_ONCE = 1 << 16  # tokens that are made at once, at most, where a step has fewer

    def __init__(
        self,
        split: Split,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        device="cpu",
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        objective=None,
    ):
        import torch

        from strawberry.sharding import divide_batch

        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not under world {world}")
        split.locate(seed, np.zeros(1, np.int64))  # a split without windows is refused here, not on the thread
        self.device = torch.device(device)
        rows, offsets = divide_batch(batch_size, accumulation, rank, world)
        share, size = rows, accumulation * batch_size
        firsts = ([step * size + offset for offset in offsets] for step in itertools.count(start_step))
        if world == 1:  # what a step reads is one stretch of samples, and so is what several do
            group = max(1, self.AT_ONCE // (size * split.block_size))
            firsts = ([step * size] for step in itertools.count(start_step, group))
            share = group * size
        cuda = None
        if self.device.type == "cuda":
            cuda = torch.cuda.current_device() if self.device.index is None else self.device.index
        self._queue: queue.Queue = queue.Queue(self.QUEUED_STEPS)
        stop = threading.Event()
        make = partial((objective or NextToken()).make_batch, split, seed)
        sizes = (share, rows, len(offsets))
        arguments = (make, sizes, firsts, cuda, self._queue, stop)  # never self: the thread would keep it alive
        thread = threading.Thread(target=_run_producer, args=arguments, name="loader", daemon=True)
        self._finalizer = weakref.finalize(self, _stop_producer, self._queue, stop, thread)
        thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list:
        item = self._queue.get()
        if isinstance(item, list):
            return [self._to_device(batch) for batch in item]
        self._queue.put(item)  # the end or an error: so is every later call
        if item is None:
            raise StopIteration
        raise item

    def _to_device(self, batch: Batch) -> Batch:
        """The copy is queued on the caller's stream, so what the caller computes next waits for it; torch keeps the
        pinned block from reuse until the copy is done, however soon it is freed."""
        return map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def map_tensors(batch: Batch, change: Callable) -> Batch:
    """The batch with its arrays or tensors changed."""
    return Batch(*(None if part is None else change(part) for part in batch[:3]), batch.n_targets)


def split_batch(batch: Batch, rows: int) -> list[Batch]:
    """The batch in batches of so many rows."""
    if len(batch.x) == rows:
        return [batch]
    columns = [[part[i : i + rows] if part is not None else None for i in range(0, len(batch.x), rows)]
               for part in batch[:3]]  # fmt: skip
    return [Batch(x, y, source, int((y >= 0).sum())) for x, y, source in zip(*columns, strict=True)]


def _run_producer(make, sizes, firsts, cuda, ready, stop) -> None:
    """The loader's thread: one list of batches per step into `ready`, until `stop`; an error is the last thing put."""
    import torch

    count, rows, accumulation = sizes

    try:
        if cuda is not None:
            torch.cuda.set_device(cuda)  # per thread; else pinning would open a context on the first GPU too
        for step in firsts:
            batches = [
                part for first in step for part in split_batch(map_tensors(make(first, count), torch.from_numpy), rows)
            ]
            for i in range(0, len(batches), accumulation):
                some = batches[i : i + accumulation]
                ready.put([map_tensors(b, torch.Tensor.pin_memory) for b in some] if cuda is not None else some)
                if stop.is_set():
                    return
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        ready.put(error)


def _stop_producer(ready, stop, thread) -> None:
    """End the thread: it sees `stop` after at most one more put, for which draining the queue makes room."""
    stop.set()
    _drain_queue(ready)
    if thread is not threading.current_thread():  # garbage may be collected on the loader's own thread
        thread.join()
    _drain_queue(ready)
    ready.put(None)


def _drain_queue(ready) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            ready.get_nowait()


def resident_memory() -> dict[str, float]:
    """Resident memory of this process in MB, on Linux by part: anonymous (its own) and file (mapped pages)."""
    memory = psutil.Process().memory_info()
    shared = {"anonymous": memory.rss - memory.shared, "file": memory.shared} if psutil.LINUX else {}
    return {part: size / 1e6 for part, size in {"resident": memory.rss, **shared}.items()}


def measure_loader(path: str, steps: int, batch_size: int, block_size: int) -> None:
    """Print resident memory and speed while the loader draws random batches from a token file."""
    corpus = Corpus(path, None, block_size, data_division=1.0)
    tokens = corpus.train.n_tokens
    print(f"{path}: {tokens:,} tokens, {os.path.getsize(path) / 1e9:.2f} GB; batches of {batch_size} × {block_size}")
    with Loader(corpus.train, 0, batch_size) as loader:
        start = time.perf_counter()
        for step in range(steps + 1):
            next(loader)
            if step % max(steps // 10, 1) == 0:
                speed = (step + 1) * batch_size * block_size / (time.perf_counter() - start)
                memory = "  ".join(f"{name} {size:7.1f} MB" for name, size in resident_memory().items())
                print(f"batch {step:>7,}  {memory}  {speed / 1e6:6.1f} M tokens/s", flush=True)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        "-m strawberry.data.loader", "Measure the loader's resident memory and speed on a token file."
    )
    parser.add_argument("--measure", metavar="FILE", required=True)
    parser.add_argument("--steps", type=int, default=10_000, help="batches to draw (default 10000)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=256)
    arguments = parser.parse_args(argv)
    measure_loader(arguments.measure, arguments.steps, arguments.batch_size, arguments.block_size)


if __name__ == "__main__":
    run_cli(main)

"""Distributed training: one process, or several, each of which has its part of every batch.

    torchrun --nproc_per_node=2 train.py --config tiny.json

    SingleProcess  one process
    DDP            parallel: "ddp": each rank has the whole model. torch's DistributedDataParallel averages gradients,
                   bucket by bucket, during the backward pass
    FSDP           parallel: "fsdp": each rank has its shard of weights, gradients and optimizer state. torch's
                   fully_shard all-gathers a block while it computes, and activations are recomputed

All three have the same interface, so train.py does not depend on the number of processes. Only rank 0 prints, draws and
saves.

    rank, world, main                    this process's rank, the number of ranks, whether the rank is 0
    sharded                              whether weights are sharded over the ranks
    place_model(model, device, dtype)    moves the model to its device, sharded if the ranks are
    make_forward(model, compiled, idle)  the function from a batch to its loss, whose backward averages the gradients;
                                         compiled as a whole (True), block by block ("blocks") or not (False)
    sync_context(last)                   a context for one micro-batch: gradients are reduced at the last
    total_targets(n)                     the number of targets on all ranks; n is this rank's. A tensor if world > 1
    grad_seed                            the initial gradient of a loss, such that the average over ranks becomes a sum
    grad_norm(parameters)                the norm of all gradients of all ranks
    distribute(stacks, shapes, work)     work(stack) for stacks of matrices, divided among the ranks
    gather(tree)                         on rank 0, the tree with whole tensors in place of sharded ones
    full_model(model)                    a context with the whole model on rank 0, None on other ranks
    all_reduce_(tensors)                 sums the tensors over ranks in place
    sum_numbers(*numbers) -> list        the sum of each number over ranks
    broadcast_object(value) -> value     rank 0's value, JSON data; also a barrier
    max_signal(number) -> number         the largest signal number that any rank received
    stops_together                       whether all ranks must stop after the same step, because a rank cannot abandon
                                         a collective or a launched step
    can_capture                          whether the collectives of a step can be part of a CUDA graph
    start_heartbeat(on_loss)             on GPUs, lets wait_for() detect lost processes from now on; on_loss(PeerLost)
                                         is called on a thread where wait_for() is not reached
    device_step()                        a context around calls that may wait for a collective of all ranks
    host_work()                          a context, maybe in a device_step(), around long work that does not wait
    wait_for(event)                      waits until the device reaches the event; raises PeerLost if a lost process
                                         prevents that
    reset()                              discards the state of an abandoned step; make_forward() must follow
    detect_peer_loss()                   a context that converts a backend's connection errors to PeerLost
    close()                              ends the process group
    hard_exit(code)                      ends a process whose peers may be lost

A process that does not respond is lost. A process that ends closes its connections, which the others detect
immediately, or after TIMEOUT at the latest. They raise PeerLost.
"""

import contextlib
import ctypes
import datetime
import gc
import inspect
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strawberry.common import UserError, first_line
from strawberry.sharding import shard_rows, to_local
from strawberry.training import blocks

TIMEOUT = datetime.timedelta(minutes=30)  # longer than any evaluation or save of rank 0, for which the others wait
BUCKET_SIZE = 1 << 24  # numbers in one all-reduce
COMPILE_PARTITIONS = 3  # graphs of a compiled model: one's all-reduce overlaps with the backward pass of the next
HEARTBEAT_INTERVAL = 2.0  # seconds between two heartbeats
HEARTBEAT_TIMEOUT = 16.0  # seconds without a heartbeat after which a process is lost, if a device waits for it
DRAIN_TIMEOUT = 5.0  # seconds for the device to finish its collectives with a lost process


class PeerLost(Exception):
    """Another process of this run has ended or cannot be reached."""

    def __init__(self, reason: str):
        super().__init__(f"another process of this run has ended or is out of reach ({reason})")


def join_processes(device: torch.device, parallel: str = "ddp") -> "SingleProcess | ProcessGroup":
    """Join the process group of torchrun; a SingleProcess without torchrun. Raises UserError if that fails."""
    return PARALLEL[parallel](device) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else SingleProcess()


class SingleProcess:
    """One process, for which the operations over ranks do nothing. See the module's docstring."""

    rank, world, main, sharded, can_save = 0, 1, True, False, True
    grad_seed, can_capture, stops_together = None, True, False

    def place_model(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return model.to(device)

    def make_forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        blocks.compile_blocks(model, compiled == "blocks")
        return torch.compile(model, dynamic=False) if compiled is True else model

    def sync_context(self, last: bool):
        return contextlib.nullcontext()

    def total_targets(self, n: int | Tensor) -> int | Tensor:
        return n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1)

    def grad_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def distribute(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        return map(work, stacks)

    def gather(self, tree):
        return tree

    @contextlib.contextmanager
    def full_model(self, model: nn.Module):
        yield model

    def all_reduce_(self, tensors: list[Tensor]) -> None:
        pass

    def sum_numbers(self, *numbers: float) -> list[float]:
        return list(numbers)

    def broadcast_object(self, value):
        return value

    def max_signal(self, number: int) -> int:
        return 0

    def start_heartbeat(self, on_loss=None) -> None:
        pass

    def device_step(self):
        return contextlib.nullcontext()

    def host_work(self):
        return contextlib.nullcontext()

    def wait_for(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def reset(self) -> None:
        pass

    def detect_peer_loss(self):
        return contextlib.nullcontext()

    def close(self) -> None:
        pass

    def hard_exit(self, code: int) -> None:
        pass


class ProcessGroup:
    """Base class of DDP and FSDP. Uses NCCL with one GPU per process, gloo on the CPU."""

    sharded, can_save, peer_lost, can_capture = False, True, False, False

    def __init__(self, device: torch.device):
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device.type == "mps":
            raise UserError('device = "mps": several processes need "cuda" or "cpu"')
        about = {}
        if device.type == "cuda":
            if local_rank >= (there := torch.cuda.device_count()):
                raise UserError(f"torchrun has started more processes than GPUs: lower --nproc_per_node to {there}")
            torch.cuda.set_device(local_rank)
            about["device_id"] = torch.device("cuda", local_rank)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **about)
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"cannot reach the other processes of torchrun: {reason}; start them all again") from error
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.main = self.rank == 0
        self.grad_seed = torch.tensor(float(self.world), device=device)  # turns the average of gradients into a sum
        self.shares: dict = {}
        # a GPU has launched steps that wait for the other ranks
        self.stops_together = self.sharded or device.type == "cuda"
        # host numbers go through gloo, which does not synchronize with the GPU
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else None
        self.heartbeat: Heartbeat | None = None
        if device.type == "cuda":
            # CUDA's default stream cannot be captured, and autograd accumulates gradients on the stream where their
            # parameters were first used, so this process uses another stream for all its work
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.Stream())

    def total_targets(self, n: int | Tensor) -> int | Tensor:
        if isinstance(n, Tensor):
            total = n.float()
        else:
            total = torch.full((), float(n), device=self.device)  # filled on the device, without a synchronization
        with self.detect_peer_loss(certain=True):
            dist.all_reduce(total)
        return total.clamp(min=1)

    @torch.no_grad()
    def all_reduce_(self, tensors: list[Tensor]) -> None:
        for bucket in bucket_tensors(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            with self.detect_peer_loss(certain=True):
                dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))

    def sum_numbers(self, *numbers: float) -> list[float]:
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with self.device_step():
            self.all_reduce_([totals])
            return totals.tolist()

    def broadcast_object(self, value):
        text = json.dumps(value if self.main else None).encode()
        (size,) = self.sum_numbers(len(text) if self.main else 0)
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        with self.device_step():
            with self.detect_peer_loss(certain=True):
                dist.broadcast(data, 0)
            return json.loads(bytes(data.tolist()))

    @contextlib.contextmanager
    def detect_peer_loss(self, certain: bool = False):
        """A context that raises PeerLost for connection errors. `certain`: every RuntimeError except out of memory is
        one."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not (certain or is_connection_error(error)):
                raise
            self.can_save, self.peer_lost = not self.sharded, True
            if self.heartbeat:
                self.heartbeat.in_step = True  # the cleanup may wait for the device
            raise PeerLost(first_line(error)) from error

    def max_signal(self, number: int) -> int:
        largest = torch.tensor([number])
        with self.detect_peer_loss(certain=True):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def start_heartbeat(self, on_loss: Callable[[PeerLost], object] | None = None) -> None:
        if self.heartbeat is None and self.device.type == "cuda":  # gloo reports a lost process itself
            store = dist.distributed_c10d._get_default_store()
            self.heartbeat = Heartbeat(store, self.rank, self.world, on_loss)

    @contextlib.contextmanager
    def device_step(self):
        if self.heartbeat is None:
            yield
            return
        before, self.heartbeat.in_step = self.heartbeat.in_step, True
        yield
        self.heartbeat.in_step = before  # not after an error, since the cleanup may wait for the device

    @contextlib.contextmanager
    def host_work(self):
        if self.heartbeat is None:
            yield
            return
        before, self.heartbeat.in_step = self.heartbeat.in_step, False
        try:
            yield
        finally:
            self.heartbeat.in_step = before

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Poll the event. A GPU that waits for a lost process never reports an error, so a synchronization could block
        forever. Raises PeerLost."""
        began, checked = time.monotonic(), 0.0  # checked: seconds from `began` to the last check of heartbeats
        while not event.query():
            waited = time.monotonic() - began
            reason = "the device waits for it" if self.peer_lost and waited > DRAIN_TIMEOUT else None
            if waited > checked + HEARTBEAT_INTERVAL and not reason and self.heartbeat:
                reason, checked = self.heartbeat.stale_peer(), waited
            if reason or waited > TIMEOUT.total_seconds():
                self.can_save, self.peer_lost = False, True  # launched steps cannot be undone
                raise PeerLost(reason or f"no answer within {TIMEOUT.total_seconds() / 60:.0f} minutes")
            time.sleep(min(2e-4 + waited / 200, 0.05))

    def shares_for(self, shapes: list[tuple[int, int, int]]) -> list[list[range]]:
        """`divide_matrices`, cached, since each step has the same shapes."""
        key = tuple(shapes)
        if key not in self.shares:
            self.shares[key] = divide_matrices(shapes, self.world)
        return self.shares[key]

    def close(self) -> None:
        if self.heartbeat:
            self.heartbeat.stop()
        for thing in (dist.group.WORLD, getattr(self, "ddp", None)):
            leak_process_group(thing)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    def hard_exit(self, code: int) -> None:
        """End the process without cleanup when peers may be lost. In a normal exit, a thread that releases DDP's
        pending work waits for the GIL while Python waits for the thread: a deadlock."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def leak_process_group(thing) -> None:
    """Leak a reference. A backend's thread may wait for the GIL to release a tensor that it has sent; destroying the
    process group at that moment waits for the thread, which is a deadlock."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def bucket_tensors(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the tensors in order, in buckets of one dtype with at most BUCKET_SIZE numbers; a larger tensor is its own
    bucket."""
    bucket: list[Tensor] = []
    room = 0
    for t in tensors:
        if bucket and (t.dtype != bucket[0].dtype or t.numel() > room):
            yield bucket
            bucket = []
        room = (room if bucket else BUCKET_SIZE) - t.numel()
        bucket.append(t)
    if bucket:
        yield bucket


def is_connection_error(error: RuntimeError) -> bool:
    """Whether an error raised in a forward or backward pass is a backend's error about another process."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "NCCL error",
             "gloo/transport", "Timed out waiting", "timed out", "remote process exited", "Socket closed")  # fmt: skip
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


class Heartbeat:
    """A thread that writes an increasing number to the process group's store every HEARTBEAT_INTERVAL seconds, so that
    other ranks know that this process is alive. NCCL's own watchdog does not monitor collectives in a CUDA graph.

    `in_step` is True while the main thread may wait for a collective of all ranks. If it is True and a rank has been
    lost for DRAIN_TIMEOUT, the thread calls on_loss(PeerLost). By then wait_for() would have raised PeerLost and the
    process would have ended, so the main thread must be in a CUDA call, such as reading a number or allocating pinned
    memory, that waits for the device, which waits for the lost rank.
    """

    def __init__(self, store, rank: int, world: int, on_loss: Callable[[PeerLost], object] | None = None):
        self.store, self.rank, self.world = (store.clone() if hasattr(store, "clone") else store), rank, world
        self.beats, self.stopped = 0, threading.Event()
        self.on_loss, self.in_step = on_loss, False
        self.lost_since: float | None = None  # when the thread first found a rank lost
        self.seen: dict[int, tuple[bytes, float]] = {}  # each rank's last heartbeat, and when it was first seen
        self.beat()
        self.thread = threading.Thread(target=self.run, name="heartbeat", daemon=True)
        self.thread.start()

    def key(self, rank: int) -> str:
        return f"heartbeat of rank {rank}"

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self.key(self.rank), str(self.beats))

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is lost, which other ranks detect themselves
            while not self.stopped.wait(HEARTBEAT_INTERVAL):
                self.beat()
                self.check_peers()

    def check_peers(self) -> None:
        """Call on_loss if a rank is lost and the main thread has not reacted within DRAIN_TIMEOUT."""
        reason = self.stale_peer() if self.on_loss and self.in_step else None
        self.lost_since = (self.lost_since or time.monotonic()) if reason else None
        if reason and time.monotonic() - self.lost_since > DRAIN_TIMEOUT:
            self.on_loss(PeerLost(reason))

    def stale_peer(self) -> str | None:
        """A message about a rank without a heartbeat for HEARTBEAT_TIMEOUT seconds, or about a lost store; None if all
        ranks are alive. Must be called repeatedly, since it compares with earlier calls."""
        now = time.monotonic()
        try:
            for rank in range(self.world):
                beat = self.store.get(self.key(rank)) if self.store.check([self.key(rank)]) else b""
                before, since = self.seen.get(rank, (None, now))
                self.seen[rank] = (beat, since if beat == before else now)
                if now - self.seen[rank][1] > HEARTBEAT_TIMEOUT:
                    return f"rank {rank} has sent no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s"
        except RuntimeError as error:
            return first_line(error)
        return None

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join(HEARTBEAT_INTERVAL)


class DDP(ProcessGroup):
    """The whole model on each rank. Weights stay bitwise equal, since all ranks apply the same updates."""

    ddp = None  # until make_forward(), ranks do not communicate, while each measures the batch size that fits

    def place_model(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return model.to(device)

    def make_forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        """`idle` returns whether a step leaves parameters without a gradient, for which DDP would otherwise wait. A
        model compiled as several graphs overlaps all-reduce with backward; one graph yields all gradients at its
        end."""
        if self.ddp is None:
            with self.detect_peer_loss():
                about = {"gradient_as_bucket_view": True, "find_unused_parameters": idle()}
                if compiled is True and not model.set_compile_partitions(COMPILE_PARTITIONS):
                    about["bucket_cap_mb"] = 1 << 10  # all gradients are ready at the same time
                newer = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
                about["forward_sync_buffers" if newer else "broadcast_buffers"] = False  # equal: see all_reduce_
                self.ddp = nn.parallel.DistributedDataParallel(model, **about)
            self.ddp._set_ddp_runtime_logging_sample_rate(1 << 30)  # unused timings, which synchronize
            # to find unused parameters, DDP synchronizes with the device
            self.can_capture = not about["find_unused_parameters"]
        blocks.compile_blocks(model, compiled == "blocks")
        torch._dynamo.config.optimize_ddp = False  # it cannot split graphs that contain autograd functions
        return torch.compile(self.ddp, dynamic=False) if compiled is True else self.ddp

    def sync_context(self, last: bool):
        return contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def total_targets(self, n: int) -> int | Tensor:
        return max(n, 1) if self.ddp is None else super().total_targets(n)

    grad_norm = SingleProcess.grad_norm
    gather = SingleProcess.gather

    def reset(self) -> None:
        self.ddp = None
        gc.collect()  # DDP removes its hooks from the parameters only when it is destroyed

    def distribute(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        """Each rank's share is a contiguous slice of each stack; one all-gather distributes the results."""
        if not (stacks := list(stacks)):
            return []
        shares = self.shares_for([(len(stack), *stack.shape[1:]) for stack in stacks])
        sizes = [[len(mine[rank]) * stack[0].numel() for stack, mine in zip(stacks, shares, strict=True)]
                 for rank in range(self.world)]  # fmt: skip
        flat = stacks[0].new_zeros(max(map(sum, sizes)))  # the same length on all ranks, as the all-gather requires
        done = (work(stack[as_slice(mine[self.rank])]) for stack, mine in zip(stacks, shares, strict=True)
                if mine[self.rank])  # fmt: skip
        at = 0
        for update in done:
            flat[at : at + update.numel()] = update.flatten()
            at += update.numel()
        gathered = flat.new_empty(self.world, len(flat))
        with self.detect_peer_loss(certain=True):
            all_gather(gathered.view(-1), flat)
        updates = [torch.empty_like(stack) for stack in stacks]
        for rank in range(self.world):
            pieces = gathered[rank, : sum(sizes[rank])].split(sizes[rank])
            for update, piece, mine in zip(updates, pieces, shares, strict=True):
                place = update[as_slice(mine[rank])]
                place.copy_(piece.view_as(place))
        return updates

    @contextlib.contextmanager
    def full_model(self, model: nn.Module):
        yield model if self.main else None


def all_gather(into: Tensor, tensor: Tensor) -> None:
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(into, tensor)  # its name in newer versions of torch


def as_slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


class FSDP(ProcessGroup):
    """Each rank has its rows of every parameter, gradient and optimizer state.

    A block's weights are all-gathered for its forward pass and again for its backward pass, and freed after each. The
    other parameters (embeddings, head, final norms) are one unit, which stays gathered from the forward pass to the end
    of backward. Each micro-batch reduce-scatters its gradients, so no rank ever has all of them.
    """

    sharded = True
    can_capture = False  # a capture would need private attributes of fully_shard: its collectives' streams

    def place_model(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Shard the model, which is built in host memory, block by block, and move each shard to the device."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in blocks.iterate_blocks(model):
            blocks.ActivationCheckpoint(block)
            half = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            narrow = dtype != torch.float32 and blocks.has_only_matmul_weights(block)
            fully_shard(block, mesh=mesh, mp_policy=half if narrow else wide)
        self.root = fully_shard(model, mesh=mesh, mp_policy=wide)
        return self.root

    def make_forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        """Blocks are always compiled separately, between the hooks that all-gather and free their weights."""
        blocks.compile_blocks(model, bool(compiled))
        return model

    def sync_context(self, last: bool):
        return contextlib.nullcontext()

    @torch.no_grad()
    def grad_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        grads = [to_local(p.grad) for p in parameters if p.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        square = torch.zeros((), device=self.device)
        if grads:
            square = torch.stack(torch._foreach_norm(grads)).square().sum()
        with self.detect_peer_loss(certain=True):
            dist.all_reduce(square)
        return square.sqrt()

    def distribute(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        """work() on stacks (n, this rank's rows, columns) of matrices; `shapes` are the whole matrices' shapes. An
        all-to-all collects each matrix on the rank that works on it; a second one returns the result's rows."""
        if not (stacks := list(stacks)):
            return []
        shares = self.shares_for([(len(stack), *shape) for stack, shape in zip(stacks, shapes, strict=True)])
        sent = [[stack[as_slice(mine[rank])] for stack, mine in zip(stacks, shares, strict=True)]
                for rank in range(self.world)]  # fmt: skip
        own = [[(len(mine[self.rank]), shard_rows(rows, rank, self.world), columns)
                for mine, (rows, columns) in zip(shares, shapes, strict=True)]
               for rank in range(self.world)]  # fmt: skip
        pieces = self.exchange(sent, own)
        back = [[] for _ in range(self.world)]
        for parts_of_stack in zip(*pieces, strict=True):  # from each rank: (n, its rows, columns)
            whole = torch.cat(parts_of_stack, dim=1)
            done = work(whole) if len(whole) else whole
            for rank, piece in enumerate(done.split([piece.size(1) for piece in parts_of_stack], dim=1)):
                back[rank].append(piece)
        returned = self.exchange(back, [[tuple(piece.shape) for piece in to_rank] for to_rank in sent])
        return [torch.cat(parts_of_stack) for parts_of_stack in zip(*returned, strict=True)]

    def exchange(self, sent: list[list[Tensor]], shapes: list[list[tuple]]) -> list[list[Tensor]]:
        """All-to-all: sends the tensors sent[r] to each rank r, and returns the tensors received from each rank, whose
        shapes are given."""
        flat = torch.cat([piece.flatten() for to_rank in sent for piece in to_rank])
        sizes = [[math.prod(shape) for shape in from_rank] for from_rank in shapes]
        got = flat.new_empty(sum(map(sum, sizes)))
        sent_sizes = [sum(piece.numel() for piece in to_rank) for to_rank in sent]
        with self.detect_peer_loss(certain=True):
            dist.all_to_all_single(got, flat, list(map(sum, sizes)), sent_sizes)
        received = got.split(list(map(sum, sizes)))
        return [
            [piece.view(shape) for piece, shape in zip(part.split(size), shape_list, strict=True)]
            for part, size, shape_list in zip(received, sizes, shapes, strict=True)
        ]

    def gather(self, tree, device: str | torch.device = "cpu"):
        """Gathers tensor by tensor: at most one whole tensor is on the device at a time (with `device` "cpu"), and only
        rank 0 keeps them."""
        if isinstance(tree, dict):
            return {key: self.gather(value, device) for key, value in tree.items()}
        if not hasattr(tree, "full_tensor"):
            return tree
        with self.device_step(), self.detect_peer_loss(certain=True), torch.no_grad():
            whole = tree.full_tensor()
            return whole.to(device) if self.main else None

    @contextlib.contextmanager
    def full_model(self, model: nn.Module):
        """A float32 copy of the model on rank 0's device, for work of one process: text generation and the strict
        loss."""
        from model import build
        from strawberry.initialization import SkipInit

        tensors = self.gather({name: p.detach() for name, p in model.named_parameters()}, self.device)
        if not self.main:
            yield None
            return
        with SkipInit():
            plain = build(model.config)
        for name, p in plain.named_parameters():
            p.data = tensors.pop(name)
        plain.to(self.device)
        for name, buffer in model.named_buffers():
            plain.get_buffer(name).copy_(buffer)
        yield plain.eval()


PARALLEL = {"ddp": DDP, "fsdp": FSDP}


def divide_matrices(shapes: list[tuple[int, int, int]], world: int) -> list[list[range]]:
    """For each stack (n, rows, columns), the contiguous range of its matrices that each rank processes, such that all
    ranks have about the same cost. Greedy: the most expensive matrices first, each to the rank with the lowest load.

    >>> divide_matrices([(3, 4, 4), (1, 8, 8)], world=2)
    [[range(0, 0), range(0, 3)], [range(0, 1), range(1, 1)]]
    """
    cost = [rows * columns * min(rows, columns) for _, rows, columns in shapes]
    load = [0] * world
    counts = [[0] * world for _ in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: -cost[i]):
        for _ in range(shapes[i][0]):
            rank = load.index(min(load))
            load[rank] += cost[i]
            counts[i][rank] += 1
    return [[range(sum(count[:rank]), sum(count[: rank + 1])) for rank in range(world)] for count in counts]

"""The processes that train one model together: one of them, or several, each with its part of every batch.

    torchrun --nproc_per_node=2 train.py --config tiny.json

    SingleProcess  one process
    DDP            parallel: "ddp": each rank has the whole model. torch's DistributedDataParallel averages gradients,
                   bucket by bucket, while the backward pass still runs
    FSDP           parallel: "fsdp": each rank keeps its shard of weights, gradients and optimizer state. torch's
                   fully_shard gathers a block while it computes, and activations are recomputed

All three have the same methods: train.py does not ask how many processes there are. Rank 0 alone prints, draws, saves.

    rank, world, main                    this one's number, how many there are, whether it is number 0
    sharded                              whether no rank alone has the whole model
    place_model(model, device, dtype)    the model on its device, each rank with what it keeps
    make_forward(model, compiled, idle)  what takes a batch to its loss, gradients being averaged in the backward pass;
                                         compiled as a whole (True), block by block ("blocks") or not
    sync_context(last)                   a context for one micro-batch's passes: gradients are reduced at the last
    total_targets(n)                     the targets of all ranks, n being this one's; a tensor where there are several
    grad_seed                            the gradient of a loss, such that the average over ranks is the sum of losses
    grad_norm(parameters)                the norm of all gradients together
    distribute(stacks, shapes, work)     work(stack) of stacks of matrices, each rank doing its share
    gather(tree)                         on rank 0, whole tensors in the place of sharded ones
    full_model(model)                    a context with the whole model on rank 0, None elsewhere
    all_reduce_(tensors)                 in place: the sum over ranks
    sum_numbers(*numbers) -> list        the sum of each number over ranks
    broadcast_object(value) -> value     rank 0's value, plain data, for all; nobody returns before all have asked
    max_signal(number) -> number         the largest signal that any rank got, where all must stop at the same step
    stops_together                       whether they must, since none can undo what it has begun with the others
    can_capture                          whether the collectives of a step can be part of a CUDA graph
    start_heartbeat()                    from here on, wait_for() looks after the others
    wait_for(event)                      until the device has reached it; PeerLost where a lost process prevents that
    reset()                              forget a step that was given up in the middle; then make_forward() anew
    detect_peer_loss()                   a context that turns the back ends' errors about a lost process into PeerLost
    close()
    hard_exit(code)                      ends a process whose peers may be gone

A process that is silent is gone: a dead process closes its connections, which the others see at once, and after TIMEOUT
at the latest. They raise PeerLost.
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

from strawberry.common import UserError
from strawberry.sharding import shard_rows, to_local
from strawberry.training import blocks

TIMEOUT = datetime.timedelta(minutes=30)  # longer than any evaluation or save for which the others wait
BUCKET_SIZE = 1 << 24  # numbers that travel as one tensor
COMPILE_PARTITIONS = 3  # graphs of a compiled model: gradients of one travel while those of the next are computed
HEARTBEAT_INTERVAL = 2.0  # seconds between two signs of life
HEARTBEAT_TIMEOUT = 20.0  # seconds without one after which a process counts as gone, where a device waits for it
DRAIN_TIMEOUT = 5.0  # seconds in which a device may finish what it has begun with a process that is gone


class PeerLost(Exception):
    """Another process of this run has ended, or is out of reach."""


def join_processes(device: torch.device, parallel: str = "ddp") -> "SingleProcess | ProcessGroup":
    """The ranks that torchrun has started, this one among them; Alone without torchrun."""
    return PARALLEL[parallel](device) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else SingleProcess()


class SingleProcess:
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

    def start_heartbeat(self) -> None:
        pass

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
    """What replicated and sharded have in common. Over NCCL where each process has a GPU of its own, else over gloo."""

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
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot reach the other processes of torchrun: {reason}; start them all again") from error
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.main = self.rank == 0
        self.grad_seed = torch.tensor(float(self.world), device=device)  # gradients are averaged, and are to be a sum
        self.shares: dict = {}
        self.stops_together = (
            self.sharded or device.type == "cuda"
        )  # a GPU is some steps behind, waiting for the others
        # plain numbers that need not wait for the GPU
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else None
        self.heartbeat: Heartbeat | None = None
        if device.type == "cuda":
            # CUDA's default stream cannot be captured, and autograd adds up gradients where their parameters were first
            # used: so all of this process's work is on another one
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.Stream())

    def total_targets(self, n: int | Tensor) -> int | Tensor:
        if isinstance(n, Tensor):
            total = n.float()
        else:
            total = torch.full((), float(n), device=self.device)  # filled there: the host does not wait
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
        self.all_reduce_([totals])
        return totals.tolist()

    def broadcast_object(self, value):
        text = json.dumps(value if self.main else None).encode()
        (size,) = self.sum_numbers(len(text) if self.main else 0)
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        with self.detect_peer_loss(certain=True):
            dist.broadcast(data, 0)
        return json.loads(bytes(data.tolist()))

    @contextlib.contextmanager
    def detect_peer_loss(self, certain: bool = False):
        """`certain`: whatever is raised in it comes from the connection."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not (certain or is_connection_error(error)):
                raise
            self.can_save, self.peer_lost = not self.sharded, True
            reason = str(error).strip().partition("\n")[0]
            raise PeerLost(f"another process of this run has ended or is out of reach ({reason})") from error

    def max_signal(self, number: int) -> int:
        largest = torch.tensor([number])
        with self.detect_peer_loss(certain=True):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def start_heartbeat(self) -> None:
        self.heartbeat = self.heartbeat or Heartbeat(dist.distributed_c10d._get_default_store(), self.rank, self.world)

    def wait_for(self, event: torch.cuda.Event) -> None:
        """A GPU that waits for a process that is gone waits for ever, and says nothing: so the host only looks."""
        began, looked = time.monotonic(), 0.0
        while not event.query():
            waited = time.monotonic() - began
            gone = "the device waits for it" if self.peer_lost and waited > DRAIN_TIMEOUT else None
            if waited > looked + HEARTBEAT_INTERVAL and not gone and self.heartbeat:
                gone, looked = self.heartbeat.stale_peer(), waited
            if gone or waited > TIMEOUT.total_seconds():
                self.can_save, self.peer_lost = False, True  # what the device has begun cannot be undone
                raise PeerLost(f"another process of this run has ended or is out of reach ({gone or 'no answer'})")
            time.sleep(min(2e-4 + waited / 200, 0.05))


    def shares_for(self, shapes: list[tuple[int, int, int]]) -> list[list[range]]:
        """`divide_matrices`, remembered: a step asks for the same each time."""
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
        """End the process where others may be gone, and take nothing apart: what DDP began with them is dropped by a
        thread that waits for Python's lock, while Python waits for that thread, for ever."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def leak_process_group(thing) -> None:
    """One reference more than there is. A back end's thread may be about to drop what it has just sent, for which it
    waits for Python's lock; if Python takes the back end apart meanwhile, it waits for that thread, for ever."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def bucket_tensors(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, neighbours of one dtype together up to BUCKET numbers."""
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
    """Whether an error that came out of a pass of the model is the back end's, about another process."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "NCCL error",
             "gloo/transport", "Timed out waiting", "timed out", "remote process exited", "Socket closed")  # fmt: skip
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


class Heartbeat:
    """A thread that tells the others, in the store where they met, that this process is there: a number every BEAT
    seconds. NCCL's own watchdog does not see what a CUDA graph does."""

    def __init__(self, store, rank: int, world: int):
        self.store, self.rank, self.world = (store.clone() if hasattr(store, "clone") else store), rank, world
        self.beats, self.ended = 0, threading.Event()
        self.seen: dict[int, tuple[bytes, float]] = {}  # the last heartbeat of each, and since when
        self.beat()
        self.thread = threading.Thread(target=self.run, name="heartbeat", daemon=True)
        self.thread.start()

    def key(self, rank: int) -> str:
        return f"heartbeat of rank {rank}"

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self.key(self.rank), str(self.beats))

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the others find that out themselves
            while not self.ended.wait(HEARTBEAT_INTERVAL):
                self.beat()

    def stale_peer(self) -> str | None:
        """The rank without a heartbeat for SILENT seconds, in which this was called repeatedly; None: no rank."""
        now = time.monotonic()
        try:
            for rank in range(self.world):
                beat = self.store.get(self.key(rank)) if self.store.check([self.key(rank)]) else b""
                before, since = self.seen.get(rank, (None, now))
                self.seen[rank] = (beat, since if beat == before else now)
                if now - self.seen[rank][1] > HEARTBEAT_TIMEOUT:
                    return f"rank {rank} has been silent for {HEARTBEAT_TIMEOUT:.0f} s"
        except RuntimeError as error:
            return str(error).strip().partition("\n")[0]
        return None

    def stop(self) -> None:
        self.ended.set()
        self.thread.join(HEARTBEAT_INTERVAL)


class DDP(ProcessGroup):
    """The whole model on each rank. Weights stay equal, bit for bit, since all get the same gradients and updates."""

    ddp = None  # before forward() each rank is on its own, to find out how large a batch it has memory for

    def place_model(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return model.to(device)

    def make_forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        """`idle`: whether a step leaves parameters without a gradient, for which DDP would otherwise wait. Gradients
        travel while others are computed where a compiled model comes as several graphs; one gives all at its end."""
        if self.ddp is None:
            with self.detect_peer_loss():
                about = {"gradient_as_bucket_view": True, "find_unused_parameters": idle()}
                if compiled is True and not model.set_compile_partitions(
                    COMPILE_PARTITIONS
                ):  # all come at once: few parcels
                    about["bucket_cap_mb"] = 1 << 10
                newer = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
                about["forward_sync_buffers" if newer else "broadcast_buffers"] = False  # they are equal: see sum_
                self.ddp = nn.parallel.DistributedDataParallel(model, **about)
            self.ddp._set_ddp_runtime_logging_sample_rate(1 << 30)  # times that nobody reads, waiting for the device
            self.can_capture = not about[
                "find_unused_parameters"
            ]  # which unused ones are, DDP's host would ask the device
        blocks.compile_blocks(model, compiled == "blocks")
        torch._dynamo.config.optimize_ddp = False  # it cannot divide graphs with functions that bring their gradients
        return torch.compile(self.ddp, dynamic=False) if compiled is True else self.ddp

    def sync_context(self, last: bool):
        return contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def total_targets(self, n: int) -> int | Tensor:
        return max(n, 1) if self.ddp is None else super().total_targets(n)

    grad_norm = SingleProcess.grad_norm
    gather = SingleProcess.gather

    def reset(self) -> None:
        self.ddp = None
        gc.collect()  # it leaves the parameters only when nothing is left of it

    def distribute(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        """Each rank's share is contiguous in each stack; one gather brings all of them to all."""
        if not (stacks := list(stacks)):
            return []
        shares = self.shares_for([(len(stack), *stack.shape[1:]) for stack in stacks])
        sizes = [[len(mine[rank]) * stack[0].numel() for stack, mine in zip(stacks, shares, strict=True)]
                 for rank in range(self.world)]  # fmt: skip
        flat = stacks[0].new_zeros(max(map(sum, sizes)))  # as long for all: what a gather takes
        done = (work(stack[as_slice(mine[self.rank])]) for stack, mine in zip(stacks, shares, strict=True) if
                mine[self.rank])  # fmt: skip
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
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(into, tensor)  # its newer name, where there is one


def as_slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


class FSDP(ProcessGroup):
    """Each rank keeps its rows of every parameter, and of its gradient and optimizer state.

    A block's weights are put together when it computes, forwards and again backwards, and given up afterwards; the
    rest (embeddings, head, last norms) is one unit of its own, there from the forward pass to the end of the backward
    one. Gradients are averaged and divided in each micro-batch, so that no rank ever holds all of them.
    """

    sharded = True
    can_capture = False  # a graph would need private parts of fully_shard: the streams that it gathers and reduces on

    def place_model(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model, built whole in the host's memory, is sharded block by block on its way to the device."""
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
        """Blocks are always compiled one by one, between what puts them together and what takes them apart."""
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
        """Stacks (n, this rank's rows, columns) of matrices whose whole shapes are given. Each matrix is put together
        on the rank that works on it, and what comes of it goes back to where its rows are."""
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
        for parts_of_stack in zip(*pieces, strict=True):  # from each rank (n, its rows, columns)
            whole = torch.cat(parts_of_stack, dim=1)
            done = work(whole) if len(whole) else whole
            for rank, piece in enumerate(done.split([piece.size(1) for piece in parts_of_stack], dim=1)):
                back[rank].append(piece)
        returned = self.exchange(back, [[tuple(piece.shape) for piece in to_rank] for to_rank in sent])
        return [torch.cat(parts_of_stack) for parts_of_stack in zip(*returned, strict=True)]

    def exchange(self, sent: list[list[Tensor]], shapes: list[list[tuple]]) -> list[list[Tensor]]:
        """What each rank has sent to this one, in tensors of the shapes given, for `sent`, tensors for each rank."""
        flat = torch.cat([piece.flatten() for to_rank in sent for piece in to_rank])
        sizes = [[math.prod(shape) for shape in from_rank] for from_rank in shapes]
        got = flat.new_empty(sum(map(sum, sizes)))
        gives = [sum(piece.numel() for piece in to_rank) for to_rank in sent]
        with self.detect_peer_loss(certain=True):
            dist.all_to_all_single(got, flat, list(map(sum, sizes)), gives)
        parcels = got.split(list(map(sum, sizes)))
        return [
            [piece.view(shape) for piece, shape in zip(parcel.split(size), shape_list, strict=True)]
            for parcel, size, shape_list in zip(parcels, sizes, shapes, strict=True)
        ]

    def gather(self, tree, device: str | torch.device = "cpu"):
        """Tensor by tensor: no rank but the first ever has more than one of them whole, and that one on the host."""
        if isinstance(tree, dict):
            return {key: self.gather(value, device) for key, value in tree.items()}
        if not hasattr(tree, "full_tensor"):
            return tree
        with self.detect_peer_loss(certain=True), torch.no_grad():
            whole = tree.full_tensor()
        return whole.to(device) if self.main else None

    @contextlib.contextmanager
    def full_model(self, model: nn.Module):
        """A copy on rank 0's device, in float32, for what takes one process: text, and losses token by token."""
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
    """For each stack (n, rows, columns), which of its matrices each rank takes: neighbours, and such that all ranks
    have about as much to do. The costly ones are given out first, each to the rank that has least.

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

"""The processes that train one model together: one of them, or several, each with its part of every batch.

    torchrun --nproc_per_node=2 train.py --config tiny.json

    Alone        one process
    Replicated   parallel: "ddp": each rank has the whole model. torch's DistributedDataParallel averages gradients,
                 bucket by bucket, while the backward pass still goes on
    Sharded      parallel: "fsdp": each rank keeps its part of weights, gradients and optimizer state. torch's
                 fully_shard puts a block together while it computes, and activations are computed twice

All three have the same methods: train.py does not ask how many there are. Rank 0 alone prints, draws and saves.

    rank, world, main               this one's number, how many there are, whether it is number 0
    sharded                         whether no rank alone has the whole model
    place(model, device, dtype)     the model on its device, each rank with what it keeps
    forward(model, compiled, idle)  what takes a batch to its loss, gradients being averaged on the way back; compiled
                                    as a whole (True), block by block ("blocks") or not
    together(last)                  a context for one micro-batch's two passes: what is reduced, when it is the last
    targets(n)                      the targets of all ranks, n being this one's; a tensor where there are several
    seed                            the gradient of a loss, such that the average over ranks is the sum of losses
    norm(parameters)                the norm of all gradients together
    spread(stacks, shapes, work)    work(stack) of stacks of matrices, each rank doing its share
    gather(tree)                    on rank 0, whole tensors in the place of sharded ones
    whole(model)                    a context with the whole model on rank 0, None elsewhere
    sum_(tensors)                   in place: the sum over ranks
    total(*numbers) -> list         the sum of each number over ranks
    agree(value) -> value           rank 0's value, plain data, for all; nobody returns before all have asked
    heard(number) -> number         the largest signal that any rank got, where they must stop at the same step
    stop_together                   whether they must, since none can take back what it has begun with the others
    graphs                          whether what they tell each other in a step can be part of a CUDA graph
    watch()                         from here on, wait() looks after the others
    wait(event)                     until the device has come there; Lost where another process keeps it from that
    join_streams()                  what goes on beside the current stream ends before what comes next: so a graph ends
    renew()                         forget how a step began that was given up in the middle; then forward() anew
    listening()                     a context that makes Lost of what the back ends raise when a process is gone
    close()
    vanish(code)                      ends a process whose peers may be gone

What a rank hears nothing from is gone: a dead process closes its connections, which the others see at once, and after
TIMEOUT at the latest. They raise Lost.

Index:  parts of a batch · sharded tensors · one process · several · signs of life · replicated · sharded · blocks ·
        Muon's work
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
from torch.utils.checkpoint import checkpoint

from options import UserError
from strawberry.sharding import shard_rows, to_local

TIMEOUT = datetime.timedelta(minutes=30)  # longer than any evaluation or save for which the others wait
BUCKET = 1 << 24  # numbers that travel as one tensor
PIECES = 3  # graphs of a compiled model: gradients of one travel while those of the next are computed
BEAT = 2.0  # seconds between two signs of life
SILENT = 20.0  # seconds without one after which a process counts as gone, where a device waits for it
PARTING = 5.0  # seconds in which a device may finish what it has begun with a process that is gone


class Lost(Exception):
    """Another process of this run has ended, or is out of reach."""


def join(device: torch.device, parallel: str = "ddp") -> "Alone | Ranks":
    """The ranks that torchrun has started, this one among them; Alone without torchrun."""
    return PARALLEL[parallel](device) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else Alone()


# ---- one process ---------------------------------------------------------------------------------------------------


class Alone:
    rank, world, main, sharded, can_save = 0, 1, True, False, True
    seed, graphs, stop_together = None, True, False

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return model.to(device)

    def forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        compile_blocks(model, compiled == "blocks")
        return torch.compile(model, dynamic=False) if compiled is True else model

    def together(self, last: bool):
        return contextlib.nullcontext()

    def targets(self, n: int | Tensor) -> int | Tensor:
        return n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1)

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def spread(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        return map(work, stacks)

    def gather(self, tree):
        return tree

    @contextlib.contextmanager
    def whole(self, model: nn.Module):
        yield model

    def sum_(self, tensors: list[Tensor]) -> None:
        pass

    def total(self, *numbers: float) -> list[float]:
        return list(numbers)

    def agree(self, value):
        return value

    def heard(self, number: int) -> int:
        return 0

    def watch(self) -> None:
        pass

    def wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def join_streams(self) -> None:
        pass

    def renew(self) -> None:
        pass

    def listening(self):
        return contextlib.nullcontext()

    def close(self) -> None:
        pass

    def vanish(self, code: int) -> None:
        pass


# ---- several -------------------------------------------------------------------------------------------------------


class Ranks:
    """What replicated and sharded have in common. Over NCCL where each process has a GPU of its own, else over gloo."""

    sharded, can_save, lost, graphs = False, True, False, False

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
        self.seed = torch.tensor(float(self.world), device=device)  # gradients are averaged, and are to be a sum
        self.shares: dict = {}
        self.stop_together = self.sharded or device.type == "cuda"  # a GPU is some steps behind, waiting for the others
        # plain numbers that need not wait for the GPU
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else None
        self.pulse: Pulse | None = None
        if device.type == "cuda":
            # CUDA's default stream cannot be recorded, and autograd adds up gradients where their parameters were first
            # used: so all of this process's work is on another one
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.Stream())

    def targets(self, n: int | Tensor) -> int | Tensor:
        if isinstance(n, Tensor):
            total = n.float()
        else:
            total = torch.full((), float(n), device=self.device)  # filled there: the host does not wait
        with self.listening(certain=True):
            dist.all_reduce(total)
        return total.clamp(min=1)

    @torch.no_grad()
    def sum_(self, tensors: list[Tensor]) -> None:
        for bucket in buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            with self.listening(certain=True):
                dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
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
        with self.listening(certain=True):
            dist.broadcast(data, 0)
        return json.loads(bytes(data.tolist()))

    @contextlib.contextmanager
    def listening(self, certain: bool = False):
        """`certain`: whatever is raised in it comes from the connection."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not (certain or is_of_connection(error)):
                raise
            self.can_save, self.lost = not self.sharded, True
            reason = str(error).strip().partition("\n")[0]
            raise Lost(f"another process of this run has ended or is out of reach ({reason})") from error

    def heard(self, number: int) -> int:
        largest = torch.tensor([number])
        with self.listening(certain=True):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def watch(self) -> None:
        self.pulse = self.pulse or Pulse(dist.distributed_c10d._get_default_store(), self.rank, self.world)

    def wait(self, event: torch.cuda.Event) -> None:
        """A GPU that waits for a process that is gone waits for ever, and says nothing: so the host only looks."""
        began, looked = time.monotonic(), 0.0
        while not event.query():
            waited = time.monotonic() - began
            gone = "the device waits for it" if self.lost and waited > PARTING else None
            if waited > looked + BEAT and not gone and self.pulse:
                gone, looked = self.pulse.silence(), waited
            if gone or waited > TIMEOUT.total_seconds():
                self.can_save, self.lost = False, True  # what the device has begun cannot be undone
                raise Lost(f"another process of this run has ended or is out of reach ({gone or 'no answer'})")
            time.sleep(min(2e-4 + waited / 200, 0.05))

    join_streams = Alone.join_streams

    def shares_of(self, shapes: list[tuple[int, int, int]]) -> list[list[range]]:
        """`share_out`, remembered: a step asks for the same each time."""
        key = tuple(shapes)
        if key not in self.shares:
            self.shares[key] = share_out(shapes, self.world)
        return self.shares[key]

    def close(self) -> None:
        if self.pulse:
            self.pulse.stop()
        for thing in (dist.group.WORLD, getattr(self, "ddp", None)):
            never_taken_apart(thing)
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    def vanish(self, code: int) -> None:
        """End the process where others may be gone, and take nothing apart: what DDP began with them is dropped by a
        thread that waits for Python's lock, while Python waits for that thread, for ever."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def never_taken_apart(thing) -> None:
    """One reference more than there is. A back end's thread may be about to drop what it has just sent, for which it
    waits for Python's lock; if Python takes the back end apart meanwhile, it waits for that thread, for ever."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


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


def is_of_connection(error: RuntimeError) -> bool:
    """Whether an error that came out of a pass of the model is the back end's, about another process."""
    told = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "NCCL error",
             "gloo/transport", "Timed out waiting", "timed out", "remote process exited", "Socket closed")  # fmt: skip
    return isinstance(error, dist.DistError) or any(sign in told for sign in signs)


# ---- signs of life -------------------------------------------------------------------------------------------------


class Pulse:
    """A thread that tells the others, in the store where they met, that this process is there: a number every BEAT
    seconds. NCCL's own watchdog does not see what a CUDA graph does."""

    def __init__(self, store, rank: int, world: int):
        self.store, self.rank, self.world = (store.clone() if hasattr(store, "clone") else store), rank, world
        self.beats, self.ended = 0, threading.Event()
        self.seen: dict[int, tuple[bytes, float]] = {}  # what each had told last, and since when
        self.beat()
        self.thread = threading.Thread(target=self.run, name="pulse", daemon=True)
        self.thread.start()

    def key(self, rank: int) -> str:
        return f"pulse of rank {rank}"

    def beat(self) -> None:
        self.beats += 1
        self.store.set(self.key(self.rank), str(self.beats))

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the others find that out themselves
            while not self.ended.wait(BEAT):
                self.beat()

    def silence(self) -> str | None:
        """Who has told nothing for SILENT seconds, in which this was asked again and again; None: nobody."""
        now = time.monotonic()
        try:
            for rank in range(self.world):
                told = self.store.get(self.key(rank)) if self.store.check([self.key(rank)]) else b""
                before, since = self.seen.get(rank, (None, now))
                self.seen[rank] = (told, since if told == before else now)
                if now - self.seen[rank][1] > SILENT:
                    return f"rank {rank} has been silent for {SILENT:.0f} s"
        except RuntimeError as error:
            return str(error).strip().partition("\n")[0]
        return None

    def stop(self) -> None:
        self.ended.set()
        self.thread.join(BEAT)


# ---- replicated ----------------------------------------------------------------------------------------------------


class Replicated(Ranks):
    """The whole model on each rank. Weights stay equal, bit for bit, since all get the same gradients and updates."""

    ddp = None  # before forward() each rank is on its own, to find out how large a batch it has memory for

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return model.to(device)

    def forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        """`idle`: whether a step leaves parameters without a gradient, for which DDP would otherwise wait. Gradients
        travel while others are computed where a compiled model comes as several graphs; one gives all at its end."""
        if self.ddp is None:
            DDP = nn.parallel.DistributedDataParallel
            with self.listening():
                about = {"gradient_as_bucket_view": True, "find_unused_parameters": idle()}
                if compiled is True and not model.set_compile_partitions(PIECES):  # all come at once: few parcels
                    about["bucket_cap_mb"] = 1 << 10
                newer = "forward_sync_buffers" in inspect.signature(DDP).parameters
                about["forward_sync_buffers" if newer else "broadcast_buffers"] = False  # they are equal: see sum_
                self.ddp = DDP(model, **about)
            self.ddp._set_ddp_runtime_logging_sample_rate(1 << 30)  # times that nobody reads, waiting for the device
            self.graphs = not about["find_unused_parameters"]  # which unused ones are, DDP's host would ask the device
        compile_blocks(model, compiled == "blocks")
        torch._dynamo.config.optimize_ddp = False  # it cannot divide graphs with functions that bring their gradients
        return torch.compile(self.ddp, dynamic=False) if compiled is True else self.ddp

    def together(self, last: bool):
        return contextlib.nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def targets(self, n: int) -> int | Tensor:
        return max(n, 1) if self.ddp is None else super().targets(n)

    norm = Alone.norm
    gather = Alone.gather

    def renew(self) -> None:
        self.ddp = None
        gc.collect()  # it leaves the parameters only when nothing is left of it

    def spread(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        """Each rank's share is contiguous in each stack; one gather brings all of them to all."""
        if not (stacks := list(stacks)):
            return []
        shares = self.shares_of([(len(stack), *stack.shape[1:]) for stack in stacks])
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
        with self.listening(certain=True):
            all_gather(gathered.view(-1), flat)
        updates = [torch.empty_like(stack) for stack in stacks]
        for rank in range(self.world):
            pieces = gathered[rank, : sum(sizes[rank])].split(sizes[rank])
            for update, piece, mine in zip(updates, pieces, shares, strict=True):
                place = update[as_slice(mine[rank])]
                place.copy_(piece.view_as(place))
        return updates

    @contextlib.contextmanager
    def whole(self, model: nn.Module):
        yield model if self.main else None


def all_gather(into: Tensor, tensor: Tensor) -> None:
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(into, tensor)  # its newer name, where there is one


def as_slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


# ---- sharded -------------------------------------------------------------------------------------------------------


class Sharded(Ranks):
    """Each rank keeps its rows of every parameter, and of its gradient and optimizer state.

    A block's weights are put together when it computes, forwards and again backwards, and given up afterwards; the
    rest (embeddings, head, last norms) is one unit of its own, there from the forward pass to the end of the backward
    one. Gradients are averaged and divided in each micro-batch, so that no rank ever holds all of them.
    """

    sharded = True

    def place(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model, built whole in the host's memory, is sharded block by block on its way to the device."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.world,))
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in blocks_of(model):
            Recomputed(block)
            half = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            narrow = dtype != torch.float32 and reads_by_products_alone(block)
            fully_shard(block, mesh=mesh, mp_policy=half if narrow else wide)
        # with dropout, what computes activations twice asks the device for the state of its random numbers
        self.graphs = not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
        self.root = fully_shard(model, mesh=mesh, mp_policy=wide)
        return self.root

    def join_streams(self) -> None:
        """What fully_shard gathers and reduces on streams of its own is waited for where it is used; that each of them
        ends in the recorded one, a graph wants to be told."""
        about = self.root._get_fsdp_state()._comm_ctx
        for stream in (about.all_gather_copy_in_stream, about.all_gather_stream, about.reduce_scatter_stream):
            with torch.cuda.stream(stream):
                recorded = torch.cuda.is_current_stream_capturing()
            if recorded:
                torch.cuda.current_stream().wait_stream(stream)

    def renew(self) -> None:
        forget_step(self.root)

    def forward(self, model: nn.Module, compiled: bool | str, idle: Callable[[], bool]) -> Callable:
        """Blocks are always compiled one by one, between what puts them together and what takes them apart."""
        compile_blocks(model, bool(compiled))
        return model

    def together(self, last: bool):
        return contextlib.nullcontext()

    @torch.no_grad()
    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        grads = [to_local(p.grad) for p in parameters if p.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        square = torch.zeros((), device=self.device)
        if grads:
            square = torch.stack(torch._foreach_norm(grads)).square().sum()
        with self.listening(certain=True):
            dist.all_reduce(square)
        return square.sqrt()

    def spread(self, stacks: Iterable[Tensor], shapes: list[torch.Size], work: Callable) -> Iterable[Tensor]:
        """Stacks (n, this rank's rows, columns) of matrices whose whole shapes are given. Each matrix is put together
        on the rank that works on it, and what comes of it goes back to where its rows are."""
        if not (stacks := list(stacks)):
            return []
        shares = self.shares_of([(len(stack), *shape) for stack, shape in zip(stacks, shapes, strict=True)])
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
        with self.listening(certain=True):
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
        with self.listening(certain=True), torch.no_grad():
            whole = tree.full_tensor()
        return whole.to(device) if self.main else None

    @contextlib.contextmanager
    def whole(self, model: nn.Module):
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


def forget_step(root: nn.Module) -> None:
    """Make a sharded model what it is between steps. What torch's reset_iter_state would wait for is dropped: events of
    a recording that broke off never come."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state = root._get_fsdp_state()
    context, about = state._state_ctx, state._comm_ctx
    context.iter_forward_root, context.post_backward_final_callback_queued = None, False
    about.all_gather_state = about.reduce_scatter_state = None
    for name in ("reduce_scatter_states", "_last_post_reduce_events", "post_forward_order"):  # some are torch 2.13's
        getattr(about, name, []).clear()
    for state in context.all_states:
        state._training_state = TrainingState.IDLE
        getattr(state, "_modules_to_run_forward", set()).clear()
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            if group is not None:
                group._training_state = TrainingState.IDLE
                group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
                group._post_forward_indices.clear()
                group._to_sharded()
                for p in group.fsdp_params:
                    p.unsharded_accumulated_grad = None
                    if hasattr(p, "_unsharded_param"):
                        p._unsharded_param.grad = None


PARALLEL = {"ddp": Replicated, "fsdp": Sharded}


# ---- blocks --------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the outermost lists: what a model has many of."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks_of(child)


def compile_blocks(model: nn.Module, wanted: bool) -> None:
    """Compile each block by itself, and the head's loss, or undo it. Equal blocks are compiled once."""
    model.compile_loss = wanted
    for block in blocks_of(model):
        plain = type(block).forward.__get__(block)
        run = torch.compile(plain, dynamic=False) if wanted else plain
        if isinstance(block.forward, Recomputed):
            block.forward.run = run
        elif wanted:
            block.forward = run
        else:
            vars(block).pop("forward", None)


def reads_by_products_alone(block: nn.Module) -> bool:
    """Whether a block's matrices are read by matrix products alone, which round them to half precision anyway: then
    they may travel in it. A router's are small, and the norms' scales and the biases are rounded with them."""
    for module in block.modules():
        roles, products = getattr(module, "roles", {}), getattr(module, "products", ())
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1 and name not in products and roles.get(name) != "router":
                return False
    return True


class Recomputed:
    """Takes the place of a block's forward: what it keeps for the way back is its input, and it computes the rest anew.

    What routers count is counted once.
    """

    def __init__(self, block: nn.Module):
        self.block, self.run = block, block.forward
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p for m in block.modules())
        block.forward = self

    def __call__(self, *args):
        if not torch.is_grad_enabled():
            return self.run(*args)
        contexts = {"context_fn": lambda: (contextlib.nullcontext(), self.uncounted())}
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=self.has_dropout, **contexts)

    @contextlib.contextmanager
    def uncounted(self):
        loads = [buffer for name, buffer in self.block.named_buffers() if name.rpartition(".")[2] == "load"]
        before = [load.clone() for load in loads]
        try:
            yield
        finally:
            for load, value in zip(loads, before, strict=True):
                load.copy_(value)


# ---- Muon's work ---------------------------------------------------------------------------------------------------


def share_out(shapes: list[tuple[int, int, int]], world: int) -> list[list[range]]:
    """For each stack (n, rows, columns), which of its matrices each rank takes: neighbours, and such that all ranks
    have about as much to do. The costly ones are given out first, each to the rank that has least.

    >>> share_out([(3, 4, 4), (1, 8, 8)], world=2)
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

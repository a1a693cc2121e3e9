"""Several processes compute what one does: batches divided by DDP, models divided by FSDP, Muon's work divided by both.

Two processes are started once and take everything in turn; the tests compare what they leave with what one process,
this one, computes meanwhile. tests/training/test_survival.py kills and signals such runs.
"""

import contextlib
import functools
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torture
from machine import FULL
from ports import free_port
from torture import (
    assert_same,
    newest_state,
    read_log,
    set_up,
    start_child,
    untimed_metrics,
    wait_for_exit,
    wait_until,
    write_run,
)

import train
from model import CONFIGS, build
from optimizer import build_optimizer, newton_schulz
from strawberry.common import UserError
from strawberry.data.objectives import Batch
from strawberry.model_file import unique_tensors
from strawberry.ops import float8
from strawberry.run_config import OptimizerHyperparams, load_run
from strawberry.sharding import batch_parts, divide_batch, shard_rows
from strawberry.training import blocks, checkpoint, checkpointing, cuda_graph, distributed, evaluation
from strawberry.training.checkpoint import find_latest
from strawberry.training.evaluation import Evaluator
from strawberry.training.step import TrainStep

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="processes are forked")]
PRESETS = sorted(path.stem for path in (torture.ROOT / "config").glob("*.json") if path.name != "schema.json")
# presets with the same kinds of parameters as another one: under `make torture` only
SIMILAR = {"air", "palm-kv", "palm-lam", "strawberry-s1", "tiny", "tinystar-v0.4-mqa", "tinystar-v0.6-gelu",
           "tinystar-v0.7-gqa-swa"}  # fmt: skip
PRESET_MODELS = PRESETS if FULL else sorted({*PRESETS} - SIMILAR)
MODEL_NAMES = [*PRESET_MODELS, "tokens choose their depth", "parameters without a gradient", "dropout",
               "options of the optimizer"]  # fmt: skip
SMALL = {"vocab_size": 67, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 16, "n_qkv": 16, "d_rank": 8}
SMALL |= {"dropout": 0.0}
MODES = {"ddp": distributed.DDP, "fsdp": distributed.FSDP}
CPU = torch.device("cpu")
RESUME = "--init_from=resume"
HALF = ["--max_iters=5", "--lr_decay_iters=10"]


# ---- one step of any model, by any number of processes -------------------------------------------------------------


@functools.cache
def list_models() -> dict[str, tuple[object, int]]:
    """name → (hyperparameters, tokens in a row): every preset in small, and what no preset has."""
    found = {}
    for name in PRESET_MODELS:
        config = vars(load_run(["--config", f"{name}.json"], CONFIGS).model_hyperparams)
        small = {key: value for key, value in SMALL.items() if key in config}
        raw = json.loads(json.dumps(config, default=vars))
        for key in ("window", "windows", "retention_chunk", "kv_rank", "rope_dim", "n_ffn", "n_kv_head", "pad_id",
                    "memory_head", "memory_width"):
            raw.pop(key, None)
        found[name] = ({**raw, **small}, 32)
    depth = {"arch": "transformer", "kind": "decoder", "recursions": 3, "adaptive": True, "norm_position": "pre"}
    found["tokens choose their depth"] = ({**SMALL, **depth, "n_ffn_experts": 2}, 32)
    found["tokens choose their depth"][0].pop("d_rank")
    rule = {"retention_rule": "silu", "retention_chunk": 16}
    found["parameters without a gradient"] = ({**found["strawberry-large"][0], **rule}, 16)
    found["dropout"] = ({**found["transformer-pairs"][0], "dropout": 0.3}, 32)
    found["options of the optimizer"] = ({**found["tinystar-v0.8-speedrun"][0], "n_embd": 15}, 32)  # odd rows
    assert [*found] == MODEL_NAMES
    return found


STEPS = {"parameters without a gradient": 2, "options of the optimizer": 2}  # one for the others
OPTIONS = {"options of the optimizer": {
    "muon_beta2": 0.9, "weight_decay_schedule": "lr",
    "muon_lr": 0.02, "embedding_lr": 0.03, "head_lr": 0.004, "scalar_lr": 0.05,
}}  # fmt: skip


def build_perturbed(hyper: dict) -> torch.nn.Module:
    """A model none of whose matrices is zero, as some are at the start, so that every gradient counts."""
    torch.manual_seed(3)
    model = build(hyper)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape)
    return model


def make_batches(model, T: int, rank: int, world: int) -> list[Batch]:
    """This rank's part of two micro-batches of 4 rows, each row with a number of targets of its own."""
    generator = torch.Generator().manual_seed(4)
    x, y, source = (torch.randint(60, (8, T), generator=generator) for _ in range(3))
    for row in range(8):
        y[row, : 3 * row] = -1
    rows, firsts = divide_batch(4, 2, rank, world)
    parts = [slice(first, first + rows) for first in firsts]
    return [Batch(x[p], y[p], source[p] if model.takes_source else None, int((y[p] >= 0).sum())) for p in parts]


def train_steps(group, name: str) -> dict:
    """What the steps of a model with both optimizers come to: train.py's own passes, clipping and update."""
    hyper, T = list_models()[name]
    model = group.place_model(build_perturbed(hyper), CPU, torch.float32).train()
    # eps: so that AdamW's first step is no mere sign of a gradient
    about = OptimizerHyperparams(use_muon=True, eps=1e-2, **OPTIONS.get(name, {}))
    optimizer = build_optimizer(model, about, 1e-2, "cpu", group)
    optimizer._fused_clipping = True  # as on a GPU
    given = make_batches(model, T, group.rank, group.world)

    def idle() -> bool:
        model(given[0].x, given[0].y, source=given[0].source)[1].backward()
        return any(p.grad is None for p in model.parameters())

    loads = [router.load for router in model.routers().values()]
    forward = group.make_forward(model, False, idle)
    optimizer.zero_grad()
    for load in loads:
        load.zero_()
    state = SimpleNamespace(ranks=group, device=CPU, forward=forward, autocast=contextlib.nullcontext,
                              signals=SimpleNamespace(raise_if_late=lambda: None))  # fmt: skip
    found = {"losses": [], "norms": []}
    torch.manual_seed(group.rank)
    for _ in range(STEPS.get(name, 1)):
        loss = TrainStep(state).accumulate(given)
        group.all_reduce_([loss, *loads])
        found.setdefault("loads", [load.clone() for load in loads])
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.setdefault("grads", {name: g.clone() for name, g in group.gather(grads).items() if g is not None})
        norm = group.grad_norm(list(model.parameters()))
        optimizer.clip(norm, 0.1)
        found["norms"].append(norm.item())
        found["losses"].append(loss.item())
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    found |= {"weights": group.gather(unique_tensors(model)), "state": group.gather(optimizer.state_dict())}
    return found


def measure_memory(group) -> dict[str, float]:
    """Bytes at most in a step, by kind, as torch counts them (MemTracker); the unit is all weights."""
    from torch.distributed._tools.mem_tracker import MemTracker

    hyper = list_models()["tinystar-v0.3-mha"][0] | {"n_layer": 12, "n_embd": 64, "n_qkv": 64}
    model = group.place_model(build_perturbed(hyper), CPU, torch.float32).train()
    optimizer = build_optimizer(model, OptimizerHyperparams(), 1e-2, "cpu", group)
    given = make_batches(model, 32, group.rank, group.world)[0]
    forward = group.make_forward(model, False, lambda: False)

    def step():
        forward(given.x, given.y)[1].backward(group.grad_seed)
        optimizer.clip(group.grad_norm(list(model.parameters())), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    tracker = MemTracker()
    tracker.track_external(model, *optimizer.parts.values())
    with tracker:
        step()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(kind).rpartition(".")[2]: n / (4 * model.num_params(False)) for kind, n in peak.items()}


def orthogonalize(group, shapes) -> list[torch.Tensor]:
    """Stacks of such shapes (n, rows, columns) through `distribute`, each rank giving what it has of them."""
    generator = torch.Generator().manual_seed(5)
    stacks = [torch.randn(shape, generator=generator) for shape in shapes]
    if group.sharded:
        firsts = [[sum(shard_rows(rows, r, group.world) for r in range(rank)) for rank in range(group.world + 1)]
                  for _, rows, _ in shapes]  # fmt: skip
        stacks = [s[:, f[group.rank] : f[group.rank + 1]] for s, f in zip(stacks, firsts, strict=True)]
    return list(group.distribute(stacks, [torch.Size(shape[1:]) for shape in shapes], newton_schulz))


STACKS = [(3, 5, 7), (1, 1, 6), (4, 8, 8), (2, 9, 2)]

# ---- whole runs ----------------------------------------------------------------------------------------------------


class TextRecordingEvaluator(Evaluator):
    """Notes the text that it makes, and draws nothing."""

    def evaluate_full_model(self, results):
        text, state = super().evaluate_full_model(results), self.state
        if state.ranks.main:
            with open("texts", "a") as file:
                file.write(json.dumps([state.run.checkpoints.path, state.progress.step, text]) + "\n")
        return text

    def draw(self):
        pass


class TextRecorder(train.Trainer):
    """A trainer that notes the text that it makes."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.evaluator = TextRecordingEvaluator(self)


class Signalled(TextRecorder):
    """One rank gets SIGTERM in the third step, another none."""

    def log(self, bar, step, *about):
        super().log(bar, step, *about)
        if self.ranks.rank == 1 and step == 3:
            signal.raise_signal(signal.SIGTERM)


class StoppingTogether(Signalled):
    """As on GPUs, which wait for each other where a host does not see it."""

    def prepare(self):
        super().prepare()
        self.ranks.stops_together = True


class Event:
    """A device's: on one rank it has always come already, on the other only for who waits."""

    def __init__(self, early: bool):
        self.asked = 9 if early else 0

    def query(self):
        self.asked += 1
        return self.asked > 3


class LateResults(cuda_graph.CudaGraphStep):
    """Answers come as late as a GPU's may, and not equally late."""

    def launch(self, *arguments):
        super().launch(*arguments)
        self.pending[-1] = self.pending[-1]._replace(ready=Event(self.state.ranks.rank == 1))


class LossNotFinite(TextRecorder):
    """The seventh step's loss is not finite on one rank, of whose part the other sees nothing."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        accumulate = self.steps.accumulate

        def poison(micro_batches):
            self.poisoned = self.ranks.rank == 1 and self.progress.position == 6
            return accumulate(micro_batches)

        self.steps.accumulate = poison

    def autocast(self):
        if getattr(self, "poisoned", False):
            self.poisoned, forward = False, self.forward

            def once(*inputs, **more):
                self.forward = forward
                logits, loss = forward(*inputs, **more)
                return logits, loss * math.inf

            self.forward = once
        return super().autocast()


class FailingCapture(cuda_graph.CudaGraphStep):
    """A capture on a GPU that fails: with DDP in one rank, where DDP waits for gradients, with FSDP in the midst of
    the backward pass."""

    def capture(self, micro_batches):
        group = self.state.ranks
        if group.can_capture and group.sharded:
            block, calls = next(blocks.iterate_blocks(self.state.model)), []
            run = block.forward.run

            def broken(*arguments):
                calls.append(arguments)
                if len(calls) == 2:  # the first is the forward pass, and this computes it anew
                    block.forward.run = run
                    raise RuntimeError("operation not permitted when stream is capturing")
                return run(*arguments)

            block.forward.run = broken
            self.steps.accumulate(micro_batches)
        if group.can_capture and group.rank == 1:
            group.ddp.reducer.prepare_for_backward([])
            raise RuntimeError("operation not permitted when stream is capturing")
        super().capture(micro_batches)


@contextlib.contextmanager
def capturing_steps():
    """Steps as a GPU captures them, called here by the same code."""
    can_capture, cuda_graph.can_capture = cuda_graph.can_capture, lambda device: True
    try:
        yield
    finally:
        cuda_graph.can_capture = can_capture


@contextlib.contextmanager
def float8_for_small_matrices():
    before, float8.MIN_DIM = float8.MIN_DIM, 4
    try:
        yield
    finally:
        float8.MIN_DIM = before


def run(*argv, trainer=TextRecorder) -> int:
    train.Trainer = trainer
    return train.main(["--config", "run.json", *argv])


def copy_checkpoints(source: str, target: str) -> str:
    """A copy of a checkpoint directory, made by the first of the processes."""
    if dist.get_rank() == 0:
        shutil.copytree(source, target)
    dist.barrier()
    return f"--checkpoints.path={target}"


def fail_first_save():
    """save_checkpoint that fails in the first call, on the one rank that makes it."""
    save, calls = checkpointing.save_checkpoint, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise UserError("cannot save: the disk is full")
        return save(*arguments)

    return failing


def run_rank(argv) -> None:
    """All that one of the two processes does."""
    device = CPU
    first = distributed.DDP(device)
    dist.init_process_group = lambda *arguments, **about: None  # there is one already, for all that follows
    distributed.ProcessGroup.close = lambda self: None
    found = {}
    for mode, kind in MODES.items():
        found[mode, "distribute"] = orthogonalize(kind(device), STACKS)
        found[mode, "memory"] = measure_memory(kind(device))
        for name in list_models():
            found[mode, name] = train_steps(kind(device), name)
        codes = [run(f"--checkpoints.path={mode}", f"--parallel={mode}")]
        codes.append(run(f"--checkpoints.path={mode}_half", f"--parallel={mode}", *HALF))
        other = next(iter(MODES.keys() - {mode}))
        for parallel, target in ((mode, f"{mode}_{mode}"), (other, f"{mode}_{other}")):
            codes.append(run(copy_checkpoints(f"{mode}_half", target), f"--parallel={parallel}", RESUME))
        codes.append(run(copy_checkpoints("one_half", f"one_{mode}"), f"--parallel={mode}", RESUME))
        codes.append(run(f"--checkpoints.path=turns_{mode}", f"--parallel={mode}", "--batch_size=3", "--max_iters=2"))
        found[mode, "codes"] = codes
    with contextlib.redirect_stdout(io.StringIO()) as output:
        found["checks"] = [run("--check", f"--parallel={mode}", "--checkpoints.path=none") for mode in MODES]
    found["output"] = output.getvalue()
    found["bfloat16"] = run("--checkpoints.path=bfloat16", "--parallel=fsdp", "--dtype=bfloat16", *HALF)
    with float8_for_small_matrices():
        found["float8"] = [run(f"--checkpoints.path=float8_{mode}", f"--parallel={mode}", "--dtype=float8", *HALF)
                          for mode in MODES]  # fmt: skip
    found["stopped"] = run("--checkpoints.path=stopped", "--parallel=fsdp", "--max_iters=500", trainer=Signalled)
    save, checkpointing.save_checkpoint = checkpointing.save_checkpoint, fail_first_save()
    found["full disk"] = run("--checkpoints.path=full", "--parallel=fsdp", *HALF)
    checkpointing.save_checkpoint = save
    with capturing_steps():
        more = ["--parallel=ddp", "--model_hyperparams.dropout=0.1"]
        found["captured"] = [run("--checkpoints.path=captured", "--parallel=ddp"),
                             run("--checkpoints.path=captured_turns", *more[:1], "--batch_size=3", "--max_iters=2"),
                             run("--checkpoints.path=captured_dropout", *more),
                             run("--checkpoints.path=spoiled", "--parallel=ddp", trainer=LossNotFinite),
                             run("--checkpoints.path=rolled", "--parallel=ddp", "--on_nan=rollback",
                                 trainer=LossNotFinite),
                             run("--checkpoints.path=captured_fsdp", "--parallel=fsdp"),
                             run("--checkpoints.path=rolled_fsdp", "--parallel=fsdp", "--on_nan=rollback",
                                 trainer=LossNotFinite)]
        captured, cuda_graph.CudaGraphStep = cuda_graph.CudaGraphStep, LateResults
        rare = ["--parallel=ddp", "--log_interval=100", "--eval_interval=100"]
        found["lagging"] = [run("--checkpoints.path=lagging", *rare, "--on_nan=rollback", trainer=LossNotFinite),
                            run("--checkpoints.path=together", *rare[:1], "--max_iters=500", trainer=StoppingTogether)]
        cuda_graph.CudaGraphStep = FailingCapture
        found["captured"].append(run("--checkpoints.path=uncapturable", "--parallel=ddp"))
        cuda_graph.CudaGraphStep = captured
    found["captured"].append(run("--checkpoints.path=called_dropout", *more))
    found["no sync"] = count_reduced_buckets(first)
    torch.save(found, f"found{first.rank}.pt")
    dist.barrier()


def count_reduced_buckets(group) -> list[int]:
    """How many buckets were reduced after each of three micro-batches, the last one marked as the last."""
    model = build_perturbed(list_models()["tinystar-v0.3-mha"][0])
    ddp, calls, found = group.make_forward(model, False, lambda: False), [], []

    def hook(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    given = make_batches(model, 32, group.rank, group.world)[0]
    for last in (False, False, True):
        with group.sync_context(last):
            ddp(given.x, given.y)[1].backward()
        found.append(len(calls))
    return found


def compute_all(there: Path) -> None:
    """All that the two processes do, and meanwhile what one does, in a directory of its own."""
    there.mkdir()
    set_up(there)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run("--checkpoints.path=one_half", *HALF)
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        children = [start_child(directory=there, log=f"log{rank}.txt", body=run_rank, RANK=str(rank),
                                LOCAL_RANK=str(rank), **env) for rank in range(2)]  # fmt: skip
        run("--checkpoints.path=one")
        run("--checkpoints.path=turns_one", "--batch_size=3", "--max_iters=2")
        run("--checkpoints.path=bfloat16_one", "--dtype=bfloat16", *HALF)
        with float8_for_small_matrices():
            run("--checkpoints.path=float8_one", "--dtype=float8", *HALF)
        alone = {name: train_steps(distributed.SingleProcess(), name) for name in list_models()}
        codes = [wait_for_exit(child, 300) for child in children]
    assert codes == [0, 0], "".join(read_log(f"log{rank}.txt")[-4000:] for rank in range(2))
    torch.save(alone, "alone.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(name → what one process computes, what each of the two has found), in the directory where all runs are. Where
    tests run in several workers, one of them has it done for all."""
    import fcntl

    before, threads, trainer = os.getcwd(), torch.get_num_threads(), train.Trainer
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    torch.set_num_threads(1)
    with open(shared / "two.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "two").exists():
            compute_all(shared / "two")
    os.chdir(shared / "two")
    yield torch.load("alone.pt", weights_only=False), [
        torch.load(f"found{rank}.pt", weights_only=False) for rank in range(2)]  # fmt: skip
    train.Trainer = trainer
    torch.set_num_threads(threads)
    os.chdir(before)


def assert_close(one, many, what: str, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    """Trees of tensors and numbers, the same keys everywhere."""
    if isinstance(one, dict):
        assert one.keys() == many.keys(), what
        for key in one:
            assert_close(one[key], many[key], f"{what}: {key}", rtol, atol)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(many, one, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")
    elif isinstance(one, list):
        assert len(one) == len(many), what
        for a, b in zip(one, many, strict=True):
            assert_close(a, b, what, rtol, atol)
    elif isinstance(one, float):
        np.testing.assert_allclose(many, one, rtol=rtol, atol=atol, err_msg=what)
    else:
        assert one == many, what


# ---- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_two_processes_compute_the_step_of_one(found, mode, name):
    alone, both = found
    one, many = alone[name], both[0][mode, name]
    if name == "dropout":  # each rank draws its own: the same in both modes, the second time in FSDP as the first
        one = both[0]["ddp", name]
    assert all(g.abs().max() > 0 for g in one["grads"].values())
    assert_close(one["losses"], many["losses"], "losses")
    assert_close(one["norms"], many["norms"], "norms")
    assert_close(one["loads"], many["loads"], "loads", rtol=0)  # FSDP computes activations twice and counts once
    assert_close(one["grads"], many["grads"], "grads")
    assert_close(one["state"], many["state"], "state")
    assert_close(one["weights"], many["weights"], "weights", atol=1e-5)
    assert any(kind == "muon" for kind in one["state"]["kinds"].values())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_ddp_replicas_stay_bit_identical(found, name):
    _, both = found
    assert_close(*(each["ddp", name] for each in both), name, rtol=0, atol=0)


def test_fsdp_and_ddp_agree_on_what_has_no_gradient(found):
    alone, both = found
    name = "parameters without a gradient"
    named = dict(build(list_models()[name][0]).named_parameters())
    idle = named.keys() - alone[name]["grads"].keys()
    assert {part.rpartition(".")[2] for part in idle} == {"out"}
    for mode in MODES:
        assert named.keys() - both[0][mode, name]["grads"].keys() == idle
        assert all(not both[0][mode, name]["state"]["state"][part] for part in idle)


def test_fsdp_shards_what_ddp_replicates(found):
    ddp, fsdp = (found[1][0][mode, "memory"] for mode in MODES)
    assert ddp["PARAM"] == pytest.approx(1, abs=0.01) and ddp["OPT"] == pytest.approx(2, abs=0.01)
    assert fsdp["OPT"] == pytest.approx(1, abs=0.01) and fsdp["PARAM"] < 0.75 and fsdp["GRAD"] < 0.75
    assert fsdp["ACT"] < 0.2 * ddp["ACT"] and fsdp["Total"] < 0.6 * ddp["Total"]


@pytest.mark.parametrize("mode", MODES)
def test_muon_distributes_its_matrices_and_gathers_the_results(found, mode):
    expected = orthogonalize(distributed.SingleProcess(), STACKS)
    first, second = (both[mode, "distribute"] for both in found[1])
    for whole, a, b in zip(expected, first, second, strict=True):
        if mode == "ddp":
            assert torch.equal(a, b)
        else:
            a = torch.cat((a, b), dim=1)
        torch.testing.assert_close(a, whole, rtol=1e-4, atol=1e-5)


def test_gradients_are_reduced_once_a_step(found):
    before, between, after = found[1][0]["no sync"]
    assert before == between == 0 < after


# ---- whole runs ----------------------------------------------------------------------------------------------------


def losses(path: str) -> list:
    lines = untimed_metrics(f"{path}/metrics.jsonl")
    return [(line["step"], key, value) for line in lines for key, value in line.items()
            if key.endswith(("loss", "grad_norm", "bpb"))]  # fmt: skip


def assert_same_curve(a: str, b: str, rtol: float = 1e-4) -> None:
    a, b = losses(a), losses(b)
    assert [place for *place, _ in a] == [place for *place, _ in b]
    np.testing.assert_allclose([value for *_, value in a], [value for *_, value in b], rtol=rtol)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_two_processes_equals_the_run_of_one(found, mode):
    assert found[1][0][mode, "codes"] == [0] * 6
    assert_same_curve("one", mode)
    (_, one), (_, many) = newest_state("one"), newest_state(mode)
    assert one.keys() == many.keys()
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-3, atol=1e-4, msg=name)
        if name.endswith("router.bias"):
            assert torch.equal(one[name], many[name]) and one[name].any()  # each token is counted once
    texts = [json.loads(line) for line in read_log("texts").splitlines()]
    assert [text for path, _, text in texts if path == mode] == [text for path, _, text in texts if path == "one"]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_parallel_run_is_bit_identical_to_the_uninterrupted_one(found, mode):
    assert_same(newest_state(f"{mode}_{mode}")[1], newest_state(mode)[1])


@pytest.mark.parametrize("modes", ["ddp_fsdp", "fsdp_ddp", "one_ddp", "one_fsdp"])
def test_a_checkpoint_is_resumed_in_another_mode(found, modes):
    assert_same_curve("one", modes)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_two_processes_is_resumed_by_one(found, mode):
    shutil.copytree(f"{mode}_half", f"{mode}_one")
    run(f"--checkpoints.path={mode}_one", RESUME)
    assert_same_curve("one", f"{mode}_one")


def test_checkpoints_of_all_modes_have_the_same_contents(found):
    states = {path: find_latest(path).load_state()["optimizer"] for path in ("one", *MODES)}
    headers = {path: find_latest(path).path / checkpoint.MODEL for path in states}
    for mode in MODES:
        assert_close(states["one"], states[mode], mode, rtol=1e-3, atol=1e-4)
        with open(headers["one"], "rb") as one, open(headers[mode], "rb") as many:
            for file in (one, many):
                file.seek(0)
            tensors = [json.loads(file.read(int.from_bytes(file.read(8), "little"))) for file in (one, many)]
        for header in tensors:
            del header["__metadata__"]
        assert tensors[0] == tensors[1]


def test_check_reports_the_loss_over_all_ranks(found):
    assert found[1][0]["checks"] == found[1][1]["checks"] == [0, 0]
    first = next(line for line in untimed_metrics("one/metrics.jsonl"))["loss"]
    assert found[1][0]["output"].count(f"first batch  loss {first:.3f}") == 2 and not Path("none").exists()


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_are_divided_where_rows_cannot_be(found, mode):
    assert_same_curve("turns_one", f"turns_{mode}")


def test_bfloat16_of_two_processes_is_that_of_one(found):
    assert found[1][0]["bfloat16"] == 0
    assert_same_curve("bfloat16_one", "bfloat16", rtol=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_float8_of_two_processes_is_that_of_one(found, mode):
    assert [both["float8"] for both in found[1]] == [[0, 0]] * 2
    assert_same_curve("float8_one", f"float8_{mode}", rtol=2e-2)
    assert losses("float8_one") != losses("bfloat16_one")


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(found):
    assert [both["stopped"] for both in found[1]] == [143, 143]
    assert find_latest("stopped").step == untimed_metrics("stopped/metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize(("hyper", "compiled", "partitions", "bucket_size"), [
    ({"arch": "tinystar", "n_layer": 6}, True, 3, None), ({"arch": "tinystar", "n_layer": 1}, True, 1, 1024),
    ({"arch": "strawberry", "n_layer": 2}, True, 2, None), ({"arch": "strawberry", "n_layer": 1}, True, 1, 1024),
    ({"arch": "palm", "n_layer": 2}, True, 1, 1024), ({"arch": "tinystar", "n_layer": 6}, "blocks", 1, None),
    ({"arch": "tinystar", "n_layer": 6}, False, 1, None),
], ids=str)  # fmt: skip
def test_ddp_buckets_are_large_where_gradients_come_at_once(hyper, compiled, partitions, bucket_size, monkeypatch):
    about = {}

    class DDP(torch.nn.Module):
        def __init__(self, model, **keys):
            super().__init__()
            about.update(keys)

        def _set_ddp_runtime_logging_sample_rate(self, n):
            pass

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", DDP)
    monkeypatch.setattr(distributed.DDP, "detect_peer_loss", lambda self: contextlib.nullcontext())
    model = build({"n_embd": 16, "n_head": 2, "vocab_size": 16, "block_size": 16} | hyper)
    object.__new__(distributed.DDP).make_forward(model, compiled, lambda: False)
    assert (model.compile_partitions, about.get("bucket_cap_mb")) == (partitions, bucket_size)


def test_captured_steps_equal_the_hosts(found):
    assert [both["captured"] for both in found[1]] == [[0, 0, 0, 3, *[0] * 5]] * 2
    assert_same_curve("ddp", "captured")
    assert_same_curve("turns_one", "captured_turns")
    assert_same_curve("called_dropout", "captured_dropout")
    assert_same_curve("fsdp", "captured_fsdp")
    for called, captured in (("ddp", "captured"), ("called_dropout", "captured_dropout"), ("fsdp", "captured_fsdp")):
        (_, one), (_, many) = newest_state(called), newest_state(captured)
        assert one.keys() == many.keys()
        for name in one:
            torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=1e-6, msg=name)
    states = [find_latest(path).load_state()["optimizer"]["muon_step"] for path in ("ddp", "captured")]
    assert states[0] == states[1] == 10


def test_all_ranks_see_a_result_after_the_same_launch(found):
    """A rank that saw it sooner would roll back alone."""
    assert [both["lagging"] for both in found[1]] == [[0, 143]] * 2
    assert_same(newest_state("lagging")[1], newest_state("rolled")[1])
    assert find_latest("together").step == untimed_metrics("together/metrics.jsonl")[-1]["step"] == 3


def test_where_one_rank_cannot_capture_no_rank_does(found):
    assert_same(newest_state("uncapturable")[1], newest_state("captured")[1])
    warning = "cannot be captured as a CUDA graph, so that steps take longer (another process could not)"
    assert warning in read_log("log0.txt")
    assert read_log("log1.txt").count("(RuntimeError: operation not permitted when stream is capturing)") == 1


def test_all_ranks_report_a_loss_that_is_not_finite_on_one(found):
    assert untimed_metrics("spoiled/metrics.jsonl")[-1]["step"] == 6 and find_latest("spoiled").step == 4
    for rank in range(2):
        assert "error: step 7: the loss is inf" in read_log(f"log{rank}.txt")
    for path in ("rolled", "rolled_fsdp"):
        lines = untimed_metrics(f"{path}/metrics.jsonl")
        assert [line["from_step"] for line in lines if "rollback" in line] == [7] and lines[-1]["step"] == 10


def test_a_failed_checkpoint_is_retried_by_all_ranks(found):
    assert found[1][0]["full disk"] == 0
    assert "cannot save" in read_log("log0.txt") and find_latest("full").step == 5


# ---- without other processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch, accumulation", [(8, 1), (3, 8), (4, 6), (12, 2)])
def test_a_step_is_divided_without_remainder(batch, accumulation, world):
    parts = [divide_batch(batch, accumulation, rank, world) for rank in range(world)] if (
        accumulation % batch_parts(batch, world)[1] == 0) else []  # fmt: skip
    samples = [first + row for rows, firsts in parts for first in firsts for row in range(rows)]
    assert not parts or sorted(samples) == list(range(batch * accumulation))
    for rows, firsts in parts:
        assert all(first // batch == (first + rows - 1) // batch for first in firsts)  # each of one micro-batch
        assert len(firsts) == len(parts[0][1]) and rows == parts[0][0]


def test_a_step_that_cannot_be_divided_names_values_that_can():
    with pytest.raises(UserError, match="set it to 4 or 8, or gradient_accumulation_steps to 4"):
        divide_batch(6, 3, 0, 4)
    assert divide_batch(6, 4, 1, 4) == (3, [3, 15])


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_muon_balances_its_matrices_among_ranks(world):
    shapes = [(12, 2304, 768), (12, 768, 768), (24, 768, 3072), (1, 8, 8)]
    shares = distributed.divide_matrices(shapes, world)
    for (n, *_), mine in zip(shapes, shares, strict=True):
        assert [i for part in mine for i in part] == list(range(n))
    cost = [rows * columns * min(rows, columns) for _, rows, columns in shapes]
    loads = [sum(c * len(mine[rank]) for c, mine in zip(cost, shares, strict=True)) for rank in range(world)]
    assert max(loads) - min(loads) <= max(cost)


def test_blocks_are_gathered_in_half_precision_only_where_matmuls_alone_read_them():
    narrow = {name: all(map(blocks.has_only_matmul_weights, blocks.iterate_blocks(build(hyper))))
              for name, (hyper, _) in list_models().items()}  # fmt: skip
    assert narrow["tinystar-v0.2-modernbase"] and narrow["transformer-decoder"] and narrow["strawberry-v0"] is False
    assert not narrow["parameters without a gradient"]  # retention rewrites its weights


def test_a_single_process_refuses_an_unknown_mode_and_ignores_a_known_one(tmp_path, monkeypatch):
    assert isinstance(distributed.join_processes(CPU, "fsdp"), distributed.SingleProcess)
    with pytest.raises(UserError, match='parallel = "fsdp2": must be "ddp" or "fsdp"'):
        load_run(["--parallel=fsdp2"], CONFIGS)


def test_errors_of_the_connection_are_distinguished_from_others():
    assert distributed.is_connection_error(RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:3"))
    assert distributed.is_connection_error(dist.DistNetworkError("failed to recv, got 0 bytes"))
    assert not distributed.is_connection_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_lost_fsdp_rank_ends_the_run_at_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_up(tmp_path)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    argv = ["--config", "run.json", "--parallel=fsdp", "--max_iters=100000", "--eval_interval=100000"]
    children = [start_child(*argv, log=f"log{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **env)
                for rank in range(2)]  # fmt: skip
    wait_until(lambda: Path("ck/metrics.jsonl").exists() and len(untimed_metrics()) > 9, child=children[0])
    children[1].kill()
    assert wait_for_exit(children[0], 60) == 4, read_log("log0.txt")
    output = read_log("log0.txt").splitlines()[-2:]
    assert output[0].startswith("error: another process of this run has ended") and output[1].endswith(RESUME)
    step = find_latest("ck").step
    assert step % 4 == 0 and 0 <= untimed_metrics()[-1]["step"] - step < 4
    assert train.main(["--config", "run.json", RESUME, f"--max_iters={step + 1}"]) == 0


class Never:
    """An event of a device that waits for a process that is gone."""

    def query(self):
        return False


def test_waiting_for_a_device_ends_when_a_rank_is_lost(monkeypatch):
    monkeypatch.setattr(distributed, "HEARTBEAT_INTERVAL", 0.05)
    monkeypatch.setattr(distributed, "HEARTBEAT_TIMEOUT", 0.5)
    monkeypatch.setattr(distributed, "DRAIN_TIMEOUT", 0.2)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    this, other = (distributed.Heartbeat(store, rank, 2) for rank in range(2))
    group = distributed.DDP.__new__(distributed.DDP)
    group.heartbeat = this
    began = time.monotonic()
    threading.Timer(1.5, other.stop).start()
    with pytest.raises(distributed.PeerLost, match=r"ended or is out of reach \(rank 1 has sent no heartbeat"):
        group.wait_for(Never())
    assert 1.5 < time.monotonic() - began < 30 and group.peer_lost and not group.can_save
    group.heartbeat = None  # which is not checked again
    with pytest.raises(distributed.PeerLost):
        group.wait_for(Never())
    this.stop()


def test_the_heartbeat_ends_a_process_whose_main_thread_is_blocked(monkeypatch):
    """Only where the main thread takes a step, and a while after it must have seen the loss itself."""
    for name, seconds in {"INTERVAL": 0.05, "TIMEOUT": 0.5}.items():
        monkeypatch.setattr(distributed, f"HEARTBEAT_{name}", seconds)
    monkeypatch.setattr(distributed, "DRAIN_TIMEOUT", 0.4)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended: list[tuple[float, str]] = []
    group = distributed.DDP.__new__(distributed.DDP)
    group.heartbeat = distributed.Heartbeat(
        store, 0, 2, lambda stop: ended.append((time.monotonic(), f"{type(stop).__name__}: {stop}")))  # fmt: skip
    other = distributed.Heartbeat(store, 1, 2)
    with group.device_step():
        time.sleep(1.2)  # a long step of two processes that live
    other.stop()
    silent = time.monotonic()
    time.sleep(1.5)  # the other may have done its last step
    assert not ended
    with contextlib.suppress(KeyError), group.device_step(), group.host_work():
        time.sleep(1.5)  # it writes a checkpoint to a slow disk
        assert not ended
        raise KeyError  # the cleanup after an error may wait too
    wait_until(lambda: ended)
    group.heartbeat.stop()
    assert ended[0][0] - silent >= 3 + 0.4
    assert ended[0][1].startswith("PeerLost: another process of this run has ended") and "rank 1 has" in ended[0][1]


@pytest.mark.parametrize("captured", [True, False])
def test_the_heartbeat_watches_all_waits_for_the_device(tmp_path, monkeypatch, captured):
    """The heartbeat gets the function that ends the process. Steps, evaluations and the reading of weights are in a
    device step, the writing of a checkpoint is not."""
    monkeypatch.chdir(tmp_path)
    set_up(tmp_path)
    given, seen, within = [], [], [None]

    @contextlib.contextmanager
    def enter(name):
        before, within[0] = within[0], name
        yield
        within[0] = before

    def record(place, name):
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: seen.append((name, within[0])) or function(*args))

    monkeypatch.setattr(distributed.SingleProcess, "start_heartbeat", lambda self, on_loss=None: given.append(on_loss))
    monkeypatch.setattr(distributed.SingleProcess, "device_step", lambda self: enter("device step"))
    monkeypatch.setattr(distributed.SingleProcess, "host_work", lambda self: enter("host work"))
    record(TrainStep, "draw_dropout")
    record(evaluation, "mean_loss")
    record(checkpointing, "to_local")
    record(checkpointing, "save_checkpoint")
    with capturing_steps() if captured else contextlib.nullcontext():
        assert train.main(["--config", "run.json", "--max_iters=4", "--eval_interval=2"], last=True) == 0
    (on_loss,) = given
    assert on_loss.func is train.end_without_main_thread
    assert seen.count(("draw_dropout", "device step")) == 4 and seen.count(("mean_loss", "device step")) == 2 * 2
    assert set(seen) == {(name, "device step") for name in ("draw_dropout", "mean_loss", "to_local")} | {
        ("save_checkpoint", "host work")}  # fmt: skip


def test_the_heartbeat_watches_collectives(monkeypatch):
    """Also outside of steps, such as in a save: each reads the device after a collective."""
    group, seen = distributed.FSDP.__new__(distributed.FSDP), []
    group.heartbeat, group.device, group.main = SimpleNamespace(in_step=False), CPU, True
    monkeypatch.setattr(group, "all_reduce_", lambda tensors: seen.append(("all_reduce", group.heartbeat.in_step)))
    monkeypatch.setattr(dist, "broadcast", lambda *_: seen.append(("broadcast", group.heartbeat.in_step)))
    shard = SimpleNamespace(full_tensor=lambda: seen.append(("gather", group.heartbeat.in_step)) or torch.ones(1))
    assert group.sum_numbers(2.0) == [2.0]
    assert group.broadcast_object({"step": 3}) == {"step": 3}
    assert group.gather({"weight": shard})["weight"] == 1
    assert seen == [("all_reduce", True), ("all_reduce", True), ("broadcast", True), ("gather", True)]
    assert not group.heartbeat.in_step
    group.heartbeat = None
    group.start_heartbeat()
    assert group.heartbeat is None  # gloo needs none


def test_a_process_ended_by_its_heartbeat_prints_how_to_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    set_up(tmp_path)
    trainer = train.Trainer(load_run(["--config", "run.json", "--max_iters=4"], CONFIGS), train.Signals())
    trainer.complete()
    codes = []
    monkeypatch.setattr(trainer.ranks, "hard_exit", codes.append, raising=False)
    train.end_without_main_thread(trainer, ["--config", "run.json"], distributed.PeerLost("no answer"))
    output = capsys.readouterr().err.splitlines()[-2:]
    assert output[0].endswith("out of reach (no answer): step 4 is saved in ck; to go on:")
    assert output[1].endswith(RESUME)
    assert codes == [4] and trainer.lock is None
    trainer.close()


# ---- two machines --------------------------------------------------------------------------------------------------


def begin_machine(number: int, port: int) -> subprocess.Popen:
    """A torchrun agent, as one would be started on each machine."""
    about = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
             "--rdzv_id=run", "--local_addr=127.0.0.1"]  # fmt: skip
    script = [str(torture.ROOT / "train.py"), "--config", "run.json", "--max_iters=100000", "--eval_interval=100000"]
    Path("worker.sh").write_text('echo $$ > pid$MACHINE; echo $MACHINE > machine_of_rank$RANK; exec "$@"')
    agent = forks.fork_command([sys.executable, "-m", "torch.distributed.run"])
    command = [*agent, *about, "--no-python", "sh", "worker.sh"]
    with open(f"machine{number}.txt", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "MACHINE": str(number)}
        return subprocess.Popen([*command, sys.executable, *script], stdout=log, stderr=log, env=env)


def end_machine(number: int, agent: subprocess.Popen) -> None:
    """All of its processes at once, as when the power goes."""
    agent.kill()
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(int(read_log(f"pid{number}")), signal.SIGKILL)
    agent.wait()


def test_a_lost_machine_ends_the_run_and_the_next_launch_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_up(tmp_path)
    write_run(sample_length=0)
    port = free_port()
    machines = [begin_machine(number, port) for number in range(2)]
    try:
        log = Path("ck/metrics.jsonl")
        wait_until(lambda: (log.exists() and len(untimed_metrics()) > 9) or any(m.poll() is not None for m in machines))
        assert [m.poll() for m in machines] == [None, None], read_log("machine0.txt") + read_log("machine1.txt")
        keeps = int(read_log("machine_of_rank0"))
        end_machine(1 - keeps, machines[1 - keeps])
        assert machines[keeps].wait(60) != 0
        output = read_log(f"machine{keeps}.txt")
    finally:
        for number, machine in enumerate(machines):
            end_machine(number, machine)
    assert "error: another process of this run has ended" in output
    assert "--nnodes=2 --rdzv_backend=c10d" in output
    # its agent tells the worker's code, unless the machine that died was the one where the agents met
    assert "exitcode  : 4" in output or "RendezvousConnectionError" in output
    step = find_latest("ck").step
    assert step >= untimed_metrics()[-1]["step"]  # rank 0 has saved the step that it had done
    assert train.main(["--config", "run.json", RESUME, f"--max_iters={step + 2}"]) == 0
    assert find_latest("ck").step == step + 2
